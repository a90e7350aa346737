"""`sdsat report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdsat.cli.program import show


def report(
    folder: Annotated[Path, typer.Argument(help="A results folder with worker_*.json.")],
    markdown: bool = False,
) -> None:
    """Merge a results folder again: print its table, rewrite summary.json, redraw the plots."""
    from sdsat.evaluation import report as reports

    summary = reports.report(folder)
    if markdown:
        print(reports.markdown_table(summary))
    else:
        show(reports.rich_table(summary), 110)
