"""The native engine: a whole pass of a Llama-form decoder on a CPU in one call (native.cpp), for bfloat16 and float32.

It does what transformers' modules do, with the same weights and the same rounding between operations, but reads every
weight once at the memory's pace and leaves no work between two layers to Python: a pass of one token of the default model takes
a fifth of the time. And a row's result has the same bits whatever its pass looks like: see native.cpp. The library is
compiled at first use (a C++ compiler; some seconds) and kept in the cache folder; without a compiler, on a GPU, and for sizes
that it was not written for, passes go through transformers' modules (engine.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import sliding_window
from .config import MAX_ROWS
from .kept import load_library
from .sampling import as_seed

if TYPE_CHECKING:
    from .adapter import SatAdapter
    from .config import SamplingConfig
    from .tree import DraftTree, Layout

SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
_FORMS = ("llama", "mistral", "qwen2", "qwen3")  # native.cpp has all that their modules in transformers compute, and no more
_MULTIPLE, _KEYS = 32, 64  # multiples of the sizes, and of the keys, that native.cpp takes together on any processor


class Unavailable(Exception):
    """Why the native engine can't be used here, in one line."""


class _Matrix(Structure):
    _fields_ = [("weight", c_void_p), ("scale", c_void_p), ("stride", c_int64)]


class _Linear(Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("weight", "down", "up")),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("out", "in_", "rank")),
    ]


class _Layer(Structure):
    _fields_ = [(name, c_void_p) for name in ("norm_attention", "norm_mlp", "norm_q", "norm_k")] + [
        (name, _Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")
    ]


class _Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "dim", "inner", "vocabulary", "threads")),
        *((name, c_float) for name in ("eps", "scale")),
        *((name, c_void_p) for name in ("cos", "sin", "norm")),
        ("head", _Linear),
        ("layer", POINTER(_Layer)),
        *((name, c_void_p) for name in ("embedding", "unembedding")),
        *((name, _Linear) for name in ("draft_inner", "draft_outer")),
        ("draft_eps", c_float),
    ]


class _Sampling(Structure):
    _fields_ = [("temperature", c_double), ("top_p", c_double), ("top_k", c_int64)]

    @classmethod
    def of(cls, sampling: SamplingConfig) -> _Sampling:
        return cls(sampling.temperature, sampling.top_p, sampling.top_k)


class _Drafting(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("states", "logits", "parents", "ranks", "depths", "tokens", "likely")),
        *((name, c_int64) for name in ("nodes", "sats", "shortlist", "index", "seed")),
        ("sampling", _Sampling),
    ]


class _Cache(Structure):
    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("slots", c_int64)]


class _Pass(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "states", "logits", "positions", "slots", "sequences", "lengths", "within")),
        *((name, c_int64) for name in ("rows", "sats", "last")),
    ]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled native.cpp; compiles it unless the cache folder has it for this source, compiler and processor."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise Unavailable("no C++ compiler was found (c++, g++ or $CXX)")

    def build(target: Path) -> None:
        done = subprocess.run([compiler, *_FLAGS, str(SOURCE), "-o", str(target)], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{compiler} failed ({(done.stderr.strip().splitlines() or ['no message'])[0]})")

    try:
        version = subprocess.run([compiler, "-v", "-march=native", "-E", "-x", "c++", os.devnull], capture_output=True).stderr
        name = hashlib.sha256(SOURCE.read_bytes() + version + " ".join(_FLAGS).encode()).hexdigest()[:16]
        return load_library(name, build)
    except OSError as error:
        raise Unavailable(f"native.cpp could not be built ({error})") from None


def pack(weight: Tensor, step: int) -> Tensor:
    """[out, in] -> [out / 2 L, in / step, 2, L, step], L the lanes of a vector; zeros up to whole blocks and steps."""
    out, inner = weight.shape
    weight = nn.functional.pad(weight.detach(), (0, -inner % step, 0, -out % _MULTIPLE))
    return weight.view(-1, 2, library().sdsat_lanes(), weight.shape[1] // step, step).permute(0, 3, 1, 2, 4).contiguous()


def pack8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] in 8 bits, one scale an output, out padded: (bytes [out / L, in / 4, L, 4] from 1 to 255, scales [out]).

    An element is (byte - 128) * scale; L: the lanes of a vector.
    """
    weight = nn.functional.pad(weight.detach().float(), (0, 0, 0, -weight.shape[0] % _MULTIPLE))
    scale = weight.abs().amax(1).clamp_min(1e-20) / 127
    whole = (weight / scale[:, None]).round().add_(128).to(torch.uint8)
    return whole.view(-1, library().sdsat_lanes(), weight.shape[1] // 4, 4).transpose(1, 2).contiguous(), scale


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class NativeCache:
    """Keys and values in native.cpp's order; `length` committed tokens of one sequence. Sized once, written in place."""

    def __init__(self, engine: NativeEngine, num_slots: int):
        config, slots = engine.struct, -(-num_slots // _KEYS) * _KEYS
        shape = (config.layers, config.kv_heads, slots, config.dim)
        self.keys, self.values = (torch.zeros(shape, dtype=engine.dtype) for _ in range(2))
        self.struct = _Cache(self.keys.data_ptr(), self.values.data_ptr(), slots)
        self.engine, self.length = engine, 0

    def commit(self, rows: tuple[int, ...]) -> None:
        """Keep these rows of the last pass, in this order, as the next committed tokens; forget its other rows."""
        if rows != tuple(range(len(rows))):
            slots = torch.tensor([self.length + row for row in rows])
            struct, counts = self.engine.struct, (c_int64(self.length), c_void_p(slots.data_ptr()), c_int64(len(rows)))
            library().sdsat_move(byref(struct), byref(self.struct), *counts, self.engine.is_bf16)
        self.length += len(rows)


class NativeEngine:
    """The weights of a model, and of its adapter, in native.cpp's order. The copy takes as much memory as the weights.

    rounded: linear layers in 8 bits, for passes that only draft: half the bytes to read, and nearly the same guesses. Its rows
    read the cache of the exact engine; what they write there is never kept.
    """

    def __init__(self, model: Any, adapter: SatAdapter | None, max_context: int, rounded: bool = False):
        config, base = model.config, model.base_model
        if config.model_type not in _FORMS:
            raise Unavailable(f"architecture {config.model_type}")
        window = sliding_window(config)
        if window is not None and window < max_context:
            raise Unavailable(f"sliding_window={window}, and the context goes on to {max_context}")
        self.dtype = model.get_input_embeddings().weight.dtype
        if self.dtype not in (torch.bfloat16, torch.float32) or model.device.type != "cpu":
            raise Unavailable(f"it has no {self.dtype} on {model.device.type}")
        self.is_bf16 = int(self.dtype == torch.bfloat16)
        self._step, self._kept, self._adapter, self._rounded = 1 + self.is_bf16, [], adapter, rounded
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        sizes = {"hidden": config.hidden_size, "dim": dim, "inner": config.intermediate_size}
        odd = [f"{name}={size}" for name, size in sizes.items() if size % _MULTIPLE]
        if odd:
            raise Unavailable(f"{', '.join(odd)}: not a multiple of {_MULTIPLE}")
        if config.hidden_act != "silu":
            raise Unavailable(f"activation {config.hidden_act}")
        library()
        self._positions = min(max_context, 2**20) + 2 * MAX_ROWS  # drafts and the probe look ahead
        positions = torch.arange(self._positions)[None]
        cos, sin = (self._keep(part[0].float()) for part in base.rotary_emb(torch.zeros(1, dtype=self.dtype), positions))
        layers = (_Layer * config.num_hidden_layers)(*(self._layer(layer) for layer in base.layers))
        self._kept.append(layers)
        head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
        self.struct = _Model(
            config.num_hidden_layers, config.hidden_size, config.num_attention_heads, kv_heads, dim,
            config.intermediate_size, head.weight.shape[0], 1,
            config.rms_norm_eps, base.layers[0].self_attn.scaling,
            cos.data_ptr(), sin.data_ptr(), _pointer(self._keep(base.norm.weight)),
            self._linear(head.weight, head.bias), layers,
            _pointer(self._keep(tokens.weight)), _pointer(self._keep(head.weight)),
            *self._head(None if rounded else adapter), torch.finfo(self.dtype).eps,
        )  # fmt: skip

    def _head(self, adapter: SatAdapter | None) -> tuple[_Linear, _Linear]:
        if adapter is None or adapter.head is None:
            return _Linear(), _Linear()
        inner, outer = adapter.head.inner.detach(), adapter.head.outer.detach()
        padding = -inner.shape[0] % _MULTIPLE
        inner, outer = nn.functional.pad(inner, (0, 0, 0, padding)), nn.functional.pad(outer, (0, padding))
        return self._linear(inner), self._linear(outer)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1]

    def _packed(self, *weights: Tensor) -> list[_Matrix]:
        """Matrices with as many outputs, block by block beside each other in memory."""
        blocks = (weights[0].shape[0] + -weights[0].shape[0] % _MULTIPLE) // (2 * library().sdsat_lanes())
        packed = [pack8(weight) if self._rounded else (pack(weight, self._step),) for weight in weights]
        held = [[part.view(blocks, -1).view(torch.uint8) for part in parts] for parts in packed]  # bytes, and scales in 8 bits
        together = self._keep(torch.cat([part for parts in held for part in parts], 1))
        at, matrices = together.data_ptr(), []
        for parts in held:
            matrices.append(_Matrix(at, at + parts[0].shape[1] if self._rounded else None, together.shape[1]))
            at += sum(part.shape[1] for part in parts)
        return matrices

    def _linear(self, weight: Tensor, bias: Tensor | None = None, name: str = "") -> _Linear:
        out, inner = weight.shape
        struct = _Linear(out=out + -out % _MULTIPLE, in_=inner)
        if bias is not None:
            struct.bias = _pointer(self._keep(nn.functional.pad(bias, (0, -out % _MULTIPLE))))
        if self._adapter is None or name not in self._adapter.down:
            (struct.weight,) = self._packed(weight)
            return struct
        down, up = self._adapter.down[name], self._adapter.config.scale * self._adapter.up[name]
        padding = -down.shape[0] % _MULTIPLE
        down, up = nn.functional.pad(down, (0, 0, 0, padding)), nn.functional.pad(up, (0, padding))
        (struct.down,), (struct.weight, struct.up), struct.rank = self._packed(down), self._packed(weight, up), down.shape[0]
        return struct

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        where = f"model/layers/{attention.layer_idx}"
        linears = [(getattr(attention, f"{x}_proj"), f"{where}/self_attn/{x}_proj") for x in "qkvo"]
        linears += [(getattr(mlp, f"{x}_proj"), f"{where}/mlp/{x}_proj") for x in ("gate", "up", "down")]
        parts = (self._linear(linear.weight, linear.bias, name) for linear, name in linears)
        return _Layer(*(None if norm is None else _pointer(self._keep(norm.weight)) for norm in norms), *parts)

    def cache(self, num_slots: int) -> NativeCache:
        return NativeCache(self, num_slots)

    def forward(
        self, caches: Sequence[NativeCache], embeddings: Tensor, layout: Layout, sats: int = 0, last: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """One pass over the sequences of `caches`; commits nothing. embeddings [N, D]; layout: of the N rows, the last `sats` of
        which are SATs; every row sees all that its sequence has committed.

        Returns (last hidden states [N, D], logits [last, V] of the last rows; None: of all).
        """
        rows, last = len(embeddings), len(embeddings) if last is None else last
        x, states = embeddings.clone(), torch.empty_like(embeddings)
        logits = torch.empty(last, self.struct.vocabulary, dtype=self.dtype)
        held = [cache.length for cache in caches]
        lengths = torch.full((rows,), held[0]) if len(caches) == 1 else torch.tensor(held)[layout.sequences]
        positions, slots = lengths + layout.offsets, lengths + layout.places
        room = min(cache.struct.slots - cache.length for cache in caches)
        assert layout.width <= room and int(positions.max()) < self._positions  # what C++ will not check
        self.struct.threads = torch.get_num_threads()
        tensors = (x, states, logits, positions, slots, layout.sequences, lengths, layout.within)
        struct = _Pass(*(tensor.data_ptr() for tensor in tensors), rows, sats, last)
        structs = (_Cache * len(caches))(*(cache.struct for cache in caches))
        library().sdsat_pass(byref(self.struct), structs, byref(struct), self.is_bf16)
        return states, logits

    def top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest logits of each row, of equals the lower id first: (values [N, count], ids [N, count])."""
        values, ids = torch.empty(len(logits), count), torch.empty(len(logits), count, dtype=torch.long)
        sizes = (c_int64(len(logits)), c_int64(logits.shape[-1]), c_int64(count))
        pointers = (c_void_p(tensor.data_ptr()) for tensor in (logits, ids, values))
        x, i, v = pointers
        library().sdsat_largest(x, *sizes, i, v, torch.get_num_threads(), self.is_bf16)
        return values, ids

    def choose(self, logits: Tensor, index: Tensor, sampling: SamplingConfig, seeds: Tensor | None = None) -> Tensor:
        """`sampling.choose` of one token a row, without sorting or noise for the whole vocabulary: [N] for logits [N, V]."""
        chosen, seeds = torch.empty_like(index), torch.full_like(index, as_seed(sampling.seed)) if seeds is None else seeds
        x, i, s, out = (c_void_p(tensor.data_ptr()) for tensor in (logits, index, seeds, chosen))
        sizes = (c_int64(len(logits)), c_int64(logits.shape[-1]))
        library().sdsat_choose(x, *sizes, i, s, byref(_Sampling.of(sampling)), out, torch.get_num_threads(), self.is_bf16)
        return chosen

    def draft(
        self, x: Tensor, states: Tensor, logits: Tensor, shortlist: int, index: int, tree: DraftTree, sampling: SamplingConfig
    ) -> Tensor:
        """`draft.draft_tokens` in one call. shortlist: how many of a SAT's candidates are looked at."""
        out = torch.empty(2, len(tree), dtype=torch.float64)
        out[0, 0], out[1, 0] = x[0], 1.0
        pointers = map(_pointer, (states, logits, *_shape(tree), *out))
        numbers = (len(tree), len(logits), shortlist, index, as_seed(sampling.seed))
        struct = _Drafting(*pointers, *numbers, _Sampling.of(sampling))
        self.struct.threads = torch.get_num_threads()
        library().sdsat_draft(byref(self.struct), byref(struct), self.is_bf16)
        return out


@lru_cache(maxsize=256)
def _shape(tree: DraftTree) -> tuple[Tensor, ...]:
    """Parents, ranks and depths, [N] each."""
    return tuple(torch.tensor([tree.parents, tree.ranks, tree.depths]))
