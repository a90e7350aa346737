"""The batch of `sdsat serve`: one thread decodes, requests enter between two passes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from prometheus_client import Counter, Gauge

from sdsat.config import ServeConfig
from sdsat.decoding import sequence
from sdsat.decoding.decoder import Decoder

TOKENS = Counter("sdsat_tokens", "Tokens of answers.", ["kind"])
RUNNING = Gauge("sdsat_running_sequences", "Sequences that are decoded now.")
WAITING = Gauge("sdsat_waiting_sequences", "Sequences that wait for a place.")


class Full(Exception):
    """The queue has no room."""


class ServedBatch:
    """What waits, and what is decoded by a thread; both by the requests' numbers."""

    def __init__(self, decoder: Decoder, config: ServeConfig):
        self._decoder = decoder
        self._config = config
        self._waiting = dict[int, sequence.Request]()
        self._tell = dict[int, Callable[[Any], Any]]()  # of those that somebody wants
        self._came = asyncio.Event()
        WAITING.set_function(lambda: len(self._waiting))
        RUNNING.set_function(lambda: len(self._tell) - len(self._waiting))

    async def run(self) -> None:
        """Decode what comes, until this is cancelled."""
        try:
            while await self._came.wait():
                self._came.clear()
                while self._waiting:
                    await asyncio.to_thread(self._decode)
        finally:
            self.leave(list(self._tell))  # so what is decoded ends with its next pass

    def enter(self, requests: list[sequence.Request]) -> asyncio.Queue[tuple[int, Any]]:
        """Queue requests. Raises Full where there is no room.

        Returns where (number, new tokens, the result at the end, or an error) will be.
        """
        if len(self._waiting) + len(requests) > self._config.queue:
            raise Full
        pieces, loop = asyncio.Queue[tuple[int, Any]](), asyncio.get_running_loop()
        for request in requests:
            self._tell[request.number] = partial(_put, loop, pieces, request.number)
        self._waiting |= {request.number: request for request in requests}
        self._came.set()
        return pieces

    def leave(self, numbers: Iterable[int]) -> None:
        """Free the places of requests that are answered, or whose client has gone."""
        for number in numbers:
            self._waiting.pop(number, None)
            self._tell.pop(number, None)

    def _decode(self) -> None:
        batch = (self._arrivals, self._config.context, self._on_tokens, self._config.batch_size)
        try:
            for number, out in self._decoder.iterate_arrivals(*batch):
                self._tell.pop(number, _nobody)(out)
        except Exception as error:
            logging.exception("decoding failed")
            for number in list(self._tell):
                self._waiting.pop(number, None)
                self._tell.pop(number, _nobody)(error)

    def _arrivals(self, free: int) -> list[sequence.Request]:
        came = [self._waiting.pop(number, None) for number in list(self._waiting)[:free]]
        return [request for request in came if request is not None]

    def _on_tokens(self, number: int, tokens: list[int], drafted: list[bool]) -> bool:
        TOKENS.labels("own").inc(drafted.count(False))
        TOKENS.labels("accepted drafts").inc(drafted.count(True))
        self._tell.get(number, _nobody)(tokens)
        return number not in self._tell


def _put(loop: Any, pieces: asyncio.Queue[Any], number: int, piece: Any) -> None:
    loop.call_soon_threadsafe(pieces.put_nowait, (number, piece))


def _nobody(piece: Any) -> None:
    """Take what nobody waits for any more."""
