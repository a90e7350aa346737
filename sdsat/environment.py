"""The machine and the program: what a reader needs to compare figures."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sdsat import __version__
from sdsat.cache_folder import remembered_sha256
from sdsat.config import require
from sdsat.files import sha256_of_all

# of an environment: what another commit with the same sources would have changed
_INFORMATIVE = ("commit",)


def check_environment(held: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Refuse to go on with a record that was begun on another machine, or with other versions, code
    or weights.
    """
    for key in sorted(held.keys() | found.keys()):
        before = held.get(key)
        now = found.get(key)
        same = before == now or key in _INFORMATIVE
        require(
            same,
            f"{where}: was begun with {key}={before}, now it is {now}; delete it or choose another",
        )


def code_hash() -> str:
    """One hash for all of this package's sources."""
    return folder_hash(Path(__file__).parent, ("**/*.py", "**/*.cpp", "**/*.h"))


def folder_hash(folder: Path, patterns: Iterable[str]) -> str:
    """One hash for the names and contents of the files in `folder` that match a glob pattern."""
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sha256_of_all((str(file.relative_to(folder)), remembered_sha256(file)) for file in files)


def machine(devices: list[torch.device], dtype: torch.dtype, engine: str) -> dict[str, Any]:
    """Versions and devices: what a pass costs depends on these, whatever the weights."""
    names = ("torch", "transformers", "numpy")
    cuda = devices[0].type == "cuda"
    gpus = " + ".join(map(torch.cuda.get_device_name, devices)) if cuda else ""
    return {
        "sdsat": __version__,
        **{name: importlib.metadata.version(name) for name in names},
        "device": devices[0].type,
        "device_name": gpus or cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "engine": engine,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit that holds these very sources; None where they were changed since, or are no part
    of a repository.
    """
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
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
