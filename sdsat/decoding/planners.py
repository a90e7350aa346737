"""Planners that learn, kept from one generation to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sdsat.config import DecodeConfig
from sdsat.decoding.auto_planner import AutoPlanner
from sdsat.decoding.plan import Planner
from sdsat.decoding.strategies import planner_of
from sdsat.method.costs import CostCurve
from sdsat.models.adapter import SatAdapter

_MOST = 32  # of as many ways of sampling, what was learned is kept


class Planners:
    """One planner for each way of sampling, which goes on learning; of fixed strategies none.

    Attributes:
        kept: the planners by their settings, the oldest first.
    """

    def __init__(self) -> None:
        self.kept: dict[Any, AutoPlanner] = {}

    def clear(self) -> None:
        """Forget what was learned."""
        self.kept.clear()

    def of(
        self,
        config: DecodeConfig,
        adapter: SatAdapter | None,
        cost_curve: Callable[[bool], CostCurve],
    ) -> Planner:
        """Make the planner of a generation, or find the one that has learned.

        Args:
            config: resolved settings.
            adapter: of the model; it says how often its drafts were right in training.
            cost_curve: (anew) -> what passes cost here; measured again if anew. That is asked for
                where a planner's passes tell that the curve is of a busy machine.
        """
        kind = planner_of(config)
        if not issubclass(kind, AutoPlanner):
            return kind(config)
        sampling = config.sampling.temperature
        key = (config.strategy, sampling, config.k, config.tree, config.budget, config.lookup)
        known = self.kept.get(key)
        curve = cost_curve(False)
        if known is not None and known.costs.curve.verify is curve.verify:
            if not known.costs.outpaced:
                return known
            curve = cost_curve(True)
        # Else another planner has had the curve measured again.
        curve = curve if config.may_round else replace(curve, rounded=[])
        if known is not None:
            known.take(curve)
            return known
        accuracy = adapter.config.training.get("accuracy_by_depth", []) if adapter else []
        while len(self.kept) >= _MOST:
            self.kept.pop(next(iter(self.kept)))
        self.kept[key] = kind(config, curve, config.num_sats, accuracy)
        return self.kept[key]
