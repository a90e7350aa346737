"""Plans: which drafts a pass verifies, and at which of them a group of SATs drafts on.

One loop serves every strategy (decoding/loop.py). Before a pass there is the last true token x and,
where the pass before had a group at the node at which its walk ended, a tree of drafts below x. A
plan says which drafts to keep, and where SATs go:

    AR         x                      never a SAT
    lookup     x + drafts, which are looked up in the text so far: no SATs, any model
    two-step   x + SATs, then x + drafts, then x + SATs, ..  (arXiv 2403.18647, section 3.2)
    rounded    in 8 bits x + SATs, then x + drafts  (one true pass a loop, after one that drafts)
    one-pass   x + drafts + SATs at the nodes where the walk most likely ends: a fixed budget of
               rows full of them, or as many as pay; where it ends elsewhere, x + SATs comes next
    auto       of all these what promises most tokens per second, given what a pass of so many rows
               costs here (method/costs.py), and how often such drafts were accepted so far

All plans give the same output: they decide what is tried, never what is emitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdsat.method.tree import DraftTree

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Plan:
    """nodes: the drafts to verify, ascending, 0 (x) among them.

    groups: (node, number of SATs), node counted among these. kinds: of KINDS, one a group, where
    the planner tells them apart.
    """

    nodes: list[int]
    groups: tuple[tuple[int, int], ...] = ()
    kinds: tuple[str, ...] = ()

    def kind(self, node: int) -> str:
        """Which of KINDS the drafts of the SATs at this node are."""
        return next(
            (kind for (at, _), kind in zip(self.groups, self.kinds, strict=False) if at == node),
            "root",
        )


PLAIN = Plan([0])


def reach(tree: DraftTree, likely: Sequence[float]) -> list[float]:
    """The probability that the walk passes each node."""
    through = [1.0]
    for node in range(1, len(tree)):
        through.append(through[tree.parents[node]] * likely[node])
    return through


def ends(tree: DraftTree, through: list[float]) -> list[float]:
    """The probability that the walk ends at each node: it passes it, and none of its children."""
    ending = list(through)
    for node in range(1, len(tree)):
        ending[tree.parents[node]] -= through[node]
    return [max(0.0, value) for value in ending]


def shallow(tree: DraftTree, depth: int) -> list[int]:
    """The nodes down to `depth`."""
    return [node for node, d in enumerate(tree.depths) if d <= depth]
