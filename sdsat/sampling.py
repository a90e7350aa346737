"""Choosing tokens: temperature, top-k, top-p, and Gumbel noise that depends on (seed, emitted index, token) alone.

Coupled sampling: `argmax(log p + g)` with Gumbel noise g is an exact sample of p. Because g_t is a function of (seed, t)
and not of the pass that computes p, AR, draft step and verify step share it, so seeded sampling is as deterministic as
greedy decoding and losslessness is an equality (Daliri, Musco and Suresh, arXiv 2408.07978; Rowan, Phan and Khisti,
arXiv 2506.05632). Temperature 0 is the same code without noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import SamplingConfig

_M1, _M2, _GOLDEN = -4658895280553007687, -7723592293110705685, -7046029254386353131  # splitmix64, as signed 64-bit


_LIKELY = 512  # tokens that top-p alone sorts, as long as they reach top_p


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (wrapping); Steele, Lea and Flood 2014. Same bits on every device."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _M1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _M2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def as_seed(seed: int) -> int:
    """Any whole number as a signed 64-bit one."""
    return (seed + 2**63) % 2**64 - 2**63


def gumbel_noise(seed: int | Tensor, index: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise for emitted index t and token v, a pure function of (seed, t, v).

    seed: any whole number, or [N] one for each row (`as_seed`). index: [N] emitted index t of each row. token_ids: [N, C] or
    [C] vocabulary ids.
    Returns [N, C] float64. Being counter-based, it costs nothing for tokens that top-k or top-p have dropped.
    """
    seed = seed if isinstance(seed, Tensor) else torch.full_like(index, as_seed(seed))
    row = _mix(_mix(seed) + (index + 1) * _GOLDEN)
    bits = (_mix(row[:, None] + (token_ids + 1) * _GOLDEN) >> 12) & ((1 << 52) - 1)
    uniform = (bits.double() + 0.5) / float(1 << 52)  # exact in float64, so never 0 or 1
    return -torch.log(-torch.log(uniform))


def support(logits: Tensor, sampling: SamplingConfig, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """The filtered next-token distribution of each row, most likely token first when a filter is on.

    logits: [N, V], the SAT already masked with -inf. at_least: top-k keeps no fewer ids than this, so that a draft
    tree always finds enough candidates (tokens beyond top_k get log-probability -inf).
    Returns (columns [N, C], log-probabilities [N, C] in float32; -inf marks what the filters drop). Filters as in
    `transformers`: temperature, then top-k, then the smallest set whose probability reaches top-p.
    """
    logits = logits.float() / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return torch.arange(logits.shape[-1], device=logits.device).expand_as(logits), logits.log_softmax(-1)
    size = min(max(sampling.top_k or _LIKELY, at_least), logits.shape[-1])
    every, (logits, columns) = logits, logits.topk(size, dim=-1)
    if sampling.top_k:
        logits[:, sampling.top_k :] = float("-inf")
        share = logits.softmax(-1)
    else:
        shares = every.softmax(-1)  # of the whole vocabulary, so that a row's are the same however many are sorted
        share = shares.gather(-1, columns)
        if size < every.shape[-1] and bool((share.double().sum(-1) < sampling.top_p).any()):
            logits, columns = every.sort(-1, descending=True)
            share = shares.gather(-1, columns)
    if sampling.top_p < 1:
        before = share.double().cumsum(-1).roll(1, -1)
        before[:, 0] = 0
        logits = logits.masked_fill(before >= sampling.top_p, float("-inf"))
    return columns, logits.log_softmax(-1)


def choose_columns(
    logits: Tensor,
    index: Tensor,
    sampling: SamplingConfig,
    width: int = 1,
    ids: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """The columns of the `width` best tokens of each row, best first: `argmax(logits)`, or `argmax(log p + g_t)` when sampling.

    logits: [N, C]; ids: [N, C] or [C], the tokens that the columns stand for, None for the whole vocabulary in order.
    index: [N] emitted index t of each row (ignored when greedy). seeds: [N] in place of the sampling's one. Returns [N, width],
    distinct within a row.
    """
    if sampling.greedy:
        return logits.float().argmax(-1, keepdim=True) if width == 1 else logits.topk(width, dim=-1).indices
    columns, log_p = support(logits, sampling, at_least=width)
    tokens = columns if ids is None else ids.expand_as(logits).gather(-1, columns)
    score = log_p.double() + gumbel_noise(sampling.seed if seeds is None else seeds, index, tokens)
    return columns.gather(-1, score.argmax(-1, keepdim=True) if width == 1 else score.topk(width, dim=-1).indices)


def choose(
    logits: Tensor,
    index: Tensor,
    sampling: SamplingConfig,
    width: int = 1,
    ids: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """The `width` best tokens of each row as ids [N, width]: see `choose_columns`. Width 1 is the model's own next token; a wider
    result is a list of drafts, without replacement.
    """
    columns = choose_columns(logits, index, sampling, width, ids, seeds)
    return columns if ids is None else ids.expand_as(logits).gather(-1, columns)
