"""The key/value cache: a fixed number of slots, written in place.

This is the only file that touches transformers' cache classes.

A pass writes its S rows into slots [length, length + S). Nothing is kept until `commit`, so rolling
back is doing nothing. The length of the tensors never changes (exactness: attention over a longer
or shorter cache rounds differently).

    slots   0 1 2 3 4 | 5 6 7 8 . .      length 5, a pass of 4 rows in flight
    commit((0, 1))    -> length 7        rows 0 and 1 stay where they are
    commit((0, 2))    -> length 7        row 2's slot is copied over row 1's
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, [B, heads, T, D] each, allocated when the first rows arrive.

    owner: the cache that has the layer now, a weak reference: layers can outlive it (graphs.py).
    """

    owner: SlotCache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, _ = key_states.shape
        with torch.inference_mode(False):  # such tensors may be written in any mode
            self.keys = key_states.new_zeros(
                batch, heads, self.owner.num_slots, key_states.shape[-1]
            )
            self.values = value_states.new_zeros(
                batch, heads, self.owner.num_slots, value_states.shape[-1]
            )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        sequences, slots = (
            rows
            if rows is None
            else rows.to(key_states.device)  # each layer may be on a GPU of its own
            for rows in (self.owner.row_sequences, self.owner.row_slots)
        )
        if sequences is not None:  # a batch: every row writes where its sequence is
            self.keys[sequences, :, slots] = key_states[0].transpose(0, 1)
            self.values[sequences, :, slots] = value_states[0].transpose(0, 1)
            live = self.owner.num_live
            return self.keys[:live, :, : self.owner.visible], self.values[
                :live, :, : self.owner.visible
            ]
        if slots is not None:
            self.keys.index_copy_(2, slots, key_states)
            self.values.index_copy_(2, slots, value_states)
        else:
            start = self.owner.length
            end = self.owner.length + key_states.shape[2]
            self.keys[:, :, start:end] = key_states
            self.values[:, :, start:end] = value_states
        return self.keys[:, :, : self.owner.visible], self.values[:, :, : self.owner.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.visible, 0

    def get_seq_length(self) -> int:
        return self.owner.length

    def get_max_length(self) -> int:
        return self.owner.num_slots


class SlotCache(Cache):
    """`num_slots` slots for `num_layers` layers; `length` committed tokens.

    Pass it as `past_key_values`.

    Attributes:
        row_slots: [S] slots that the next pass writes, for graphs and batches; None means `length`
            onward.
        row_sequences: [S] in which sequences, for a pass over several of a batch (`SlotPlace`).
        num_live: such a pass is over the first so many sequences.
        visible: how many slots attention reads; all of them but in a batch.
        layers: the layers' keys and values; they may be an earlier cache's, to write in.
        graphs: made for these layers (graphs.py).
    """

    def __init__(self, num_layers: int, num_slots: int, layers: list[Any] | None = None):
        self.num_slots = self.visible = num_slots
        self.length = 0
        self.row_slots: Tensor | None = None
        self.row_sequences: Tensor | None = None
        self.num_live = 0
        self.graphs: dict[Any, Any] | None = None
        super().__init__(layers=layers or [_SlotLayer() for _ in range(num_layers)])
        for layer in self.layers:
            layer.owner = weakref.proxy(self)

    def commit(self, rows: tuple[int, ...]) -> None:
        """Keep these rows of the last pass, in this order, as the next committed tokens.

        Its other rows are forgotten.
        """
        _move_rows(self, slice(None), self.length, rows)
        self.length += len(rows)

    def copy(self, source: SlotCache, length: int) -> None:
        """Hold the first `length` tokens of another cache, and nothing else."""
        for layer, other in zip(self.layers, source.layers, strict=True) if length else ():
            if not layer.is_initialized:
                layer.lazy_initialization(other.keys, other.values)
            layer.keys[:, :, :length] = other.keys[:, :, :length]
            layer.values[:, :, :length] = other.values[:, :, :length]
        self.length = length

    def copy_sequences(
        self, source: SlotCache, rows: list[int], places: list[int], batch: int
    ) -> None:
        """Put sequences of another cache into places of this one.

        Args:
            source: the other cache.
            rows: which of its sequences.
            places: where each of them goes here.
            batch: how many sequences this cache has.
        """
        for layer, other in zip(self.layers, source.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(
                    *(kept[:1].expand(batch, -1, -1, -1) for kept in (other.keys, other.values))
                )
            layer.keys[places, :, : source.length] = other.keys[rows, :, : source.length]
            layer.values[places, :, : source.length] = other.values[rows, :, : source.length]


class SlotPlace:
    """One sequence's place in a SlotCache of many.

    It is sequence `number` there, with `length` committed tokens.
    """

    def __init__(self, shared: SlotCache, number: int, length: int):
        self.shared = shared
        self.number = number
        self.length = length

    def commit(self, rows: tuple[int, ...]) -> None:
        """See SlotCache.commit."""
        _move_rows(self.shared, self.number, self.length, rows)
        self.length += len(rows)

    def move(self, number: int) -> None:
        """Go to another place of the same cache, `number`."""
        for layer in self.shared.layers:
            layer.keys[number, :, : self.length] = layer.keys[self.number, :, : self.length]
            layer.values[number, :, : self.length] = layer.values[self.number, :, : self.length]
        self.number = number


def _move_rows(cache: SlotCache, place: slice | int, length: int, rows: tuple[int, ...]) -> None:
    """Copy these rows of the last pass, in this order, into the slots from `length` on.

    Args:
        cache: of one sequence or more.
        place: which sequences.
        length: their committed slots.
        rows: counted from there.
    """
    if rows == tuple(range(len(rows))):
        return
    source = torch.tensor([length + row for row in rows])
    for layer in cache.layers:
        source = source.to(layer.keys.device)
        for held in (layer.keys[place], layer.values[place]):
            held[..., length : length + len(rows), :] = held[..., source, :]


class SharedPrefix(Cache):
    """Training's view of a filled SlotCache, which stores nothing.

    Every pass sees the committed slots and its own rows. Keys and values of the pass keep their
    gradient; those of the prefix have none.
    """

    def __init__(self, filled: SlotCache):
        self.filled = filled
        super().__init__(layers=filled.layers)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values of the prefix and of the pass, one behind the other.

        Args:
            key_states: [B, heads, S, D] of the pass.
            value_states: [B, heads, S, D] of the pass.
            layer_idx: of the layer.
            args: ignored.
            kwargs: ignored.
        """
        layer = self.layers[layer_idx]
        length = self.filled.length
        keys = torch.cat([layer.keys[:, :, :length], key_states], dim=2)
        return keys, torch.cat([layer.values[:, :, :length], value_states], dim=2)


def slot_positions(cache: SlotCache, offsets: Tensor, length: int | Tensor | None = None) -> Tensor:
    """Compute [T] the position in the text of what each slot holds during a pass.

    It is the slot's number, or the pass row's own position.

    offsets: [S] positions of the pass's rows, from `length` on, which is as in `pass_mask`.
    """
    length = cache.length if length is None else length
    slots = torch.arange(cache.num_slots, device=offsets.device)
    slots[length + torch.arange(len(offsets), device=offsets.device)] = length + offsets
    return slots


def pass_mask(cache: SlotCache, within: Tensor, length: int | Tensor | None = None) -> Tensor:
    """Make the [1, 1, S, T] bool mask of a pass; true means attend.

    Every row sees all committed slots, and the pass's own rows as `within` says.

    within: [S, S] bool, true where row i may attend to row j of the same pass. length: the
    committed slots, a [1] tensor where a graph records the pass; None: the cache's.

        length 3, within  1      mask  1 1 1 1 0 0 0 0
                          1 1          1 1 1 1 1 0 0 0
                          1 0 1        1 1 1 1 0 1 0 0
    """
    length = cache.length if length is None else length
    mask = (torch.arange(cache.num_slots, device=within.device) < length).repeat(len(within), 1)
    mask[:, length + torch.arange(len(within), device=within.device)] = within
    return mask[None, None]
