"""The engine interface: an engine runs passes of a model over draft trees and SAT groups.

Every engine keeps one promise, on which exactness rests: a row's logits have the same bits whatever
rows stand beside it. One that can't keep it by itself is padded as a `RowPolicy` says, which
`Engine.row_policy` finds by trying.

To add an engine, write one class: `new_cache`, `prefill` and `forward`, and whatever of the rest it
does faster than here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sdsat.config import SamplingConfig, SatConfig
from sdsat.engines.drafting import Guesses, draft_tokens, grow_tokens
from sdsat.method.layout import SatGroup
from sdsat.method.sampling import choose
from sdsat.method.tree import DraftTree, make_tree
from sdsat.models.mapped import give_back
from sdsat.models.sat_model import SatModel

# (tokens of a prompt that were read so far, how many are to be read)
OnRead = Callable[[int, int], None]


class Cache(Protocol):
    """Keys and values of one sequence."""

    length: int  # committed tokens

    def commit(self, rows: tuple[int, ...]) -> None:
        """Keep these rows of the last pass, in this order, as the next committed tokens."""


@dataclass
class PassInput:
    """What one sequence brings into a pass: a draft tree, x at its root, and SATs at some nodes.

    Attributes:
        cache: the sequence's own.
        tokens: [N], one a node of `tree`.
        tree: of the drafts.
        groups: where SATs stand, and how many.
    """

    cache: Cache
    tokens: list[int]
    tree: DraftTree
    groups: tuple[SatGroup, ...] = ()

    @cached_property
    def num_sats(self) -> int:
        """SATs of all groups together."""
        return sum(size for _, size in self.groups)


class PassOutput(NamedTuple):
    """What a pass gives. Its rows are the nodes of all sequences in order, then their SATs.

    Attributes:
        states: [R, D] last hidden states.
        logits: [N, V] of the nodes. In a rounded pass, -inf outside of the draft vocabulary.
        sat_logits: [S, C] of the SATs, over the draft vocabulary, or all tokens where there is
            none.
    """

    states: Tensor
    logits: Tensor
    sat_logits: Tensor


def tokens_of(inputs: Sequence[PassInput], sat: SatConfig | None) -> list[int]:
    """List the token ids of a pass's rows, in the order of `PassOutput`.

    sat: None where SATs only take time.
    """
    sat = sat or SatConfig(0, 1)
    nodes = [token for part in inputs for token in part.tokens]
    return nodes + [
        token_id for part in inputs for _, size in part.groups for token_id in sat.ids(size)
    ]


def rows_of(inputs: Sequence[PassInput]) -> int:
    """Count the rows of a pass over these sequences."""
    return sum(len(part.tokens) + part.num_sats for part in inputs)


@dataclass(frozen=True)
class RowPolicy:
    """How a pass is padded so that the number of its rows doesn't decide which kernels compute it.

    Attributes:
        minimum: rows that a pass has at least.
        multiple: what the number of rows is a multiple of.
        stable: whether logits were found bit-equal under this policy.
    """

    minimum: int
    multiple: int
    stable: bool = True

    def rows(self, count: int) -> int:
        """Return the padded number of rows of a pass of `count` rows."""
        return max(self.minimum, -(-count // self.multiple) * self.multiple)


UNPADDED = RowPolicy(1, 1)


class BatchCaches(Protocol):
    """Where the sequences of a batch keep their keys and values."""

    def enter(self, prompts: list[list[int]], num_slots: list[int]) -> Sequence[Cache]:
        """Make a cache for each prompt, which holds all of it but the last token.

        num_slots: tokens that each cache must have room for, a pass's rows included.
        """

    def leave(self, cache: Cache) -> None:
        """Free a sequence's cache."""


class Engine(ABC):
    """What runs passes of one model; the base class of all engines.

    Attributes:
        model: whose weights and modules it reads.
        has_rounded: whether it has rounded weights too, for passes that only draft.
        exact_trees: whether a tree's rows have AR's bits in half precision too.
        policies: the ways of padding that are tried, cheapest first.
        fallback: the way of padding where none is stable.
    """

    has_rounded: ClassVar[bool] = False
    exact_trees: ClassVar[bool] = False
    policies: ClassVar[tuple[RowPolicy, ...]] = (UNPADDED,)
    fallback: ClassVar[RowPolicy] = RowPolicy(1, 1, stable=False)

    def __init__(self, model: SatModel):
        self.model = model

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of what runs the passes, as results files have it."""

    @abstractmethod
    def new_cache(self, num_slots: int) -> Cache:
        """Make an empty cache for one sequence.

        num_slots: tokens that it must have room for, a pass's rows included.
        """

    @abstractmethod
    def prefill(
        self, cache: Cache, tokens: Tensor, held: int = 0, on_read: OnRead | None = None
    ) -> None:
        """Read tokens into a cache, which forgets what it held behind the first `held`.

        Args:
            cache: of one sequence.
            tokens: [N].
            held: how many of the cache's tokens stay, before these.
            on_read: called before the first pass, and after every one.
        """

    @abstractmethod
    def forward(
        self, inputs: Sequence[PassInput], rounded: bool = False, policy: RowPolicy | None = None
    ) -> PassOutput:
        """Run one pass over several sequences; commits nothing.

        Args:
            inputs: one a sequence.
            rounded: with rounded weights, for a pass that only drafts (`has_rounded`).
            policy: padding; the engine's own by default.
        """

    def batch_caches(self, size: int, num_slots: int) -> BatchCaches:
        """Make caches for up to `size` sequences at once, none of more than `num_slots` tokens."""
        return SeparateCaches(self)

    @property
    def rounding_pays(self) -> bool:
        """Whether rounded passes can be so much cheaper that `auto` is to try them."""
        return self.has_rounded

    def prepare(self, rounded: bool) -> None:  # noqa: B027
        """Make what passes will need now, before seconds count. rounded: for such passes, too."""

    def synchronize(self) -> None:  # noqa: B027
        """Wait until all passes are done."""

    @property
    def keeps(self) -> bool:
        """Whether a token's keys and values may serve any text that begins as its own.

        They may where outputs are the same whatever pass has made them. Caches then have a method
        `copy(source, length)`: hold the first `length` tokens of another cache, and nothing else.
        """
        return False

    @property
    def reads_freely(self) -> bool:
        """Whether the host may read tensors without waiting for anything."""
        return self.model.device.type == "cpu"

    def close(self) -> None:  # noqa: B027
        """Leave the model's modules as they were before the engine was made."""

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Let the model's modules be transformers' own within this block, without an engine."""
        yield

    def largest(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Find the largest logits [N, V] of each row, largest first.

        Returns (values [N, count] in float32, ids [N, count]).
        """
        if count == 1:
            ids = logits.float().argmax(-1, keepdim=True)
            return logits.gather(-1, ids).float(), ids
        values, ids = logits.topk(count)
        return values.float(), ids

    def draw(
        self, logits: Tensor, index: Tensor, sampling: SamplingConfig, seeds: Tensor | None = None
    ) -> Tensor:
        """Draw one token [N] a row of logits [N, V], as `method.sampling.choose` does.

        Args:
            logits: [N, V].
            index: [N] emitted index of the token to draw.
            sampling: how; not greedy.
            seeds: [N] in place of the sampling's one.
        """
        return choose(logits, index, sampling, seeds=seeds)[:, 0]

    def next_tokens(
        self, logits: Tensor, index: Tensor, sampling: SamplingConfig, seeds: Tensor | None = None
    ) -> Tensor:
        """Choose the model's own next token of each row.

        Args:
            logits: [N, V].
            index: [N] emitted index of the token to choose.
            sampling: how; greedy takes the largest logit.
            seeds: [N] in place of the sampling's one.

        Returns:
            [N] token ids.
        """
        if sampling.greedy:
            return self.largest(logits, 1)[1][:, 0]
        return self.draw(logits, index, sampling, seeds)

    def draft(self, guesses: Guesses, tree: DraftTree) -> Tensor:
        """Draft with the SATs of one group: see `drafting.draft_tokens`."""
        return draft_tokens(self.model, self.largest, guesses, tree)

    def grow(self, guesses: Guesses, nodes: int) -> Tensor:
        """Draft a tree that grows where it is likeliest: see `drafting.grow_tokens`."""
        return grow_tokens(self.model, self.largest, guesses, nodes)

    @cached_property
    def row_policy(self) -> RowPolicy:
        """The cheapest padding under which a row has the same bits whatever its pass's size."""
        policy = probe_rows(self)
        give_back()  # the logits of many rows
        return policy


class SeparateCaches:
    """A cache of its own for each sequence; what a prompt shares with the last text is copied."""

    def __init__(
        self,
        engine: Engine,
        last: tuple[list[int], Cache] | None = None,
        on_read: OnRead | None = None,
    ):
        """Begin with the cache of an earlier text.

        Args:
            engine: whose caches.
            last: the text, and a cache of this engine that holds it; None where nothing is kept.
            on_read: as of `Engine.prefill`.
        """
        self.engine = engine
        self._last = last
        self._on_read = on_read

    def enter(self, prompts: list[list[int]], num_slots: list[int]) -> list[Cache]:
        """See BatchCaches.enter."""
        return [self._enter(*each) for each in zip(prompts, num_slots, strict=True)]

    def _enter(self, prompt: list[int], num_slots: int) -> Cache:
        cache: Any = self.engine.new_cache(num_slots)
        text = prompt[:-1]
        held = 0
        if self._last is not None:
            held = _shared(self._last[0], text)
            cache.copy(self._last[1], held)
        new = torch.tensor(text[held:], device=self.engine.model.device, dtype=torch.long)
        self.engine.prefill(cache, new, held, self._on_read)
        self._last = (text, cache) if self.engine.keeps else None
        return cache

    def leave(self, cache: Cache) -> None:
        """See BatchCaches.leave: whoever drops the cache frees it."""


def _shared(one: list[int], other: list[int]) -> int:
    """Count the tokens with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


_PROBE_CONTEXT = 64  # committed tokens before the probe's passes
_PROBE_ROWS = 96  # rows of the probe's largest pass


def probe_tokens(model: SatModel, count: int) -> Tensor:
    """Make [count] standard tokens all over the vocabulary, the same ones every time."""
    return (torch.arange(count, device=model.device) * 7919 + 11) % model.vocabulary


@torch.inference_mode()
def probe_rows(engine: Engine) -> RowPolicy:
    """Find the first of the engine's policies under which rows have the same bits in any pass.

    Compares one pass of 96 tokens with the same tokens one at a time and in passes of other sizes,
    padded by each policy in turn. An engine that needs no padding is compared all the same.
    """
    tokens = probe_tokens(engine.model, _PROBE_CONTEXT + _PROBE_ROWS)
    cache = engine.new_cache(512)
    engine.prefill(cache, tokens[:_PROBE_CONTEXT])

    def logits_of(first: int, rows: int, padded: int) -> Tensor:
        cache.length = _PROBE_CONTEXT + first
        part = tokens[cache.length : cache.length + rows].tolist()
        chain = PassInput(cache, part, make_tree("chain", rows - 1))
        return engine.forward([chain], policy=RowPolicy(padded, 1)).logits

    whole = logits_of(0, _PROBE_ROWS, _PROBE_ROWS)

    @lru_cache
    def same(first: int, rows: int, padded: int) -> bool:
        return torch.equal(logits_of(first, rows, padded), whole[first : first + rows])

    def stable(policy: RowPolicy) -> bool:
        sizes = sorted({policy.rows(count) for count in (*range(1, 33), 48, 64)})
        return all(same(i, 1, policy.rows(1)) for i in range(16)) and all(
            same(0, n, n) for n in sizes
        )

    return next((policy for policy in engine.policies if stable(policy)), engine.fallback)
