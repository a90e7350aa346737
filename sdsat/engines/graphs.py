"""CUDA graphs: a pass is recorded once for each shape and replayed.

A GPU then doesn't wait for Python between kernels. A recorded pass reads and writes the same
tensors every time, so its inputs are copied into tensors of its own, which slots it writes is one
of them (cache.py), and it belongs to the tensors of one cache. These are kept, with their graphs,
and lent to one generation after the other:

    Graphs.free  <-- given back when a generation's cache is no longer referenced
          |  cache(num_slots)          zeroed: nothing of the generation before is left
          v
    SlotCache          layers (keys, values), graphs {shape: inputs, replay}

Few shapes occur: numbers of rows and slots are rounded up. The recording step is a function,
`eager` where nothing is recorded.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdsat.engines.cache import SlotCache

SLOTS = 1024  # numbers of slots are rounded up to multiples
# Graphs of one cache, and caches that are not lent. Those not used for longest are dropped.
MAX_GRAPHS = 96
MAX_CACHES = 4
_WARM_UPS = 2

Step = Callable[[], tuple[Tensor, ...]]
Held = dict[Hashable, tuple[list[Tensor], Step]]  # {shape: (a graph's inputs, its replay)}


def eager(step: Step) -> Step:
    """Stand in for a recording: run the step anew each time."""
    return step


class CudaCapture:
    """The function that records a step as a CUDA graph.

    It makes of a step a function that replays what the step did on the GPU, and returns the same,
    overwritten, tensors. All graphs share one memory pool: the results of a replay last until the
    next one.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = None

    def __call__(self, step: Step) -> Step:
        """Record a step, and return its replay.

        Raises RuntimeError, torch's, for a step that can't be recorded.
        """
        with torch.cuda.device(self.stream.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(_WARM_UPS):
                    step()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                results = step()
            self.pool = self.pool or graph.pool()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return results

        return replay


@dataclass(eq=False)
class _Kept:
    num_slots: int
    layers: list[Any] | None = None
    graphs: Held = field(default_factory=dict)


class Graphs:
    """The caches of a model with their graphs.

    Attributes:
        capture: records a step.
        free: tensors with their graphs that no generation has now.
        works: whether recording has not failed; after that passes run as without.
    """

    def __init__(self, capture: Callable[[Step], Step]):
        self.capture = capture
        self.free = list[_Kept]()
        self.works = True

    def cache(self, num_layers: int, num_slots: int) -> SlotCache:
        """Lend a cache of at least so many slots, with room for padding, that nobody else has."""
        num_slots = -(-(num_slots + 32) // SLOTS) * SLOTS
        kept = next((kept for kept in self.free if kept.num_slots == num_slots), None) or _Kept(
            num_slots
        )
        # Another thread's generation may have ended meanwhile, and dropped it.
        with suppress(ValueError):
            self.free.remove(kept)
        cache = SlotCache(num_layers, num_slots, kept.layers)
        kept.layers = cache.layers
        cache.graphs = kept.graphs
        stale = [
            part
            for layer in cache.layers
            if layer.is_initialized
            for part in (layer.keys, layer.values)
        ]
        if stale:
            torch._foreach_zero_(stale)
        weakref.finalize(cache, self._give_back, kept).atexit = False
        return cache

    def _give_back(self, kept: _Kept) -> None:
        self.free.append(kept)  # in place: whenever a cache is no longer referenced, in any thread
        del self.free[:-MAX_CACHES]

    def run(
        self,
        held: Held,
        shape: Hashable,
        function: Callable[..., tuple[Tensor, ...]],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute function(*inputs), by replaying its graph.

        Where recording fails, a warning says so, and from then on functions are called.

        Args:
            held: graphs of the cache, one a shape.
            shape: which of them.
            function: must not reference a SlotCache.
            inputs: tensors of the same form for the same shape.

        Returns:
            What the function returns, in tensors that stay as they are.
        """
        if not self.works:
            return function(*inputs)
        if shape not in held:
            while len(held) >= MAX_GRAPHS:
                del held[next(iter(held))]
            with torch.inference_mode(False):  # such tensors may be written in any mode
                own = [part.clone() for part in inputs]
            try:
                held[shape] = own, self.capture(lambda: function(*own))
            except RuntimeError as error:
                warnings.warn(
                    f"CUDA graphs are off, which is slower: {str(error).splitlines()[0]}",
                    stacklevel=3,
                )
                self.works = False
                return function(*inputs)
        own, replay = held[shape] = held.pop(shape)  # the last used comes last
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        return tuple(result.clone() for result in replay())


def padded(count: int) -> int:
    """Return the rows of a graph for `count` rows: `probe_rows` tries all of these.

    They are 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, ..
    """
    step = max(1, 2 ** ((count - 1).bit_length() - 2)) if count > 1 else 1
    return -(-count // step) * step
