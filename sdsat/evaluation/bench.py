"""The benchmark: AR and every k on the same problem, one after the other, in the same engine; one
worker a device.

    sdsat bench greedy smollm2-135m-sdsat cpu --k-list 0,1,3,5,7

Noise of the machine hits AR and SDSAT alike, because they take turns. Each worker rewrites its own
`worker_<device>.json` after every problem, so an interrupted run loses at most the problem in hand
and resumes.
"""

from __future__ import annotations

import faulthandler
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdsat.config import (
    LOOKUP,
    NUM_LOOKUP,
    DecodeConfig,
    InputError,
    SamplingConfig,
    keys_of,
    require,
)
from sdsat.decoding.loop import Decoder
from sdsat.decoding.sequence import Generation
from sdsat.environment import check_environment
from sdsat.evaluation.records import environment, plain
from sdsat.evaluation.reference import transformers_generate
from sdsat.evaluation.report import SCHEMA_VERSION, Key, key_of, name_of, read_workers, seconds_of
from sdsat.files import locked, write_json
from sdsat.method.tree import PAPER_WIDTHS, make_tree, parse_tree
from sdsat.models import devices as placing
from sdsat.models import dtypes, loading
from sdsat.models.identity import identity
from sdsat.tasks.datasets import (
    HUMANEVAL,
    INFILLING,
    INFILLING_PSM,
    Limit,
    Task,
    check_dataset,
    check_limit,
    limited,
    read_tasks,
)
from sdsat.tasks.prompts import WARM_UP, Problem, encode_prompt, encode_task

_WARM_UP_TOKENS = 16
NO_PROBLEM = Problem("", ())
_PROMPT_TOKENS = 1024  # of a long prompt: what memory is left for beside the new tokens


@dataclass(frozen=True)
class BenchConfig:
    """What is measured.

    Everything but data_limit must be the same for a results folder to be resumed.

    method: 'greedy' or 'nucleus'; temperature, top_k and top_p hold for nucleus only.
    k_list: the k to measure; AR (0) is always among them. strategies: each at every k of k_list,
    but auto once, with the largest.
    lookup: how many tokens 'auto' and 'lookup' look up in the text so far. `auto` is measured
    beside what it is made of: 'lookup' alone, and itself without lookup; 0: only without.
    template_options: see prompts.encode.
    dataset: see datasets.read_tasks; source: what that returns, entered by `bench`. data_limit: see
    datasets.limited.
    engine, sat_token_id, trained_k: see model.load.
    with_generate: also time transformers' own greedy `generate` on the same weights. turns: how
    often each is measured on each problem, of which the run of the median time counts. seed: each
    problem has its own form of it, `SamplingConfig.of_problem`.
    """

    model: str
    method: str = "greedy"
    k_list: tuple[int, ...] = (0, 1, 3, 5, 7)
    strategies: tuple[str, ...] = ("two-step", "auto")
    tree: str = "auto"
    temperature: float = 1.0
    top_k: int = 10
    top_p: float = 0.95
    seed: int = 0
    dataset: str = HUMANEVAL
    data_limit: Limit = None
    max_new_tokens: int = 256
    dtype: str = "bfloat16"
    with_generate: bool = False
    engine: str = "auto"
    sat_token_id: int | None = None
    trained_k: int | None = None
    source: str | None = None
    turns: int = 1
    lookup: int = NUM_LOOKUP
    template_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(
            self.method in ("greedy", "nucleus"),
            f"method={self.method}: expected greedy or nucleus",
        )
        require(
            self.method == "greedy" or self.temperature > 0,
            f"temperature={self.temperature}: expected a positive number for nucleus sampling",
        )
        require(
            not (self.with_generate and self.method == "nucleus"),
            (
                "with_generate: transformers' generate draws other random numbers; use it with "
                "greedy only"
            ),
        )
        dtypes.check_dtype(self.dtype)
        require(self.turns >= 1, f"turns={self.turns}: expected 1 or more")
        check_dataset(self.dataset)
        check_limit(self.data_limit)
        object.__setattr__(self, "k_list", tuple(sorted({0, *self.k_list})))
        require(
            len(set(self.strategies)) == len(self.strategies) > 0,
            f"strategies={','.join(self.strategies)}: one is there twice",
        )
        for strategy, k, lookup in self.keys:
            self.decode_config(strategy, k, lookup)
            if k:
                make_tree(parse_tree(self.tree), k)

    @property
    def keys(self) -> list[Key]:
        """(strategy, k, tokens to look up) of everything that is measured on each problem."""
        keys = [("transformers", 0, 0)] * self.with_generate + [("ar", 0, 0)]
        for strategy in self.strategies:
            most = max(self.k_list)
            if strategy == "auto" and most:  # and what it is made of
                both = [(LOOKUP, 0, self.lookup), ("auto", most, 0), ("auto", most, self.lookup)]
                keys += both if self.lookup else [("auto", most, 0)]
            elif strategy != "auto":
                keys += [
                    (name, k, self.lookup if name == LOOKUP else 0)
                    for name, k in keys_of([strategy], self.k_list)
                ]
        return list(dict.fromkeys(keys))

    @property
    def sampling(self) -> SamplingConfig:
        if self.method == "greedy":
            return SamplingConfig()
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.seed)

    def decode_config(
        self, strategy: str, k: int, lookup: int, problem: Problem = NO_PROBLEM
    ) -> DecodeConfig:
        sampling = self.sampling.of_problem(problem.task_id)
        ends = (problem.stop_ids, problem.stop_strings)
        plain = DecodeConfig(0, self.max_new_tokens, "auto", sampling, *ends)
        if not k and not lookup and strategy in ("transformers", "ar"):
            return plain
        return replace(
            plain,
            k=k,
            tree=parse_tree(self.tree) if k else "auto",
            strategy=strategy,
            lookup=lookup,
        )

    @property
    def folder(self) -> str:
        """Where the results go below the results folder: <model>/<greedy | nucleus_t1.0>[_<data set
        other than HumanEval>].
        """
        method = "greedy" if self.method == "greedy" else f"nucleus_t{self.temperature}"
        dataset = "" if self.dataset == HUMANEVAL else f"_{Path(self.dataset).stem}"
        return f"{Path(self.model).name}/{method}{dataset}"


def paper_settings(method: str, dataset: str) -> dict[str, Any]:
    """What the paper measures (arXiv 2403.18647), as fields of BenchConfig; weights in their own
    dtype.
    """
    greedy = method == "greedy"
    infilling = dataset in (INFILLING, INFILLING_PSM)
    return {
        "k_list": tuple(range(14)) if greedy else (0, *PAPER_WIDTHS),
        "tree": "auto" if greedy else "paper",
        "data_limit": Fraction(3, 100)
        if infilling
        else Fraction(1, 2)
        if dataset == HUMANEVAL
        else None,
        "max_new_tokens": 50 if infilling else 512,
        "dtype": "auto",
    }


def _run_record(key: Key, out: Generation) -> dict[str, Any]:
    strategy, k, lookup = key
    histogram = [0] * (len(out.proposed_by_depth) + 1)
    for accepted in out.accepted_lengths:
        histogram[accepted] += 1
    return {
        "strategy": strategy,
        "k": k,
        "lookup": lookup,
        "prefill_seconds": round(out.prefill_seconds, 6),
        "decode_seconds": round(out.decode_seconds, 6),
        "num_passes": out.num_passes,
        "num_plain_passes": out.num_plain_passes,
        "num_rounded_passes": out.num_rounded_passes,
        "num_new_tokens": out.num_new_tokens,
        "finish": out.finish,
        "proposed_by_depth": out.proposed_by_depth,
        "accepted_by_depth": out.accepted_by_depth,
        "accepted_histogram": histogram,
        "outputs_sha256": [hashlib.sha256(" ".join(map(str, out.token_ids)).encode()).hexdigest()],
    }


def measure_problem(
    decoder: Decoder, problem: Problem, config: BenchConfig, first: int
) -> dict[str, Any]:
    """Every strategy and k, config.turns times in turn, on one problem; `first` of them begins."""
    keys = config.keys
    runs: dict[Key, list[dict[str, Any]]] = {key: [] for key in keys}
    asked = replace(problem, stop_ids=decoder.model.stop_ids + problem.stop_ids)
    for place in range(config.turns * len(keys)):
        key = keys[(place + first) % len(keys)]
        decode = config.decode_config(*key, asked)
        with warnings.catch_warnings():
            # k beyond the trained depth: said once, when the run starts
            warnings.simplefilter("ignore")
            prompt = list(problem.prompt_ids)
            if key[0] == "transformers":
                out = transformers_generate(decoder, prompt, decode)
            else:
                out = decoder.generate(prompt, decode)
            runs[key].append(_run_record(key, out))
    return {
        "task_id": problem.task_id,
        "seed": None if config.sampling.greedy else decode.sampling.seed,
        "num_prompt_tokens": len(problem.prompt_ids),
        "runs": [_of_turns(runs[key]) for key in keys],
    }


def _of_turns(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of the median time, and the outputs of all."""
    median = sorted(runs, key=seconds_of)[(len(runs) - 1) // 2]
    return {**median, "outputs_sha256": [sha for run in runs for sha in run["outputs_sha256"]]}


def _warm_up(decoder: Decoder, config: BenchConfig) -> None:
    """Have everything made and learnt that is made once, on a prompt that is not measured."""
    tokenizer = decoder.model.tokenizer
    assert tokenizer is not None
    problem = Problem("warm-up", tuple(encode_prompt(tokenizer, WARM_UP)))
    short = replace(config, turns=1, max_new_tokens=min(_WARM_UP_TOKENS, config.max_new_tokens))
    measure_problem(decoder, problem, short, 0)


def heed_interrupts() -> None:
    """An interrupt ends this process at once; not where the run itself ignores them, as one in a
    script's background does.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _worker(
    config: BenchConfig, device: str, label: str, todo: list[Task], folder: Path, pipe: Connection
) -> None:
    """A worker process: load, warm up, measure its problems.

    Sends ('problem', the runs of a finished one), ('warning', a line) and ('error', a line); all
    that it prints goes to its log.
    """
    heed_interrupts()
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def warn(message: Any, *_: Any, **__: Any) -> None:
        say("warning", message)

    def say(kind: str, message: object) -> None:
        with suppress(OSError):  # a full disk takes no log, but the line is said
            print(f"{kind}: {message}", file=sys.stderr)
        pipe.send((kind, str(message)))

    try:
        _log_to(_log(folder, label), f"worker {label}: {len(todo)} problems, {config}")
        warnings.showwarning = warn
        where = (config.model, config.dtype, device)
        options = (config.sat_token_id, config.engine)
        decoder = Decoder.load(
            *where, *options, trained_k=config.trained_k, context=_context(config)
        )
        model = decoder.model
        if model.sat and max(config.k_list) > model.sat.k:
            warn(
                f"k={max(config.k_list)} is beyond the depth k={model.sat.k} that "
                f"{config.model} was trained for"
            )
        assert model.tokenizer is not None
        problems = [
            encode_task(model.tokenizer, task, config.dataset, config.template_options)
            for task in todo
        ]
        _warm_up(decoder, config)
        document = _open_document(folder, label, config, environment(decoder))
        for number, problem in enumerate(problems):
            record = measure_problem(decoder, problem, config, number)
            document["problems"].append(record)
            write_json(folder / f"worker_{label}.json", document)
            pipe.send(("problem", record))
    except InputError as error:
        say("error", error)
        sys.exit(2)


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on writing into a folder that the next run takes
    for its own.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _log(folder: Path, label: str) -> Path:
    return folder / f"worker_{label}.log"


def _log_to(file: Path, title: str) -> None:
    """From here on this process prints into `file`, behind what is there; crashes in native code,
    too, leave their trace.
    """
    try:
        with file.open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n")
            log.flush()
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror})") from None
    faulthandler.enable()


def _context(config: BenchConfig) -> int:
    """Positions of the cache that a worker needs memory for."""
    return _PROMPT_TOKENS + config.max_new_tokens


def _check_memory(config: BenchConfig, devices: list[str]) -> None:
    """Refuse workers that can't all fit, before one starts."""
    size = loading.sized(config.model, config.dtype)
    taken = dict[Any, int]()
    for device in devices:
        placing.place(size, device, _context(config), taken)


def aside(function: Callable[..., None], *arguments: Any) -> None:
    """Call in a process of its own, which takes with it what it holds of the GPUs; raises what the
    function raises.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, heed_interrupts) as pool:
        pool.submit(function, *arguments).result()


def _settings(config: BenchConfig) -> dict[str, Any]:
    settings = plain(config)
    settings.pop("data_limit")
    if config.method == "greedy":
        settings |= {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    return settings


def _open_document(
    folder: Path, label: str, config: BenchConfig, found: dict[str, Any]
) -> dict[str, Any]:
    """A new worker document, or the one on disk if it was measured in the same environment."""
    for document in read_workers(folder):
        check_environment(document["environment"], found, f"results folder {folder}")
        if document["device"] == label:
            return document
    head = {"schema_version": SCHEMA_VERSION, "device": label, "environment": found}
    return {**head, "settings": _settings(config), "problems": []}


def _finished(folder: Path, config: BenchConfig) -> list[dict[str, Any]]:
    """Problems that the folder already holds; refuses a folder that holds other settings, or
    figures of other code or weights.
    """
    problems = []
    documents = read_workers(folder)
    for document in documents:
        for key, value in _settings(config).items():
            held = document["settings"].get(key)
            require(
                held == value,
                (
                    f"results folder {folder}: holds results for {key}={held}, not {value}; "
                    "delete it or set RESULTS_DIR"
                ),
            )
        problems += document["problems"]
    found = identity(config.model) if documents else {}
    for document in documents:
        held = document.get("environment", {})
        check_environment({key: held.get(key) for key in found}, found, f"results folder {folder}")
    return problems


def _labels(devices: list[str]) -> list[str]:
    """One distinct name a worker: cpu, 0, 0+1, ...; a device that is named twice gets cpu and
    cpu.1.
    """
    return [
        d if devices[:i].count(d) == 0 else f"{d}.{devices[:i].count(d)}"
        for i, d in enumerate(devices)
    ]


class _Progress:
    """A progress bar with the running speed-up of the best strategy and k."""

    def __init__(self, finished: list[dict[str, Any]], total: int):
        self.sums: dict[Key, list[float]] = {}
        self.bar = tqdm(total=total, unit="problem", disable=None, file=sys.stderr)
        for problem in finished:
            self.add(problem)

    def add(self, problem: dict[str, Any]) -> None:
        for run in problem["runs"]:
            sums = self.sums.setdefault(key_of(run), [0.0, 0.0])
            sums[0] += run["num_new_tokens"]
            sums[1] += seconds_of(run)
        speed = {key: tokens / seconds for key, (tokens, seconds) in self.sums.items()}
        drafted = {key: speed[key] / speed["ar", 0, 0] for key in speed if key[1] or key[2]}
        if drafted:
            best = max(drafted, key=lambda key: drafted[key])
            self.bar.set_postfix_str(
                f"AR {speed['ar', 0, 0]:.1f} tokens/s, {name_of(best)} {drafted[best]:.2f}x"
            )
        self.bar.update()


def bench(config: BenchConfig, devices: list[str], results: Path) -> tuple[Path, list[str]]:
    """Measure, one worker for each of `devices` (see devices.py).

    Returns the results folder and a line a worker that died.

    Raises InputError for bad input: before, or where every worker met it; one that dies ends alone.
    KeyboardInterrupt leaves what is finished in place.
    """
    folder = results / config.folder
    for device in devices:
        require(
            device != "",
            (
                f"GPUS={','.join(devices)}: one is empty; expected cpu, or GPU numbers such as "
                "0,1 or 0+1,2+3"
            ),
        )
        placing.pick_devices(device)
    with locked(folder / ".lock", f"results folder {folder}"):
        tasks, source = read_tasks(config.dataset)
        tasks = limited(tasks, config.data_limit)
        config = replace(config, source=source)
        names = {task.task_id for task in tasks}
        finished = [p for p in _finished(folder, config) if p["task_id"] in names]
        done = {problem["task_id"] for problem in finished}
        todo = [task for task in tasks if task.task_id not in done]
        if not todo:
            tqdm.write(
                f"{folder}: all {len(tasks)} problems were measured before; delete it or "
                "set RESULTS_DIR to measure anew"
            )
            return folder, []
        if devices[0] == "cpu":
            _check_memory(config, devices[: len(todo)])
        # asking a GPU for its memory takes some of it, and all of one that is set to serve one
        # process
        else:
            aside(_check_memory, config, devices[: len(todo)])
        progress = _Progress(finished, len(tasks))
        return folder, _run_workers(config, devices, todo, folder, progress)


def _run_workers(
    config: BenchConfig, devices: list[str], todo: list[Task], folder: Path, progress: _Progress
) -> list[str]:
    """Split `todo` among the workers and wait for all of them, whatever becomes of one.

    Returns a line for each that died.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, tuple[str, Any]] = {}
    dead: list[str] = []
    refused: dict[str, str] = {}  # a line a worker that could not go on, by its name
    warned: set[str] = set()
    try:
        for i, (device, label) in enumerate(zip(devices, _labels(devices), strict=True)):
            if share := todo[i :: len(devices)]:
                receive, send = context.Pipe(duplex=False)
                process = context.Process(
                    target=_worker, args=(config, device, label, share, folder, send), daemon=True
                )
                process.start()
                send.close()
                workers[receive] = (label, process)
        started = len(workers)
        while workers:
            for pipe in wait(list(workers)):
                assert isinstance(pipe, Connection)
                label, process = workers[pipe]
                try:
                    kind, content = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    del workers[pipe]
                    if label not in refused and process.exitcode:
                        dead.append(_obituary(label, process.exitcode, _log(folder, label)))
                    continue
                if kind == "error":
                    refused[label] = content
                if kind == "warning" and content not in warned:
                    warned.add(content)
                    tqdm.write(f"warning: {content}", file=sys.stderr)
                if kind == "problem":
                    progress.add(content)
    finally:
        for _, process in workers.values():
            process.terminate()
        for _, process in workers.values():
            process.join()
        progress.bar.close()
    if len(refused) == started:  # what none of them can do is no worker's own misfortune
        raise InputError(next(iter(refused.values())))
    return dead + [f"worker {label} ({content})" for label, content in refused.items()]


def _obituary(label: str, code: int, log: Path) -> str:
    """worker 0 (exit code 1, the last line of its log; log: FILE)."""
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "") if code > 0 else ""
    return f"worker {label} (exit code {code}{', ' if last else ''}{last}; log: {log})"
