"""Every supported architecture, as a tiny random checkpoint: exact against transformers' own `generate`; others are refused."""

import pytest
import torch
from conftest import VOCAB, one_line_error, tiny_tokenizer, with_adapter
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.decode import generate
from sdsat.model import load
from sdsat.reference import transformers_generate

COMMON = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, initializer_range=0.4, eos_token_id=None, bos_token_id=1, pad_token_id=None,
)  # fmt: skip
ROPE = dict(rope_theta=10000.0)
FAMILIES = {
    "llama": LlamaConfig(**COMMON),
    "llama, tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama, one kv head": LlamaConfig(**{**COMMON, "num_key_value_heads": 1}),
    "llama, biases": LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "llama, head dim": LlamaConfig(**COMMON, head_dim=16),
    "llama 3 rope": LlamaConfig(
        **COMMON,
        rope_parameters={
            **ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "linear rope": LlamaConfig(**COMMON, rope_parameters={**ROPE, "rope_type": "linear", "factor": 4.0}),
    "yarn rope": LlamaConfig(
        **COMMON, rope_parameters={**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    ),
    "mistral": MistralConfig(**COMMON, sliding_window=None),
    "mistral, window": MistralConfig(**COMMON, sliding_window=128),
    "qwen2": Qwen2Config(**COMMON),
    "qwen2, tied": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
}  # fmt: skip
PROMPT = [1, 5, 9, 2, 7, 33, 12]


def checkpoint(folder, config, seed=0):
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer([f"<{i}>" for i in range(VOCAB)]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_generate(tmp_path, family):
    plain = load(checkpoint(tmp_path, FAMILIES[family]), "float32", "cpu")
    model = with_adapter(plain.model, k=3, strength=0.2)
    model.packed = plain.packed
    want = transformers_generate(model, PROMPT, DecodeConfig(0, 60)).token_ids
    assert len(set(want)) > 5
    for k, tree in ((0, "chain"), (1, "chain"), (3, "chain"), (3, (2, 2, 1))):
        assert generate(model, PROMPT, DecodeConfig(k, 60, tree)).token_ids == want
    nucleus = SamplingConfig(1.0, 10, 0.95, seed=4)
    sampled = [generate(model, PROMPT, DecodeConfig(k, 60, sampling=nucleus)).token_ids for k in (0, 3)]
    assert sampled[0] == sampled[1] != want


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64), "architecture 'gpt2' is not supported"),
        (LlamaConfig(**COMMON, rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0}), "rope_type 'dynamic'"),
    ],
    ids=["gpt2", "dynamic rope"],
)
def test_what_cannot_be_decoded_exactly_is_refused(tmp_path, config, reason):
    folder = checkpoint(tmp_path, config)
    with one_line_error(folder, reason):
        load(folder, "float32", "cpu")


def test_a_sliding_window_ends_the_context(tmp_path):
    model = load(checkpoint(tmp_path, FAMILIES["mistral, window"]), "float32", "cpu")
    with one_line_error("max_new_tokens=122", "128"):
        generate(model, PROMPT, DecodeConfig(0, 122))
