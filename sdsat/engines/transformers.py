"""What runs a pass: transformers' own modules on any device (here), or the native engine on a CPU
(native.py).

Both keep the same promise, on which exactness rests: a row's logits have the same bits whatever
rows stand beside it. The native engine computes every row in one order; here it is arranged: the
cache has a fixed length, which depends on the prompt and max_new_tokens alone, and passes are
padded as a `RowPolicy` says, which `probe_rows` finds by trying.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sdsat.config import InputError, require
from sdsat.engines.cache import SlotCache, SlotPlace, pass_mask, slot_positions
from sdsat.engines.graphs import padded
from sdsat.engines.native.weights import NativeCache, NativeEngine
from sdsat.method.layout import Layout, Shape, batch_layout, pass_layout
from sdsat.method.tree import DraftTree, make_tree
from sdsat.models.packed import in_use

if TYPE_CHECKING:
    from sdsat.engines.cache import _SlotLayer
    from sdsat.models.loading import SatModel
from sdsat.engines.base import _POLICIES, AnyCache, Part, RowPolicy

PREFILL_ROWS = 256  # of one pass of the native engine


def new_cache(model: SatModel, num_slots: int) -> SlotCache | NativeCache:
    """An empty cache for one sequence."""
    if isinstance(model.native, NativeEngine):
        return model.native.cache(num_slots)
    make = model.graphs.cache if model.graphs else SlotCache
    return make(model.model.config.num_hidden_layers, num_slots)


def forward(
    model: SatModel,
    cache: SlotCache | NativeCache,
    tokens: Tensor,
    tree: DraftTree,
    groups: tuple[tuple[int, int], ...] = (),
    policy: RowPolicy | None = None,
    rounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """One pass over a draft tree and SAT groups (node, k).

    tokens [R]: one a node, then the SATs. Commits nothing.

    policy: padding for transformers' modules, the model's own by default. rounded: linear layers in
    8 bits (native engine only). Returns (last hidden states [R, D], logits [R, V]).
    """
    sats = sum(size for _, size in groups)
    count = tokens.shape[0]
    if isinstance(cache, NativeCache):
        return _native_pass(model, [cache], tokens, [(tree, groups)], sats, rounded)
    rows = (policy or probe_rows(model)).rows(count if cache.graphs is None else padded(count))
    within, offsets = pass_layout(tree, groups, rows, model.device)
    tokens = torch.nn.functional.pad(tokens, (0, rows - count))
    if model.graphs and cache.graphs is not None:
        # padding behind SATs counts as SATs: fewer shapes
        first = count - sats if sats and model.adapter else rows
        step = partial(_pass_at, model, cache.layers, first)
        length = torch.full((1,), cache.length, device=model.device)
        states, logits = model.graphs.run(
            cache.graphs, (rows, first), step, tokens, within, offsets, length
        )
        cache.row_slots = None
    else:
        states, logits = _pass(
            model, cache, count - sats, count, tokens, within, offsets, cache.length
        )
    return states[:count], logits[:count]


def forward_batch(
    model: SatModel, parts: list[Part], rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """One pass over several sequences.

    Rows: the nodes of all parts in order, then their SATs. Commits nothing.

    rounded: see `forward`. Returns (last hidden states [R, D], logits [R, V]).
    """
    sats = sum(part.sats for part in parts)
    sat = model.sat.token_id if model.sat else 0
    tokens = torch.tensor(
        [token for part in parts for token in part.tokens] + [sat] * sats, device=model.device
    )
    shapes = [(part.tree, part.groups) for part in parts]
    caches = [part.cache for part in parts]
    first = caches[0]
    if isinstance(first, NativeCache):
        return _native_pass(model, cast(list[NativeCache], caches), tokens, shapes, sats, rounded)
    if isinstance(first, SlotPlace):
        return _shared_pass(model, cast(list[SlotPlace], caches), tokens, shapes, sats)
    return forward(model, first, tokens, *shapes[0])


def _native_pass(
    model: SatModel,
    caches: list[NativeCache],
    tokens: Tensor,
    shapes: list[Shape],
    sats: int,
    rounded: bool,
) -> tuple[Tensor, Tensor]:
    native = model.rounded if rounded else model.native
    assert native is not None
    layout = batch_layout(shapes, len(tokens), model.device)
    states, logits = native.forward(caches, model.embed(tokens[None])[0], layout, sats)
    return states, model.legal(logits)


@in_use()
def _shared_pass(
    model: SatModel, places: list[SlotPlace], tokens: Tensor, shapes: list[Shape], sats: int
) -> tuple[Tensor, Tensor]:
    """Over all sequences of one SlotCache, through transformers' modules.

    Linear layers see the rows in one line, without gaps; only attention sees sequences. It reads no
    more slots than the longest sequence has, rounded up.
    """
    cache = places[0].shared
    count = len(tokens)
    device = model.device
    layout = batch_layout(shapes, probe_rows(model).rows(count), device)
    rows = len(layout.places)
    width = layout.width
    lengths = [0] * len(places)
    for place in places:
        lengths[place.number] = place.length
    cache.visible = min(cache.num_slots, -(-(max(lengths) + width) // 64) * 64)
    cache.num_live = len(places)
    cache.row_sequences = torch.tensor([place.number for place in places], device=device)[
        layout.sequences
    ]
    length = torch.tensor(lengths, device=device)
    cache.row_slots = length[cache.row_sequences] + layout.places
    positions = length[cache.row_sequences] + layout.offsets
    row_places = cache.row_sequences * width + layout.places
    numbers = torch.full((len(places) * width,), -1, device=device)
    numbers[row_places] = torch.arange(rows, device=device)
    numbers = numbers.view(-1, width)  # [B, S], -1 where a sequence has fewer rows
    own = (
        layout.within[numbers[:, :, None], numbers[:, None]]
        & (numbers >= 0)[:, :, None]
        & (numbers >= 0)[:, None]
    ) | (torch.eye(width, dtype=torch.bool, device=device))
    slots = length[:, None] + torch.arange(width, device=device)
    columns = torch.arange(cache.visible, device=device).repeat(len(places), 1)
    attend = (
        (columns < length[:, None])[:, None]
        .repeat(1, width, 1)
        .scatter_(2, slots[:, None].expand_as(own), own)
    )
    columns[cache.row_sequences, cache.row_slots] = positions
    with model.sat_rows(count - sats, count):
        states = model.model.base_model(
            inputs_embeds=model.embed(torch.nn.functional.pad(tokens, (0, rows - count))[None]),
            attention_mask=model.mask(attend[:, None], positions[numbers], columns),
            position_ids=positions[None],
            past_key_values=cache,
            row_numbers=numbers.clamp_min(0),
            row_places=row_places,
        ).last_hidden_state[0]
    return states[:count], model.legal(model.logits(states))[:count]


def check_finite(model: SatModel, largest: float) -> None:
    """InputError, with the reason, if a pass had logits that are NaN or infinite.

    largest: `max()` of them, NaN where one is.
    """
    if largest < torch.inf:
        return
    broken = next(
        (name for name, part in model.model.named_parameters() if not part.isfinite().all()), None
    )
    if broken is None:
        dtype = str(model.dtype).removeprefix("torch.")
        raise InputError(
            f"model {model.name}: a pass gave NaN or infinite logits, though all weights "
            "are finite: "
            f"its numbers don't fit in {dtype}; expected another dtype, as a rule bfloat16 "
            "or float32"
        )
    raise InputError(
        f"model {model.name}: the weight {broken} holds NaN or infinite numbers; expected "
        "finite ones"
    )


class Room:
    """Where up to `size` sequences at once keep their keys and values.

    Each has a cache of its own; but many through transformers' modules are places 0, 1, .. of one
    tensor, because attention takes all of them together there. Then `num_slots` is what the longest
    of all needs.
    """

    def __init__(self, model: SatModel, size: int, num_slots: int):
        self.model = model
        self.size = size
        self.places = list[SlotPlace]()
        layers = model.model.config.num_hidden_layers
        self.shared = SlotCache(layers, num_slots) if size > 1 and model.native is None else None
        self.last: tuple[list[int], NativeCache] | None = (
            None  # the prompt read last, and a cache that begins with it
        )

    def enter(self, prompts: list[list[int]], num_slots: list[int]) -> list[AnyCache]:
        """A cache for each prompt, which holds all of it but the last token.

        Equal prompts one after another are read once.
        """
        if self.shared is None:
            return [
                self._enter(prompt, slots) for prompt, slots in zip(prompts, num_slots, strict=True)
            ]
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        scratch = SlotCache(len(self.shared.layers), max(map(len, prompts)))
        tokens = [torch.tensor(prompt, device=self.model.device) for prompt in rows]
        # what it pads, and last tokens, are overwritten
        prefill(self.model, scratch, pad_sequence(tokens, batch_first=True))
        first = len(self.places)
        places = [
            SlotPlace(self.shared, first + i, len(prompt) - 1) for i, prompt in enumerate(prompts)
        ]
        self.shared.copy_sequences(
            scratch,
            [rows[tuple(prompt)] for prompt in prompts],
            [p.number for p in places],
            self.size,
        )
        self.places += places
        return list[AnyCache](places)

    def _enter(self, prompt: list[int], num_slots: int) -> SlotCache | NativeCache:
        cache = new_cache(self.model, num_slots)
        if self.last and self.last[0] == prompt and isinstance(cache, NativeCache):
            cache.copy(self.last[1], len(prompt) - 1)
        else:
            prefill(
                self.model,
                cache,
                torch.tensor(prompt[:-1], device=self.model.device, dtype=torch.long),
            )
        self.last = (prompt, cache) if isinstance(cache, NativeCache) else None
        return cache

    def leave(self, cache: AnyCache) -> None:
        """Free the place of a sequence; the last one moves there."""
        if isinstance(cache, SlotPlace):
            last = self.places.pop()
            if last is not cache:
                last.move(cache.number)
                self.places[cache.number] = last


@in_use()
def _pass(
    model: SatModel,
    cache: SlotCache,
    first: int,
    end: int,
    tokens: Tensor,
    within: Tensor,
    offsets: Tensor,
    length: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """(states, logits) of all rows; those from `first` to before `end` are SATs.

    length: committed slots.
    """
    positions = (length + offsets)[None]
    with model.sat_rows(first, end):
        states = model.model.base_model(
            inputs_embeds=model.embed(tokens[None]),
            attention_mask=model.mask(
                pass_mask(cache, within, length),
                positions,
                slot_positions(cache, offsets, length)[None],
            ),
            position_ids=positions,
            past_key_values=cache,
        ).last_hidden_state[0]
    return states, model.legal(model.logits(states))


def _pass_at(
    model: SatModel,
    layers: list[_SlotLayer],
    first: int,
    tokens: Tensor,
    within: Tensor,
    offsets: Tensor,
    length: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same as a graph can record it: nothing depends on `length` but through the tensor.

    Whoever has the layers runs it.
    """
    cache = layers[0].owner
    cache.row_slots = length + torch.arange(len(tokens), device=tokens.device)
    return _pass(model, cache, first, len(tokens), tokens, within, offsets, length)


@in_use()
def prefill(model: SatModel, cache: SlotCache | NativeCache, tokens: Tensor) -> None:
    """Fill `cache` anew with the key/values of `tokens`: [N], or [B, N] through transformers'
    modules, in one pass.
    """
    cache.length = 0
    count = tokens.shape[-1]
    if isinstance(cache, NativeCache):
        assert model.native is not None
        for part in tokens.split(PREFILL_ROWS) if count else ():
            rows = torch.arange(len(part))
            layout = Layout(rows <= rows[:, None], rows, torch.zeros_like(rows), rows, len(part))
            model.native.forward([cache], model.embed(part[None])[0], layout, last=0)
            cache.commit(tuple(range(len(part))))
        return
    if not count:
        return
    tokens = tokens.reshape(-1, count)
    rows = torch.arange(count, device=model.device)
    cache.visible = count
    model.model.base_model(
        inputs_embeds=model.embed(tokens),
        attention_mask=model.mask(
            (rows <= rows[:, None]).expand(len(tokens), 1, count, count), rows[None], rows[None]
        ),
        position_ids=rows[None],
        past_key_values=cache,
    )
    cache.visible = cache.num_slots
    cache.commit(tuple(range(count)))


@torch.inference_mode()
def probe_rows(model: SatModel) -> RowPolicy:
    """The cheapest padding under which a row's logits have the same bits whatever the number of
    rows in its pass.

    After a context of 64 tokens, compares one pass of 96 tokens with the same tokens one at a time
    and in passes of other sizes, padded by each policy in turn; the native engine needs no padding,
    and is compared all the same. Where none is stable (some GPUs), passes are padded to multiples
    of 4 and `stable` is false. The answer is kept in `model.row_policy`.
    """
    if model.row_policy is None:
        vocabulary = model.model.get_input_embeddings().weight.shape[0]
        tokens = (torch.arange(64 + 96, device=model.device) * 7919 + 11) % vocabulary
        cache = new_cache(model, 512)
        prefill(model, cache, tokens[:64])

        @lru_cache
        def logits_of(first: int, rows: int, padded: int) -> Tensor:
            cache.length = 64 + first
            part = tokens[64 + first : 64 + first + rows]
            return forward(
                model, cache, part, make_tree("chain", rows - 1), (), RowPolicy(padded, 1)
            )[1]

        def stable(policy: RowPolicy) -> bool:
            whole = logits_of(0, 96, 96)
            one_by_one = (
                torch.equal(logits_of(i, 1, policy.rows(1))[0], whole[i]) for i in range(16)
            )
            sizes = sorted({policy.rows(count) for count in (*range(1, 33), 48, 64)})
            return all(one_by_one) and all(
                torch.equal(logits_of(0, n, n), whole[:n]) for n in sizes
            )

        policies = _POLICIES[:1] if model.native else _POLICIES
        fallback = RowPolicy(1, 1, stable=False) if model.native else RowPolicy(4, 4, stable=False)
        model.row_policy = next((policy for policy in policies if stable(policy)), fallback)
    return model.row_policy


@torch.inference_mode()
def check_rows(model: SatModel, strange: str) -> None:
    """Refuse a model whose own forward and whose passes differ, beyond rounding, because of its
    `strange` part: one that lets a row depend on the number of rows beside it, or stands around the
    whole model, where passes don't come by.
    """
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(14, device=model.device) * 7919 + 11) % vocabulary
    want = model.model(tokens[None]).logits[0].float()
    if not want.isfinite().all():
        return  # which decoding says
    cache = SlotCache(model.model.config.num_hidden_layers, 32)
    parts = [want[:6]]
    prefill(model, cache, tokens[:6])
    for part in tokens[6:].split([1, 5, 2]):
        parts.append(
            forward(model, cache, part, make_tree("chain", len(part) - 1), (), RowPolicy(1, 1))[
                1
            ].float()
        )
        cache.commit(tuple(range(len(part))))
    found = torch.cat(parts)
    found = torch.where(found.isinf(), want, found)  # a SAT's
    near = 1e-3 if model.dtype == torch.float32 else 0.05
    require(
        bool((found - want).abs().max() <= near * want.abs().max()),
        f"model {model.name}: {strange}, and what it computes for a token depends on more "
        "than the tokens before; "
        "expected modules and hooks that treat every row of a pass alike, and none around "
        "the whole model",
    )


def top(model: SatModel, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits of each row, largest first: (values [N, count] in float32, ids [N,
    count]).
    """
    if model.native:
        return model.native.top(logits, count)
    if count == 1:
        ids = logits.float().argmax(-1, keepdim=True)
        return logits.gather(-1, ids).float(), ids
    values, ids = logits.topk(count)
    return values.float(), ids
