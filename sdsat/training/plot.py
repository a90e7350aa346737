"""The picture of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdsat.figures import new_figure, save


def plot_training(log: list[dict[str, Any]], path: Path) -> Path:
    """Held-out accuracy of each depth, and accepted drafts per loop, against the training step.

    log: the entries of train_log.jsonl.
    """
    figure, axes = new_figure("held-out answers", "step", "accuracy of a depth")
    steps = [entry["step"] for entry in log]
    by_depth = zip(*(entry["accuracy_by_depth"] for entry in log), strict=True)
    for depth, accuracy in enumerate(by_depth, 1):
        label = "depth 1 to k, darkest first" if depth == 1 else ""
        axes.plot(steps, accuracy, color="tab:blue", alpha=depth**-0.5, label=label)
    axes.set_ylim(0, 1)
    right = axes.twinx()
    right.plot(steps, [entry["accepted_per_loop"] for entry in log], color="tab:green", marker="o")
    right.set_ylabel("accepted drafts per loop (green)")
    right.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left", fontsize=8)
    return save(figure, path)
