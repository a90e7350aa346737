"""A sequence between two passes, and what a generation produced and cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdsat.config import MAX_ROWS, DecodeConfig
from sdsat.decoding.plan import PLAIN, Plan, Planner
from sdsat.decoding.stopping import Finish, cut, text_of
from sdsat.engines.base import Cache, PassInput
from sdsat.method.drafts import Drafts
from sdsat.method.lookup import Lookup
from sdsat.method.tree import DraftTree
from sdsat.method.vocabulary import OtherTokens
from sdsat.models.sat_model import SatModel

OnTokens = Callable[[list[int], list[bool]], bool | None]
OnBatchTokens = Callable[[int, list[int], list[bool]], bool | None]
Chooser = Callable[[Tensor], tuple[int, bool]]
LOOKED_UP = 0.6  # how likely a looked-up token is taken to be before anything is known


@dataclass
class Generation:
    """What one `generate` call produced and what it cost.

    Attributes:
        token_ids: emitted tokens, a stop id included.
        text: decoded without special tokens, cut before a stop string.
        finish: why it ended; None while it goes on.
        num_passes: forward passes after the prefill's one.
        num_plain_passes: those of them with neither drafts nor SATs.
        num_rounded_passes: those of them with rounded weights, which only draft.
        accepted_lengths: accepted drafts of each pass that verified any, 0..depth.
        proposed_by_depth: [depth] counts; drafts beyond the end of the output are not counted.
        accepted_by_depth: [depth] counts, as `proposed_by_depth`.
        prefill_seconds: to read the prompt.
        decode_seconds: of all that came after.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
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
        """Tokens of the output."""
        return len(self.token_ids)

    @property
    def seconds(self) -> float:
        """Seconds of prefill and decoding together."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of prefill and decoding together."""
        return self.num_new_tokens / self.seconds

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per forward pass after the prefill."""
        return self.num_new_tokens / self.num_passes

    @property
    def acceptance_rate(self) -> float:
        """Share of the proposed drafts that were accepted; 0 where nothing was proposed.

        A depth of a tree counts once, however wide.
        """
        return sum(self.accepted_by_depth) / max(1, sum(self.proposed_by_depth))

    @property
    def accepted_per_loop(self) -> float:
        """Accepted drafts per pass that verified any."""
        return sum(self.accepted_lengths) / max(1, len(self.accepted_lengths))

    def count(self, depth: int, accepted: int, kept: int | None) -> None:
        """Enter one pass's drafts, down to `depth`.

        accepted: how many of them were. kept: how many of its tokens come before the output's end,
        None for all.
        """
        proposed = depth if kept is None else min(depth, kept)
        accepted = min(accepted, proposed)
        self.accepted_lengths.append(accepted)
        for i in range(proposed):
            self.proposed_by_depth[i] += 1
            self.accepted_by_depth[i] += i < accepted


@dataclass
class Drafted:
    """What the SATs of one group guess: a tree below the token that follows at their node.

    tokens, likely: [N], one a node; at the root that token itself, and 1.
    """

    tree: DraftTree
    tokens: list[int]
    likely: list[float]


def num_slots(prompt_length: int, max_new_tokens: int) -> int:
    """Compute the cache length of a generation, in slots.

    It is the same for AR and every k and tree, because attention rounds by length.
    """
    return -(-(prompt_length + max_new_tokens + MAX_ROWS + 16) // 64) * 64


class Request(NamedTuple):
    """What is asked, checked (`Decoder.request`).

    Attributes:
        number: of its prompt in the call.
        prompt_ids: the prompt's tokens.
        config: its settings.
        chooser: see `Decoder.generate`.
    """

    number: int
    prompt_ids: list[int]
    config: DecodeConfig
    chooser: Chooser | None = None

    @property
    def slots(self) -> int:
        """The length of its cache."""
        return num_slots(len(self.prompt_ids), self.config.max_new_tokens)


@dataclass(eq=False)
class Sequence:
    """A sequence between two passes.

    Attributes:
        number: of its prompt in the call.
        prompt_ids: the prompt's tokens.
        config: its settings.
        planner: chooses its plans, and may be shared.
        tokenizer: None where the model has none.
        cache: keys and values of all tokens but x.
        out: the output so far.
        began: when it was prefilled, on time.perf_counter.
        text: [slots] tokens of prompt and output, of which the first `context` are there so far.
        lookup: an index of its text; None where tokens are not looked up.
        others: tokens of its text outside of the draft vocabulary; None where there is none.
        x: the last true token, the only one that the cache doesn't hold yet.
        drafts: below x.
        chooser: see `Decoder.generate`.
        ended: whether its chooser has ended the output.
        plan: of the coming pass.
    """

    number: int
    prompt_ids: list[int]
    config: DecodeConfig
    planner: Planner
    tokenizer: Any
    cache: Cache
    out: Generation
    began: float
    text: Tensor
    lookup: Lookup | None
    others: OtherTokens | None
    x: int
    drafts: Drafts
    chooser: Chooser | None
    ended: bool = False
    plan: Plan = PLAIN

    @classmethod
    def begun(
        cls,
        model: SatModel,
        request: Request,
        planner: Planner,
        cache: Cache,
        prefilled: float,
        seconds: float,
    ) -> Sequence:
        """Make the sequence of a prompt that has just been prefilled.

        Args:
            model: continues it.
            request: what is asked.
            planner: the planner of its passes.
            cache: filled.
            prefilled: when its prompt was read, on time.perf_counter.
            seconds: what that took.
        """
        prompt_ids, config = request.prompt_ids, request.config
        text = torch.tensor([*prompt_ids, *[0] * config.max_new_tokens], device=model.device)
        vocabulary = model.draft_ids
        return cls(
            number=request.number,
            prompt_ids=prompt_ids,
            config=config,
            planner=planner,
            tokenizer=model.tokenizer,
            cache=cache,
            out=Generation(
                proposed_by_depth=[0] * config.depth,
                accepted_by_depth=[0] * config.depth,
                prefill_seconds=seconds,
            ),
            began=prefilled,
            text=text,
            lookup=Lookup(prompt_ids, config.num_lookup) if config.num_lookup else None,
            others=None if vocabulary is None else OtherTokens(vocabulary, prompt_ids),
            x=prompt_ids[-1],
            drafts=Drafts.none(prompt_ids[-1]),
            chooser=request.chooser,
        )

    @property
    def emitted(self) -> int:
        """Tokens of the output so far."""
        return len(self.out.token_ids)

    @property
    def left(self) -> int:
        """Tokens that the output may still have."""
        return self.config.max_new_tokens - self.emitted

    @property
    def context(self) -> int:
        """Tokens of prompt and output so far."""
        return len(self.prompt_ids) + self.emitted

    def with_lookup(self, drafts: Drafts) -> Drafts:
        """Add to the drafts those that the text so far suggests."""
        return drafts.with_chain(self.lookup.drafts(), LOOKED_UP) if self.lookup else drafts

    def plan_pass(self) -> None:
        """Have the coming pass planned, and keep of the drafts what it verifies."""
        self.plan = self.planner.plan(self.drafts, self.left, self.context)
        self.drafts = self.drafts.kept(self.plan.nodes)

    def pass_input(self) -> PassInput:
        """Make what the coming pass has of this sequence: its drafts, and its plan's SATs."""
        return PassInput(self.cache, self.drafts.tokens, self.drafts.tree, self.plan.groups)

    def accept(
        self, path: list[int], own: list[int | None], drafted: Drafted | None
    ) -> tuple[list[int], list[bool]]:
        """Enter a pass into the output: the accepted drafts, and the token after them as the new x.

        Args:
            path: nodes of the walk, the root first.
            own: [N] the model's own next token at every node; None where nothing follows.
            drafted: by the SATs at the walk's last node.

        Returns:
            The new tokens as far as the output goes, and for each whether it was a draft.
        """
        out = self.out
        node = path[-1]
        tokens = self.drafts.tokens
        following = own[node]
        out.num_passes += 1
        out.num_plain_passes += len(tokens) == 1 and not self.plan.groups
        accepted = [tokens[draft] for draft in path[1:]]
        block = [*accepted] if following is None else [*accepted, following]
        self.x = block[-1]
        kept, finish = cut(self.tokenizer, self.prompt_ids[-1], out.token_ids, block, self.config)
        out.finish = "chooser" if self.ended and finish != "stop_id" else finish
        if len(tokens) > 1:
            depth = max(self.drafts.tree.depths)
            out.count(depth, len(accepted), None if out.finish is None else kept)
        block = block[:kept]
        self.text[self.context : self.context + len(block)] = torch.tensor(block, dtype=torch.long)
        out.token_ids += block
        self.drafts = Drafts.none(self.x)
        if drafted is not None:
            kind = self.plan.kind(node)
            self.drafts = Drafts.of_sats(drafted.tree, drafted.tokens, drafted.likely, kind)
        if self.lookup:
            self.lookup.add(block)
        if self.others:
            self.others.add(block)
        if out.finish is not None:
            self.end(out.finish)
        return block, [i < len(accepted) for i in range(len(block))]

    def end(self, finish: Finish) -> None:
        """Complete the output, which ends for this reason."""
        out = self.out
        out.finish = finish
        out.decode_seconds = time.perf_counter() - self.began
        out.text = text_of(
            self.tokenizer, self.prompt_ids[-1], out.token_ids, self.config.stop_strings
        )
