"""Figures of a benchmark, and how sure they are: from worker documents to `summary.json`.

The schema of both is documented in docs/results.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import NoneType
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
    """Look at all that is read of a worker document.

    Raises KeyError, TypeError or ValueError, naming what is missing or wrong.
    """
    for problem in document["problems"]:
        _check(problem, "task_id", lambda value: isinstance(value, str))
        for run in problem["runs"]:
            _check_run(run)
    settings, environment = dict(document["settings"]), dict(document["environment"])
    if not any(problem["runs"] for problem in document["problems"]):
        return  # no more is read of it
    _check(document, "device", lambda value: isinstance(value, str))
    names = ["model", "dataset", "method", "dtype", "max_new_tokens", "tree"]
    names += [] if settings["method"] == "greedy" else ["temperature"]
    for part, name in [(environment, "device_name"), *((settings, name) for name in names)]:
        _check(part, name, lambda value: isinstance(value, (str, int, float, NoneType)))


def _check_run(run: dict[str, Any]) -> None:
    """Look at all that is read of a run, as `_check_parts` does."""
    _check(run, "strategy", _ORDER.__contains__)
    for name in ("k", "lookup", "num_passes", "num_plain_passes", "num_rounded_passes"):
        _check(run, name, _is_count)
    _check(run, "num_new_tokens", lambda value: _is_count(value) and value > 0)
    for name in ("prefill_seconds", "decode_seconds"):
        _check(run, name, lambda value: type(value) in (int, float) and 0 <= value < math.inf)
    for name in ("proposed_by_depth", "accepted_by_depth", "accepted_histogram"):
        _check(run, name, lambda value: type(value) is list and all(map(_is_count, value)))
    _check(run, "accepted_by_depth", lambda value: len(value) == len(run["proposed_by_depth"]))
    _check(run, "accepted_histogram", lambda value: any(value) or not any(run["proposed_by_depth"]))
    _check(run, "outputs_sha256", lambda value: value and all(type(each) is str for each in value))
    if not seconds_of(run):
        raise ValueError("no seconds")


def _check(part: dict[str, Any], name: str, is_good: Callable[[Any], Any]) -> None:
    if not is_good(part[name]):
        raise ValueError(f"{name} = {part[name]!r}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


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


def interval(
    rows: Rows, statistic: Callable[[Rows], np.ndarray], digits: int = 4
) -> list[float] | None:
    """Compute the 95 % interval of `statistic` over problems like these.

    By scipy's BCa bootstrap; None for a single problem. It covers the choice of problems. What a
    repetition on the same machine would change is in it only as far as it differs from problem to
    problem.

    Args:
        rows: [problems, columns].
        statistic: sums [..., columns] over problems -> [...].
        digits: behind the point.
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
    return [round(float(low), digits), round(float(high), digits)]


def ratio(sums: Rows) -> np.ndarray:
    """Divide sums [..., 2], the first by the second -> [...]."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-9)


def speedup(sums: Rows) -> np.ndarray:
    """Compute a strategy's speed-up [...].

    sums: [..., 4] tokens and seconds of it, and of the one that it is compared with.
    """
    return sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3])


def error_band(
    rows: Rows, statistic: Callable[[Rows], np.ndarray], digits: int = 4
) -> list[float] | None:
    """Compute `statistic` over all workers, less and more 1.96 standard errors.

    The error is that of a mean over workers; None for a single worker.

    Args:
        rows: [workers, columns], each worker's sums over the same problems.
        statistic: sums [..., columns] -> [...].
        digits: behind the point.
    """
    if len(rows) < 2:
        return None
    middle = float(statistic(rows.sum(0)))
    error = 1.96 * float(np.std(statistic(rows), ddof=1)) / math.sqrt(len(rows))
    return [round(middle - error, digits), round(middle + error, digits)]


class _Counts:
    """What was counted on each problem, by name: arrays [problems].

    workers: [problems] the number of the worker that measured each, where all measured the same.
    """

    def __init__(self, workers: list[int] | None, **columns: Any) -> None:
        self._workers = workers
        self._columns = {name: np.array(column, float) for name, column in columns.items()}

    def total(self, name: str) -> float:
        """Add up what was counted over the problems."""
        return float(self._columns[name].sum())

    def sums(self, *names: str) -> np.ndarray:
        """Add up these columns -> [names]."""
        return np.array([self.total(name) for name in names])

    def interval(
        self, statistic: Callable[[Rows], np.ndarray], *names: str, digits: int = 4
    ) -> list[float] | None:
        """Compute the interval of a statistic of these columns: see `interval`, `error_band`."""
        rows = np.stack([self._columns[name] for name in names]).T
        if self._workers is None:
            return interval(rows, statistic, digits)
        sums = np.zeros((max(self._workers) + 1, len(names)))
        np.add.at(sums, self._workers, rows)
        return error_band(sums, statistic, digits)


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
        "acceptance_rate_ci95": counts.interval(ratio, "accepted", "proposed"),
        "accepted_per_loop": round(accepted / loops, 4),
        "accepted_per_loop_ci95": counts.interval(ratio, "accepted", "loops"),
        "mean_accepted_tokens": round(verified / loops, 4),
    }


def _run_summary(
    problems: list[dict[str, Any]],
    workers: list[int] | None,
    key: Key,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Make one object of `runs`, over the problems.

    Args:
        problems: entries of worker documents.
        workers: see `_Counts`.
        key: strategy, k and lookup.
        settings: of the documents.
    """
    strategy, k, lookup = key
    runs = [run_of(problem, key) for problem in problems]
    plain = [run_of(problem, AR_KEY) for problem in problems]
    accepted = _by_depth(runs, "accepted_by_depth")
    proposed = _by_depth(runs, "proposed_by_depth")
    counts = _Counts(
        workers,
        problems=[1] * len(problems),
        tokens=[run["num_new_tokens"] for run in runs],
        seconds=[seconds_of(run) for run in runs],
        ar_tokens=[run["num_new_tokens"] for run in plain],
        ar_seconds=[seconds_of(run) for run in plain],
        accepted=accepted.sum(1),
        proposed=proposed.sum(1),
        loops=[sum(run["accepted_histogram"]) for run in runs],
        passes=[run["num_passes"] for run in runs],
        decode_seconds=[run["decode_seconds"] for run in runs],
    )
    tokens = counts.total("tokens")
    seconds = counts.total("seconds")
    loops = counts.total("loops")
    passes = int(counts.total("passes"))
    rounded = sum(run["num_rounded_passes"] for run in runs)
    prefill_seconds = sum(run["prefill_seconds"] for run in runs)
    of_ar = ("tokens", "seconds", "ar_tokens", "ar_seconds")
    # A pass that verifies nothing makes one token, a rounded one none.
    drafting = _drafting(counts, loops, tokens - (passes - rounded - loops))
    pairs = zip(accepted.sum(0), proposed.sum(0), strict=True)
    return {
        "dataset": settings["dataset"],
        "strategy": strategy,
        "k": k,
        "lookup": lookup,
        "tree": settings["tree"] if k else None,
        "num_problems": len({problem["task_id"] for problem in problems}),
        "num_new_tokens": int(tokens),
        "num_passes": passes,
        "num_plain_passes": sum(run["num_plain_passes"] for run in runs),
        "num_rounded_passes": rounded,
        "seconds": round(seconds, 4),
        "prefill_seconds": round(prefill_seconds, 4),
        "tokens_per_second": round(tokens / seconds, 4),
        "tokens_per_second_ci95": counts.interval(ratio, "tokens", "seconds"),
        "speedup": round(float(speedup(counts.sums(*of_ar))), 4),
        "speedup_ci95": counts.interval(speedup, *of_ar),
        "acceptance_rate": drafting["acceptance_rate"],
        "acceptance_rate_ci95": drafting["acceptance_rate_ci95"],
        "acceptance_by_depth": [round(a / max(p, 1), 4) for a, p in pairs],
        "accepted_histogram": np.sum([run["accepted_histogram"] for run in runs], axis=0).tolist(),
        "accepted_per_loop": drafting["accepted_per_loop"],
        "accepted_per_loop_ci95": drafting["accepted_per_loop_ci95"],
        "mean_accepted_tokens": drafting["mean_accepted_tokens"],
        "tokens_per_pass": round(tokens / passes, 4),
        "seconds_per_problem": round(seconds / len(problems), 6),
        "seconds_per_problem_ci95": counts.interval(ratio, "seconds", "problems", digits=6),
        "seconds_per_pass": round((seconds - prefill_seconds) / passes, 6),
        "seconds_per_pass_ci95": counts.interval(ratio, "decode_seconds", "passes", digits=6),
        "identical_outputs": len(problems_with_ars_outputs(problems, key)),
    }


def problems_with_ars_outputs(problems: list[dict[str, Any]], key: Key) -> set[str]:
    """Name the problems on which a run's outputs are AR's, whichever worker measured them."""
    others = {p["task_id"] for p in problems if not is_ars(run_of(p, key), run_of(p, AR_KEY))}
    return {problem["task_id"] for problem in problems} - others


def is_ars(run: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Tell whether every turn's output is that of every turn of AR."""
    return len({*run["outputs_sha256"], *plain["outputs_sha256"]}) == 1


def summarize(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge worker documents into the content of `summary.json`.

    Where every worker measures all problems, those count that all have finished.

    Raises InputError where they hold no problem, or are not of one benchmark.
    """
    documents = [document for document in documents if document["problems"]]
    require(len(documents) > 0, "results: no finished problem")
    settings = documents[0]["settings"]
    shape = _shape(documents[0]["problems"][0])
    require(AR_KEY in shape, "results: no run of ar, which all others are compared with")
    for document in documents:
        require(
            document["settings"] == settings
            and all(_shape(problem) == shape for problem in document["problems"]),
            f"results: of worker {document['device']} are not of the settings and runs of worker "
            f"{documents[0]['device']}; expected those of one benchmark in a folder",
        )
    repeated = settings.get("repeat", False)
    names = [{problem["task_id"] for problem in document["problems"]} for document in documents]
    counted = set.intersection(*names) if repeated else set[str]().union(*names)
    entries = [
        (number, problem)
        for number, document in enumerate(documents)
        for problem in document["problems"]
        if problem["task_id"] in counted
    ]
    require(len(entries) > 0, "results: no problem that all workers have finished")
    problems = [problem for _, problem in entries]
    workers = [number for number, _ in entries] if repeated else None
    keys = [key_of(run) for run in problems[0]["runs"]]
    keys.sort(key=lambda key: (_ORDER.index(key[0]), *key[1:]))
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": documents[0]["environment"],
        "settings": settings,
        "num_workers": len(documents),
        "runs": [_run_summary(problems, workers, key, settings) for key in keys],
        "best_k": _best_ks(problems, keys),
    }


def _shape(problem: dict[str, Any]) -> dict[Key, tuple[int, int]]:
    """Map the runs of a problem to how long their lists of counts are."""
    lists = ("proposed_by_depth", "accepted_histogram")
    return {key_of(run): (len(run[lists[0]]), len(run[lists[1]])) for run in problem["runs"]}


def _best_ks(problems: list[dict[str, Any]], keys: list[Key]) -> list[dict[str, Any]]:
    """Find, for each problem and strategy that was measured at several k, the fastest k.

    0 is AR; of equals the smallest counts.
    """
    by_strategy: dict[str, list[Key]] = {}
    for key in keys:
        if key[1]:
            by_strategy.setdefault(key[0], [AR_KEY]).append(key)
    by_task: dict[str, list[dict[str, Any]]] = {}
    for problem in problems:
        by_task.setdefault(problem["task_id"], []).append(problem)
    found = []
    for task_id, same in by_task.items():
        for strategy, choices in by_strategy.items():
            if len({k for _, k, _ in choices}) > 2:
                best = max(choices, key=lambda key: speed_over(same, key, AR_KEY))
                found.append(
                    {
                        "task_id": task_id,
                        "strategy": strategy,
                        "k": best[1],
                        "speedup": round(speed_over(same, best, AR_KEY), 4),
                    }
                )
    return found


def speed_over(problems: list[dict[str, Any]], key: Key, other: Key) -> float:
    """Compute tokens per second of one run over those of another, on the same problems."""
    sums = [
        sum(figure(run_of(problem, each)) for problem in problems)
        for each in (key, other)
        for figure in (lambda run: run["num_new_tokens"], seconds_of)
    ]
    return float(speedup(np.array(sums)))


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
