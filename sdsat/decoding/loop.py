"""Draft-then-verify decoding (SDSAT, arXiv 2403.18647, section 3.2).

State of a sequence: a cache over all emitted tokens but the last one, x, and a tree of drafts below
x. One speculative step (`Loop.step`):

    plan      which drafts to verify, and where SATs draft on                (plan.py)
    pass      x, drafts, SATs in one forward pass                            (sdsat/engines)
    walk      from x down the tree while a draft is the model's own token    (method/tree.py)
    draft     the SATs where the walk ended guess what follows it            (passes.py)
    accept    the drafts on that path, and the token after them: the next x  (sequence.py)

A step emits 1 + accepted tokens. The paper's two-step loop is the plan that alternates between a
draft pass, [x, SATs], and a verify pass, [x, drafts]; AR (plain autoregressive decoding) is the
plan without SATs. Every token is the model's own choice given true
tokens only, so the output equals AR's: at temperature 0 and, because the noise belongs to the
emitted position (method/sampling.py), for any seed; to the last bit of a logit in half precision
too where the engine keeps its promise (engines/base.py).
"""

from __future__ import annotations

import time
from collections import abc

from sdsat.decoding.passes import PassResult
from sdsat.decoding.plan import Planner
from sdsat.decoding.sequence import Request, Sequence
from sdsat.engines.base import BatchCaches, Engine, PassInput, rows_of
from sdsat.method.drafts import Drafts
from sdsat.method.layout import SatGroup
from sdsat.method.tree import make_tree

Event = tuple[int, list[int], list[bool]]  # of `OnBatchTokens`


class Loop:
    """Sequences that are live together: each pass carries what their plans want.

    Attributes:
        live: the sequences whose outputs have not ended.
    """

    def __init__(self, engine: Engine, caches: BatchCaches) -> None:
        """Begin without sequences.

        engine: runs the passes. caches: of the sequences to come.
        """
        self.live: list[Sequence] = []
        self._engine = engine
        self._caches = caches

    def enter(self, entering: abc.Sequence[tuple[Request, Planner]]) -> list[Sequence]:
        """Read prompts, several in one pass where that can be. Returns their sequences."""
        began = time.perf_counter()
        prompts = [request.prompt_ids for request, _ in entering]
        held = self._caches.enter(prompts, [request.slots for request, _ in entering])
        self._engine.synchronize()
        prefilled = time.perf_counter()
        seconds = prefilled - began
        new = [
            Sequence.begun(self._engine.model, *each, cache, prefilled, seconds)
            for each, cache in zip(entering, held, strict=True)
        ]
        self.live += new
        return new

    def leave(self) -> list[Sequence]:
        """Let the sequences go whose outputs have ended. Returns them."""
        ended = [sequence for sequence in self.live if sequence.out.finish is not None]
        for sequence in ended:
            self.live.remove(sequence)
            self._caches.leave(sequence.cache)
        return ended

    def step(self) -> list[Event]:
        """Take one speculative step of every live sequence.

        Returns what `on_tokens` is told of each. Raises InputError for logits that are no numbers.
        """
        self._draft_first()
        live = self.live
        began = time.perf_counter()
        context = _mean_context(live)
        # Plan: which drafts are worth their rows, and after which of them SATs draft on.
        for sequence in live:
            sequence.plan_pass()
        # Pass: x, drafts and SATs of all sequences at once. Nothing is kept in the caches yet.
        inputs = [sequence.pass_input() for sequence in live]
        result = PassResult(self._engine, live, inputs, self._engine.forward(inputs))
        found = []
        for number, sequence in enumerate(live):
            own = result.own[number]
            drafts = sequence.drafts
            # Walk: from x down the tree, while a draft is the model's own next token.
            path = drafts.tree.walk(drafts.tokens, own)
            sequence.cache.commit(tuple(path))
            sequence.planner.observe(drafts, sequence.plan, path)
            # Draft: the SATs where the walk ended know all that is true now.
            found.append((path, own, result.drafted(number, path[-1])))
        seconds = time.perf_counter() - began
        sats = sum(part.num_sats for part in inputs)
        for planner in _planners(live):
            planner.observe_pass(rows_of(inputs), sats, context, seconds)
        # Accept: the drafts on the path, and the model's own token after them, the next x.
        return [
            (sequence.number, *sequence.accept(*each))
            for sequence, each in zip(live, found, strict=True)
        ]

    def _draft_first(self) -> None:
        """Complete the sequences' drafts before a step.

        Tokens are looked up in the text so far; and for sequences whose planners want it, a rounded
        pass over x and SATs drafts first. That leaves nothing in the caches.
        """
        began = time.perf_counter()
        wanting = list[Sequence]()
        inputs = list[PassInput]()
        root = make_tree("chain", 0)
        for sequence in self.live:
            planner = sequence.planner
            planner.share(len(self.live), sequence.context)
            sequence.drafts = sequence.with_lookup(sequence.drafts)
            count = planner.draft_first(sequence.drafts, sequence.left, sequence.context)
            if count:
                group = SatGroup(0, count)
                wanting.append(sequence)
                inputs.append(PassInput(sequence.cache, [sequence.x], root, (group,)))
        if not wanting:
            return
        output = self._engine.forward(inputs, rounded=True)
        result = PassResult(self._engine, wanting, inputs, output, drafts_only=True)
        for number, sequence in enumerate(wanting):
            drafted = result.drafted(number, 0)
            assert drafted is not None
            below = Drafts.of_rounded(sequence.x, drafted.tree, drafted.tokens, drafted.likely)
            sequence.drafts = sequence.with_lookup(below)
            sequence.out.num_passes += 1
            sequence.out.num_rounded_passes += 1
        seconds = time.perf_counter() - began
        for planner in _planners(wanting):
            planner.observe_drafting(rows_of(inputs) - 1, _mean_context(wanting), seconds)


def _planners(sequences: list[Sequence]) -> list[Planner]:
    """List the sequences' planners, each once: those that learn are shared."""
    return list({id(sequence.planner): sequence.planner for sequence in sequences}.values())


def _mean_context(sequences: list[Sequence]) -> int:
    """Count the tokens of prompt and output so far, of the average sequence."""
    return sum(sequence.context for sequence in sequences) // len(sequences)
