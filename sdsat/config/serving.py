"""Settings of `sdsat serve`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sdsat.config.checks import require, whole
from sdsat.config.loading import CONTEXT
from sdsat.config.options import option


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where a server listens, who may ask, and how much.

    Raises InputError for a number out of its bounds, an empty host, and a key that no header can
    carry.

    Attributes:
        host: address.
        port: 0 for a free one.
        api_key: what a client must send; None for nothing.
        batch_size: sequences decoded at once, at most.
        queue: sequences that may wait for a place.
        context: tokens of prompt and answer together, at most; a model may take fewer.
    """

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "0 for a free one.")
    api_key: str | None = option(None, "What clients must send.", env="SDSAT_API_KEY")
    batch_size: int = option(8, "Sequences decoded at once, at most.")
    queue: int = option(32, "Sequences that may wait for a place; others are told to come back.")
    context: int = option(CONTEXT, "Tokens of prompt and answer together, at most.")

    def __post_init__(self) -> None:
        whole("port", self.port, "a number from 0 to 65535", 0, 65535)
        for name in ("batch_size", "queue"):
            whole(name, getattr(self, name), "1 or more, a whole number", 1)
        room = "2 or more, a whole number: a token of the prompt, and one of the answer"
        whole("context", self.context, room, 2)
        printable = self.api_key is None or re.fullmatch("[!-~]+", self.api_key) is not None
        expected = "expected letters, digits and signs of ASCII without a space, or leave it out"
        require(printable, f"api_key: what no header can carry; {expected}")
        require(self.host != "", "host: empty; expected an address, as 127.0.0.1")
