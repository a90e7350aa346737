"""Draft quality on held-out answers, by depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListOf
from typing import Any

import torch
from torch import Tensor

from sdsat.config import require
from sdsat.training.loss import IGNORED, SatBatch, joint_logits, require_finite, sat_batch
from sdsat.training.shards import Sequence


@torch.no_grad()
def evaluate(
    predict: Callable[[SatBatch], Tensor],
    sequences: ListOf[Sequence],
    k: int,
    device: torch.device,
    anchors: int = 16,
) -> dict[str, Any]:
    """Measure how good drafts are on given answers, at `anchors` random places of each.

    Args:
        predict: the logits [M, V] of a batch's labelled SAT rows.
        sequences: prompts with their answers.
        k: depth of the drafts.
        device: on which batches are made.
        anchors: places of each answer.

    Returns:
        Figures, of which lists hold one number a depth, 1..k. accuracy_by_depth: how often SAT i's
        best token is the one that followed. confidence_by_depth: the probability that it gives its
        best token, on average; calibration_error_by_depth: how far the two are apart, on average
        over tenths of confidence. lost_by_depth: share of places where a chain breaks at this
        depth. accepted_per_loop: accepted drafts of a chain of k. predictions: how many SATs these
        figures rest on.

    Raises:
        InputError: for answers of less than two tokens, and for logits that are not finite.
    """
    hits: list[Tensor] = []
    confidences: list[Tensor] = []
    depths: list[Tensor] = []
    # For each group, the depth after which nothing is accepted: 0..its length.
    first_misses: list[Tensor] = []
    lengths: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for sequence in sequences:
        batch = sat_batch([sequence], k, anchors, 1.0, [generator]).to(device)
        labelled = batch.label != IGNORED
        if not labelled.any():
            continue
        confidence, best = predict(batch).float().softmax(-1).max(-1)
        require_finite(confidence)
        hit = (best == batch.label[labelled]).float().cpu()
        depth = batch.depth[labelled].cpu()
        groups = hit.tensor_split((depth == 1).nonzero()[1:, 0])
        first_misses += [group.cumprod(0).sum() for group in groups]
        lengths += [torch.tensor(len(group)) for group in groups]
        hits = [*hits, hit]
        confidences = [*confidences, confidence.cpu()]
        depths = [*depths, depth]
    require(
        sum(map(len, hits)) > 0,
        "answers: none has two tokens or more, which the first SAT needs to have a target",
    )
    hit = torch.cat(hits)
    confidence = torch.cat(confidences)
    depth = torch.cat(depths)
    accepted = torch.stack(first_misses)
    length = torch.stack(lengths)
    of_depth = [depth == i for i in range(1, k + 1)]
    return {
        "accuracy_by_depth": _rounded(hit[rows].mean() for rows in of_depth),
        "confidence_by_depth": _rounded(confidence[rows].mean() for rows in of_depth),
        "calibration_error_by_depth": _rounded(
            _calibration_error(hit[rows], confidence[rows]) for rows in of_depth
        ),
        "lost_by_depth": _rounded(
            ((accepted == i) & (length > i)).float().mean() for i in range(k)
        ),
        "accepted_per_loop": round(accepted.mean().item(), 4),
        "predictions": len(hit),
    }


@torch.no_grad()
def standard_loss(
    forward: Callable[..., Any],
    sat_token_id: int,
    sequences: ListOf[Sequence],
    device: torch.device,
) -> float:
    """Compute the mean cross-entropy, in nats, of the answers' standard tokens.

    That is what full mode must not spoil.

    Args:
        forward: see `joint_logits`.
        sat_token_id: of the SAT.
        sequences: prompts with their answers.
        device: on which batches are made.

    Raises:
        InputError: for a loss that is not finite.
    """
    total = 0.0
    count = 0
    for sequence in sequences:
        batch = sat_batch([sequence], 1, 1, 1.0, [torch.Generator().manual_seed(0)]).to(device)
        _, logits = joint_logits(forward, sat_token_id, batch)
        labels = batch.standard.flatten()
        total += torch.nn.functional.cross_entropy(
            logits[0].float(), labels, ignore_index=IGNORED, reduction="sum"
        ).item()
        count += batch.num_standard
    require_finite(torch.tensor(total))
    return round(total / count, 4)


def _calibration_error(hit: Tensor, confidence: Tensor) -> Tensor:
    """Average the distance of confidence and accuracy over ten bins of confidence.

    Bins count by their sizes (arXiv 1706.04599).
    """
    if not len(hit):
        return torch.tensor(0.0)
    tenth = (confidence * 10).long().clamp(max=9)
    gap = torch.zeros(10).scatter_add(0, tenth, confidence - hit)
    return gap.abs().sum() / len(hit)


def _rounded(values: Iterable[Tensor]) -> list[float]:
    return [round(value.nan_to_num().item(), 4) for value in values]
