"""A model's weights as C++ reads them: packed in the order of a processor's vectors."""

from __future__ import annotations

import mmap
from contextlib import suppress
from ctypes import Array, c_float
from typing import Any

import torch
from torch import Tensor, nn

from sdsat.config import MAX_ROWS
from sdsat.engines.native.bindings import (
    Form,
    Layer,
    Linear,
    Matrix,
    Model,
    described,
    fits,
    library,
    pointer,
)
from sdsat.engines.native.compiler import Unavailable
from sdsat.engines.native.packing import (
    MULTIPLE,
    PlainWeight,
    Source,
    as_bytes,
    form_of,
    num_blocks,
    num_outputs,
)
from sdsat.method.copies import LONGEST
from sdsat.models.attention import sliding_window
from sdsat.models.blocks import TYPES, BlockLinear
from sdsat.models.head import EPS, DraftHead
from sdsat.models.int8 import Int8Linear
from sdsat.models.sat_model import SatModel
from sdsat.models.weights import strange_part

# The engine has all that their modules in transformers compute, and no more.
FORMS = ("llama", "mistral", "qwen2", "qwen3")
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_AT_ONCE = 2**21  # numbers that are packed together: little memory beside the packed ones
_PAGE_OUT_AFTER = 2**25  # bytes that were read


class NativeWeights:
    """The weights of a model, and of its adapter, in the order that C++ reads.

    The copy takes as much memory as the weights; what was copied leaves memory, if it is in a file.
    `struct` is what C++ reads. Raises Unavailable for what the engine was not written for.

    exact: what exact passes read. Beside it, these are the rounded weights, for passes that only
    draft: linear layers in 5 bits, the adapter's in 8; a third of bfloat16's bytes to read, and
    nearly the same guesses. Layers that are in 4 or 5 bits already are those of `exact`. Without
    it, layers of a model in 8 bits (models/int8.py) are in 8 bits, those in a file's own bits
    (models/blocks.py) in these.
    """

    def __init__(self, model: SatModel, exact: NativeWeights | None = None):
        lm = model.lm
        config = model.config
        base = lm.base_model
        self.dtype = model.dtype
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        _check_form(model, dim)
        library()
        self.is_bf16 = int(self.dtype == torch.bfloat16)
        self._step = 1 + self.is_bf16
        self._kept = []
        self._adapter = model.adapter
        self._mapped = model.mapped
        self._read_bytes = 0  # since something left memory
        rounded = exact is not None
        self._exact = exact
        self._in_few_bits: dict[tuple[str, bool], Linear] = {}  # what rounded passes read too
        linears = [part for part in lm.modules() if isinstance(part, nn.Linear)]
        in_8_bits = rounded or any(isinstance(part, Int8Linear) for part in linears)
        self._adapter_form = Form.INT8 if in_8_bits else Form.PLAIN
        if exact is None:
            # Drafts and the probe look ahead.
            self._positions: int = min(model.max_context, 2**20) + 2 * MAX_ROWS
            self._rotary = self._rotary_tables(base, dim)
        else:
            self._positions = exact._positions
            self._rotary = exact._rotary
        cos, sin = self._rotary
        hidden = config.hidden_size
        shapes = _shapes(config, dim)
        layers = (Layer * config.num_hidden_layers)(
            *(self._layer(layer, shapes, hidden, dim) for layer in base.layers)
        )
        self._kept.append(layers)
        head = lm.get_output_embeddings()
        draft_head = None if rounded else model.head
        tokens = lm.get_input_embeddings()
        vocabulary = head.weight.shape[0]
        output, drafting_output, draft_tokens = self._output_layers(head, model.draft_ids)
        draft_inner, draft_outer = self._head(draft_head, hidden)
        sharpness, copies = _gains(draft_head)
        embedding = self._checked("embed_tokens", tokens.weight, vocabulary, hidden)
        guessed = model.draft_ids if rounded else None
        self.struct = Model(
            layers=config.num_hidden_layers,
            hidden=hidden,
            heads=config.num_attention_heads,
            kv_heads=_kv_heads(config),
            dim=dim,
            inner=config.intermediate_size,
            vocabulary=vocabulary if guessed is None else len(guessed),
            positions=self._positions,
            threads=1,
            in_8_bits=int(in_8_bits),
            eps=config.rms_norm_eps,
            scale=base.layers[0].self_attn.scaling,
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            norm=self._norm("norm", base.norm, hidden),
            head=output,
            draft_head=drafting_output,
            draft_tokens=draft_tokens,
            layer=layers,
            embedding=pointer(self._keep(embedding)),
            unembedding=pointer(self._keep(head.weight)),
            draft_inner=draft_inner,
            draft_outer=draft_outer,
            draft_eps=EPS,
            sharpness=sharpness,
            copies=copies,
        )
        self._page_out()

    def _rotary_tables(self, base: Any, dim: int) -> list[Tensor]:
        """Return cosines and sines of all positions, [positions, dim] each in float32."""
        positions = torch.arange(self._positions)[None]
        parts = base.rotary_emb(torch.zeros(1, dtype=self.dtype), positions)
        return [
            self._checked("rotary_emb", part[0], self._positions, dim).float().contiguous()
            for part in parts
        ]

    def _output_layers(self, head: nn.Linear, ids: Tensor | None) -> tuple[Linear, Linear, int]:
        """Pack the output layer.

        ids: [C] of the draft vocabulary, None where there is none. Returns the layer, the rows of
        it that are the draft vocabulary's, and C. rounded passes have those rows only.
        """
        if ids is None:
            return self._linear("lm_head", head, head.weight.shape), Linear(), 0
        drafts = self._linear("lm_head", head, head.weight.shape, ids)
        if self._exact is not None:
            return drafts, Linear(), 0
        return self._linear("lm_head", head, head.weight.shape), drafts, len(ids)

    def _checked(self, name: str, tensor: Tensor, *shape: int) -> Tensor:
        """Return the tensor, if C++ may read it.

        Raises Unavailable, with the name, unless it has the engine's dtype and this shape.
        """
        if not fits(tensor, self.dtype, shape):
            found = described(tensor.dtype, tensor.shape, tensor.device.type)
            wanted = described(self.dtype, shape, "cpu")
            raise Unavailable(f"{name} is {found}, and not {wanted}")
        return tensor

    def _head(self, head: DraftHead | None, hidden: int) -> tuple[Linear, Linear]:
        if head is None:
            return Linear(), Linear()
        inner = head.inner.detach()
        outer = head.outer.detach()
        size = len(inner)
        padding = -len(inner) % MULTIPLE
        inner = nn.functional.pad(
            self._checked("head.inner", inner, size, 2 * hidden), (0, 0, 0, padding)
        )
        outer = nn.functional.pad(self._checked("head.outer", outer, hidden, size), (0, padding))
        layers = []
        for weight in (inner, outer):  # as they are, whatever the model's are rounded to
            (packed,) = self._packed((PlainWeight(weight), Form.PLAIN))
            layers.append(Linear(packed, out=len(weight), in_=weight.shape[1]))
        return layers[0], layers[1]

    def _norm(self, name: str, norm: Any, size: int) -> int | None:
        return None if norm is None else pointer(self._keep(self._checked(name, norm.weight, size)))

    def _page_out(self) -> None:
        """Let what was packed leave memory, if it is in a file."""
        self._read_bytes = 0
        if self._mapped is not None:
            self._mapped.page_out()

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1]

    def _packed(self, *parts: tuple[Source, Form]) -> list[Matrix]:
        """Pack weights with as many outputs, block by block beside each other in memory.

        parts: (weight, what becomes of it) of each.
        """
        source, _ = parts[0]
        outputs = num_outputs(source)
        at_once = max(1, _AT_ONCE // source.num_inputs // MULTIPLE) * MULTIPLE
        together = torch.empty(0)
        for first in range(0, outputs, at_once):
            last = min(outputs, first + at_once)
            held = [as_bytes(*part, first, last, self._step) for part in parts]
            joined = torch.cat([part for packed in held for part in packed], 1)
            if not first:
                together = _huge_pages(num_blocks(outputs), joined.shape[1])
                self._kept.append(together)
            together[num_blocks(first) :][: len(joined)] = joined
            self._read_bytes += (
                sum(source.held.nbytes for source, _ in parts) * (last - first) // outputs
            )
            if self._read_bytes >= _PAGE_OUT_AFTER:
                self._page_out()
        at = together.data_ptr()
        matrices = []
        for packed, (_, form) in zip(held, parts, strict=True):
            scale = at + packed[0].shape[1] if form == Form.INT8 else None
            matrices.append(Matrix(at, scale, together.shape[1], form))
            at += sum(part.shape[1] for part in packed)
        return matrices

    def _source(self, linear: nn.Linear, ids: Tensor | None) -> tuple[Source, Form]:
        """Return what is packed of a layer, and as what. ids: of some outputs; None: all."""
        if isinstance(linear, BlockLinear) and self._exact is None:
            blocks = linear.blocks if ids is None else linear.blocks.of(ids)
            return blocks, form_of(blocks)
        weight = linear.weight.detach()
        form = Form.INT8 if isinstance(linear, Int8Linear) else Form.PLAIN
        return PlainWeight(weight, ids), form if self._exact is None else Form.INT5

    def _linear(
        self, name: str, linear: nn.Linear, shape: tuple[int, ...], ids: Tensor | None = None
    ) -> Linear:
        """Pack a layer, unless the exact weights have it in few bits.

        Args:
            name: of the layer, as the adapter has it.
            linear: the layer.
            shape: that its weight must have.
            ids: of the outputs to pack; None: all.
        """
        part = (name, ids is not None)
        few = isinstance(linear, BlockLinear) and TYPES[linear.blocks.kind].bits < 8
        if few and self._exact is not None:
            return self._exact._in_few_bits[part]
        struct = self._packed_linear(name, linear, shape, ids)
        if few:
            self._in_few_bits[part] = struct
        return struct

    def _packed_linear(
        self, name: str, linear: nn.Linear, shape: tuple[int, ...], ids: Tensor | None
    ) -> Linear:
        """Pack a layer, as of `_linear`."""
        out, inner = shape
        self._checked(name, linear.weight, *shape)
        bias: Tensor | None = linear.bias
        if bias is not None:
            bias = self._checked(f"{name}'s bias", bias.detach(), out)
        if ids is not None:
            out = len(ids)
            bias = None if bias is None else bias[ids]
        struct = Linear(out=out + -out % MULTIPLE, in_=inner)
        if bias is not None:
            struct.bias = pointer(self._keep(nn.functional.pad(bias, (0, -out % MULTIPLE))))
        if self._adapter is None or name not in self._adapter.down:
            (struct.weight,) = self._packed(self._source(linear, ids))
            return struct
        rank = len(self._adapter.down[name])
        down = self._checked(f"adapter's down of {name}", self._adapter.down[name], rank, inner)
        up = self._adapter.config.scale * self._checked(
            f"adapter's up of {name}", self._adapter.up[name], out, rank
        )
        padding = -down.shape[0] % MULTIPLE
        down = nn.functional.pad(down, (0, 0, 0, padding))
        up = nn.functional.pad(up, (0, padding))
        (struct.down,), (struct.weight, struct.up), struct.rank = (
            self._packed((PlainWeight(down), self._adapter_form)),
            self._packed(self._source(linear, ids), (PlainWeight(up), self._adapter_form)),
            len(down),
        )
        return struct

    def _layer(
        self, layer: Any, shapes: dict[str, tuple[int, ...]], hidden: int, dim: int
    ) -> Layer:
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
            parts.append(
                self._linear(f"{where}/{part}/{name}", getattr(module, name), shapes[name])
            )
        return Layer(*norms, *parts)


def _huge_pages(blocks: int, size: int) -> Tensor:
    """Make room for bytes [blocks, size], in pages of 2 MiB where the system gives them.

    Raises MemoryError.
    """
    try:  # shared memory, mmap's default, has no such pages
        room = mmap.mmap(-1, blocks * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{blocks * size} bytes of weights: {error.strerror}") from None
    with suppress(AttributeError, OSError):  # not on every system
        room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8).view(blocks, size)


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _check_form(model: SatModel, dim: int) -> None:
    """Refuse a model that the engine was not written for; raises Unavailable, with the reason.

    dim: of an attention head.
    """
    config = model.config
    if config.model_type not in FORMS:
        raise Unavailable(f"architecture {config.model_type}")
    window = sliding_window(config)
    if window is not None and window < model.max_context:
        raise Unavailable(
            f"sliding_window={window}, and the context goes on to {model.max_context}"
        )
    if model.dtype not in (torch.bfloat16, torch.float32) or model.device.type != "cpu":
        raise Unavailable(f"it has no {model.dtype} on {model.device.type}")
    sizes = {"hidden": config.hidden_size, "dim": dim, "inner": config.intermediate_size}
    odd = [f"{name}={size}" for name, size in sizes.items() if size % MULTIPLE]
    if odd:
        raise Unavailable(f"{', '.join(odd)}: not a multiple of {MULTIPLE}")
    if config.hidden_act != "silu":
        raise Unavailable(f"activation {config.hidden_act}")
    if strange := strange_part(model.lm):
        raise Unavailable(strange)
    linears = {type(part) for part in model.lm.modules() if isinstance(part, nn.Linear)}
    if Int8Linear in linears and len(linears) > 1:
        raise Unavailable("some linear layers are in 8 bits, and others are not")
    if config.num_attention_heads % _kv_heads(config):
        raise Unavailable(f"{config.num_attention_heads} heads on {_kv_heads(config)} of keys")


def _shapes(config: Any, dim: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's projections by name. dim: of an attention head."""
    hidden = config.hidden_size
    inner = config.intermediate_size
    width = config.num_attention_heads * dim
    keys = _kv_heads(config) * dim
    return {
        "q_proj": (width, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, width),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def _gains(head: DraftHead | None) -> tuple[float, Array[c_float]]:
    """Return sharpness and copies of a draft head; what changes nothing where there is none."""
    if head is None:
        return 1.0, (c_float * LONGEST)()
    return float(head.sharpness), (c_float * LONGEST)(*head.copies.tolist())
