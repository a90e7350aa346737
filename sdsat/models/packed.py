"""Linear layers on the CPU with weights in the processor's own order (oneDNN), reordered once.

A pass of a few rows reads every weight once, so reading them well is most of its time. Two things
follow, both measured (docs/exactness.md, scripts/reference.sh): passes get faster, plain decoding's
included, and a row's result has the same bits whatever the number of rows beside it, so that passes
need little or no padding.

The model's modules stay transformers' own: each `nn.Linear` gets a `forward` of its own while this
is attached, which reads the reordered weight within `in_use()` only, that is in this package's own
passes. Where gradients are wanted the plain weight is used. The reordered copy takes as much memory
as the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether this processor has oneDNN kernels for the dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(weight: Tensor) -> Tensor:
    """Reorder a weight [out, in] as `packed_linear` reads it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [..., in] -> [..., out], as `torch.nn.functional.linear` does; no gradients.

    packed: the weight by `pack`. bias: [out].
    """
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def best_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Make x -> x W^T without gradients, packed where the processor can."""
    if can_pack(weight.device, weight.dtype):
        return partial(packed_linear, packed=pack(weight))
    return partial(nn.functional.linear, weight=weight)


_IN_USE: ContextVar[bool] = ContextVar("sdsat_packed", default=False)  # of a thread


@contextmanager
def in_use() -> Iterator[None]:
    """Read packed weights instead of plain ones within this block; a decorator, too."""
    before = _IN_USE.set(True)
    try:
        yield
    finally:
        _IN_USE.reset(before)


class PackedLinears:
    """The packed weights of a model's linear layers, and the switch that makes the model use them.

    A layer of a class of its own, or with a `forward` of its own, is left alone.
    """

    def __init__(self, model: nn.Module):
        layers = (
            layer for layer in model.modules() if type(layer) is nn.Linear and _is_plain(layer)
        )
        self._forwards = [
            _Forward(layer) for layer in layers if can_pack(layer.weight.device, layer.weight.dtype)
        ]

    def attach(self) -> PackedLinears:
        """Give the layers the forwards that read packed weights."""
        for forward in self._forwards:
            forward.layer.forward = forward  # type: ignore[method-assign, assignment]
        return self

    def detach(self) -> None:
        """Give the layers their own forwards back."""
        for forward in self._forwards:
            if vars(forward.layer).get("forward") is forward:
                del forward.layer.forward


def _is_plain(layer: nn.Linear) -> bool:
    """Tell whether a layer's forward is its class's.

    One that an earlier PackedLinears has left (of a copied model) counts too.
    """
    return isinstance(vars(layer).get("forward", None), _Forward | None)


class _Forward:
    """The forward of one `nn.Linear`.

    A copy, and one that was pickled, has nothing packed and reads the plain weight.
    """

    def __init__(self, layer: nn.Linear):
        self.layer = layer
        self._packed: Tensor | None = pack(layer.weight)

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        trains = torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad)
        if self._packed is None or trains or not _IN_USE.get():
            return nn.functional.linear(x, layer.weight, layer.bias)
        return packed_linear(x, self._packed, layer.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "_packed": None}
