"""Calibration: the cost curve of a machine and a model, measured once and kept."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sdsat.cache_folder import cache_dir, creating
from sdsat.config import InputError, SamplingConfig
from sdsat.engines.base import Cache, Engine, PassInput, probe_tokens
from sdsat.engines.drafting import Guesses
from sdsat.engines.native.compiler import source_hash
from sdsat.engines.native.engine import NativeEngine
from sdsat.environment import machine
from sdsat.files import make_folder, read_json, write_json
from sdsat.method.costs import CONTEXTS, COUNTS, CostCurve
from sdsat.method.layout import SatGroup
from sdsat.method.tree import make_tree

_TURNS = 7  # passes of each shape at most, of which the median counts
_ENOUGH = 0.4  # seconds that two passes or more of a shape took: no more are needed
_FORM = 3  # version of the files in the cache folder


@dataclass(frozen=True)
class _Shape:
    """A pass of a chain of standard tokens and, at its end, one group of SATs."""

    rows: int
    sats: int
    rounded: bool = False

    def seconds(self, engine: Engine, cache: Cache, tokens: list[int]) -> float:
        """Time one such pass, in seconds.

        tokens: at least as many as it has rows.
        """
        began = time.perf_counter()
        nodes = self.rows - self.sats
        groups = (SatGroup(nodes - 1, self.sats),) if self.sats else ()
        chain = PassInput(cache, tokens[:nodes], make_tree("chain", nodes - 1), groups)
        engine.forward([chain], rounded=self.rounded)
        engine.synchronize()
        return time.perf_counter() - began


@torch.inference_mode()
def measure_costs(engine: Engine) -> CostCurve:
    """Measure a few passes of every size, some seconds in all, and take medians.

    Raises InputError for a model whose logits are NaN or infinite.
    """
    model = engine.model
    tokens = probe_tokens(model, max(CONTEXTS) + max(COUNTS))
    engine.prepare(rounded=engine.rounding_pays)
    verify = []
    draft = []
    rounded = []
    bar = tqdm(
        total=len(CONTEXTS) * _TURNS,
        desc="measuring what passes cost here, once",
        bar_format="{desc}: {percentage:3.0f}% |{bar}|",
        disable=None,
        leave=False,
        delay=1,
    )
    for context in CONTEXTS:
        context = max(1, min(context, model.max_context - max(COUNTS)))
        cache = engine.new_cache(context + max(COUNTS) + 1)
        engine.prefill(cache, tokens[:context])
        after = tokens[context : context + max(COUNTS)].tolist()
        shapes = [_Shape(rows, sats) for rows in COUNTS for sats in {0, rows - 1}]
        shapes += [_Shape(rows, rows - 1, True) for rows in COUNTS if engine.rounding_pays]
        taken: dict[_Shape, list[float]] = {shape: [] for shape in shapes}
        for _ in range(_TURNS):
            for shape, seconds in taken.items():
                if len(seconds) < 2 or sum(seconds) < _ENOUGH:
                    seconds.append(shape.seconds(engine, cache, after))
            bar.update()
        times = {shape: statistics.median(seconds) for shape, seconds in taken.items()}
        verify.append([times[_Shape(rows, 0)] for rows in COUNTS])
        draft.append([times[_Shape(rows, rows - 1)] for rows in COUNTS])
        if engine.rounding_pays:
            rounded.append([times[_Shape(rows, rows - 1, True)] for rows in COUNTS])
    bar.close()
    return CostCurve(verify, draft, _seconds_to_draft(engine, cache, tokens), rounded)


def _seconds_to_draft(engine: Engine, cache: Cache, tokens: torch.Tensor) -> float:
    """Time turning one SAT's logits into a draft, in seconds, in a chain of the trained depth."""
    model = engine.model
    assert model.sat is not None
    k = model.sat.k
    root = make_tree("chain", 0)
    group = PassInput(cache, tokens[:1].tolist(), root, (SatGroup(0, k),))
    out = engine.forward([group])
    model.check_finite(float(out.logits.max()))
    chain = make_tree("chain", k)
    how = (0, SamplingConfig(), model.draft_ids)
    guesses = Guesses(tokens[:2], out.states[1:], out.sat_logits, *how)
    spent = []
    for _ in range(_TURNS):
        began = time.perf_counter()
        engine.draft(guesses, chain).tolist()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent) / k


def measured_costs(engine: Engine, anew: bool = False) -> CostCurve:
    """Take the curve from the cache folder, or measure it now and put it there.

    One file for each machine, number of threads, model and native engine. One process measures at a
    time, and those that wait take what it found. Where the curve can't be kept, a warning says so.

    anew: measure even if the folder has a curve. Raises InputError as `measure_costs`.
    """
    found = _circumstances(engine)
    name = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16] + ".json"
    curve = None if anew else _read(name)
    if curve is None:
        with ExitStack() as stack:
            folder = _locked_folder(stack)
            curve = (None if anew else _read(name)) or measure_costs(engine)
            if folder is not None:
                _write(folder, name, curve, found)
    return replace(curve, measured=True)


def _locked_folder(stack: ExitStack) -> Path | None:
    """The cache folder, locked until `stack` ends; None, and a warning, where it can't be used."""
    try:
        return stack.enter_context(creating("costs"))
    except (InputError, OSError) as error:
        _warn(error)
        return None


def _warn(error: Exception) -> None:
    warnings.warn(
        f"what a pass costs is measured in every process: it cannot be kept ({error})",
        stacklevel=2,
    )


def _write(folder: Path, name: str, curve: CostCurve, found: dict[str, Any]) -> None:
    content = {key: value for key, value in asdict(curve).items() if key != "measured"}
    document = {"counts": COUNTS, "contexts": CONTEXTS, "curve": content, "environment": found}
    try:
        make_folder(folder / "costs")
        write_json(folder / "costs" / name, document)
    except (InputError, OSError) as error:
        _warn(error)


def _circumstances(engine: Engine) -> dict[str, Any]:
    """Collect all that the curve depends on: machine, versions and model."""
    model = engine.model
    adapter = model.adapter.config if model.adapter else None
    settings = sorted(model.config.to_dict().items())
    sizes = {key: value for key, value in settings if isinstance(value, (int, float))}
    shape = {
        "adapter": [adapter.rank, adapter.targets, adapter.head] if adapter else None,
        "k": model.sat and model.sat.k,
        **sizes,
    }
    native = source_hash() if isinstance(engine, NativeEngine) else None
    where = machine(model.devices, model.dtype_name, engine.name)
    measured = {"shape": shape, "native": native, "rounding_pays": engine.rounding_pays}
    return where | measured | {"form": _FORM}


def _read(name: str) -> CostCurve | None:
    """Read a curve of the cache folder; None unless there is one and it is whole."""
    try:
        return CostCurve(**read_json(cache_dir() / "costs" / name)["curve"])
    except (InputError, OSError, ValueError, TypeError, KeyError):
        return None
