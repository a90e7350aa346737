"""Settings as frozen dataclasses, checked when they are made; `InputError` is every bad-input message of the program."""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

STRATEGIES = ("two-step", "rounded", "one-pass", "auto")  # that draft with SATs
LOOKUP = "lookup"  # the strategy that drafts without them, from the text so far alone
ALL_STRATEGIES = (LOOKUP, *STRATEGIES)
NUM_LOOKUP = 12  # tokens that 'auto' and 'lookup' look up where nothing else is said
MAX_ROWS = 96  # of one pass: bounds a draft tree with its SATs, and with them the cache's fixed length
MAX_TRAINED_K = 16  # depth of an adapter
TRAIN_MODES = ("adapter", "everywhere", "full")
_ONLY_IN = {
    "rank": ("adapter", "everywhere"), "targets": ("adapter", "everywhere"), "head": ("adapter",),
    "standard": ("everywhere", "full"), "embedding_steps": ("full",), "checkpointing": ("full",),
}  # fmt: skip
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # linear layers that get a low-rank update


class InputError(ValueError):
    """Bad input. The message is one line that names the argument, its value and what would be right; the CLI exits with 2."""


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def plain_warnings() -> None:
    """Warnings as one line each, as every other message of the command line."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)  # type: ignore[assignment]


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

    def of_problem(self, task_id: str) -> SamplingConfig:
        """The same with a seed of this problem's own, so that the problems of a run are independent draws.

        It is the first 63 bits of the SHA-256 of 'SEED TASK_ID'.
        """
        digest = hashlib.sha256(f"{self.seed} {task_id}".encode()).digest()
        return self if self.greedy else replace(self, seed=int.from_bytes(digest[:8], "big") >> 1)


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
    """One generation. What it leaves open (None, 'auto') `decode.resolved` chooses, for the model at hand.

    strategy: 'two-step' (the paper's), 'rounded', 'one-pass', 'auto', or 'lookup', which works without SATs: see planner.py. All
        give the same output.
    k: SATs a group; for 'auto' at most so many; None: what they were trained for. 0 is AR, plain autoregressive decoding by the
        same loop, one token a pass, but for strategy 'lookup', which has no SATs.
    budget: rows of a pass that 'one-pass' and 'auto' may use; None: as many as pay on this machine. With a number,
        'one-pass' fills every pass up to it.
    lookup: how many tokens to look up in the text so far as further drafts; 0 for none; None: 12 for 'auto' and 'lookup', else
        none.
    tree: 'chain', 'paper' (the paper's sampling trees, k = 5, 7, 9, 11, 13) or a branching list with one width a depth; 'auto':
        see `decode.resolved`.
    stop_ids: token ids that end the output; the id itself is kept as the last token, as `transformers` does.
    stop_strings: the output ends with the token that completes one; `Generation.text` is cut before it.
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
        require(self.k is None or self.k >= 0, f"k={self.k}: expected 0 (AR) or a positive number of SATs")
        require(self.strategy in ALL_STRATEGIES, f"strategy={self.strategy}: expected one of {', '.join(ALL_STRATEGIES)}")
        in_range = self.budget is None or 2 <= self.budget <= MAX_ROWS
        require(in_range, f"budget={self.budget}: expected a number of rows from 2 to {MAX_ROWS}")
        require(0 <= self.num_lookup <= 32, f"lookup={self.lookup}: expected 0 (off) to 32 tokens")
        if self.strategy == LOOKUP:
            require(not self.k, f"k={self.k}: strategy={LOOKUP} drafts without SATs; expected 0")
            require(self.lookup != 0, f"lookup=0: strategy={LOOKUP} drafts nothing else; expected 1 to 32 tokens")
        elif self.k == 0:
            require(
                not self.lookup, f"lookup={self.lookup}: k=0 is plain decoding; expected strategy={LOOKUP} with it, or k above 0"
            )
        require(self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens}: expected 1 or more")
        require(all(self.stop_strings), "stop_strings: an empty string would stop at once; leave it out")

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


def keys_of(strategies: Sequence[str], k_list: Sequence[int]) -> list[tuple[str, int]]:
    """(strategy, k) of all combinations that draft: 'lookup', which has no SATs, once."""
    return [(strategy, k) for strategy in strategies for k in ([0] if strategy == LOOKUP else k_list) if k or strategy == LOOKUP]


@dataclass(frozen=True)
class TrainConfig:
    """Training: steps of `batch_size` sequences per process and micro-batch, with up to `anchors` SAT groups each.

    targets: names of the linear layers that get an update of this rank, with commas between.
    head: inner size of the draft head that sees the token before; 0 for none.
    keep: depth i+1 of a group exists with this probability given depth i; expected rows a group (1 - keep^k) / (1 - keep).
    soft: share of distillation from the base's own distribution in the loss. decay: loss weight of a depth relative to the
    one before. accumulate: micro-batches a step.
    init: directory of an adapter of the same base and rank to start from, instead of from nothing.
    mode: 'adapter' (the base stays as it is), 'everywhere' (an adapter whose update acts on standard tokens too: for serving,
    it can be merged into a draft copy of the base) or 'full' (all weights). standard: not for 'adapter', the weight of a standard
    token's loss beside a SAT's. Only in full mode: embedding_steps, for how many steps only the SAT's embedding trains;
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
        for name in ("steps", "k", "rank", "anchors", "batch_size", "accumulate", "eval_every", "held_out"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: expected 1 or more")
        require(0 < self.keep <= 1, f"keep={self.keep}: expected a number in (0, 1]")
        require(0 <= self.soft <= 1, f"soft={self.soft}: expected a number from 0 to 1")
        require(0 < self.decay <= 1, f"decay={self.decay}: expected a number in (0, 1]")
        require(self.k <= MAX_TRAINED_K, f"k={self.k}: expected {MAX_TRAINED_K} or less")
        require(self.mode in TRAIN_MODES, f"mode={self.mode}: expected one of {', '.join(TRAIN_MODES)}")
        require(0 <= self.standard < math.inf, f"standard={self.standard}: expected 0 or more")
        require(self.embedding_steps >= 0, f"embedding_steps={self.embedding_steps}: expected 0 or more")
        require(self.head >= 0, f"head={self.head}: expected 0 (none) or a positive size")
        for name, modes in _ONLY_IN.items():
            held, default = getattr(self, name), getattr(type(self), name)
            only = " and ".join(modes)
            require(self.mode in modes or held == default, f"{name}={held}: only for mode {only}, not {self.mode}")
        require(0 < self.lr < math.inf, f"lr={self.lr}: expected a positive number")
