"""The decoder against a naive one: no cache, no drafts, one plain forward over the whole sequence per token."""

import pytest
import torch
from conftest import VOCAB, tiny_llama, with_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.decode import generate
from sdsat.sampling import choose

PROMPT = [1, 5, 9, 2, 7]
SHAPES = [(5, "paper"), *((k, tree) for k in (0, 1, 2, 3, 5) for tree in ("chain", (2,), (3, 2, 1), (1, 1, 4)))]
NUCLEUS = SamplingConfig(temperature=1.0, top_k=10, top_p=0.95, seed=3)


def naive(model, prompt, num_tokens, sampling, forbidden=None):
    """Uncached oracle: `num_tokens` new tokens from the plain model, without stopping."""
    ids = list(prompt)
    for t in range(num_tokens):
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None]
        logits = model.model(torch.tensor([ids]), attention_mask=mask).logits[0, -1:]
        if forbidden is not None:
            logits[:, forbidden] = float("-inf")
        ids.append(int(choose(logits, torch.tensor([t]), sampling)))
    return ids[len(prompt) :]


@pytest.fixture(scope="module", params=[0, 6], ids=["", "head"])
def model(request):
    return with_adapter(tiny_llama(), k=5, head=request.param)


@pytest.mark.parametrize("sampling", [SamplingConfig(), NUCLEUS, SamplingConfig(1.0, seed=9)], ids=["greedy", "nucleus", "all"])
@pytest.mark.parametrize(("k", "tree"), SHAPES, ids=str)
def test_equals_naive_decoding(model, sampling, tree, k):
    want = naive(model, PROMPT, 23, sampling)
    out = generate(model, PROMPT, DecodeConfig(k, 23, tree, sampling))
    assert out.token_ids == want
    assert out.finish == "length"


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 50),
    k=st.integers(0, 6),
    tree=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
    num_tokens=st.integers(1, 12),
    head=st.sampled_from([0, 5]),
)
def test_equals_naive_decoding_on_random_models(seed, k, tree, temperature, prompt, num_tokens, head):
    model = with_adapter(tiny_llama(seed=seed), k=6, seed=seed, head=head)
    sampling = SamplingConfig(temperature, seed=seed)
    out = generate(model, prompt, DecodeConfig(k, num_tokens, tree, sampling))
    assert out.token_ids == naive(model, prompt, num_tokens, sampling)


def test_equals_transformers_generate(model):
    lm = tiny_llama()
    lm.set_attn_implementation("sdpa")
    want = lm.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False, pad_token_id=0)[0, len(PROMPT) :].tolist()
    for k in (0, 1, 3, 5):
        assert generate(model, PROMPT, DecodeConfig(k, 30)).token_ids == want


@pytest.mark.parametrize("sampling", [SamplingConfig(), NUCLEUS], ids=["greedy", "nucleus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_chains_equal_ar(dtype, sampling):
    model = with_adapter(tiny_llama(dtype), k=5, head=6)
    want = generate(model, PROMPT, DecodeConfig(0, 40, sampling=sampling)).token_ids
    assert model.row_policy.stable
    for k in (1, 3, 5):
        assert generate(model, PROMPT, DecodeConfig(k, 40, sampling=sampling)).token_ids == want
