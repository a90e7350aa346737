"""The plots of a benchmark's summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sdsat.config import ALL_STRATEGIES, speed_bound
from sdsat.evaluation.summary import AR_KEY, describe, key_of, name_of
from sdsat.figures import new_figure, save

Runs = list[dict[str, Any]]  # of a summary
_RATE = "acceptance_rate"
_AGAINST_K = {
    "tokens_per_second": "tokens per second",
    "speedup": "speed-up over AR",
    _RATE: "acceptance rate",
}


def draw(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Draw tokens/s, speed-up and acceptance rate against k, and acceptance by depth.

    A strategy that was measured at several k is a line that begins at AR, one at a single k a level
    line. Beside the speed-up of two-step stands its bound, (k + 2) / 2.

    Returns the files. Raises InputError, one line, where they can't be written.
    """
    base = next(run for run in summary["runs"] if key_of(run) == AR_KEY)
    drafted = [run for run in summary["runs"] if run["strategy"] in ALL_STRATEGIES]
    title = _title(summary)
    files = [
        _draw_speed(name, base, drafted, title, folder) for name in ("tokens_per_second", "speedup")
    ]
    if drafted:
        files.append(_draw_rate(drafted, title, folder))
        files.append(_draw_depths(drafted, title, folder))
    return files


def _title(summary: dict[str, Any]) -> str:
    """Write two lines: what, and on what."""
    parts = describe(summary).split(", ")
    return ", ".join(parts[:-2]) + "\n" + ", ".join(parts[-2:])


def _lines(drafted: Runs) -> list[Runs]:
    """Split the runs by strategy, with and without lookup apart; each is by k."""
    lines: dict[tuple[str, int], Runs] = {}
    for run in drafted:
        lines.setdefault((run["strategy"], run["lookup"]), []).append(run)
    return list(lines.values())


def _axes_against_k(name: str, title: str) -> Any:
    return new_figure(title, "k, semantic adaptive tokens per draft", _AGAINST_K[name])


def _draw_speed(name: str, base: dict[str, Any], drafted: Runs, title: str, folder: Path) -> Path:
    """Draw tokens/s or speed-up: lines begin at AR, k = 0.

    Args:
        name: of the figure, a key of _AGAINST_K.
        base: the run of AR.
        drafted: the runs with drafts.
        title: of the plot.
        folder: where it goes.

    Returns:
        The file.
    """
    figure, axes = _axes_against_k(name, title)
    lines = _lines(drafted)
    for number, runs in enumerate(lines):
        if _is_level(runs, lines):
            _draw_level(axes, name, runs[0], number)
            continue
        _draw_line(axes, name, [base, *runs], runs[0]["strategy"], number)
        ks = [run["k"] for run in runs]
        bounds = [speed_bound(runs[0]["strategy"], k) for k in ks]
        if name == "speedup" and None not in bounds:
            label = f"{runs[0]['strategy']}'s bound, (k + 2) / 2"
            axes.plot(ks, bounds, color="grey", linestyle=":", label=label)
    if not lines:
        _draw_line(axes, name, [base], "AR", 0)
    axes.axhline(base[name], color="grey", linewidth=0.8, label="AR (k = 0)")
    return _finish(figure, axes, name, folder)


def _draw_rate(drafted: Runs, title: str, folder: Path) -> Path:
    """Draw the acceptance rate, which AR has not."""
    figure, axes = _axes_against_k(_RATE, title)
    lines = _lines(drafted)
    for number, measured in enumerate(lines):
        # There is no acceptance rate where nothing was drafted.
        runs = [run for run in measured if run[_RATE] is not None]
        if runs and _is_level(runs, lines):
            _draw_level(axes, _RATE, runs[0], number)
        elif runs:
            _draw_line(axes, _RATE, runs, runs[0]["strategy"], number)
    return _finish(figure, axes, _RATE, folder)


def _draw_depths(drafted: Runs, title: str, folder: Path) -> Path:
    """Draw the acceptance at each depth."""
    figure, axes = new_figure(title, "draft depth", "accepted, given it was proposed")
    for run in drafted:
        depths = range(1, len(run["acceptance_by_depth"]) + 1)
        axes.plot(depths, run["acceptance_by_depth"], marker="o", label=name_of(key_of(run)))
    deepest = max(len(run["acceptance_by_depth"]) for run in drafted)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(1, deepest + 1))
    axes.legend(frameon=False, fontsize=8)
    return save(figure, folder / "acceptance_by_depth.png")


def _is_level(runs: Runs, lines: list[Runs]) -> bool:
    """Tell whether it is a level line: without SATs, or at a single k beside others."""
    return runs[0]["k"] == 0 or (len(runs) == 1 and len(lines) > 1)


def _draw_level(axes: Any, name: str, run: dict[str, Any], number: int) -> None:
    """Draw one run as a level line.

    Args:
        axes: matplotlib's.
        name: of the figure.
        run: what was measured.
        number: of the colour.
    """
    label = name_of(key_of(run))
    axes.axhline(run[name], linestyle="--", color=f"C{number}", label=label)


def _draw_line(axes: Any, name: str, runs: Runs, strategy: str, number: int) -> None:
    """Draw values at each k, with their intervals.

    Args:
        axes: matplotlib's.
        name: of the figure.
        runs: of one strategy, at several k.
        strategy: as the legend has it.
        number: of the colour.
    """
    ks = [run["k"] for run in runs]
    values = [run[name] for run in runs]
    intervals = np.array([run[f"{name}_ci95"] or [run[name]] * 2 for run in runs]).T
    axes.errorbar(
        ks,
        values,
        yerr=np.abs(intervals - values),
        marker="o",
        capsize=3,
        color=f"C{number}",
        label=f"{strategy}, 95 % interval",
    )
    axes.set_xticks(ks)


def _finish(figure: Any, axes: Any, name: str, folder: Path) -> Path:
    """Save a plot with its legend.

    Args:
        figure: matplotlib's.
        axes: its own.
        name: of the file, without .png.
        folder: where it goes.

    Returns:
        The file.
    """
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return save(figure, folder / f"{name}.png")
