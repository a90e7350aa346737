"""The compiled library and its structs, as C++ reads them (structs.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int64, c_void_p
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdsat.cache_folder import load_library
from sdsat.config import InputError
from sdsat.engines.native.compiler import (
    FOLDER,
    Unavailable,
    compile_library,
    compiler,
    library_name,
)
from sdsat.method.copies import LONGEST

if TYPE_CHECKING:
    from sdsat.config import SamplingConfig

SOURCE = FOLDER / "interface.cpp"  # it includes all others: one translation unit


class Form(IntEnum):
    """What weights are, and how they lie there."""

    PLAIN = 0
    INT8 = 1
    INT5 = 2
    BITS5 = 3
    BITS5_LEAST = 4
    BITS4_LEAST = 5
    BITS5_LEAST_FLOAT = 6
    BITS4_LEAST_FLOAT = 7
    BITS8 = 8
    BITS6_HALVES = 9


class Matrix(Structure):
    """Packed weights of one linear layer."""

    _fields_ = [("weight", c_void_p), ("scale", c_void_p)]
    _fields_ += [("stride", c_int64), ("form", c_int64)]


class Linear(Structure):
    """A linear layer: its weight, the adapter's two matrices and its bias."""

    _fields_ = [
        *((name, Matrix) for name in ("weight", "down", "up")),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("out", "in_", "rank")),
    ]


class Layer(Structure):
    """A decoder layer: its norms and linear layers."""

    _fields_ = [(name, c_void_p) for name in ("norm_attention", "norm_mlp", "norm_q", "norm_k")] + [
        (name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")
    ]


class Model(Structure):
    """A model: its sizes, layers, embeddings and draft head."""

    _fields_ = [
        *(
            (name, c_int64)
            for name in ("layers", "hidden", "heads", "kv_heads", "dim", "inner", "vocabulary")
        ),
        *((name, c_int64) for name in ("positions", "threads", "in_8_bits")),
        *((name, c_float) for name in ("eps", "scale")),
        *((name, c_void_p) for name in ("cos", "sin", "norm")),
        ("head", Linear),
        ("draft_head", Linear),
        ("draft_tokens", c_int64),
        ("layer", POINTER(Layer)),
        *((name, c_void_p) for name in ("embedding", "unembedding")),
        *((name, Linear) for name in ("draft_inner", "draft_outer")),
        ("draft_eps", c_float),
        ("sharpness", c_float),
        ("copies", c_float * LONGEST),
    ]


class Sampling(Structure):
    """How a token is drawn: temperature and filters."""

    _fields_ = [("temperature", c_double), ("top_p", c_double), ("top_k", c_int64)]

    @classmethod
    def of(cls, sampling: SamplingConfig) -> Sampling:
        """Take over the settings that C++ reads."""
        return cls(sampling.temperature, sampling.top_p, sampling.top_k)


class Drafting(Structure):
    """A draft tree to fill with tokens, from the states and logits of SATs."""

    _fields_ = [
        *(
            (name, c_void_p)
            for name in ("states", "logits", "ids", "parents", "ranks", "depths", "tokens")
        ),
        *((name, c_void_p) for name in ("likely", "text")),
        *((name, c_int64) for name in ("known", "nodes", "sats", "columns", "shortlist")),
        *((name, c_int64) for name in ("index", "seed")),
        ("sampling", Sampling),
    ]


class CacheStruct(Structure):
    """Keys and values of one sequence."""

    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("slots", c_int64)]


class Pass(Structure):
    """A pass over the rows of one sequence or more."""

    _fields_ = [
        *(
            (name, c_void_p)
            for name in (
                "x",
                "states",
                "logits",
                "sat_logits",
                "positions",
                "slots",
                "sequences",
                "lengths",
                "within",
            )
        ),
        *((name, c_int64) for name in ("caches", "rows", "sats")),
    ]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Return the compiled library, from the cache folder or compiled now.

    The cache folder keeps one for each version of the sources, compiler, flags and processor.
    Raises Unavailable where there is no compiler, or it fails.
    """
    command = compiler()
    try:
        return load_library(
            library_name(command), lambda target: compile_library(command, SOURCE, target)
        )
    except OSError as error:
        raise Unavailable(f"the native engine could not be built ({error})") from None


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library.

    Raises MemoryError where memory runs out, or InputError for what it refuses, in one line.
    """
    function = getattr(library(), name)
    function.restype = c_char_p
    refused = function(*arguments)
    if refused == b"out of memory":
        raise MemoryError(
            "the native engine has no memory for this pass; expected fewer sequences or a "
            "shorter context"
        )
    if refused:
        raise InputError(f"native engine: {refused.decode()}")


def fits(tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> bool:
    """Tell whether C++ may read this tensor as `dtype` [shape], once contiguous.

    None in the shape stands for any number.
    """
    sizes = len(tensor.shape) == len(shape) and all(
        want in (None, size) for size, want in zip(tensor.shape, shape, strict=True)
    )
    return (
        sizes
        and tensor.dtype == dtype
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def described(dtype: torch.dtype, shape: Sequence[int | None], device: str) -> str:
    """Describe a tensor's type, shape and device in words."""
    return (
        f"{dtype} [{', '.join('any' if size is None else str(size) for size in shape)}] on {device}"
    )


def readable(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int | None) -> Tensor:
    """Return the tensor as C++ reads it, contiguous.

    Args:
        name: of the tensor, for the message.
        tensor: to check.
        dtype: that it must have.
        shape: that it must have; None stands for any number.

    Raises:
        InputError: unless it is `dtype` [shape] on the CPU.
    """
    if not fits(tensor, dtype, shape):
        raise InputError(
            f"{name}: {described(tensor.dtype, tensor.shape, tensor.device.type)}; the "
            "native engine was made for "
            f"{described(dtype, shape, 'cpu')}: change a model's type or device before it "
            "is loaded, not after"
        )
    return tensor.contiguous()


def pointer(tensor: Tensor | None) -> int | None:
    """Return the tensor's address, or None for None."""
    return None if tensor is None else tensor.data_ptr()
