"""Devices: what their names mean, how large a model is before it is loaded, what fits where, and a
pass over several devices.
"""

from itertools import product

import fake_gpus
import pytest
import torch
from accelerate import dispatch_model
from common import VOCAB, one_line_error, tiny_llama, tiny_tokenizer, with_adapter
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from sdsat.config import DecodeConfig, SatConfig
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.workers import in_own_process
from sdsat.models import devices
from sdsat.models.devices import GIB, Size, model_size, pick_devices, place, split_layers
from sdsat.models.loading import load, sized

GPU = [torch.device("cuda", i) for i in range(4)]


@pytest.fixture
def gpus(monkeypatch):
    """This machine has so many GPUs, with so many GiB free."""

    def have(*free):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda device: (int(free[device.index] * GIB), 80 * GIB)
        )

    return have


def test_names(gpus):
    gpus(10, 10)
    assert pick_devices("cpu") == (torch.device("cpu"),)
    assert pick_devices(None) == pick_devices("") == pick_devices("0") == (GPU[0],)
    assert pick_devices("1+0") == (GPU[1], GPU[0])
    for device in ("2", "0+2", "0+0", "0+", "-1", "cuda:0", "gpu", "1.0", "cpu+0"):
        with one_line_error(
            f"device={device}: this machine has 2 GPUs",
            "expected 'cpu', a number below 2, or different ones joined",
        ):
            pick_devices(device)
    gpus()
    assert pick_devices(None) == (torch.device("cpu"),)
    with one_line_error("device=0: this machine has 0 GPUs; expected 'cpu'"):
        load("any", "float32", "0")
    with one_line_error("GPUS=0: this machine has 0 GPUs"):
        pick_devices("0", "GPUS")


@pytest.mark.parametrize("tied", [True, False])
def test_a_size_from_the_config_is_that_of_the_loaded_model(tmp_path, tied):
    lm = tiny_llama(torch.float32, num_hidden_layers=3, tie_word_embeddings=tied)
    lm.save_pretrained(tmp_path)
    tiny_tokenizer(["<unk>"]).save_pretrained(tmp_path)
    weights = sum(p.numel() for p in lm.parameters())
    for dtype, itemsize in (("float16", 2), ("float32", 4), ("auto", 4)):
        size = sized(str(tmp_path), dtype)
        assert size.num_layers * size.layer + size.other == weights * itemsize
        assert size.layer == sum(p.numel() for p in lm.model.layers[1].parameters()) * itemsize
    engine = Decoder.load(str(tmp_path), "float32", "cpu", engine="transformers").engine
    cache = engine.new_cache(64)
    engine.prefill(cache, torch.arange(5))
    assert (
        sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        == 64 * 3 * size.position
    )


@given(
    layers=st.integers(1, 6),
    layer=st.integers(1, 5),
    other=st.integers(0, 8),
    rooms=st.lists(st.integers(-2, 14), min_size=1, max_size=3),
)
def test_layers_are_split_whenever_some_split_fits(layers, layer, other, rooms):
    def fits(counts):
        used = [count * layer for count in counts]
        used[0] += other
        return all(u <= room for u, room in zip(used, rooms, strict=True))

    possible = any(
        fits(c) for c in product(range(layers + 1), repeat=len(rooms)) if sum(c) == layers
    )
    counts = split_layers(layers, layer, other, rooms)
    assert (counts is not None) == possible
    if counts is not None:
        assert sum(counts) == layers and fits(counts)


# 12.4 GiB of weights in float16, half a MiB of cache a position.
SEVEN_B = LlamaConfig(
    vocab_size=32016,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)


@pytest.fixture(scope="module")
def seven_b():
    return model_size("big", SEVEN_B, torch.float16)


def test_a_model_that_does_not_fit_is_refused_with_what_would_do(gpus, seven_b):
    gpus(10.2, 10.2)
    with one_line_error(
        (
            "device=0: model big needs about 13.6 GiB (12.6 of weights in float16, 0.5 of "
            "cache), GPU 0 has 10.2 "
            "GiB free"
        ),
        "expected more GPUs, as in 0+1, a smaller model or dtype",
    ):
        place(seven_b, "0", 1024)
    where = place(seven_b, "0+1", 1024)
    assert (
        where.pop("model.embed_tokens") == where.pop("model.norm") == where.pop("lm_head") == GPU[0]
    )
    where.pop("model.rotary_emb")
    assert list(where) == [f"model.layers.{i}" for i in range(32)]
    # one hand-over, no to and fro
    assert sorted(where.values(), key=lambda device: device.index) == list(where.values())
    assert set(where.values()) == {GPU[0], GPU[1]}
    with one_line_error(
        "device=0+1",
        "needs about 45.6 GiB",
        "32.0 of cache",
        "GPUs 0, 1 have 10.2, 10.2 GiB free",
        "as in 0+1+2",
    ):
        place(seven_b, "0+1", 65536)
    gpus(14)
    assert place(seven_b, "0", 1024) == {"": GPU[0]}


def test_workers_on_one_device_share_its_memory(gpus, seven_b, monkeypatch):
    gpus(30, 14)
    taken = {}
    for device in ("0", "1", "0"):
        place(seven_b, device, 1024, taken)
    free = "GiB free beside other workers; expected more GPUs for a worker"
    with one_line_error("GPUS=0: ", "GPU 0 has 2.", free):
        place(seven_b, "0", 1024, taken, "GPUS")
    monkeypatch.setattr(devices, "free_bytes", lambda device: 20 * GIB)
    taken = {}
    place(seven_b, "cpu", 1024, taken)
    with one_line_error(
        "GPUS=cpu: ", "the CPU has", "beside other workers; expected fewer workers"
    ):
        place(seven_b, "cpu", 1024, taken, "GPUS")


def test_linear_layers_count_twice_where_the_cpu_holds_them_twice(monkeypatch):
    size = Size("m", torch.float32, 1, GIB, 0, 0, GIB, "layers", ())
    monkeypatch.setattr(devices, "free_bytes", lambda device: 2 * GIB)
    monkeypatch.setattr(devices, "can_pack", lambda *_: False)
    place(size, "cpu", 1)
    monkeypatch.setattr(devices, "can_pack", lambda *_: True)
    with one_line_error("2.0 of weights in float32, linear layers twice"):
        place(size, "cpu", 1)


@pytest.mark.parametrize(
    ("has", "dtype"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"bf16": True}, "bfloat16"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "float32"),
    ],
)
def test_training_takes_what_the_cpu_is_fast_in(has, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert devices.training_dtype("cpu") == dtype


def test_a_check_in_a_process_of_its_own_raises_what_it_found(quick_workers, seven_b):
    with one_line_error("device=cpu: model big needs about"):
        in_own_process(place, seven_b, "cpu", 2**40)
    assert len(quick_workers) == 1


def test_load_refuses_before_it_reads_weights(tmp_path, monkeypatch):
    tiny_llama().config.save_pretrained(tmp_path)  # and no weights
    monkeypatch.setattr(devices, "free_bytes", lambda device: GIB // 8)
    with one_line_error(
        f"device=cpu: model {tmp_path} needs about 0.3 GiB",
        "the CPU has 0.1 GiB free; expected a smaller model or dtype",
    ):
        load(str(tmp_path), "float32", "cpu")


def test_free_memory_of_this_machine():
    free = devices.free_bytes(torch.device("cpu"))
    assert 2**20 < free <= 2**62


def test_a_model_with_accelerates_hooks_generates_the_same(tmp_path):
    """The hooks of a device map, all of it on the CPU: adapter, cache and logits as without."""
    prompt = [1, 5, 9]
    config = DecodeConfig(3, 24)
    plain = with_adapter(tiny_llama(torch.float32))
    lm = tiny_llama(torch.float32)
    names = (
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        "model.layers.0",
        "model.layers.1",
    )
    dispatch_model(
        lm, dict.fromkeys(names, "cpu"), force_hooks=True, skip_keys=lm._skip_keys_device_placement
    )
    hooked = with_adapter(lm)
    assert hasattr(hooked.model.lm.model.layers[1], "_hf_hook")
    want = plain.generate(prompt, config)
    out = hooked.generate(prompt, config)
    assert (out.token_ids, out.accepted_lengths) == (want.token_ids, want.accepted_lengths)
    assert hooked.model.sat == SatConfig(VOCAB, 3)


def test_a_pass_over_two_devices_never_mixes_them(own_process):
    code, out, errors = own_process(fake_gpus.main).end()
    assert code == 0, errors[-2000:]
    assert out.split() == ["gpu:0", "gpu:0", "0", "0", "1", "1", "1"]
