"""From worker documents to `summary.json`, a table and plots.

The schema is documented in docs/results.md.

sdsat report results/smollm2-135m-sdsat/greedy
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from rich.table import Table

from sdsat.config import ALL_STRATEGIES, LOOKUP, InputError, require
from sdsat.files import replacing, write_json

SCHEMA_VERSION = 4
_RESAMPLES = 10_000
Rows = np.ndarray  # [problems, columns]
Key = tuple[str, int, int]  # strategy, k, tokens to look up
AR: Key = ("ar", 0, 0)


def read_workers(folder: Path) -> list[dict[str, Any]]:
    """The worker documents of a results folder.

    Raises InputError for a damaged file or another schema.
    """
    documents = []
    for path in sorted(folder.glob("worker_*.json")):
        try:
            document = json.loads(path.read_text())
            version = document["schema_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: not a worker document ({error!r}); delete it to measure its "
                "problems again"
            ) from None
        expected = f"expected {SCHEMA_VERSION}; delete the folder or choose another RESULTS_DIR"
        require(version == SCHEMA_VERSION, f"{path}: schema_version {version}, {expected}")
        documents.append(document)
    return documents


def interval(rows: Rows, statistic: Callable[[Rows], np.ndarray]) -> list[float] | None:
    """95 % interval of `statistic` over problems like these: scipy's BCa bootstrap; None for a
    single problem.

    It covers the choice of problems. What a repetition on the same machine would change is in it
    only as far as it differs from problem to problem. statistic: sums [..., columns] over problems
    -> [...].
    """
    if len(rows) < 2:
        return None
    without_one = statistic(rows.sum(0) - rows)
    # all problems say the same: nothing to draw from
    if np.ptp(without_one) <= 1e-9 * np.abs(without_one).max():
        low = high = float(statistic(rows.sum(0)))
    else:
        drawn = scipy.stats.bootstrap(
            (np.arange(len(rows)),),
            lambda places, axis: statistic(rows[places].sum(axis - 1)),  # axis -1: of the places
            n_resamples=_RESAMPLES,
            batch=1000,
            vectorized=True,
            method="BCa",
            rng=np.random.default_rng(0),
        )
        low, high = drawn.confidence_interval
    return [round(float(low), 4), round(float(high), 4)]


def _ratio(sums: Rows) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-9)


def speedup(sums: Rows) -> np.ndarray:
    """sums [..., 4]: tokens and seconds of a strategy, and of the one that it is compared with ->
    [...].
    """
    return sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3])


def _run_summary(
    problems: list[dict[str, Any]], key: Key, settings: dict[str, Any]
) -> dict[str, Any]:
    """One object of `runs`: what was measured for one strategy, k and lookup, over the problems."""
    strategy, k, lookup = key
    pairs = [(run_of(problem, AR), run_of(problem, key)) for problem in problems]
    base = [a for a, _ in pairs]
    runs = [b for _, b in pairs]
    seconds = [seconds_of(run) for run in runs]
    base_seconds = [seconds_of(run) for run in base]
    accepted = np.array([run["accepted_by_depth"] for run in runs]).reshape(len(runs), -1)
    proposed = np.array([run["proposed_by_depth"] for run in runs]).reshape(len(runs), -1)
    loops = [sum(run["accepted_histogram"]) for run in runs]
    table = np.array(
        [
            [run["num_new_tokens"] for run in runs],
            seconds,
            [run["num_new_tokens"] for run in base],
            base_seconds,
            accepted.sum(1),
            proposed.sum(1),
            loops,
            [run["num_passes"] for run in runs],
        ],
        dtype=float,
    ).T
    tokens, spent, _, _, num_accepted, num_proposed, num_loops, passes = table.sum(0)

    drafts = num_proposed > 0
    rounded = sum(run["num_rounded_passes"] for run in runs)
    # a pass that verifies nothing makes one token, one in 8 bits none
    verified = tokens - (passes - rounded - num_loops)
    return {
        "dataset": settings["dataset"],
        "strategy": strategy,
        "k": k,
        "lookup": lookup,
        "tree": settings["tree"] if k else None,
        "num_problems": len(problems),
        "num_new_tokens": int(tokens),
        "num_passes": int(passes),
        "num_plain_passes": sum(run["num_plain_passes"] for run in runs),
        "num_rounded_passes": rounded,
        "seconds": round(spent, 4),
        "prefill_seconds": round(sum(run["prefill_seconds"] for run in runs), 4),
        "tokens_per_second": round(tokens / spent, 4),
        "tokens_per_second_ci95": interval(table[:, :2], _ratio),
        "speedup": round(float(speedup(table[:, :4].sum(0))), 4),
        "speedup_ci95": interval(table[:, :4], speedup),
        "acceptance_rate": round(num_accepted / num_proposed, 4) if drafts else None,
        "acceptance_rate_ci95": interval(table[:, [4, 5]], _ratio) if drafts else None,
        "acceptance_by_depth": [
            round(a / max(p, 1), 4) for a, p in zip(accepted.sum(0), proposed.sum(0), strict=True)
        ],
        "accepted_histogram": np.sum([run["accepted_histogram"] for run in runs], axis=0).tolist(),
        "accepted_per_loop": round(num_accepted / num_loops, 4) if drafts else None,
        "accepted_per_loop_ci95": interval(table[:, [4, 6]], _ratio) if drafts else None,
        "mean_accepted_tokens": round(verified / num_loops, 4) if drafts else None,
        "tokens_per_pass": round(tokens / passes, 4),
        "seconds_per_pass": round(
            (spent - sum(run["prefill_seconds"] for run in runs)) / passes, 6
        ),
        "identical_outputs": sum(
            len({*run["outputs_sha256"], *ar["outputs_sha256"]}) == 1 for ar, run in pairs
        ),
    }


def seconds_of(run: dict[str, Any]) -> float:
    """Prefill and decoding together."""
    return run["prefill_seconds"] + run["decode_seconds"]


def key_of(run: dict[str, Any]) -> Key:
    return run["strategy"], run["k"], run["lookup"]


def name_of(key: Key) -> str:
    """As a plot's legend has it."""
    strategy, k, lookup = key
    if strategy == LOOKUP:
        return f"{LOOKUP}, {lookup} tokens, no SATs"
    return f"{strategy}, k = {k}" + (" without lookup" if strategy == "auto" and not lookup else "")


def run_of(problem: dict[str, Any], key: Key) -> dict[str, Any]:
    """The run of a problem with this strategy, k and lookup."""
    return next(run for run in problem["runs"] if key_of(run) == key)


def summarize(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge worker documents into the content of `summary.json`."""
    problems = [problem for document in documents for problem in document["problems"]]
    require(len(problems) > 0, "results: no finished problem")
    settings = documents[0]["settings"]
    keys = [key_of(run) for run in problems[0]["runs"]]
    keys.sort(key=lambda key: (("transformers", "ar", *ALL_STRATEGIES).index(key[0]), *key[1:]))
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": documents[0]["environment"],
        "settings": settings,
        "runs": [_run_summary(problems, key, settings) for key in keys],
    }


def with_interval(value: float | None, interval: list[float] | None, digits: int = 2) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (
        f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    )


_COLUMNS = (
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
CAPTION = (
    "accepted/verify: accepted drafts a verify pass, without the token that the model adds "
    "itself; tokens/verify: with it "
    "(mean accepted tokens). tokens/pass: over all passes, those that only draft too. "
    "lookup: tokens looked up in the text so "
    "far, at most. identical: every turn's output is AR's, token for token. Intervals: 95 "
    "%, BCa bootstrap over the problems; "
    "what another hour of the machine would change is not in them. Seconds are those of "
    "prompt and answer, without what is made "
    "once: loading, warming up, the cost curve of auto, the weights in 8 bits."
)


def table_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of a summary, one tuple of cells a run, under `_COLUMNS`."""
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


def describe(summary: dict[str, Any]) -> str:
    """One line that says what was measured, on what."""
    settings = summary["settings"]
    environment = summary["environment"]
    method = (
        "greedy"
        if settings["method"] == "greedy"
        else f"nucleus, temperature {settings['temperature']}"
    )
    dtype = environment.get("dtype", settings["dtype"])
    return (
        f"{settings['model']}, {settings['dataset']}, {summary['runs'][0]['num_problems']} "
        f"problems, {method}, "
        f"{dtype}, up to {settings['max_new_tokens']} new tokens, {environment['device_name']}"
    )


def rich_table(summary: dict[str, Any]) -> Table:
    table = Table(
        *_COLUMNS,
        title=describe(summary),
        title_justify="left",
        caption=CAPTION,
        caption_justify="left",
    )
    for cells in table_rows(summary):
        table.add_row(*cells)
    return table


def markdown_table(summary: dict[str, Any]) -> str:
    """The same table and caption for a README."""
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *table_rows(summary)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{CAPTION}\n"


def draw(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Draw tokens/s, speed-up and acceptance rate against k, and acceptance by depth; returns the
    files.

    A strategy that was measured at several k is a line that begins at AR, one at a single k a level
    line. Beside the speed-up of two-step stands its bound, (k + 2) / 2.
    """
    base = next(run for run in summary["runs"] if run["strategy"] == "ar")
    drafted = [run for run in summary["runs"] if run["strategy"] in ALL_STRATEGIES]
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in drafted:
        lines.setdefault((run["strategy"], run["lookup"]), []).append(run)
    labels = {
        "tokens_per_second": "tokens per second",
        "speedup": "speed-up over AR",
        "acceptance_rate": "acceptance rate",
    }
    files = []
    for name, label in labels.items():
        first = [] if name == "acceptance_rate" else [base]
        if not drafted and not first:
            continue
        figure, axes = _axes(_title(summary), "k, semantic adaptive tokens per draft", label)
        for number, ((strategy, _), measured) in enumerate(
            lines.items() or {("AR", 0): []}.items()
        ):
            # no acceptance rate where nothing was drafted
            runs = [run for run in measured if run[name] is not None]
            if not runs and not first:
                continue
            if strategy == LOOKUP or (len(runs) == 1 and len(lines) > 1):
                axes.axhline(
                    runs[0][name],
                    linestyle="--",
                    color=f"C{number}",
                    label=name_of(key_of(runs[0])),
                )
                continue
            shown = first + runs
            values = [run[name] for run in shown]
            errors = np.abs(
                np.array([run[f"{name}_ci95"] or [run[name]] * 2 for run in shown]).T - values
            )
            ks = [run["k"] for run in shown]
            label_of = f"{strategy}, 95 % interval"
            axes.errorbar(
                ks, values, yerr=errors, marker="o", capsize=3, color=f"C{number}", label=label_of
            )
            axes.set_xticks(ks)
            if name == "speedup" and strategy == "two-step":
                axes.plot(
                    ks[1:],
                    [(k + 2) / 2 for k in ks[1:]],
                    color="grey",
                    linestyle=":",
                    label="two-step's bound, (k + 2) / 2",
                )
        if first:
            axes.axhline(base[name], color="grey", linewidth=0.8, label="AR (k = 0)")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        files.append(_save(figure, folder / f"{name}.png"))
    if drafted:
        figure, axes = _axes(_title(summary), "draft depth", "accepted, given it was proposed")
        for run in drafted:
            depths = range(1, len(run["acceptance_by_depth"]) + 1)
            axes.plot(depths, run["acceptance_by_depth"], marker="o", label=name_of(key_of(run)))
        axes.set_ylim(0, 1)
        axes.set_xticks(range(1, max(len(run["acceptance_by_depth"]) for run in drafted) + 1))
        axes.legend(frameon=False, fontsize=8)
        files.append(_save(figure, folder / "acceptance_by_depth.png"))
    return files


def plot_training(log: list[dict[str, Any]], path: Path) -> Path:
    """Held-out accuracy of each depth, and accepted drafts per loop, against the training step."""
    figure, axes = _axes("held-out answers", "step", "accuracy of a depth")
    steps = [entry["step"] for entry in log]
    for depth, accuracy in enumerate(
        zip(*(entry["accuracy_by_depth"] for entry in log), strict=True), 1
    ):
        axes.plot(
            steps,
            accuracy,
            color="tab:blue",
            alpha=depth**-0.5,
            label="depth 1 to k, darkest first" if depth == 1 else "",
        )
    axes.set_ylim(0, 1)
    right = axes.twinx()
    right.plot(steps, [entry["accepted_per_loop"] for entry in log], color="tab:green", marker="o")
    right.set_ylabel("accepted drafts per loop (green)")
    right.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left", fontsize=8)
    return _save(figure, path)


def _title(summary: dict[str, Any]) -> str:
    parts = describe(summary).split(", ")
    return ", ".join(parts[:-2]) + "\n" + ", ".join(parts[-2:])


def _axes(title: str, x: str, y: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    with replacing(path) as part:
        figure.savefig(part, format="png", metadata={"Software": None})
    return path


def report(folder: Path) -> dict[str, Any]:
    """Merge a results folder's worker documents, write `summary.json`, draw the plots and return
    the summary.
    """
    require(folder.is_dir(), f"results folder {folder}: no such folder")
    documents = read_workers(folder)
    require(len(documents) > 0, f"results folder {folder}: holds no worker_*.json")
    summary = summarize(documents)
    write_json(folder / "summary.json", summary)
    draw(summary, folder)
    return summary
