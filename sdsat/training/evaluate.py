"""Draft quality on held-out answers, by depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sdsat.config import require
from sdsat.models.head import SHORTLIST
from sdsat.training.loss import IGNORED, SatBatch, joint_logits, require_finite, sat_batch
from sdsat.training.shards import TrainingExample

BEST = (1, 4, 16, SHORTLIST)  # so many best tokens of a SAT; the last are what a draft head ranks


@torch.no_grad()
def evaluate(
    predict: Callable[[SatBatch], Tensor],
    sequences: Sequence[TrainingExample],
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
    for batch, logits in _predictions(predict, sequences, k, device, anchors):
        labelled = batch.label != IGNORED
        confidence, best = logits.softmax(-1).max(-1)
        hits.append((best == batch.label[labelled]).float().cpu())
        confidences.append(confidence.cpu())
        depths.append(batch.depth[labelled].cpu())
    hit = torch.cat(hits)
    confidence = torch.cat(confidences)
    depth = torch.cat(depths)
    accepted, length = _chains(hit, depth)
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
def among_best(
    predict: Callable[[SatBatch], Tensor],
    sequences: Sequence[TrainingExample],
    k: int,
    device: torch.device,
    anchors: int = 16,
) -> dict[str, Any]:
    """Measure how often the token that followed is among a SAT's best, at the places of `evaluate`.

    Args:
        predict: as of `evaluate`; for what a draft head chooses among, without the head.
        sequences: as of `evaluate`.
        k: as of `evaluate`.
        device: as of `evaluate`.
        anchors: as of `evaluate`.

    Returns:
        For each n of BEST, as a text: among_best_by_depth, shares of places where the token is
        among the best n, one a depth; accepted_of_best, accepted drafts of a chain of k if the
        right one among the best n could be known, for the last n the *best path*. And
        proposed_per_loop: drafts of a chain, less than k where an answer ends.

    Raises:
        InputError: as `evaluate`.
    """
    ranks: list[Tensor] = []
    depths: list[Tensor] = []
    for batch, logits in _predictions(predict, sequences, k, device, anchors):
        labelled = batch.label != IGNORED
        label = batch.label[labelled][:, None]
        score = logits.gather(-1, label)
        ids = torch.arange(logits.shape[-1], device=logits.device)
        # Of equal logits the first is the best, as for argmax.
        ahead = (logits > score) | ((logits == score) & (ids < label))
        # What can't be guessed is behind all.
        never = score[:, 0].isneginf()
        ranks.append(ahead.sum(-1).masked_fill(never, logits.shape[-1] + max(BEST)).cpu())
        depths.append(batch.depth[labelled].cpu())
    rank = torch.cat(ranks)
    depth = torch.cat(depths)
    hits = {str(n): (rank < n).float() for n in BEST}
    accepted = {n: _chains(hit, depth)[0].mean() for n, hit in hits.items()}
    return {
        "among_best_by_depth": {
            n: _rounded(hit[depth == i].mean() for i in range(1, k + 1)) for n, hit in hits.items()
        },
        "accepted_of_best": dict(zip(accepted, _rounded(accepted.values()), strict=True)),
        "proposed_per_loop": round(len(rank) / int((depth == 1).sum()), 4),
    }


def _predictions(
    predict: Callable[[SatBatch], Tensor],
    sequences: Sequence[TrainingExample],
    k: int,
    device: torch.device,
    anchors: int,
) -> Iterator[tuple[SatBatch, Tensor]]:
    """Yield the SATs at random places of each answer, always the same ones, and their logits.

    Arguments, and what is raised, are those of `evaluate`.
    """
    generator = torch.Generator().manual_seed(0)
    found = False
    for sequence in sequences:
        batch = sat_batch([sequence], k, anchors, 1.0, [generator]).to(device)
        if (batch.label != IGNORED).any():
            logits = predict(batch).float()
            require_finite(logits.amax(-1))
            yield batch, logits
            found = True
    require(
        found, "answers: none has two tokens or more, which the first SAT needs to have a target"
    )


def _chains(hit: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Count the accepted drafts of each group, up to the first miss, and its drafts in all.

    hit: [M] 1 where a draft is right, 0 elsewhere. depth: [M], from 1 on in each group.
    """
    groups = hit.tensor_split((depth == 1).nonzero()[1:, 0])
    accepted = torch.stack([group.cumprod(0).sum() for group in groups])
    return accepted, torch.tensor([len(group) for group in groups])


@torch.no_grad()
def standard_loss(
    forward: Callable[..., Any],
    sat_token_id: int,
    sequences: Sequence[TrainingExample],
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
