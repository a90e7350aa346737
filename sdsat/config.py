"""Settings as frozen dataclasses, checked when they are made; `InputError` is every bad-input message of the program."""

from __future__ import annotations

import math
from dataclasses import dataclass


class InputError(ValueError):
    """Bad input. The message is one line that names the argument, its value and what would be right; the CLI exits with 2."""


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. Temperature 0 is greedy; filters apply in the order temperature, top-k, top-p.

    temperature: 0 for greedy, else a positive number that divides the logits.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
    seed: with the index of the emitted token, the only source of randomness (see sampling.py).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.temperature) and (self.temperature == 0 or self.temperature >= 1e-6),
            f"temperature={self.temperature}: expected 0 (greedy) or a positive number, at least 1e-6",
        )
        require(self.top_k >= 0, f"top_k={self.top_k}: expected 0 (off) or a positive whole number")
        require(0 < self.top_p <= 1, f"top_p={self.top_p}: expected a number in (0, 1]")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class SatConfig:
    """The semantic adaptive token (SAT) of a model.

    token_id: id of the SAT; below the vocabulary size when the checkpoint holds its embedding (full mode), equal to it
        when an adapter brings the embedding (adapter mode).
    k: the depth the SATs were trained for.
    """

    token_id: int
    k: int

    def __post_init__(self) -> None:
        require(self.token_id >= 0, f"sat_token_id={self.token_id}: expected a token id, 0 or more")
        require(self.k >= 1, f"trained k={self.k}: expected 1 or more")


@dataclass(frozen=True)
class DecodeConfig:
    """One generation. k = 0 is AR: plain autoregressive decoding by the same loop.

    tree: 'chain', 'paper' (the paper's sampling trees, k = 5, 7, 9, 11, 13) or a branching list with one width a depth.
    stop_ids: token ids that end the output; the id itself is kept as the last token, as `transformers` does.
    stop_strings: the output ends with the token that completes one; `Generation.text` is cut before it.
    """

    k: int = 0
    max_new_tokens: int = 256
    tree: str | tuple[int, ...] = "chain"
    sampling: SamplingConfig = SamplingConfig()
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.k >= 0, f"k={self.k}: expected 0 (AR) or a positive number of SATs")
        require(self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens}: expected 1 or more")
        require(all(self.stop_strings), "stop_strings: an empty string would stop at once; leave it out")
