"""Adapter training: an accelerate loop around loss.py, which resumes exactly where it was killed.

    sdsat train --data runs/data --out runs/adapter --steps 2000
    accelerate launch --num_processes 8 -m sdsat train --data runs/data --out runs/adapter

Several processes on a CPU are started by `torchrun --nproc-per-node 2 -m sdsat train ...` instead.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from .adapter import AdapterConfig, SatAdapter, sample_weights
from .adapter import load as load_adapter
from .config import InputError, SatConfig, require
from .data import Sequence
from .loss import SatBatch, evaluate, sat_batch, sat_loss
from .model import SatModel
from .report import plot_training


@dataclass(frozen=True)
class TrainConfig:
    """steps of `batch_size` sequences per process and micro-batch, with up to `anchors` SAT groups each.

    keep: depth i+1 of a group exists with this probability given depth i; expected rows a group (1 - keep^k) / (1 - keep).
    soft: share of distillation from the base's own distribution in the loss. decay: loss weight of a depth relative to the
    one before. accumulate: micro-batches a step.
    init: directory of an adapter of the same base and rank to start from, instead of from nothing.
    """

    steps: int = 2000
    k: int = 7
    rank: int = 32
    anchors: int = 96
    keep: float = 0.8
    soft: float = 0.0
    decay: float = 1.0
    batch_size: int = 2
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 50
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 200
    held_out: int = 48
    init: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "k", "rank", "anchors", "batch_size", "accumulate", "eval_every", "held_out"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: expected 1 or more")
        require(0 < self.keep <= 1, f"keep={self.keep}: expected a number in (0, 1]")
        require(0 <= self.soft <= 1, f"soft={self.soft}: expected a number from 0 to 1")
        require(0 < self.decay <= 1, f"decay={self.decay}: expected a number in (0, 1]")
        require(self.k <= 16, f"k={self.k}: expected 16 or less")
        require(self.lr > 0, f"lr={self.lr}: expected a positive number")


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


def train(model: SatModel, data: list[Sequence], out: Path, config: TrainConfig) -> SatAdapter:
    """Train an adapter for a plain model; resumes from `out/checkpoint.pt`, and writes the adapter and train_log.jsonl.

    Runs as it is under `accelerate launch`: each process takes its own part of every step and gradients are averaged.
    """
    require(model.sat is None, f"model={model.name}: expected a plain base model, this one already has SATs")
    require(len(data) > config.held_out, f"data: {len(data)} sequences, expected more than held_out={config.held_out}")
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    held_out, data = data[: config.held_out], data[config.held_out :]
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    facts = {"sequences": len(data), "answer_tokens": sum(len(s.ids) - s.prompt_length for s in data)}
    settings = AdapterConfig(model.name, SatConfig(vocabulary, config.k), config.rank, base_sample=sample_weights(model.model))
    torch.manual_seed(config.seed)
    adapter = SatAdapter(model.model, settings).float()
    if config.init is not None:
        start = load_adapter(model.model, config.init)
        require(start.config.rank == config.rank, f"init={config.init}: its rank is {start.config.rank}, expected {config.rank}")
        adapter.load_state_dict(start.state_dict())
    adapter.attach(model.model)
    learner = replace(model, sat=settings.sat, adapter=adapter)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    state = _resume(out, adapter, optimizer, config)
    log = out / "train_log.jsonl"
    order = lru_cache(maxsize=2)(lambda epoch: _epoch_order(data, config.seed * 1_000_003 + epoch))  # a step may touch two
    bar = tqdm(range(state["step"], config.steps), initial=state["step"], total=config.steps, desc="train")
    for step in bar:
        began = time.perf_counter()
        sums = torch.zeros(3, device=model.device)  # loss, weights, predictions
        for batch in _batches_of_step(data, order, config, step, accelerator.process_index, accelerator.num_processes):
            loss, weight = sat_loss(learner, batch.to(model.device), config.soft, config.decay)
            loss.backward()
            sums += torch.stack([loss.detach(), weight, (batch.depth > 0).sum().to(weight)])
        loss_sum, total, predictions = accelerator.reduce(sums).tolist()
        for parameter in adapter.parameters():
            parameter.grad = accelerator.reduce(parameter.grad) / total
        norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["predictions"] += int(predictions)
        state["seconds"] += time.perf_counter() - began
        bar.set_postfix(loss=f"{loss_sum / total:.3f}")
        if (step + 1) % config.eval_every and step + 1 < config.steps:
            continue
        entry = {"step": step + 1, "loss": round(loss_sum / total, 4), "lr": learning_rate(config, step)}
        entry |= {"grad_norm": round(float(norm), 4), **evaluate(learner, held_out, config.k)}
        entry |= {"sat_predictions": state["predictions"], "seconds": round(state["seconds"], 1)}
        bar.write(json.dumps(entry))
        state["step"], state["log"] = step + 1, [*state["log"], entry]
        if accelerator.is_main_process:
            _checkpoint(out, adapter, optimizer, state, config)
            log.write_text("".join(json.dumps(line) + "\n" for line in state["log"]))
            plot_training(state["log"], out / "training.png")
    final = state["log"][-1]
    training = {"config": asdict(config), **facts, **{key: final[key] for key in final if key not in ("lr", "loss")}}
    adapter.config = replace(adapter.config, training=training)
    if accelerator.is_main_process:
        adapter.save(out)
    adapter.detach()
    return adapter


def _checkpoint(out: Path, adapter: SatAdapter, optimizer: Any, state: dict[str, Any], config: TrainConfig) -> None:
    part = out / "checkpoint.part"
    content = {"adapter": adapter.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**content, "state": state, "config": asdict(config)}, part)
    part.replace(out / "checkpoint.pt")


def _resume(out: Path, adapter: SatAdapter, optimizer: Any, config: TrainConfig) -> dict[str, Any]:
    """Load `out/checkpoint.pt` where there is one; its settings must be those of this run, but for the number of steps.

    With other steps the schedule goes on as if they had been asked for from the start.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out}: cannot be written ({error})") from None
    file = out / "checkpoint.pt"
    if not file.exists():
        return {"step": 0, "predictions": 0, "seconds": 0.0, "log": []}
    saved = torch.load(file, weights_only=True)
    held = TrainConfig(**{**saved["config"], "steps": config.steps})
    require(held == config, f"out={out}: holds a run of other settings, {held}; choose another folder")
    done = saved["state"]["step"]
    require(done < config.steps, f"steps={config.steps}: the run in {out} has done {done}; expected more")
    adapter.load_state_dict(saved["adapter"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["state"]
