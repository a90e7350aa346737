"""The native engine: transformers' logits, a row's bits whatever its pass is, and a plain reason
where it can't be had.
"""

import copy
import ctypes
import errno
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import (
    decoder_of,
    forward,
    one_line_error,
    randomise_gains,
    tiny_llama,
    tiny_tokenizer,
)
from gguf_files import random_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import sdsat
from sdsat.cli import main as cli
from sdsat.config import DecodeConfig, InputError, SamplingConfig, SatConfig
from sdsat.decoding.decoder import Decoder
from sdsat.engines import drafting
from sdsat.engines.base import PassInput, RowPolicy, probe_rows
from sdsat.engines.drafting import Guesses
from sdsat.engines.native import bindings, compiler, packing, weights
from sdsat.engines.native import engine as native_engine
from sdsat.engines.native.compiler import Unavailable
from sdsat.engines.native.engine import NativeEngine
from sdsat.method.layout import Layout, SatGroup
from sdsat.method.sampling import as_seed, choose, gumbel_noise
from sdsat.method.tree import DraftTree, make_tree
from sdsat.models import attention
from sdsat.models.adapter import AdapterConfig, SatAdapter
from sdsat.models.blocks import TYPES, BlockLinear, HeldWeight, take_blocks
from sdsat.models.int8 import Int8Linear, round_linears, round_weight
from sdsat.models.sat_model import SatModel

VOCAB = 75
SIZES = dict(hidden_size=64, intermediate_size=96, head_dim=32)
COMMON = dict(
    **SIZES,
    vocab_size=VOCAB,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.2,
    eos_token_id=None,
    bos_token_id=1,
    pad_token_id=None,
)
ROPE = dict(rope_theta=10000.0, original_max_position_embeddings=32)
LLAMA3 = dict(**ROPE, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "biases": LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "groups of 4": LlamaConfig(**{**COMMON, "num_key_value_heads": 1}),
    "groups of 5": LlamaConfig(
        **{**COMMON, "hidden_size": 160, "num_attention_heads": 5, "num_key_value_heads": 1}
    ),
    "head dim 96": LlamaConfig(**{**COMMON, "head_dim": 96, "num_attention_heads": 2}),
    "llama 3 rope": LlamaConfig(**COMMON, rope_parameters=LLAMA3),
    "yarn rope": LlamaConfig(
        **COMMON, rope_parameters={**ROPE, "rope_type": "yarn", "factor": 16.0}
    ),
    "mistral": MistralConfig(**COMMON, sliding_window=None),
    "qwen2": Qwen2Config(**{**COMMON, "hidden_size": 128}),
    "qwen2, tied": Qwen2Config(**{**COMMON, "hidden_size": 128}, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON),
    "blocks of 256": LlamaConfig(
        **{**COMMON, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    ),
}
FLOAT = torch.float32
HALF = torch.bfloat16
INT8 = "int8"  # HALF with linear layers in 8 bits
GGUF = "gguf"  # HALF with linear layers in a file's own bits, of one type after the other
each_kind = pytest.mark.parametrize("kind", [FLOAT, HALF, INT8, GGUF], ids=str)
each_dtype = pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
TOKENS = torch.randint(VOCAB, (400,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def random_lm(name, kind=FLOAT):
    """A random model of CONFIGS whose norms and biases are no ones and zeros either.

    kind: its dtype, INT8, GGUF, or the types of a file's weights.
    """
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(CONFIGS[name]).eval().requires_grad_(False)
    for key, parameter in lm.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(1.0 if key.endswith("norm.weight") else 0.0, 0.3)
    if kind == INT8:
        round_linears(lm.to(HALF))
    elif kind == GGUF:
        in_blocks(lm.to(HALF))
    elif isinstance(kind, tuple):
        in_blocks(lm.to(HALF), kind)
    else:
        lm.to(kind)
    return lm


def in_blocks(lm, kinds=tuple(TYPES)):
    """Give a model's linear layers random weights as files hold them, of each type that fits."""
    held = {}
    for name, weight in lm.named_parameters():
        if weight.dim() == 2 and "embed_tokens" not in name:
            fitting = [kind for kind in kinds if weight.shape[1] % TYPES[kind].inputs == 0]
            kind = fitting[len(held) % len(fitting)]
            held[name] = HeldWeight(random_blocks(kind, *weight.shape), kind)
            weight.copy_(held[name].read().numbers())
    take_blocks(lm, held)


def natively(lm, adapter=None):
    model = SatModel(lm, None, "tiny", adapter and adapter.config.sat, adapter)
    return Decoder(model, NativeEngine(model))


@cache
def decoder_with(
    name,
    kind,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    head=0,
    draft_ids=(),
):
    """A native model with an adapter whose rank, like its head's size, is no multiple of 32."""
    lm = random_lm(name, kind)
    lm.set_attn_implementation(attention.NAME)
    adapter = SatAdapter(
        lm,
        AdapterConfig(
            name,
            SatConfig(VOCAB, 4),
            rank=5,
            scale=0.5,
            targets=targets,
            head=head,
            draft_vocabulary=len(draft_ids),
        ),
    )
    if draft_ids:
        adapter.draft_ids.copy_(torch.tensor(draft_ids))
    for parameter in adapter.up.values():
        torch.nn.init.normal_(parameter, std=0.3)
    if adapter.head is not None:
        torch.nn.init.normal_(adapter.head.outer, std=0.1)
        randomise_gains(adapter.head)
    adapter.requires_grad_(False).attach(lm)
    return natively(lm, adapter)


def without_native(decoder):
    """The same model on transformers' modules."""
    model = decoder.model
    return decoder_of(model.lm, sat=model.sat, adapter=model.adapter)


def chain(count):
    return make_tree("chain", count - 1)


def in_passes(decoder, tokens, sizes):
    """[S, V] logits of passes of so many tokens in turn, each committed; sizes[0] is the prefill's,
    which gives none.
    """
    cache = decoder.engine.new_cache(len(tokens) + 1)
    parts = tokens.split(sizes)
    decoder.engine.prefill(cache, parts[0])
    logits = []
    for part in parts[1:]:
        logits.append(forward(decoder, cache, part, chain(len(part)))[1])
        cache.commit(tuple(range(len(part))))
    return torch.cat(logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name):
    lm = random_lm(name)
    tokens = TOKENS[:150]
    lm.set_attn_implementation("sdpa")
    want = lm(tokens[None]).logits[0]
    for sizes in ([0, 96, 54], [37, 1, 2, 30, 80], [128, 22]):
        torch.testing.assert_close(
            in_passes(natively(lm), tokens, sizes), want[sizes[0] :], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_as_near_to_the_exact_as_transformers_bfloat16(name):
    lm = random_lm(name, HALF)
    tokens = TOKENS[:150]
    lm.set_attn_implementation("sdpa")
    got = in_passes(natively(lm), tokens, [0, 96, 54]).float()
    theirs = lm(tokens[None]).logits[0].float()
    exact = lm.float()(tokens[None]).logits[0]  # of the same, rounded weights
    assert (got - exact).pow(2).mean() <= 1.5 * (theirs - exact).pow(2).mean()
    assert (got - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@pytest.mark.parametrize("shape", [(32, 32), (75, 64), (100, 96)], ids=str)
def test_weights_in_8_bits(shape):
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    weight[3] = 0
    packed, scale = packing.pack8(weight)
    lanes = bindings.library().sdsat_lanes()
    assert (
        packed.shape == (len(scale) // lanes, shape[1] // 4, lanes, 4)
        and packed.dtype == torch.uint8
    )
    for o, i in [(0, 0), (3, 5), (17, 31), (31, 1), (shape[0] - 1, shape[1] - 1)]:
        held = (int(packed[o // lanes, i // 4, o % lanes, i % 4]) - 128) * scale[o]
        assert abs(held - weight[o, i]) <= scale[o] * 0.501
    assert torch.allclose(scale[: shape[0]] * 127, weight.abs().amax(1), atol=1e-18)


@pytest.mark.parametrize("shape", [(32, 32), (75, 64), (100, 96)], ids=str)
def test_weights_in_5_bits(shape):
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    weight[3] = 0
    packed = packing.pack5(weight)
    lanes = bindings.library().sdsat_lanes()
    outputs = shape[0] + -shape[0] % 32
    assert packed.shape == (outputs // lanes, shape[1] // 32, 22 * lanes)
    for o, i in [(0, 0), (3, 5), (17, 31), (31, 1), (shape[0] - 1, shape[1] - 1)]:
        group = packed[o // lanes, i // 32]
        low, high, scales = group.split([16 * lanes, 4 * lanes, 2 * lanes])
        step, place = i % 32 // 4, i % 4
        lane = o % lanes
        value = int(low.view(4, lanes, 4)[step // 2, lane, place]) >> 4 * (step % 2) & 15
        value += 16 * (int(high.view(lanes, 4)[lane, place]) >> step & 1)
        scale = float(scales.view(torch.bfloat16)[lane])
        # the other end of the range lacks one step
        assert abs((value - 16) * scale - weight[o, i]) <= abs(scale) * 1.1
        assert torch.equal(torch.tensor((value - 16) * scale), in_5_bits(weight)[o, i])


def in_5_bits(weight):
    groups = weight.float().unflatten(-1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    end = torch.where(-low > high, low, high)  # it becomes -16
    scale = (end / -16).bfloat16().float()
    value = (groups * torch.where(scale == 0, 0, 1 / scale)).round().clamp(-16, 15)
    return (value * scale).flatten(-2)


def rows_in_8_bits(module, args):
    groups = args[0].unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127
    return (groups / scale).round().mul(scale).flatten(-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_a_rounded_pass_are_those_of_rounded_weights_and_rows(name):
    """Through transformers' modules, with weights and inputs rounded; after a context that the
    exact engine has read.
    """
    decoder = natively(random_lm(name))
    other = random_lm(name)
    other.set_attn_implementation("sdpa")
    past = other(TOKENS[None, :40], use_cache=True).past_key_values
    for module in [m for m in other.modules() if isinstance(m, torch.nn.Linear)]:
        module.weight = torch.nn.Parameter(in_5_bits(module.weight), requires_grad=False)
        module.register_forward_pre_hook(rows_in_8_bits)
    for rows in (1, 7, 10, 11, 33):
        tokens = TOKENS[: 40 + rows]
        cache = decoder.engine.new_cache(len(tokens))
        decoder.engine.prefill(cache, tokens[:40])
        got = forward(decoder, cache, tokens[40:], chain(rows), rounded=True)[1]
        before = forward(decoder, cache, tokens[40:], chain(rows))[1]
        want = other(tokens[None, 40:], past_key_values=copy.deepcopy(past)).logits[0]
        # rounding is a step: near an edge it may fall either way
        assert (got - want).norm() <= 0.6 * (got - before).norm(), rows
        assert (got - before).norm() <= 0.4 * before.norm(), rows


def assert_last_layer(lm, weight, rounded=False):
    """The last layer multiplies by this weight, [V, hidden], and its error is its inputs' rounding
    to 8 bits and no more: by a product in float64.

    Of its inputs, the states, the caller has every bit: nothing is near an edge unseen.
    """
    decoder = natively(lm)
    bias = lm.get_output_embeddings().bias
    for rows in (1, 3, 4, 8, 9, 10, 11):
        cache = decoder.engine.new_cache(rows)
        states, got = forward(decoder, cache, TOKENS[:rows], chain(rows), rounded=rounded)
        want = rows_in_8_bits(None, [states.double()]) @ weight.double().T
        want += 0 if bias is None else bias.double()
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), rows


@pytest.mark.parametrize("name", CONFIGS)
def test_a_linear_layer_in_5_bits(name):
    lm = random_lm(name)
    assert_last_layer(lm, in_5_bits(lm.get_output_embeddings().weight), rounded=True)


@pytest.mark.parametrize("draft_ids", [(), tuple(range(0, VOCAB, 3))], ids=["all", "some"])
@each_kind
def test_weights_are_the_same_packed_at_once_or_in_pieces(kind, draft_ids, monkeypatch):
    """Of a matrix as large as a model's the former would take as much memory again."""
    model = decoder_with("blocks of 256", kind, draft_ids=draft_ids).model

    def packed():
        exact = weights.NativeWeights(model)
        rounded = weights.NativeWeights(model, exact)
        return [part for each in (exact, rounded) for part in each._kept if torch.is_tensor(part)]

    whole = packed()
    monkeypatch.setattr(weights, "_AT_ONCE", 64 * 256)
    pieces = packed()
    assert len(pieces) == len(whole)
    assert all(map(torch.equal, pieces, whole))


@pytest.mark.parametrize("draft_ids", [(), tuple(range(0, VOCAB, 3))], ids=["all", "some"])
@pytest.mark.parametrize("held", ["few", "many", "both"])
def test_rounded_passes_read_what_is_in_few_bits_as_it_is(held, draft_ids):
    """So they say the same as exact ones, and take no memory of their own; 8 bits are rounded."""
    few = {kind for kind in TYPES if TYPES[kind].bits < 8}
    kinds = {"few": few, "many": set(TYPES) - few, "both": set(TYPES)}[held]
    decoder = decoder_with("blocks of 256", tuple(sorted(kinds)), draft_ids=draft_ids)
    engine = decoder.engine
    cache = engine.new_cache(128)
    engine.prefill(cache, TOKENS[:40])
    tree = DraftTree((-1, 0, 0, 2, 1), (0,) * 5)
    part = PassInput(cache, TOKENS[40:45].tolist(), tree, (SatGroup(4, 3),))
    exact = engine.forward([part])
    rounded = engine.forward([part], rounded=True)
    drafted = list(draft_ids or range(VOCAB))
    same = held == "few"
    assert torch.equal(rounded.states, exact.states) == same
    assert torch.equal(rounded.logits[:, drafted], exact.logits[:, drafted]) == same
    assert torch.equal(rounded.sat_logits, exact.sat_logits) == same
    shared = []
    for number, layer in enumerate(decoder.model.lm.model.layers):
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            one, other = (
                getattr(weights.struct.layer[number], name).weight.weight
                for weights in (engine.exact, engine.rounded)
            )
            module = getattr(layer.self_attn if name in "qkvo" else layer.mlp, f"{name}_proj")
            assert (one == other) == (module.blocks.kind in few), name
            shared.append(one == other)
    assert set(shared) == {"few": {True}, "many": {False}, "both": {True, False}}[held]


@pytest.mark.parametrize("lanes", [8, 16])
@each_kind
def test_auto_has_rounded_weights_only_where_they_pay(kind, lanes, monkeypatch):
    """They take memory of their own; `rounded` has them wherever it is asked for."""
    model = decoder_with("blocks of 256", kind).model
    decoder = natively(model.lm, model.adapter)
    vectors = SimpleNamespace(sdsat_lanes=lambda: lanes)  # of another processor
    monkeypatch.setattr(native_engine, "library", lambda: vectors)
    assert decoder.engine.rounding_pays == (kind != INT8 or lanes == 16)
    for strategy in ("auto", "rounded"):
        want = decoder.generate(TOKENS[:9].tolist(), DecodeConfig(0, 12)).token_ids
        config = DecodeConfig(3, 12, strategy=strategy)
        assert decoder.generate(TOKENS[:9].tolist(), config).token_ids == want
        made = "rounded" in vars(decoder.engine)
        assert made == (strategy == "rounded" or decoder.engine.rounding_pays)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_linear_layer_in_8_bits(name):
    """In float32, where nothing else is rounded."""
    lm = random_lm(name)
    round_linears(lm)
    values, scale = round_weight(lm.get_output_embeddings().weight)
    assert_last_layer(lm, values.double() * scale.double()[:, None])


@pytest.mark.parametrize("kind", TYPES)
def test_a_linear_layer_in_a_files_own_bits(kind):
    """Nothing of the weight is rounded."""
    lm = random_lm("blocks of 256")
    in_blocks(lm, [kind])
    assert_last_layer(lm, lm.get_output_embeddings().blocks.read().numbers())


@pytest.mark.parametrize("name", ["llama", "biases", "qwen2", "blocks of 256"])
def test_logits_of_a_model_in_a_files_own_bits_are_those_of_its_modules(name):
    lm = random_lm(name)
    in_blocks(lm)
    plain = copy.deepcopy(lm)
    for parent in list(plain.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, BlockLinear):
                setattr(parent, child, as_plain(layer))
    assert_near_modules(lm, plain)


def as_plain(layer):
    """A linear layer with the same weight and bias, which rounds nothing."""
    plain = torch.nn.Linear(layer.in_features, layer.out_features)
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


def assert_near_modules(lm, plain):
    """Native logits are nearer to those of `lm`'s modules than of `plain`, which rounds nothing."""
    lm.set_attn_implementation("sdpa")
    want = lm(TOKENS[None, :60]).logits[0]
    got = in_passes(natively(lm), TOKENS[:60], [0, 7, 53])
    before = plain(TOKENS[None, :60]).logits[0]
    # rounding is a step: near an edge it may fall either way
    assert (got - want).norm() <= 0.6 * (got - before).norm()
    assert (got - before).norm() <= 0.1 * before.norm()


@pytest.mark.parametrize(
    ("kind", "bad"),
    [*((kind, math.nan) for kind in (INT8, *TYPES)), (INT8, math.inf), ("Q4_0", -math.inf)],
)
def test_what_is_no_number_stays_none_in_8_bits(kind, bad):
    """So that such a pass is refused; rows beside it have their own numbers."""
    lm = random_lm("blocks of 256", HALF)
    in_blocks(lm, [kind]) if kind in TYPES else round_linears(lm)
    decoder = natively(lm)
    _, want = forward(decoder, decoder.engine.new_cache(3), torch.tensor([5, 9, 7]), chain(3))
    lm.model.embed_tokens.weight[7, 40], good = bad, lm.model.embed_tokens.weight[7, 40].item()
    _, got = forward(decoder, decoder.engine.new_cache(3), torch.tensor([5, 9, 7]), chain(3))
    assert got[2].isnan().all() and torch.equal(got[:2], want[:2])
    lm.model.embed_tokens.weight[7, 40] = good
    lm.model.layers[1].mlp.down_proj.weight[3, 4] = bad
    if kind == INT8:
        with pytest.raises(InputError, match=r"layers.1.mlp.down_proj.weight holds NaN or inf"):
            natively(lm).generate([5, 9], DecodeConfig(0, 2))


def test_a_file_in_which_some_matrices_are_plain_numbers():
    lm = random_lm("llama")
    in_blocks(lm)
    lm.model.layers[1].mlp.down_proj = as_plain(lm.model.layers[1].mlp.down_proj)
    lm.lm_head = as_plain(lm.lm_head)
    decoder = natively(lm)
    assert decoder.model.dtype_name == "gguf"
    lm.set_attn_implementation("sdpa")
    want = lm(TOKENS[None, :60]).logits[0]
    got = in_passes(decoder, TOKENS[:60], [0, 7, 53])
    assert (got - want).norm() <= 0.05 * want.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_a_model_in_8_bits_are_those_of_its_modules(name):
    lm = random_lm(name)
    plain = random_lm(name)
    round_linears(lm)
    assert_near_modules(lm, plain)


def test_layers_of_which_only_some_are_in_8_bits():
    lm = random_lm("llama")
    layer = lm.model.layers[1].mlp
    layer.up_proj = Int8Linear(layer.up_proj)
    unavailable(lm, "some linear layers are in 8 bits, and others are not")


@pytest.mark.parametrize("factor", [20, 200])
def test_gates_far_below_zero(factor):
    """silu is 0 there, though exp(-gate) is more than a float can be."""
    lm = random_lm("llama")
    for layer in lm.model.layers:
        layer.mlp.gate_proj.weight.mul_(factor)
    lm.set_attn_implementation("sdpa")
    got = in_passes(natively(lm), TOKENS[:40], [0, 40])
    want = lm(TOKENS[None, :40]).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@st.composite
def passes(draw, max_nodes=20):
    """(tree of random parents, SAT groups at some of its nodes)."""
    count = draw(st.integers(1, max_nodes))
    parents = [
        -1,
        *(
            draw(st.integers(max(0, node - draw(st.integers(1, 8))), node - 1))
            for node in range(1, count)
        ),
    ]
    at = draw(st.lists(st.integers(0, count - 1), max_size=3, unique=True))
    return DraftTree(tuple(parents), (0,) * count), tuple(
        (node, draw(st.integers(1, 4))) for node in at
    )


def path_to(tree, node):
    return [node] if node == 0 else [*path_to(tree, tree.parents[node]), node]


class OneByOne:
    """The oracle of bits: a cache of its own that is fed one token a pass, from the first on."""

    def __init__(self, decoder, context):
        self.decoder = decoder
        self.cache = decoder.engine.new_cache(len(context) + 300)
        for token in context:
            self.feed([token])

    def feed(self, tokens, groups=()):
        """Logits after the last of the tokens, and of SATs that stand there; keeps the tokens."""
        for token in tokens[:-1]:
            self.feed([token])
        sats = [VOCAB] * sum(size for _, size in groups)
        logits = forward(
            self.decoder, self.cache, torch.tensor([tokens[-1], *sats]), chain(1), groups
        )[1]
        self.cache.commit((0,))
        return logits

    def peek(self, tokens, groups=()):
        length = self.cache.length
        logits = self.feed(tokens, groups)
        self.cache.length = length
        return logits


def assert_bits(decoder, context, rounds, generator, slots=300):
    """Passes over trees, a path kept after each: every row has the bits of `OneByOne`."""
    cache = decoder.engine.new_cache(len(context) + slots)
    oracle = OneByOne(decoder, context.tolist())
    decoder.engine.prefill(cache, context)
    for tree, groups in rounds:
        tokens = torch.randint(VOCAB, (len(tree),), generator=generator)
        sats = torch.full((sum(size for _, size in groups),), VOCAB)
        logits = forward(decoder, cache, torch.cat([tokens, sats]), tree, groups)[1]
        for node in range(len(tree)):
            assert torch.equal(logits[node], oracle.peek(tokens[path_to(tree, node)].tolist())[0])
        first = len(tree)
        for node, size in groups:
            alone = oracle.peek(tokens[path_to(tree, node)].tolist(), ((0, size),))
            assert torch.equal(logits[first : first + size], alone[1:])
            first += size
        path = path_to(tree, int(torch.randint(len(tree), (), generator=generator)))
        cache.commit(tuple(path))
        oracle.feed(tokens[path].tolist())
    assert cache.length == oracle.cache.length


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(
        ["llama", "biases", "groups of 4", "groups of 5", "head dim 96", "qwen3", "blocks of 256"]
    ),
    kind=st.sampled_from([FLOAT, HALF, INT8, GGUF]),
    targets=st.sampled_from(
        [
            ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            ("v_proj", "down_proj"),
        ]
    ),
    context=st.one_of(st.integers(1, 140), st.sampled_from([15, 16, 63, 64, 65, 127, 128])),
    rounds=st.lists(passes(), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_a_row_has_the_bits_that_it_has_alone(name, kind, targets, context, rounds, seed):
    generator = torch.Generator().manual_seed(seed)
    context = torch.randint(VOCAB, (context,), generator=generator)
    assert_bits(decoder_with(name, kind, targets), context, rounds, generator)


@each_kind
@pytest.mark.parametrize("context", [255, 256, 257])
def test_the_same_bits_across_passes_of_the_prefill(kind, context):
    tree = DraftTree((-1, 0, 0, 2, 1, 4, 3, 2), (0,) * 8)
    assert_bits(
        decoder_with("llama", kind),
        TOKENS[:context],
        [(tree, ((7, 2), (0, 3)))] * 2,
        torch.Generator().manual_seed(1),
    )


@each_kind
def test_the_same_bits_for_any_number_of_rows_and_threads(kind):
    decoder = decoder_with("groups of 5", kind)
    threads = torch.get_num_threads()
    want = in_passes(decoder, TOKENS[:97], [1] * 97)
    for rows in (*range(2, 33), 47, 48, 95, 96):
        sizes = [1, *[rows] * (96 // rows), *([96 % rows] if 96 % rows else [])]
        assert torch.equal(in_passes(decoder, TOKENS[:97], sizes), want)
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(in_passes(decoder, TOKENS[:97], [1, 16, 1, 79]), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", [FLOAT, HALF, INT8, GGUF])
@pytest.mark.parametrize("name", ["llama", "biases", "groups of 5", "qwen3"])
def test_a_prompt_leaves_the_keys_and_values_of_a_pass_with_logits(name, kind):
    """A prompt's pass ends in its last layer, where other passes go on to the logits."""
    decoder = decoder_with(name, kind)
    engine = decoder.engine
    tokens = torch.randint(VOCAB, (150,), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(150)
    causal = Layout(rows <= rows[:, None], rows, torch.zeros_like(rows), rows, 150)
    read, passed = engine.new_cache(256), engine.new_cache(256)
    engine.prefill(read, tokens)
    engine.run([passed], decoder.model.embed(tokens[None])[0], causal)
    passed.commit(tuple(range(150)))
    assert read.length == passed.length == 150
    for got, want in ((read.keys, passed.keys), (read.values, passed.values)):
        assert torch.equal(got, want)
    assert got.count_nonzero() > 0


def test_a_small_context_is_probed_within_its_positions():
    """Every probe pass of a model of 100 positions gives what it gives with 512."""
    small, large = (
        natively(tiny_llama(FLOAT, vocab=VOCAB, max_position_embeddings=n, **SIZES))
        for n in (100, 512)
    )
    plain, read = small.engine.run, small.engine.prefill
    other = large.engine.new_cache(512)

    def both(caches, *inputs, **named):
        other.length = caches[0].length
        found = plain(caches, *inputs, **named)
        wanted = large.engine.run([other], *inputs, **named)
        assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))
        return found

    def read_by_both(cache, tokens):
        read(cache, tokens)
        large.engine.prefill(other, tokens)

    small.engine.run, small.engine.prefill = both, read_by_both
    assert probe_rows(small.engine).stable


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["llama", "biases", "groups of 5", "head dim 96", "qwen3"]),
    targets=st.sampled_from(
        [("q_proj", "gate_proj"), ("o_proj", "k_proj", "up_proj", "down_proj"), ("v_proj",)]
    ),
    one_pass=passes(),
    context=st.integers(1, 90),
)
def test_sat_rows_are_those_of_transformers(name, targets, one_pass, context):
    (tree, groups), decoder = one_pass, decoder_with(name, FLOAT, targets)
    tokens = torch.cat(
        [
            TOKENS[context : context + len(tree)],
            torch.full((sum(size for _, size in groups),), VOCAB),
        ]
    )
    found = []
    plain = without_native(decoder)
    plain.engine.row_policy = RowPolicy(1, 1)  # not probed: equal but for rounding with any padding
    for either in (decoder, plain):
        cache = either.engine.new_cache(context + 200)
        either.engine.prefill(cache, TOKENS[:context])
        found.append(forward(either, cache, tokens, tree, groups))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


LOGITS = dict(
    dtype=st.sampled_from([FLOAT, HALF]),
    rows=st.integers(1, 4),
    size=st.integers(1, 300),
    seed=st.integers(0, 999),
)


@settings(max_examples=40, deadline=None)
@given(**LOGITS, kinds=st.sampled_from([1, 2, 9, 1000]), data=st.data())
def test_top_is_a_sort_with_the_lower_id_first(dtype, rows, size, kinds, seed, data):
    count = data.draw(st.integers(1, min(size, 70)))
    logits = (
        torch.randint(kinds, (rows, size), generator=torch.Generator().manual_seed(seed))
        - kinds / 2
    ).to(dtype) / 7
    logits[:, data.draw(st.integers(0, size - 1))] = float("-inf")
    values, ids = decoder_with("llama", dtype).engine.largest(logits, count)
    for row, got_values, got_ids in zip(
        logits.tolist(), values.tolist(), ids.tolist(), strict=True
    ):
        want = sorted(range(size), key=lambda i, row=row: (-row[i], i))[:count]
        assert got_ids == want
        assert got_values == [row[i] for i in want]


def chosen_by_sorting(row, index, sampling):
    """The token with the most of log p + noise among what the filters leave, all of them in order,
    in float64.
    """
    scaled = (torch.tensor(row) / sampling.temperature).tolist()  # in float32, as transformers does
    order = sorted(range(len(row)), key=lambda i: (-scaled[i], -i))
    if sampling.top_k:
        order = [i for i in order if scaled[i] >= scaled[order[: sampling.top_k][-1]]]
    weights = [math.exp(scaled[i] - scaled[order[0]]) for i in order]
    before = [sum(weights[:place]) for place in range(len(order))]
    kept = [
        i
        for i, passed in zip(order, before, strict=True)
        if sampling.top_p == 1 or passed < sampling.top_p * sum(weights)
    ]
    noise = gumbel_noise(sampling.seed, torch.tensor([index]), torch.arange(len(row)))[0].tolist()
    return max(kept, key=lambda i: scaled[i] + noise[i])


@settings(max_examples=80, deadline=None)
@given(
    **LOGITS,
    spread=st.sampled_from([0.01, 1.0, 6.0, 40.0]),
    sampling=st.builds(
        SamplingConfig,
        st.sampled_from([0.2, 1.0, 2.5]),
        st.sampled_from([0, 1, 7, 400]),
        st.sampled_from([1e-6, 0.5, 0.95, 1.0]),
        st.integers(-(2**63), 2**64 - 1),
    ),
)
def test_choices_are_those_of_sorting_everything(dtype, rows, size, spread, sampling, seed):
    logits = (spread * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))).to(
        dtype
    )
    if size > 1:
        logits[:, seed % size] = float("-inf")  # the SAT
    index = torch.arange(rows) + seed
    got = decoder_with("llama", dtype).engine.draw(logits, index, sampling)
    assert got.tolist() == [
        chosen_by_sorting(row, i, sampling)
        for row, i in zip(logits.tolist(), index.tolist(), strict=True)
    ]
    seeds = torch.tensor([as_seed(sampling.seed + row) for row in range(rows)])
    each = decoder_with("llama", dtype).engine.draw(logits, index, replace(sampling, seed=0), seeds)
    alone = [replace(sampling, seed=seed) for seed in seeds.tolist()]
    assert each.tolist() == [
        chosen_by_sorting(*args)
        for args in zip(logits.tolist(), index.tolist(), alone, strict=True)
    ]


def stably_warped(logits, sampling):
    """What transformers leaves of logits [V], if its sort kept equals in the order of their ids."""
    sort = torch.sort
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch,
            "sort",
            lambda scores, descending: sort(scores, descending=descending, stable=True),
        )
        scores = logits[None].float() / sampling.temperature
        scores = TopKLogitsWarper(sampling.top_k)(None, scores) if sampling.top_k else scores
        return (TopPLogitsWarper(sampling.top_p)(None, scores) if sampling.top_p < 1 else scores)[0]


@each_dtype
@pytest.mark.parametrize("seed", range(8))
def test_what_is_drawn_is_what_transformers_keeps(dtype, seed):
    """Of rows in which many tokens tie, by as many draws as show every token that is left."""
    logits = (torch.randint(2 + seed, (40,), generator=torch.Generator().manual_seed(seed)) / 4).to(
        dtype
    )
    logits[seed] = float("-inf")
    for top_k, top_p in [
        (1, 1.0),
        (5, 1.0),
        (12, 1.0),
        (0, 0.61),
        (5, 0.61),
        (12, 0.37),
        (60, 0.61),
    ]:
        sampling = SamplingConfig(0.7, top_k, top_p, seed)
        kept = set((stably_warped(logits, sampling) > -math.inf).nonzero().flatten().tolist())
        rows = logits.expand(3000, -1)
        assert (
            set(
                decoder_with("llama", dtype)
                .engine.draw(rows, torch.arange(3000), sampling)
                .tolist()
            )
            == kept
        )


@each_dtype
@pytest.mark.parametrize("size", [70, 5000])
def test_choices_in_torch_are_the_same(dtype, size):
    """Both engines filter alike: ties everywhere, float32 rounding included."""
    generator = torch.Generator().manual_seed(size)
    logits = (
        torch.cat([torch.randn(30, size, generator=generator) * spread for spread in (0.1, 3)])
        .bfloat16()
        .to(dtype)
    )
    index = torch.arange(60)
    for seed, (top_k, top_p) in enumerate(
        [(10, 1.0), (600, 1.0), (0, 0.9), (10, 0.9), (60, 0.5), (0, 1.0)]
    ):
        for temperature in (0.3, 1.0):
            sampling = SamplingConfig(temperature, top_k, top_p, seed)
            got = decoder_with("llama", dtype).engine.draw(logits, index, sampling)
            want = choose(logits, index, sampling)[:, 0]
            assert torch.equal(got, want)


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (5, 0.75), (0, 0.3)])
def test_output_scores_are_finite_for_what_can_be_drawn(engine, top_k, top_p):
    """Tokens tie in threes; the first one's score is finite where, over many seeds, it was drawn,
    and nowhere else.
    """
    lm = random_lm("llama", HALF)
    # so flat that all that stay are drawn
    lm.lm_head.weight[1:VOCAB] = lm.lm_head.weight[torch.arange(1, VOCAB) // 3 * 3] / 3
    lm.generation_config.pad_token_id = 0
    model = sdsat.attach(lm, engine=engine)
    drawn = set()
    settings_ = dict(
        do_sample=True, top_k=top_k, top_p=top_p, return_dict_in_generate=True, output_scores=True
    )
    for seed in range(4):
        prompts = torch.tensor([[1, 5, 9]]).repeat(100, 1)
        out = model.generate(
            prompts, max_new_tokens=1, custom_generate=sdsat.generate, k=0, seed=seed, **settings_
        )
        drawn |= set(out.sequences[:, -1].tolist())
    assert (
        set((out.scores[0][0] > -math.inf).nonzero().flatten().tolist()) == drawn and len(drawn) > 1
    )


def strange_rows(dtype):
    rows = torch.randn(6, 150, generator=torch.Generator().manual_seed(0))
    rows[0, 3], rows[1, 140], rows[2] = math.nan, math.inf, math.nan
    rows[3], rows[4], rows[5, ::2] = math.inf, -math.inf, math.nan
    return rows.to(dtype)


@each_dtype
@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(1.0, *f) for f in [(0, 1.0), (7, 1.0), (0, 0.9), (7, 0.9), (400, 0.9)]],
    ids=str,
)
def test_of_logits_that_are_no_numbers_ids_of_the_vocabulary_come(dtype, sampling):
    """engine.py refuses such logits; should some come all the same, nothing is read or written
    elsewhere.
    """
    engine = decoder_with("llama", dtype).engine
    rows = strange_rows(dtype)
    for ids in (engine.draw(rows, torch.arange(6), sampling), engine.largest(rows, 70)[1]):
        assert ids.min() >= 0 and ids.max() < 150
    assert engine.largest(rows, 1)[1][0, 0] == rows[0].float().nan_to_num(-math.inf).argmax()
    assert all(len(set(row)) == 70 for row in engine.largest(rows, 70)[1].tolist())


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_torchs_default_dtype_changes_nothing(default):
    """What C++ writes into has a dtype of its own."""
    decoder = decoder_with("llama", FLOAT)
    how = [DecodeConfig(k, 12, tree=tree) for k, tree in ((0, "chain"), (3, (3, 2, 1)))]
    want = [decoder.generate([1, 5, 9], config).token_ids for config in how]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert [decoder.generate([1, 5, 9], config).token_ids for config in how] == want
        values, _ = decoder.engine.largest(torch.randn(90, VOCAB, dtype=FLOAT), 70)
        assert values.dtype == FLOAT
    finally:
        torch.set_default_dtype(before)


@st.composite
def candidate_trees(draw):
    """Trees of up to four depths in any topological order; the children of a node have the ranks 0,
    1 and 2.
    """
    parents = [-1]
    ranks = [0]
    depths = [0]
    for _ in range(draw(st.integers(1, 14))):
        open_nodes = [
            node for node in range(len(parents)) if depths[node] < 4 and parents.count(node) < 3
        ]
        parent = draw(st.sampled_from(open_nodes))
        ranks.append(parents.count(parent))
        depths.append(depths[parent] + 1)
        parents.append(parent)
    return DraftTree(tuple(parents), tuple(ranks))


DRAFTING = dict(
    head=st.sampled_from([0, 7, 40]),
    sampling=st.sampled_from(
        [
            SamplingConfig(),
            SamplingConfig(0.7, seed=5),
            SamplingConfig(1.0, 6, 0.9, 2),
            SamplingConfig(1.0, 0, 0.75, 7),
        ]
    ),
    shortlist=st.sampled_from([12, 64]),
    seed=st.integers(0, 99),
)


def both_drafted(draft, decoder, depth, shape, sampling, shortlist, seed):
    """What C++ and torch draft with the same SATs."""
    generator = torch.Generator().manual_seed(seed)
    # flat, so that top-p leaves three tokens
    states = (0.3 * torch.randn(depth, 64, generator=generator)).to(decoder.model.dtype)
    logits = decoder.model.lm.get_output_embeddings()(states)
    ids = None
    if seed % 3 == 0:  # a draft vocabulary, and tokens of the text behind it
        ids = torch.cat([torch.arange(30, VOCAB), torch.tensor([5, 2, 0, 8])])
        logits = logits[:, ids]
    # few tokens, so that they come again
    text = torch.randint(0, 9, (seed,), generator=generator)
    text = torch.cat([text, torch.tensor([seed % VOCAB])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "SHORTLIST", shortlist)
        return [
            getattr(each.engine, draft)(Guesses(text, states, logits, 3, sampling, ids), shape)
            for each in (decoder, without_native(decoder))
        ]


@settings(max_examples=40, deadline=None)
@given(tree=candidate_trees(), **DRAFTING)
def test_drafts_are_those_of_the_torch_code(tree, head, sampling, shortlist, seed):
    decoder = decoder_with("llama", FLOAT, ("v_proj",), head)
    given_ = (decoder, max(tree.depths), tree, sampling, shortlist, seed)
    (tokens, likely), (want_tokens, want_likely) = both_drafted("draft", *given_)
    assert tokens.tolist() == want_tokens.tolist()
    torch.testing.assert_close(likely, want_likely, rtol=1e-4, atol=1e-4)
    assert tokens[0] == seed % VOCAB and likely[0] == 1


@pytest.mark.parametrize("kind", [HALF, INT8], ids=str)
def test_drafts_in_bfloat16_are_those_of_the_torch_code_but_where_rounding_decides(kind):
    """Embeddings as small as Qwen's: their squares are below bfloat16's epsilon."""
    model = decoder_with.__wrapped__("llama", kind, ("v_proj",), 40).model
    model.head.outer.mul_(30)  # it decides
    model.lm.get_input_embeddings().weight.normal_(0, 0.02)
    decoder = natively(model.lm, model.adapter)
    same = [
        one == other
        for seed in range(40)
        for one, other in zip(
            *(
                found[0].tolist()[1:]
                for found in both_drafted(
                    "draft", decoder, 4, make_tree("chain", 4), SamplingConfig(), 64, seed
                )
            ),
            strict=True,
        )
    ]
    assert sum(same) > 0.9 * len(same)


@settings(max_examples=60, deadline=None)
@given(depth=st.integers(1, 4), nodes=st.integers(1, 90), **DRAFTING)
def test_grown_trees_are_those_of_the_torch_code(depth, nodes, head, sampling, shortlist, seed):
    decoder = decoder_with("llama", FLOAT, ("v_proj",), head)
    found, want = both_drafted("grow", decoder, depth, nodes, sampling, shortlist, seed)
    count = int((want[3] > 0).sum())
    assert count == (found[3] > 0).sum() and (found[3, count:] == 0).all()
    assert found[:3, :count].tolist() == want[:3, :count].tolist()
    torch.testing.assert_close(found[3, :count], want[3, :count], rtol=1e-4, atol=1e-4)
    assert found[:, 0].tolist() == [-1, 0, seed % VOCAB, 1]


@pytest.mark.parametrize("native", [True, False], ids=["native", "transformers"])
@pytest.mark.parametrize("width", [65, 74])
@pytest.mark.parametrize("head", [0, 40])
def test_trees_wider_than_the_shortlist(native, width, head):
    decoder = decoder_with("llama", FLOAT, ("v_proj",), head)
    decoder = decoder if native else without_native(decoder)
    states = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    logits = decoder.model.lm.get_output_embeddings()(states)
    guesses = Guesses(torch.tensor([3]), states, logits, 0, SamplingConfig())
    tokens, _ = decoder.engine.draft(guesses, make_tree((width,), 1))
    assert len(set(tokens[1:].tolist())) == width
    if not head:
        assert sorted(tokens[1:].tolist()) == sorted(logits[0].topk(width).indices.tolist())
    for sampling in (SamplingConfig(), SamplingConfig(1.0, 10, 0.9, 3)):
        want = decoder.generate([1, 5, 9], DecodeConfig(0, 12, sampling=sampling)).token_ids
        for strategy in ("two-step", *(["rounded"] if native else [])):
            config = DecodeConfig(1, 12, (width,), sampling, strategy=strategy)
            assert decoder.generate([1, 5, 9], config).token_ids == want


# ---- what it is given ----


ROWS = torch.arange(3)
LAYOUT = Layout(
    torch.eye(3, dtype=torch.bool),
    torch.zeros(3, dtype=torch.long),
    torch.zeros(3, dtype=torch.long),
    ROWS,
    3,
)
WITHIN = torch.ones(3, 3, dtype=torch.bool)
PASSES = {
    (
        "embeddings: torch.bfloat16 [3, 64] on cpu; the native engine was made for "
        "torch.float32 [3, 64] "
        "on cpu"
    ): {"embeddings": torch.zeros(3, 64, dtype=HALF)},
    "embeddings: torch.float32 [3, 64] on meta": {"embeddings": torch.zeros(3, 64, device="meta")},
    "embeddings: torch.float32 [3, 32] on cpu": {"embeddings": torch.zeros(3, 32)},
    "within: torch.float32 [3, 3]": {"within": torch.eye(3)},
    "within: torch.bool [2, 2]": {"within": torch.eye(2, dtype=torch.bool)},
    "layout: torch.float32 [3]": {"offsets": torch.zeros(3)},
    "layout: torch.int64 [4]": {"sequences": torch.zeros(4, dtype=torch.long)},
    "sequences: a row of a sequence that has no cache": {"sequences": torch.tensor([0, 0, 1])},
    "slots: a row beyond the cache's end": {"places": torch.tensor([0, 1, 10**6])},
    "slots: a row beyond the cache": {"places": torch.tensor([0, 1, -10])},
    "positions: a row beyond those that the model was loaded for": {
        "offsets": torch.tensor([0, 0, 10**6])
    },
    "positions: a row beyond": {"offsets": torch.tensor([0, 0, -10])},
    "within: every row must see itself": {"within": torch.zeros(3, 3, dtype=torch.bool)},
    "slots that ascend": {"within": WITHIN, "places": torch.tensor([2, 1, 0])},
    "rows: expected at least one, of which SATs": {"sats": 4},
}


@pytest.mark.parametrize("message", PASSES)
def test_passes_that_it_refuses(message):
    given_ = dict(PASSES[message])
    engine = decoder_with("llama", FLOAT).engine
    x = given_.pop("embeddings", torch.zeros(3, 64))
    sats = given_.pop("sats", 0)
    with one_line_error(message):
        engine.run([engine.new_cache(64)], x, replace(LAYOUT, **given_), sats)


def test_caches_of_another_model_are_refused():
    engine = decoder_with("llama", FLOAT).engine
    other = decoder_with("llama", HALF).engine
    with one_line_error("cache: torch.bfloat16"):
        engine.run([other.new_cache(64)], torch.zeros(3, 64), LAYOUT)
    other = decoder_with("groups of 4", FLOAT).engine
    with one_line_error("cache: torch.float32 [2, 1, 64, 32]"):
        engine.run([other.new_cache(64)], torch.zeros(3, 64), LAYOUT)


def test_kept_rows_that_no_pass_had_are_refused():
    engine = decoder_with("llama", FLOAT).engine
    for rows in ((0, 70), (5, 3), (-1,), (1, 1)):
        cache = engine.new_cache(64)
        with one_line_error("rows: expected those of the last pass"):
            cache.commit(rows)
        assert cache.length == 0


def test_logits_that_are_not_the_models_are_refused():
    decoder = decoder_with("llama", FLOAT)
    index = torch.arange(3)
    sampling = SamplingConfig(1.0, 5)
    engine = decoder.engine
    logits = torch.zeros(3, VOCAB)
    for strange in (logits.bfloat16(), logits.double(), logits.to("meta"), logits[0], logits[None]):
        with one_line_error(
            "logits: ", "the native engine was made for torch.float32 [any, any] on cpu"
        ):
            engine.largest(strange, 1)
        with one_line_error("logits: "):
            engine.draw(strange, index, sampling)
    for count in (0, VOCAB + 1):
        with one_line_error("count: expected 1 to"):
            engine.largest(logits, count)
    with one_line_error("index: torch.int64 [2] on cpu"):
        engine.draw(logits, index[:2], sampling)
    with one_line_error("seeds: torch.int32 [3] on cpu"):
        engine.draw(logits, index, sampling, index.int())
    with one_line_error("sampling: a setting out of range"):
        engine.draw(logits, index, SamplingConfig())


def test_logits_may_lie_anyhow():
    engine = decoder_with("llama", FLOAT).engine
    index = torch.arange(9)
    sampling = SamplingConfig(1.0, 5)
    logits = torch.randn(VOCAB, 18).T[::2]
    assert torch.equal(engine.largest(logits, 7)[1], engine.largest(logits.contiguous(), 7)[1])
    assert torch.equal(
        engine.draw(logits, index, sampling), engine.draw(logits.contiguous(), index, sampling)
    )
    embeddings = torch.randn(64, 3).T
    assert torch.equal(
        *(
            engine.run([engine.new_cache(64)], x, LAYOUT)[1]
            for x in (embeddings, embeddings.contiguous())
        )
    )


CHAIN = make_tree("chain", 2)
DRAFTS = {
    "states: torch.bfloat16 [2, 64]": {"states": torch.zeros(2, 64, dtype=HALF)},
    "logits: torch.float32 [2, 80]": {"logits": torch.zeros(2, 80)},
    "logits: torch.float32 [1, 75]": {"logits": torch.zeros(1, VOCAB)},
    "text: torch.int32 [1]": {"text": torch.zeros(1, dtype=torch.int32)},
    "text: expected at least": {"text": torch.zeros(0, dtype=torch.long)},
    "text: its last token is not in the vocabulary": {"text": torch.tensor([1, VOCAB])},
    "text: its last token is": {"text": torch.tensor([1, -1])},
    "shortlist: expected 1 to": {"shortlist": VOCAB + 1},
    "logits: torch.float32 [2, 75]": {"ids": torch.arange(20)},
    "ids: torch.int32 [75]": {"ids": torch.zeros(VOCAB, dtype=torch.int32)},
    "ids: a token that is not in the vocabulary": {"ids": torch.arange(VOCAB) + 1},
    "ids: a token that": {"ids": torch.arange(VOCAB) - 1},
    "tree: deeper than there are SATs": {"tree": make_tree("chain", 3)},
    "tree: wider than the shortlist": {"tree": make_tree((13,), 1)},
    "tree: expected parents before children": {"tree": DraftTree((-1, 5), (0, 0))},
}


@pytest.mark.parametrize("message", DRAFTS)
def test_drafts_that_it_refuses(message, monkeypatch):
    monkeypatch.setattr(
        DraftTree,
        "depths",
        property(lambda tree: tuple(range(len(tree)))) if "before" in message else DraftTree.depths,
    )
    given_ = dict(
        text=torch.tensor([3]),
        states=torch.zeros(2, 64),
        logits=torch.zeros(2, VOCAB),
        shortlist=12,
        index=0,
        tree=CHAIN,
        ids=None,
    )
    engine = decoder_with("llama", FLOAT, ("v_proj",), 40).engine
    given_ = {**given_, **DRAFTS[message]}
    tree, shortlist = given_.pop("tree"), given_.pop("shortlist")
    guesses = Guesses(**given_, sampling=SamplingConfig())
    with one_line_error(message):
        engine.draft(guesses, tree, shortlist)
    if "tree" not in message and "shortlist" not in message:
        with one_line_error(message):
            engine.grow(guesses, 5)


# ---- where it can't be had ----


@pytest.fixture
def fresh_library(monkeypatch, tmp_path):
    """An empty cache folder, and no library from before."""
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path / "cache"))
    bindings.library.cache_clear()
    yield monkeypatch
    bindings.library.cache_clear()


def test_a_change_in_any_source_is_another_library(tmp_path, monkeypatch):
    folder = bindings.SOURCE.parent
    included: set[str] = set()
    waiting = [bindings.SOURCE.name]
    while waiting:
        name = waiting.pop()
        if name not in included:
            included.add(name)
            shutil.copy(folder / name, tmp_path)
            waiting += re.findall('#include "(.+)"', (folder / name).read_text())
    assert len(included) > 1
    first = compiler.source_hash()
    monkeypatch.setattr(compiler, "FOLDER", tmp_path)
    assert compiler.source_hash() == first  # wherever it is installed; and there are no others
    for name in included:
        before = compiler.source_hash()
        with (tmp_path / name).open("a") as file:
            file.write("// another comment\n")
        assert compiler.source_hash() != before


def unavailable(lm, *parts):
    with pytest.raises(Unavailable) as caught:
        NativeEngine(SatModel(lm, None, "tiny"))
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)


def test_without_a_compiler(fresh_library):
    fresh_library.delenv("CXX", raising=False)
    fresh_library.setattr(compiler.shutil, "which", lambda name: None)
    unavailable(random_lm("llama"), "no C++ compiler was found")


@pytest.mark.parametrize(
    ("compiler", "reason"), [("/bin/false", "/bin/false failed"), ("/no/such/c++", "/no/such/c++")]
)
def test_with_a_compiler_that_fails(fresh_library, compiler, reason):
    fresh_library.setenv("CXX", compiler)
    unavailable(random_lm("llama"), reason)


def test_with_a_compiler_that_says_why(fresh_library, tmp_path):
    (tmp_path / "c++").write_text("#!/bin/sh\necho 'no such flag' >&2\necho more >&2\nexit 1\n")
    (tmp_path / "c++").chmod(0o755)
    fresh_library.setenv("CXX", str(tmp_path / "c++"))
    unavailable(random_lm("llama"), "c++ failed (no such flag)")
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_cache_folder_that_cannot_be_written(fresh_library, tmp_path):
    """What can't be kept is built all the same: here by a compiler that fails."""
    (tmp_path / "cache").write_text("a file")
    fresh_library.setenv("CXX", "/bin/false")
    with pytest.warns(UserWarning, match="it cannot be kept"):
        unavailable(random_lm("llama"), "/bin/false failed")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 48}, "hidden=48: not a multiple of 32"),
        ({"head_dim": 16}, "dim=16: not a multiple of 32"),
        ({"intermediate_size": 100}, "inner=100: not a multiple of 32"),
        (
            {"hidden_size": 48, "intermediate_size": 100},
            "hidden=48, inner=100: not a multiple of 32",
        ),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"dtype": torch.float16}, "no torch.float16 on cpu"),
        ({"dtype": torch.float64}, "no torch.float64 on cpu"),
    ],
    ids=str,
)
def test_models_it_was_not_written_for(changes, reason):
    unavailable(tiny_llama(**{"dtype": FLOAT, "vocab": VOCAB, **SIZES, **changes}), reason)


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        (
            "layers.1.self_attn.k_proj",
            lambda weight: weight[:32],
            "model/layers/1/self_attn/k_proj is torch.float32 [32, 64]",
        ),
        (
            "layers.0.mlp.down_proj",
            lambda weight: weight[:, :64],
            "model/layers/0/mlp/down_proj is torch.float32 [64, 64]",
        ),
        (
            "layers.0.input_layernorm",
            lambda weight: weight[:32],
            "model/layers/0/input_layernorm is torch.float32 [32] on cpu",
        ),
        (
            "norm",
            lambda weight: weight[:32],
            "norm is torch.float32 [32] on cpu, and not torch.float32 [64] on cpu",
        ),
        ("embed_tokens", lambda weight: weight[:60], "embed_tokens is torch.float32 [60, 64]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_of_other_sizes_than_the_config_says(part, change, reason):
    lm = random_lm("llama")
    module = lm.model.get_submodule(part)
    module.weight = torch.nn.Parameter(change(module.weight), requires_grad=False)
    unavailable(lm, reason)


def test_an_adapter_of_another_type():
    adapter = copy.deepcopy(decoder_with("llama", FLOAT).model.adapter)
    with pytest.raises(
        Unavailable, match=r"adapter's down of model/layers/0/self_attn/q_proj is torch\.bfloat16"
    ):
        NativeEngine(SatModel(random_lm("llama"), None, "tiny", adapter=adapter.bfloat16()))


def test_the_compiler_may_be_a_command(fresh_library, tmp_path):
    (tmp_path / "a compiler").write_text('echo "$2 has no such flag" >&2\nexit 1\n')
    fresh_library.setenv("CXX", f"sh '{tmp_path}/a compiler' -m64 g++")
    unavailable(random_lm("llama"), "a compiler -m64 g++ failed (g++ has no such flag)")
    fresh_library.setenv("CXX", "'g++")
    unavailable(random_lm("llama"), "CXX='g++: not a command (No closing quotation)")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="huge pages are Linux's"
)
def test_weights_ask_for_huge_pages():
    """Memory that is shared, mmap's default, gets none, and nobody says so."""
    decoder = natively(random_lm("llama"))
    address = decoder.engine.exact.struct.layer[0].gate.weight.weight
    for lines in re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text()):
        first, last = (int(end, 16) for end in lines.split()[0].split("-"))
        if first <= address < last:
            (flags,) = re.findall(r"VmFlags: (.*)", lines)
            assert "hg" in flags.split() and "sh" not in flags.split()
            return
    raise AssertionError("the weights lie nowhere")


def test_without_memory_for_weights(monkeypatch):
    def none_left(*args, **options):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(weights.mmap, "mmap", none_left)
    with pytest.raises(MemoryError, match="bytes of weights: Cannot allocate memory"):
        natively(random_lm("llama"))


def without_memory():
    """Print what a pass, and a choice, say where there is no room for their own memory."""
    libc = ctypes.CDLL(None)
    for option, value in ((-3, 10**6), (-8, 1)):  # M_MMAP_THRESHOLD, M_ARENA_MAX:
        assert libc.mallopt(option, value)  # what was freed is given back, not kept for the next
    torch.set_num_threads(2)
    engine = decoder_with("groups of 4", HALF).engine
    cache = engine.new_cache(8_000_000)
    small = engine.new_cache(64)
    # more than what the process has been given and doesn't use
    logits = torch.zeros(2, 40_000_000, dtype=HALF)
    embeddings = torch.zeros(3, 64, dtype=HALF)
    logits[:, 7] = 100

    def a_pass():
        return engine.run([cache], embeddings, LAYOUT)

    def a_choice():
        return engine.draw(logits, torch.zeros(2, dtype=torch.long), SamplingConfig(1.0, 0, 0.5))

    def a_small_pass():
        return engine.run([small], embeddings, LAYOUT)[1]

    want = a_small_pass()
    # MiB: for no thread, for one of two, for none
    for act, room in ((a_pass, 48), (a_pass, 144), (a_choice, 8)):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (room << 20), resource.RLIM_INFINITY))
        try:
            act()
        except MemoryError as error:
            print(act.__name__, room, error)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert torch.equal(a_small_pass(), want)
        act()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_where_memory_ends(own_process):
    """A pass, and a choice, for whose own memory there is no room, in some thread: an error, and
    the engine works afterwards.
    """
    code, out, errors = own_process(without_memory).end()
    assert code == 0, errors
    acts = ("a_pass 48", "a_pass 144", "a_choice 8")
    reason = (
        "the native engine has no memory for this pass; expected fewer sequences or a "
        "shorter "
        "context"
    )
    assert out.splitlines() == [f"{act} {reason}" for act in acts]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of a size that the native engine takes, and of one that it doesn't."""
    out = {}
    for name, sizes in (("whole", SIZES), ("odd", {**SIZES, "hidden_size": 80})):
        out[name] = tmp_path_factory.mktemp(name)
        tiny_llama(FLOAT, vocab=VOCAB, **sizes).save_pretrained(out[name])
        tiny_tokenizer([f"<{i}>" for i in range(VOCAB)]).save_pretrained(out[name])
    return out


def test_load_takes_the_engine_asked_for(folders):
    want = None
    for engine, name in (
        ("native", "native"),
        ("auto", "native"),
        ("transformers", "transformers"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decoder = Decoder.load(str(folders["whole"]), "float32", "cpu", engine=engine)
        assert decoder.engine.name == name
        out = decoder.generate([1, 5, 9], DecodeConfig(0, 20)).token_ids
        want = want or out
        assert out == want
    # as asked: no warning
    assert Decoder.load(str(folders["whole"]), "float16", "cpu").engine.name == "transformers"


def test_load_says_why_there_is_no_native_engine(folders, fresh_library, capsys):
    odd = str(folders["odd"])
    reason = "hidden=80: not a multiple of 32"
    with one_line_error(f"engine=native: not to be had for {odd}", reason, "expected auto"):
        Decoder.load(odd, "float32", "cpu", engine="native")
    with pytest.warns(UserWarning, match=reason):
        decoder = Decoder.load(odd, "float32", "cpu", engine="auto")
    assert len(decoder.generate([1, 5, 9], DecodeConfig(0, 20)).token_ids) == 20
    fresh_library.setenv("CXX", "/bin/false")
    with pytest.warns(UserWarning, match="/bin/false failed"):
        decoder = Decoder.load(str(folders["whole"]), "bfloat16", "cpu")
        assert decoder.engine.name == "transformers"
    for engine in ("nonsense", "", "Native"):
        with one_line_error(f"engine={engine}: expected one of auto, native, transformers"):
            Decoder.load(odd, "float32", "cpu", engine=engine)
    fresh_library.setattr(
        sys,
        "argv",
        ["sdsat", "generate", "x", "--model", odd, "--device", "cpu", "--engine", "native"],
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    errors = capsys.readouterr().err
    assert (
        exit_.value.code == 2
        and errors.startswith("error: engine=native")
        and errors.count("\n") == 1
    )


def sanitizer(tmp_path):
    """The library that a program must preload for the address sanitizer; None where the compiler
    has no sanitizers.
    """
    try:
        command = compiler.compiler()
        flags = [
            "-fsanitize=address,undefined",
            "-shared",
            "-fPIC",
            "-x",
            "c++",
            os.devnull,
            "-o",
            str(tmp_path / "empty.so"),
        ]
        if subprocess.run([*command, *flags], capture_output=True).returncode:
            return None
        found = subprocess.run(
            [*command, "-print-file-name=libasan.so"], capture_output=True, text=True
        ).stdout.strip()
    except (Unavailable, OSError):
        return None
    return found if Path(found).is_file() else None


def test_nothing_is_read_or_written_elsewhere(tmp_path):
    """The library under sanitizers: random models, trees, budgets, batches, dtypes and numbers of
    threads (fuzz_native.py).
    """
    preload = sanitizer(tmp_path)
    if preload is None:
        pytest.skip("the compiler has no sanitizers")
    # Python keeps what it has; and less to wait for
    options = "detect_leaks=0:malloc_context_size=0:quarantine_size_mb=8"
    program = Path(__file__).with_name("fuzz_native.py")
    done = subprocess.run(
        [sys.executable, str(program), "15"],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": options},
    )
    assert done.returncode == 0, done.stderr[-4000:]


if platform.machine() in ("x86_64", "AMD64"):

    @pytest.mark.parametrize("processor", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
    def test_other_processors(processor, monkeypatch, tmp_path):
        """As built without AVX2, without AVX-512, and without the latter's instructions for narrow
        numbers: near what this processor's own instructions say, every row the same in any pass,
        and linear layers in few bits as near to float64 as here.
        """
        if processor == "x86-64-v4" and "avx512vl" not in Path("/proc/cpuinfo").read_text():
            pytest.skip("this processor has no AVX-512")
        target = tmp_path / "native.so"
        flags = ["-Og", f"-march={processor}", *compiler.FLAGS[2:], "-Wno-psabi"]
        subprocess.run(["c++", *flags, str(bindings.SOURCE), "-o", str(target)], check=True)
        built = ctypes.CDLL(str(target))

        @contextmanager
        def other_library():
            bindings.library.cache_clear()
            try:
                with monkeypatch.context() as patch:
                    patch.setattr(bindings, "load_library", lambda name, build: built)
                    yield
            finally:
                bindings.library.cache_clear()

        def drafts(decoder):
            cache = decoder.engine.new_cache(128)
            decoder.engine.prefill(cache, TOKENS[:40])
            return forward(
                decoder,
                cache,
                torch.cat([TOKENS[:9], torch.full((3,), VOCAB)]),
                chain(9),
                ((8, 3),),
                rounded=True,
            )[1]

        tree = DraftTree((-1, 0, 0, 2, 1, 4, 3, 2), (0,) * 8)
        for kind, close in ((FLOAT, 1e-5), (HALF, 0.05), (INT8, 0.1), (GGUF, 0.1)):
            decoder = decoder_with("blocks of 256" if kind == GGUF else "groups of 5", kind)
            want = in_passes(decoder, TOKENS[:120], [40, 7, 73])
            guessed = drafts(decoder)
            with other_library():
                decoder = natively(decoder.model.lm, decoder.model.adapter)
                got = in_passes(decoder, TOKENS[:120], [40, 7, 73])
                for ours, theirs, most in [(got, want, close), (drafts(decoder), guessed, 0.05)]:
                    error = (ours.float() - theirs.float()).abs().max()
                    assert error <= most * theirs.float().abs().max()
                rounds = [(tree, ((7, 2), (0, 3)))] * 2
                assert_bits(decoder, TOKENS[:67], rounds, torch.Generator().manual_seed(1))
        with other_library():
            for name in CONFIGS:
                test_a_linear_layer_in_5_bits(name)
                test_a_linear_layer_in_8_bits(name)
            for kind in TYPES:
                test_a_linear_layer_in_a_files_own_bits(kind)
