"""Attention over the slot cache: grouped queries without copying keys and values.

It is for `transformers`' attention interface, whose own SDPA path repeats keys and values for every
query head whenever a mask is given. Here the query heads of one key/value head become extra query
rows instead, so that the cache is read once and copied never.

Which keys a row may see is its pass's mask, and for layers with a sliding window also how far back
they lie (`layer_masks`). The same model also runs without this package's loop, in `model(**inputs)`
and plain `generate`: then the mask is transformers'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "sdsat"
# Whose layers have types, each with a mask of its own; Mistral's layers all have its window, and
# other families have none.
TYPED_LAYERS = ("qwen2", "qwen3", "gemma2", "gemma3_text")


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    row_numbers: Tensor | None = None,
    row_places: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Compute scaled dot-product attention.

    Args:
        module: the layer, as transformers hands it over.
        query: [B, H, S, D].
        key: [B, H/G, T, D].
        value: [B, H/G, T, D].
        attention_mask: [B|1, 1, S, T] bool, true means attend; or what `folded_mask` makes of it,
            once for all layers.
        scaling: of the scores; 1/sqrt(D) by default.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118).
        row_numbers: [B, S], only for a pass whose R rows belong to B sequences and stand in one
            line, query [1, H, R, D]: which row is sequence b's s-th. So only attention knows of
            sequences, and pads.
        row_places: [R], for such a pass: where in [B * S] each row's result is.
        kwargs: ignored.

    Returns:
        [B, S, H, D] (or [1, R, H, D]) and no weights, as `transformers` expects of an attention
        function.
    """
    if row_numbers is not None:
        query = query[0].transpose(0, 1)[row_numbers].transpose(1, 2)
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(batch, key.shape[1], groups * rows, dim)
    mask = (
        folded_mask(attention_mask, groups, query.dtype)
        if attention_mask.dtype == torch.bool
        else attention_mask
    )
    if padding := mask.shape[2] - groups * rows:
        folded = torch.nn.functional.pad(folded, (0, 0, 0, padding))
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            folded, key, value, attn_mask=mask, scale=scaling
        )
    else:
        scores = folded @ key.transpose(2, 3) * (dim**-0.5 if scaling is None else scaling)
        weights = (softcap * torch.tanh(scores / softcap) + mask).softmax(-1, torch.float32)
        out = weights.to(value.dtype) @ value
    out = out[:, :, : groups * rows].reshape(batch, heads, rows, dim).transpose(1, 2)
    return out if row_places is None else out.flatten(0, 1)[row_places][None], None


def folded_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Make the mask of `groups` query heads folded into rows: [B, 1, S, T] bool -> [B, 1, R, T].

    The result holds 0 and -inf. R is groups * S rounded up to a multiple of 4, and the rows beyond
    attend to everything: kernels take queries in blocks, and a last block of one or two rows was
    seen to round in a way of its own.
    """
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, float("-inf")
    )
    folded = additive.repeat(1, 1, groups, 1)
    return torch.nn.functional.pad(folded, (0, 0, 0, -folded.shape[2] % 4))


def sliding_window(config: Any) -> int | None:
    """Return how many positions a row of a sliding layer sees, its own and those before it.

    None where no layer slides.
    """
    slides = config.model_type == "mistral"
    if config.model_type in TYPED_LAYERS:
        slides = "sliding_attention" in config.layer_types
    return config.sliding_window if slides else None


def layer_masks(
    config: Any, attend: Tensor, rows: Tensor, columns: Tensor
) -> Tensor | dict[str, Tensor]:
    """Make the bool masks of a pass's layers, as the model of this config takes them.

        window 2, slots 0..5 | 6 7, positions 5 | 6 6 (two drafts after position 5)

        attend  1 1 1 1 1 1 | 1        sliding  0 0 0 0 0 1 | 1
                1 1 1 1 1 1 | 0 1               0 0 0 0 0 1 | 0 1

    Args:
        config: transformers' configuration of the model.
        attend: [B|1, 1, S, T] what rows may see but for windows.
        rows: [B|1, S] positions of the queries.
        columns: [B|1, T] positions of the keys (not their slots: nodes of a tree that stand side by
            side have the same position, and the same window).

    Returns:
        One mask, or one a type of layer.
    """
    window = sliding_window(config)
    if window is None:
        return attend
    near = attend & (columns[:, None, None] > rows[:, None, :, None] - window)
    return (
        {"full_attention": attend, "sliding_attention": near}
        if config.model_type in TYPED_LAYERS
        else near
    )


def whole_mask(*args: Any, **kwargs: Any) -> Tensor:
    """Make [B, 1, S, T] bool as transformers' `sdpa_mask` does, but never leave it out.

    It is made from a padding mask. A row of padding, which may see nothing, sees everything:
    otherwise its values would be NaN, and spoil what is not padding.
    """
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return mask | ~mask.any(-1, keepdim=True)


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, whole_mask)
