"""The types of numbers that weights may have."""

from __future__ import annotations

from typing import Any

import torch

from sdsat.config import require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(dtype: str) -> None:
    """Refuse anything but 'auto' or a name in DTYPES, with an InputError."""
    require(
        isinstance(dtype, str) and dtype in ("auto", *DTYPES),
        f"dtype={dtype}: expected auto, {', '.join(DTYPES)}",
    )


def check_dtype_of(model: Any, name: str) -> None:
    """Refuse transformers' `model` unless its weights have a type in DTYPES.

    Raises InputError, with the model's name.
    """
    weight = getattr(model.get_input_embeddings(), "weight", None)
    require(
        isinstance(weight, torch.Tensor),
        f"model {name}: its input embeddings have no weight; expected nn.Embedding",
    )
    dtype = model.get_input_embeddings().weight.dtype
    require(
        dtype in DTYPES.values(),
        f"model {name}: its weights are {dtype}; expected one of {', '.join(DTYPES)}",
    )
