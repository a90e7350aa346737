"""The native engine: a whole pass of a Llama-form decoder on a CPU in one call (native.cpp), for
bfloat16 and float32.

It does what transformers' modules do, with the same weights and the same rounding between
operations, but reads every weight once at the memory's pace and leaves no work between two layers
to Python: a pass of one token of the default model takes a fifth of the time. And a row's result
has the same bits whatever its pass looks like: see native.cpp. The library is compiled at first use
(a C++ compiler; some seconds) and kept in the cache folder; without a compiler, on a GPU, and for
sizes that it was not written for, passes go through transformers' modules (engine.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdsat.config import MAX_ROWS
from sdsat.method.sampling import as_seed
from sdsat.models.attention import sliding_window
from sdsat.models.weights import strange_part

if TYPE_CHECKING:
    from sdsat.config import SamplingConfig
    from sdsat.method.layout import Layout
    from sdsat.method.tree import DraftTree
    from sdsat.models.adapter import SatAdapter
from sdsat.engines.native.bindings import (
    Unavailable,
    _Cache,
    _call,
    _described,
    _Drafting,
    _fits,
    _Layer,
    _Linear,
    _Matrix,
    _Model,
    _Pass,
    _pointer,
    _readable,
    _Sampling,
    library,
)

# native.cpp has all that their modules in transformers compute, and no more
_FORMS = ("llama", "mistral", "qwen2", "qwen3")
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# multiples of the sizes, and of the keys, that native.cpp takes together on any processor
_MULTIPLE = 32
_KEYS = 64


def pack(weight: Tensor, step: int) -> Tensor:
    """[out, in] -> [out / 2 L, in / step, 2, L, step], L the lanes of a vector; zeros up to whole
    blocks and steps.
    """
    out, inner = weight.shape
    weight = nn.functional.pad(weight.detach(), (0, -inner % step, 0, -out % _MULTIPLE))
    return (
        weight.view(-1, 2, library().sdsat_lanes(), weight.shape[1] // step, step)
        .permute(0, 3, 1, 2, 4)
        .contiguous()
    )


def pack8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] in 8 bits, one scale an output, out padded: (bytes [out / L, in / 4, L, 4] from 1
    to 255, scales [out]).

    An element is (byte - 128) * scale; L: the lanes of a vector.
    """
    weight = nn.functional.pad(weight.detach().float(), (0, 0, 0, -weight.shape[0] % _MULTIPLE))
    scale = weight.abs().amax(1).clamp_min(1e-20) / 127
    whole = (weight / scale[:, None]).round().add_(128).to(torch.uint8)
    return whole.view(-1, library().sdsat_lanes(), weight.shape[1] // 4, 4).transpose(
        1, 2
    ).contiguous(), scale


class NativeCache:
    """Keys and values in native.cpp's order; `length` committed tokens of one sequence.

    Sized once, written in place.
    """

    def __init__(self, engine: NativeEngine, num_slots: int):
        config = engine.struct
        slots = -(-num_slots // _KEYS) * _KEYS
        shape = (config.layers, config.kv_heads, slots, config.dim)
        self.keys, self.values = (torch.zeros(shape, dtype=engine.dtype) for _ in range(2))
        self.struct = _Cache(self.keys.data_ptr(), self.values.data_ptr(), slots)
        self.engine = engine
        self.length = 0

    def commit(self, rows: tuple[int, ...]) -> None:
        """Keep these rows of the last pass, in this order, as the next committed tokens; forget its
        other rows.
        """
        if rows != tuple(range(len(rows))):
            slots = torch.tensor([self.length + row for row in rows])
            struct = self.engine.struct
            counts = (c_int64(self.length), c_void_p(slots.data_ptr()), c_int64(len(rows)))
            _call("sdsat_move", byref(struct), byref(self.struct), *counts, self.engine.is_bf16)
        self.length += len(rows)

    def copy(self, source: NativeCache, length: int) -> None:
        """Hold the first `length` tokens of another cache of this engine, and nothing else."""
        held = -(-length // _KEYS) * _KEYS  # native.cpp keeps keys of whole blocks together
        for own, other in ((self.keys, source.keys), (self.values, source.values)):
            own[:, :, :held] = other[:, :, :held]
        self.length = length


class NativeEngine:
    """The weights of a model, and of its adapter, in native.cpp's order.

    The copy takes as much memory as the weights.

    rounded: linear layers in 8 bits, for passes that only draft: half the bytes to read, and nearly
    the same guesses. Its rows read the cache of the exact engine; what they write there is never
    kept.
    """

    def __init__(
        self, model: Any, adapter: SatAdapter | None, max_context: int, rounded: bool = False
    ):
        config = model.config
        base = model.base_model
        if config.model_type not in _FORMS:
            raise Unavailable(f"architecture {config.model_type}")
        window = sliding_window(config)
        if window is not None and window < max_context:
            raise Unavailable(f"sliding_window={window}, and the context goes on to {max_context}")
        self.dtype = model.get_input_embeddings().weight.dtype
        if self.dtype not in (torch.bfloat16, torch.float32) or model.device.type != "cpu":
            raise Unavailable(f"it has no {self.dtype} on {model.device.type}")
        self.is_bf16 = int(self.dtype == torch.bfloat16)
        self._step = 1 + self.is_bf16
        self._kept = []
        self._adapter = adapter
        self._rounded = rounded
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        sizes = {"hidden": config.hidden_size, "dim": dim, "inner": config.intermediate_size}
        odd = [f"{name}={size}" for name, size in sizes.items() if size % _MULTIPLE]
        if odd:
            raise Unavailable(f"{', '.join(odd)}: not a multiple of {_MULTIPLE}")
        if config.hidden_act != "silu":
            raise Unavailable(f"activation {config.hidden_act}")
        if strange := strange_part(model):
            raise Unavailable(strange)
        library()
        self._positions = min(max_context, 2**20) + 2 * MAX_ROWS  # drafts and the probe look ahead
        positions = torch.arange(self._positions)[None]
        rotary = base.rotary_emb(torch.zeros(1, dtype=self.dtype), positions)
        cos, sin = (
            self._keep(self._checked("rotary_emb", part[0], self._positions, dim).float())
            for part in rotary
        )
        hidden = config.hidden_size
        width = config.num_attention_heads * dim
        if config.num_attention_heads % kv_heads:
            raise Unavailable(f"{config.num_attention_heads} heads on {kv_heads} of keys")
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("gate_proj", "up_proj"), (config.intermediate_size, hidden)
        )
        shapes |= dict.fromkeys(("k_proj", "v_proj"), (kv_heads * dim, hidden))
        shapes |= {
            "q_proj": (width, hidden),
            "o_proj": (hidden, width),
            "down_proj": (hidden, config.intermediate_size),
        }
        layers = (_Layer * config.num_hidden_layers)(
            *(self._layer(layer, shapes, hidden, dim) for layer in base.layers)
        )
        self._kept.append(layers)
        head = model.get_output_embeddings()
        tokens = model.get_input_embeddings()
        vocabulary = head.weight.shape[0]
        self.struct = _Model(
            config.num_hidden_layers, hidden, config.num_attention_heads, kv_heads, dim,
            config.intermediate_size, vocabulary, self._positions, 1,
            config.rms_norm_eps, base.layers[0].self_attn.scaling,
            cos.data_ptr(), sin.data_ptr(), self._norm("norm", base.norm, hidden),
            self._linear("lm_head", head.weight, (vocabulary, hidden), head.bias), layers,
            _pointer(self._keep(self._checked("embed_tokens", tokens.weight, vocabulary, hidden))),
            _pointer(self._keep(head.weight)),
            *self._head(None if rounded else adapter, hidden), torch.finfo(self.dtype).eps,
        )  # fmt: skip

    def _checked(self, name: str, tensor: Tensor, *shape: int) -> Tensor:
        """The tensor, if C++ may read it.

        Raises Unavailable, with the name, unless it has the engine's dtype and this shape.
        """
        if not _fits(tensor, self.dtype, shape):
            found = _described(tensor.dtype, tensor.shape, tensor.device.type)
            wanted = _described(self.dtype, shape, "cpu")
            raise Unavailable(f"{name} is {found}, and not {wanted}")
        return tensor

    def _head(self, adapter: SatAdapter | None, hidden: int) -> tuple[_Linear, _Linear]:
        if adapter is None or adapter.head is None:
            return _Linear(), _Linear()
        inner = adapter.head.inner.detach()
        outer = adapter.head.outer.detach()
        size = len(inner)
        padding = -len(inner) % _MULTIPLE
        inner = nn.functional.pad(
            self._checked("head.inner", inner, size, 2 * hidden), (0, 0, 0, padding)
        )
        outer = nn.functional.pad(self._checked("head.outer", outer, hidden, size), (0, padding))
        return self._linear("head.inner", inner, inner.shape), self._linear(
            "head.outer", outer, outer.shape
        )

    def _norm(self, name: str, norm: Any, size: int) -> int | None:
        return (
            None if norm is None else _pointer(self._keep(self._checked(name, norm.weight, size)))
        )

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1]

    def _packed(self, *weights: Tensor) -> list[_Matrix]:
        """Matrices with as many outputs, block by block beside each other in memory."""
        blocks = (weights[0].shape[0] + -weights[0].shape[0] % _MULTIPLE) // (
            2 * library().sdsat_lanes()
        )
        packed = [
            pack8(weight) if self._rounded else (pack(weight, self._step),) for weight in weights
        ]
        # bytes, and scales in 8 bits
        held = [[part.view(blocks, -1).view(torch.uint8) for part in parts] for parts in packed]
        together = self._keep(torch.cat([part for parts in held for part in parts], 1))
        at = together.data_ptr()
        matrices = []
        for parts in held:
            matrices.append(
                _Matrix(at, at + parts[0].shape[1] if self._rounded else None, together.shape[1])
            )
            at += sum(part.shape[1] for part in parts)
        return matrices

    def _linear(
        self, name: str, weight: Tensor, shape: tuple[int, ...], bias: Tensor | None = None
    ) -> _Linear:
        (out, inner), weight = shape, self._checked(name, weight, *shape)
        struct = _Linear(out=out + -out % _MULTIPLE, in_=inner)
        if bias is not None:
            bias = self._checked(f"{name}'s bias", bias, out)
            struct.bias = _pointer(self._keep(nn.functional.pad(bias, (0, -out % _MULTIPLE))))
        if self._adapter is None or name not in self._adapter.down:
            (struct.weight,) = self._packed(weight)
            return struct
        rank = len(self._adapter.down[name])
        down = self._checked(f"adapter's down of {name}", self._adapter.down[name], rank, inner)
        up = self._adapter.config.scale * self._checked(
            f"adapter's up of {name}", self._adapter.up[name], out, rank
        )
        padding = -down.shape[0] % _MULTIPLE
        down = nn.functional.pad(down, (0, 0, 0, padding))
        up = nn.functional.pad(up, (0, padding))
        (struct.down,), (struct.weight, struct.up), struct.rank = (
            self._packed(down),
            self._packed(weight, up),
            len(down),
        )
        return struct

    def _layer(
        self, layer: Any, shapes: dict[str, tuple[int, ...]], hidden: int, dim: int
    ) -> _Layer:
        attention = layer.self_attn
        where = f"model/layers/{attention.layer_idx}"
        norms = [
            self._norm(f"{where}/{name}", getattr(layer, name), hidden) for name in _LAYER_NORMS
        ]
        norms += [
            self._norm(f"{where}/{name}", getattr(attention, name, None), dim)
            for name in ("q_norm", "k_norm")
        ]
        parts = []
        for name in _PROJECTIONS:
            part, module = (
                ("self_attn", attention) if hasattr(attention, name) else ("mlp", layer.mlp)
            )
            linear = getattr(module, name)
            parts.append(
                self._linear(f"{where}/{part}/{name}", linear.weight, shapes[name], linear.bias)
            )
        return _Layer(*norms, *parts)

    def cache(self, num_slots: int) -> NativeCache:
        return NativeCache(self, num_slots)

    def forward(
        self,
        caches: Sequence[NativeCache],
        embeddings: Tensor,
        layout: Layout,
        sats: int = 0,
        last: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass over the sequences of `caches`; commits nothing.

        embeddings [N, D]; layout: of the N rows, the last `sats` of which are SATs; every row sees
        all that its sequence has committed.

        Returns (last hidden states [N, D], logits [last, V] of the last rows; None: of all).
        """
        rows = len(embeddings)
        last = len(embeddings) if last is None else last
        x = _readable("embeddings", embeddings, self.dtype, rows, self.struct.hidden).clone()
        states = torch.empty_like(x)
        logits = torch.empty(max(0, last), self.struct.vocabulary, dtype=self.dtype)
        held = [self._own(cache).length for cache in caches]
        lengths = (
            torch.full((rows,), held[0])
            if len(caches) == 1
            else torch.tensor(held)[layout.sequences]
        )
        numbers = (lengths + layout.offsets, lengths + layout.places, layout.sequences, lengths)
        within = _readable("within", layout.within, torch.bool, rows, rows)
        self.struct.threads = torch.get_num_threads()
        tensors = (
            x,
            states,
            logits,
            *(_readable("layout", part, torch.long, rows) for part in numbers),
            within,
        )
        struct = _Pass(*(tensor.data_ptr() for tensor in tensors), len(caches), rows, sats, last)
        structs = (_Cache * len(caches))(*(cache.struct for cache in caches))
        _call("sdsat_pass", byref(self.struct), structs, byref(struct), self.is_bf16)
        return states, logits

    def _own(self, cache: NativeCache) -> NativeCache:
        """The cache, if it is of this model's form: its own, or that of the same model's other
        engine.
        """
        config = self.struct
        for part in (cache.keys, cache.values):
            _readable(
                "cache",
                part,
                self.dtype,
                config.layers,
                config.kv_heads,
                cache.struct.slots,
                config.dim,
            )
        return cache

    def top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest logits of each row, of equals the lower id first: (values [N, count],
        ids [N, count]).
        """
        logits = _readable("logits", logits, self.dtype, None, None)
        values = torch.empty(len(logits), count)
        ids = torch.empty(len(logits), count, dtype=torch.long)
        sizes = (c_int64(len(logits)), c_int64(logits.shape[-1]), c_int64(count))
        x, i, v = (c_void_p(tensor.data_ptr()) for tensor in (logits, ids, values))
        _call("sdsat_largest", x, *sizes, i, v, torch.get_num_threads(), self.is_bf16)
        return values, ids

    def choose(
        self, logits: Tensor, index: Tensor, sampling: SamplingConfig, seeds: Tensor | None = None
    ) -> Tensor:
        """`sampling.choose` of one token a row, without sorting or noise for the whole vocabulary:
        [N] for logits [N, V].
        """
        logits = _readable("logits", logits, self.dtype, None, None)
        index = _readable("index", index, torch.long, len(logits))
        seeds = torch.full_like(index, as_seed(sampling.seed)) if seeds is None else seeds
        chosen = torch.empty_like(index)
        seeds = _readable("seeds", seeds, torch.long, len(logits))
        x, i, s, out = (c_void_p(tensor.data_ptr()) for tensor in (logits, index, seeds, chosen))
        sizes = (c_int64(len(logits)), c_int64(logits.shape[-1]))
        _call(
            "sdsat_choose",
            x,
            *sizes,
            i,
            s,
            byref(_Sampling.of(sampling)),
            out,
            torch.get_num_threads(),
            self.is_bf16,
        )
        return chosen

    def draft(
        self,
        x: Tensor,
        states: Tensor,
        logits: Tensor,
        shortlist: int,
        index: int,
        tree: DraftTree,
        sampling: SamplingConfig,
    ) -> Tensor:
        """`draft.draft_tokens` in one call.

        shortlist: how many of a SAT's candidates are looked at.
        """
        states = _readable("states", states, self.dtype, None, self.struct.hidden)
        logits = _readable("logits", logits, self.dtype, len(states), self.struct.vocabulary)
        out = torch.empty(2, len(tree), dtype=torch.float64)
        out[0, 0], out[1, 0] = _readable("x", x, torch.long, 1)[0], 1.0
        pointers = map(_pointer, (states, logits, *_shape(tree), *out))
        numbers = (len(tree), len(logits), shortlist, index, as_seed(sampling.seed))
        struct = _Drafting(*pointers, *numbers, _Sampling.of(sampling))
        self.struct.threads = torch.get_num_threads()
        _call("sdsat_draft", byref(self.struct), byref(struct), self.is_bf16)
        return out


@lru_cache(maxsize=256)
def _shape(tree: DraftTree) -> tuple[Tensor, ...]:
    """Parents, ranks and depths, [N] each."""
    return tuple(torch.tensor([tree.parents, tree.ranks, tree.depths]))
