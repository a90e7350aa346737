"""Attention over the slot cache for `transformers`' attention interface: grouped queries without copying keys and values.

transformers' own SDPA path repeats keys and values for every query head whenever a mask is given. Here the query heads of
one key/value head become extra query rows instead, so that the cache is read once and copied never.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "sdsat"


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention. query [B, H, S, D]; key, value [B, H/G, T, D].

    attention_mask: [B|1, 1, S, T] bool, true means attend; or what `folded_mask` makes of it, once for all layers.
    Returns [B, S, H, D] and no weights, as `transformers` expects of an attention function.
    """
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(batch, key.shape[1], groups * rows, dim)
    mask = folded_mask(attention_mask, groups, query.dtype) if attention_mask.dtype == torch.bool else attention_mask
    if padding := mask.shape[2] - groups * rows:
        folded = torch.nn.functional.pad(folded, (0, 0, 0, padding))
    out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out[:, :, : groups * rows].reshape(batch, heads, rows, dim).transpose(1, 2), None


def folded_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, S, T] bool -> [B, 1, R, T] of 0 and -inf: the mask of `groups` query heads folded into rows.

    R is groups * S rounded up to a multiple of 4, and the rows beyond attend to everything: kernels take queries in
    blocks, and a last block of one or two rows was seen to round in a way of its own.
    """
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    folded = additive.repeat(1, 1, groups, 1)
    return torch.nn.functional.pad(folded, (0, 0, 0, -folded.shape[2] % 4))


AttentionInterface.register(NAME, grouped_attention)
