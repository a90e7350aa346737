"""Linear layers in 8 bits: what `dtype='int8'` makes of a model.

Weights are rounded to 8 bits with one scale an output; inputs with one scale for each 32 of them.
Products are added up as integers, so what a row gets can't depend on the rows beside it. The layers
here say what is computed, and keep their weights as they were; the native engine computes it
(engines/native/int8.h), and holds the rounded ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

GROUP = 32  # inputs of a row that share a scale
LARGEST = 127  # in size, of a weight or an input
_TINY = 1e-20  # the largest of a group counts as no less
AT_ONCE = 2**14  # outputs whose weights are rounded together


class Int8Weight(NamedTuple):
    """A weight in 8 bits: values [out, in] of int8, times scales [out] of float32."""

    values: Tensor
    scale: Tensor


def round_weight(weight: Tensor) -> Int8Weight:
    """Round a weight [out, in] to 8 bits."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp_min(_TINY) / LARGEST
    return Int8Weight((weight / scale[:, None]).round().to(torch.int8), scale)


def round_inputs(x: Tensor) -> Tensor:
    """Round inputs [..., in] to 8 bits; returns the numbers that they then are, in float32.

    A last group may have fewer than GROUP.
    """
    groups = nn.functional.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    top = groups.abs().amax(-1, keepdim=True).clamp_min(_TINY)
    whole = (groups * (LARGEST / top)).round()
    return (whole * (top / LARGEST)).flatten(-2)[..., : x.shape[-1]]


class Int8Linear(nn.Linear):
    """A linear layer that computes in 8 bits, with the weight and bias of another one."""

    def __init__(self, plain: nn.Linear):
        nn.Module.__init__(self)
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        self.weight = plain.weight
        self.bias = plain.bias

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight that it computes with, without scales."""
        return self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., out] of inputs [..., in], in their type. No gradients."""
        inputs = round_inputs(x)
        outputs = []
        for part in self.weight.split(AT_ONCE):
            values, scale = round_weight(part)
            outputs.append(inputs @ values.float().T * scale)
        out = torch.cat(outputs, -1)
        return (out if self.bias is None else out + self.bias.float()).to(x.dtype)


def round_linears(model: nn.Module) -> None:
    """Have every linear layer of a model compute in 8 bits, the output layer too."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, Int8Linear(layer))
