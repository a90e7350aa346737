"""Outputs: the generated texts beside a worker's figures, with accepted drafts marked.

`outputs_<device>.jsonl` holds a line for each problem, strategy, k and lookup. A problem's lines
are there before the worker's document names it, so a killed run leaves lines too many at most:
readers skip those, and the next run takes them away.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdsat.config import InputError, require
from sdsat.evaluation.summary import Key, key_of
from sdsat.files import reason, replacing, writing

RunOf = tuple[str, Key]  # a problem's id, and which of its runs
_PREFIX = "outputs_"


class Output(NamedTuple):
    """A generated text.

    Attributes:
        text: up to its end, or to a stop string.
        accepted: [first, behind the last) character of each stretch of accepted drafts.
    """

    text: str
    accepted: Sequence[Sequence[int]]

    def check(self) -> None:
        """Raise TypeError or ValueError unless this is a text with stretches of it."""
        places = [0, *(place for first, end in self.accepted for place in (first, end))]
        places.append(len(self.text))
        are_places = all(type(place) is int for place in places) and places == sorted(places)
        if not isinstance(self.text, str) or not are_places:
            raise ValueError(f"text = {self.text!r}, accepted = {self.accepted!r}"[:200])

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Cut the text into pieces, each with whether it is accepted drafts."""
        done = 0
        for first, end in self.accepted:
            yield self.text[done:first], False
            yield self.text[first:end], True
            done = end
        yield self.text[done:], False


def outputs_file(folder: Path, label: str) -> Path:
    """Name the file of a worker's outputs."""
    return folder / f"{_PREFIX}{label}.jsonl"


def append_outputs(
    folder: Path, label: str, task_id: str, outputs: Iterable[tuple[Key, Output]]
) -> None:
    """Add a problem's lines to a worker's file, before its document names the problem.

    Args:
        folder: of the results.
        label: of the worker.
        task_id: of the problem.
        outputs: of each of its runs.

    Raises:
        InputError: one line, where they can't be written.
    """
    lines = [
        {"task_id": task_id, "strategy": key[0], "k": key[1], "lookup": key[2], **output._asdict()}
        for key, output in outputs
    ]
    file = outputs_file(folder, label)
    with writing(file), file.open("a", encoding="ascii") as content:
        content.write("".join(json.dumps(line) + "\n" for line in lines))


def read_outputs(folder: Path, document: dict[str, Any]) -> dict[RunOf, Output]:
    """Read the outputs of the problems that a worker's document names.

    Returns none where their file is missing, as beside results that were measured before there were
    such files. Raises InputError, one line, for a damaged file.
    """
    file = outputs_file(folder, document["device"])
    return {
        (line["task_id"], key_of(line)): Output(line["text"], line["accepted"])
        for _, line in _finished_lines(file, document)
    }


def tidy_outputs(folder: Path, documents: Iterable[dict[str, Any]]) -> None:
    """Take away the lines of problems that a killed run had not finished.

    documents: of the workers. Raises InputError, one line, for a damaged file, and where one can't
    be written.
    """
    known = {document["device"]: document for document in documents}
    for file in folder.glob(f"{_PREFIX}*.jsonl"):
        label = file.stem.removeprefix(_PREFIX)
        kept = "".join(text for text, _ in _finished_lines(file, known.get(label)))
        if file.stat().st_size != len(kept):
            with replacing(file) as part:
                part.write_text(kept, "ascii")


def _finished_lines(
    file: Path, document: dict[str, Any] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the lines, as a text and its content, of the problems that `document` names.

    Raises InputError, one line, for a damaged line; a last one that does not end is none.
    """
    finished = {problem["task_id"] for problem in document["problems"]} if document else set()
    require(file.is_file() or not file.exists(), f"{file}: cannot be read (not a regular file)")
    if not file.exists():
        return
    try:
        for text in file.read_text("ascii").splitlines(keepends=True):
            if text.endswith("\n"):
                line = json.loads(text)
                Output(line["text"], line["accepted"]).check()
                hash(key_of(line))
                if line["task_id"] in finished:
                    yield text, line
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        said = reason(error) if isinstance(error, OSError) else repr(error)
        raise InputError(
            f"{file}: not a worker's outputs ({said}); delete it to do without its texts"
        ) from None
