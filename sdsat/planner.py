"""What each pass carries: which drafts it verifies, and at which of them a group of SATs drafts on.

One loop serves every strategy (decode.py). Before a pass there is the last true token x and, where the pass before had a group at
the node at which its walk ended, a tree of drafts below x. A plan says which drafts to keep, and where SATs go:

    AR         x                      never a SAT
    two-step   x + SATs, then x + drafts, then x + SATs, ..           (the paper's; arXiv 2403.18647, section 3.2)
    one-pass   x + drafts + SATs at the nodes where the walk most likely ends, under a budget of rows; where it ends at
               another one, the next pass is x + SATs
    auto       of all these what promises most tokens per second, given what a pass of so many rows costs here (costs.py) and how
               often drafts of that confidence and depth were accepted so far

All plans give the same output: they decide what is tried, never what is emitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .config import DecodeConfig
from .costs import CostCurve, measured_costs
from .draft import Drafts
from .tree import DraftTree

if TYPE_CHECKING:
    from .model import SatModel

_BINS = 8  # of confidence
_PRIOR = 4.0  # how many observations the prior counts for
_KINDS = ("root", "leaf", "inner", "none")  # where drafts come from: SATs at x alone, at a last draft, at an inner one; nowhere
_SIZES = (1, 4, 8, 12, 16, 32)  # classes of rows whose cost is corrected together
_MARGIN = 0.1  # tokens that SATs must promise beyond what they cost: the best of many estimates is an optimistic one
_MEMORY = 0.98  # what an observed pass still counts for one pass later
_PLAIN_PASSES = 32  # how long plain decoding lasts before drafting is tried again


@dataclass(frozen=True)
class Plan:
    """nodes: the drafts to verify, ascending, 0 (x) among them. groups: (node, number of SATs), node counted among these."""

    nodes: list[int]
    groups: tuple[tuple[int, int], ...] = ()


def reach(tree: DraftTree, likely: Sequence[float]) -> list[float]:
    """The probability that the walk passes each node."""
    through = [1.0]
    for node in range(1, len(tree)):
        through.append(through[tree.parents[node]] * likely[node])
    return through


def ends(tree: DraftTree, through: list[float]) -> list[float]:
    """The probability that the walk ends at each node: that it passes it, and none of its children."""
    ending = list(through)
    for node in range(1, len(tree)):
        ending[tree.parents[node]] -= through[node]
    return [max(0.0, value) for value in ending]


def shallow(tree: DraftTree, depth: int) -> list[int]:
    """The nodes down to `depth`."""
    return [node for node, d in enumerate(tree.depths) if d <= depth]


@dataclass
class FixedPlanner:
    """two-step, one-pass, and AR (k = 0): always the same k, tree and budget."""

    config: DecodeConfig
    strategy: str

    def plan(self, drafts: Drafts, left: int, context: int) -> Plan:
        """left: tokens still to come, this pass's included. context: tokens so far."""
        nodes, k, budget = shallow(drafts.tree, left - 1), self.config.k, self.config.budget
        if self.strategy == "one-pass":
            nodes, k = nodes[:budget], min(k, budget - 1)
        room = budget - len(nodes)
        size = min(k, left - 2)
        if size > 0 and not drafts.by_sats:  # time to draft
            return Plan([0], ((0, size),))
        if self.strategy == "two-step" or not 0 < k <= room:
            return Plan(nodes)
        tree = drafts.tree.kept(nodes)
        ending = ends(tree, reach(tree, [drafts.likely[node] for node in nodes]))
        groups = []
        for node in sorted(range(len(nodes)), key=lambda node: -ending[node])[: room // k]:
            size = min(k, left - 2 - tree.depths[node])
            if size > 0:
                groups.append((node, size))
        return Plan(nodes, tuple(groups))

    def observe(self, drafts: Drafts, plan: Plan, path: list[int], context: int, seconds: float) -> None:
        """Nothing to learn."""


@dataclass
class _Rates:
    """Acceptance by class, as a Beta mean: starts at a prior, learns from what is observed, forgets slowly."""

    prior: list[float]
    hits: list[float] = field(default_factory=list)
    trials: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hits, self.trials = [_PRIOR * p for p in self.prior], [_PRIOR] * len(self.prior)

    def add(self, index: int, hit: bool) -> None:
        keep = _MEMORY if self.trials[index] > 100 else 1.0
        self.hits[index] = keep * self.hits[index] + hit
        self.trials[index] = keep * self.trials[index] + 1

    def __getitem__(self, index: int) -> float:
        return self.hits[index] / self.trials[index]


def _size_class(rows: int) -> int:
    return next((size for size in _SIZES if rows <= size), _SIZES[-1])


class AutoPlanner:
    """Maximises expected tokens - rate * expected seconds, where rate is the tokens per second that this policy makes.

    A group at the node where the walk ends saves a draft pass, which costs t(1 + k) and emits one token: it is worth
    rate * t(1 + k) - 1 tokens, less what a smaller group drafts less, and more or less by how good drafts from such a place
    were (after a rejected draft they are worse than at a fresh x, after an accepted chain better). A draft is worth the
    probability of reaching it. Both pay for the rows they add. Seconds are the cost curve's, corrected by what passes of that
    many rows take as it runs.
    """

    def __init__(self, config: DecodeConfig, costs: CostCurve, k: int, accuracy: Sequence[float]):
        self.config, self.costs, self.k = config, costs, k
        self.by_depth = _Rates([*accuracy[:k], *[0.3] * (k - len(accuracy))])
        self.by_confidence = _Rates([(i + 0.5) / _BINS for i in range(_BINS)])
        self.by_lookup = _Rates([0.5, 0.8])  # the first token, the others
        self.scores: dict[str, list[float]] = {kind: [0.0, 0.0] for kind in _KINDS}  # sum and weight
        self.kind = "none"  # of the SATs that the drafts come from
        self.corrections, self.num_timed = dict.fromkeys(_SIZES, 1.0), dict.fromkeys(_SIZES, 0)
        self.plain_left = self.num_cycles = 0
        self.size = k
        self.tokens, self.seconds = 0.0, 1e-9
        self._start(0)

    def _start(self, context: int) -> None:
        """Set the group size, and the first estimate of the rate: two-step's with the best k."""
        best = max(range(1, self.k + 1), key=lambda k: self._two_step(k, context))
        self.size = best
        if not self.tokens:
            self.seconds = _PRIOR * self._cycle_seconds(best, context)
            self.tokens = self.seconds * self._two_step(best, context)

    def _cost(self, rows: int, sats: int, context: int) -> float:
        return self.costs.seconds(rows, sats, context) * self.corrections[_size_class(rows)]

    def _cycle_seconds(self, k: int, context: int) -> float:
        verified = min(k, 2 + int(sum(self._reached(k))))  # doubtful drafts are left out
        return self._cost(1 + k, k, context) + self._cost(1 + verified, 0, context)

    def _two_step(self, k: int, context: int) -> float:
        return (2 + sum(self._reached(k))) / self._cycle_seconds(k, context)

    def _reached(self, k: int) -> list[float]:
        through, out = 1.0, []
        for depth in range(k):
            through *= self.by_depth[depth]
            out.append(through)
        return out

    @property
    def rate(self) -> float:
        """Tokens per second of the passes of late, or plain decoding's if that is more."""
        return self.tokens / self.seconds

    def _worth(self, kind: str) -> float:
        """What drafts of this kind are worth, in tokens, over having none."""
        total, weight = self.scores[kind]
        prior = self.rate * self._cost(1 + self.size, self.size, 0) - 1
        none, of_none = self.scores["none"]
        return (total + _PRIOR * prior) / (weight + _PRIOR) - none / (of_none + _PRIOR)

    def _learn(self, kind: str, score: float) -> None:
        held = self.scores[kind]
        held[0], held[1] = _MEMORY * held[0] + score, _MEMORY * held[1] + 1

    def _chance(self, drafts: Drafts, node: int) -> float:
        if drafts.looked_up[node]:
            looked = self.by_lookup[min(1, drafts.tree.parents[node])]
            return looked
        return self.by_confidence[min(_BINS - 1, int(drafts.likely[node] * _BINS))]

    def plan(self, drafts: Drafts, left: int, context: int) -> Plan:
        """See FixedPlanner.plan."""
        if len(drafts.tokens) == 1:
            size = min(self.size, left - 2, self.config.budget - 1)
            if self.plain_left:
                self.plain_left -= 1
                return Plan([0])
            if self.num_cycles % _PLAIN_PASSES == _PLAIN_PASSES // 2:  # now and then, to know what plain decoding costs
                self.num_cycles += 1
                return Plan([0])
            self._learn("none", 1 - self.rate * self._cost(1 + size, size, context) + self._worth("root"))
            return Plan([0], ((0, size),) if size > 0 else ())
        cost, rate, tree = self._cost, self.rate, drafts.tree
        through = reach(tree, [1.0, *(self._chance(drafts, node) for node in range(1, len(tree)))])
        depths = tree.depths
        order = sorted((n for n in range(1, len(tree)) if depths[n] < left), key=lambda n: -through[n])
        reached = self._reached(self.size)
        loss = [sum(reached[size:]) for size in range(self.size + 1)]  # of a smaller group
        worth = {kind: [self._worth(kind) - less for less in loss] for kind in ("leaf", "inner")}
        best: tuple[float, int, tuple[tuple[int, int], ...]] = (-1e9, 0, ())
        ending, kept_value, inner = {0: 1.0}, 0.0, set[int]()
        for count in range(min(len(order), self.config.budget - 1) + 1):
            if count:
                node = order[count - 1]
                ending[node] = through[node]
                ending[tree.parents[node]] -= through[node]
                kept_value += through[node]
                inner.add(tree.parents[node])
            rows, sats, value = 1 + count, 0, kept_value
            spent, groups = rate * cost(rows, 0, context), []
            for node in sorted(ending, key=lambda n: -ending[n])[:3]:
                room = min(self.size, left - 2 - depths[node], self.config.budget - rows - sats)
                values = worth["inner" if node in inner else "leaf"]
                gains = [
                    (ending[node] * values[size] - rate * cost(rows + sats + size, sats + size, context) + spent, size)
                    for size in range(1, room + 1)
                ]
                if not gains or max(gains)[0] <= _MARGIN:
                    break
                size = max(gains)[1]
                groups.append((node, size))
                value, sats = value + ending[node] * values[size], sats + size
                spent = rate * cost(rows + sats, sats, context)
            if value - spent > best[0]:
                best = (value - spent, count, tuple(groups))
        self._learn(self.kind, 1 + best[0])
        nodes = sorted([0, *order[: best[1]]])
        return Plan(nodes, tuple((nodes.index(node), size) for node, size in best[2]))

    def observe(self, drafts: Drafts, plan: Plan, path: list[int], context: int, seconds: float) -> None:
        """Learn from a pass: drafts as planned (kept), the walked path, and its seconds, drafting included."""
        tree, on_path = drafts.tree, set(path)
        for node in range(1, len(tree)):
            if tree.parents[node] not in on_path:
                continue
            hit = node in on_path
            if drafts.looked_up[node]:
                self.by_lookup.add(min(1, tree.parents[node]), hit)
            else:
                self.by_confidence.add(min(_BINS - 1, int(drafts.likely[node] * _BINS)), hit)
                if tree.depths[node] <= self.k and not tree.ranks[node]:
                    self.by_depth.add(tree.depths[node] - 1, hit)
        here = [node for node, _ in plan.groups if node == path[-1]]
        self.kind = "none" if not here else "root" if len(tree) == 1 else "inner" if path[-1] in tree.parents else "leaf"
        sats = sum(size for _, size in plan.groups)
        rows = len(tree) + sats
        ratio = seconds / self.costs.seconds(rows, sats, context)
        timed = _size_class(rows)
        self.num_timed[timed] += 1
        self.corrections[timed] += max(0.05, 1 / (3 + self.num_timed[timed])) * (min(2.0, ratio) - self.corrections[timed])
        if rows == 1:
            return
        self.tokens = _MEMORY * self.tokens + len(path)
        self.seconds = _MEMORY * self.seconds + seconds
        self.num_cycles += 1
        if self.num_cycles % 8 == 0:
            self._start(context)
            if self.num_cycles >= 16 and self.rate * self._cost(1, 0, context) < 1 and not self.plain_left:
                self.plain_left = _PLAIN_PASSES


Planner = FixedPlanner | AutoPlanner


def make_planner(model: SatModel, config: DecodeConfig) -> Planner:
    """The planner of a generation. auto's is kept with the model for each way of sampling, and learns from one to the next."""
    if config.strategy != "auto" or not config.k or model.sat is None:
        return FixedPlanner(config, config.strategy)
    key = (config.sampling.temperature, config.k, config.tree, config.budget, config.lookup)
    if key not in model.planners:
        training = model.adapter.config.training if model.adapter else {}
        accuracy = training.get("accuracy_by_depth", [])
        model.planners[key] = AutoPlanner(config, measured_costs(model), config.k, accuracy)
    return model.planners[key]
