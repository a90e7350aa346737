"""The lock under which passes of one model, asked for by several threads, come one by one.

Each pass uses the whole processor anyway, planners learn from how long passes take, and a CUDA
graph's results last until the next replay.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FairLock:
    """A lock of which threads that want it again and again take turns.

    A copy or an unpickled one is a new, free lock.
    """

    def __init__(self) -> None:
        self._next = threading.Lock()
        self._held = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other thread from the lock within this block.

        The thread that holds it may enter again.
        """
        me = threading.get_ident()
        if self._owner == me:  # as a logits processor that generates with the same model
            yield
            return
        # Whoever waits has this one, so that a thread that comes back for the lock waits behind it.
        with self._next:
            self._held.acquire()
        self._owner = me
        try:
            yield
        finally:
            self._owner = None
            self._held.release()

    @property
    def awaited(self) -> bool:
        """Whether another thread waits for it, while it is held."""
        return self._next.locked()

    def __reduce__(self) -> tuple[Any, ...]:
        """Make a copy, and what is unpickled, a new lock."""
        return FairLock, ()
