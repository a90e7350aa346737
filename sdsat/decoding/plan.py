"""Plans: which drafts a pass verifies, and at which of them a group of SATs drafts on.

One loop serves every strategy (decoding/loop.py). Before a pass there is the last true token x and,
where the pass before had a group at the node at which its walk ended, a tree of drafts below x. A
plan says which drafts to keep, and where SATs go:

    AR         x                      never a SAT
    lookup     x + drafts, which are looked up in the text so far: no SATs, any model
    two-step   x + SATs, then x + drafts, then x + SATs, ..  (arXiv 2403.18647, section 3.2)
    rounded    x + SATs on rounded weights, then x + drafts  (one true pass a loop)
    one-pass   x + drafts + SATs at the nodes where the walk most likely ends: a fixed budget of
               rows full of them, or as many as pay; where it ends elsewhere, x + SATs comes next
    auto       of all these what promises most tokens per second, given what a pass of so many rows
               costs here (method/costs.py), and how often such drafts were accepted so far

All plans give the same output: they decide what is tried, never what is emitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sdsat.method.drafts import Drafts
from sdsat.method.layout import SatGroup
from sdsat.method.tree import DraftTree

# Where the SATs of an exact pass stand: at x alone, at a last draft, at one whose drafts were all
# left out, at an inner one. Where the walk ends at an inner one the token that follows was not
# foreseen, and what comes after it is harder to draft; at one whose drafts were too doubtful to be
# kept that is likely; at a last one nothing says so.
PLACES = ("root", "leaf", "cut", "inner")
# Where drafts come from: such SATs, those of a rounded pass, or nowhere.
KINDS = (*PLACES, "rounded", "none")


@dataclass(frozen=True)
class Plan:
    """What one sequence has of the coming pass.

    Attributes:
        nodes: the drafts to verify, ascending, 0 (x) among them.
        groups: where SATs stand; nodes are counted among `nodes`.
        kinds: of PLACES, one a group, where the planner tells them apart.
    """

    nodes: list[int]
    groups: tuple[SatGroup, ...] = ()
    kinds: tuple[str, ...] = ()

    def kind(self, node: int) -> str:
        """Name which of KINDS the drafts of the SATs at this node are."""
        return next(
            (kind for (at, _), kind in zip(self.groups, self.kinds, strict=False) if at == node),
            "root",
        )


PLAIN = Plan([0])


class Planner(Protocol):
    """Decides what passes try; one serves all sequences of a batch that have the same settings.

    The loop calls it in this order. Before a pass, for each live sequence: `share`, `draft_first`.
    Where some drafted in a rounded pass, `observe_drafting`, once. For each `plan`; after the pass
    for each sequence `observe`, and once `observe_pass`. What is observed may change later plans,
    and so may a decision: each is asked for once a pass and sequence, and then carried out.
    """

    @property
    def rounds(self) -> bool:
        """Whether it may want rounded passes."""

    def share(self, batch: int, context: int) -> None:
        """Take note of how many sequences the coming pass is of.

        context: tokens so far of one of them, its prompt's included.
        """

    def draft_first(self, drafts: Drafts, left: int, context: int) -> int:
        """Decide how many SATs draft in a rounded pass before the coming pass; 0: no such pass.

        Args:
            drafts: what there is to verify.
            left: tokens still to come, the coming pass's included.
            context: tokens so far, the prompt's included.
        """

    def plan(self, drafts: Drafts, left: int, context: int) -> Plan:
        """Decide what of `drafts` the coming pass verifies, and where SATs draft on.

        A draft is kept only with its parent. No draft is deeper than left - 1, and no group drafts
        a token for which nothing is left: a pass emits one token more than it accepts drafts.

        Args:
            drafts: what there is to verify, after a rounded pass what that drafted.
            left: tokens still to come, this pass's included.
            context: tokens so far, the prompt's included.
        """

    def observe(self, drafts: Drafts, plan: Plan, path: list[int]) -> None:
        """Learn from a pass which drafts of one sequence were right.

        Args:
            drafts: those that were verified: `Drafts.kept(plan.nodes)`.
            plan: as it was carried out.
            path: the nodes of `drafts` that the walk passed, x first.
        """

    def observe_pass(self, rows: int, sats: int, context: int, seconds: float) -> None:
        """Learn what a pass over all live sequences took.

        Args:
            rows: of all sequences, SATs included.
            sats: how many of them are SATs.
            context: mean of the sequences' tokens so far.
            seconds: for the pass, with planning and drafting.
        """

    def observe_drafting(self, sats: int, context: int, seconds: float) -> None:
        """Learn what a rounded pass took, for all sequences that wanted one.

        Args:
            sats: its rows but one.
            context: mean of those sequences' tokens so far.
            seconds: for the pass, with deciding and drafting.
        """


def reach(tree: DraftTree, likely: Sequence[float]) -> list[float]:
    """Compute the probability that the walk passes each node.

    likely: that a node is right, given that its parent is.
    """
    through = [1.0]
    for node in range(1, len(tree)):
        through.append(through[tree.parents[node]] * likely[node])
    return through


def ends(tree: DraftTree, through: list[float]) -> list[float]:
    """Compute the probability that the walk ends at each node: it passes it, and no child of it."""
    ending = list(through)
    for node in range(1, len(tree)):
        ending[tree.parents[node]] -= through[node]
    return [max(0.0, value) for value in ending]


def shallow(tree: DraftTree, depth: int) -> list[int]:
    """List the nodes down to `depth`."""
    return [node for node, d in enumerate(tree.depths) if d <= depth]
