"""The page of one or several results folders: one HTML file that needs no network and no server.

    sdsat report results/smollm2-135m-sdsat/greedy other/greedy

It holds the table, the plots, and for every problem the answer with accepted drafts in green beside
AR's. page.html is its template; plotly makes the plots.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdsat.config import require
from sdsat.evaluation.curves import Curve, Plot, plots_of
from sdsat.evaluation.outputs import Output, RunOf, read_outputs
from sdsat.evaluation.report import COLUMNS, caption, table_rows
from sdsat.evaluation.summary import (
    AR_KEY,
    Key,
    describe,
    is_ars,
    key_of,
    name_of,
    read_workers,
    run_of,
    seconds_of,
    speed_over,
)
from sdsat.files import replacing

NEEDED = ("plotly", "jinja2")
MISSING = (
    "no page was made: it takes plotly and jinja2; install them with pip install 'sdsat[report]'"
)
_TEMPLATE = Path(__file__).with_name("page.html")
# matplotlib's, so that a curve has one colour in files and on the page.
_COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)
_GREY = "#8a8a8a"
_NO_HTML = re.compile("[\0\ud800-\udfff]")  # what browsers leave out, and UTF-8 can't write
_AREA = 260  # px that the axes are high
_LINE = 20  # px of a line of the legend, which stands below


@dataclass(frozen=True)
class Results:
    """What a results folder holds.

    Attributes:
        name: the folder, as it was given.
        summary: of `report`.
        documents: of its workers.
        outputs: of each worker, by its name.
    """

    name: str
    summary: dict[str, Any]
    documents: list[dict[str, Any]]
    outputs: dict[str, dict[RunOf, Output]]

    @property
    def has_texts(self) -> bool:
        """Whether texts were kept of any problem."""
        return any(self.outputs.values())


@dataclass(frozen=True)
class Row:
    """One run of one problem.

    Attributes:
        run: the name of the results.
        worker: who measured it.
        task_id: of the problem.
        setting: as a plot's legend has it.
        figures: cells of the table, by the names of their columns.
        ar: the page's name of AR's answer to the same problem.
        output: None where none was kept.
    """

    run: str
    worker: str
    task_id: str
    setting: str
    figures: dict[str, str]
    ar: str
    output: Output | None


def can_be_made() -> bool:
    """Tell whether all that a page takes is installed."""
    return all(find_spec(name) is not None for name in NEEDED)


def read_results(folder: Path, summary: dict[str, Any]) -> Results:
    """Read a results folder, of which `report` has made the summary.

    Raises InputError, one line, for a damaged file.
    """
    documents = read_workers(folder)
    outputs = {document["device"]: read_outputs(folder, document) for document in documents}
    return Results(str(folder), summary, documents, outputs)


def write_page(results: Sequence[Results], path: Path) -> None:
    """Write the page of these results.

    Raises InputError, one line, where plotly is not installed or the page can't be written.
    """
    require(can_be_made(), MISSING)
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    first = results[0].summary
    workers = {document["device"] for each in results for document in each.documents}
    page = environment.from_string(_TEMPLATE.read_text("utf-8")).render(
        title=describe(first) if len(results) == 1 else f"{len(results)} runs compared",
        results=results,
        describe=describe,
        columns=[*COLUMNS, "s/problem", "ms/pass"],
        table_rows=table_rows,
        captions=sorted({caption(each.summary) for each in results}),
        plots=[(plot, _plotted(plot)) for plot in _compared(results)],
        rows=[row for number, each in enumerate(results) for row in _rows(each, number)],
        ar=name_of(AR_KEY),
        settings=_settings(results),
        fastest=_fastest(results),
        has_workers=len(workers) > 1,
        plotly=get_plotlyjs(),
    )
    with replacing(path) as part:
        part.write_bytes(_NO_HTML.sub("\ufffd", page).encode())


def _settings(results: Sequence[Results]) -> list[str]:
    """Name all that was measured, each once."""
    names = [name_of(key_of(run)) for each in results for run in each.summary["runs"]]
    return list(dict.fromkeys(names))


def _fastest(results: Sequence[Results]) -> str:
    """Name what drafts fastest in the first of these, of all that each of them has; '' for none."""
    names = [{name_of(key_of(run)) for run in each.summary["runs"]} for each in results]
    common = set.intersection(*names)
    drafting = {
        name_of(key_of(run)): run["speedup"]
        for run in results[0].summary["runs"]
        if (run["k"] or run["lookup"]) and name_of(key_of(run)) in common
    }
    return max(drafting, key=lambda name: drafting[name], default="")


def _rows(results: Results, number: int) -> Iterator[Row]:
    """List the runs of all problems.

    number: of the results on the page.
    """
    best = {
        (entry["task_id"], entry["strategy"]): entry["k"] for entry in results.summary["best_k"]
    }
    keys = [key_of(run) for run in results.summary["runs"]]
    for worker, document in enumerate(results.documents):
        label = document["device"]
        for place, problem in enumerate(document["problems"]):
            for key in keys:
                task_id = problem["task_id"]
                yield Row(
                    results.name,
                    label,
                    task_id,
                    name_of(key),
                    _figures(problem, key, best.get((task_id, key[0]))),
                    f"ar-{number}-{worker}-{place}",
                    results.outputs[label].get((task_id, key)),
                )


def _figures(problem: dict[str, Any], key: Key, best: int | None) -> dict[str, str]:
    """Write the figures of a run of a problem.

    Args:
        problem: of a worker document.
        key: of its run.
        best: the fastest k of its strategy on this problem; None where there was no choice.
    """
    run = run_of(problem, key)
    proposed = sum(run["proposed_by_depth"])
    same = is_ars(run, run_of(problem, AR_KEY))
    return {
        "seconds": f"{seconds_of(run):.3f}",
        "speed-up": f"{speed_over([problem], key, AR_KEY):.2f}",
        "passes": str(run["num_passes"]),
        "tokens": str(run["num_new_tokens"]),
        "acceptance": f"{sum(run['accepted_by_depth']) / proposed:.2f}" if proposed else "",
        "AR's output": "yes" if same else "no",
        "fastest k": "" if best is None else str(best),
    }


def _compared(results: Sequence[Results]) -> list[Plot]:
    """Make the plots of all results, one of each name, with the curves of all in it."""
    plots: dict[str, Plot] = {}
    for each in results:
        for plot in plots_of(each.summary):
            if len(results) > 1:
                curves = [replace(c, label=f"{each.name}: {c.label}") for c in plot.curves]
                plot = replace(plot, curves=curves)
            if plot.name in plots:
                before = plots[plot.name].curves
                plot = replace(plot, curves=[*before, *_recoloured(plot.curves, len(before))])
            plots[plot.name] = plot
    return list(plots.values())


def _recoloured(curves: Sequence[Curve], first: int) -> list[Curve]:
    """Have the curves' colours begin at number `first`."""
    return [
        curve if curve.colour is None else replace(curve, colour=curve.colour + first)
        for curve in curves
    ]


def _plotted(plot: Plot) -> str:
    """Make plotly's HTML of a plot, without plotly's own script."""
    from plotly.io import to_html

    xs = sorted({x for curve in plot.curves for x in curve.x}) or [0, 1]
    below = _LINE * (len(plot.curves) + 3)
    layout: dict[str, Any] = {
        "height": _AREA + below + 10,
        "margin": {"l": 44, "r": 12, "t": 10, "b": below},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": {"title": {"text": plot.x_title}, "tickvals": xs, "zeroline": False},
        "yaxis": {"rangemode": "tozero", "zeroline": False},  # its title stands above the plot
        "legend": {
            "x": 0,
            "xanchor": "left",
            "y": -2.5 * _LINE / _AREA,
            "yanchor": "top",
            "maxheight": below,
        },
        "hovermode": "closest",
        "dragmode": False,
        "showlegend": True,
    }
    if plot.top is not None:
        layout["yaxis"]["range"] = [0, plot.top]
    return to_html(
        {"data": [_trace(curve, xs) for curve in plot.curves], "layout": layout},
        config={"responsive": True, "displayModeBar": False},
        include_plotlyjs=False,
        full_html=False,
        validate=False,
        div_id=plot.name,
    )


def _trace(curve: Curve, xs: Sequence[float]) -> dict[str, Any]:
    """Make plotly's form of a curve.

    xs: of all curves beside it, over which a level line runs.
    """
    colour = _GREY if curve.colour is None else _COLOURS[curve.colour % len(_COLOURS)]
    label = html.escape(curve.label)  # plotly reads tags in texts
    value = f"{label}: %{{y:.3~f}}"
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if curve.x and curve.colour is not None else "lines",
        "name": label,
        "x": list(curve.x) or [xs[0], xs[-1]],
        "y": list(curve.y) if curve.x else [curve.y[0]] * 2,
        "line": {"color": colour, "dash": curve.stroke, "width": 2},
        "hovertemplate": f"{value}<br>at %{{x}}<extra></extra>" if curve.x else value,
    }
    if len(curve.bands):
        pairs = list(zip(curve.bands, curve.y, strict=True))
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [high - y for (_, high), y in pairs],
            "arrayminus": [y - low for (low, _), y in pairs],
        }
        trace["customdata"] = [list(band) for band in curve.bands]
        interval = "[%{customdata[0]:.3~f}, %{customdata[1]:.3~f}]"
        trace["hovertemplate"] = f"{value} {interval}<br>at %{{x}}<extra></extra>"
    return trace
