"""scripts/growth.py: models of a shape, and what is left out."""

import growth
import pytest
import torch
from common import tiny_tokenizer
from transformers import LlamaConfig, Qwen2Config

SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
)
SIZES = {
    "tied": Qwen2Config(vocab_size=160, tie_word_embeddings=True, **SMALL),
    "not tied": LlamaConfig(vocab_size=160, tie_word_embeddings=False, **SMALL),
}


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "SIZES", SIZES)
    monkeypatch.setattr(growth, "CONTEXTS", (16, 64, 4096))
    monkeypatch.setattr(growth, "BATCHES", (1, 2))
    monkeypatch.setattr(growth, "PROMPT", 32)
    monkeypatch.setattr(growth, "READ_BYTES", 2**20)
    tiny_tokenizer(["<unk>", *"abc"]).save_pretrained(tmp_path / "base")
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(growth, "base_dir", lambda: tmp_path / "base")
    monkeypatch.setattr(growth, "cache_dir", lambda: tmp_path / "cache")


@pytest.mark.parametrize(("name", "dtype"), [("tied", "int8"), ("not tied", "bfloat16")])
def test_a_model_of_a_shape_is_measured_and_removed(small, tmp_path, name, dtype):
    threads = torch.get_num_threads()
    try:
        found = growth.measured(name, dtype, [1], 1)
    finally:
        torch.set_num_threads(threads)
    # What is longer than the model's positions is left out.
    assert [(row["context"], row["batch"]) for row in found["rows"]] == [(16, 1), (64, 1), (16, 2)]
    assert list((tmp_path / "cache").iterdir()) == []
    inner = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)
    norms = 5 * 64 + (2 * (64 + 2 * 32) if name == "tied" else 0)  # with Qwen2's biases
    small_ones = 1 if dtype == "int8" else 2
    assert found["weight_bytes"] == small_ones * (inner + 160 * 64) + 2 * norms
    cache = 2 * 2 * 1 * 32 * 2  # keys and values, layers, heads, size of a head, bytes
    assert [row["cache_bytes"] for row in found["rows"]] == [16 * cache, 64 * cache, 32 * cache]


def test_what_cannot_be_loaded_is_left_out_and_named(small):
    found = growth.measured("missing.gguf", "int8", [1], 1)
    assert found["left_out"] == "model missing.gguf: no such file" and found["rows"] == []
