"""Adapter training: SAT groups after sampled anchors, on top of the frozen base's own key/values.

    sdsat train --data runs/data --out runs/adapter --steps 2000

For a sequence of standard tokens and anchors t, a group of SATs at positions t+1..t+k sees the standard tokens up to t
and the earlier SATs of its group, and SAT i learns to predict token t+i+1 (method: SDSAT, arXiv 2403.18647; frozen base
with gated updates: arXiv 2507.11851; shorter groups for cheaper depth: PARD, arXiv 2504.18583). The base runs once per
sequence; all groups share its key/values.
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
from torch import Tensor
from tqdm import tqdm

from .adapter import AdapterConfig, SatAdapter, sample_weights
from .adapter import load as load_adapter
from .cache import SharedPrefix, SlotCache
from .config import InputError, SatConfig, require
from .data import Sequence
from .model import SatModel

IGNORED = -100  # label of a row that only pads


@dataclass(frozen=True)
class TrainConfig:
    """steps of `batch_size` sequences with up to `anchors` SAT groups each.

    keep: depth i+1 of a group exists with this probability given depth i; expected rows a group (1 - keep^k) / (1 - keep).
    init: directory of an adapter of the same base and rank to start from, instead of from nothing.
    """

    steps: int = 2000
    k: int = 7
    rank: int = 32
    anchors: int = 96
    keep: float = 0.8
    batch_size: int = 2
    lr: float = 1e-3
    warmup: int = 50
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 200
    held_out: int = 48
    init: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "k", "rank", "anchors", "batch_size", "eval_every", "held_out"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: expected 1 or more")
        require(0 < self.keep <= 1, f"keep={self.keep}: expected a number in (0, 1]")
        require(self.lr > 0, f"lr={self.lr}: expected a positive number")


@dataclass(frozen=True)
class SatBatch:
    """B sequences of L standard tokens with R SAT rows each.

    tokens: [B, L] standard tokens, right-padded with 0. anchor, depth, label: [B, R]; row r is SAT `depth` (1..k) of the
    group after position `anchor`, and learns token tokens[anchor + depth + 1]. A group's rows are adjacent, depth
    ascending. Padding rows have depth 0 and label IGNORED.
    """

    tokens: Tensor
    anchor: Tensor
    depth: Tensor
    label: Tensor


def sat_batch(sequences: list[Sequence], k: int, anchors: int, keep: float, generator: torch.Generator) -> SatBatch:
    """Sample anchors among the answer's positions and a group length for each."""
    rows_of: list[list[tuple[int, int, int]]] = []
    for sequence in sequences:
        ids = sequence.ids.tolist()
        first, last = max(sequence.prompt_length - 1, 0), len(ids) - 3  # SAT 1 of the last anchor still has a target
        chosen = first + torch.randperm(max(last - first + 1, 0), generator=generator)[:anchors].sort().values
        lengths = 1 + (torch.rand(len(chosen), k - 1, generator=generator) < keep).int().cumprod(1).sum(1)
        rows = []
        for t, length in zip(chosen.tolist(), lengths.tolist(), strict=True):
            rows += [(t, i, ids[t + i + 1]) for i in range(1, length + 1) if t + i + 1 < len(ids)]
        rows_of.append(rows)
    width, length = max(1, *map(len, rows_of)), max(len(s.ids) for s in sequences)
    padded = torch.tensor([rows + [(0, 0, IGNORED)] * (width - len(rows)) for rows in rows_of])
    tokens = torch.stack([torch.nn.functional.pad(s.ids, (0, length - len(s.ids))) for s in sequences])
    return SatBatch(tokens, *padded.unbind(-1))


def sat_mask(batch: SatBatch) -> Tensor:
    """[B, 1, R, L + R] bool: a SAT sees the standard tokens up to its anchor and the SATs of its group up to itself.

    L = 4, groups of 2 after anchors 0 and 2:   1 0 0 0 | 1
                                                1 0 0 0 | 1 1
                                                1 1 1 0 |     1
                                                1 1 1 0 |     1 1
    """
    columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    standard = columns <= batch.anchor[..., None]
    rows = torch.arange(batch.depth.shape[1], device=batch.tokens.device)
    start = rows - (batch.depth - 1).clamp(min=0)  # first row of each row's group: groups are contiguous
    own = (start[..., None] <= rows) & (rows <= rows[:, None])
    return torch.cat([standard, own], dim=-1)[:, None]


def sat_logits(model: SatModel, adapter: SatAdapter, batch: SatBatch) -> Tensor:
    """[M, V] logits of the M labelled SAT rows of a batch, row by row; gradients reach the adapter only."""
    size, length = batch.tokens.shape
    lm = model.model
    filled = SlotCache(lm.config.num_hidden_layers, length)
    positions = torch.arange(length, device=batch.tokens.device)
    with torch.no_grad():
        causal = (positions <= positions[:, None]).expand(size, 1, length, length)
        lm.base_model(input_ids=batch.tokens, attention_mask=causal, position_ids=positions[None], past_key_values=filled)
        filled.commit(tuple(range(length)))
    embeddings = adapter.sat_embedding.to(model.dtype).expand(size, batch.depth.shape[1], -1)
    with adapter.on_rows(0, batch.depth.shape[1]):
        hidden = lm.base_model(
            inputs_embeds=embeddings,
            attention_mask=sat_mask(batch),
            position_ids=batch.anchor + batch.depth,
            past_key_values=SharedPrefix(filled),
        ).last_hidden_state
    return lm.get_output_embeddings()(hidden[batch.label != IGNORED])


def sat_loss(model: SatModel, adapter: SatAdapter, batch: SatBatch) -> tuple[Tensor, int]:
    """Summed cross-entropy of all labelled rows, and how many they are."""
    labels = batch.label[batch.label != IGNORED]
    logits = sat_logits(model, adapter, batch).float()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), labels.numel()


@torch.no_grad()
def evaluate(model: SatModel, adapter: SatAdapter, sequences: list[Sequence], k: int) -> dict[str, Any]:
    """Accuracy by depth, and the accepted drafts per loop a chain would get, on held-out answers (16 anchors each)."""
    correct, total, accepted, groups = torch.zeros(k), torch.zeros(k), 0.0, 0
    generator = torch.Generator().manual_seed(0)
    for sequence in sequences:
        batch = _to(sat_batch([sequence], k, 16, 1.0, generator), model.device)
        labelled = batch.label != IGNORED
        hit = (sat_logits(model, adapter, batch).argmax(-1) == batch.label[labelled]).float().cpu()
        depth, anchor = batch.depth[labelled].cpu(), batch.anchor[labelled].cpu()
        correct.scatter_add_(0, depth - 1, hit)
        total.scatter_add_(0, depth - 1, torch.ones_like(hit))
        for t in anchor.unique():
            accepted += hit[anchor == t].cumprod(0).sum().item()
            groups += 1
    accuracy = [round(value, 4) for value in (correct / total.clamp(min=1)).tolist()]
    return {"accuracy_by_depth": accuracy, "accepted_per_loop": round(accepted / max(groups, 1), 4)}


def _to(batch: SatBatch, device: torch.device) -> SatBatch:
    return SatBatch(*(tensor.to(device) for tensor in vars(batch).values()))


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


def _batch_of_step(
    data: list[Sequence], order: Callable[[int], list[int]], config: TrainConfig, step: int, rank: int, world: int
) -> SatBatch:
    """The batch of a step, a function of (seed, step, process) alone, so that a resumed run sees what it would have seen."""
    first = (step * world + rank) * config.batch_size
    chosen = []
    for place in range(first, first + config.batch_size):
        epoch, place = divmod(place, len(data))
        chosen.append(data[order(epoch)[place]])
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 4096 + rank)
    return sat_batch(chosen, config.k, config.anchors, config.keep, generator)


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
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    state = _resume(out, adapter, optimizer, config)
    log = out / "train_log.jsonl"
    order = lru_cache(maxsize=2)(lambda epoch: _epoch_order(data, config.seed * 1_000_003 + epoch))  # a step may touch two
    bar = tqdm(range(state["step"], config.steps), initial=state["step"], total=config.steps, desc="train")
    for step in bar:
        began = time.perf_counter()
        batch = _batch_of_step(data, order, config, step, accelerator.process_index, accelerator.num_processes)
        loss, count = sat_loss(model, adapter, _to(batch, model.device))
        loss.backward()
        total, loss_sum = accelerator.reduce(torch.tensor([float(count), loss.item()], device=model.device)).tolist()
        for parameter in adapter.parameters():
            parameter.grad = accelerator.reduce(parameter.grad) / total
        norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["predictions"] += int(total)
        state["seconds"] += time.perf_counter() - began
        bar.set_postfix(loss=f"{loss_sum / total:.3f}")
        if (step + 1) % config.eval_every and step + 1 < config.steps:
            continue
        entry = {"step": step + 1, "loss": round(loss_sum / total, 4), "lr": learning_rate(config, step)}
        entry |= {"grad_norm": round(float(norm), 4), **evaluate(model, adapter, held_out, config.k)}
        entry |= {"sat_predictions": state["predictions"], "seconds": round(state["seconds"], 1)}
        bar.write(json.dumps(entry))
        state["step"], state["log"] = step + 1, [*state["log"], entry]
        if accelerator.is_main_process:
            _checkpoint(out, adapter, optimizer, state, config)
            log.write_text("".join(json.dumps(line) + "\n" for line in state["log"]))
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
