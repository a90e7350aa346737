"""The search for the pass that promises most tokens per second, by beliefs that stay fixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sdsat.decoding.plan import Plan, reach
from sdsat.method.layout import SatGroup
from sdsat.method.tree import DraftTree

# Tokens that a group must promise beyond what it costs. It is the best of many estimates, and such
# a one is too high on average.
MARGIN = 0.03
# Groups of a pass at most. The walk ends at one node: the ninth likeliest is seldom worth a SAT,
# and each takes the search time.
MAX_GROUPS = 8


@dataclass(frozen=True)
class Terms:
    """What a search takes for true.

    Attributes:
        rate: what a second is worth, in tokens: what could be made in it otherwise.
        size: SATs of a group at most.
        budget: rows of a pass at most, SATs included.
        worth: by place (plan.PLACES), [size + 1] tokens that a group of so many SATs adds to what
            comes after, if the walk ends at it; rises with the number, and is negative for a bad
            place.
        seconds: what a pass of so many rows, and so many of them SATs, takes.
    """

    rate: float
    size: int
    budget: int
    worth: Mapping[str, Sequence[float]]
    seconds: Callable[[int, int], float]

    def cost(self, rows: int, sats: int) -> float:
        """Price a pass in tokens."""
        return self.rate * self.seconds(rows, sats)


def search(
    tree: DraftTree, chances: Sequence[float], left: int, terms: Terms
) -> tuple[float, Plan]:
    """Find the pass that promises most: tokens, and worth of the drafts made, less its cost.

    It compares every number of the likeliest drafts, each worth the probability that the walk
    passes it, and gives each the groups that pay there, at the likeliest ends of the walk first.

    Args:
        tree: the drafts.
        chances: [N] how likely each node is right, given that its parent is.
        left: tokens still to come, this pass's included.
        terms: what is believed.

    Returns:
        What the pass promises, in tokens, and its plan.
    """
    through = reach(tree, chances)
    may_be_kept = [node for node in range(1, len(tree)) if tree.depths[node] < left]
    likeliest = sorted(may_be_kept, key=lambda node: -through[node])
    kept = _Kept(tree)
    # More rows cost no less, and promise no more than this unless siblings are likely at once.
    most = sum(through[node] for node in likeliest)
    most += max(0.0, *(values[-1] for values in terms.worth.values()))
    best = (-math.inf, 0, list[tuple[int, int, str]]())
    for count in range(min(len(likeliest), terms.budget - 1) + 1):
        if count:
            kept.add(likeliest[count - 1], through[likeliest[count - 1]])
        if most - terms.cost(1 + count, 0) <= best[0]:
            break
        value, groups = _with_groups(kept, left, terms)
        if value > best[0]:
            best = (value, count, groups)
    value, count, groups = best
    nodes = sorted([0, *likeliest[:count]])
    placed = tuple(SatGroup(nodes.index(node), size) for node, size, _ in groups)
    return 1 + value, Plan(nodes, placed, tuple(place for _, _, place in groups))


class _Kept:
    """The drafts that a pass keeps, as one after the other is added, parents first.

    Attributes:
        tree: of all drafts.
        value: tokens that those which are kept promise.
        ending: how likely the walk ends at each, and at x.
    """

    def __init__(self, tree: DraftTree) -> None:
        self.tree = tree
        self.value = 0.0
        self.ending = {0: 1.0}
        self._parents = set(tree.parents)
        self._inner = set[int]()

    def add(self, node: int, through: float) -> None:
        """Keep one more; through: the probability that the walk passes it."""
        parent = self.tree.parents[node]
        self.value += through
        self.ending[node] = through
        self.ending[parent] -= through
        self._inner.add(parent)

    def place(self, node: int) -> str:
        """Say which of PLACES a group at this node has."""
        if len(self.ending) == 1:
            return "root"
        if node in self._inner:
            return "inner"
        return "cut" if node in self._parents else "leaf"


def _with_groups(kept: _Kept, left: int, terms: Terms) -> tuple[float, list[tuple[int, int, str]]]:
    """Add the groups that pay, and say what the pass promises but for the model's own token.

    Returns its value, and the groups: node, size, place.
    """
    rows = len(kept.ending)
    sats = 0
    value = kept.value
    spent = terms.cost(rows, 0)
    groups = []
    for node in sorted(kept.ending, key=lambda node: -kept.ending[node])[:MAX_GROUPS]:
        room = min(terms.size, left - 2 - kept.tree.depths[node], terms.budget - rows - sats)
        if room < 1:
            break
        ending = kept.ending[node]
        place = kept.place(node)
        worth = terms.worth[place]
        # The largest group is worth most, and the smallest costs least: where that isn't enough,
        # none is; and at the nodes that follow the walk ends more seldom.
        if ending * worth[room] - terms.cost(rows + sats + 1, sats + 1) + spent <= MARGIN:
            break
        gains = [
            (ending * worth[size] - terms.cost(rows + sats + size, sats + size) + spent, size)
            for size in range(1, room + 1)
        ]
        gain, size = max(gains)
        if gain <= MARGIN:
            break
        groups.append((node, size, place))
        value += ending * worth[size]
        sats += size
        spent = terms.cost(rows + sats, sats)
    return value - spent, groups
