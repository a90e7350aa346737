"""Records: JSON documents that are written atomically, say what machine they come from, and let an interrupted run resume."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from . import __version__
from .config import InputError, require
from .decode import probe_rows
from .model import SatModel

RECORD_VERSION = 2  # of audits and evaluations: strategies are named, margins are in logits


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What writes within this context: a full disk, say, becomes an InputError, one line that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save's writer
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be written ({reason})") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then becomes `path`: that holds either the old or the new content, never a part.

    Raises InputError, one line, where it can't be written.
    """
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            yield part
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def write_json(path: Path, document: Any) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(document, indent=1) + "\n")


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


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold the lock `file`, so that one run at a time writes `what`; InputError, one line, for a second one."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{what}: another run is writing to it; wait for it or choose another") from None
    except OSError as error:
        raise InputError(f"{what}: cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()


def check_environment(held: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Refuse to go on with a record that was begun on another machine, with other versions or another commit."""
    for key, value in held.items():
        require(
            found.get(key) == value,
            f"{where}: was begun with {key}={value}, now it is {found.get(key)}; delete it or choose another",
        )


def resumed(out: Path, new: dict[str, Any]) -> dict[str, Any]:
    """`new`, or what an interrupted run of a script with the same settings left at `out` in the same environment."""
    out.parent.mkdir(parents=True, exist_ok=True)
    held: dict[str, Any] = read_json(out) if out.exists() else new
    for part in ("environment", "settings"):
        for key, value in new[part].items():
            before = held.get(part, {}).get(key)
            require(before == value, f"{out}: begun with {key}={before}, now it is {value}; delete it or choose another --out")
    return held


@contextmanager
def open_record(model: SatModel, config: Any, out: Path | None) -> Iterator[dict[str, Any]]:
    """The document of a run over HumanEval's problems, new or, where `out` exists, as an interrupted run left it. Locks `out`.

    config: the run's settings dataclass; a record of other settings, of another environment or of an older schema is refused.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    settings = {"model": model.name, "dataset": "humaneval", "dtype": dtype, **plain(config)}
    probe_rows(model)  # so that the environment knows the row policy
    head: dict[str, Any] = {"schema_version": RECORD_VERSION, "environment": environment(model), "settings": settings}
    with locked(out.with_name(f".{out.name}.lock"), str(out)) if out else nullcontext():
        document = {**head, "summary": [], "problems": []}
        if out is not None and out.exists():
            document = read_json(out)
            held = document.get("settings") if isinstance(document, dict) else None
            require(held is not None, f"{out}: not a record of this command; delete it")
            version, other = document.get("schema_version"), "delete it or choose another file"
            require(version == RECORD_VERSION, f"{out}: schema_version {version}, expected {RECORD_VERSION}; {other}")
            require(held == settings, f"{out}: holds a run of other settings; {other}")
            check_environment(document["environment"], head["environment"], str(out))
        yield document


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
        "device_name": " + ".join(map(torch.cuda.get_device_name, model.devices)) if cuda else _cpu_name(),
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
