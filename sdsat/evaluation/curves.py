"""What the plots of a summary show, whatever draws them: plots.py as files, page.py on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sdsat.config import ALL_STRATEGIES, speed_bound
from sdsat.evaluation.summary import AR_KEY, key_of, name_of

Runs = list[dict[str, Any]]  # of a summary
_RATE = "acceptance_rate"
_K = "k, semantic adaptive tokens per draft"
# By the figure of a run: its axis, and what it is multiplied by.
_AGAINST_K = {
    "tokens_per_second": ("tokens per second", 1),
    "speedup": ("speed-up over AR", 1),
    _RATE: ("acceptance rate", 1),
    "seconds_per_problem": ("mean time of a problem, seconds", 1),
    "seconds_per_pass": ("latency of a pass, milliseconds", 1000),
}


@dataclass(frozen=True)
class Curve:
    """Values against k or depth.

    Attributes:
        label: in the legend.
        x: where the values are; () for a level line.
        y: the values, of a level line one.
        bands: [low, high] of each value; () for none.
        colour: a number; None for grey.
        stroke: of the line.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    bands: Sequence[Sequence[float]] = ()
    colour: int | None = None
    stroke: Literal["solid", "dash", "dot"] = "solid"


@dataclass(frozen=True)
class Plot:
    """Curves in one pair of axes.

    Attributes:
        name: of its file, without an ending.
        x_title: of the axis below.
        y_title: of the axis on the left.
        curves: what it shows.
        top: where the axis on the left ends; None for where the values end.
    """

    name: str
    x_title: str
    y_title: str
    curves: Sequence[Curve]
    top: float | None = None


def plots_of(summary: dict[str, Any]) -> list[Plot]:
    """Make the plots: figures against k, and acceptance by depth.

    A strategy that was measured at several k is a line that begins at AR, one at a single k a level
    line. Beside the speed-up of two-step stands its bound, (k + 2) / 2. AR has no acceptance rate.
    """
    base = next(run for run in summary["runs"] if key_of(run) == AR_KEY)
    drafted = [run for run in summary["runs"] if run["strategy"] in ALL_STRATEGIES]
    repeated = summary["settings"].get("repeat", False)
    bands = "\u00b1 1.96 standard errors" if repeated else "95 % interval"
    plots = [
        _against_k(name, base, drafted, bands) for name in _AGAINST_K if drafted or name != _RATE
    ]
    if drafted:
        curves = [
            Curve(
                name_of(key_of(run)),
                range(1, len(run["acceptance_by_depth"]) + 1),
                run["acceptance_by_depth"],
                colour=number,
            )
            for number, run in enumerate(drafted)
        ]
        axis = "accepted, given it was proposed"
        plots.append(Plot("acceptance_by_depth", "draft depth", axis, curves, 1))
    return plots


def _lines(drafted: Runs) -> list[Runs]:
    """Split the runs by strategy, with and without lookup apart; each is by k."""
    lines: dict[tuple[str, int], Runs] = {}
    for run in drafted:
        lines.setdefault((run["strategy"], run["lookup"]), []).append(run)
    return list(lines.values())


def _against_k(name: str, base: dict[str, Any], drafted: Runs, bands: str) -> Plot:
    """Make the plot of one figure.

    Args:
        name: of the figure, a key of _AGAINST_K.
        base: the run of AR.
        drafted: the runs with drafts.
        bands: what the intervals are.
    """
    title, factor = _AGAINST_K[name]
    lines = _lines(drafted)
    has_base = base[name] is not None
    curves = []
    for number, measured in enumerate(lines):
        # There is no acceptance rate where nothing was drafted.
        runs = [run for run in measured if run[name] is not None]
        if not runs:
            continue
        if runs[0]["k"] == 0 or (len(runs) == 1 and len(lines) > 1):
            label = name_of(key_of(runs[0]))
            curves.append(Curve(label, (), [factor * runs[0][name]], (), number, "dash"))
            continue
        strategy = runs[0]["strategy"]
        with_base = [base, *runs] if has_base else runs
        curves.append(_line(name, with_base, f"{strategy}, {bands}", number))
        if name == "speedup" and speed_bound(strategy, 1) is not None:
            ks = [run["k"] for run in runs]
            bounds = [speed_bound(strategy, k) or 0 for k in ks]
            label = f"{strategy}'s bound, (k + 2) / 2"
            curves.append(Curve(label, ks, bounds, stroke="dot"))
    if not lines:
        curves.append(_line(name, [base], f"AR, {bands}", 0))
    if has_base:
        curves.append(Curve("AR (k = 0)", (), [factor * base[name]]))
    return Plot(name, _K, title, curves)


def _line(name: str, runs: Runs, label: str, number: int) -> Curve:
    """Make the line of values at each k, with their intervals.

    Args:
        name: of the figure.
        runs: of one strategy, at several k.
        label: in the legend.
        number: of the colour.
    """
    _, factor = _AGAINST_K[name]
    values = [run[name] for run in runs]
    intervals = [run[f"{name}_ci95"] or [run[name]] * 2 for run in runs]
    return Curve(
        label,
        [run["k"] for run in runs],
        [factor * value for value in values],
        [[factor * end for end in ends] for ends in intervals],
        number,
    )
