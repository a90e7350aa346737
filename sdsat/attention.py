"""Attention over the slot cache for `transformers`' attention interface: grouped queries without copying keys and values.

transformers' own SDPA path repeats keys and values for every query head whenever a mask is given. Here the query heads of
one key/value head become extra query rows instead, so that the cache is read once and copied never.

Which keys a row may see is its pass's mask, and for layers with a sliding window also how far back they lie (`layer_masks`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "sdsat"
# Whose layers have types, each with a mask of its own; Mistral's layers all have its window, and other families have none.
TYPED_LAYERS = ("qwen2", "qwen3", "gemma2", "gemma3_text")


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention. query [B, H, S, D]; key, value [B, H/G, T, D].

    attention_mask: [B|1, 1, S, T] bool, true means attend; or what `folded_mask` makes of it, once for all layers.
    softcap: scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118).
    Returns [B, S, H, D] and no weights, as `transformers` expects of an attention function.
    """
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(batch, key.shape[1], groups * rows, dim)
    mask = folded_mask(attention_mask, groups, query.dtype) if attention_mask.dtype == torch.bool else attention_mask
    if padding := mask.shape[2] - groups * rows:
        folded = torch.nn.functional.pad(folded, (0, 0, 0, padding))
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        scores = folded @ key.transpose(2, 3) * (dim**-0.5 if scaling is None else scaling)
        weights = (softcap * torch.tanh(scores / softcap) + mask).softmax(-1, torch.float32)
        out = weights.to(value.dtype) @ value
    return out[:, :, : groups * rows].reshape(batch, heads, rows, dim).transpose(1, 2), None


def folded_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, S, T] bool -> [B, 1, R, T] of 0 and -inf: the mask of `groups` query heads folded into rows.

    R is groups * S rounded up to a multiple of 4, and the rows beyond attend to everything: kernels take queries in
    blocks, and a last block of one or two rows was seen to round in a way of its own.
    """
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    folded = additive.repeat(1, 1, groups, 1)
    return torch.nn.functional.pad(folded, (0, 0, 0, -folded.shape[2] % 4))


def sliding_window(config: Any) -> int | None:
    """How many positions a row of a sliding layer sees, its own and those before it; None where no layer slides."""
    slides = config.model_type == "mistral"
    if config.model_type in TYPED_LAYERS:
        slides = "sliding_attention" in config.layer_types
    return config.sliding_window if slides else None


def layer_masks(config: Any, attend: Tensor, rows: Tensor, columns: Tensor) -> Tensor | dict[str, Tensor]:
    """The bool masks of a pass's layers, as the model of this config takes them: one mask, or one a type of layer.

    attend: [B|1, 1, S, T] what rows may see but for windows. rows [B|1, S], columns [B|1, T]: positions of the queries and of
    the keys (not their slots: nodes of a tree that stand side by side have the same position, and the same window).

        window 2, positions 5 | 6 6 (two drafts after position 5)     attend  1 1 1 1 1 1 | 1       sliding  0 0 0 0 0 1 | 1
        slots 0..5 | 6 7                                                      1 1 1 1 1 1 | 0 1              0 0 0 0 0 1 | 0 1
    """
    window = sliding_window(config)
    if window is None:
        return attend
    near = attend & (columns[:, None, None] > rows[:, None, :, None] - window)
    return {"full_attention": attend, "sliding_attention": near} if config.model_type in TYPED_LAYERS else near


AttentionInterface.register(NAME, grouped_attention)
