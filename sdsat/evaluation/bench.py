"""The benchmark: AR and every setting on the same problem in turn, one worker a device.

    sdsat bench greedy smollm2-135m-sdsat cpu --k-list 0,1,3,5,7

All run in the same engine. Noise of the machine hits AR and SDSAT alike, because they take turns
(measure.py). Each worker rewrites its own `worker_<device>.json` after every problem (workers.py),
so an interrupted run loses at most the problem in hand and resumes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdsat.config import require
from sdsat.evaluation.outputs import tidy_outputs
from sdsat.evaluation.records import held_documents, results_place
from sdsat.evaluation.summary import AR_KEY, Key, key_of, name_of, seconds_of
from sdsat.evaluation.sweep import BenchConfig
from sdsat.evaluation.workers import context_length, in_own_process, labels, run_workers
from sdsat.models import devices as placing
from sdsat.models import loading
from sdsat.tasks.datasets import Task, limited, read_tasks
from sdsat.tasks.prompts import encode_task


def bench(config: BenchConfig, devices: list[str], results: Path) -> tuple[Path, list[str]]:
    """Measure, one worker for each of `devices` (see models/devices.py).

    Args:
        config: what is measured.
        devices: one a worker.
        results: the folder that holds the results folders.

    Returns:
        The results folder and a line a worker that died.

    Raises:
        InputError: for bad input: before, or where every worker met it; a worker that dies ends
            alone.
        KeyboardInterrupt: for an interrupt, which leaves what is finished in place.
    """
    folder = results / config.folder
    for device in devices:
        require(
            device != "",
            f"GPUS={','.join(devices)}: one is empty; expected cpu, or GPU numbers such as "
            "0,1 or 0+1,2+3",
        )
        placing.pick_devices(device, "GPUS")
    with results_place(folder).held():
        tasks, source = read_tasks(config.dataset)
        tasks = limited(tasks, config.data_limit)
        config = replace(config, source=source)
        # Refuses a prompt that can't be asked, before a model is loaded.
        tokenizer = loading.load_tokenizer(config.model)
        encode_task(tokenizer, tasks[0], config.dataset, config.template_options)
        documents = held_documents(folder, config)
        tidy_outputs(folder, documents)
        shares = _shares(config, devices, tasks, documents)
        if not any(shares):
            tqdm.write(
                f"{folder}: all {len(tasks)} problems were measured before; delete it or "
                "set RESULTS_DIR to measure anew"
            )
            return folder, []
        busy = [device for device, share in zip(devices, shares, strict=True) if share]
        if devices[0] == "cpu":
            _check_memory(config, busy)
        else:
            # Asking a GPU for its memory takes some of it, and all of one that is set to serve one
            # process.
            in_own_process(_check_memory, config, busy)
        names = {task.task_id for task in tasks}
        finished = [p for d in documents for p in d["problems"] if p["task_id"] in names]
        progress = _Progress(finished, len(finished) + sum(map(len, shares)))
        try:
            return folder, run_workers(config, devices, shares, folder, progress.add)
        finally:
            progress.bar.close()


def _shares(
    config: BenchConfig, devices: list[str], tasks: list[Task], documents: list[dict[str, Any]]
) -> list[list[Task]]:
    """Give each worker its problems: those that are left in turn, or with `repeat` all its own.

    Args:
        config: what is measured.
        devices: one a worker.
        tasks: all problems.
        documents: of the workers so far.

    Returns:
        A list for each device.
    """
    done = {
        (document["device"] if config.repeat else None, problem["task_id"])
        for document in documents
        for problem in document["problems"]
    }
    if config.repeat:
        return [
            [task for task in tasks if (label, task.task_id) not in done]
            for label in labels(devices)
        ]
    todo = [task for task in tasks if (None, task.task_id) not in done]
    return [todo[number :: len(devices)] for number in range(len(devices))]


def _check_memory(config: BenchConfig, devices: list[str]) -> None:
    """Refuse workers that can't all fit, before one starts.

    Raises InputError, one line.
    """
    size = loading.sized(config.model, config.dtype)
    taken = dict[Any, int]()
    for device in devices:
        placing.place(size, device, context_length(config), taken, "GPUS")


class _Progress:
    """A progress bar with the running speed-up of the best setting."""

    def __init__(self, finished: list[dict[str, Any]], total: int):
        self.sums: dict[Key, list[float]] = {}  # tokens and seconds
        self.bar = tqdm(total=total, unit="problem", disable=None, file=sys.stderr)
        for problem in finished:
            self.add(problem)

    def add(self, problem: dict[str, Any]) -> None:
        """Enter a finished problem."""
        for run in problem["runs"]:
            sums = self.sums.setdefault(key_of(run), [0.0, 0.0])
            sums[0] += run["num_new_tokens"]
            sums[1] += seconds_of(run)
        speed = {key: tokens / seconds for key, (tokens, seconds) in self.sums.items()}
        drafted = {key: speed[key] / speed[AR_KEY] for key in speed if key[1] or key[2]}
        if drafted:
            best = max(drafted, key=lambda key: drafted[key])
            self.bar.set_postfix_str(
                f"AR {speed[AR_KEY]:.1f} tokens/s, {name_of(best)} {drafted[best]:.2f}x"
            )
        self.bar.update()
