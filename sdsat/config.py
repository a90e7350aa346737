"""Settings as frozen dataclasses, checked when they are made; `InputError` is every bad-input
message of the program.
"""

from __future__ import annotations

import hashlib
import math
import numbers
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

STRATEGIES = ("two-step", "rounded", "one-pass", "auto")  # that draft with SATs
LOOKUP = "lookup"  # the strategy that drafts without them, from the text so far alone
ALL_STRATEGIES = (LOOKUP, *STRATEGIES)
NUM_LOOKUP = 12  # tokens that 'auto' and 'lookup' look up where nothing else is said
MAX_ROWS = (
    96  # of one pass: bounds a draft tree with its SATs, and with them the cache's fixed length
)
MAX_K = MAX_ROWS - 2  # x and, after a pass in 8 bits, one more draft than SATs
MAX_TRAINED_K = 16  # depth of an adapter
TRAIN_MODES = ("adapter", "everywhere", "full")
_ONLY_IN = {
    "rank": ("adapter", "everywhere"), "targets": ("adapter", "everywhere"), "head": ("adapter",),
    "standard": ("everywhere", "full"), "embedding_steps": ("full",), "checkpointing": ("full",),
}  # fmt: skip
# linear layers that get a low-rank update
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


class InputError(ValueError):
    """Bad input.

    The message is one line that names the argument, its value and what would be right; the CLI
    exits with 2.
    """


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def whole(
    name: str, value: Any, expected: str, low: int | None = None, high: int | None = None
) -> int:
    """`value` as an int: a whole number, numpy's too but no bool, from `low` to `high`.

    Else InputError names it.
    """
    good = _is(numbers.Integral, value)
    good = good and (low is None or value >= low) and (high is None or value <= high)
    require(good, f"{name}={value!r}: expected {expected}")
    return int(value)


def real(name: str, value: Any, expected: str, low: float, high: float = math.inf) -> float:
    """`value` as a float: a finite number, numpy's too but no bool, from `low` to `high`.

    Else InputError names it.
    """
    good = _is(numbers.Real, value) and math.isfinite(value) and low <= value <= high
    require(good, f"{name}={value!r}: expected {expected}")
    return float(value)


def several(name: str, value: Any, expected: str) -> tuple[Any, ...]:
    """A list or tuple as a tuple; a text is neither. Else InputError names it."""
    require(isinstance(value, (list, tuple)), f"{name}={value!r}: expected {expected}")
    return tuple(value)


def _keep(config: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass while it is made: numpy's numbers become Python's, lists
    tuples.
    """
    for name, value in values.items():
        object.__setattr__(config, name, value)


def plain_warnings() -> None:
    """Warnings as one line each, as every other message of the command line."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)  # type: ignore[assignment]


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Temperature 0 is greedy; filters apply in the order temperature, top-k, top-p.

    temperature: 0 for greedy, else a positive number that divides the logits.
    top_k: keep the k most likely tokens, and all that tie with the k-th; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
    seed: with the index of the emitted token, the only source of randomness (see sampling.py).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        expected = "0 (greedy) or a positive number, at least 1e-6"
        temperature = real("temperature", self.temperature, expected, 0)
        require(
            temperature == 0 or temperature >= 1e-6,
            f"temperature={temperature}: expected {expected}",
        )
        top_p = real("top_p", self.top_p, "a number in (0, 1]", 0, 1)
        require(top_p > 0, f"top_p={top_p}: expected a number in (0, 1]")
        top_k = whole("top_k", self.top_k, "0 (off) or a positive whole number", 0)
        _keep(
            self,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=whole("seed", self.seed, "a whole number"),
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def of_problem(self, task_id: str) -> SamplingConfig:
        """The same with a seed of this problem's own, so that the problems of a run are independent
        draws.

        It is the first 63 bits of the SHA-256 of 'SEED TASK_ID'.
        """
        digest = hashlib.sha256(f"{self.seed} {task_id}".encode()).digest()
        return self if self.greedy else replace(self, seed=int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class SatConfig:
    """The semantic adaptive token (SAT) of a model.

    token_id: id of the SAT; below the vocabulary size when the checkpoint holds its embedding (full
    mode), equal to it
        when an adapter brings the embedding (adapter mode).
    k: the depth the SATs were trained for.
    """

    token_id: int
    k: int

    def __post_init__(self) -> None:
        token_id = whole("sat_token_id", self.token_id, "a token id, 0 or more", 0)
        _keep(
            self,
            token_id=token_id,
            k=whole("trained_k", self.k, f"a whole number from 1 to {MAX_K}", 1, MAX_K),
        )


@dataclass(frozen=True)
class DecodeConfig:
    """One generation.

    What it leaves open (None, 'auto') `decode.resolved` chooses, for the model at hand.

    strategy: 'two-step' (the paper's), 'rounded', 'one-pass', 'auto', or 'lookup', which works
    without SATs: see planner.py. All
        give the same output.
    k: SATs a group; for 'auto' at most so many; None: what they were trained for. 0 is AR, plain
    autoregressive decoding by the
        same loop, one token a pass, but for strategy 'lookup', which has no SATs.
    budget: rows of a pass that 'one-pass' and 'auto' may use; None: as many as pay on this machine.
    With a number,
        'one-pass' fills every pass up to it.
    lookup: how many tokens to look up in the text so far as further drafts; 0 for none; None: 12
    for 'auto' and 'lookup', else
        none.
    tree: 'chain', 'paper' (the paper's sampling trees, k = 5, 7, 9, 11, 13) or a branching list
    with one width a depth; 'auto':
        see `decode.resolved`.
    stop_ids: token ids that end the output; the id itself is kept as the last token, as
    `transformers` does.
    stop_strings: the output ends with the token that completes one; `Generation.text` is cut before
    it.
    """

    k: int | None = 0
    max_new_tokens: int = 256
    tree: str | tuple[int, ...] = "auto"
    sampling: SamplingConfig = SamplingConfig()
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    strategy: str = "two-step"
    budget: int | None = None
    lookup: int | None = None

    def __post_init__(self) -> None:
        require(
            self.strategy in ALL_STRATEGIES,
            f"strategy={self.strategy}: expected one of {', '.join(ALL_STRATEGIES)}",
        )
        require(
            isinstance(self.sampling, SamplingConfig),
            f"sampling={self.sampling!r}: expected a SamplingConfig",
        )
        optional = {
            "k": ("0 (AR) or a positive number of SATs, {} at most", 0, MAX_K),
            "budget": ("a number of rows from 2 to {}", 2, MAX_ROWS),
            "lookup": ("0 (off) to {} tokens", 0, 32),
        }
        for name, (expected, low, high) in optional.items():
            if getattr(self, name) is not None:
                _keep(
                    self,
                    **{name: whole(name, getattr(self, name), expected.format(high), low, high)},
                )
        _keep(
            self,
            max_new_tokens=whole(
                "max_new_tokens", self.max_new_tokens, "1 or more, a whole number", 1
            ),
        )
        _keep(self, tree=_tree(self.tree), **_stops(self.stop_ids, self.stop_strings))
        if self.strategy == LOOKUP:
            require(not self.k, f"k={self.k}: strategy={LOOKUP} drafts without SATs; expected 0")
            require(
                self.lookup != 0,
                f"lookup=0: strategy={LOOKUP} drafts nothing else; expected 1 to 32 tokens",
            )
        elif self.k == 0:
            require(
                not self.lookup,
                (
                    f"lookup={self.lookup}: k=0 is plain decoding; expected strategy={LOOKUP} "
                    "with it, or k above 0"
                ),
            )

    @property
    def tree_name(self) -> str:
        """The tree as the command line has it."""
        return self.tree if isinstance(self.tree, str) else ",".join(map(str, self.tree))

    @property
    def depth(self) -> int:
        """How many drafts a pass can accept at most."""
        return max(self.num_sats + self.may_round, self.num_lookup)

    @property
    def may_round(self) -> bool:
        """Whether passes in 8 bits may draft."""
        return self.num_sats > 0 and self.strategy in ("rounded", "auto")

    @property
    def num_sats(self) -> int:
        """k, once it is resolved."""
        return self.k or 0

    @property
    def num_lookup(self) -> int:
        """The tokens to look up, once that is resolved."""
        return self.lookup or 0

    @property
    def plain(self) -> DecodeConfig:
        """AR with the same length, sampling and ends."""
        return replace(self, k=0, tree="auto", strategy=STRATEGIES[0], budget=None, lookup=None)


def _tree(tree: Any) -> str | tuple[int, ...]:
    """A name, or widths as a tuple; which names there are tree.py says."""
    if isinstance(tree, str):
        return tree
    expected = "'auto', 'chain', 'paper' or widths such as (2, 1, 1)"
    widths = several("tree", tree, expected)
    good = all(_is(numbers.Integral, width) and width >= 1 for width in widths)
    require(good and len(widths) > 0, f"tree={tree!r}: expected {expected}, every width 1 or more")
    return tuple(int(width) for width in widths)


def _stops(stop_ids: Any, stop_strings: Any) -> dict[str, Any]:
    ids = several("stop_ids", stop_ids, "a tuple of token ids")
    strings = several("stop_strings", stop_strings, "a tuple of texts")
    for text in strings:
        require(isinstance(text, str), f"stop_strings={text!r}: expected texts")
        require(text != "", "stop_strings: an empty string would stop at once; leave it out")
        utf8("stop_strings", text)
    return {
        "stop_ids": tuple(whole("stop_ids", token, "token ids, 0 or more", 0) for token in ids),
        "stop_strings": strings,
    }


def utf8(name: str, text: str) -> str:
    """`text`, if it has characters alone: a command line that is not UTF-8 reaches Python as lone
    surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}: not UTF-8 at character {error.start}; expected text in UTF-8"
        ) from None
    return text


def keys_of(strategies: Sequence[str], k_list: Sequence[int]) -> list[tuple[str, int]]:
    """(strategy, k) of all combinations that draft: 'lookup', which has no SATs, once."""
    return [
        (strategy, k)
        for strategy in strategies
        for k in ([0] if strategy == LOOKUP else k_list)
        if k or strategy == LOOKUP
    ]


def decode_config_of(text: str, **settings: Any) -> DecodeConfig:
    """The settings that a script's 'ar', 'lookup', 'two-step:5', 'auto' or 'auto:lookup=0' means:
    NAME[:K][:lookup=N].

    Without K it is what the SATs were trained for. settings: further ones of DecodeConfig.
    """
    name, *parts = text.split(":")
    given: dict[str, Any] = {"k": None, "strategy": name, **settings}
    for part in parts:
        key, equals, value = part.partition("=")
        key, value = (key, value) if equals else ("k", key)
        require(
            key in ("k", "lookup") and value.isdecimal(),
            f"strategy={text}: expected NAME, NAME:K or NAME:lookup=N",
        )
        given[key] = int(value)
    return DecodeConfig(**settings).plain if text == "ar" else DecodeConfig(**given)


def beside(strategies: Sequence[str]) -> list[str]:
    """The strategies of a table, and beside 'auto' what it is made of: lookup alone, and itself
    without lookup.
    """
    parts = [["lookup", "auto:lookup=0", name] if name == "auto" else [name] for name in strategies]
    return list(dict.fromkeys(name for part in parts for name in part))


@dataclass(frozen=True)
class TrainConfig:
    """Training: steps of `batch_size` sequences per process and micro-batch, with up to `anchors`
    SAT groups each.

    targets: names of the linear layers that get an update of this rank, with commas between.
    head: inner size of the draft head that sees the token before; 0 for none.
    keep: depth i+1 of a group exists with this probability given depth i; expected rows a group (1
    - keep^k) / (1 - keep).
    soft: share of distillation from the base's own distribution in the loss. decay: loss weight of
    a depth relative to the one before. accumulate: micro-batches a step.
    init: directory of an adapter of the same base and rank to start from, instead of from nothing.
    mode: 'adapter' (the base stays as it is), 'everywhere' (an adapter whose update acts on
    standard tokens too: for serving, it can be merged into a draft copy of the base) or 'full' (all
    weights). standard: not for 'adapter', the weight of a standard token's loss beside a SAT's.
    Only in full mode: embedding_steps, for how many steps only the SAT's embedding trains;
    checkpointing, gradients by recomputation.
    """

    steps: int = 2000
    k: int = 7
    rank: int = 32
    targets: str = TARGETS
    head: int = 1024
    anchors: int = 96
    keep: float = 0.8
    soft: float = 0.0
    decay: float = 1.0
    batch_size: int = 2
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 50
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 200
    held_out: int = 48
    init: str | None = None
    mode: str = "adapter"
    standard: float = 1.0
    embedding_steps: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "k",
            "rank",
            "anchors",
            "batch_size",
            "accumulate",
            "eval_every",
            "held_out",
        ):
            whole(name, getattr(self, name), "1 or more, a whole number", 1)
        for name in ("warmup", "embedding_steps"):
            whole(name, getattr(self, name), "0 or more, a whole number", 0)
        whole("head", self.head, "0 (none) or a positive size", 0)
        whole("k", self.k, f"a whole number from 1 to {MAX_TRAINED_K}", 1, MAX_TRAINED_K)
        whole("seed", self.seed, "a whole number")
        real("soft", self.soft, "a number from 0 to 1", 0, 1)
        real("standard", self.standard, "0 or more", 0)
        for name, high in (("keep", 1), ("decay", 1), ("lr", math.inf), ("clip", math.inf)):
            expected = "a number in (0, 1]" if high == 1 else "a positive number"
            require(
                real(name, getattr(self, name), expected, 0, high) > 0,
                f"{name}={getattr(self, name)}: expected {expected}",
            )
        require(
            self.mode in TRAIN_MODES, f"mode={self.mode}: expected one of {', '.join(TRAIN_MODES)}"
        )
        for name, modes in _ONLY_IN.items():
            held = getattr(self, name)
            default = getattr(type(self), name)
            only = " and ".join(modes)
            require(
                self.mode in modes or held == default,
                f"{name}={held}: only for mode {only}, not {self.mode}",
            )
