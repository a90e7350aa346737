"""Records: JSON documents that are written atomically, say what machine they come from, and let an interrupted run resume."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .config import InputError, require
from .decode import probe_rows
from .model import SatModel


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document so that `path` holds either the old or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def plain(config: Any) -> dict[str, Any]:
    """A settings dataclass as JSON gives it back: tuples are lists, shares are texts."""
    forms: dict[type, Any] = {tuple: list, Fraction: str}
    return {key: forms[type(value)](value) if type(value) in forms else value for key, value in asdict(config).items()}


def read_json(path: Path) -> Any:
    """A JSON file's content, or an InputError that names the file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def open_record(model: SatModel, config: Any, out: Path | None) -> dict[str, Any]:
    """The document of a run over HumanEval's problems, new or, where `out` exists, as an interrupted run left it.

    config: the run's settings dataclass; a record of other settings is refused.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    settings = {"model": model.name, "dataset": "humaneval", "dtype": dtype, **plain(config)}
    if out is None or not out.exists():
        probe_rows(model)  # so that the environment knows the row policy
        head = {"schema_version": 1, "environment": environment(model), "settings": settings}
        return {**head, "summary": [], "problems": []}
    document = read_json(out)
    held = document.get("settings") if isinstance(document, dict) else None
    require(held is not None, f"{out}: not a record of this command; delete it")
    require(held == settings, f"{out}: holds a run of other settings; delete it or choose another file")
    return document


def environment(model: SatModel) -> dict[str, Any]:
    """Versions, device and row policy: what a reader needs to compare figures."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    cuda = model.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "sdsat": __version__,
        **versions,
        "platform": platform.platform(),
        "device": model.device.type,
        "device_name": torch.cuda.get_device_name(model.device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "commit": _commit(),
        "engine": model.engine_name,
        "row_policy": asdict(model.row_policy) if model.row_policy else None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _commit() -> str | None:
    """The commit of the source tree that runs, with '+' when it has changes; None for an installed package."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True)
    except OSError:
        return None
    return commit.stdout.strip() + ("+" if changed.returncode else "") if commit.returncode == 0 else None
