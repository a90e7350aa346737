"""Worker processes: one a device, and one that dies never ends the others.

Each worker loads the model, measures its share of the problems, adds the texts of every one to its
own `outputs_<device>.jsonl` and then rewrites its `worker_<device>.json`.
"""

from __future__ import annotations

import faulthandler
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
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdsat.config import InputError
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.measure import measure_problem, warm_up
from sdsat.evaluation.outputs import append_outputs
from sdsat.evaluation.records import environment, open_worker_document
from sdsat.evaluation.sweep import BenchConfig
from sdsat.files import write_json
from sdsat.tasks.datasets import Task
from sdsat.tasks.prompts import encode_task

_PROMPT_TOKENS = 1024  # of a long prompt: what memory is left for beside the new tokens


def context_length(config: BenchConfig) -> int:
    """Count the positions of the cache that a worker needs memory for."""
    return _PROMPT_TOKENS + config.max_new_tokens


def run_workers(
    config: BenchConfig,
    devices: list[str],
    shares: list[list[Task]],
    folder: Path,
    on_problem: Callable[[dict[str, Any]], None],
) -> list[str]:
    """Have each worker measure its problems and wait for all, whatever becomes of one.

    Args:
        config: what is measured.
        devices: one a worker.
        shares: the problems that are left to each; one that has none is not started.
        folder: of the results.
        on_problem: called with the entry of every problem that a worker has finished.

    Returns:
        A line for each worker that died.

    Raises:
        InputError: where no worker could go on: what none of them can do is no worker's own
            misfortune.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, tuple[str, Any]] = {}
    try:
        for device, label, share in zip(devices, labels(devices), shares, strict=True):
            if share:
                receive, send = context.Pipe(duplex=False)
                process = context.Process(
                    target=_worker, args=(config, device, label, share, folder, send), daemon=True
                )
                process.start()
                send.close()
                workers[receive] = (label, process)
        return _attend(workers, folder, on_problem)
    finally:
        for _, process in workers.values():
            process.terminate()
        for _, process in workers.values():
            process.join()


def labels(devices: list[str]) -> list[str]:
    """Name the workers, each with a name of its own: cpu, 0, 0+1, ...

    A device that is named twice gets cpu and cpu.1.
    """
    earlier = [devices[:number].count(device) for number, device in enumerate(devices)]
    return [
        f"{device}.{count}" if count else device
        for device, count in zip(devices, earlier, strict=True)
    ]


def _attend(
    workers: dict[Connection, tuple[str, Any]],
    folder: Path,
    on_problem: Callable[[dict[str, Any]], None],
) -> list[str]:
    """Take in what the workers send until all have ended; removes those from `workers`.

    Raises InputError where none of them could go on.
    """
    started = len(workers)
    dead: list[str] = []
    refused: dict[str, str] = {}  # a line a worker that could not go on, by its name
    warned: set[str] = set()
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
                    dead.append(obituary(label, process.exitcode, log_file(folder, label)))
                continue
            if kind == "error":
                refused[label] = content
            if kind == "warning" and content not in warned:
                warned.add(content)
                tqdm.write(f"warning: {content}", file=sys.stderr)
            if kind == "problem":
                on_problem(content)
    if len(refused) == started:
        raise InputError(next(iter(refused.values())))
    return dead + [f"worker {label} ({content})" for label, content in refused.items()]


def obituary(label: str, code: int, log: Path) -> str:
    """Write 'worker 0 (exit code 1, the last line of its log; log: FILE)'."""
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "") if code > 0 else ""
    return f"worker {label} (exit code {code}{', ' if last else ''}{last}; log: {log})"


def _worker(
    config: BenchConfig, device: str, label: str, todo: list[Task], folder: Path, pipe: Connection
) -> None:
    """Be a worker process: load, warm up, measure the problems.

    Sends ('problem', the entry of a finished one), ('warning', a line) and ('error', a line); all
    that it prints goes to its log.

    Args:
        config: what is measured.
        device: of the model.
        label: of the worker.
        todo: its problems.
        folder: of the results.
        pipe: where it sends.
    """
    heed_interrupts()
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(kind: str, message: object) -> None:
        with suppress(OSError):  # a full disk takes no log, but the line is said
            print(f"{kind}: {message}", file=sys.stderr)
        pipe.send((kind, str(message)))

    try:
        log_to(log_file(folder, label), f"worker {label}: {len(todo)} problems, {config}")
        warnings.showwarning = lambda message, *_, **__: say("warning", message)
        _measure_share(config, device, label, todo, folder, pipe)
    except InputError as error:
        say("error", error)
        sys.exit(2)


def _measure_share(
    config: BenchConfig, device: str, label: str, todo: list[Task], folder: Path, pipe: Connection
) -> None:
    """Measure a worker's problems, and keep and send each one's entry.

    Args:
        config: what is measured.
        device: of the model.
        label: of the worker.
        todo: its problems.
        folder: of the results.
        pipe: where entries are sent.

    Raises:
        InputError: for a model, settings or problems that don't fit together.
    """
    decoder = Decoder.load(
        config.model,
        config.dtype,
        device,
        config.sat_token_id,
        config.engine,
        trained_k=config.trained_k,
        context=context_length(config),
    )
    model = decoder.model
    most = max(config.k_list)
    if model.sat and most > model.sat.k:
        warnings.warn(
            f"k={most} is beyond the depth k={model.sat.k} that {config.model} was trained for",
            stacklevel=2,
        )
    assert model.tokenizer is not None
    problems = [
        encode_task(model.tokenizer, task, config.dataset, config.template_options) for task in todo
    ]
    warm_up(decoder, config)
    document = open_worker_document(folder, label, config, environment(decoder))
    for number, problem in enumerate(problems):
        entry, outputs = measure_problem(decoder, problem, config, number)
        append_outputs(folder, label, problem.task_id, outputs)
        document["problems"].append(entry)
        write_json(folder / f"worker_{label}.json", document)
        pipe.send(("problem", entry))


def heed_interrupts() -> None:
    """Have an interrupt end this process at once.

    Not where the run itself ignores them, as one in a script's background does.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end_with_parent() -> None:
    """End this process when its parent does.

    A worker whose parent was killed must not go on writing into a folder that the next run takes
    for its own.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def log_file(folder: Path, label: str) -> Path:
    """Name the file into which a worker prints."""
    return folder / f"worker_{label}.log"


def log_to(file: Path, title: str) -> None:
    """Have this process print into `file` from here on, behind what is there.

    Crashes in native code, too, leave their trace.

    Raises InputError, one line, where it can't be written.
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


def in_own_process(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of its own, which takes with it what it holds of the GPUs.

    Raises what the function raises.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, heed_interrupts) as pool:
        pool.submit(function, *arguments).result()
