"""Drafted sampling as a distribution: thousands of seeds against the exact joint probabilities of
the first tokens.
"""

import itertools

import numpy as np
import pytest
import torch
from common import tiny_llama, with_adapter
from scipy.stats import chisquare

from sdsat.config import DecodeConfig, SamplingConfig

VOCAB = 6
PROMPT = [1, 2]
TEMPERATURE = 1.2
TOP_K = 5
TOP_P = 0.9
NUM_SEEDS = 2000


@pytest.fixture(scope="module")
def decoder():
    sizes = dict(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return with_adapter(tiny_llama(vocab=VOCAB, **sizes), k=3)


def next_token(lm, ids):
    """{token: probability} after `ids`, filtered as the definition of nucleus sampling says: sort,
    cut, renormalise.
    """
    mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool).tril()
    logits = lm(torch.tensor([ids]), attention_mask=mask).logits[0, -1].numpy() / TEMPERATURE
    best = np.argsort(-logits)[:TOP_K]
    p = np.exp(logits[best]) / np.exp(logits[best]).sum()
    size = 1 + int(np.searchsorted(np.cumsum(p), TOP_P))
    return dict(zip(best[:size].tolist(), p[:size] / p[:size].sum(), strict=True))


def joint(lm, length):
    """{tokens: probability} of every output of `length` tokens that can occur."""
    outputs = {(): 1.0}
    for _ in range(length):
        outputs = {
            (*tokens, token): p * q
            for tokens, p in outputs.items()
            for token, q in next_token(lm, [*PROMPT, *tokens]).items()
        }
    return outputs


def test_nucleus_sampling_with_a_tree_is_exact(decoder):
    configs = [
        DecodeConfig(3, 5, (2, 1), SamplingConfig(TEMPERATURE, TOP_K, TOP_P, seed))
        for seed in range(NUM_SEEDS)
    ]
    # all at once: the decoder is the same (test_batch.py), and takes a tenth of the time
    outs = decoder.generate_batch([PROMPT] * NUM_SEEDS, configs, batch_size=100)
    for out, config in zip(outs[:100], configs, strict=False):
        assert decoder.generate(PROMPT, config).token_ids == out.token_ids
    outputs = [tuple(out.token_ids) for out in outs]
    accepted = sum(out.accepted_lengths[0] > 0 for out in outs)
    assert 0.2 < accepted / NUM_SEEDS < 0.9  # both drafts and corrections are in the sample
    for length in (1, 2, 3):
        want = joint(decoder.model.lm, length)
        counts = dict.fromkeys(want, 0)
        for tokens in outputs:
            counts[tokens[:length]] += 1  # a KeyError: a token that the filter forbids
        assert_distributed(counts, want)


def assert_distributed(counts, probabilities):
    """Chi-square; outcomes expected fewer than five times count as one."""
    expected = {tokens: p * NUM_SEEDS for tokens, p in probabilities.items()}
    rare = {tokens for tokens, count in expected.items() if count < 5}
    groups = [{tokens} for tokens in expected if tokens not in rare] + ([rare] if rare else [])
    assert len(groups) > 3
    observed, wanted = (
        [sum(table[tokens] for tokens in group) for group in groups] for table in (counts, expected)
    )
    assert chisquare(observed, wanted).pvalue > 1e-3


def test_the_exact_probabilities_are_a_distribution(decoder):
    for length in (1, 2, 3):
        table = joint(decoder.model.lm, length)
        assert sum(table.values()) == pytest.approx(1)
        # the filter bites
        assert 1 < len(table) < len(list(itertools.product(range(VOCAB), repeat=length)))
