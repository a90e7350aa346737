"""The report of a results folder: `summary.json`, a table and plots.

sdsat report results/smollm2-135m-sdsat/greedy
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from sdsat.config import require
from sdsat.evaluation.plots import draw
from sdsat.evaluation.summary import describe, read_workers, summarize
from sdsat.files import write_json

COLUMNS = (
    "strategy",
    "k",
    "lookup",
    "tokens/s",
    "speed-up",
    "acceptance",
    "accepted/verify",
    "tokens/verify",
    "tokens/pass",
    "identical",
)
WIDTH = 114  # in which no cell of `rich_table` is cut or broken
_CAPTION = (
    "accepted/verify: accepted drafts a verify pass, without the token that the model adds "
    "itself; tokens/verify: with it "
    "(mean accepted tokens). tokens/pass: over all passes, those that only draft too. "
    "lookup: tokens looked up in the text so "
    "far, at most. identical: every turn's output is AR's, token for token. "
    "Intervals: {intervals}. Seconds are those of prompt and answer, without what is made "
    "once: loading, warming up, the cost curve of auto, the rounded weights."
)
_OVER_PROBLEMS = (
    "95 %, BCa bootstrap over the problems; "
    "what another hour of the machine would change is not in them"
)
_OVER_WORKERS = "1.96 standard errors over {num_workers} workers, which all have the same problems"


def caption(summary: dict[str, Any]) -> str:
    """Say what the table's columns and intervals are."""
    repeated = summary["settings"].get("repeat", False)
    return _CAPTION.format(
        intervals=_OVER_WORKERS.format(**summary) if repeated else _OVER_PROBLEMS
    )


def with_interval(value: float | None, interval: list[float] | None, digits: int = 2) -> str:
    """Write '1.57 [1.47, 1.68]'; empty for no value."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (
        f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    )


def table_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """List a summary's cells, one tuple a run, under `COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for run in summary["runs"]:
        rate = run["acceptance_rate"]
        rows.append(
            (
                run["strategy"],
                str(run["k"]),
                str(run["lookup"]),
                f"{run['tokens_per_second']:.1f}",
                with_interval(run["speedup"], run["speedup_ci95"]),
                "" if rate is None else f"{rate:.2f}",
                with_interval(run["accepted_per_loop"], None),
                with_interval(run["mean_accepted_tokens"], None),
                f"{run['tokens_per_pass']:.2f}",
                f"{run['identical_outputs']}/{run['num_problems']}",
            )
        )
    return rows


def rich_table(summary: dict[str, Any]) -> Table:
    """Make the table for a terminal, of `WIDTH` columns or more."""
    table = Table(
        *(name.replace("/", "\n/") for name in COLUMNS),
        title=describe(summary),
        title_justify="left",
        caption=caption(summary),
        caption_justify="left",
    )
    for cells in table_rows(summary):
        table.add_row(*cells)
    return table


def markdown_table(summary: dict[str, Any]) -> str:
    """Write the same table and caption for a README."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *table_rows(summary)]
    return (
        "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{caption(summary)}\n"
    )


def report(folder: Path) -> dict[str, Any]:
    """Merge a results folder's worker documents, write `summary.json` and draw the plots.

    Returns the summary. Raises InputError, one line, where there are no such documents, or where a
    file can't be read or written.
    """
    require(folder.is_dir(), f"results folder {folder}: no such folder")
    documents = read_workers(folder)
    require(len(documents) > 0, f"results folder {folder}: holds no worker_*.json")
    summary = summarize(documents)
    write_json(folder / "summary.json", summary)
    draw(summary, folder)
    return summary
