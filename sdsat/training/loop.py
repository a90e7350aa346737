r"""The training loop, around loss.py and modes.py. It resumes exactly where it was killed.

    sdsat train --data runs/data --out runs/adapter --steps 2000
    accelerate launch --num_processes 8 -m sdsat train --data runs/data --out runs/adapter
    accelerate launch --config_file scripts/fsdp.yaml -m sdsat train --mode full \
        --data runs/data --out runs/model

Several processes on a CPU are started by `torchrun --nproc-per-node 2 -m sdsat train ...` instead.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from sdsat.config import TrainConfig, require
from sdsat.files import replacing, write_json, writing
from sdsat.models.identity import adapter_files_hash, base_hash
from sdsat.models.sat_model import SatModel
from sdsat.resume import Place
from sdsat.training.loss import SatBatch, sat_batch
from sdsat.training.modes import MODES, Mode
from sdsat.training.plot import plot_training
from sdsat.training.shards import TrainingExample, hold_out, sequences_sha256


def learning_rate(config: TrainConfig, step: int) -> float:
    """Compute a step's learning rate: linear warm-up, then a cosine to zero at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _epoch_order(data: list[TrainingExample], seed: int) -> list[int]:
    """Shuffle so that every 32 neighbours are sorted by length.

    So a batch holds like lengths and pads little.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return [
        i
        for window in order.split(32)
        for i in sorted(window.tolist(), key=lambda i: len(data[i].ids))
    ]


def _batches_of_step(
    data: list[TrainingExample],
    order: Callable[[int], list[int]],
    config: TrainConfig,
    step: int,
    rank: int,
    world: int,
) -> list[SatBatch]:
    """Make this process's micro-batches of a step.

    The sequences of a step and their anchors are functions of (seed, step) alone, however many
    processes and micro-batches share them, so that a resumed run sees what it would have seen, and
    a wider one the same.

    Args:
        data: to train on.
        order: of an epoch by its number, as indices of `data`.
        config: the settings.
        step: its number, from 0.
        rank: of this process.
        world: how many processes there are.
    """
    size = config.batch_size
    batches = []
    for micro in range(config.accumulate):
        first = ((step * config.accumulate + micro) * world + rank) * size
        chosen = []
        generators = []
        for place in range(first, first + size):
            epoch, index = divmod(place, len(data))
            chosen.append(data[order(epoch)[index]])
            generators.append(torch.Generator().manual_seed(config.seed * 1_000_000_007 + place))
        batches.append(sat_batch(chosen, config.k, config.anchors, config.keep, generators))
    return batches


def train(model: SatModel, data: list[TrainingExample], out: Path, config: TrainConfig) -> None:
    """Train, and write the result with train_log.jsonl and training.png to `out`.

    A killed run resumes from there. Runs as it is in several processes: each takes its own part of
    every step, and gradients are averaged.

    Args:
        model: what is trained, or the base of the adapter that is.
        data: some of it is held out, to evaluate on.
        out: folder of the result.
        config: the settings.

    Raises:
        InputError: for data of another vocabulary, for a folder that holds another run or has one
            now, and for a loss that is not finite.
    """
    vocabulary = model.vocabulary
    largest = max((int(s.ids.max()) for s in data), default=0)
    require(
        largest < vocabulary,
        (
            f"data: token id {largest} is not in the vocabulary of {model.name}; distil with "
            "that model"
        ),
    )
    data = [s for s in data if len(s.ids) > s.prompt_length + 1]  # SAT 1 needs two tokens of answer
    held_out, rest = hold_out(data, config.held_out)
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    answer_tokens = sum(len(s.ids) - s.prompt_length for s in rest)
    facts = {
        "sequences": len(rest),
        "answer_tokens": answer_tokens,
        "data_sha256": sequences_sha256(data),
    }
    place = Place.folder(out, f"out={out}")
    with place.held(accelerator):
        state = _begin(place, config, {**_origins(model, config, accelerator), **facts})
        mode: Mode = MODES[config.mode](model, config, accelerator, rest)
        run = _Run(mode, rest, held_out, out, config, accelerator, model.device, state)
        run.start()
        run.go_on()
        final = {key: value for key, value in state["log"][-1].items() if key not in ("lr", "loss")}
        with writing(out):
            mode.save(out, {"config": asdict(config), **facts, **final})


def _origins(model: SatModel, config: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Collect what a run's numbers come from, beside its settings and data.

    A run goes on only where this is the same.
    """
    return {
        "model": model.name,
        "base_sha256": base_hash(model.name, model.lm),
        "dtype": str(model.dtype).removeprefix("torch."),
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "init_sha256": adapter_files_hash(Path(config.init)) if config.init else None,
    }


@dataclass
class _Run:
    """A run on its way from `state` (of `_begin`) to its last step."""

    mode: Mode
    data: list[TrainingExample]
    held_out: list[TrainingExample]
    out: Path
    config: TrainConfig
    accelerator: Accelerator
    device: torch.device
    state: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of the state's checkpoint."""
        return self.out / f"checkpoint_{self.state['step']}"

    def start(self) -> None:
        """Take up the state's checkpoint; a new run evaluates what it starts from."""
        state = self.state
        if state["step"]:
            self.mode.restore(self.folder)
            self.drop_others()
        else:
            state["log"] = [
                {
                    "step": 0,
                    **self.mode.evaluate(self.held_out),
                    "sat_predictions": 0,
                    "seconds": 0.0,
                }
            ]

    def go_on(self) -> None:
        """Take all steps that are left.

        An evaluation follows every `eval_every` and the last, and a checkpoint each of these and
        every `checkpoint_every`.
        """
        config = self.config
        state = self.state
        rank = self.accelerator.process_index
        world = self.accelerator.num_processes
        # A step may touch two epochs.
        order = lru_cache(maxsize=2)(
            lambda epoch: _epoch_order(self.data, config.seed * 1_000_003 + epoch)
        )
        quiet = not self.accelerator.is_local_main_process
        bar = tqdm(
            range(state["step"], config.steps),
            initial=state["step"],
            total=config.steps,
            desc="train",
            disable=quiet,
        )
        for step in bar:
            began = time.perf_counter()
            figures, predictions = self.step(
                step, _batches_of_step(self.data, order, config, step, rank, world)
            )
            state["predictions"] += predictions
            state["seconds"] += time.perf_counter() - began
            bar.set_postfix(loss=f"{figures['loss']:.3f}")
            state["step"] = step + 1
            due = state["step"] == config.steps or state["step"] % config.eval_every == 0
            if due:
                entry = {"step": state["step"], **figures, **self.mode.evaluate(self.held_out)}
                entry |= {
                    "sat_predictions": state["predictions"],
                    "seconds": round(state["seconds"], 1),
                }
                state["log"] = [*state["log"], entry]
                if not quiet:
                    bar.write(json.dumps(entry))
            if due or state["step"] % config.checkpoint_every == 0:
                with writing(self.out):
                    self.checkpoint()

    def step(self, step: int, batches: list[SatBatch]) -> tuple[dict[str, float], int]:
        """Take one step on this process's micro-batches.

        Returns (figures for the log, SAT predictions of all processes). Raises InputError for a
        loss or a gradient that is not finite, before it reaches the weights.
        """
        mode = self.mode
        accelerator = self.accelerator
        counts = [[mode.weight(batch), float((batch.depth > 0).sum())] for batch in batches]
        total, predictions = accelerator.reduce(
            torch.tensor(counts, device=self.device).sum(0)
        ).tolist()
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            part = mode.loss(batch.to(self.device)) * accelerator.num_processes / total
            part.backward()
            loss += part.detach()
        mode.average_gradients()
        mode.before_update(step)
        norm = float(accelerator.clip_grad_norm_(mode.parameters(), self.config.clip))
        mean_loss = accelerator.reduce(loss, "mean").item()
        lr = learning_rate(self.config, step)
        require(
            math.isfinite(mean_loss) and math.isfinite(norm),
            f"lr={self.config.lr}: the loss of step {step + 1} is {mean_loss}, its "
            f"gradient's norm {norm}; training stops here "
            f"and {self.out} keeps its last checkpoint; expected a lower lr",
        )
        for group in mode.optimizer.param_groups:
            group["lr"] = group.get("factor", 1.0) * lr
        mode.optimizer.step()
        mode.optimizer.zero_grad(set_to_none=True)
        return {"loss": round(mean_loss, 4), "lr": lr, "grad_norm": round(norm, 4)}, int(
            predictions
        )

    def checkpoint(self) -> None:
        """Write `checkpoint_<step>`, then drop older ones.

        Its state.json comes last and makes it valid.
        """
        folder = self.folder
        folder.mkdir(exist_ok=True)
        self.mode.store(folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            log = self.state["log"]
            # Before state.json: after the last step nobody writes it again.
            with replacing(self.out / "train_log.jsonl") as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in log))
            plot_training(log, self.out / "training.png")
            write_json(folder / "state.json", {**self.state, "config": asdict(self.config)})
        self.drop_others()
        self.accelerator.wait_for_everyone()

    def drop_others(self) -> None:
        """Delete all checkpoints but the state's own.

        These are older ones, and one that a killed run was writing.
        """
        if self.accelerator.is_main_process:
            for other in self.out.glob("checkpoint_*"):
                if other != self.folder:
                    shutil.rmtree(other)


def _begin(place: Place, config: TrainConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Find the state to start from: that of the latest checkpoint there.

    It must be of a run with these settings (but for `steps`) and facts. With other steps the
    schedule goes on as if they had been asked for from the start. A run that has done all its steps
    goes straight to saving its result.

    Raises InputError, one line, for any other run.
    """
    reason = "a checkpoint there is not one of this program; choose another folder"
    states = []
    for file in place.path.glob("checkpoint_*/state.json"):
        state = place.read(file, ("config", "facts"), reason) or {}
        place.require({"step", "log"} <= state.keys(), reason)
        states.append(state)
    if not states:
        return {"step": 0, "predictions": 0, "seconds": 0.0, "log": [], "facts": facts}
    state = max(states, key=lambda state: state["step"])
    held = {**state.pop("config"), **state["facts"], "steps": config.steps}
    place.check_same(held, {**asdict(config), **facts})
    require(
        state["step"] <= config.steps,
        f"steps={config.steps}: the run in {place.path} has done {state['step']}; expected more",
    )
    return state
