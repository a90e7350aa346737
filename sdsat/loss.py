"""The training loss: groups of SATs after sampled anchors, beside one pass of the frozen base.

For a sequence of standard tokens and anchors t, a group of SATs at positions t+1..t+k sees the standard tokens up to t
and the earlier SATs of its group, and SAT i learns to predict token t+i+1 (method: SDSAT, arXiv 2403.18647; frozen base
with gated updates: arXiv 2507.11851; shorter groups for cheaper depth: PARD, arXiv 2504.18583). The base runs once per
sequence; all groups share its key/values, and its own next-token distribution there is what distillation learns from.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapter import SatAdapter
from .cache import SharedPrefix, SlotCache
from .data import Sequence
from .model import SatModel

IGNORED = -100  # label of a row that only pads


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

    def to(self, device: torch.device) -> SatBatch:
        return SatBatch(*(tensor.to(device) for tensor in vars(self).values()))


def sat_batch(sequences: ListOf[Sequence], k: int, anchors: int, keep: float, generators: ListOf[torch.Generator]) -> SatBatch:
    """Sample anchors among the answer's positions and a group length for each; every sequence has its own random numbers."""
    rows_of: list[list[tuple[int, int, int]]] = []
    for sequence, generator in zip(sequences, generators, strict=True):
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


def sat_logits(model: SatModel, adapter: SatAdapter, batch: SatBatch) -> tuple[Tensor, Tensor]:
    """What SATs and base predict. Gradients reach the adapter only.

    Returns (logits [M, V] of the M labelled SAT rows of the batch, row by row; hidden [B, L, D], the base's last hidden
    states, from which it predicts token t + 1 at position t).
    """
    size, length = batch.tokens.shape
    lm = model.model
    filled = SlotCache(lm.config.num_hidden_layers, length)
    positions = torch.arange(length, device=batch.tokens.device)
    with torch.no_grad():
        causal = (positions <= positions[:, None]).expand(size, 1, length, length)
        base = lm.base_model(
            input_ids=batch.tokens, attention_mask=causal, position_ids=positions[None], past_key_values=filled
        ).last_hidden_state
        filled.commit(tuple(range(length)))
    embeddings = adapter.sat_embedding.to(model.dtype).expand(size, batch.depth.shape[1], -1)
    with adapter.on_rows(0, batch.depth.shape[1]):
        hidden = lm.base_model(
            inputs_embeds=embeddings,
            attention_mask=sat_mask(batch),
            position_ids=batch.anchor + batch.depth,
            past_key_values=SharedPrefix(filled),
        ).last_hidden_state
    return lm.get_output_embeddings()(hidden[batch.label != IGNORED]), base


def sat_loss(
    model: SatModel, adapter: SatAdapter, batch: SatBatch, soft: float = 0.0, decay: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Summed loss of all labelled rows, and the summed weights to divide it by.

    A SAT's loss is its cross-entropy with the token that followed (hard labels), or with the base's own distribution at
    that place (distillation, arXiv 1503.02531); soft: the share of the latter, 0 to 1. decay: weight of each depth
    relative to the one before.
    """
    labelled = batch.label != IGNORED
    logits, base = sat_logits(model, adapter, batch)
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_q = logits.to(wide).log_softmax(-1)
    loss = -log_q.gather(-1, batch.label[labelled][:, None])[:, 0]
    if soft:
        sequence = torch.arange(batch.tokens.shape[0], device=batch.tokens.device)[:, None].expand_as(batch.anchor)
        place = torch.stack([sequence, batch.anchor + batch.depth])[:, labelled]  # where the base predicts the same token
        (rows, columns), index = place.unique(dim=1, return_inverse=True)
        with torch.no_grad():
            p = model.model.get_output_embeddings()(base[rows, columns]).to(wide).softmax(-1)
        loss = (1 - soft) * loss - soft * (p[index] * log_q).sum(-1)
    weight = decay ** (batch.depth[labelled] - 1).to(wide)
    return (weight * loss).sum(), weight.sum()


@torch.no_grad()
def evaluate(model: SatModel, adapter: SatAdapter, sequences: list[Sequence], k: int) -> dict[str, Any]:
    """Accuracy by depth, and the accepted drafts per loop a chain would get, on held-out answers (16 anchors each)."""
    correct, total, accepted, groups = torch.zeros(k), torch.zeros(k), 0.0, 0
    generator = torch.Generator().manual_seed(0)
    for sequence in sequences:
        batch = sat_batch([sequence], k, 16, 1.0, [generator]).to(model.device)
        labelled = batch.label != IGNORED
        hit = (sat_logits(model, adapter, batch)[0].argmax(-1) == batch.label[labelled]).float().cpu()
        depth, anchor = batch.depth[labelled].cpu(), batch.anchor[labelled].cpu()
        correct.scatter_add_(0, depth - 1, hit)
        total.scatter_add_(0, depth - 1, torch.ones_like(hit))
        for t in anchor.unique():
            accepted += hit[anchor == t].cumprod(0).sum().item()
            groups += 1
    accuracy = [round(value, 4) for value in (correct / total.clamp(min=1)).tolist()]
    return {"accuracy_by_depth": accuracy, "accepted_per_loop": round(accepted / max(groups, 1), 4)}
