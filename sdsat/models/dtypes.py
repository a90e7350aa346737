"""The types of numbers that weights may have."""

from __future__ import annotations

from typing import Any

import torch

from sdsat.config import require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Names of numbers in safetensors files: https://github.com/huggingface/safetensors#format.
SAFETENSORS_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
INT8 = "int8"  # linear layers in 8 bits (int8.py), all else in bfloat16
GGUF = "gguf"  # linear layers in a GGUF file's own bits (blocks.py), all else in bfloat16
WITH_INTEGERS = (INT8, GGUF)  # for decoding alone, and on a CPU


def torch_dtype(dtype: str) -> torch.dtype | None:
    """Return the type of embeddings and states of a model loaded in `dtype`; None for 'auto'."""
    return DTYPES.get("bfloat16" if dtype in WITH_INTEGERS else dtype)


def check_dtype(dtype: str) -> None:
    """Refuse anything but 'auto', a name in DTYPES, INT8 and GGUF, with an InputError."""
    names = ("auto", *DTYPES, *WITH_INTEGERS)
    require(
        isinstance(dtype, str) and dtype in names, f"dtype={dtype}: expected {', '.join(names)}"
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
