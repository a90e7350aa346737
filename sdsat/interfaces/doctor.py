"""What this machine gives: ten lines, each with what would mend it, if something is missing.

Nothing here imports torch, which takes seconds and may be what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from sdsat import __version__
from sdsat.cache_folder import cache_dir
from sdsat.config import InputError
from sdsat.engines.native.compiler import (
    Unavailable,
    compile_library,
    compiler,
    library_name,
)
from sdsat.environment import free_memory, instructions, processor
from sdsat.models import embedded

_GIB = 2**30
_ROOM = _GIB  # of memory, and of disk, that the default model takes with its conversion
_DEVELOPMENT = "test"  # the extra that is no part of a use


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    Attributes:
        name: what it is about.
        found: what is there.
        fix: what would mend it; empty where nothing is missing.
        needed: whether nothing works without what is missing.
    """

    name: str
    found: str
    fix: str = ""
    needed: bool = False

    def __str__(self) -> str:
        """Write the line."""
        return f"{self.name:<13} {self.found}" + (f" -> {self.fix}" if self.fix else "")


def examine() -> list[Finding]:
    """Look at this machine, in less than a second or two."""
    checks: tuple[Callable[[], Finding], ...] = (
        _program,
        _packages,
        _extras,
        _compiler,
        _instructions,
        _engine,
        _threads,
        _memory,
        _gpu,
        _cache,
    )
    return [check() for check in checks]


def _program() -> Finding:
    version = platform.python_version()
    return Finding("sdsat", f"{__version__}, Python {version} in {sys.prefix}")


def _missing(requirement: Requirement) -> str:
    """Say what is wrong with a required package; empty if it is there in a version that will do."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return requirement.name
    good = requirement.specifier.contains(version, prereleases=True)
    return "" if good else f"{requirement.name} {version}"


def _requirements(extra: str = "") -> list[Requirement]:
    """List what the package requires, or what one of its extras does."""
    found = map(Requirement, metadata.requires("sdsat") or ())
    return [
        each
        for each in found
        if (each.marker is None and not extra)
        or (each.marker is not None and extra and each.marker.evaluate({"extra": extra}))
    ]


def _pip(requirements: list[Requirement]) -> str:
    return "pip install " + " ".join(f"'{each.name}{each.specifier}'" for each in requirements)


def _packages() -> Finding:
    try:
        required = _requirements()
    except metadata.PackageNotFoundError:
        return Finding("packages", "sdsat itself is not installed", "pip install .", True)
    if wrong := [each for each in required if _missing(each)]:
        said = ", ".join(map(_missing, wrong))
        return Finding("packages", f"missing or of another version: {said}", _pip(wrong), True)
    main = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return Finding("packages", f"{main}, and {len(required) - 2} more")


def _extras() -> Finding:
    try:
        names = metadata.metadata("sdsat").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return Finding("extras", "not known", "pip install .")
    names = [name for name in names if name != _DEVELOPMENT]
    wrong = {name: [each for each in _requirements(name) if _missing(each)] for name in names}
    lacking = [name for name in names if wrong[name]]
    there = ", ".join(name for name in names if name not in lacking) or "none"
    if not lacking:
        return Finding("extras", there)
    fix = _pip([each for name in lacking for each in wrong[name]])
    return Finding("extras", f"{there}; without {', '.join(lacking)}", fix)


def _working_compiler() -> list[str]:
    """Return the compiler's command once it has made a library.

    Raises Unavailable or OSError, where it can't.
    """
    command = compiler()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "trial.cpp"
        source.write_text('#include <omp.h>\nextern "C" int n() { return omp_get_num_threads(); }')
        compile_library(command, source, Path(folder) / "trial.so")
    return command


def _compiler() -> Finding:
    install = "install one (apt install g++, dnf install gcc-c++), or set CXX"
    if sys.platform == "darwin":  # whose own has no OpenMP
        install = "brew install gcc, and set CXX to its g++-15 or what it is called"
    if os.environ.get("CXX"):
        install = "unset CXX, or set it to a C++ compiler with OpenMP"
    try:
        command = _working_compiler()
    except (Unavailable, OSError) as reason:
        return Finding("compiler", f"none that works ({reason})", install)
    return Finding("compiler", f"{' '.join(command)}, with OpenMP")


def _instructions() -> Finding:
    return Finding("instructions", f"{instructions() or 'no wide vectors'}: {processor()}")


def _engine() -> Finding:
    try:
        name = library_name(compiler())
        kept = any((cache_dir() / "native").glob(f"{name}-*.so"))
        if not kept:
            _working_compiler()
    except InputError:  # of the cache folder, which has a line of its own
        kept = False
    except (Unavailable, OSError):
        slower = "transformers' modules, about three times slower on a CPU"
        return Finding("engine", slower, "a C++ compiler, as above")
    return Finding("engine", "native, " + ("compiled" if kept else "compiled at the first use"))


def _threads() -> Finding:
    given = os.environ.get("OMP_NUM_THREADS", "")
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    said = f"{count} processor{'s' * (count > 1)}" + (f", OMP_NUM_THREADS={given}" if given else "")
    first = given.split(",")[0].strip()  # the others are of loops in loops
    number = int(first) if first.isdecimal() else 0
    fix = "unset OMP_NUM_THREADS to use them all"
    if not number:
        fix = "unset OMP_NUM_THREADS, which is no number of threads"
    elif number > count:
        fix = "unset OMP_NUM_THREADS, which is more than there are"
    return Finding("threads", said, fix if given and number != count else "")


def _memory() -> Finding:
    free = free_memory()
    if free is None:
        return Finding("memory", "not known here")
    fix = "end other programs: the default model takes about 1 GiB" if free < _ROOM else ""
    return Finding("memory", f"{free / _GIB:.1f} GiB free", fix)


def _gpu() -> Finding:
    names = []
    if command := shutil.which("nvidia-smi"):
        asked = [command, "--query-gpu=name", "--format=csv,noheader"]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
            names = done.stdout.strip().splitlines() if done.returncode == 0 else []
        except (OSError, subprocess.TimeoutExpired):
            names = []
    if not names:
        return Finding("GPU", "none; the CPU decodes")
    fix = "" if _has_cuda() else "install a torch that is built for CUDA"
    return Finding("GPU", ", ".join(names) + ("" if not fix else ", not used"), fix)


def _has_cuda() -> bool:
    """Tell whether the installed torch was built for CUDA, without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    version = Path(found.origin).with_name("version.py")
    text = version.read_text() if version.is_file() else ""
    return re.search(r"^cuda\b.*= *['\"]", text, flags=re.M) is not None


def _cache() -> Finding:
    other = "set SDSAT_CACHE to a folder that can be written to"
    try:
        folder = cache_dir()
        there = next(above for above in (folder, *folder.parents) if above.exists())
        room = shutil.disk_usage(there).free
    except (InputError, OSError) as error:
        return Finding("cache", str(error), other)
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return Finding("cache", f"{folder} cannot be written to", other)
    models = [each.base for each in embedded.MODELS if (folder / each.base).is_dir()]
    said = f"{folder}: {', '.join(models) or 'no model yet'}, {room / _GIB:.0f} GiB free"
    return Finding("cache", said, "" if models or room > _ROOM else "free a gigabyte there")
