"""Figures of a benchmark, and how sure they are: from worker documents to `summary.json`.

The schema of both is documented in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdsat.config import ALL_STRATEGIES, InputError, looks_up, require
from sdsat.files import read_json

SCHEMA_VERSION = 4
_RESAMPLES = 10_000
Rows = np.ndarray  # [problems, columns]
Key = tuple[str, int, int]  # strategy, k, tokens to look up
AR_KEY: Key = ("ar", 0, 0)
_ORDER = ("transformers", "ar", *ALL_STRATEGIES)


def read_workers(folder: Path) -> list[dict[str, Any]]:
    """Read the worker documents of a results folder.

    Raises InputError for a damaged file or another schema.
    """
    documents = []
    for path in sorted(folder.glob("worker_*.json")):
        try:
            document = read_json(path)
            version = document["schema_version"]
            if version == SCHEMA_VERSION:
                _check_parts(document)
        except (ValueError, KeyError, TypeError) as error:
            said = str(error) if isinstance(error, InputError) else f"{path}: {error!r}"
            raise InputError(
                f"{said}: not a worker document; delete it to measure its problems again"
            ) from None
        expected = f"expected {SCHEMA_VERSION}; delete the folder or choose another RESULTS_DIR"
        require(version == SCHEMA_VERSION, f"{path}: schema_version {version}, {expected}")
        documents.append(document)
    return documents


def _check_parts(document: dict[str, Any]) -> None:
    """Look for all that is read of a worker document.

    Raises KeyError or TypeError, naming what is missing.
    """
    for part in ("settings", "environment"):
        dict(document[part])
    for problem in document["problems"]:
        str(problem["task_id"])
        for run in problem["runs"]:
            seconds_of(run), key_of(run), run["outputs_sha256"]


def seconds_of(run: dict[str, Any]) -> float:
    """Add the seconds of prefill and decoding."""
    return float(run["prefill_seconds"] + run["decode_seconds"])


def key_of(run: dict[str, Any]) -> Key:
    """Name what tells a run of a problem from its others."""
    return run["strategy"], run["k"], run["lookup"]


def name_of(key: Key) -> str:
    """Name a run as a plot's legend has it."""
    strategy, k, lookup = key
    if lookup and not k:
        return f"{strategy}, {lookup} tokens, no SATs"
    return f"{strategy}, k = {k}" + (" without lookup" if looks_up(strategy) and not lookup else "")


def run_of(problem: dict[str, Any], key: Key) -> dict[str, Any]:
    """Find the run of a problem with this strategy, k and lookup."""
    return next(run for run in problem["runs"] if key_of(run) == key)


def interval(rows: Rows, statistic: Callable[[Rows], np.ndarray]) -> list[float] | None:
    """Compute the 95 % interval of `statistic` over problems like these.

    By scipy's BCa bootstrap; None for a single problem. It covers the choice of problems. What a
    repetition on the same machine would change is in it only as far as it differs from problem to
    problem.

    rows: [problems, columns]. statistic: sums [..., columns] over problems -> [...].
    """
    if len(rows) < 2:
        return None
    without_one = statistic(rows.sum(0) - rows)
    # Where all problems say the same there is nothing to draw from.
    if np.ptp(without_one) <= 1e-9 * np.abs(without_one).max():
        low = high = float(statistic(rows.sum(0)))
    else:
        from scipy.stats import bootstrap  # slow to import, and workers compute no intervals

        drawn = bootstrap(
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


def ratio(sums: Rows) -> np.ndarray:
    """Divide sums [..., 2], the first by the second -> [...]."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-9)


def speedup(sums: Rows) -> np.ndarray:
    """Compute a strategy's speed-up [...].

    sums: [..., 4] tokens and seconds of it, and of the one that it is compared with.
    """
    return sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3])


class _Counts:
    """What was counted on each problem, by name: arrays [problems]."""

    def __init__(self, **columns: Any) -> None:
        self._columns = {name: np.array(column, float) for name, column in columns.items()}

    def total(self, name: str) -> float:
        """Add up what was counted over the problems."""
        return float(self._columns[name].sum())

    def rows(self, *names: str) -> Rows:
        """Return [problems, names] what was counted."""
        return np.stack([self._columns[name] for name in names]).T


def _by_depth(runs: list[dict[str, Any]], name: str) -> np.ndarray:
    """Return [problems, depth] of a run's list with one number a depth."""
    return np.array([run[name] for run in runs]).reshape(len(runs), -1)


def _drafting(counts: _Counts, loops: float, verified: float) -> dict[str, Any]:
    """Compute figures of acceptance; None each where nothing was drafted.

    loops: passes that verified drafts. verified: tokens that these emitted.
    """
    names = ("acceptance_rate", "accepted_per_loop")
    if counts.total("proposed") == 0:
        none = {key: None for name in names for key in (name, f"{name}_ci95")}
        return {**none, "mean_accepted_tokens": None}
    accepted = counts.total("accepted")
    return {
        "acceptance_rate": round(accepted / counts.total("proposed"), 4),
        "acceptance_rate_ci95": interval(counts.rows("accepted", "proposed"), ratio),
        "accepted_per_loop": round(accepted / loops, 4),
        "accepted_per_loop_ci95": interval(counts.rows("accepted", "loops"), ratio),
        "mean_accepted_tokens": round(verified / loops, 4),
    }


def _run_summary(
    problems: list[dict[str, Any]], key: Key, settings: dict[str, Any]
) -> dict[str, Any]:
    """Make one object of `runs`, over the problems.

    It says what was measured for one strategy, k and lookup.
    """
    strategy, k, lookup = key
    runs = [run_of(problem, key) for problem in problems]
    plain = [run_of(problem, AR_KEY) for problem in problems]
    accepted = _by_depth(runs, "accepted_by_depth")
    proposed = _by_depth(runs, "proposed_by_depth")
    counts = _Counts(
        tokens=[run["num_new_tokens"] for run in runs],
        seconds=[seconds_of(run) for run in runs],
        ar_tokens=[run["num_new_tokens"] for run in plain],
        ar_seconds=[seconds_of(run) for run in plain],
        accepted=accepted.sum(1),
        proposed=proposed.sum(1),
        loops=[sum(run["accepted_histogram"]) for run in runs],
    )
    tokens = counts.total("tokens")
    seconds = counts.total("seconds")
    loops = counts.total("loops")
    passes = sum(run["num_passes"] for run in runs)
    rounded = sum(run["num_rounded_passes"] for run in runs)
    prefill_seconds = sum(run["prefill_seconds"] for run in runs)
    compared = counts.rows("tokens", "seconds", "ar_tokens", "ar_seconds")
    # A pass that verifies nothing makes one token, a rounded one none.
    drafting = _drafting(counts, loops, tokens - (passes - rounded - loops))
    pairs = zip(accepted.sum(0), proposed.sum(0), strict=True)
    return {
        "dataset": settings["dataset"],
        "strategy": strategy,
        "k": k,
        "lookup": lookup,
        "tree": settings["tree"] if k else None,
        "num_problems": len(problems),
        "num_new_tokens": int(tokens),
        "num_passes": passes,
        "num_plain_passes": sum(run["num_plain_passes"] for run in runs),
        "num_rounded_passes": rounded,
        "seconds": round(seconds, 4),
        "prefill_seconds": round(prefill_seconds, 4),
        "tokens_per_second": round(tokens / seconds, 4),
        "tokens_per_second_ci95": interval(counts.rows("tokens", "seconds"), ratio),
        "speedup": round(float(speedup(compared.sum(0))), 4),
        "speedup_ci95": interval(compared, speedup),
        "acceptance_rate": drafting["acceptance_rate"],
        "acceptance_rate_ci95": drafting["acceptance_rate_ci95"],
        "acceptance_by_depth": [round(a / max(p, 1), 4) for a, p in pairs],
        "accepted_histogram": np.sum([run["accepted_histogram"] for run in runs], axis=0).tolist(),
        "accepted_per_loop": drafting["accepted_per_loop"],
        "accepted_per_loop_ci95": drafting["accepted_per_loop_ci95"],
        "mean_accepted_tokens": drafting["mean_accepted_tokens"],
        "tokens_per_pass": round(tokens / passes, 4),
        "seconds_per_pass": round((seconds - prefill_seconds) / passes, 6),
        "identical_outputs": sum(map(_identical, runs, plain)),
    }


def _identical(run: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Tell whether every turn's output is that of every turn of AR."""
    return len({*run["outputs_sha256"], *plain["outputs_sha256"]}) == 1


def summarize(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge worker documents into the content of `summary.json`.

    Raises InputError where they hold no problem.
    """
    problems = [problem for document in documents for problem in document["problems"]]
    require(len(problems) > 0, "results: no finished problem")
    settings = documents[0]["settings"]
    keys = [key_of(run) for run in problems[0]["runs"]]
    keys.sort(key=lambda key: (_ORDER.index(key[0]), *key[1:]))
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": documents[0]["environment"],
        "settings": settings,
        "runs": [_run_summary(problems, key, settings) for key in keys],
    }


def describe(summary: dict[str, Any]) -> str:
    """Say in one line what was measured, on what."""
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
