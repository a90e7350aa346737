"""An adapter's matrices in 8 bits, as its file holds them: half of what bfloat16 takes."""

from __future__ import annotations

import torch
from torch import Tensor

from sdsat.config import InputError

LARGEST = 127  # in size, of a number in 8 bits
_SCALE = ".scale"


def compacted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Round every matrix to 8 bits, with a scale for each row; vectors to bfloat16.

    Args:
        weights: tensors by name.

    Returns:
        For a matrix NAME [rows, columns]: NAME int8 [rows, columns] and NAME.scale float32 [rows],
        of which an element is the product. Other floats in bfloat16; whole numbers as they are.
    """
    out = dict[str, Tensor]()
    for name, weight in weights.items():
        if not weight.is_floating_point():
            out[name] = weight
            continue
        if weight.dim() != 2:
            out[name] = weight.to(torch.bfloat16)
            continue
        wide = weight.float()
        scale = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
        out[name] = (wide / scale[:, None]).round().to(torch.int8)
        out[name + _SCALE] = scale
    return out


def restored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `compacted`: what is in 8 bits becomes float32, other tensors stay as they are.

    Raises InputError, naming the tensor, for one in 8 bits without scales of its rows.
    """
    out = {name: tensor for name, tensor in tensors.items() if not name.endswith(_SCALE)}
    for name, tensor in out.items():
        if tensor.dtype != torch.int8:
            continue
        scale = tensors.get(name + _SCALE)
        if scale is None or scale.shape != tensor.shape[:1]:
            needed = f"{name}{_SCALE} {list(tensor.shape[:1])}"
            raise InputError(f"{name} is in 8 bits and needs {needed}")
        out[name] = tensor.float() * scale[:, None]
    return out
