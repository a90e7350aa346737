"""What a learning planner believes: of drafts, of what passes take, of what places are worth.

Each belief starts at a prior, and `observe..` alone changes it: to ask one changes nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

from sdsat.decoding.plan import KINDS
from sdsat.method.costs import CONTEXTS, COUNTS, CostCurve
from sdsat.method.drafts import FIRST_OF_ROUNDED, Drafts

# ---- of acceptance and worth ----

# Observations: how many a prior counts for. Enough that the first few don't swing a belief from one
# end to the other, few enough that one short answer outweighs a wrong prior.
PRIOR_WEIGHT = 4.0
# What an observation still counts for after the next one of its class: about the last hundred make
# a belief, so that it follows the text from one subject to another.
MEMORY = 0.99
# Observations: with fewer, none is forgotten, and a rate comes to rest as fast as it can.
FORGET_FROM = 100
# Classes of confidence. A SAT's probability for its draft is not how often it is right, so each
# class learns its own rate; eight are fine enough to tell doubtful from sure, and coarse enough
# that each is seen often.
CONFIDENCE_CLASSES = 8
# Probability that a SAT's draft is right at a depth of which an adapter's metadata says nothing.
UNKNOWN_ACCEPTANCE = 0.5
# Probability that a looked-up draft is right, until more is known: the first one, and one below a
# looked-up draft that was right, which speaks for the passage that was found.
LOOKED_UP_FIRST = 0.5
LOOKED_UP_NEXT = 0.8

# ---- of costs ----

# Rows: up to which passes are corrected together. Small passes come all the time, each with a cost
# of its own; of large ones too few come for more classes.
ROW_CLASSES = (1, 4, 8, 12, 16, 32, 64, 128, 256)
# Tokens: the curve is read at multiples of this context. Costs hardly differ within, and plans ask
# for the same few again and again.
CONTEXT_STEP = 64
# Entries: a plan asks for some hundred (rows, SATs) at one context, in few batch sizes.
REMEMBERED_COSTS = 4096
# A ratio of a pass's seconds to the curve's counts for this at most: one pass that the machine held
# up says nothing of the next.
WORST_RATIO = 2.0
# Observations that a correction's start at 1 counts for, and how far each later one moves it at
# least: it settles within some ten passes, and then follows the last twenty.
CORRECTION_PRIOR = 3
CORRECTION_STEP = 0.05
# Passes before a curve may be called one of a busy machine, and over which its pace is a mean:
# about those of one answer.
PATIENCE = 64
# A curve is of a busy machine where passes take less than this part of what it says: noise doesn't
# reach so far, but half the machine in other hands while the curve was measured does.
OUTPACED = 0.6
# Times the patience after each new curve: a machine that is busy by turns isn't measured for ever.
PATIENCE_GROWTH = 8
# Drafts that a fixed loop is taken to verify beyond the whole number that it expects to be right:
# the others are mostly in vain, and left out.
SPARE_DRAFTS = 2


class Rates:
    """Shares of hits by class: Beta means that start at a prior, learn, and forget slowly."""

    def __init__(self, prior: Sequence[float]) -> None:
        self._hits = [PRIOR_WEIGHT * share for share in prior]
        self._trials = [PRIOR_WEIGHT] * len(prior)

    def __getitem__(self, index: int) -> float:
        return self._hits[index] / self._trials[index]

    def observe(self, index: int, hit: bool) -> None:
        """Count one more trial of a class."""
        keep = MEMORY if self._trials[index] > FORGET_FROM else 1.0
        self._hits[index] = keep * self._hits[index] + hit
        self._trials[index] = keep * self._trials[index] + 1


class Acceptance:
    """How likely drafts are right, given that their parents are.

    A SAT's draft is judged by its confidence; by its depth where only a group's size is known.
    First choices are counted apart from others: with sampling both are right less often than their
    share says, but not equally so. Looked-up drafts, and the first one of a rounded pass, which
    is the model's own choice but for rounding, have rates of their own.
    """

    def __init__(self, k: int, by_depth: Sequence[float]) -> None:
        """Start at the priors.

        k: the largest depth of a group. by_depth: acceptance at depth 1, 2, .. as it was measured
        in training; it may say less than k.
        """
        unknown = [UNKNOWN_ACCEPTANCE] * (k - len(by_depth))
        middles = [(i + 0.5) / CONFIDENCE_CLASSES for i in range(CONFIDENCE_CLASSES)]
        self._k = k
        self._by_depth = Rates([*by_depth[:k], *unknown])
        self._by_confidence = Rates(middles * 2)  # of first choices, of others
        self._by_lookup = Rates([LOOKED_UP_FIRST, LOOKED_UP_NEXT])
        self._of_rounded = Rates([FIRST_OF_ROUNDED])

    @property
    def of_rounded(self) -> float:
        """How likely the first draft of a rounded pass is right."""
        return self._of_rounded[0]

    def chance(self, drafts: Drafts, node: int) -> float:
        """Say how likely this draft is right, given that its parent is."""
        rates, index = self._class(drafts, node)
        return rates[index]

    def chances(self, drafts: Drafts) -> list[float]:
        """Say [N] how likely each node is right, given that its parent is; x is."""
        return [1.0, *(self.chance(drafts, node) for node in range(1, len(drafts.tokens)))]

    def reached(self, size: int) -> list[float]:
        """Say [size] how likely a group's first drafts are all right, down to each depth."""
        through = 1.0
        reached = []
        for depth in range(size):
            through *= self._by_depth[depth]
            reached.append(through)
        return reached

    def observe(self, drafts: Drafts, path: list[int]) -> None:
        """Learn from a walk along `path`.

        Of drafts whose parents were not on it nothing is seen.
        """
        tree = drafts.tree
        on_path = set(path)
        for node in range(1, len(tree)):
            if tree.parents[node] not in on_path:
                continue
            hit = node in on_path
            rates, index = self._class(drafts, node)
            rates.observe(index, hit)
            depth = tree.depths[node] - drafts.rounded  # of its SAT
            first = rates is self._by_confidence and not tree.ranks[node]
            if first and 0 < depth <= self._k:
                self._by_depth.observe(depth - 1, hit)

    def _class(self, drafts: Drafts, node: int) -> tuple[Rates, int]:
        """Name the rate by which a draft is judged."""
        if drafts.rounded and node == 1:
            return self._of_rounded, 0
        if drafts.looked_up[node]:
            return self._by_lookup, min(1, drafts.tree.parents[node])
        confidence = min(CONFIDENCE_CLASSES - 1, int(drafts.likely[node] * CONFIDENCE_CLASSES))
        return self._by_confidence, confidence + CONFIDENCE_CLASSES * bool(drafts.tree.ranks[node])


class _Ratio:
    """A mean ratio of passes' seconds to the curve's; it starts at 1."""

    def __init__(self, prior: int, step: float) -> None:
        """Start at 1.

        Args:
            prior: how many observations the start counts for.
            step: how far a ratio moves it at least, so that late ones still do.
        """
        self.value = 1.0
        self.count = 0
        self._prior = prior
        self._step = step

    def observe(self, ratio: float) -> None:
        """Count one more ratio."""
        self.count += 1
        step = max(self._step, 1 / (self._prior + self.count))
        self.value += step * (min(WORST_RATIO, ratio) - self.value)


class PassCosts:
    """What passes take: a cost curve, corrected by what they take as it runs.

    Seconds are those of one sequence among `batch`, which all do the same: n rows of it are 1/batch
    of a pass of batch n rows. The larger the batch, the more nearly that is in proportion to n.

    Attributes:
        batch: how many sequences a pass is of.
        curve: what passes take, uncorrected.
    """

    def __init__(self, curve: CostCurve) -> None:
        self.batch = 1
        self._patience = PATIENCE
        self._start(curve)

    def _start(self, curve: CostCurve) -> None:
        self.curve = curve
        self._seconds = lru_cache(REMEMBERED_COSTS)(curve.seconds)
        self._corrections = {
            rows: _Ratio(CORRECTION_PRIOR, CORRECTION_STEP) for rows in ROW_CLASSES
        }
        self._rounded = _Ratio(CORRECTION_PRIOR, CORRECTION_STEP)
        self._pace = _Ratio(0, 1 / PATIENCE)

    @property
    def has_rounded(self) -> bool:
        """Whether there are rounded passes."""
        return bool(self.curve.rounded)

    @property
    def num_timed(self) -> int:
        """How many passes have been observed with this curve."""
        return self._rounded.count + sum(ratio.count for ratio in self._corrections.values())

    @property
    def outpaced(self) -> bool:
        """Whether passes take so much less than the curve says that it must be of a busy machine.

        One that says too little is none: then the machine is busy now.
        """
        enough = self._pace.count >= self._patience
        return self.curve.measured and enough and self._pace.value < OUTPACED

    def seconds(self, rows: int, sats: int, context: int) -> float:
        """Estimate one sequence's share of a pass.

        Args:
            rows: of one sequence, SATs included.
            sats: how many of them are SATs.
            context: tokens so far.
        """
        batch = self.batch
        near = context // CONTEXT_STEP * CONTEXT_STEP
        curve = self._seconds(batch * rows, batch * sats, near, batch)
        return curve * self._correction(batch * rows).value / batch

    def rounded_seconds(self, size: int, context: int) -> float:
        """Estimate one sequence's share of a rounded pass with `size` SATs each."""
        sats = self.batch * (1 + size) - 1
        curve = self.curve.rounded_seconds(sats, context)
        return curve * self._correction_of_rounded(sats) / self.batch

    def observe_pass(self, rows: int, sats: int, context: int, seconds: float) -> None:
        """Learn from a pass: see Planner.observe_pass.

        Args:
            rows: of all sequences, SATs included.
            sats: how many of them are SATs.
            context: mean of the sequences' tokens so far.
            seconds: for the pass, with planning and drafting.
        """
        ratio = seconds / self.curve.seconds(rows, sats, context, self.batch)
        self._correction(rows).observe(ratio)
        # The pace judges what was measured, not what the curve concludes from it.
        if rows <= COUNTS[-1] and context <= CONTEXTS[-1]:
            self._pace.observe(ratio)

    def observe_drafting(self, sats: int, context: int, seconds: float) -> None:
        """Learn from a rounded pass: see Planner.observe_drafting."""
        self._rounded.value = self._correction_of_rounded(sats)
        self._rounded.observe(seconds / self.curve.rounded_seconds(sats, context))

    def take(self, curve: CostCurve) -> None:
        """Go on with another curve, uncorrected; to doubt that one takes more evidence."""
        self._patience *= PATIENCE_GROWTH
        self._start(curve)

    def _correction_of_rounded(self, sats: int) -> float:
        """Say what corrects a rounded pass: before one was seen, what corrects exact ones."""
        return self._rounded.value if self._rounded.count else self._correction(1 + sats).value

    def _correction(self, rows: int) -> _Ratio:
        """Name what corrects passes of so many rows, of all sequences."""
        place = min(bisect_left(ROW_CLASSES, rows), len(ROW_CLASSES) - 1)
        return self._corrections[ROW_CLASSES[place]]


class Worth:
    """What a place in the text is worth, in tokens, by where its drafts come from (KINDS).

    That is how many tokens more than the usual rate makes in the same time are to be had from there
    on: the mean of what the plans made at such places promised.

    Attributes:
        scores: sum and weight of what was observed, by kind.
    """

    def __init__(self) -> None:
        self.scores: dict[str, tuple[float, float]] = dict.fromkeys(KINDS, (0.0, 0.0))

    def of(self, kind: str, prior: float) -> float:
        """Say what a place is worth; prior: what it was taken for before any was seen."""
        total, weight = self.scores[kind]
        return (total + PRIOR_WEIGHT * prior) / (weight + PRIOR_WEIGHT)

    def observe(self, kind: str, value: float) -> None:
        """Learn what the plan at such a place promises."""
        total, weight = self.scores[kind]
        self.scores[kind] = (MEMORY * total + value, MEMORY * weight + 1)

    def fade(self, kind: str, share: float) -> None:
        """Let what was observed count for this share of what it did: back towards the prior."""
        total, weight = self.scores[kind]
        self.scores[kind] = (share * total, share * weight)


def loop_rate(acceptance: Acceptance, costs: PassCosts, size: int, context: int) -> float:
    """Estimate the tokens per second of a loop that always drafts with `size` SATs.

    It drafts in rounded passes where they can be had; else it is two-step.

    Args:
        acceptance: how often drafts are right.
        costs: what passes take.
        size: SATs a group.
        context: tokens so far.
    """
    accepted = sum(acceptance.reached(size))
    verified = min(size, SPARE_DRAFTS + int(accepted))
    if costs.has_rounded:
        tokens = 1 + acceptance.of_rounded * (1 + accepted)
        verifying = costs.seconds(2 + verified, 0, context)
        return tokens / (costs.rounded_seconds(size, context) + verifying)
    drafting = costs.seconds(1 + size, size, context)
    return (2 + accepted) / (drafting + costs.seconds(1 + verified, 0, context))
