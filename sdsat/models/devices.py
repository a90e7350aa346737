"""Devices: what their names mean, whether a model fits there, and which layers go where.

Whether it fits is said before it is loaded.

    cpu      the CPU
    0        GPU 0
    0+1      one model on two GPUs: decoder layers split by free memory, all else on the first

accelerate's hooks move a pass from GPU to GPU, as its device map says. A layer's part of the cache
and its low-rank updates live where the layer does (engines/cache.py, adapter.py); embeddings, norm,
head and whatever decoding computes are on the first GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from sdsat.config import InputError, require
from sdsat.environment import free_memory
from sdsat.models.packed import can_pack

GIB = 2**30
# Bytes to leave on each device: for the driver's context, a pass's rows, what else is loaded.
SPARE = {"cuda": GIB // 2, "cpu": GIB // 4}


def pick_devices(device: str | None, argument: str = "device") -> tuple[torch.device, ...]:
    """Find the devices of that name: 'cpu', a GPU number, or several joined by +.

    None: CUDA device 0 where there is one, else the CPU. argument: what gave it, for messages.
    Raises InputError for any other name.
    """
    if device in (None, ""):
        return (torch.device("cuda:0" if torch.cuda.is_available() else "cpu"),)
    if device == "cpu":
        return (torch.device("cpu"),)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbers = str(device).split("+")
    others = f", a number below {count}, or different ones joined by +" if count else ""
    require(
        all(number.isdecimal() and int(number) < count for number in numbers)
        and len(set(numbers)) == len(numbers),
        f"{argument}={device}: this machine has {count} GPU{'' if count == 1 else 's'}; "
        f"expected 'cpu'{others}",
    )
    return tuple(torch.device(f"cuda:{number}") for number in numbers)


def training_dtype(device: str | None) -> str:
    """Choose the dtype of a frozen base for training on this device.

    bfloat16 takes half the memory, but where a CPU has no instructions for it a step takes 2.4
    times as long (AVX-512 alone, where oneDNN widens every number) or minutes (AVX2, where it has
    no kernels). Raises InputError for a device that isn't there.
    """
    has = torch.cpu.get_capabilities()
    # Instructions that multiply in bfloat16; the last name is ARM's.
    multiplies = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if pick_devices(device)[0].type != "cpu" or multiplies else "float32"


@dataclass(frozen=True)
class Size:
    """What a model takes, in bytes.

    Attributes:
        name: of the model.
        dtype: of its weights.
        num_layers: decoder layers.
        layer: weights of one layer.
        other: all other weights.
        position: one position of one layer's cache.
        linear: the weights of all linear layers, which a CPU holds twice.
        layers: the name of the layers' list.
        others: the names of the modules beside it.
    """

    name: str
    dtype: torch.dtype
    num_layers: int
    layer: int
    other: int
    position: int
    linear: int
    layers: str
    others: tuple[str, ...]


def model_size(name: str, config: Any, dtype: torch.dtype, adapter: int = 0) -> Size:
    """Compute the size of a model that is not loaded, from its config.

    Args:
        name: of the model.
        config: transformers' configuration.
        dtype: of the weights.
        adapter: bytes of an adapter, which count as other weights.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base = model.base_model
    prefix = model.base_model_prefix
    layer, total = (
        sum(p.numel() for p in part.parameters()) * dtype.itemsize
        for part in (base.layers[0], model)
    )
    linear = (
        sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
        * dtype.itemsize
    )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    count = len(base.layers)
    others = [f"{prefix}.{child}" for child, _ in base.named_children() if child != "layers"]
    others += [child for child, _ in model.named_children() if child != prefix]
    weights = (layer, total - count * layer + adapter, 2 * heads * dim * dtype.itemsize, linear)
    return Size(name, dtype, count, *weights, f"{prefix}.layers", tuple(others))


def free_bytes(device: torch.device) -> int:
    """Return the memory to be had on a device, in bytes.

    On a CPU it is no more than the container's limit, and 2^62 where the system doesn't say.
    """
    if device.type == "cuda":  # what this process took for models that it holds no more counts too
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    free = free_memory()
    return 2**62 if free is None else free


def split_layers(num_layers: int, layer: int, other: int, rooms: list[int]) -> list[int] | None:
    """Choose how many layers each device takes.

    One after the other goes where most room is left, `other` being on the first device.

    Args:
        num_layers: to be placed.
        layer: bytes of one layer.
        other: bytes of all else.
        rooms: bytes of each device.

    Returns:
        How many each device takes; None where they don't fit, however they are put.
    """
    rooms, counts = [rooms[0] - other, *rooms[1:]], [0] * len(rooms)
    for _ in range(num_layers):
        most = max(range(len(rooms)), key=lambda i: rooms[i])
        rooms[most] -= layer
        counts[most] += 1
    return counts if min(rooms) >= 0 else None


def place(
    size: Size,
    device: str | None,
    context: int,
    taken: dict[torch.device, int] | None = None,
    argument: str = "device",
) -> dict[str, torch.device]:
    """Make the device map {module: device} of a model.

    Args:
        size: of the model.
        device: see `pick_devices`.
        context: positions of the cache that must have room.
        taken: bytes of each device that other workers will take, to which this one's are added;
            None for a single model.
        argument: what gave the device, for messages.

    Raises:
        InputError: in one line, for a model that doesn't fit.
    """
    several = taken is not None
    taken = {} if taken is None else taken
    devices = pick_devices(device, argument)
    first = devices[0]
    spare = SPARE[devices[0].type]
    layer = size.layer + context * size.position
    other = size.other
    if can_pack(first, size.dtype):
        other += size.linear
    free = [max(0, free_bytes(where) - taken.get(where, 0)) for where in devices]
    counts = split_layers(size.num_layers, layer, other, [room - spare for room in free])
    if counts is None:
        beside = " beside other workers" if any(taken.get(where) for where in devices) else ""
        names = "cpu" if first.type == "cpu" else "+".join(str(where.index) for where in devices)
        needs = _too_large(size, devices, other, context, free)
        raise InputError(f"{argument}={names}: {needs}{beside}; {_hint(devices, several)}")
    for where, count in zip(devices, counts, strict=True):
        taken[where] = (
            taken.get(where, 0) + count * layer + spare + (other if where == first else 0)
        )
    if len(devices) == 1:
        return {"": first}
    holders = [where for where, count in zip(devices, counts, strict=True) for _ in range(count)]
    return dict.fromkeys(size.others, first) | {
        f"{size.layers}.{i}": where for i, where in enumerate(holders)
    }


def _too_large(
    size: Size, devices: tuple[torch.device, ...], other: int, context: int, free: list[int]
) -> str:
    """Say what a model needs, and what there is.

    As 'model X needs about 13.6 GiB (12.6 of weights in float16, 0.5 of cache), GPU 0 has 10.2 GiB
    free'.

    Args:
        size: of the model.
        devices: where it should go.
        other: bytes of all but the layers.
        context: positions of the cache.
        free: bytes of each device.
    """
    kind = devices[0].type
    numbers = [str(where.index) for where in devices]
    weights = size.num_layers * size.layer + other
    cache = size.num_layers * size.position * context
    total, weights_gib, cache_gib = (
        f"{n / GIB:.1f}" for n in (weights + cache + SPARE[kind] * len(devices), weights, cache)
    )
    dtype = str(size.dtype).removeprefix("torch.") + (
        ", linear layers twice" if other > size.other else ""
    )
    where = (
        "the CPU has"
        if kind == "cpu"
        else f"GPU {numbers[0]} has"
        if len(devices) == 1
        else f"GPUs {', '.join(numbers)} have"
    )
    rooms = ", ".join(f"{room / GIB:.1f}" for room in free)
    return (
        f"model {size.name} needs about {total} GiB "
        f"({weights_gib} of weights in {dtype}, {cache_gib} of cache), {where} {rooms} GiB free"
    )


def _hint(devices: tuple[torch.device, ...], several: bool) -> str:
    """Say what would fit. several: whether there may be other workers."""
    if devices[0].type == "cpu":
        return f"expected {'fewer workers, ' * several}a smaller model or dtype"
    more = "+".join(str(number) for number in range(len(devices) + 1))
    return f"expected more GPUs{' for a worker' * several}, as in {more}, a smaller model or dtype"
