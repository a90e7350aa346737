"""Planners that learn nothing: the same k, tree and number of rows in every pass."""

from __future__ import annotations

from dataclasses import dataclass

from sdsat.config import MAX_ROWS, DecodeConfig
from sdsat.decoding.plan import Plan, ends, reach, shallow
from sdsat.method.drafts import Drafts
from sdsat.method.layout import SatGroup


@dataclass
class FixedPlanner:
    """Verifies all drafts there are, and drafts none: lookup, and, where nothing looks up, AR.

    A planner (see `plan.Planner`), and the base of those that draft without learning.

    Attributes:
        config: the generation's settings, resolved.
    """

    config: DecodeConfig

    @property
    def rounds(self) -> bool:
        """See Planner.rounds."""
        return self.config.may_round

    def plan(self, drafts: Drafts, left: int, context: int) -> Plan:
        """See Planner.plan."""
        return Plan(shallow(drafts.tree, left - 1))

    def draft_first(self, drafts: Drafts, left: int, context: int) -> int:
        """See Planner.draft_first; here no rounded pass drafts."""
        return 0

    def share(self, batch: int, context: int) -> None:
        """See Planner.share; here a sequence's plans are those that it has alone."""

    def observe(self, drafts: Drafts, plan: Plan, path: list[int]) -> None:
        """See Planner.observe; here nothing is learned."""

    def observe_pass(self, rows: int, sats: int, context: int, seconds: float) -> None:
        """See Planner.observe_pass; here nothing is learned."""

    def observe_drafting(self, sats: int, context: int, seconds: float) -> None:
        """See Planner.observe_drafting; here nothing is learned."""


class RoundedPlanner(FixedPlanner):
    """A rounded pass drafts before every pass, which then verifies (strategy `rounded`)."""

    def draft_first(self, drafts: Drafts, left: int, context: int) -> int:
        """See Planner.draft_first."""
        # There will be one draft more than SATs, and a pass emits one token more than drafts.
        return max(0, min(self.config.num_sats, left - 2))


class TwoStepPlanner(FixedPlanner):
    """The paper's loop: x and SATs, then x and their drafts."""

    def plan(self, drafts: Drafts, left: int, context: int) -> Plan:
        """See Planner.plan."""
        return drafting_pass(drafts, self.config.num_sats, left) or super().plan(
            drafts, left, context
        )


class OnePassPlanner(FixedPlanner):
    """Fills every pass up to the budget with SATs at the nodes where the walk most likely ends."""

    def plan(self, drafts: Drafts, left: int, context: int) -> Plan:
        """See Planner.plan."""
        budget = self.config.budget or MAX_ROWS
        k = min(self.config.num_sats, budget - 1)
        if first := drafting_pass(drafts, k, left):
            return first
        nodes = shallow(drafts.tree, left - 1)[:budget]
        tree = drafts.tree.kept(nodes)
        ending = ends(tree, reach(tree, [drafts.likely[node] for node in nodes]))
        likeliest = sorted(range(len(nodes)), key=lambda node: -ending[node])
        groups = []
        for node in likeliest[: (budget - len(nodes)) // k]:
            size = min(k, left - 2 - tree.depths[node])
            if size > 0:
                groups.append(SatGroup(node, size))
        return Plan(nodes, tuple(groups))


def drafting_pass(drafts: Drafts, k: int, left: int) -> Plan | None:
    """Plan x and its SATs, where no SAT has drafted yet and their drafts can still be used."""
    size = min(k, left - 2)
    return Plan([0], (SatGroup(0, size),)) if size > 0 and not drafts.by_sats else None
