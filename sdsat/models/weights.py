"""What engines are made of: a model's modules and weights.

Two questions are answered here: whether they are still the same, and whether they alone say what
the model computes. Engines hold weights in an order of their own, and the native one runs no module
at all. So before every generation a `Snapshot` says whether anything is another than when they were
made (Decoder.renew). And `strange_part` names what makes a model's forward another than its weights
and its config tell: a wrapper (PEFT's LoRA), a hook, a parametrization, a subclass. Such a model
goes through its own modules, and only if these treat every row alike (engines.choose.check_rows).
"""

from __future__ import annotations

import copy
import ctypes
import inspect
from collections.abc import Iterator
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _global
from transformers import PreTrainedModel

from sdsat.models.int8 import Int8Linear

# Where modules come from whose forward is known, and hooks that change nothing that is computed.
_MODULES = ("torch.nn.modules.", "transformers.", "sdsat.models.int8", "sdsat.models.blocks")
_HOOKS = ("transformers.", "accelerate.", "sdsat.")
# Attributes of a module that it computes with.
_NUMBERS = ("scaling", "attention_scaling", "variance_epsilon")
_READ = 8  # bytes of a weight that are looked at, at each of `_PLACES` places of it
_PLACES = 4


class Snapshot:
    """Modules, hooks and tensors of a model and its adapter as they are now.

    A tensor is known by its address, its version, which torch counts at every change in place, and
    its dtype; and on a CPU by a few of its numbers, because torch doesn't count changes through
    `.data` (PEFT merges so). What such a change leaves alone but for a few rows is not noticed.
    """

    def __init__(self, *roots: nn.Module | None):
        self._roots = [root for root in roots if root is not None]
        # They are kept alive, so that nothing else gets their ids.
        self._alive = [
            part for module in _walk(self._roots) for part in (module, *_tensors(module))
        ]
        self._facts = _facts(self._roots)
        self._places = [
            place for part in self._alive if isinstance(part, Tensor) for place in _places(part)
        ]
        self._numbers = self._read()

    def _read(self) -> list[bytes]:
        return [ctypes.string_at(place, _READ) for place in self._places]

    def holds(self) -> bool:
        """Tell whether all of it is still so."""
        # In this order: while the facts hold, the addresses that are read are still theirs.
        return _facts(self._roots) == self._facts and self._read() == self._numbers


def _walk(roots: list[nn.Module]) -> Iterator[nn.Module]:
    """Yield every module, one that is used twice, twice. Faster than `modules()`, hence here."""
    todo = [*roots]
    while todo:
        module = todo.pop()
        yield module
        todo += [child for child in module.__dict__["_modules"].values() if child is not None]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    held = module.__dict__
    for tensor in (*held["_parameters"].values(), *held["_buffers"].values()):
        if tensor is not None:
            yield tensor


def _hooks(module: nn.Module) -> list[Any]:
    held = module.__dict__
    return [*held["_forward_hooks"].values(), *held["_forward_pre_hooks"].values()]


def _global_hooks() -> list[Any]:
    return [*_global._global_forward_hooks.values(), *_global._global_forward_pre_hooks.values()]


def _forward_of(kind: type[nn.Module]) -> list[Any]:
    """List a class's forward and the functions that it calls by name, as they are now."""
    forward = kind.forward
    names, scope = _called(forward)
    return [forward, *(scope[name] for name in names if isinstance(scope[name], FunctionType))]


@lru_cache(maxsize=1024)
def _called(forward: Any) -> tuple[list[str], dict[str, Any]]:
    """Find the names of a function's module that it uses, and the module's names."""
    inner = inspect.unwrap(forward)
    if not isinstance(inner, FunctionType):
        return [], {}
    scope = inner.__globals__
    return [name for name in inner.__code__.co_names if name in scope], scope


def _facts(roots: list[nn.Module]) -> list[Any]:
    """List numbers and types that change with what is computed, or computed with."""
    facts: list[Any] = [id(hook) for hook in _global_hooks()]
    facts += [
        getattr(root, "config", None) and getattr(root.config, "_attn_implementation", None)
        for root in roots
    ]
    kinds: dict[type[nn.Module], None] = {}  # an ordered set
    for module in _walk(roots):
        held = module.__dict__
        kinds[type(module)] = None
        facts += (id(module), type(module), id(held.get("forward")), len(held["_modules"]))
        facts += [held[name] for name in _NUMBERS if name in held]
        if held["_forward_hooks"] or held["_forward_pre_hooks"]:
            facts += map(id, _hooks(module))
        for tensor in _tensors(module):
            version = 0 if tensor.is_inference() else tensor._version
            facts += (id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.numel())
    for kind in kinds:
        facts += _forward_of(kind)
    return facts


def _places(tensor: Tensor) -> list[int]:
    """List addresses in a tensor, spread over it, at which `_READ` bytes may be read."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or size < _READ:
        return []
    return [
        tensor.data_ptr() + (size - _READ) * part // (_PLACES - 1) // 2 * 2
        for part in range(_PLACES)
    ]


def strange_part(model: PreTrainedModel) -> str | None:
    """Name the first thing that makes a model's forward another than weights and config tell.

    None where there is none.
    """
    if any(not _from(hook, _HOOKS) for hook in _global_hooks()):
        return "there is a forward hook for all modules"
    for name, module in model.named_modules():
        kind = type(module)
        where = name or "the model"
        if not _from(kind, _MODULES):
            return f"{where} is a {_name(kind)}"
        if not _from(kind.forward, _MODULES):
            return f"{where} has the forward {_name(kind.forward)}"
        if (other := _replaced(kind)) is not None:
            return f"{where} calls {other}"
        own = vars(module).get("forward")
        if own is not None and not _from(own, _HOOKS):
            return f"{where} has a forward of its own"
        if any(not _from(hook, _HOOKS) for hook in _hooks(module)):
            return f"{where} has a forward hook"
    return _another_form(model)


def _replaced(kind: type[nn.Module]) -> str | None:
    """Name a function that a class of transformers calls and another package made."""
    if not _from(kind, ("transformers.",)):
        return None
    for function in _forward_of(kind):
        if not _from(function, ("torch.", "transformers.")):
            return _name(function)
    return None


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _from(thing: Any, packages: tuple[str, ...]) -> bool:
    """Tell whether a class, or what is called like a function, is from one of these packages."""
    while isinstance(thing, partial):
        thing = thing.func
    return str(getattr(thing, "__module__", "")).startswith(packages)


def _another_form(model: PreTrainedModel) -> str | None:
    """Say what is another in `model` than in a new model of its class and its config.

    Tensors are left out: an engine reads them as they are. None where all is the same.
    """
    with torch.device("meta"):
        new = type(model)(copy.deepcopy(model.config))
    want = dict(new.named_modules())
    have = dict(model.named_modules())
    for name in sorted(want.keys() ^ have.keys()):
        return f"it has {'no' if name in want else 'a'} module {name}"
    for name, module in have.items():
        kind = nn.Linear if isinstance(module, Int8Linear) else type(module)
        if kind is not type(want[name]):
            return (
                f"{name} is a {type(module).__name__}; its config has a {type(want[name]).__name__}"
            )
        for key, value in (
            _settings(module).items() if name and module is not model.base_model else ()
        ):
            if key in (other := _settings(want[name])) and other[key] != value:
                return f"{name} has {key}={value}; its config has {other[key]}"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    """Collect a module's numbers, such as the epsilon of a norm."""
    return {key: value for key, value in vars(module).items() if type(value) in (int, float)}
