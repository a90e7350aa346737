"""The training loop, around loss.py and modes.py. It resumes exactly where it was killed.

    sdsat train --data runs/data --out runs/adapter --steps 2000
    accelerate launch --num_processes 8 -m sdsat train --data runs/data --out runs/adapter
    accelerate launch --config_file scripts/fsdp.yaml -m sdsat train --mode full --data runs/data --out runs/model

Several processes on a CPU are started by `torchrun --nproc-per-node 2 -m sdsat train ...` instead.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from .config import InputError, TrainConfig, require
from .data import Sequence
from .files import read_json, write_json, writing
from .loss import SatBatch, sat_batch
from .model import SatModel
from .modes import MODES, Mode
from .report import plot_training


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _epoch_order(data: list[Sequence], seed: int) -> list[int]:
    """A shuffle in which every 32 neighbours are sorted by length: a batch holds like lengths and pads little."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return [i for window in order.split(32) for i in sorted(window.tolist(), key=lambda i: len(data[i].ids))]


def _batches_of_step(
    data: list[Sequence], order: Callable[[int], list[int]], config: TrainConfig, step: int, rank: int, world: int
) -> list[SatBatch]:
    """This process's micro-batches of a step.

    The sequences of a step and their anchors are functions of (seed, step) alone, however many processes and
    micro-batches share them, so that a resumed run sees what it would have seen, and a wider one the same.
    """
    size, batches = config.batch_size, []
    for micro in range(config.accumulate):
        first = ((step * config.accumulate + micro) * world + rank) * size
        chosen, generators = [], []
        for place in range(first, first + size):
            epoch, index = divmod(place, len(data))
            chosen.append(data[order(epoch)[index]])
            generators.append(torch.Generator().manual_seed(config.seed * 1_000_000_007 + place))
        batches.append(sat_batch(chosen, config.k, config.anchors, config.keep, generators))
    return batches


def train(model: SatModel, data: list[Sequence], out: Path, config: TrainConfig) -> None:
    """Train, and write the result with train_log.jsonl and training.png to `out`; a killed run resumes from there.

    Runs as it is in several processes: each takes its own part of every step, and gradients are averaged.
    """
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    largest = max((int(s.ids.max()) for s in data), default=0)
    require(largest < vocabulary, f"data: token id {largest} is not in the vocabulary of {model.name}; distil with that model")
    data = [s for s in data if len(s.ids) > s.prompt_length + 1]  # SAT 1 needs two tokens of answer
    require(len(data) > config.held_out, f"data: {len(data)} sequences, expected more than held_out={config.held_out}")
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    rank, world = accelerator.process_index, accelerator.num_processes
    held_out, data = data[: config.held_out], data[config.held_out :]
    asked = {tuple(s.ids[: s.prompt_length].tolist()) for s in held_out if s.prompt_length}
    data = [s for s in data if tuple(s.ids[: s.prompt_length].tolist()) not in asked]  # other answers to the same prompts
    require(len(data) > 0, f"held_out={config.held_out}: no sequences with other prompts are left to train on")
    facts = {"sequences": len(data), "answer_tokens": sum(len(s.ids) - s.prompt_length for s in data)}
    state = _open(out, config, {"model": model.name, "processes": world, **facts})
    mode: Mode = MODES[config.mode](model, config, accelerator)
    if state["step"]:
        mode.restore(out / f"checkpoint_{state['step']}")
    else:
        state["log"] = [{"step": 0, **mode.evaluate(held_out), "sat_predictions": 0, "seconds": 0.0}]
    order = lru_cache(maxsize=2)(lambda epoch: _epoch_order(data, config.seed * 1_000_003 + epoch))  # a step may touch two
    quiet = not accelerator.is_local_main_process
    bar = tqdm(range(state["step"], config.steps), initial=state["step"], total=config.steps, desc="train", disable=quiet)
    for step in bar:
        began = time.perf_counter()
        batches = _batches_of_step(data, order, config, step, rank, world)
        counts = [[mode.weight(batch), float((batch.depth > 0).sum())] for batch in batches]
        total, predictions = accelerator.reduce(torch.tensor(counts, device=model.device).sum(0)).tolist()
        loss = torch.zeros((), device=model.device)
        for batch in batches:
            part = mode.loss(batch.to(model.device)) * world / total
            part.backward()
            loss += part.detach()
        mode.average_gradients()
        mode.before_update(step)
        norm = accelerator.clip_grad_norm_(mode.parameters(), config.clip)
        for group in mode.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        mode.optimizer.step()
        mode.optimizer.zero_grad(set_to_none=True)
        mean_loss = accelerator.reduce(loss, "mean").item()
        state["predictions"] += int(predictions)
        state["seconds"] += time.perf_counter() - began
        bar.set_postfix(loss=f"{mean_loss:.3f}")
        if (step + 1) % config.eval_every and step + 1 < config.steps:
            continue
        entry = {
            "step": step + 1,
            "loss": round(mean_loss, 4),
            "lr": learning_rate(config, step),
            "grad_norm": round(float(norm), 4),
        }
        entry |= mode.evaluate(held_out)
        entry |= {"sat_predictions": state["predictions"], "seconds": round(state["seconds"], 1)}
        state["step"], state["log"] = step + 1, [*state["log"], entry]
        if not quiet:
            bar.write(json.dumps(entry))
        with writing(out):
            _checkpoint(out, mode, state, config, accelerator)
    final = state["log"][-1]
    with writing(out):
        mode.save(out, {"config": asdict(config), **facts, **{key: final[key] for key in final if key not in ("lr", "loss")}})


def _checkpoint(out: Path, mode: Mode, state: dict[str, Any], config: TrainConfig, accelerator: Accelerator) -> None:
    """Write `checkpoint_<step>`, whose state.json comes last and makes it valid; then drop older ones."""
    folder = out / f"checkpoint_{state['step']}"
    folder.mkdir(exist_ok=True)
    mode.store(folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(folder / "state.json", {**state, "config": asdict(config)})  # last: it makes the checkpoint valid
        for other in out.glob("checkpoint_*"):
            if other != folder:
                shutil.rmtree(other)
        (out / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in state["log"]))
        plot_training(state["log"], out / "training.png")
    accelerator.wait_for_everyone()


def _open(out: Path, config: TrainConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """The state to start from: of the latest checkpoint in `out`, of a run with these settings (but for `steps`) and facts.

    With other steps the schedule goes on as if they had been asked for from the start. A run that has done all its steps
    goes straight to saving its result.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out}: cannot be written ({error})") from None
    files = list(out.glob("checkpoint_*/state.json"))
    if not files:
        return {"step": 0, "predictions": 0, "seconds": 0.0, "log": [], "facts": facts}
    state = max((read_json(file) for file in files), key=lambda state: state["step"])
    held = TrainConfig(**{**state.pop("config"), "steps": config.steps})
    require(held == config, f"out={out}: holds a run of other settings, {held}; choose another folder")
    require(state["facts"] == facts, f"out={out}: holds a run on {state['facts']}, not {facts}; choose another folder")
    require(state["step"] <= config.steps, f"steps={config.steps}: the run in {out} has done {state['step']}; expected more")
    return state
