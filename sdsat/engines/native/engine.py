"""The native engine: a pass of a Llama-form decoder on a CPU in one call, bfloat16 and float32.

It does what transformers' modules do, with the same weights and the same rounding between
operations, but reads every weight once at the memory's pace and leaves no work between two layers
to Python. A row's result has the same bits whatever its pass looks like: forward.h says why. The
library is compiled at first use (a C++ compiler; some seconds) and kept in the cache folder;
without a compiler, on a GPU, and for sizes that it was not written for, passes go through
transformers' modules (sdsat/engines/transformers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p
from functools import cached_property, lru_cache
from typing import ClassVar, cast

import torch
from torch import Tensor

from sdsat.config import SamplingConfig, require
from sdsat.engines.base import Cache, Engine, OnRead, PassInput, PassOutput, RowPolicy, tokens_of
from sdsat.engines.drafting import Guesses, shortlist_of
from sdsat.engines.native.bindings import (
    CacheStruct,
    Drafting,
    Pass,
    Sampling,
    call,
    library,
    pointer,
    readable,
)
from sdsat.engines.native.weights import NativeWeights
from sdsat.method.layout import Layout, batch_layout
from sdsat.method.sampling import as_seed
from sdsat.method.tree import DraftTree
from sdsat.models.dtypes import INT8
from sdsat.models.sat_model import SatModel

PREFILL_ROWS = 256  # rows of one pass over a prompt
_LANES_OF_AVX2 = 8
_KEYS = 64  # keys of so many tokens lie together (KEY_BLOCK in cache.h)


class NativeCache:
    """Keys and values in the order of cache.h; `length` committed tokens of one sequence.

    It is sized once and written in place.
    """

    def __init__(self, weights: NativeWeights, num_slots: int):
        config = weights.struct
        slots = -(-num_slots // _KEYS) * _KEYS
        shape = (config.layers, config.kv_heads, slots, config.dim)
        self.keys, self.values = (torch.zeros(shape, dtype=weights.dtype) for _ in range(2))
        self.struct = CacheStruct(self.keys.data_ptr(), self.values.data_ptr(), slots)
        self.weights = weights
        self.length = 0

    def commit(self, rows: tuple[int, ...]) -> None:
        """See engines.base.Cache.commit; the pass's other rows are forgotten."""
        if rows != tuple(range(len(rows))):
            slots = torch.tensor([self.length + row for row in rows])
            struct = self.weights.struct
            counts = (c_int64(self.length), c_void_p(slots.data_ptr()), c_int64(len(rows)))
            call("sdsat_move", byref(struct), byref(self.struct), *counts, self.weights.is_bf16)
        self.length += len(rows)

    def copy(self, source: NativeCache, length: int) -> None:
        """Hold the first `length` tokens of another cache of this engine, and nothing else."""
        held = -(-length // _KEYS) * _KEYS
        for own, other in ((self.keys, source.keys), (self.values, source.values)):
            own[:, :, :held] = other[:, :, :held]
        self.length = length


class NativeEngine(Engine):
    """Passes in one call of the C++ library.

    Rounded passes read the cache of the exact ones; what they write there is never kept. Raises
    Unavailable for a model, a device or a machine that it wasn't written for.
    """

    has_rounded: ClassVar[bool] = True
    exact_trees: ClassVar[bool] = True

    def __init__(self, model: SatModel):
        super().__init__(model)
        self.exact = NativeWeights(model)

    @property
    def name(self) -> str:
        """The name 'native'."""
        return "native"

    @cached_property
    def rounded(self) -> NativeWeights:
        """The rounded weights, made when first asked for."""
        return NativeWeights(self.model, self.exact)

    @property
    def keeps(self) -> bool:
        """See Engine.keeps: a row has the same bits in any pass."""
        return True

    @property
    def rounding_pays(self) -> bool:
        """See Engine.rounding_pays.

        Not where arithmetic is the limit in 8 bits already, as it is without AVX-512: there a copy
        in 5 bits would take a third of the weights' memory more, and `auto` win nothing by it.
        """
        return self.model.dtype_name != INT8 or library().sdsat_lanes() > _LANES_OF_AVX2

    def prepare(self, rounded: bool) -> None:
        """See Engine.prepare."""
        if rounded:
            _ = self.rounded

    def new_cache(self, num_slots: int) -> NativeCache:
        """See Engine.new_cache."""
        return NativeCache(self.exact, num_slots)

    def prefill(
        self, cache: Cache, tokens: Tensor, held: int = 0, on_read: OnRead | None = None
    ) -> None:
        """See Engine.prefill."""
        own = cast(NativeCache, cache)
        own.length = held
        if on_read is not None:
            on_read(0, len(tokens))
        for part in tokens.split(PREFILL_ROWS) if len(tokens) else ():
            rows = torch.arange(len(part))
            causal = Layout(rows <= rows[:, None], rows, torch.zeros_like(rows), rows, len(part))
            self._call(self.exact, [own], self.model.embed(part[None])[0], causal)
            own.commit(tuple(range(len(part))))
            if on_read is not None:
                on_read(own.length - held, len(tokens))

    def forward(
        self, inputs: Sequence[PassInput], rounded: bool = False, policy: RowPolicy | None = None
    ) -> PassOutput:
        """See Engine.forward; rows need no padding."""
        sats = sum(part.num_sats for part in inputs)
        tokens = torch.tensor(tokens_of(inputs, self.model.sat))
        layout = batch_layout(
            [(part.tree, part.groups) for part in inputs], len(tokens), self.model.device
        )
        caches = [cast(NativeCache, part.cache) for part in inputs]
        embeddings = self.model.embed(tokens[None])[0]
        out = self.run(caches, embeddings, layout, sats, rounded=rounded)
        logits = out.logits
        ids = self.model.draft_ids
        if rounded and ids is not None:
            logits = logits.new_full((len(tokens) - sats, self.exact.struct.vocabulary), -torch.inf)
            logits[:, ids] = out.logits
        legal = self.model.legal
        return out._replace(logits=legal(logits), sat_logits=legal(out.sat_logits))

    def run(
        self,
        caches: Sequence[NativeCache],
        embeddings: Tensor,
        layout: Layout,
        sats: int = 0,
        rounded: bool = False,
    ) -> PassOutput:
        """Run one pass over the sequences of `caches`; commits nothing.

        Args:
            caches: one a sequence; every row sees all that its sequence has committed.
            embeddings: [N, D].
            layout: of the N rows.
            sats: how many of the last rows are SATs.
            rounded: with the rounded weights.

        Returns:
            Last hidden states [N, D], logits [N - sats, V] and SATs' logits [sats, C], as of
            `PassOutput`; in a rounded pass the former too are over the draft vocabulary.

        Raises:
            InputError: for tensors that C++ can't read.
        """
        weights = self.rounded if rounded else self.exact
        dtype = weights.dtype
        rows = len(embeddings)
        states = torch.empty(rows, weights.struct.hidden, dtype=dtype)
        size = weights.struct.draft_tokens
        apart = sats if size else 0  # rows whose logits are over the draft vocabulary
        logits = torch.empty(max(0, rows - apart), weights.struct.vocabulary, dtype=dtype)
        sat_logits = torch.empty(apart, size, dtype=dtype)
        self._call(weights, caches, embeddings, layout, sats, (states, logits, sat_logits))
        nodes = rows - sats
        return PassOutput(states, logits[:nodes], sat_logits if size else logits[nodes:])

    def _call(
        self,
        weights: NativeWeights,
        caches: Sequence[NativeCache],
        embeddings: Tensor,
        layout: Layout,
        sats: int = 0,
        out: tuple[Tensor, ...] = (),
    ) -> None:
        """Run one pass. out: a `PassOutput` to fill; () where keys and values are enough."""
        rows = len(embeddings)
        width = weights.struct.hidden
        x = readable("embeddings", embeddings, weights.dtype, rows, width).clone()
        held = torch.tensor([self._checked(cache).length for cache in caches])
        lengths = held.expand(rows) if len(caches) == 1 else held[layout.sequences]
        slots = lengths + layout.places
        numbers = (lengths + layout.offsets, slots, layout.sequences, lengths)
        read = [readable("layout", part, torch.long, rows) for part in numbers]
        within = readable("within", layout.within, torch.bool, rows, rows)
        weights.struct.threads = torch.get_num_threads()
        wanted: list[int | None] = [tensor.data_ptr() for tensor in out] or [None] * 3
        given = [tensor.data_ptr() for tensor in (*read, within)]
        struct = Pass(x.data_ptr(), *wanted, *given, len(caches), rows, sats)
        structs = (CacheStruct * len(caches))(*(cache.struct for cache in caches))
        call("sdsat_pass", byref(weights.struct), structs, byref(struct), weights.is_bf16)

    def _checked(self, cache: NativeCache) -> NativeCache:
        """Return the cache, if it is of this model's form. Raises InputError if it isn't."""
        config = self.exact.struct
        shape = (config.layers, config.kv_heads, cache.struct.slots, config.dim)
        for part in (cache.keys, cache.values):
            readable("cache", part, self.exact.dtype, *shape)
        return cache

    def largest(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See Engine.largest; of equals the lower id comes first."""
        logits = readable("logits", logits, self.exact.dtype, None, None)
        values = torch.empty(len(logits), count, dtype=torch.float32)
        ids = torch.empty(len(logits), count, dtype=torch.long)
        sizes = (c_int64(len(logits)), c_int64(logits.shape[-1]), c_int64(count))
        x, i, v = (c_void_p(tensor.data_ptr()) for tensor in (logits, ids, values))
        call("sdsat_largest", x, *sizes, i, v, torch.get_num_threads(), self.exact.is_bf16)
        return values, ids

    def draw(
        self, logits: Tensor, index: Tensor, sampling: SamplingConfig, seeds: Tensor | None = None
    ) -> Tensor:
        """See Engine.draw; without sorting, and without noise for the whole vocabulary."""
        logits = readable("logits", logits, self.exact.dtype, None, None)
        index = readable("index", index, torch.long, len(logits))
        seeds = torch.full_like(index, as_seed(sampling.seed)) if seeds is None else seeds
        seeds = readable("seeds", seeds, torch.long, len(logits))
        chosen = torch.empty_like(index)
        x, i, s, out = (c_void_p(tensor.data_ptr()) for tensor in (logits, index, seeds, chosen))
        sizes = (c_int64(len(logits)), c_int64(logits.shape[-1]))
        how = (byref(Sampling.of(sampling)), out, torch.get_num_threads(), self.exact.is_bf16)
        call("sdsat_choose", x, *sizes, i, s, *how)
        return chosen

    def draft(self, guesses: Guesses, tree: DraftTree, shortlist: int | None = None) -> Tensor:
        """See Engine.draft; in one call.

        shortlist: how many of a SAT's candidates are looked at; None: `drafting.shortlist_of`.
        """
        if shortlist is None:
            shortlist = shortlist_of(tree.width, guesses.logits.shape[-1])
        found = torch.empty(2, len(tree), dtype=torch.float64)
        self._draft("sdsat_draft", guesses, shortlist, _shape(tree), found)
        return found

    def grow(self, guesses: Guesses, nodes: int) -> Tensor:
        """See Engine.grow; in one call."""
        shortlist = shortlist_of(nodes - 1, guesses.logits.shape[-1])
        found = torch.zeros(2, nodes, dtype=torch.float64)
        shape = (*torch.zeros(2, nodes, dtype=torch.long), None)
        self._draft("sdsat_grow", guesses, shortlist, shape, found)
        return torch.cat([torch.stack(shape[:2]).double(), found])

    def _draft(
        self,
        function: str,
        guesses: Guesses,
        shortlist: int,
        shape: tuple[Tensor | None, ...],
        found: Tensor,
    ) -> None:
        """Have a function of the library draft.

        Args:
            function: its name.
            guesses: as of `draft`.
            shortlist: as of `draft`.
            shape: parents, ranks and depths of the tree, [N] each; what is not given is found.
            found: [2, N], to be filled with tokens and how likely they are.

        Raises:
            InputError: for tensors that C++ can't read.
        """
        struct = self.exact.struct
        states = readable("states", guesses.states, self.exact.dtype, None, struct.hidden)
        columns = struct.vocabulary if guesses.ids is None else len(guesses.ids)
        logits = readable("logits", guesses.logits, self.exact.dtype, len(states), columns)
        ids = None if guesses.ids is None else readable("ids", guesses.ids, torch.long, columns)
        text = readable("text", guesses.text, torch.long, None)
        require(len(text) > 0, "text: expected at least the root's token")
        found[0, 0] = text[-1]
        found[1, 0] = 1.0
        sampling = guesses.sampling
        pointers = map(pointer, (states, logits, ids, *shape, *found, text))
        sizes = (len(text), found.shape[1], len(logits), columns, shortlist)
        numbers = (*sizes, guesses.index, as_seed(sampling.seed))
        drafting = Drafting(*pointers, *numbers, Sampling.of(sampling))
        struct.threads = torch.get_num_threads()
        call(function, byref(struct), byref(drafting), self.exact.is_bf16)


@lru_cache(maxsize=256)
def _shape(tree: DraftTree) -> tuple[Tensor, ...]:
    """Return parents, ranks and depths of a tree, [N] each."""
    return tuple(torch.tensor([tree.parents, tree.ranks, tree.depths]))
