"""What a generation leaves for the next one: the keys and values of its text."""

from __future__ import annotations

from sdsat.decoding.sequence import Sequence
from sdsat.engines.base import Engine, OnRead, SeparateCaches


class KeptCache:
    """Keys and values of the last text, for a prompt that begins as it does.

    Its owner gives it to one generation after another (`Decoder.generate`), and of each prompt only
    what is new is read. It holds one text, prompt and output, and goes with its owner. A generation
    that an exception ends leaves what it had come to. Outputs are those without it; where that
    can't be had (`Engine.keeps`), and after the weights have changed, a prompt is read as a whole.
    """

    def __init__(self) -> None:
        self._last: tuple[Engine, Sequence] | None = None

    @property
    def tokens(self) -> list[int]:
        """The text that it holds."""
        if self._last is None:
            return []
        _, sequence = self._last
        return sequence.text[: min(sequence.cache.length, sequence.context)].tolist()

    def caches(self, engine: Engine, on_read: OnRead | None) -> SeparateCaches:
        """Make the caches of a generation, which begin with what is held.

        engine: of the generation. on_read: as of `Engine.prefill`.
        """
        if self._last is None or self._last[0] is not engine or not engine.keeps:
            return SeparateCaches(engine, None, on_read)
        return SeparateCaches(engine, (self.tokens, self._last[1].cache), on_read)

    def keep(self, engine: Engine, sequence: Sequence) -> None:
        """Hold a sequence's text, as far as it has come and will come."""
        self._last = (engine, sequence) if engine.keeps else None
