"""Resuming: one run at a time writes to a place, and a later one goes on from there.

It goes on only from what the same run left. Every command that resumes goes by this protocol: it
makes a `Place`, holds it while it runs, reads what is there, compares it with what it would write
itself, and goes on from it. What is of another run, or damaged, is refused in one line and stays as
it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sdsat.config import require
from sdsat.files import destination, locked, read_json

# Facts of an environment that may differ: another commit with the same sources changes nothing.
_INFORMATIVE = ("commit",)


class Processes(Protocol):
    """The processes of one run, as accelerate has them."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is the first of them."""

    def wait_for_everyone(self) -> None:
        """Wait until all of them are here."""


@dataclass(frozen=True)
class Place:
    """A file or folder that a run writes to and that a later run may go on from.

    Attributes:
        path: of the file or folder.
        name: as messages have it, such as 'out=runs/adapter'.
        lock: the file that is locked.
    """

    path: Path
    name: str
    lock: Path

    @staticmethod
    def folder(path: Path, name: str) -> Place:
        """Name a folder, which need not be there yet; its lock is in it."""
        return Place(path, name, path / ".lock")

    @staticmethod
    def file(path: Path, argument: str) -> Place:
        """Name a file, which need not be there yet; its lock is beside it.

        argument: what gave the path, such as '--out'. Raises InputError, one line, where the path
        can't be written to.
        """
        target = destination(path, argument)
        return Place(path, str(path), target.with_name(f".{target.name}.lock"))

    @contextmanager
    def held(self, processes: Processes | None = None) -> Iterator[None]:
        """Keep other runs from writing here within this context.

        processes: those of this run. The first of them holds the lock, and none reads what is here
        before it does. Raises InputError, one line, while another run holds it.
        """
        first = processes is None or processes.is_main_process
        with locked(self.lock, self.name) if first else nullcontext():
            if processes is not None:
                processes.wait_for_everyone()
            yield

    def read(self, file: Path, parts: Sequence[str], reason: str) -> dict[str, Any] | None:
        """Read what a run left in `file`, which is this place or in it.

        Args:
            file: a JSON document.
            parts: the keys whose values must be objects.
            reason: what is said of a document that lacks one, and what to do.

        Returns:
            The document; None where there is nothing.

        Raises:
            InputError: one line, where the document can't be read, or lacks a part.
        """
        if not file.exists():
            return None
        document = read_json(file)
        whole = isinstance(document, dict) and all(
            isinstance(document.get(part), dict) for part in parts
        )
        self.require(whole, reason)
        return dict(document)

    def require(self, condition: bool, reason: str) -> None:
        """Refuse to go on unless `condition` holds.

        Raises InputError, one line, which names the place and gives the reason.
        """
        require(condition, f"{self.name}: {reason}")

    def check_same(
        self,
        held: dict[str, Any],
        found: dict[str, Any],
        reason: str = (
            "was begun with {key}={held}, now it is {found}; delete it or choose another"
        ),
    ) -> None:
        """Refuse to go on from what another run has begun.

        Args:
            held: what the run that was here is known by: settings, or machine, versions, code and
                weights. What it did not note is not taken for the same.
            found: the same of this run.
            reason: what is said of the first difference.

        Raises:
            InputError: one line, which names the first key that differs.
        """
        for key in sorted(held.keys() | found.keys()):
            before = held.get(key)
            now = found.get(key)
            same = before == now or key in _INFORMATIVE
            self.require(same, reason.format(key=key, held=before, found=now))
