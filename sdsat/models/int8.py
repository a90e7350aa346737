"""Linear layers in 8 bits: what `dtype='int8'` makes of a model.

Weights are rounded to 8 bits with one scale an output, once; inputs with one scale for each 32 of
them, in every pass. Products are added up as integers, so what a row gets can't depend on the rows
beside it. The modules here say what is computed; the native engine computes it (engines/native/
int8.h), and makes each sum in the same order in any pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

GROUP = 32  # inputs of a row that share a scale
LARGEST = 127  # in size, of a weight or an input
_TINY = 1e-20  # the largest of a group counts as no less
_AT_ONCE = 2**14  # outputs whose weights are turned into floats together


class Int8Weight(NamedTuple):
    """A weight in 8 bits: values [out, in] of int8, times scales [out] of float32."""

    values: Tensor
    scale: Tensor

    def plain(self) -> Tensor:
        """Return the numbers that it stands for, [out, in] in float32."""
        return self.values.float() * self.scale[:, None]

    def rows(self, ids: Tensor) -> Int8Weight:
        """Take the outputs `ids` alone."""
        return Int8Weight(self.values[ids], self.scale[ids])


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
    """A linear layer in 8 bits, made of one in another type.

    Attributes:
        weight: [out, in] of int8.
        scale: [out] of float32; an element of the weight stands for its product with it.
        bias: as it was, or None.
    """

    scale: Tensor

    def __init__(self, plain: nn.Linear):
        nn.Module.__init__(self)
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        values, scale = round_weight(plain.weight)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = plain.bias

    def plain(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as numbers [out, in] of another type."""
        return Int8Weight(self.weight, self.scale).plain().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., out] of inputs [..., in], in their type. No gradients."""
        inputs = round_inputs(x)
        parts = [inputs @ part.float().T for part in self.weight.split(_AT_ONCE)]
        out = torch.cat(parts, -1) * self.scale
        return (out if self.bias is None else out + self.bias.float()).to(x.dtype)


def round_linears(model: nn.Module) -> None:
    """Put every linear layer of a model into 8 bits, the output layer too; embeddings stay."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, Int8Linear(layer))


def weight_of(layer: nn.Linear) -> Tensor | Int8Weight:
    """Return a linear layer's weight [out, in], or what it is rounded to."""
    return Int8Weight(layer.weight, layer.scale) if isinstance(layer, Int8Linear) else layer.weight
