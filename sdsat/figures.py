"""Plots: an empty figure of this program's look, and saving it whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdsat.files import replacing


def new_figure(title: str, x: str, y: str) -> Any:
    """Make a matplotlib figure and its axes, whose axes are called `x` and `y`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG; the same figure gives the same file.

    Raises InputError, one line, where it can't be written.
    """
    with replacing(path) as part:
        figure.savefig(part, format="png", metadata={"Software": None})
    return path
