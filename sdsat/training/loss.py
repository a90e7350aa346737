"""The training loss: groups of SATs after sampled anchors, beside one pass of the frozen base.

For a sequence of standard tokens and anchors t, a group of SATs at positions t+1..t+k sees the
standard tokens up to t and the earlier SATs of its group, and SAT i learns to predict token t+i+1
(method: SDSAT, arXiv 2403.18647; frozen base with gated updates: arXiv 2507.11851; shorter groups
for cheaper depth: PARD, arXiv 2504.18583). The base runs once per sequence; all groups share its
key/values, and its own next-token distribution there is what distillation learns from. In full mode
(the paper's), standard tokens and SATs go through one pass, and all weights learn from both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor

from sdsat.config import MAX_K, require
from sdsat.engines.cache import SharedPrefix, SlotCache
from sdsat.method.copies import LONGEST, NONE, copied
from sdsat.models.attention import layer_masks
from sdsat.models.head import SHORTLIST
from sdsat.models.packed import in_use
from sdsat.models.sat_model import SatModel
from sdsat.training.shards import TrainingExample

IGNORED = -100  # label of a row that only pads


@dataclass(frozen=True)
class SatBatch:
    """B sequences of L standard tokens with R SAT rows each.

    Row r is SAT `depth` of the group after position `anchor`, and learns token tokens[anchor +
    depth + 1]. A group's rows are adjacent, depth ascending. Padding rows have depth 0 and label
    IGNORED.

    Attributes:
        tokens: [B, L] standard tokens, right-padded with 0.
        standard: [B, L] the token after each, IGNORED outside the answer.
        anchor: [B, R] the position after which the row's group stands.
        depth: [B, R] 1..k.
        label: [B, R] the token to learn.
    """

    tokens: Tensor
    standard: Tensor
    anchor: Tensor
    depth: Tensor
    label: Tensor

    def to(self, device: torch.device) -> SatBatch:
        """Move all tensors to a device."""
        return SatBatch(*(tensor.to(device) for tensor in vars(self).values()))

    @property
    def before(self) -> Tensor:
        """[M, LONGEST] for each labelled row, the tokens before the one it learns, NONE if fewer.

        A draft head sees them.
        """
        padded = torch.nn.functional.pad(self.tokens, (LONGEST - 1, 0), value=NONE)
        places = self.anchor + self.depth
        found = [padded.gather(1, places + n) for n in range(LONGEST)]
        return torch.stack(found, -1)[self.label != IGNORED]

    @property
    def text(self) -> tuple[Tensor, Tensor]:
        """[M, L] for each labelled row, its sequence, and [M] how much of it drafting knows.

        That goes up to the token before the group's first draft.
        """
        return self.tokens[self.sequence], self.known

    @property
    def sequence(self) -> Tensor:
        """[M] the sequence of each labelled row."""
        return (self.label != IGNORED).nonzero()[:, 0]

    @property
    def known(self) -> Tensor:
        """[M] how many tokens of its sequence are known where a labelled row drafts."""
        return self.anchor[self.label != IGNORED] + 2

    @property
    def num_standard(self) -> int:
        """The number of standard tokens that are learned in full mode."""
        return int((self.standard != IGNORED).sum())

    def weights(self, decay: float) -> Tensor:
        """Compute [M] loss weights of the labelled rows.

        Each depth's is `decay` times that of the depth before.
        """
        return decay ** (self.depth[self.label != IGNORED] - 1).double()


def sat_batch(
    sequences: Sequence[TrainingExample],
    k: int,
    anchors: int,
    keep: float,
    generators: Sequence[torch.Generator],
) -> SatBatch:
    """Sample anchors among the answer's positions and a group length for each.

    Args:
        sequences: B of them.
        k: SATs a group at most.
        anchors: groups a sequence at most.
        keep: with this probability a group goes one deeper.
        generators: one a sequence, which has its own random numbers.
    """
    rows_of: list[list[tuple[int, int, int]]] = []
    for sequence, generator in zip(sequences, generators, strict=True):
        ids = sequence.ids.tolist()
        # SAT 1 of the last anchor still has a target
        first = max(sequence.prompt_length - 1, 0)
        last = len(ids) - 3
        chosen = (
            first
            + torch.randperm(max(last - first + 1, 0), generator=generator)[:anchors].sort().values
        )
        lengths = 1 + (torch.rand(len(chosen), k - 1, generator=generator) < keep).int().cumprod(
            1
        ).sum(1)
        rows = []
        for t, length in zip(chosen.tolist(), lengths.tolist(), strict=True):
            rows += [(t, i, ids[t + i + 1]) for i in range(1, length + 1) if t + i + 1 < len(ids)]
        rows_of.append(rows)
    width = max(1, *map(len, rows_of))
    length = max(len(s.ids) for s in sequences)
    padded = torch.tensor([rows + [(0, 0, IGNORED)] * (width - len(rows)) for rows in rows_of])
    tokens = torch.stack(
        [torch.nn.functional.pad(s.ids, (0, length - len(s.ids))) for s in sequences]
    )
    standard = torch.full_like(tokens, IGNORED)
    for row, sequence in zip(standard, sequences, strict=True):
        first = max(sequence.prompt_length - 1, 0)
        row[first : len(sequence.ids) - 1] = sequence.ids[first + 1 :]
    return SatBatch(tokens, standard, *padded.unbind(-1))


def sat_mask(batch: SatBatch) -> Tensor:
    """Make the mask of SATs, [B, 1, R, L + R] bool.

    A SAT sees the standard tokens up to its anchor and the SATs of its group up to itself.

        L = 4, groups of 2 after anchors 0 and 2:   1 0 0 0 | 1
                                                    1 0 0 0 | 1 1
                                                    1 1 1 0 |     1
                                                    1 1 1 0 |     1 1
    """
    columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    standard = columns <= batch.anchor[..., None]
    rows = torch.arange(batch.depth.shape[1], device=batch.tokens.device)
    # The first row of each row's group: groups are contiguous.
    start = rows - (batch.depth - 1).clamp(min=0)
    own = (start[..., None] <= rows) & (rows <= rows[:, None])
    return torch.cat([standard, own], dim=-1)[:, None]


@in_use()
def sat_states(model: SatModel, batch: SatBatch) -> tuple[Tensor, Tensor]:
    """Compute the last hidden states of SATs and base.

    Gradients reach the model's adapter only.

    Returns (states [M, D] of the M labelled SAT rows of the batch, row by row; states [B, L, D] of
    the standard tokens, of which the one at t predicts token t + 1).
    """
    size, length = batch.tokens.shape
    filled = SlotCache(model.num_layers, length)
    positions = torch.arange(length, device=batch.tokens.device)
    with torch.no_grad():
        causal = (positions <= positions[:, None]).expand(size, 1, length, length)
        mask = model.mask(causal, positions[None], positions[None])
        base = model.states(model.embed_standard(batch.tokens), mask, positions[None], filled)
        filled.commit(tuple(range(length)))
    assert model.sat is not None
    places = batch.anchor + batch.depth
    with model.sat_rows(0, batch.depth.shape[1]):
        ids = torch.tensor(model.sat.ids(MAX_K), device=batch.depth.device)
        sats = model.embed(ids[(batch.depth - 1).clamp(min=0)])
        columns = torch.cat([positions.expand(size, length), places], dim=1)
        mask = model.mask(sat_mask(batch), places, columns)
        hidden = model.states(sats, mask, places, SharedPrefix(filled))
    return hidden[batch.label != IGNORED], base


def sat_logits(model: SatModel, batch: SatBatch, states: Tensor) -> tuple[Tensor, Tensor | None]:
    """Compute what the M labelled SATs of a batch say, before a draft head.

    Args:
        model: with SATs.
        batch: the SATs'.
        states: [M, D] of the SATs.

    Returns:
        Logits [M, C], and the token [C] of each; None in place of that: C are all tokens. With a
        draft vocabulary C are its tokens and all others of the batch, with -inf where a row's own
        text, as far as drafting knows it, has not had them.
    """
    if model.draft_ids is None:
        return model.logits(states), None
    tokens = batch.tokens
    outside = ~torch.isin(tokens, model.draft_ids)
    others = tokens[outside].unique()
    ids = torch.cat([model.draft_ids, others])
    # Where each of the others comes first: [B, E], L where it doesn't. The last column is no one's.
    count = len(others)
    columns = torch.searchsorted(others, tokens).masked_fill(~outside, count)
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    first = tokens.new_full((len(tokens), count + 1), tokens.shape[1])
    first = first.scatter_reduce(1, columns, places, "amin")[:, :count]
    unseen = first[batch.sequence] >= batch.known[:, None]
    logits = model.logits_of(states, ids)
    size = len(model.draft_ids)
    masked = logits[:, size:].masked_fill(unseen, -torch.inf)
    return torch.cat([logits[:, :size], masked], 1), ids


def _ranked(
    model: SatModel, batch: SatBatch, states: Tensor, logits: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rank the best tokens of the M labelled SATs of a batch as the draft head does.

    Args:
        model: with a head.
        batch: the SATs'.
        states: [M, D] of the SATs.
        logits: [M, C] of the SATs.
        ids: [C] their tokens, as of `sat_logits`.

    Returns:
        (places [M, S] of the best among the C, scores [M, S]).
    """
    assert model.head is not None
    # So many can be guessed at any place.
    most = logits.shape[-1] if model.draft_ids is None else len(model.draft_ids)
    scores, places = logits.topk(min(SHORTLIST, most))
    tokens = places if ids is None else ids[places]
    rows = model.output_rows(tokens)
    before = batch.before
    found = copied(*batch.text, before, tokens)
    embedded = model.embed_standard(before[:, -1])
    return places, model.head.rerank(scores, states, embedded, rows, found)


def over_all(logits: Tensor, ids: Tensor | None, vocabulary: int) -> Tensor:
    """Spread logits [M, C] of the tokens ids [C] over all, [M, V]; -inf where there is none."""
    if ids is None:
        return logits
    return logits.new_full((len(logits), vocabulary), -torch.inf).index_copy(1, ids, logits)


def predict(model: SatModel, batch: SatBatch, states: Tensor | None = None) -> Tensor:
    """Compute [M, V] logits of the labelled SAT rows.

    They are as decoding would have them where all drafts before are right. A draft head shares the
    probability of a SAT's shortlist out anew among its tokens; the others keep theirs.

    states: those of `sat_states`, where they are there already.
    """
    if states is None:
        states, _ = sat_states(model, batch)
    logits, ids = sat_logits(model, batch, states)
    if model.head is not None:
        places, scores = _ranked(model, batch, states, logits, ids)
        share = logits.gather(-1, places).logsumexp(-1, keepdim=True)
        logits = logits.scatter(-1, places, scores.log_softmax(-1) + share)
    return over_all(logits, ids, model.vocabulary)


def sat_loss(model: SatModel, batch: SatBatch, soft: float = 0.0, decay: float = 1.0) -> Tensor:
    """Sum the loss of all labelled rows: divide it by the sum of `batch.weights(decay)`.

    Gradients reach the model's adapter only.

    A SAT's loss is its cross-entropy with the token that followed (hard labels), or with the base's
    own distribution at that place (distillation, arXiv 1503.02531). A draft head adds its own
    cross-entropy with the token that followed, over the candidates it ranks, where that token is
    among them. What a SAT cannot guess, for want of it in the draft vocabulary, is not learned.

    Args:
        model: with SATs.
        batch: what is learned.
        soft: the share of the base's own distribution, 0 to 1.
        decay: loss weight of a depth relative to the one before.
    """
    states, base = sat_states(model, batch)
    logits, ids = sat_logits(model, batch, states)

    def teacher(rows: Tensor, columns: Tensor) -> Tensor:
        there = base[rows, columns]
        return model.logits(there) if ids is None else model.logits_of(there, ids)

    label, possible = _places_of_labels(batch, logits, ids)
    weights = batch.weights(decay) * possible
    loss = _weighted(logits, batch, label, weights, soft, teacher)
    if model.head is None:
        return loss
    places, scores = _ranked(model, batch, states, logits, ids)
    found, place = (places == label[:, None]).max(-1)
    found &= possible
    wide = torch.promote_types(scores.dtype, torch.float32)
    ranked = torch.nn.functional.cross_entropy(
        scores[found].to(wide), place[found], reduction="none"
    )
    return loss + (weights[found].to(wide) * ranked).sum()


def joint_logits(
    forward: Callable[..., Any], sat_token_id: int, batch: SatBatch
) -> tuple[Tensor, Tensor]:
    """Run standard tokens and SATs in one pass of a causal LM whose weights all train (full mode).

    forward: the LM, or accelerate's wrapper of it. Returns (logits [M, V] of the labelled SAT rows,
    logits [B, L, V] of the standard tokens, which no SAT can influence).
    """
    size, length = batch.tokens.shape
    width = batch.depth.shape[1]
    positions = torch.arange(length, device=batch.tokens.device)
    causal = (positions <= positions[:, None]).expand(size, 1, length, length)
    attend = torch.cat([torch.nn.functional.pad(causal, (0, width)), sat_mask(batch)], dim=2)
    places = torch.cat([positions.expand(size, length), batch.anchor + batch.depth], dim=1)
    logits = forward(
        input_ids=torch.cat([batch.tokens, torch.full_like(batch.depth, sat_token_id)], dim=1),
        attention_mask=layer_masks(
            extract_model_from_parallel(forward).config, attend, places, places
        ),
        position_ids=places,
        use_cache=False,
    ).logits
    return logits[:, length:][batch.label != IGNORED], logits[:, :length]


def joint_loss(
    forward: Callable[..., Any],
    sat_token_id: int,
    batch: SatBatch,
    soft: float = 0.0,
    decay: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sum the losses of SATs and standard tokens in one pass (full mode).

    Args:
        forward: see `joint_logits`.
        sat_token_id: of the SAT.
        batch: what is learned.
        soft: as of `sat_loss`.
        decay: as of `sat_loss`.

    Returns:
        (summed loss of the SATs, as `sat_loss`; summed cross-entropy of the answer's standard
        tokens).
    """
    logits, standard = joint_logits(forward, sat_token_id, batch)
    wide = torch.promote_types(standard.dtype, torch.float32)
    plain = torch.nn.functional.cross_entropy(
        standard.flatten(0, 1).to(wide),
        batch.standard.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    label = batch.label[batch.label != IGNORED]
    sats = _weighted(
        logits,
        batch,
        label,
        batch.weights(decay),
        soft,
        lambda rows, columns: standard.detach()[rows, columns],
    )
    return sats, plain


def _places_of_labels(batch: SatBatch, logits: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Find the labels among the tokens that SATs can guess.

    Args:
        batch: the SATs'.
        logits: [M, C] of the labelled rows.
        ids: [C] their tokens, as of `sat_logits`.

    Returns:
        The place [M] of each label, 0 where a row can't guess it, and whether it can [M].
    """
    label = batch.label[batch.label != IGNORED]
    if ids is None:
        return label, torch.ones_like(label, dtype=torch.bool)
    found, place = (ids == label[:, None]).max(-1)
    possible = found & ~logits.gather(-1, place[:, None])[:, 0].isneginf()
    return place * possible, possible


def _weighted(
    logits: Tensor,
    batch: SatBatch,
    label: Tensor,
    weights: Tensor,
    soft: float,
    teacher: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Sum the SATs' loss.

    Args:
        logits: [M, C] of the labelled SAT rows.
        batch: what is learned.
        label: [M] the place of each row's label among the C.
        weights: [M] of the rows; 0 leaves one out.
        soft: as of `sat_loss`.
        teacher: (rows [U], columns [U]) of standard tokens -> their logits [U, C].
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if soft:
        log_q = logits.to(wide).log_softmax(-1)
        hard = -log_q.gather(-1, label[:, None])[:, 0]
        # Where the base predicts the same token.
        places = (batch.anchor + batch.depth)[batch.label != IGNORED]
        place = torch.stack([batch.sequence, places])
        (rows, columns), index = place.unique(dim=1, return_inverse=True)
        with torch.no_grad():
            theirs = teacher(rows, columns).to(wide)[index]
            p = theirs.masked_fill(logits.isneginf(), -torch.inf).softmax(-1)
        loss = (1 - soft) * hard - soft * (p * log_q.masked_fill(p == 0, 0)).sum(-1)
    else:
        loss = _CrossEntropy.apply(logits, label)
    return (weights.to(wide) * loss).sum()


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] [M] in float32 or wider, logits [M, V], with its gradient.

    It is computed a block of rows at a time. As torch's own, but without copies of all logits in
    float32, forward and back: on a CPU a seventh of a training step.
    """

    BLOCK = 16

    @staticmethod
    def forward(ctx: Any, logits: Tensor, label: Tensor) -> Tensor:
        gradient = torch.empty_like(logits)
        losses = []
        for x, y, d in zip(
            *(part.split(_CrossEntropy.BLOCK) for part in (logits, label, gradient)), strict=True
        ):
            log_q = x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1)
            losses.append(-log_q.gather(-1, y[:, None])[:, 0])
            d.copy_(log_q.exp_().scatter_add_(-1, y[:, None], -torch.ones_like(log_q[:, :1])))
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradients[0].to(gradient.dtype)[:, None] * gradient, None


def require_finite(values: Tensor) -> None:
    """Refuse values that are NaN or infinite; raises InputError."""
    message = (
        "logits: not finite (NaN or infinite) on the given answers; expected a base whose "
        "weights are finite, and a lower lr"
    )
    require(bool(values.isfinite().all()), message)
