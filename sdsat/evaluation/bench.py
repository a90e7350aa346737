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
from sdsat.evaluation.records import finished_problems, results_place
from sdsat.evaluation.summary import AR_KEY, Key, key_of, name_of, seconds_of
from sdsat.evaluation.sweep import BenchConfig
from sdsat.evaluation.workers import context_length, in_own_process, run_workers
from sdsat.models import devices as placing
from sdsat.models import loading
from sdsat.tasks.datasets import limited, read_tasks
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
        names = {task.task_id for task in tasks}
        finished = [p for p in finished_problems(folder, config) if p["task_id"] in names]
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
        else:
            # Asking a GPU for its memory takes some of it, and all of one that is set to serve one
            # process.
            in_own_process(_check_memory, config, devices[: len(todo)])
        progress = _Progress(finished, len(tasks))
        try:
            return folder, run_workers(config, devices, todo, folder, progress.add)
        finally:
            progress.bar.close()


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
