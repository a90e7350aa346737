"""Which engine runs a model's passes."""

from __future__ import annotations

import os
import warnings

import torch

from sdsat.config import flag, require
from sdsat.engines.base import UNPADDED, Engine, PassInput, probe_tokens
from sdsat.engines.graphs import CudaCapture, Graphs
from sdsat.engines.native.compiler import Unavailable
from sdsat.engines.native.engine import NativeEngine
from sdsat.engines.transformers import TransformersEngine
from sdsat.method.tree import make_tree
from sdsat.models.packed import PackedLinears, can_pack
from sdsat.models.sat_model import SatModel
from sdsat.models.weights import strange_part

ENGINES = ("auto", "native", "transformers")


def check_engine(engine: str, graphs: bool = True) -> None:
    """Refuse, with an InputError, anything but one of ENGINES and, for graphs, True or False."""
    require(engine in ENGINES, f"engine={engine}: expected one of {', '.join(ENGINES)}")
    flag("graphs", graphs)


def choose_engine(model: SatModel, wanted: str = "auto", graphs: bool = True) -> Engine:
    """Make the engine that a model's passes run on.

    A model with strange parts (a wrapper, a hook, a subclass) goes through its own modules.

    Args:
        model: as it is now.
        wanted: one of ENGINES; 'auto' is the native one where it can be had.
        graphs: whether passes on a GPU are recorded as CUDA graphs.

    Raises:
        InputError: in one line, if the native engine is wanted and can't be had, or if the model's
            own modules treat the rows of a pass differently.
    """
    global _made_in
    _made_in = _made_in or os.getpid()
    if wanted != "transformers":
        try:
            return NativeEngine(model)
        except Unavailable as reason:
            missing = f"engine=native: not to be had for {model.name} ({reason}); expected auto"
            require(wanted == "auto", missing)
            if model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float32):
                slower = "passes go through transformers' modules, which is slower"
                warnings.warn(f"{slower}: {reason}", stacklevel=5)
    packed = PackedLinears(model.lm) if can_pack(model.device, model.dtype) else None
    engine = TransformersEngine(model, packed)
    strange = strange_part(model.lm)
    if strange is not None:
        check_rows(engine, strange)
    one_gpu = model.device.type == "cuda" and len(model.devices) == 1  # a graph is of one GPU
    if graphs and one_gpu and strange is None:
        engine.graphs = Graphs(CudaCapture(model.device))
    return engine


@torch.inference_mode()
def check_rows(engine: TransformersEngine, strange: str) -> None:
    """Refuse a model whose own forward and whose passes differ, beyond rounding.

    They do if its `strange` part lets a row depend on the number of rows beside it, or stands
    around the whole model, where passes don't come by. Raises InputError, in one line.
    """
    model = engine.model
    tokens = probe_tokens(model, 14)
    want = model.lm(tokens[None]).logits[0].float()
    if not want.isfinite().all():
        return  # Decoding refuses such logits, and says why.
    cache = engine.new_cache(32)
    engine.prefill(cache, tokens[:6])
    parts = [want[:6]]
    for part in tokens[6:].split([1, 5, 2]):
        chain = PassInput(cache, part.tolist(), make_tree("chain", len(part) - 1))
        parts.append(engine.forward([chain], policy=UNPADDED).logits.float())
        cache.commit(tuple(range(len(part))))
    found = torch.cat(parts)
    found = torch.where(found.isinf(), want, found)  # a SAT's logits are -inf by `legal`
    near = 1e-3 if model.dtype == torch.float32 else 0.05
    require(
        bool((found - want).abs().max() <= near * want.abs().max()),
        f"model {model.name}: {strange}, and what it computes for a token depends on more than the "
        "tokens before; expected modules and hooks that treat every row of a pass alike, and none "
        "around the whole model",
    )


_made_in: int | None = None  # the process whose threads have computed with a model


def refuse_in_fork(model: SatModel) -> None:
    """Refuse a forked process, where passes would hang.

    It has none of its parent's threads, but their locks: with more than one thread it would wait
    for ever. Raises InputError.
    """
    alone = model.device.type == "cpu" and torch.get_num_threads() == 1
    require(
        _made_in in (None, os.getpid()) or alone,
        f"model {model.name}: this process was forked from {_made_in}, which had made it ready, "
        "and its passes would hang; expected a process of the start method 'spawn', or "
        "torch.set_num_threads(1) here",
    )
