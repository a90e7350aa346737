"""The types of numbers that weights may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sdsat.config import require

if TYPE_CHECKING:
    pass
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(dtype: str) -> None:
    require(
        isinstance(dtype, str) and dtype in ("auto", *DTYPES),
        f"dtype={dtype}: expected auto, {', '.join(DTYPES)}",
    )


def _check_dtype_of(model: Any, name: str) -> None:
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
