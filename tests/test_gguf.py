"""GGUF files as models: the same numbers as the model that they were made of, and one line for a
file that can't be read.
"""

import copy
import json
import re
import resource
import shutil
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from common import one_line_error
from gguf_files import EOS, KINDS, TOKENS, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sdsat.config import DecodeConfig, InputError
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.sweep import BenchConfig
from sdsat.models import gguf as reading
from sdsat.models import identity, loading
from sdsat.models.adapter import AdapterConfig
from sdsat.models.gguf_header import GgufFile

SIZES = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


GGUF = b"GGUF" + (3).to_bytes(4, "little")


def number(value):
    return value.to_bytes(8, "little")


def kind(value):
    return value.to_bytes(4, "little")


def text(value):
    return number(len(value)) + value.encode()


def random_model(family="llama", **settings):
    torch.manual_seed(3)
    kinds = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config, model = kinds[family]
    settings = SIZES | ({"head_dim": 32} if family == "qwen3" else {}) | settings
    lm = model(config(**settings)).eval().requires_grad_(False)
    for name, parameter in lm.named_parameters():  # biases and norms that say something
        if parameter.dim() == 1:
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (1 if "norm" in name else 0))
        else:
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return lm


def logits_of(lm):
    torch.manual_seed(0)
    with torch.inference_mode():
        return lm(torch.randint(0, lm.config.vocab_size, (2, 40))).logits


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plain(file, dtype="float32"):
    """What transformers makes of the directory that a file is converted to."""
    loaded, tokenizer, _ = loading.load_base(str(file), dtype, {"": torch.device("cpu")})
    loaded.set_attn_implementation("sdpa")
    return loaded, tokenizer


@pytest.mark.parametrize("tied", [False, True], ids=["own output layer", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_file_in_float32_is_the_model_that_it_was_made_of(family, tied, tmp_path, cache):
    lm = random_model(family, tie_word_embeddings=tied)
    file = write_gguf(lm, tmp_path / "tiny.gguf")
    converted, tokenizer = plain(file, "auto")
    assert type(converted) is type(lm) and converted.dtype == torch.float32
    assert torch.equal(logits_of(converted), logits_of(lm))
    assert converted.generation_config.eos_token_id == EOS
    assert (
        tokenizer.decode(tokenizer("def f():\n  return 1")["input_ids"]) == "def f():\n  return 1"
    )
    assert TOKENS.index("def") in tokenizer("def f():")["input_ids"]
    assert tokenizer("a<|im_end|>")["input_ids"] == [TOKENS.index("a"), EOS]
    assert tokenizer.chat_template


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_weights_are_what_llama_cpp_makes_of_them(kind, tmp_path, cache):
    lm = random_model(tie_word_embeddings=False)
    kind = KINDS[kind]
    file = write_gguf(lm, tmp_path / "tiny.gguf", kind)
    converted, _ = plain(file, "auto")
    # A plain dtype is kept, and what is quantized becomes bfloat16.
    dtype = torch.float16 if kind == KINDS.F16 else torch.bfloat16
    assert converted.dtype == dtype
    expected = copy.deepcopy(lm).to(dtype)
    for name, parameter in lm.named_parameters():
        if parameter.dim() > 1:  # quantized row by row, so that the order of rows is all one
            weight = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
            expected.get_parameter(name).copy_(torch.from_numpy(weight.copy()).to(dtype))
    assert converted.state_dict().keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(converted.state_dict()[name], weight), name


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_XXS"])
def test_types_of_256_numbers_are_read(kind, tmp_path, cache):
    """llama.cpp's package can't make these, so blocks hold random bits."""
    lm = random_model(hidden_size=256, num_hidden_layers=1)
    kind = KINDS[kind]
    shape = lm.model.layers[0].mlp.up_proj.weight.shape
    size = gguf.quant_shape_to_byte_shape(shape, kind)
    blocks = np.random.default_rng(0).integers(0, 63, size, np.uint8)  # no NaN among scales
    file = write_gguf(lm, tmp_path / "tiny.gguf", raw={"blk.0.ffn_up.weight": (blocks, kind)})
    weight = plain(file, "auto")[0].model.layers[0].mlp.up_proj.weight
    expected = torch.from_numpy(gguf.dequantize(blocks, kind).copy()).to(torch.bfloat16)
    assert torch.equal(weight, expected) and len(weight.unique()) > 10


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR, YARN], ids=["llama3", "linear", "yarn"])
def test_scaled_positions_are_scaled(rope, tmp_path, cache):
    lm = random_model(rope_parameters=rope)
    raw = {}
    more = {}
    if rope is LLAMA3:  # the file has what each frequency is divided by
        size = lm.config.head_dim
        frequencies = rope["rope_theta"] ** -(torch.arange(0, size, 2) / size)
        factors = (frequencies / lm.model.rotary_emb.inv_freq).numpy()
        assert factors.max() > 31 and factors.min() < 1.01
        raw = {"rope_freqs.weight": (factors.astype(np.float32), KINDS.F32)}
    else:
        more = {"llama.rope.scaling.type": rope["rope_type"], "llama.rope.scaling.factor": 4.0}
        length = {"llama.rope.scaling.original_context_length": 128.0}
        more |= length if rope is YARN else {}
    file = write_gguf(lm, tmp_path / "tiny.gguf", raw=raw, **more)
    assert torch.allclose(logits_of(plain(file)[0]), logits_of(lm), atol=1e-5)
    assert not torch.allclose(logits_of(plain(write_gguf(lm, file))[0]), logits_of(lm), atol=1e-2)


def test_a_file_decodes_under_its_stem_and_is_converted_once(tmp_path, cache, monkeypatch):
    file = str(write_gguf(random_model(), tmp_path / "tiny.Q8_0.gguf", KINDS.Q8_0))
    made = []
    convert = reading.convert
    monkeypatch.setattr(reading, "convert", lambda *a: made.append(a) or convert(*a))
    decoder = Decoder.load(file, "float32", "cpu")
    prompt = decoder.model.tokenizer("def f(")["input_ids"]
    ar = decoder.generate(prompt, DecodeConfig(0, 12)).token_ids
    looked_up = decoder.generate(prompt, DecodeConfig(0, 12, strategy="lookup", lookup=4))
    assert looked_up.token_ids == ar
    moved = tmp_path / "other.gguf"
    (tmp_path / "tiny.Q8_0.gguf").rename(moved)
    assert identity.base_hash(str(moved)) == identity.base_hash(str(moved)) is not None
    assert (
        Decoder.load(str(moved), "float32", "cpu").generate(prompt, DecodeConfig(0, 12)).token_ids
        == ar
    )
    assert len(made) == 1
    assert BenchConfig(model=file, method="greedy").folder == "tiny.Q8_0/greedy"


def test_several_at_once_convert_it_once(tmp_path, cache, monkeypatch):
    file = str(write_gguf(random_model(), tmp_path / "tiny.gguf"))
    made = []
    convert = reading.convert
    monkeypatch.setattr(reading, "convert", lambda *a: made.append(a) or convert(*a))
    found = []
    workers = [
        threading.Thread(target=lambda: found.append(reading.directory(file))) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(made) == 1 and len(set(found)) == 1 and len(found) == 3
    assert sorted(path.name for path in cache.iterdir()) == [found[0].name, found[0].name + ".lock"]


def test_an_adapter_belongs_to_the_file_that_it_was_made_on(tmp_path, cache):
    from sdsat.models import adapter as adapters

    lm = random_model()
    file = str(write_gguf(lm, tmp_path / "q4.gguf", KINDS.Q4_0))
    other = str(write_gguf(lm, tmp_path / "q8.gguf", KINDS.Q8_0))
    base = loading.load(file, "float32", "cpu")
    settings = AdapterConfig(
        file, loading.SatConfig(288, 3), 4, base_sample=adapters.sample_weights(base.lm)
    )
    adapters.SatAdapter(base.lm, settings).save(tmp_path / "adapter")
    model = loading.load(str(tmp_path / "adapter"), "bfloat16", "cpu")
    assert model.adapter is not None and model.sat.k == 3
    with one_line_error("made for base", "load that base"):
        adapters.load(loading.load(other, "float32", "cpu").lm, tmp_path / "adapter")
    with one_line_error("made for base", "load that base"):
        adapters.load(lm, tmp_path / "adapter")


def rewritten(file, change):
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)
    return file


def with_type(number):
    """Give the tensor `output_norm.weight` another type, by its number in the file."""

    def change(content):
        place = content.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
        content[place : place + 4] = number.to_bytes(4, "little")

    return change


@pytest.mark.parametrize(
    ("number", "name"),
    [(31, "Q4_0_4_4"), (9, "Q8_1"), (15, "Q8_K"), (24, "I8"), (77, "number 77")],
)
def test_an_unreadable_type_is_named_with_those_that_can_be_read(number, name, tmp_path, cache):
    file = rewritten(
        write_gguf(random_model(hidden_size=256), tmp_path / "a.gguf"), with_type(number)
    )
    with one_line_error(
        f"model {file}: quantized as {name}, which can't be read; expected one of F32, F16, Q4_0",
        "Q4_K",
        "IQ4_XS",
    ):
        loading.load(str(file), "float32", "cpu")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_text_that_is_no_text_is_one_line(tmp_path, cache):
    """Its architecture, here."""

    def spoil(content):
        place = content.index(b"general.architecture") + len(b"general.architecture") + 4 + 8
        content[place] = 0xFF

    file = rewritten(write_gguf(random_model(), tmp_path / "a.gguf"), spoil)
    with one_line_error(f"model {file}: damaged or cut short"):
        loading.load(str(file), "float32", "cpu")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.2, 0.5, 0.999])
def test_a_file_that_was_cut_short_is_said_so(share, tmp_path, cache):
    file = write_gguf(random_model(), tmp_path / "a.gguf")
    content = file.read_bytes()
    file.write_bytes(content[: max(8, int(len(content) * share))])
    with one_line_error(f"model {file}: damaged or cut short"):
        loading.load(str(file), "float32", "cpu")


@pytest.mark.parametrize(
    ("raw", "more", "message"),
    [
        ({}, {"split.count": 3.0}, "one of 3"),
        ({"blk.0.ffn_gate_exps.weight": (np.ones((4, 32), np.float32), KINDS.F32)}, {}, "no place"),
        ({}, {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
        ({"rope_freqs.weight": (np.full(8, 3, np.float32), KINDS.F32)}, {}, "not Llama 3's"),
        ({"blk.0.ffn_up.weight": (np.ones((96, 32), np.float32), KINDS.F32)}, {}, "has shape"),
    ],
    ids=["a part", "experts", "longrope", "other factors", "another shape"],
)
def test_what_would_be_another_model_is_refused(raw, more, message, tmp_path, cache):
    file = write_gguf(random_model(), tmp_path / "a.gguf", raw=raw, **more)
    with one_line_error(f"model {file}: ", message):
        loading.load(str(file), "float32", "cpu")


NAMES_OF_SETTINGS = st.text("abz._ä", min_size=1, max_size=8)
SETTINGS = st.one_of(
    st.booleans(),
    st.integers(-(2**31), 2**31 - 1),
    st.floats(width=32, allow_nan=False),
    st.text(max_size=9),
    st.lists(st.text(max_size=5), min_size=1, max_size=6),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6),
    st.lists(st.booleans(), min_size=1, max_size=6),
)
SHAPES = st.lists(st.sampled_from([1, 3, 32, 64]), min_size=1, max_size=3)
HELD = st.sampled_from([np.float32, np.float16, "Q8_0", "Q4_0"])


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(NAMES_OF_SETTINGS, SETTINGS, max_size=6),
    st.lists(st.tuples(SHAPES, HELD), min_size=1, max_size=4),
    st.sampled_from([None, 8, 32, 256]),
)
def test_a_header_is_read_as_gguf_s_own_reader_reads_it(tmp_path_factory, named, shapes, alignment):
    """Another program's, which is slow: 20 seconds for a vocabulary of 150,000."""
    file = tmp_path_factory.mktemp("header") / "a.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in named.items():
        writer.add_key_value(f"x.{key}", value, *kinds_of(value))
    random = np.random.default_rng(0)
    for number, (shape, held) in enumerate(shapes):
        values = random.normal(size=shape).astype(np.float32)
        kind = None
        if isinstance(held, str):
            kind = gguf.GGMLQuantizationType[held]
            values = gguf.quantize(np.repeat(values, 32, -1), kind)
        else:
            values = values.astype(held)
        writer.add_tensor(f"t{number}", values, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file):
        write()
    writer.write_tensors_to_file()
    writer.close()

    found = GgufFile(file)
    expected = gguf.GGUFReader(file)
    assert {key: found.value(key) for key in expected.fields if "GGUF." not in key} == {
        key: field.contents() for key, field in expected.fields.items() if "GGUF." not in key
    }
    assert [
        (each.name, list(each.shape), each.kind, each.begin, each.num_bytes)
        for each in found.tensors.values()
    ] == [
        (each.name, each.shape.tolist(), each.tensor_type, each.data_offset, each.n_bytes)
        for each in expected.tensors
    ]
    for own, other in zip(found.tensors.values(), expected.tensors, strict=True):
        assert np.array_equal(found.numbers(own), gguf.dequantize(other.data, other.tensor_type))


def kinds_of(value):
    """The type of a setting in a file, and of an array's elements."""
    kinds = {bool: "BOOL", int: "INT32", float: "FLOAT32", str: "STRING"}
    if isinstance(value, list):
        return gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kinds[type(value[0])]]
    return (gguf.GGUFValueType[kinds[type(value)]],)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GGUF + number(2**40) + number(0), "a number ends behind"),
        (GGUF + number(0) + number(1) + text("a") + kind(9) + kind(8) + number(2**20), "a text"),
        (GGUF + number(0) + number(1) + text("a") + kind(9) + kind(4) + number(2**20), "an array"),
        (GGUF + number(0) + number(1) + text("a") + kind(9) + kind(4) + number(2**22), "arrays of"),
        (GGUF + number(0) + number(1) + text("a") + kind(8) + number(2**63), "a text ends behind"),
        (GGUF + number(0) + number(1) + text("a") + kind(13), "a setting of type 13"),
        (
            GGUF + number(0) + number(1) + text("a") + kind(9) + kind(9) + number(0),
            "array of type 9",
        ),
        (GGUF + number(0) + number(2) + 2 * (text("a") + kind(4) + kind(1)), "'a' twice"),
        (GGUF + number(0) + number(1) + number(0), "name of 0 bytes"),
        (GGUF + number(1) + number(0) + text("t") + kind(5), "5 dimensions"),
        (GGUF + number(1) + number(0) + text("t") + kind(0), "0 dimensions"),
        (
            GGUF + number(1) + number(0) + text("t") + kind(1) + number(8) + kind(0) + number(0),
            "tensor 't' ends behind the file",
        ),
        (
            GGUF + number(1) + number(0) + text("t") + kind(1) + number(8) + kind(2) + number(0),
            "not a multiple",
        ),
        (
            GGUF + number(0) + number(1) + text("general.alignment") + kind(4) + kind(12),
            "no power of 2",
        ),
    ],
)
def test_counts_and_lengths_that_lead_out_of_the_file(content, message, tmp_path):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        GgufFile(tmp_path / "a.gguf")


def test_flipped_bytes_of_a_header_are_refused_at_once(own_process, tmp_path):
    """Each within seconds and a few hundred MiB, in one line; what still reads is converted."""
    file = write_gguf(random_model(), tmp_path / "a.gguf")
    done = own_process(convert_with_flipped_bytes, file, 0).end()
    assert done.code == 0, done.errors[-2000:]
    outcomes = json.loads(done.out)
    assert len(outcomes["said"]) > 20  # in many ways
    assert outcomes["slowest"] < 10 and outcomes["more_mib"] < 500, outcomes


def convert_with_flipped_bytes(file, seed, count=40):
    """In a process of its own, which may hang or grow: convert so many damaged files."""

    def change(content, at, mask):
        damaged = bytearray(content)
        damaged[at] ^= mask
        return damaged

    file = Path(file)
    content = file.read_bytes()
    header = len(content) - sum(tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors)
    random = np.random.default_rng(seed)
    # The high bytes of both counts and of what stands behind a few names, and then any.
    places = [15, 14, 23, 22]
    for word in (b"llama.block_count", b"tokenizer.ggml.tokens", b"llama.rope.dimension_count"):
        first = content.find(word) + len(word)
        places += range(first, first + 16) if first >= len(word) else []
    places += random.integers(4, header, count).tolist()
    said = {}
    slowest = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for at in places:
        file.write_bytes(change(content, at, 1 << int(random.integers(8))))
        began = time.perf_counter()
        try:
            reading.convert(file, file.with_suffix(""), "a.gguf")
            shutil.rmtree(file.with_suffix(""))
            line = "converted"
        except InputError as error:
            line = str(error)
        said[line] = said.get(line, 0) + 1
        assert "\n" not in line
        slowest = max(slowest, time.perf_counter() - began)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    print(json.dumps({"said": said, "slowest": slowest, "more_mib": more}))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"# Notes of mine", "not GGUF"),
        (b"GGUF\1\0\0\0" + 16 * b"\0", "version 1 of GGUF; expected 2 or 3"),
        (b"GGUF\0\0\2\0" + 16 * b"\0", "version 131072 of GGUF"),
        (b"GGUF\0\0\0\3" + 16 * b"\0", "big-endian"),
    ],
)
def test_what_is_no_gguf_file_is_said_so(tmp_path, cache, start, message):
    (tmp_path / "a.gguf").write_bytes(start)
    with one_line_error(f"model {tmp_path / 'a.gguf'}: ", message):
        loading.load(str(tmp_path / "a.gguf"))


def test_other_families_and_other_files_are_refused(tmp_path, cache):
    file = tmp_path / "a.gguf"
    gguf_file = write_gguf(random_model(), file)
    rewritten(
        gguf_file,
        lambda content: content.__setitem__(slice(None), content.replace(b"llama", b"phi99")),
    )
    with one_line_error(
        f"model {file}: architecture 'phi99'", "expected one of llama, qwen2, qwen3"
    ):
        loading.load(str(file))
    with one_line_error(f"model {tmp_path / 'none.gguf'}: no such file"):
        loading.load(str(tmp_path / "none.gguf"))
    with one_line_error(
        f"model {tmp_path}: a folder of GGUF files; expected one of them, as {file}"
    ):
        loading.load(str(tmp_path))
    file.write_bytes(b"something else")
    with one_line_error(f"model {file}: a file that is not GGUF"):
        loading.load(str(file))


def test_a_damaged_conversion_is_made_again(tmp_path, cache):
    file = write_gguf(random_model(), tmp_path / "tiny.gguf")
    folder = reading.directory(str(file))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert reading.directory(str(file)) == folder and weights.read_bytes() == whole
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
