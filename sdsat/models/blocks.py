"""Linear layers in a quantized file's own bits: what `dtype='gguf'` makes of a model.

A GGUF file's weight lies in blocks of inputs of one output: whole numbers of 4 to 8 bits, a scale
for each 16 or 32 of them, and in some types a least number that is added. None of that is rounded
here. Inputs are rounded to 8 bits, as for `int8` (int8.py), and products are added up as integers.
The layers here say what is computed; the native engine computes it (engines/native/int8.h and
low_bits.h). The types:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdsat.models.int8 import AT_ONCE, Int8Linear, round_inputs


class BlockWeight(NamedTuple):
    """A weight as its file has it: an element is value * scale + least.

    Attributes:
        values: [out, in] of int8.
        scale: [out, in / 16] or [out, in / 32] of float32.
        least: [out, in / 32] of float32; None where nothing is added.
    """

    values: Tensor
    scale: Tensor
    least: Tensor | None

    def numbers(self) -> Tensor:
        """Return the numbers that these stand for, [out, in] in float32."""
        groups = self.values.float().unflatten(-1, (self.scale.shape[-1], -1))
        numbers = (groups * self.scale[..., None]).flatten(-2)
        if self.least is None:
            return numbers
        return (numbers.unflatten(-1, (-1, 32)) + self.least[..., None]).flatten(-2)


@dataclass(frozen=True)
class BlockType:
    """How weights of one type lie in a file, and what they are.

    Attributes:
        inputs: of a block.
        bytes: of a block.
        bits: that a value is held in.
        with_least: whether least numbers are added.
        half: whether float16 holds every scale and every least number.
        read: [out, blocks, bytes] as in the file -> values, scales and least numbers, the blocks
            of an output one after the other.
    """

    inputs: int
    bytes: int
    bits: int
    with_least: bool
    half: bool
    read: Callable[[Tensor], BlockWeight]


class HeldWeight(NamedTuple):
    """A weight where its file is.

    Attributes:
        held: [out, bytes] of uint8, as in the file.
        kind: their type, a key of TYPES.
        order: [out], where each output is among the file's; None: as there.
    """

    held: Tensor
    kind: str
    order: Tensor | None = None

    @property
    def num_inputs(self) -> int:
        """How many inputs each output has."""
        kind = TYPES[self.kind]
        return self.held.shape[1] // kind.bytes * kind.inputs

    def read(self, first: int = 0, last: int | None = None) -> BlockWeight:
        """Read the weight of outputs first to last."""
        kind = TYPES[self.kind]
        held = self.held[first:last] if self.order is None else self.held[self.order[first:last]]
        return kind.read(held.unflatten(-1, (-1, kind.bytes)))

    def of(self, outputs: Tensor) -> HeldWeight:
        """Return the weight of some outputs, by their numbers."""
        order = outputs if self.order is None else self.order[outputs]
        return self._replace(order=order)


class BlockLinear(Int8Linear):
    """A linear layer that computes with a file's own bits; it keeps `weight`, for other uses."""

    def __init__(self, plain: nn.Linear, blocks: HeldWeight):
        """Take the place of `plain`, which has the weight's numbers."""
        super().__init__(plain)
        self.blocks = blocks

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight in its file."""
        return self.blocks.held.numel()

    def follow(self) -> None:
        """Become a plain layer if `weight` is not the file's any more: trained, merged, resized.

        Eight outputs are looked at.
        """
        size = len(self.weight)
        some = torch.linspace(0, size - 1, min(size, 8)).long()
        if size == len(self.blocks.held):
            numbers = self.blocks.of(some).read().numbers()
            found = self.weight.detach()[some].to("cpu", torch.float32)
            # as near as it was rounded to: to bfloat16, as a rule
            if torch.allclose(found, numbers, rtol=2**-8, atol=1e-7, equal_nan=True):
                return
        del self.blocks
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., out] of inputs [..., in], in their type. No gradients."""
        inputs = round_inputs(x)
        outputs = [
            inputs @ self.blocks.read(first, first + AT_ONCE).numbers().T
            for first in range(0, self.out_features, AT_ONCE)
        ]
        out = torch.cat(outputs, -1)
        return (out if self.bias is None else out + self.bias.float()).to(x.dtype)


def take_blocks(model: nn.Module, held: Mapping[str, HeldWeight]) -> None:
    """Have a model's linear layers compute with a file's own bits, the output layer too.

    held: by the weights' names, of tied ones the first. Layers that it lacks stay as they are.
    """
    names = {id(weight): name for name, weight in model.named_parameters()}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and (blocks := held.get(names[id(layer.weight)])):
                setattr(parent, name, BlockLinear(layer, blocks))


# ---- the types, block [.., bytes] by block ----


def _float16(block: Tensor, at: int) -> Tensor:
    """Read the float16 at a byte, [.., 1] in float32."""
    return block[..., at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(block: Tensor) -> Tensor:
    """Read two values a byte, [.., bytes] -> [.., 2 bytes]: all lower halves, then all upper."""
    return torch.cat([block & 15, block >> 4], -1)


def _bits(block: Tensor) -> Tensor:
    """Read eight bits a byte, the lowest first: [.., bytes] -> [.., 8 bytes]."""
    places = torch.arange(8, dtype=torch.uint8)
    return (block[..., None] >> places & 1).flatten(-2)


def _together(values: Tensor, scale: Tensor, least: Tensor | None = None) -> BlockWeight:
    """Join an output's blocks; all are [out, blocks, ..]."""
    least = None if least is None else least.flatten(1)
    return BlockWeight(values.flatten(1).to(torch.int8), scale.flatten(1), least)


def _q4_0(block: Tensor) -> BlockWeight:
    scale = _float16(block, 0)
    return _together(_nibbles(block[..., 2:]), scale, -8 * scale)


def _q4_1(block: Tensor) -> BlockWeight:
    return _together(_nibbles(block[..., 4:]), _float16(block, 0), _float16(block, 2))


def _q5_0(block: Tensor) -> BlockWeight:
    values = _nibbles(block[..., 6:]) | _bits(block[..., 2:6]) << 4
    return _together(values.to(torch.int8) - 16, _float16(block, 0))


def _q5_1(block: Tensor) -> BlockWeight:
    values = _nibbles(block[..., 8:]) | _bits(block[..., 4:8]) << 4
    return _together(values, _float16(block, 0), _float16(block, 2))


def _q8_0(block: Tensor) -> BlockWeight:
    return _together(block[..., 2:].view(torch.int8), _float16(block, 0))


def _scales_of_k(block: Tensor) -> tuple[Tensor, Tensor]:
    """Read scales and least numbers of 8 times 32 inputs: 6 bits each, times one float16 each."""
    low, middle, high = block[..., 4:16].split(4, -1)
    scale = torch.cat([low & 63, high & 15 | low >> 2 & 48], -1)
    least = torch.cat([middle & 63, high >> 4 | middle >> 2 & 48], -1)
    return _float16(block, 0) * scale, -_float16(block, 2) * least


def _low_of_k(block: Tensor) -> Tensor:
    """Read 4 bits each of 256 values, [.., 128] -> [.., 8, 32]."""
    return _nibbles(block.unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)


def _q4_k(block: Tensor) -> BlockWeight:
    return _together(_low_of_k(block[..., 16:]), *_scales_of_k(block))


def _q5_k(block: Tensor) -> BlockWeight:
    places = torch.arange(8, dtype=torch.uint8)[:, None]
    high = block[..., None, 16:48] >> places & 1
    return _together(_low_of_k(block[..., 48:]) | high << 4, *_scales_of_k(block))


def _q6_k(block: Tensor) -> BlockWeight:
    low = _nibbles(block[..., :128].unflatten(-1, (2, 64)))  # [.., 2, 128]
    places = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = block[..., 128:192].unflatten(-1, (2, 1, 32)) >> places & 3
    values = (low | high.flatten(-2) << 4).to(torch.int8) - 32
    return _together(values, _float16(block, 208) * block[..., 192:208].view(torch.int8))


TYPES = {
    "Q4_0": BlockType(32, 18, 4, True, True, _q4_0),
    "Q4_1": BlockType(32, 20, 4, True, True, _q4_1),
    "Q5_0": BlockType(32, 22, 5, False, True, _q5_0),
    "Q5_1": BlockType(32, 24, 5, True, True, _q5_1),
    "Q8_0": BlockType(32, 34, 8, False, True, _q8_0),
    "Q4_K": BlockType(256, 144, 4, True, False, _q4_k),
    "Q5_K": BlockType(256, 176, 5, True, False, _q5_k),
    "Q6_K": BlockType(256, 210, 8, False, False, _q6_k),
}
