"""A sequence between two passes, and what a generation produced and cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from sdsat.config import DecodeConfig
from sdsat.decoding.auto_planner import Planner
from sdsat.decoding.plan import PLAIN, Plan
from sdsat.engines.base import AnyCache
from sdsat.method.drafts import Drafts
from sdsat.method.lookup import Lookup

OnTokens = Callable[[list[int], list[bool]], None]
OnBatchTokens = Callable[[int, list[int], list[bool]], None]
Chooser = Callable[[Tensor], tuple[int, bool]]
LOOKED_UP = 0.6  # how likely a looked-up token is taken to be before anything is known


@dataclass
class Generation:
    """What one `generate` call produced and what it cost.

    token_ids: emitted tokens, a stop id included. text: decoded without special tokens, cut before
    a stop string.
    finish: 'stop_id', 'stop_string', 'length', or 'chooser' where a `Chooser` ended it. num_passes:
    forward passes after the prefill's one; num_plain_passes: those of them with neither drafts nor
    SATs. accepted_lengths: accepted drafts of each pass that verified any, 0..depth.
    proposed_by_depth, accepted_by_depth: [depth] counts; drafts beyond the end of the output are
    not counted.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "length"
    num_passes: int = 0
    num_plain_passes: int = 0
    num_rounded_passes: int = 0
    accepted_lengths: list[int] = field(default_factory=list)
    proposed_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def num_new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of prefill and decoding together."""
        return self.num_new_tokens / self.seconds

    @property
    def tokens_per_pass(self) -> float:
        return self.num_new_tokens / self.num_passes

    @property
    def acceptance_rate(self) -> float:
        """Accepted / proposed drafts; 0 where nothing was proposed.

        A depth of a tree counts once, however wide.
        """
        return sum(self.accepted_by_depth) / max(1, sum(self.proposed_by_depth))

    @property
    def accepted_per_loop(self) -> float:
        return sum(self.accepted_lengths) / max(1, len(self.accepted_lengths))

    def count(self, depth: int, accepted: int, kept: int | None) -> None:
        """Enter one pass's drafts, down to `depth`; kept: how many of its tokens come before the
        output's end, None for all.
        """
        proposed = depth if kept is None else min(depth, kept)
        accepted = min(accepted, proposed)
        self.accepted_lengths.append(accepted)
        for i in range(proposed):
            self.proposed_by_depth[i] += 1
            self.accepted_by_depth[i] += i < accepted


@dataclass(eq=False)
class _Sequence:
    """A sequence between two passes: what is emitted, x, and the drafts below x; and what the
    coming pass has of it.
    """

    number: int
    prompt_ids: list[int]
    config: DecodeConfig
    planner: Planner
    cache: AnyCache
    out: Generation
    prefilled: float  # when
    lookup: Lookup | None
    x: int
    drafts: Drafts
    chooser: Chooser | None
    ended: bool = False  # by the chooser
    plan: Plan = PLAIN

    @property
    def emitted(self) -> int:
        return len(self.out.token_ids)

    @property
    def left(self) -> int:
        return self.config.max_new_tokens - self.emitted

    @property
    def context(self) -> int:
        return len(self.prompt_ids) + self.emitted

    def with_lookup(self, drafts: Drafts) -> Drafts:
        return drafts.with_chain(self.lookup.drafts(), LOOKED_UP) if self.lookup else drafts
