"""The planner that learns: of all plans the one that promises most tokens per second (`auto`)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from sdsat.config import MAX_ROWS, DecodeConfig
from sdsat.method.costs import CONTEXTS, COUNTS, CostCurve
from sdsat.method.drafts import OWN, Drafts

if TYPE_CHECKING:
    pass
from sdsat.decoding.fixed_planner import FixedPlanner
from sdsat.decoding.plan import PLAIN, Plan, reach

_BINS = 8  # of confidence
_PRIOR = 4.0  # how many observations the prior counts for
# Where the SATs of an exact pass stand: at x alone, at a last draft, at one whose drafts were all
# left out, at an inner one. Where the walk ends at an inner one the token that follows was not
# foreseen, and what comes after it is harder to draft; at one whose drafts were too doubtful to be
# kept that is likely; at a last one nothing says so.
_PLACES = ("root", "leaf", "cut", "inner")
# where drafts come from: such SATs, those of a pass in 8 bits, or nowhere
KINDS = (*_PLACES, "rounded", "none")
_SIZES = (1, 4, 8, 12, 16, 32, 64, 128, 256)  # classes of rows whose cost is corrected together
# tokens that SATs must promise beyond what they cost: the best of many estimates is an optimistic
# one
_MARGIN = 0.03
_MEMORY = 0.99  # what an observed pass still counts for one pass later
# what is known of passes in 8 bits still counts after one was declined: so they are tried again
_UNTRIED = 0.95
_GROUPS = 8  # of a pass of auto, at most
_TRY_AGAIN = 48  # plain passes in a row before drafting is tried again
# a curve is of a busy machine where so many passes take so much less; see AutoPlanner.outpaces
_OUTPACED = 0.6
_PATIENCE = 64
_TIME_AGAIN = 192  # passes with drafts in a row before a plain one is timed again


@dataclass
class _Rates:
    """Acceptance by class, as a Beta mean: starts at a prior, learns from what is observed, forgets
    slowly.
    """

    prior: list[float]
    hits: list[float] = field(default_factory=list)
    trials: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hits = [_PRIOR * p for p in self.prior]
        self.trials = [_PRIOR] * len(self.prior)

    def add(self, index: int, hit: bool) -> None:
        keep = _MEMORY if self.trials[index] > 100 else 1.0
        self.hits[index] = keep * self.hits[index] + hit
        self.trials[index] = keep * self.trials[index] + 1

    def __getitem__(self, index: int) -> float:
        return self.hits[index] / self.trials[index]


def _class(rows: int) -> int:
    return _SIZES[min(bisect_left(_SIZES, rows), len(_SIZES) - 1)]


def _expected(accuracy: Sequence[float], k: int) -> list[float]:
    """Of drafts by depth, where an adapter's metadata may say less than k."""
    return [*accuracy[:k], *[0.5] * (k - len(accuracy))]


class AutoPlanner:
    """Maximises expected tokens - rate * expected seconds, where rate is the tokens per second of
    the best fixed loop, or of AR.

    A place in the text is worth more, in tokens, the better the drafts that are there: `scores`
    says how much, by where those come from. At each place it compares: drafting in 8 bits, which
    costs a cheap pass and gives no token; every number of the likeliest drafts, each worth the
    probability of reaching it; SATs at the nodes where the walk most likely ends, which make the
    next place worth more; and a plain pass. All pay for their rows. Seconds are the cost curve's,
    corrected by what passes of that many rows take as it runs. When nothing pays, passes are plain,
    and now and then drafting is tried again.

    one-pass is the same without passes in 8 bits.

    In a batch of B sequences a plan of n rows counts as 1/B of a pass of B n rows: what it costs if
    the others do as much. The larger B, the more nearly that is in proportion to n, and drafts stop
    paying. All sequences of a batch learn together.
    """

    def __init__(self, config: DecodeConfig, costs: CostCurve, k: int, accuracy: Sequence[float]):
        self.config = config
        self.costs = costs
        self.k = k
        self.budget = config.budget or MAX_ROWS
        self._seconds = lru_cache(4096)(costs.seconds)  # plans ask for the same few again and again
        self.by_depth = _Rates(_expected(accuracy, k))
        # of first choices, of others
        self.by_confidence = _Rates([(i + 0.5) / _BINS for i in range(_BINS)] * 2)
        self.by_lookup = _Rates([0.5, 0.8])  # the first token, the others
        self.by_rounding = _Rates([OWN])  # the first draft of a pass in 8 bits
        self.scores: dict[str, list[float]] = {kind: [0.0, 0.0] for kind in KINDS}  # sum and weight
        self._found: dict[
            object, tuple[Drafts, float, Plan]
        ] = {}  # by `_best`, until the pass is over
        self.batch = 1
        self.corrections = dict.fromkeys((*_SIZES, "rounded"), 1.0)
        self.num_timed = dict.fromkeys((*_SIZES, "rounded"), 0)
        self.num_plain = self.num_drafting = 0  # passes in a row
        self.pace = 1.0
        self.num_paced = 0
        self.patience = _PATIENCE
        self._settle(0)

    def _settle(self, context: int) -> None:
        """Set the group size, and the rate, from what loops with each k would make by all that is
        known.
        """
        self.size = max(range(1, self.k + 1), key=lambda k: self._loop(k, context))
        self.rate = max(self._loop(self.size, context), 1 / self._cost(1, 0, context))

    def share(self, batch: int, context: int) -> None:
        """See FixedPlanner.share."""
        if batch != self.batch:
            self.batch = batch
            self._found.clear()
            self._settle(context)

    def _cost(self, rows: int, sats: int, context: int) -> float:
        batch = self.batch
        rows = self.batch * rows
        return (
            self._seconds(rows, batch * sats, context & -64, batch)
            * self.corrections[_class(rows)]
            / batch
        )

    def _rounded_cost(self, size: int, context: int) -> float:
        sats = self.batch * (1 + size) - 1
        return self.costs.rounded_seconds(sats, context) * self.corrections["rounded"] / self.batch

    def _loop(self, k: int, context: int) -> float:
        """Tokens per second of loops with k SATs: drafting in 8 bits where that can be had, else
        two-step.
        """
        drafts = sum(self._reached(k))
        verified = min(k, 2 + int(drafts))  # doubtful drafts are left out
        if self.costs.rounded:
            tokens = 1 + self.by_rounding[0] * (1 + drafts)
            return tokens / (self._rounded_cost(k, context) + self._cost(2 + verified, 0, context))
        return (2 + drafts) / (self._cost(1 + k, k, context) + self._cost(1 + verified, 0, context))

    def _reached(self, k: int) -> list[float]:
        through = 1.0
        out = []
        for depth in range(k):
            through *= self.by_depth[depth]
            out.append(through)
        return out

    def _score(self, kind: str) -> float:
        """What a place with drafts of this kind is worth, in tokens, on the scale on which `_learn`
        is told.
        """
        if kind == "none":
            prior = 0.0
        elif kind == "rounded":
            prior = self.rate * self._rounded_cost(self.size, 0)
        else:
            prior = self.rate * self._cost(1 + self.size, self.size, 0) - 1
        total, weight = self.scores[kind]
        return (total + _PRIOR * prior) / (weight + _PRIOR)

    def _learn(self, kind: str, score: float) -> None:
        held = self.scores[kind]
        held[0], held[1] = _MEMORY * held[0] + score, _MEMORY * held[1] + 1

    def _chance(self, drafts: Drafts, node: int) -> float:
        if drafts.rounded and node == 1:
            return self.by_rounding[0]
        if drafts.looked_up[node]:
            return self.by_lookup[min(1, drafts.tree.parents[node])]
        return self.by_confidence[self._bin(drafts, node)]

    def _bin(self, drafts: Drafts, node: int) -> int:
        """The class of a SAT's draft.

        With sampling's noise a first choice is likelier than its share, and the others less.
        """
        return min(_BINS - 1, int(drafts.likely[node] * _BINS)) + _BINS * bool(
            drafts.tree.ranks[node]
        )

    def draft_first(self, drafts: Drafts, left: int, context: int) -> int:
        """See FixedPlanner.draft_first."""
        size = min(self.size, left - 2)
        if drafts.by_sats or not self.costs.rounded or size < 1 or self._time_again():
            return 0
        value = self._score("rounded") - self.rate * self._rounded_cost(size, context)
        exact = self._best(drafts, left, context)
        if value <= exact[0] and not self._try_again():
            kept = _UNTRIED ** (1 / self.batch)  # each sequence declines, a try is one pass for all
            self.scores["rounded"] = [kept * part for part in self.scores["rounded"]]
            return 0
        self._learn("none", value)
        self.num_plain = 0  # of a batch, one sequence tries again
        return size

    def _try_again(self) -> bool:
        return self.num_plain >= _TRY_AGAIN * self.batch

    def _time_again(self) -> bool:
        return self.num_drafting >= _TIME_AGAIN * self.batch

    def observe_drafting(self, sats: int, context: int, seconds: float) -> None:
        """Learn from a pass in 8 bits: its seconds, drafting included. sats: its rows but one."""
        self._time("rounded", seconds / self.costs.rounded_seconds(sats, context))

    def plan(self, drafts: Drafts, left: int, context: int) -> Plan:
        """See FixedPlanner.plan."""
        size = min(self.size, left - 2, self.budget - 1)
        alone = len(drafts.tokens) == 1
        if alone and self._time_again():
            return PLAIN
        if alone and self._try_again() and size > 0:
            self.num_plain = 0
            return Plan([0], ((0, size),))
        value, plan = self._best(drafts, left, context)
        self._learn(drafts.kind, value)
        return plan

    def _best(self, drafts: Drafts, left: int, context: int) -> tuple[float, Plan]:
        """The pass that promises most, and how much, in tokens.

        Before a pass it is found once for each place, and for all places without drafts together.
        """
        alone = len(drafts.tokens) == 1
        key = (min(left, self.size + 2), context & -64) if alone else id(drafts)
        if key not in self._found:
            self._found[key] = (drafts, *self._search(drafts, left, context))
        return self._found[key][1:]

    def _search(self, drafts: Drafts, left: int, context: int) -> tuple[float, Plan]:
        cost = self._cost
        rate = self.rate
        tree = drafts.tree
        through = reach(tree, [1.0, *(self._chance(drafts, node) for node in range(1, len(tree)))])
        depths = tree.depths
        parents = set(tree.parents)
        order = sorted(
            (n for n in range(1, len(tree)) if depths[n] < left), key=lambda n: -through[n]
        )
        reached = self._reached(self.size)
        loss = [sum(reached[size:]) for size in range(self.size + 1)]  # of a smaller group
        full = {kind: self._score(kind) - self._score("none") for kind in _PLACES}
        worth = {kind: [value - less for less in loss] for kind, value in full.items()}
        best: tuple[float, int, tuple[tuple[int, int, str], ...]] = (-1e9, 0, ())
        ending = {0: 1.0}
        kept_value = 0.0
        inner = set[int]()
        most = sum(through[node] for node in order) + max(0.0, *full.values())
        for count in range(min(len(order), self.budget - 1) + 1):
            if count:
                node = order[count - 1]
                ending[node] = through[node]
                ending[tree.parents[node]] -= through[node]
                kept_value += through[node]
                inner.add(tree.parents[node])
            rows = 1 + count
            sats = 0
            value = kept_value
            spent = rate * cost(rows, 0, context)
            groups = []
            # more rows cost no less, and promise no more unless siblings are likely at once
            if most - spent <= best[0]:
                break
            for node in sorted(ending, key=lambda n: -ending[n])[:_GROUPS]:
                room = min(self.size, left - 2 - depths[node], self.budget - rows - sats)
                kind = (
                    "root"
                    if not count
                    else "inner"
                    if node in inner
                    else "cut"
                    if node in parents
                    else "leaf"
                )
                values = worth[kind]
                # The largest group is worth most, and the smallest costs least: where that isn't
                # enough, none is.
                if (
                    room < 1
                    or ending[node] * values[room]
                    - rate * cost(rows + sats + 1, sats + 1, context)
                    + spent
                    <= _MARGIN
                ):
                    break
                gains = [
                    (
                        ending[node] * values[size]
                        - rate * cost(rows + sats + size, sats + size, context)
                        + spent,
                        size,
                    )
                    for size in range(1, room + 1)
                ]
                if max(gains)[0] <= _MARGIN:
                    break
                size = max(gains)[1]
                groups.append((node, size, kind))
                value = value + ending[node] * values[size]
                sats = sats + size
                spent = rate * cost(rows + sats, sats, context)
            if value - spent > best[0]:
                best = (value - spent, count, tuple(groups))
        nodes = sorted([0, *order[: best[1]]])
        placed = tuple((nodes.index(node), size) for node, size, _ in best[2])
        return 1 + best[0], Plan(nodes, placed, tuple(kind for _, _, kind in best[2]))

    def observe(self, drafts: Drafts, plan: Plan, path: list[int]) -> None:
        """Learn from a pass over one sequence: drafts as planned (kept), and the walked path."""
        tree = drafts.tree
        on_path = set(path)
        for node in range(1, len(tree)):
            if tree.parents[node] not in on_path:
                continue
            hit = node in on_path
            if drafts.rounded and node == 1:
                self.by_rounding.add(0, hit)
            elif drafts.looked_up[node]:
                self.by_lookup.add(min(1, tree.parents[node]), hit)
            else:
                self.by_confidence.add(self._bin(drafts, node), hit)
                depth = tree.depths[node] - drafts.rounded
                if 0 < depth <= self.k and not tree.ranks[node]:
                    self.by_depth.add(depth - 1, hit)
        plain = len(tree) == 1 and not plan.groups and not drafts.by_sats
        self.num_plain, self.num_drafting = (
            (self.num_plain + 1, 0) if plain else (0, self.num_drafting + 1)
        )

    def observe_pass(self, rows: int, sats: int, context: int, seconds: float) -> None:
        """Learn from a pass, over all its sequences: its seconds, drafting included."""
        ratio = seconds / self.costs.seconds(rows, sats, context, self.batch)
        self._time(_class(rows), ratio)
        # what was measured, not what was concluded from it
        if rows <= COUNTS[-1] and context <= CONTEXTS[-1]:
            self.num_paced += 1
            self.pace += max(1 / _PATIENCE, 1 / self.num_paced) * (min(2.0, ratio) - self.pace)
        self._found.clear()
        self._settle(context)

    @property
    def outpaces(self) -> bool:
        """Whether passes take so much less than the cost curve says that it must have been measured
        on a busy machine.
        """
        return self.costs.measured and self.num_paced >= self.patience and self.pace < _OUTPACED

    def take(self, costs: CostCurve) -> None:
        """Go on with another cost curve; what is known of drafts stays.

        The next such change takes more evidence.
        """
        self.costs = costs
        self._seconds = lru_cache(4096)(costs.seconds)
        self.corrections = dict.fromkeys((*_SIZES, "rounded"), 1.0)
        self.num_timed = dict.fromkeys((*_SIZES, "rounded"), 0)
        self.pace = 1.0
        self.num_paced = 0
        self.patience = 8 * self.patience
        self._found.clear()
        self._settle(0)

    def _time(self, kind: int | str, ratio: float) -> None:
        """ratio: a pass's seconds over the cost curve's."""
        self.num_timed[kind] += 1
        self.corrections[kind] += max(0.05, 1 / (3 + self.num_timed[kind])) * (
            min(2.0, ratio) - self.corrections[kind]
        )


Planner = FixedPlanner | AutoPlanner
