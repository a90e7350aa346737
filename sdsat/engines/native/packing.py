"""Weights in the order in which C++ reads them: kernels.h, int8.h and low_bits.h say why."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdsat.engines.native.bindings import Form, library
from sdsat.models.blocks import TYPES, BlockWeight, HeldWeight
from sdsat.models.int8 import GROUP, round_weight

# Sizes of linear layers are multiples of this: whole blocks (kernels.h) on any processor.
MULTIPLE = 32
_STEP = 4  # inputs that one step takes of rows in 8 bits


class PlainWeight(NamedTuple):
    """A weight of plain numbers; like a HeldWeight it is read when it is packed.

    Attributes:
        held: [all outputs, in].
        order: [out], which of them; None: all.
    """

    held: Tensor
    order: Tensor | None = None

    @property
    def num_inputs(self) -> int:
        """How many inputs each output has."""
        return self.held.shape[1]

    def read(self, first: int, last: int) -> Tensor:
        """Read the numbers of outputs first to last."""
        return self.held[first:last] if self.order is None else self.held[self.order[first:last]]


Source = PlainWeight | HeldWeight  # of a weight [out, in]


def num_blocks(outputs: int) -> int:
    """Count the blocks (kernels.h) of so many outputs, filled up."""
    return (outputs + -outputs % MULTIPLE) // (2 * library().sdsat_lanes())


def num_outputs(source: Source) -> int:
    """Count the outputs of a weight."""
    return len(source.held if source.order is None else source.order)


def form_of(weight: HeldWeight) -> Form:
    """Return the form in which a file's weight loses nothing."""
    kind = TYPES[weight.kind]
    if kind.bits == 8:
        return Form.BITS8 if kind.half else Form.BITS6_HALVES
    ends = ("_LEAST" if kind.with_least else "") + ("" if kind.half else "_FLOAT")
    return Form[f"BITS{kind.bits}{ends}"]


def as_bytes(source: Source, form: Form, first: int, last: int, step: int) -> list[Tensor]:
    """Pack some outputs of a weight, [blocks, bytes] of each part.

    Args:
        source: of the weight.
        form: what becomes of it.
        first: of the outputs.
        last: where they end.
        step: inputs that one step takes of PLAIN weights.
    """
    parts: list[Tensor]
    if isinstance(source, HeldWeight):
        parts = [pack_blocks(source.read(first, last), form)]
    elif form == Form.INT5:
        parts = [pack5(source.read(first, last))]
    elif form == Form.INT8:
        parts = [*pack8(source.read(first, last))]
    else:
        parts = [pack(source.read(first, last), step)]
    return [part.view(num_blocks(last - first), -1).view(torch.uint8) for part in parts]


def _filled_up(weight: Tensor) -> Tensor:
    """Add outputs of zeros, up to whole blocks."""
    return nn.functional.pad(weight.detach(), (0, 0, 0, -len(weight) % MULTIPLE))


def pack(weight: Tensor, step: int) -> Tensor:
    """Pack a weight [out, in] -> [out / 2 L, in / step, 2, L, step], L the lanes of a vector.

    Zeros fill it up to whole blocks and steps.
    """
    weight = nn.functional.pad(_filled_up(weight), (0, -weight.shape[1] % step))
    return (
        weight.view(-1, 2, library().sdsat_lanes(), weight.shape[1] // step, step)
        .permute(0, 3, 1, 2, 4)
        .contiguous()
    )


def pack8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in] to 8 bits, one scale an output, and pack it.

    Returns bytes [out / L, in / 4, L, 4] from 1 to 255, L the lanes of a vector, and scales [out],
    out padded. An element is (byte - 128) * scale.
    """
    values, scale = round_weight(_filled_up(weight))
    whole = values.view(torch.uint8) ^ 128
    return whole.view(-1, library().sdsat_lanes(), weight.shape[1] // _STEP, _STEP).transpose(
        1, 2
    ).contiguous(), scale


def pack5(weight: Tensor) -> Tensor:
    """Round a weight [out, in] to 5 bits, one scale for 32 inputs of an output, and pack it.

    Returns bytes [out / L, in / 32, 22 L], L the lanes of a vector, out padded; low_bits.h says
    which.
    """
    groups = _filled_up(weight).float().unflatten(-1, (-1, GROUP))
    # The number of the largest size becomes the end of the range that has one more.
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (extreme / -16).to(torch.bfloat16)
    inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
    values = (groups * inverse).round().clamp(-16, 15).add_(16).to(torch.uint8).flatten(-2)
    return _joined(*_low_bits(values, 5), _beside(scale.flatten(-2), groups.shape[1]))


def pack_blocks(weight: BlockWeight, form: Form) -> Tensor:
    """Pack a file's weight as it is, [out / L, in / 32, bytes], out padded.

    form: as of `form_of`.
    """
    values, scale, least = (None if part is None else _filled_up(part) for part in weight)
    assert values is not None and scale is not None
    if form in (Form.BITS8, Form.BITS6_HALVES):
        parts = [_steps(values.view(torch.uint8) ^ 128)]
    else:
        unsigned = values + 16 if least is None else values
        parts = _low_bits(unsigned.view(torch.uint8), 5 if "5" in form.name else 4)
    single = form == Form.BITS6_HALVES or form.name.endswith("FLOAT")
    for numbers in (scale, least):
        if numbers is not None:
            numbers = numbers.to(torch.float32 if single else torch.float16)
            parts.append(_beside(numbers, values.shape[1] // GROUP))
    return _joined(*parts)


def _steps(values: Tensor) -> Tensor:
    """Put bytes [out, in] step by step, [out / L, in / 32, 8, L, 4]."""
    lanes = library().sdsat_lanes()
    steps = values.view(-1, lanes, values.shape[1] // GROUP, GROUP // _STEP, _STEP)
    return steps.permute(0, 2, 3, 1, 4)


def _low_bits(values: Tensor, bits: int) -> list[Tensor]:
    """Pack values [out, in] below 2^bits: their lower 4 bits, and their highest if they have 5."""
    steps = _steps(values)
    low = steps & 15
    both = low[:, :, ::2] | low[:, :, 1::2] << 4
    if bits == 4:
        return [both]
    places = torch.arange(8, dtype=torch.uint8)[:, None, None]
    return [both, ((steps >> 4) << places).sum(2, dtype=torch.uint8)]


def _beside(numbers: Tensor, groups: int) -> Tensor:
    """Put an output's numbers, [out, groups or a multiple], [out / L, groups, .., L]."""
    lanes = library().sdsat_lanes()
    return numbers.view(-1, lanes, groups, numbers.shape[1] // groups).permute(0, 2, 3, 1)


def _joined(*parts: Tensor) -> Tensor:
    """Join what belongs to a group, all as bytes: [out / L, groups, bytes]."""
    return torch.cat([part.contiguous().flatten(2).view(torch.uint8) for part in parts], -1)
