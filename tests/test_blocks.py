"""Weights in a file's own bits: the numbers that llama.cpp's package reads, through all layers."""

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from common import one_line_error
from gguf_files import KINDS, random_blocks, write_gguf
from test_gguf import random_model

from sdsat.config import DecodeConfig
from sdsat.decoding.decoder import Decoder
from sdsat.engines.native import bindings
from sdsat.engines.native.engine import NativeEngine
from sdsat.files import sha256_of
from sdsat.models import embedded, loading
from sdsat.models.blocks import TYPES, BlockLinear, HeldWeight


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    bindings.library()  # is compiled once, in the folder of all tests
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_are_those_of_llama_cpps_package(kind):
    held = random_blocks(kind, 37, 768)
    want = gguf.dequantize(held.numpy(), KINDS[kind])
    got = HeldWeight(held, kind).read()
    assert np.array_equal(got.numbers().numpy(), want) and len(np.unique(want)) > 100
    assert (gguf.GGML_QUANT_SIZES[KINDS[kind]]) == (TYPES[kind].inputs, TYPES[kind].bytes)
    assert (got.least is not None) == TYPES[kind].with_least
    for numbers in (got.scale, got.least):
        if TYPES[kind].half and numbers is not None:
            assert torch.equal(numbers.half().float(), numbers)
    order = torch.randperm(37)
    some = HeldWeight(held, kind, order).of(torch.tensor([5, 0])).read().numbers()
    assert np.array_equal(some.numpy(), want[order[[5, 0]]])


def loaded_of(file, dtype="gguf"):
    return loading.load(str(file), dtype, "cpu")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True], ids=["own output layer", "tied"])
def test_every_layer_gets_its_own_weight(family, tied, tmp_path):
    """Of Q8_0: bfloat16's numbers are near, also where llama.cpp has heads in another order."""
    lm = random_model(family, tie_word_embeddings=tied)
    model = loaded_of(write_gguf(lm, tmp_path / "tiny.gguf", KINDS.Q8_0))
    assert model.dtype_name == "gguf" and model.dtype == torch.bfloat16
    linears = {
        name: layer
        for name, layer in model.lm.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    assert len(linears) == 15 and all(isinstance(each, BlockLinear) for each in linears.values())
    for name, layer in linears.items():
        numbers = layer.blocks.read().numbers()
        assert torch.equal(numbers.bfloat16(), layer.weight), name
        assert (numbers - lm.get_submodule(name).weight).abs().max() < 0.01, name


def test_outputs_are_those_of_plain_decoding(tmp_path):
    lm = random_model("qwen2", hidden_size=128)
    for layer in lm.model.layers:  # with the last token alone to go by, it soon repeats itself
        layer.self_attn.o_proj.weight.zero_()
    file = write_gguf(lm, tmp_path / "tiny.gguf", KINDS.Q5_0)
    decoder = Decoder(loaded_of(file))
    assert isinstance(decoder.engine, NativeEngine)
    prompt = decoder.model.tokenizer("def f(x): return x\n\ndef f(")["input_ids"]
    plain = decoder.generate(prompt, DecodeConfig(k=0, max_new_tokens=100))
    how = DecodeConfig(strategy="lookup", k=None, max_new_tokens=100)
    drafted = decoder.generate(prompt, how)
    assert drafted.num_passes < 90
    assert drafted.token_ids == plain.token_ids
    modules = Decoder(loaded_of(file), engine="transformers")
    other = modules.generate(prompt, DecodeConfig(k=0, max_new_tokens=100))
    assert other.token_ids[:3] == plain.token_ids[:3]


def test_types_that_are_not_computed_with_are_named(tmp_path):
    lm = random_model(hidden_size=256, num_hidden_layers=1)
    shape = lm.model.layers[0].mlp.up_proj.weight.shape
    blocks = np.zeros(gguf.quant_shape_to_byte_shape(shape, KINDS.Q2_K), np.uint8)
    raw = {"blk.0.ffn_up.weight": (blocks, KINDS.Q2_K)}
    file = write_gguf(lm, tmp_path / "tiny.gguf", raw=raw)
    with one_line_error("holds blk.0.ffn_up.weight in Q2_K; expected Q4_0, Q4_1"):
        loaded_of(file)


def test_an_embedding_may_be_of_any_type_that_can_be_read(tmp_path):
    """Linear layers alone are computed with in a file's own bits."""
    lm = random_model("qwen2", hidden_size=256, tie_word_embeddings=False)
    shape = lm.model.embed_tokens.weight.shape
    blocks = np.zeros(gguf.quant_shape_to_byte_shape(shape, KINDS.Q2_K), np.uint8)
    raw = {"token_embd.weight": (blocks, KINDS.Q2_K)}
    model = loaded_of(write_gguf(lm, tmp_path / "tiny.gguf", KINDS.Q8_0, raw))
    assert model.dtype_name == "gguf" and not model.lm.model.embed_tokens.weight.any()
    file = write_gguf(lm, tmp_path / "plain.gguf", KINDS.F16, raw)
    with one_line_error("its linear layers are plain numbers; expected auto"):
        loaded_of(file)


def tiny_file(tmp_path, tied=False):
    lm = random_model("qwen2", hidden_size=128, tie_word_embeddings=tied)
    return write_gguf(lm, tmp_path / "tiny.gguf", KINDS.Q8_0)


def scale_a_weight(lm):
    lm.model.layers[0].mlp.down_proj.weight.mul_(-3)


def load_another_state(lm):
    lm.load_state_dict({name: tensor * 0.5 for name, tensor in lm.state_dict().items()})


@pytest.mark.parametrize(
    "change", [scale_a_weight, load_another_state, lambda lm: lm.resize_token_embeddings(300)]
)
@pytest.mark.parametrize("tied", [False, True], ids=["own output layer", "tied"])
@torch.no_grad()
def test_a_layer_whose_weight_changes_computes_with_the_new_one(tmp_path, tied, change):
    decoder = Decoder(loaded_of(tiny_file(tmp_path, tied)))
    lm = decoder.model.lm
    before = lm(torch.tensor([[5, 9]])).logits
    change(lm)
    decoder.renew()
    after = lm(torch.tensor([[5, 9]])).logits
    for layer in lm.modules():
        if isinstance(layer, torch.nn.Linear):
            near = layer.blocks.read().numbers() if isinstance(layer, BlockLinear) else layer.weight
            assert torch.allclose(near.float(), layer.weight.float(), rtol=2**-8)
    rows = len(lm.model.embed_tokens.weight)
    assert after.shape[-1] == rows and not torch.equal(before, after[..., : before.shape[-1]])
    if change is scale_a_weight:
        assert decoder.model.dtype_name == "gguf"
    assert decoder.engine.name == "native"
    assert len(decoder.generate([5, 9], DecodeConfig(0, 4)).token_ids) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_type_of_all_else_leaves_the_blocks(tmp_path, dtype):
    decoder = Decoder(loaded_of(tiny_file(tmp_path)))
    decoder.model.lm.to(dtype)
    decoder.renew()
    assert decoder.model.dtype_name == "gguf"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_the_bits_of_its_layers_alone(tmp_path, again):
    file = tiny_file(tmp_path)
    model = loaded_of(file)
    other = again(model)
    assert other.dtype_name == "gguf"
    most = sum(p.nbytes for p in model.lm.parameters()) + file.stat().st_size
    rest = len(pickle.dumps(model.tokenizer)) + 100_000
    assert len(pickle.dumps(other)) < most + rest and len(pickle.dumps(model)) < most + rest
    want = Decoder(model).generate([5, 9], DecodeConfig(0, 8)).token_ids
    assert Decoder(other).generate([5, 9], DecodeConfig(0, 8)).token_ids == want


def test_what_has_no_bits_of_its_own_is_said_so(tmp_path):
    lm = random_model("qwen2")
    file = write_gguf(lm, tmp_path / "tiny.gguf", KINDS.BF16)
    with one_line_error("its linear layers are plain numbers; expected auto"):
        loaded_of(file)
    lm.save_pretrained(tmp_path / "folder")
    with one_line_error("is no GGUF file; expected such a file, an embedded model, or dtype=int8"):
        loaded_of(tmp_path / "folder")


def test_an_embedded_models_file_is_fetched_once_and_kept(tmp_path, cache):
    file = tmp_path / "fetched.gguf"
    file.write_bytes(b"GGUF")
    source = SimpleNamespace(get=lambda folder, bar: file)
    model = replace(embedded.SMOLLM2, sha256=sha256_of(file), sources=(source,))
    own = embedded.own_file(model)
    assert own == cache / model.file and own.read_bytes() == b"GGUF"
    model = replace(model, sources=())
    assert embedded.own_file(model) == own
    own.write_bytes(b"GGUF, another")
    with one_line_error("has the wrong sha256"):
        embedded.own_file(model)
