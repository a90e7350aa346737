"""Sampling: temperature, top-k, top-p, and Gumbel noise of (seed, emitted index, token) alone.

Coupled sampling: `argmax(log p + g)` with Gumbel noise g is an exact sample of p. Because g_t is a
function of (seed, t) and not of the pass that computes p, AR, draft step and verify step share it,
so seeded sampling is as deterministic as greedy decoding and losslessness is an equality (Daliri,
Musco and Suresh, arXiv 2408.07978; Rowan, Phan and Khisti, arXiv 2506.05632). Temperature 0 is the
same code without noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdsat.config import SamplingConfig

# The constants of splitmix64, as signed 64-bit numbers.
_M1 = -4658895280553007687
_M2 = -7723592293110705685
_GOLDEN = -7046029254386353131


LIKELY = 512  # tokens of a row that are sorted, as long as the filters keep none of the others


def _mix(z: Tensor) -> Tensor:
    """Mix the bits of an int64 as splitmix64's finaliser does (wrapping).

    The bits are the same on every device (Steele, Lea and Flood 2014).
    """
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _M1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _M2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def as_seed(seed: int) -> int:
    """Make a signed 64-bit number of any whole number."""
    return (seed + 2**63) % 2**64 - 2**63


def gumbel_noise(seed: int | Tensor, index: Tensor, token_ids: Tensor) -> Tensor:
    """Compute standard Gumbel noise for emitted index t and token v, of (seed, t, v) alone.

    Being counter-based, it costs nothing for tokens that top-k or top-p have dropped.

    Args:
        seed: any whole number, or [N] one for each row (`as_seed`).
        index: [N] emitted index t of each row.
        token_ids: [N, C] or [C] vocabulary ids.

    Returns:
        [N, C] float64.
    """
    seed = seed if isinstance(seed, Tensor) else torch.full_like(index, as_seed(seed))
    row = _mix(_mix(seed) + (index + 1) * _GOLDEN)
    bits = (_mix(row[:, None] + (token_ids + 1) * _GOLDEN) >> 12) & ((1 << 52) - 1)
    uniform = (bits.double() + 0.5) / float(1 << 52)  # exact in float64, so never 0 or 1
    return -torch.log(-torch.log(uniform))


def support(logits: Tensor, sampling: SamplingConfig, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """Find the filtered next-token distribution of each row.

    Filters are as in `transformers`: temperature; top-k, which keeps all that tie with the k-th;
    top-p, the smallest set of most likely tokens whose probability reaches top-p. Where top-p parts
    tokens that tie, transformers keeps as many, but leaves to an unstable sort, and so to the
    processor, which; here those with the lower ids go first, as in a stable ascending sort.

    Args:
        logits: [N, V], the SAT already masked with -inf.
        sampling: temperature and filters.
        at_least: no fewer ids than this are given, so that a draft tree always finds enough
            candidates.

    Returns:
        Columns [N, C], the most likely token first when a filter is on, and scores [N, C] in
        float32, logits divided by the temperature: their softmax is the distribution, and -inf
        marks what the filters drop.
    """
    scores = logits.float() / sampling.temperature
    vocabulary = scores.shape[-1]
    top_k = min(sampling.top_k or vocabulary, vocabulary)
    if top_k == vocabulary and sampling.top_p == 1:
        return torch.arange(vocabulary, device=logits.device).expand_as(scores), scores
    size = min(max(LIKELY, 2 * sampling.top_k, at_least), vocabulary)
    columns, kept, enough = _kept(scores, size, top_k, sampling.top_p)
    if size < vocabulary and not bool(enough.all()):
        columns, kept, _ = _kept(scores, vocabulary, top_k, sampling.top_p)
    return columns, kept


def _kept(scores: Tensor, size: int, top_k: int, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Find `support` among the `size` best of each row of scores [N, V].

    What is kept of a row does not depend on the size, so not on the rows beside it either.

    Args:
        scores: [N, V] logits divided by the temperature.
        size: how many of a row are looked at.
        top_k: as of SamplingConfig, V for all.
        top_p: as of SamplingConfig.

    Returns:
        Columns and scores as of `support`, and [N, 1] whether nothing beyond them can be kept.
    """
    vocabulary = scores.shape[-1]
    if size < vocabulary:
        columns = scores.topk(size, dim=-1).indices.sort(-1, descending=True).values
    else:
        columns = torch.arange(vocabulary - 1, -1, -1, device=scores.device).expand_as(scores)
    # Of equal scores the one with the higher id comes first.
    ranked, order = scores.gather(-1, columns).sort(stable=True, dim=-1, descending=True)
    columns = columns.gather(-1, order)
    worst = ranked[:, -1:]
    if top_k < vocabulary:
        least = ranked[:, top_k - 1 : top_k]
        enough = worst < least
        ranked = ranked.masked_fill(ranked < least, float("-inf"))
        share = (ranked - ranked[:, :1]).double().exp()
        total = share.cumsum(-1)[:, -1:]
    else:
        shares = scores.softmax(-1)
        share = shares.gather(-1, columns).double()
        total = shares.double().sum(-1, keepdim=True)
        enough = (share * (ranked > worst)).sum(-1, keepdim=True) >= top_p * total
    if top_p < 1:
        before = share.cumsum(-1).roll(1, -1)
        before[:, 0] = -1  # so the best token stays
        ranked = ranked.masked_fill(before >= top_p * total, float("-inf"))
    return columns, ranked, enough


def filtered(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Return logits [N, V] as temperature and filters leave them.

    They are in float32, and -inf where a token can't be drawn.
    """
    columns, scores = support(logits, sampling)
    return torch.full(logits.shape, float("-inf"), device=logits.device).scatter(
        -1, columns, scores
    )


def choose_columns(
    logits: Tensor,
    index: Tensor,
    sampling: SamplingConfig,
    width: int = 1,
    ids: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Choose the columns of the `width` best tokens of each row, best first.

    The best is `argmax(logits)` or, when sampling, `argmax(log p + g_t)`.

    Args:
        logits: [N, C].
        index: [N] emitted index t of each row (ignored when greedy).
        sampling: how.
        width: how many tokens of each row.
        ids: [N, C] or [C], the tokens that the columns stand for; None for the whole vocabulary in
            order.
        seeds: [N] in place of the sampling's one.

    Returns:
        [N, width], distinct within a row.
    """
    if sampling.greedy:
        return (
            logits.float().argmax(-1, keepdim=True)
            if width == 1
            else logits.topk(width, dim=-1).indices
        )
    columns, score = _noisy(logits, index, sampling, width, ids, seeds)
    return columns.gather(
        -1, score.argmax(-1, keepdim=True) if width == 1 else score.topk(width, dim=-1).indices
    )


def _noisy(
    logits: Tensor,
    index: Tensor,
    sampling: SamplingConfig,
    width: int,
    ids: Tensor | None,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find columns [N, C], `width` at least, and log p + g_t of each; see `choose_columns`."""
    columns, scores = support(logits, sampling, at_least=width)
    tokens = columns if ids is None else ids.expand_as(logits).gather(-1, columns)
    noise = gumbel_noise(sampling.seed if seeds is None else seeds, index, tokens)
    return columns, scores.double() + noise


def candidates(
    logits: Tensor, index: Tensor, sampling: SamplingConfig, width: int, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose columns as `choose_columns`, and say how likely each seems the model's own choice.

    That is its share by what it was chosen by, noise included: the model draws with the same noise,
    and so a token that the noise favours is likelier than its probability says. At temperature 0 it
    is the token's probability.

    Args:
        logits: [N, C] by a SAT.
        index: [N] emitted index of each row.
        sampling: how.
        width: how many tokens of each row.
        ids: [C] the tokens that the columns stand for.

    Returns:
        Columns and shares, [N, width] each, best first; no share for what the filters drop.
    """
    if sampling.greedy:
        columns = choose_columns(logits, index, sampling, width)
        return columns, logits.double().softmax(-1).gather(-1, columns)
    columns, score = _noisy(logits, index, sampling, width, ids)
    order = score.topk(width, dim=-1).indices
    shares = (sampling.temperature * score).softmax(-1).gather(-1, order)
    return columns.gather(-1, order), shares


def choose(
    logits: Tensor,
    index: Tensor,
    sampling: SamplingConfig,
    width: int = 1,
    ids: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Choose the `width` best tokens of each row: see `choose_columns`.

    Width 1 is the model's own next token; a wider result is a list of drafts, without replacement.

    Args:
        logits: [N, C].
        index: [N] emitted index of each row.
        sampling: how.
        width: how many tokens of each row.
        ids: [N, C] or [C], the tokens that the columns stand for; None for the whole vocabulary.
        seeds: [N] in place of the sampling's one.

    Returns:
        [N, width] token ids.
    """
    columns = choose_columns(logits, index, sampling, width, ids, seeds)
    return columns if ids is None else ids.expand_as(logits).gather(-1, columns)
