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
    """Scaled dot-product attention. query [B, H, S, D]; key, value [B, H/G, T, D]; attention_mask [B|1, 1, S, T] bool.

    Returns [B, S, H, D] and no weights, as `transformers` expects of an attention function.
    """
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(batch, key.shape[1], groups * rows, dim)
    mask = attention_mask.repeat(1, 1, groups, 1) if groups > 1 else attention_mask
    out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, rows, dim).transpose(1, 2), None


AttentionInterface.register(NAME, grouped_attention)
