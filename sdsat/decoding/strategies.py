"""The planner of each strategy: to add a strategy, write a planner and enter it here.

What a strategy drafts with (SATs, looked-up tokens, rounded weights) stands in `config.STRATEGY`.
"""

from __future__ import annotations

from collections.abc import Callable

from sdsat.config import DecodeConfig
from sdsat.decoding.auto_planner import AutoPlanner
from sdsat.decoding.fixed_planner import (
    FixedPlanner,
    OnePassPlanner,
    RoundedPlanner,
    TwoStepPlanner,
)

Kind = type[FixedPlanner] | type[AutoPlanner]

# `one-pass` without a budget takes as many rows as pay; of `lookup` nothing is left to plan.
PLANNERS: dict[str, Callable[[DecodeConfig], Kind]] = {
    "two-step": lambda config: TwoStepPlanner,
    "rounded": lambda config: RoundedPlanner,
    "one-pass": lambda config: OnePassPlanner if config.budget else AutoPlanner,
    "auto": lambda config: AutoPlanner,
    "lookup": lambda config: FixedPlanner,
}


def planner_of(config: DecodeConfig) -> Kind:
    """Find the planner of a generation whose settings are resolved; plain decoding has none."""
    return PLANNERS[config.strategy](config) if config.num_sats else FixedPlanner
