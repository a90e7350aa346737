"""`sdsat report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sdsat.cli.options import out_file
from sdsat.cli.program import show
from sdsat.config import require


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Results folders with worker_*.json; several to compare.")
    ],
    markdown: Annotated[bool, typer.Option(help="Print the tables for a README.")] = False,
    out: Annotated[
        Path | None,
        out_file("The page; default: index.html in the folder, for several comparison.html here."),
    ] = None,
) -> None:
    """Merge results folders again: tables, summary.json, plots, and one page of all of them."""
    from sdsat.evaluation import page
    from sdsat.evaluation import report as reports

    for number, folder in enumerate(folders):
        twice = folder.resolve() in [each.resolve() for each in folders[:number]]
        require(not twice, f"folders: {folder} is given twice; expected each once")
    require(out is None or page.can_be_made(), page.MISSING)
    summaries = [reports.report(folder) for folder in folders]
    for summary in summaries:
        if markdown:
            print(reports.markdown_table(summary))
        else:
            show(reports.rich_table(summary), reports.WIDTH)
    alone = folders[0] / "index.html"
    write_page(folders, summaries, out or (alone if len(folders) == 1 else Path("comparison.html")))


def write_page(folders: Sequence[Path], summaries: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the page of results folders, or say on stderr what it takes.

    Raises InputError, one line, for a damaged file, and where the page can't be written.
    """
    from sdsat.evaluation import page

    if not page.can_be_made():
        print(page.MISSING, file=sys.stderr)
        return
    pairs = zip(folders, summaries, strict=True)
    page.write_page([page.read_results(folder, summary) for folder, summary in pairs], path)
    print(f"page: {path}", file=sys.stderr)
