"""The cost curve: seconds that a pass of n rows takes (sdsat/engines/calibrate.py measures it)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from sdsat.config import MAX_ROWS

COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32)  # rows
CONTEXTS = (128, 1024)
LONGEST_PASS = 3600.0  # seconds; a curve that says more is damaged


@dataclass(frozen=True)
class CostCurve:
    """Seconds that passes take on one machine, by rows, SATs and context.

    What it says rises with rows, SATs and context, and is positive: the nearest such curve to what
    was measured, for a clock on a busy machine is noisy.

    Attributes:
        verify: verify[c][i] is the time of a pass of COUNTS[i] standard rows at CONTEXTS[c].
        draft: the time of a pass whose rows but the first are SATs, by context and count as
            `verify`.
        rounded: the time of such a rounded pass; [] where there is no engine for it.
        drafting: seconds to turn one SAT's logits into a draft.
        measured: whether this program measured it here, and the caller did not give it.

    Raises:
        ValueError: unless there is a positive time for every size.
    """

    verify: list[list[float]]
    draft: list[list[float]]
    drafting: float
    rounded: list[list[float]] = field(default_factory=list)
    measured: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        for part in (self.verify, self.draft, *([self.rounded] if self.rounded else [])):
            times = [time for row in part for time in row]
            good = all(_is_time(time) and time > 0 for time in times)
            if np.shape(part) != (len(CONTEXTS), len(COUNTS)) or not good:
                raise ValueError(
                    "a cost curve needs a positive time for every number of rows and every context"
                )
        if not _is_time(self.drafting):
            raise ValueError(f"drafting={self.drafting}: expected seconds")

    @cached_property
    def _tables(self) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
        """By context: seconds by number of rows, what SATs add by number, and rounded passes."""
        verify = _rising(np.array(self.verify))
        extra = _rising(np.maximum(0, np.array(self.draft) - verify))
        rounded = _rising(np.array(self.rounded)) if self.rounded else np.empty((0, len(COUNTS)))
        by_sats = [np.append(times[1:], times[-1]) for times in map(_by_rows, extra)]
        by_rows, in_8_bits = (
            [_by_rows(times).tolist() for times in part] for part in (verify, rounded)
        )
        return by_rows, [times.tolist() for times in by_sats], in_8_bits

    def seconds(self, rows: int, sats: int, context: int, batch: int = 1) -> float:
        """Estimate the seconds of a pass, with the drafting of one group a sequence.

        Args:
            rows: of the pass, SATs included.
            sats: how many of the rows are SATs.
            context: tokens before the pass.
            batch: of how many sequences the rows are.
        """
        by_rows, by_sats, _ = self._tables
        low, high = (
            _at(by_rows[c], rows) + (_at(by_sats[c], sats) if sats else 0.0) for c in (0, 1)
        )
        return _between(low, high, context) + (
            self.drafting * min(sats, 16 * batch) if sats else 0.0
        )

    def rounded_seconds(self, sats: int, context: int) -> float:
        """Estimate the seconds of a rounded pass of one row and `sats` SATs, and their drafting.

        context: tokens before the pass. Only for a curve with `rounded`.
        """
        low, high = (_at(times, 1 + sats) for times in self._tables[2])
        return _between(low, high, context) + self.drafting * sats


def _is_time(seconds: Any) -> bool:
    """Tell whether a pass may take so long."""
    return (
        isinstance(seconds, (int, float))
        and not isinstance(seconds, bool)
        and 0 <= seconds < LONGEST_PASS
    )


def _rising(times: np.ndarray) -> np.ndarray:
    """Find the nearest rising times to `times` [contexts, counts] by least squares.

    They rise with the rows, as does what a longer context adds, from 0 on. So a line through both
    contexts rises with the rows at any other one, too.
    """
    from scipy.optimize import isotonic_regression  # slow to import, and AR needs no costs

    near, far = np.where(times[0] <= times[1], times, times.mean(0))
    near, added = isotonic_regression(near).x, isotonic_regression(far - near).x
    return np.stack([near, near + added])


def _by_rows(times: np.ndarray) -> np.ndarray:
    """Compute seconds for 0..MAX_ROWS rows out of those for COUNTS.

    Beyond the last count they go on as a straight line.
    """
    grown = np.interp(np.arange(MAX_ROWS + 1), COUNTS, times)
    last = COUNTS[-1]
    grown[last:] = grown[last] + grown[last] / last * np.arange(MAX_ROWS + 1 - last)
    return grown


def _at(times: list[float], rows: int) -> float:
    """Return the entry for `rows`.

    Beyond the table, where arithmetic sets the cost, it grows in proportion.
    """
    return times[rows] if rows <= MAX_ROWS else times[MAX_ROWS] * rows / MAX_ROWS


def _between(low: float, high: float, context: int) -> float:
    near, far = CONTEXTS
    return low + max(0.0, (context - near) / (far - near)) * (high - low)
