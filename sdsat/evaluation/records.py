"""Records: JSON documents that say what they come from, and let an interrupted run resume.

They name the machine, the code and the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from sdsat.decoding.decoder import Decoder
from sdsat.environment import code_hash, commit, machine, system
from sdsat.evaluation.summary import SCHEMA_VERSION, read_workers
from sdsat.evaluation.sweep import BenchConfig
from sdsat.files import make_folder
from sdsat.models.identity import adapter_hash, base_hash
from sdsat.models.sat_model import SatModel
from sdsat.resume import Place

# Of audits, evaluations and inspections: strategies are named, margins are in logits.
RECORD_VERSION = 2
_OTHER = "delete it or choose another file"


def identity(name: str, model: SatModel | None = None) -> dict[str, str | None]:
    """Compute hashes of what figures depend on beside the machine.

    That is this package's sources, the base, and the adapter, if `name` is one.

    model: what was loaded by that name. Raises InputError, one line, for a model that isn't there.
    """
    return {
        "code": code_hash(),
        "base": base_hash(name, model and model.lm),
        "adapter": adapter_hash(name),
    }


def environment(decoder: Decoder) -> dict[str, Any]:
    """Collect versions, device, row policy, and hashes of code and weights.

    That is what a reader needs to compare figures.
    """
    model = decoder.model
    return {
        **system(),
        **machine(model.devices, model.dtype_name, decoder.engine.name),
        **identity(model.name, model),
        "commit": commit(),
        "row_policy": asdict(decoder.engine.row_policy),
    }


def plain(config: Any) -> dict[str, Any]:
    """Write a settings dataclass as JSON gives it back: tuples are lists, shares, paths texts."""

    def written(value: Any) -> Any:
        if isinstance(value, tuple):
            return list(value)
        return str(value) if isinstance(value, (Fraction, Path)) else value

    return {key: written(value) for key, value in asdict(config).items()}


@contextmanager
def resumed(out: Path, new: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Hold `out`, and yield what an interrupted run left there, or else `new`.

    It was a run of a script with the same settings in the same environment.

    Raises InputError, one line, where `out` holds anything else or another run writes to it.
    """
    make_folder(out.parent)
    place = Place.file(out, "--out")
    parts = ("environment", "settings")
    with place.held():
        reason = "not a record of this script; delete it or choose another --out"
        held = place.read(out, parts, reason) or new
        for part in parts:
            place.check_same(held[part], new[part])
        yield held


@contextmanager
def open_record(
    decoder: Decoder, config: Any, out: Path | None, entries: str
) -> Iterator[dict[str, Any]]:
    """Hold `out`, and yield the document of a run over a data set's problems.

    It is new or, where `out` exists, as an interrupted run left it.

    Args:
        decoder: what answers.
        config: the run's settings, a dataclass.
        out: the record's file; None for a document in memory.
        entries: the key under which a problem has its list of results.

    Raises:
        InputError: one line, for a record of other settings, of another environment or of an older
            schema, for one that is damaged, and while another run writes to it.
    """
    head = record_head(decoder, config)
    if out is None:
        yield {**head, "summary": [], "problems": []}
        return
    place = Place.file(out, "--out")
    with place.held():
        document = place.read(out, (), f"not a record of this command; {_OTHER}")
        if document is None:
            document = {**head, "summary": [], "problems": []}
        else:
            _check_record(place, document, head, entries)
        yield document


def record_head(decoder: Decoder, config: Any) -> dict[str, Any]:
    """Collect what a record is known by."""
    model = decoder.model
    return {
        "schema_version": RECORD_VERSION,
        "environment": environment(decoder),
        "settings": {
            "model": model.name,
            "dtype": model.dtype_name,
            "sat": [model.sat.token_id, model.sat.k, *model.sat.deeper] if model.sat else None,
            **plain(config),
        },
    }


def _check_record(
    place: Place, document: dict[str, Any], head: dict[str, Any], entries: str
) -> None:
    """Refuse a record that this run can't go on from.

    Args:
        place: of the record.
        document: the record.
        head: of this run.
        entries: the key under which a problem has its list of results.

    Raises:
        InputError: one line, with the reason.
    """
    version = document.get("schema_version")
    place.require(
        version in (RECORD_VERSION, None),
        f"schema_version {version}, expected {RECORD_VERSION}; {_OTHER}",
    )
    place.require(_is_record(document, entries), f"not a whole record of this command; {_OTHER}")
    place.check_same(
        document["settings"],
        head["settings"],
        "holds a run of other settings ({key}={held}, not {found}); " + _OTHER,
    )
    place.check_same(document["environment"], head["environment"])


def _is_record(document: dict[str, Any], entries: str) -> bool:
    """Tell whether a document has all that an interrupted run goes on from."""
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


def results_place(folder: Path) -> Place:
    """Name a results folder, with a document for each worker."""
    return Place.folder(folder, f"results folder {folder}")


def recorded_settings(config: BenchConfig) -> dict[str, Any]:
    """Collect what a worker document keeps of the settings, and a folder is known by."""
    settings = plain(config)
    settings.pop("data_limit")
    if config.method == "greedy":
        settings |= {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    return settings


def held_documents(folder: Path, config: BenchConfig) -> list[dict[str, Any]]:
    """Read the worker documents that a results folder holds already.

    Raises InputError, one line, for a folder of other settings, or of figures of other code or
    weights.
    """
    place = results_place(folder)
    documents = read_workers(folder)
    settings = recorded_settings(config)
    for document in documents:
        place.check_same(
            {key: document["settings"].get(key) for key in settings},
            settings,
            "holds results for {key}={held}, not {found}; delete it or set RESULTS_DIR",
        )
    found = identity(config.model) if documents else {}
    for document in documents:
        held = document.get("environment", {})
        place.check_same({key: held.get(key) for key in found}, found)
    return documents


def open_worker_document(
    folder: Path, label: str, config: BenchConfig, found: dict[str, Any]
) -> dict[str, Any]:
    """Make a new worker document, or read the one that an earlier run left.

    Args:
        folder: of the results, which the parent process holds.
        label: of the worker.
        config: what is measured.
        found: this worker's environment.

    Raises:
        InputError: one line, where a document there was measured in another environment.
    """
    for document in read_workers(folder):
        results_place(folder).check_same(document["environment"], found)
        if document["device"] == label:
            return document
    return {
        "schema_version": SCHEMA_VERSION,
        "device": label,
        "environment": found,
        "settings": recorded_settings(config),
        "problems": [],
    }
