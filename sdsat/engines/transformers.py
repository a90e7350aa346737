"""The engine that runs passes through transformers' own modules, on any device.

Rows get the same bits in any pass by arrangement: the cache has a fixed length, which depends on
the prompt and max_new_tokens alone, and passes are padded as the row policy says. Where it helps,
linear layers read weights in the processor's own order (models/packed.py), and on a GPU passes are
recorded as CUDA graphs (graphs.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from sdsat.engines.base import (
    BatchCaches,
    Cache,
    Engine,
    OnRead,
    PassInput,
    PassOutput,
    RowPolicy,
    SeparateCaches,
    tokens_of,
)
from sdsat.engines.cache import SlotCache, SlotPlace, pass_mask, slot_positions
from sdsat.engines.graphs import Graphs, padded
from sdsat.method.layout import batch_layout, pass_layout
from sdsat.models.packed import PackedLinears, in_use
from sdsat.models.sat_model import SatModel

_BLOCK = 64  # slots: a shared pass reads whole blocks


class TransformersEngine(Engine):
    """Passes through the model's modules.

    Attributes:
        packed: the linear layers' weights in the processor's order, attached here; None: as they
            are.
        graphs: recorded passes on a GPU; None: each pass is run anew.
    """

    policies: ClassVar[tuple[RowPolicy, ...]] = (
        RowPolicy(1, 1),
        RowPolicy(2, 1),
        RowPolicy(4, 1),
        RowPolicy(4, 4),
        RowPolicy(8, 8),
        RowPolicy(16, 16),
    )
    fallback: ClassVar[RowPolicy] = RowPolicy(4, 4, stable=False)

    def __init__(
        self, model: SatModel, packed: PackedLinears | None = None, graphs: Graphs | None = None
    ):
        super().__init__(model)
        self.packed = packed.attach() if packed else None
        self.graphs = graphs

    @property
    def name(self) -> str:
        """'cuda graphs' while passes are recorded, else 'transformers'."""
        return "cuda graphs" if self.graphs and self.graphs.works else "transformers"

    def close(self) -> None:
        """Give the linear layers their own weights back."""
        if self.packed is not None:
            self.packed.detach()

    @contextmanager
    def detached(self) -> Iterator[None]:
        """See Engine.detached."""
        self.close()
        try:
            yield
        finally:
            if self.packed is not None:
                self.packed.attach()

    def synchronize(self) -> None:
        """See Engine.synchronize."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def new_cache(self, num_slots: int) -> SlotCache:
        """See Engine.new_cache."""
        make = self.graphs.cache if self.graphs else SlotCache
        return make(self.model.num_layers, num_slots)

    def batch_caches(self, size: int, num_slots: int) -> BatchCaches:
        """See Engine.batch_caches: several sequences share one tensor, which attention reads."""
        return SharedCaches(self, size, num_slots) if size > 1 else SeparateCaches(self)

    @property
    def keeps(self) -> bool:
        """See Engine.keeps: in half precision passes of other sizes round differently.

        And on a GPU another cache may write where this one's numbers are (graphs.py).
        """
        exact = self.model.dtype in (torch.float32, torch.float64)
        return exact and self.model.device.type == "cpu"

    @in_use()
    def prefill(
        self, cache: Cache, tokens: Tensor, held: int = 0, on_read: OnRead | None = None
    ) -> None:
        """See Engine.prefill; in one pass. tokens: [N], or [B, N] for B sequences."""
        assert isinstance(cache, SlotCache)
        cache.length = held
        count = tokens.shape[-1]
        if on_read is not None:
            on_read(0, count)
        if not count:
            return
        model = self.model
        tokens = tokens.reshape(-1, count)
        columns = torch.arange(held + count, device=model.device)
        rows = columns[held:]
        causal = (columns <= rows[:, None]).expand(len(tokens), 1, -1, -1)
        cache.visible = held + count
        mask = model.mask(causal, rows[None], columns[None])
        model.states(model.embed(tokens), mask, rows[None], cache)
        cache.visible = cache.num_slots
        cache.commit(tuple(range(count)))
        if on_read is not None:
            on_read(count, count)

    def forward(
        self, inputs: Sequence[PassInput], rounded: bool = False, policy: RowPolicy | None = None
    ) -> PassOutput:
        """See Engine.forward."""
        assert not rounded, "transformers' modules have no rounded weights"
        model = self.model
        sats = sum(part.num_sats for part in inputs)
        tokens = torch.tensor(tokens_of(inputs, model.sat), device=model.device)
        count = len(tokens)
        if isinstance(inputs[0].cache, SlotPlace):
            return self._output(*self._shared_pass(inputs, tokens, sats), count - sats, count)
        (part,) = inputs
        cache = cast(SlotCache, part.cache)
        wanted = count if cache.graphs is None else padded(count)
        rows = (policy or self.row_policy).rows(wanted)
        within, offsets = pass_layout(part.tree, part.groups, rows, model.device)
        tokens = pad(tokens, (0, rows - count))
        if self.graphs and cache.graphs is not None:
            # Padding behind SATs counts as SATs: fewer shapes.
            first = count - sats if sats and model.adapter else rows
            step = partial(_pass_at, model, cache.layers, first)
            length = torch.full((1,), cache.length, device=model.device)
            inputs_of_step = (tokens, within, offsets, length)
            states, logits = self.graphs.run(cache.graphs, (rows, first), step, *inputs_of_step)
            cache.row_slots = None
        else:
            sat_rows = (count - sats, count)
            states, logits = _pass(model, cache, sat_rows, tokens, within, offsets, cache.length)
        return self._output(states, logits, count - sats, count)

    def _output(self, states: Tensor, logits: Tensor, nodes: int, count: int) -> PassOutput:
        """Split the logits of a pass's rows, of which the first `count` are not padding."""
        ids = self.model.draft_ids
        sats = logits[nodes:count] if ids is None else logits[nodes:count, ids]
        return PassOutput(states[:count], logits[:nodes], sats)

    @in_use()
    def _shared_pass(
        self, inputs: Sequence[PassInput], tokens: Tensor, sats: int
    ) -> tuple[Tensor, Tensor]:
        """Run a pass over all sequences of one SlotCache.

        Linear layers see the rows in one line, without gaps; only attention sees sequences. It
        reads no more slots than the longest sequence has, rounded up.
        """
        model = self.model
        device = model.device
        places = [cast(SlotPlace, part.cache) for part in inputs]
        cache = places[0].shared
        count = len(tokens)
        shapes = [(part.tree, part.groups) for part in inputs]
        layout = batch_layout(shapes, self.row_policy.rows(count), device)
        rows = len(layout.places)
        width = layout.width
        lengths = [0] * len(places)
        for place in places:
            lengths[place.number] = place.length
        longest = -(-(max(lengths) + width) // _BLOCK) * _BLOCK
        cache.visible = min(cache.num_slots, longest)
        cache.num_live = len(places)
        numbers_of = torch.tensor([place.number for place in places], device=device)
        cache.row_sequences = numbers_of[layout.sequences]
        length = torch.tensor(lengths, device=device)
        cache.row_slots = length[cache.row_sequences] + layout.places
        positions = length[cache.row_sequences] + layout.offsets
        row_places = cache.row_sequences * width + layout.places
        numbers = torch.full((len(places) * width,), -1, device=device)
        numbers[row_places] = torch.arange(rows, device=device)
        numbers = numbers.view(-1, width)  # [B, S], -1 where a sequence has fewer rows
        real = numbers >= 0
        own = layout.within[numbers[:, :, None], numbers[:, None]] & real[:, :, None]
        own = (own & real[:, None]) | torch.eye(width, dtype=torch.bool, device=device)
        slots = length[:, None] + torch.arange(width, device=device)
        columns = torch.arange(cache.visible, device=device).repeat(len(places), 1)
        attend = (columns < length[:, None])[:, None].repeat(1, width, 1)
        attend = attend.scatter_(2, slots[:, None].expand_as(own), own)
        columns[cache.row_sequences, cache.row_slots] = positions
        with model.sat_rows(count - sats, count):
            states = model.states(
                model.embed(pad(tokens, (0, rows - count))[None]),
                model.mask(attend[:, None], positions[numbers], columns),
                positions[None],
                cache,
                row_numbers=numbers.clamp_min(0),
                row_places=row_places,
            )[0]
        return states, model.legal(model.logits(states))


class SharedCaches:
    """Sequences as places 0, 1, .. of one tensor, because attention takes all of them together.

    Attributes:
        size: how many sequences at once.
        places: of the live sequences, place i at index i.
        shared: the tensor, of as many slots as the longest of all sequences needs.
    """

    def __init__(self, engine: TransformersEngine, size: int, num_slots: int):
        self.engine = engine
        self.size = size
        self.places = list[SlotPlace]()
        self.shared = SlotCache(engine.model.num_layers, num_slots)

    def enter(self, prompts: list[list[int]], num_slots: list[int]) -> list[SlotPlace]:
        """See BatchCaches.enter: all prompts are read in one pass, and equal ones once."""
        row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        scratch = SlotCache(len(self.shared.layers), max(map(len, prompts)))
        device = self.engine.model.device
        tokens = [torch.tensor(prompt, device=device) for prompt in row_of]
        # What it pads, and last tokens, are overwritten.
        self.engine.prefill(scratch, pad_sequence(tokens, batch_first=True))
        first = len(self.places)
        places = [
            SlotPlace(self.shared, number, len(prompt) - 1)
            for number, prompt in enumerate(prompts, first)
        ]
        rows = [row_of[tuple(prompt)] for prompt in prompts]
        self.shared.copy_sequences(scratch, rows, [place.number for place in places], self.size)
        self.places += places
        return places

    def leave(self, cache: Any) -> None:
        """See BatchCaches.leave: the last sequence moves to the place that is free now."""
        last = self.places.pop()
        if last is not cache:
            last.move(cache.number)
            self.places[cache.number] = last


@in_use()
def _pass(
    model: SatModel,
    cache: SlotCache,
    sat_rows: tuple[int, int],
    tokens: Tensor,
    within: Tensor,
    offsets: Tensor,
    length: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Run a pass over one sequence.

    Args:
        model: whose modules.
        cache: of the sequence.
        sat_rows: from which row to before which they are SATs.
        tokens: [S], SATs included.
        within: [S, S] bool, which rows of the pass a row sees.
        offsets: [S] positions of the rows, from `length` on.
        length: committed slots.

    Returns:
        Last hidden states [S, D] and logits [S, V].
    """
    positions = (length + offsets)[None]
    columns = slot_positions(cache, offsets, length)[None]
    with model.sat_rows(*sat_rows):
        mask = model.mask(pass_mask(cache, within, length), positions, columns)
        states = model.states(model.embed(tokens[None]), mask, positions, cache)[0]
    return states, model.legal(model.logits(states))


def _pass_at(
    model: SatModel,
    layers: list[Any],
    first: int,
    tokens: Tensor,
    within: Tensor,
    offsets: Tensor,
    length: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run `_pass` in a form that a graph can record.

    Nothing depends on `length` but through the tensor, and whoever has the layers runs it.

    Args:
        model: whose modules.
        layers: of the cache.
        first: the first row that is a SAT; all after it are.
        tokens: as of `_pass`.
        within: as of `_pass`.
        offsets: as of `_pass`.
        length: [1] committed slots.

    Returns:
        As `_pass`.
    """
    cache = layers[0].owner
    cache.row_slots = length + torch.arange(len(tokens), device=tokens.device)
    return _pass(model, cache, (first, len(tokens)), tokens, within, offsets, length)
