"""The cost curve: seconds that a pass of n rows takes here with this model, measured once and kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import native
from .config import MAX_ROWS, InputError
from .engine import check_finite, forward, new_cache, prefill
from .files import make_folder, read_json, sha256_of, write_json
from .sampling import SamplingConfig
from .tree import make_tree

if TYPE_CHECKING:
    from .model import SatModel

COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32)  # rows
CONTEXTS = (128, 1024)
_TURNS = 7
LONGEST_PASS = 3600.0  # seconds; a curve that says more is damaged


@dataclass(frozen=True)
class CostCurve:
    """verify[c][i]: seconds of a pass of COUNTS[i] standard rows at CONTEXTS[c]; draft[c][i]: of one whose rows but the first
    are SATs; rounded[c][i]: of the same in 8 bits, [] where there is no such engine. drafting: seconds to turn one SAT's logits
    into a draft. measured: by this program, here, and not given by the caller.

    What it says rises with rows, SATs and context, and is positive: the nearest such curve to what was measured, for a clock
    on a busy machine is noisy. Raises ValueError unless there is a positive time for every size.
    """

    verify: list[list[float]]
    draft: list[list[float]]
    drafting: float
    rounded: list[list[float]] = field(default_factory=list)
    measured: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        for part in (self.verify, self.draft, *([self.rounded] if self.rounded else [])):
            times = [time for row in part for time in row]
            good = all(_is_time(time) and time > 0 for time in times)
            if np.shape(part) != (len(CONTEXTS), len(COUNTS)) or not good:
                raise ValueError("a cost curve needs a positive time for every number of rows and every context")
        if not _is_time(self.drafting):
            raise ValueError(f"drafting={self.drafting}: expected seconds")

    @cached_property
    def _tables(self) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
        """By context: seconds of a pass for each number of rows, what each number of SATs adds, and passes in 8 bits."""
        verify = _rising(np.array(self.verify))
        extra = _rising(np.maximum(0, np.array(self.draft) - verify))
        rounded = _rising(np.array(self.rounded)) if self.rounded else np.empty((0, len(COUNTS)))
        by_sats = [np.append(times[1:], times[-1]) for times in map(_by_rows, extra)]
        by_rows, in_8_bits = ([_by_rows(times).tolist() for times in part] for part in (verify, rounded))
        return by_rows, [times.tolist() for times in by_sats], in_8_bits

    def seconds(self, rows: int, sats: int, context: int, batch: int = 1) -> float:
        """Of a pass of `rows` rows, `sats` of them SATs, after `context` tokens, with the drafting of one group a sequence.

        batch: of how many sequences the rows are.
        """
        by_rows, by_sats, _ = self._tables
        low, high = (_at(by_rows[c], rows) + (_at(by_sats[c], sats) if sats else 0.0) for c in (0, 1))
        return _between(low, high, context) + (self.drafting * min(sats, 16 * batch) if sats else 0.0)

    def rounded_seconds(self, sats: int, context: int) -> float:
        """Of a pass in 8 bits of one row and `sats` SATs, with their drafting."""
        low, high = (_at(times, 1 + sats) for times in self._tables[2])
        return _between(low, high, context) + self.drafting * sats


def _is_time(seconds: Any) -> bool:
    """Whether a pass may take so long."""
    return isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 <= seconds < LONGEST_PASS


def _rising(times: np.ndarray) -> np.ndarray:
    """[contexts, counts] near `times` by least squares: rising with the rows, as does what a longer context adds, from 0 on.

    So a line through both contexts rises with the rows at any other one, too.
    """
    from scipy.optimize import isotonic_regression  # takes a while, and AR needs no costs

    near, far = np.where(times[0] <= times[1], times, times.mean(0))
    near, added = isotonic_regression(near).x, isotonic_regression(far - near).x
    return np.stack([near, near + added])


def _by_rows(times: np.ndarray) -> np.ndarray:
    """Seconds for 0..MAX_ROWS rows out of those for COUNTS, and a straight line beyond the last count."""
    grown = np.interp(np.arange(MAX_ROWS + 1), COUNTS, times)
    last = COUNTS[-1]
    grown[last:] = grown[last] + grown[last] / last * np.arange(MAX_ROWS + 1 - last)
    return grown


def _at(times: list[float], rows: int) -> float:
    """The entry for `rows`; beyond the table, where arithmetic sets the cost, in proportion."""
    return times[rows] if rows <= MAX_ROWS else times[MAX_ROWS] * rows / MAX_ROWS


def _between(low: float, high: float, context: int) -> float:
    near, far = CONTEXTS
    return low + max(0.0, (context - near) / (far - near)) * (high - low)


@torch.inference_mode()
def measure_costs(model: SatModel) -> CostCurve:
    """Medians of a few passes of every size, a few seconds in all."""
    from .draft import draft_tokens

    assert model.sat is not None
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(max(CONTEXTS) + max(COUNTS), device=model.device) * 7919 + 11) % vocabulary
    verify, draft, rounded = [], [], []
    for context in CONTEXTS:
        context = max(1, min(context, model.max_context - max(COUNTS)))
        cache = new_cache(model, context + max(COUNTS) + 1)
        prefill(model, cache, tokens[:context])

        def timed(count: int, sats: int, in_8_bits: bool, cache: Any = cache, context: int = context) -> float:
            part = tokens[context : context + count].clone()
            part[count - sats :] = model.sat.token_id if model.sat else 0
            began = time.perf_counter()
            groups = ((count - sats - 1, sats),) if sats else ()
            forward(model, cache, part, make_tree("chain", count - sats - 1), groups, rounded=in_8_bits)
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
        draft_tokens(model, tokens[1:2], states[1:], logits[1:], 0, make_tree("chain", k), SamplingConfig()).tolist()
        spent.append(time.perf_counter() - began)
    return CostCurve(verify, draft, statistics.median(spent) / k, rounded)


def measured_costs(model: SatModel, anew: bool = False) -> CostCurve:
    """The curve from the cache folder, or measured now and put there. One file for each machine, number of threads,
    model and native engine. One process measures at a time, and those that wait take what it found.
    """
    from .kept import creating

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
                document = {"counts": COUNTS, "contexts": CONTEXTS, "curve": content, "environment": found}
                write_json(folder / "costs" / name, document)
    except (InputError, OSError) as error:
        warnings.warn(f"what a pass costs is measured in every process: it cannot be kept ({error})", stacklevel=2)
    model.costs = replace(curve or measure_costs(model), measured=True)
    return model.costs


def _circumstances(model: SatModel) -> dict[str, Any]:
    """All that the curve depends on, and that another machine, version or model may have otherwise."""
    from .records import machine

    adapter = model.adapter.config if model.adapter else None
    sizes = {key: value for key, value in sorted(model.model.config.to_dict().items()) if isinstance(value, (int, float))}
    shape = {
        "adapter": [adapter.rank, adapter.targets, adapter.head] if adapter else None,
        "k": model.sat and model.sat.k,
        **sizes,
    }
    engine = sha256_of(native.SOURCE) if model.native else None  # another version, other costs
    return machine(model) | {"dtype": str(model.dtype), "shape": shape, "native": engine, "form": 3}


def _read(name: str) -> CostCurve | None:
    """A curve of the cache folder, if there is one and it is whole."""
    from .kept import cache_dir

    try:
        return CostCurve(**read_json(cache_dir() / "costs" / name)["curve"])
    except (InputError, OSError, ValueError, TypeError, KeyError):
        return None
