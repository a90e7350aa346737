"""Plans that are always the same: AR, two-step, int8, and one-pass with a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdsat.config import MAX_ROWS, DecodeConfig
from sdsat.method.drafts import Drafts

if TYPE_CHECKING:
    pass
from sdsat.decoding.plan import Plan, ends, reach, shallow


@dataclass
class FixedPlanner:
    """AR and lookup (k = 0), two-step, rounded, and one-pass with a budget: always the same k, tree
    and number of rows.
    """

    config: DecodeConfig
    strategy: str

    def draft_first(self, drafts: Drafts, left: int, context: int) -> int:
        """How many SATs draft in a pass in 8 bits before this pass; 0: no such pass.

        Arguments as those of `plan`.
        """
        return max(0, min(self.config.num_sats, left - 2)) if self.strategy == "rounded" else 0

    def share(self, batch: int, context: int) -> None:
        """Say of how many sequences the coming passes are."""

    def observe_drafting(self, sats: int, context: int, seconds: float) -> None:
        """Nothing to learn."""

    def plan(self, drafts: Drafts, left: int, context: int) -> Plan:
        """left: tokens still to come, this pass's included. context: tokens so far."""
        nodes = shallow(drafts.tree, left - 1)
        k = self.config.num_sats
        budget = self.config.budget or MAX_ROWS
        if self.strategy == "one-pass":
            nodes = nodes[:budget]
            k = min(k, budget - 1)
        room = budget - len(nodes)
        size = min(k, left - 2)
        if size > 0 and not drafts.by_sats and self.strategy != "rounded":  # time to draft
            return Plan([0], ((0, size),))
        if self.strategy != "one-pass" or not 0 < k <= room:
            return Plan(nodes)
        tree = drafts.tree.kept(nodes)
        ending = ends(tree, reach(tree, [drafts.likely[node] for node in nodes]))
        groups = []
        for node in sorted(range(len(nodes)), key=lambda node: -ending[node])[: room // k]:
            size = min(k, left - 2 - tree.depths[node])
            if size > 0:
                groups.append((node, size))
        return Plan(nodes, tuple(groups))

    def observe(self, drafts: Drafts, plan: Plan, path: list[int]) -> None:
        """Nothing to learn."""

    def observe_pass(self, rows: int, sats: int, context: int, seconds: float) -> None:
        """Nothing to learn."""
