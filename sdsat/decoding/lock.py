"""Passes of one model, asked for by several threads, come one after the other: each of them uses
the whole processor anyway, planners learn from how long passes take, and a CUDA graph's results
last until the next replay.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FairLock:
    """A lock of which threads that want it again and again take turns; a copy or an unpickled one
    is a new, free lock.
    """

    def __init__(self) -> None:
        self._next = threading.Lock()
        self._held = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within this block no other thread holds the lock.

        The thread that holds it may enter again.
        """
        me = threading.get_ident()
        if self._owner == me:  # a logits processor that generates with the same model
            yield
            return
        # whoever waits has this one, so that a thread that comes back for the lock waits behind it
        with self._next:
            self._held.acquire()
        self._owner = me
        try:
            yield
        finally:
            self._owner = None
            self._held.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return FairLock, ()
