"""Small random models: exact oracles that need no download."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sdsat import attention
from sdsat.adapter import AdapterConfig, SatAdapter, sample_weights
from sdsat.config import SatConfig
from sdsat.model import SatModel

VOCAB = 64


def tiny_llama(dtype=torch.float64, vocab=VOCAB, seed=0, **overrides):
    """A random two-layer Llama with grouped queries; weights large enough that its next tokens vary."""
    settings = dict(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.4, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).to(dtype).eval().requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    return model


def with_adapter(lm, k=3, rank=4, seed=1, strength=1.0):
    """`lm` with a random, attached adapter: its drafts are as good as random ones."""
    torch.manual_seed(seed)
    config = AdapterConfig("tiny", SatConfig(lm.config.vocab_size, k), rank, base_sample=sample_weights(lm))
    adapter = SatAdapter(lm, config)
    for parameter in adapter.up.values():
        torch.nn.init.normal_(parameter, std=strength)
    adapter.requires_grad_(False).attach(lm)
    return SatModel(lm, None, "tiny", adapter.config.sat, adapter)


@pytest.fixture
def llama():
    return tiny_llama()
