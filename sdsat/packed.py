"""Linear layers on the CPU with weights in the processor's own order (oneDNN), reordered once instead of in every call.

A pass of a few rows reads every weight once, so reading them well is most of its time. Two things follow, both measured
(docs/exactness.md, scripts/reference.sh): passes get faster, plain decoding's included, and a row's result has the same
bits whatever the number of rows beside it, so that passes need little or no padding.

The model's modules stay transformers' own: each `nn.Linear` gets a `forward` of its own while this is attached. Where
gradients are wanted the plain weight is used. The reordered copy takes as much memory as the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this processor has oneDNN kernels for the dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: Tensor) -> Tensor:
    """A [out, in] weight in the order that `packed_linear` reads."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out], as `torch.nn.functional.linear` with the weight that was packed; no gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def best_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> x W^T without gradients, packed where the processor can."""
    if can_pack(weight.device, weight.dtype):
        return partial(packed_linear, packed=pack(weight))
    return partial(nn.functional.linear, weight=weight)


class PackedLinears:
    """The packed weights of every `nn.Linear` of a model, and the switch that makes the model use them."""

    def __init__(self, model: nn.Module):
        self._layers = [(layer, pack(layer.weight)) for layer in model.modules() if isinstance(layer, nn.Linear)]

    def attach(self) -> PackedLinears:
        for layer, packed in self._layers:
            layer.forward = _forward(layer, packed)  # type: ignore[method-assign]
        return self

    def detach(self) -> None:
        for layer, _ in self._layers:
            layer.__dict__.pop("forward", None)


def _forward(layer: nn.Linear, packed: Tensor) -> Any:
    bias = layer.bias

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return nn.functional.linear(x, layer.weight, bias)
        return packed_linear(x, packed, bias)

    return forward
