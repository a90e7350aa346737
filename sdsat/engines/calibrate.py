"""Measures the cost curve once for a machine and a model, and keeps it in the cache folder."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
import warnings
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from sdsat.config import InputError
from sdsat.engines.native import bindings
from sdsat.engines.transformers import check_finite, forward, new_cache, prefill
from sdsat.files import make_folder, read_json, sha256_of, write_json
from sdsat.method.sampling import SamplingConfig
from sdsat.method.tree import make_tree

if TYPE_CHECKING:
    from sdsat.models.loading import SatModel
from sdsat.method.costs import CONTEXTS, COUNTS, CostCurve

_TURNS = 7


@torch.inference_mode()
def measure_costs(model: SatModel) -> CostCurve:
    """Medians of a few passes of every size, a few seconds in all."""
    from sdsat.engines.drafting import draft_tokens

    assert model.sat is not None
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    tokens = (
        torch.arange(max(CONTEXTS) + max(COUNTS), device=model.device) * 7919 + 11
    ) % vocabulary
    verify = []
    draft = []
    rounded = []
    for context in CONTEXTS:
        context = max(1, min(context, model.max_context - max(COUNTS)))
        cache = new_cache(model, context + max(COUNTS) + 1)
        prefill(model, cache, tokens[:context])

        def timed(
            count: int, sats: int, in_8_bits: bool, cache: Any = cache, context: int = context
        ) -> float:
            part = tokens[context : context + count].clone()
            part[count - sats :] = model.sat.token_id if model.sat else 0
            began = time.perf_counter()
            groups = ((count - sats - 1, sats),) if sats else ()
            forward(
                model, cache, part, make_tree("chain", count - sats - 1), groups, rounded=in_8_bits
            )
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            return time.perf_counter() - began

        shapes = [(count, sats, False) for count in COUNTS for sats in {0, count - 1}]
        shapes += [(count, count - 1, True) for count in COUNTS if model.rounded]
        times: dict[tuple[int, int, bool], list[float]] = {shape: [] for shape in shapes}
        for _ in range(_TURNS):
            for shape in shapes:
                times[shape].append(timed(*shape))
        verify.append([statistics.median(times[count, 0, False]) for count in COUNTS])
        draft.append([statistics.median(times[count, count - 1, False]) for count in COUNTS])
        if model.rounded:
            rounded.append([statistics.median(times[count, count - 1, True]) for count in COUNTS])
    k = model.sat.k
    part = torch.full((1 + k,), model.sat.token_id, device=model.device)
    part[0] = tokens[0]
    states, logits = forward(model, cache, part, make_tree("chain", 0), ((0, k),))
    check_finite(model, float(logits.max()))
    spent = []
    for _ in range(_TURNS):
        began = time.perf_counter()
        draft_tokens(
            model, tokens[1:2], states[1:], logits[1:], 0, make_tree("chain", k), SamplingConfig()
        ).tolist()
        spent.append(time.perf_counter() - began)
    return CostCurve(verify, draft, statistics.median(spent) / k, rounded)


def measured_costs(model: SatModel, anew: bool = False) -> CostCurve:
    """The curve from the cache folder, or measured now and put there.

    One file for each machine, number of threads, model and native engine. One process measures at a
    time, and those that wait take what it found.
    """
    from sdsat.cache_folder import creating

    model.renew()
    if model.costs is not None and not anew:
        return model.costs
    found = _circumstances(model)
    name = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16] + ".json"
    curve = None if anew else _read(name)
    try:
        if curve is None:
            with creating("costs") as folder:
                curve = (None if anew else _read(name)) or measure_costs(model)
                content = {key: value for key, value in asdict(curve).items() if key != "measured"}
                make_folder(folder / "costs")
                document = {
                    "counts": COUNTS,
                    "contexts": CONTEXTS,
                    "curve": content,
                    "environment": found,
                }
                write_json(folder / "costs" / name, document)
    except (InputError, OSError) as error:
        warnings.warn(
            f"what a pass costs is measured in every process: it cannot be kept ({error})",
            stacklevel=2,
        )
    model.costs = replace(curve or measure_costs(model), measured=True)
    return model.costs


def _circumstances(model: SatModel) -> dict[str, Any]:
    """All that the curve depends on, and that another machine, version or model may change."""
    from sdsat.environment import machine

    adapter = model.adapter.config if model.adapter else None
    sizes = {
        key: value
        for key, value in sorted(model.model.config.to_dict().items())
        if isinstance(value, (int, float))
    }
    shape = {
        "adapter": [adapter.rank, adapter.targets, adapter.head] if adapter else None,
        "k": model.sat and model.sat.k,
        **sizes,
    }
    engine = sha256_of(bindings.SOURCE) if model.native else None  # another version, other costs
    found = machine(model.devices, model.dtype, model.engine_name)
    return found | {"dtype": str(model.dtype), "shape": shape, "native": engine, "form": 3}


def _read(name: str) -> CostCurve | None:
    """A curve of the cache folder, if there is one and it is whole."""
    from sdsat.cache_folder import cache_dir

    try:
        return CostCurve(**read_json(cache_dir() / "costs" / name)["curve"])
    except (InputError, OSError, ValueError, TypeError, KeyError):
        return None
