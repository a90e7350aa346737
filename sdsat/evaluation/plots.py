"""The plots of a benchmark's summary, as files: what GitHub and the documents can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sdsat.evaluation.curves import Curve, Plot, plots_of
from sdsat.evaluation.summary import describe
from sdsat.figures import new_figure, save

_STROKES = {"solid": "-", "dash": "--", "dot": ":"}


def draw(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the plots of a summary (curves.py).

    Returns the files. Raises InputError, one line, where they can't be written.
    """
    title = _title(summary)
    return [_draw(plot, title, folder) for plot in plots_of(summary)]


def _title(summary: dict[str, Any]) -> str:
    """Write two lines: what, and on what."""
    parts = describe(summary).split(", ")
    return ", ".join(parts[:-2]) + "\n" + ", ".join(parts[-2:])


def _draw(plot: Plot, title: str, folder: Path) -> Path:
    """Draw one plot into its file."""
    figure, axes = new_figure(title, plot.x_title, plot.y_title)
    for curve in plot.curves:
        _draw_curve(axes, curve)
    axes.set_ylim(0, plot.top)
    axes.set_xticks(sorted({x for curve in plot.curves for x in curve.x}))
    axes.legend(frameon=False, fontsize=8)
    return save(figure, folder / f"{plot.name}.png")


def _draw_curve(axes: Any, curve: Curve) -> None:
    """Draw a line with its bands, or a level line."""
    look = {
        "color": "grey" if curve.colour is None else f"C{curve.colour}",
        "linestyle": _STROKES[curve.stroke],
        "label": curve.label,
    }
    if not curve.x:
        axes.axhline(curve.y[0], linewidth=0.8 if curve.colour is None else 1.5, **look)
    elif curve.colour is None:
        axes.plot(curve.x, curve.y, **look)
    else:
        bands = np.abs(np.array(curve.bands).T - curve.y) if len(curve.bands) else None
        axes.errorbar(curve.x, curve.y, yerr=bands, marker="o", capsize=3, **look)
