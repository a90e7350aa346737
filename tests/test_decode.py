"""The decoder against a naive one: no cache, no drafts, one plain forward over the whole sequence
per token.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from common import VOCAB, decoder_of, drafted, one_line_error, tiny_llama, with_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from sdsat.config import (
    ALL_STRATEGIES,
    LOOKUP,
    STRATEGIES,
    DecodeConfig,
    InputError,
    SamplingConfig,
)
from sdsat.decoding.decoder import Decoder
from sdsat.engines.native.engine import NativeEngine
from sdsat.method.costs import COUNTS, CostCurve
from sdsat.method.sampling import choose, gumbel_noise

PROMPT = [1, 5, 9, 2, 7]
# sizes that the native engine takes
WHOLE = dict(hidden_size=64, intermediate_size=96, head_dim=32)
SHAPES = [
    (5, "paper"),
    (0, "chain"),  # without SATs there is no tree
    *((k, tree) for k in (1, 2, 3, 5) for tree in ("chain", "grown", (2,), (3, 2, 1), (1, 1, 4))),
]
NUCLEUS = SamplingConfig(temperature=1.0, top_k=10, top_p=0.95, seed=3)
# What a pass of so many rows is said to take: as good as nothing, so that `auto` tries much, or
# much, so that it tries little.
# without rounded passes, which only the native engine has
EXACT = tuple(strategy for strategy in STRATEGIES if strategy != "rounded")
CURVES = [
    CostCurve([[t * n + 1 for n in COUNTS]] * 2, [[t * n + 1 for n in COUNTS]] * 2, 0.0)
    for t in (1e-3, 0.5)
]


def naive(lm, prompt, num_tokens, sampling, forbidden=None):
    """Uncached oracle: `num_tokens` new tokens from the plain model, without stopping."""
    ids = list(prompt)
    for t in range(num_tokens):
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None]
        logits = lm(torch.tensor([ids]), attention_mask=mask).logits[0, -1:]
        if forbidden is not None:
            logits[:, forbidden] = float("-inf")
        ids.append(int(choose(logits, torch.tensor([t]), sampling)))
    return ids[len(prompt) :]


@cache
def naive_of_plain(sampling):
    """Of the model that `decoder` has an adapter for."""
    return naive(tiny_llama(), PROMPT, 12, sampling)


def drafting(lm, costs=CURVES[0], native=False, **adapter):
    """A model with an adapter, whose passes are said to take what `costs` says."""
    decoder = with_adapter(lm, **adapter)
    if native:
        decoder = Decoder(decoder.model, NativeEngine(decoder.model))
        costs = replace(costs, rounded=[[0.8 * t for t in times] for times in costs.verify])
    decoder.costs = costs
    return decoder


@pytest.fixture(scope="module", params=[0, 6], ids=["", "head"])
def decoder(request):
    draft_ids = range(1, 60, 2) if request.param else ()
    return drafting(tiny_llama(), k=5, head=request.param, draft_ids=tuple(draft_ids))


SETTINGS = {
    "two-step": {},
    "one-pass": {"lookup": 5, "budget": 12},
    "auto": {"lookup": 5, "budget": 32},
    LOOKUP: {"lookup": 5},
}


@pytest.mark.parametrize(
    ("strategy", "k", "tree"),
    [*((strategy, *shape) for strategy in EXACT for shape in SHAPES), (LOOKUP, 0, "chain")],
    ids=str,
)
@pytest.mark.parametrize("sampling", [SamplingConfig(), NUCLEUS], ids=["greedy", "nucleus"])
def test_equals_naive_decoding(decoder, sampling, strategy, k, tree):
    lookup = SETTINGS[strategy].get("lookup", 0)
    budget = SETTINGS[strategy].get("budget")
    out = decoder.generate(PROMPT, drafted(strategy, k, lookup, 12, tree, sampling, budget=budget))
    assert out.token_ids == naive_of_plain(sampling)
    assert out.finish == "length"


DRAFTING = dict(
    seed=st.integers(0, 50),
    k=st.integers(0, 5),  # with 6, a tree could have more nodes than a pass may have rows
    tree=st.just("grown") | st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
    repeated=st.integers(1, 3),  # for the lookup
    num_tokens=st.integers(1, 12),
    head=st.sampled_from([0, 5]),
    lookup=st.sampled_from([0, 5]),
    budget=st.integers(4, 32),
    costs=st.sampled_from(CURVES),
)


@settings(max_examples=40, deadline=None)
@given(
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    strategy=st.sampled_from([*EXACT, LOOKUP]),
    **DRAFTING,
)
def test_equals_naive_decoding_on_random_models(
    seed, k, tree, temperature, prompt, repeated, num_tokens, head, strategy, lookup, budget, costs
):
    prompt = prompt * repeated
    decoder = drafting(tiny_llama(seed=seed), costs, k=5, seed=seed, head=head)
    sampling = SamplingConfig(temperature, seed=seed)
    config = drafted(strategy, k, lookup, num_tokens, tree, sampling, budget=budget)
    assert decoder.generate(prompt, config).token_ids == naive(
        decoder.model.lm, prompt, num_tokens, sampling
    )


def assert_own_choices(lm, prompt, tokens, sampling):
    """Every token is the best by one uncached pass of transformers over the whole text, up to
    float32's rounding.
    """
    logits = lm(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
    scores = logits
    if not sampling.greedy:
        scores = logits / sampling.temperature + gumbel_noise(
            sampling.seed, torch.arange(len(tokens)), torch.arange(VOCAB)
        )
    least = (
        logits.topk(sampling.top_k).values[:, -1:]
        if sampling.top_k
        else logits.amin(-1, keepdim=True)
    )
    chosen = torch.tensor(tokens)[:, None]
    assert (logits.gather(-1, chosen) >= least - 1e-3).all()
    assert (
        scores.gather(-1, chosen)
        >= scores.masked_fill(logits < least, float("-inf")).amax(-1, keepdim=True) - 1e-3
    ).all()


@settings(max_examples=40, deadline=None)
@given(
    sampling=st.sampled_from(
        [SamplingConfig(), SamplingConfig(1.0, seed=3), SamplingConfig(0.7, 10, seed=4)]
    ),
    strategy=st.sampled_from(ALL_STRATEGIES),
    **DRAFTING,
)
def test_native_passes_choose_what_transformers_chooses(
    seed, k, tree, sampling, prompt, repeated, num_tokens, head, strategy, lookup, budget, costs
):
    lm = tiny_llama(torch.float32, seed=seed % 5, **WHOLE)
    prompt = prompt * repeated
    decoder = drafting(lm, costs, native=True, k=5, seed=seed, head=head)
    config = drafted(strategy, k, lookup, num_tokens, tree, sampling, budget=budget)
    tokens = decoder.generate(prompt, config).token_ids
    assert (
        tokens == decoder.generate(prompt, DecodeConfig(0, num_tokens, sampling=sampling)).token_ids
    )
    lm.set_attn_implementation("sdpa")
    assert_own_choices(lm, prompt, tokens, sampling)


@pytest.mark.parametrize("strategy", ALL_STRATEGIES)
@pytest.mark.parametrize("sampling", [SamplingConfig(), NUCLEUS], ids=["greedy", "nucleus"])
@pytest.mark.parametrize("head", [0, 6], ids=["", "head"])
def test_native_bfloat16_drafts_equal_ar(head, sampling, strategy):
    decoder = drafting(tiny_llama(torch.bfloat16, **WHOLE), native=True, k=5, head=head)
    want = decoder.generate(PROMPT, DecodeConfig(0, 24, sampling=sampling)).token_ids
    assert decoder.engine.row_policy.stable and len(set(want)) > 5
    for k, tree in SHAPES[::3]:
        for lookup, budget in ((0, 16), (5, 32)):
            config = drafted(strategy, k, lookup, 24, tree, sampling, budget=budget)
            assert decoder.generate(PROMPT, config).token_ids == want


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_tree_for_auto_is_wide_only_where_trees_have_the_bits_of_ar(strategy, native):
    decoder = drafting(tiny_llama(torch.float32, **WHOLE), native=native, k=4)
    found = [
        decoder.resolved(DecodeConfig(k, tree=tree, strategy=strategy)).tree
        for k in (4, 0)
        for tree in ("auto", (3,))
    ]
    assert found == ["grown" if native and strategy == "auto" else "chain", (3,), "chain", (3,)]


@pytest.mark.parametrize("sampling", [NUCLEUS, SamplingConfig(1.0, seed=9)], ids=["nucleus", "all"])
@pytest.mark.parametrize(
    ("strategy", "native"),
    [*((strategy, False) for strategy in EXACT), *((strategy, True) for strategy in STRATEGIES)],
    ids=str,
)
def test_sats_that_see_what_the_model_sees_draft_what_it_samples(strategy, sampling, native):
    """All rows of this model, SATs too, have the same logits: with the noise of the right place, no
    draft is wrong.
    """
    lm = tiny_llama(torch.float32, **WHOLE)
    lm.model.embed_tokens.weight[:] = lm.model.embed_tokens.weight[0].clone()
    for layer in lm.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    decoder = drafting(lm, native=native, k=4, strength=0.0)
    out = decoder.generate(
        PROMPT,
        DecodeConfig(4, 50, "chain", sampling, strategy=strategy, lookup=0, budget=32),
    )
    assert len(set(out.token_ids)) > 5
    rounded = out.num_rounded_passes > 0  # whose logits are near; by chance one of 60 would do
    assert out.acceptance_rate == 1 or (rounded and out.acceptance_rate > 0.4)
    assert rounded or strategy != "rounded"
    # One-pass has SATs at every draft, so that each of its passes but the first makes five tokens;
    # two-step makes six in two.
    assert out.num_passes == {"one-pass": 11, "two-step": 18}.get(strategy, out.num_passes)


# of a model that goes round in a circle of five tokens
CIRCLE = dict(seed=3, initializer_range=0.02)


@pytest.mark.parametrize(("k", "strategy"), [(0, LOOKUP), *((3, strategy) for strategy in EXACT)])
def test_a_text_that_repeats_itself_is_looked_up(k, strategy):
    decoder = drafting(tiny_llama(**CIRCLE), k=3)
    want = naive(decoder.model.lm, PROMPT, 50, SamplingConfig())
    assert len(set(want)) < 10
    out = decoder.generate(PROMPT, DecodeConfig(k, 50, strategy=strategy, lookup=5))
    assert out.token_ids == want
    assert sum(out.accepted_by_depth) >= 25


def test_lookup_takes_no_sats():
    """A model as it comes, without an adapter: looking tokens up gives plain decoding's text in
    fewer passes.
    """
    plain = decoder_of(tiny_llama(**CIRCLE), name="plain")
    out = plain.generate(PROMPT, DecodeConfig(None, 50, strategy=LOOKUP))
    assert out.token_ids == naive(plain.model.lm, PROMPT, 50, SamplingConfig())
    assert out.num_passes <= 25 and len(out.proposed_by_depth) == 12
    with one_line_error(
        "strategy=auto: model plain has no SATs", "expected an adapter", "strategy=lookup", "k=0"
    ):
        plain.generate(PROMPT, DecodeConfig(None, 50, strategy="auto"))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sats", [True, False])
def test_ar_makes_one_token_a_pass(strategy, sats):
    """Whatever it is derived from, and where there is much to look up."""
    lm = tiny_llama(**CIRCLE)
    decoder = drafting(lm, k=3) if sats else decoder_of(lm, name="plain")
    asked = DecodeConfig(3, 50, strategy=strategy, lookup=5, tree=(2, 1), budget=8)
    derived = [replace(DecodeConfig(3, 50, strategy=strategy), k=0), asked.plain]
    for config in [*derived, decoder.resolved(asked).plain] if sats else derived:
        out = decoder.generate(PROMPT, config)
        assert (out.num_passes, out.num_plain_passes, out.proposed_by_depth) == (50, 50, [])


@pytest.mark.parametrize(
    ("asked", "k", "lookup", "tree"),
    [
        (dict(), 0, 0, "chain"),
        (dict(k=None), 4, 0, "chain"),
        (dict(k=None, strategy="auto"), 4, 12, "grown"),
        (dict(k=2, strategy="auto", lookup=0, tree="chain"), 2, 0, "chain"),
        (dict(k=0, strategy="auto"), 0, 0, "chain"),
        (dict(k=None, strategy="one-pass", lookup=3), 4, 3, "chain"),
        (dict(strategy=LOOKUP), 0, 12, "chain"),
        (dict(k=None, strategy=LOOKUP, lookup=7), 0, 7, "chain"),
    ],
    ids=str,
)
def test_what_is_left_open_is_chosen_for_the_model(asked, k, lookup, tree):
    decoder = drafting(tiny_llama(torch.float32, **WHOLE), native=True, k=4)
    config = decoder.resolved(DecodeConfig(**asked))
    assert (config.k, config.lookup, config.tree) == (k, lookup, tree)
    assert decoder.resolved(config) == config


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rounded_weights_are_made_before_seconds_count(strategy):
    decoder = drafting(tiny_llama(torch.float32, **WHOLE), native=True, k=2)
    decoder.generate(PROMPT, DecodeConfig(2, 1, strategy=strategy))  # one token: nothing is drafted
    assert ("rounded" in vars(decoder.engine)) == (strategy in ("rounded", "auto"))


def test_8_bits_are_refused_where_there_are_none(decoder):
    with pytest.raises(InputError, match=r"^strategy=rounded: .* expected another$"):
        decoder.generate(PROMPT, DecodeConfig(2, 4, strategy="rounded"))


def test_equals_transformers_generate(decoder):
    lm = tiny_llama()
    lm.set_attn_implementation("sdpa")
    want = lm.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False, pad_token_id=0)[
        0, len(PROMPT) :
    ].tolist()
    for k in (0, 1, 3, 5):
        assert decoder.generate(PROMPT, DecodeConfig(k, 30)).token_ids == want


@pytest.mark.parametrize("sampling", [SamplingConfig(), NUCLEUS], ids=["greedy", "nucleus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_chains_equal_ar(dtype, sampling):
    decoder = with_adapter(tiny_llama(dtype), k=5, head=6)
    want = decoder.generate(PROMPT, DecodeConfig(0, 40, sampling=sampling)).token_ids
    assert decoder.engine.row_policy.stable
    for k in (1, 3, 5):
        assert decoder.generate(PROMPT, DecodeConfig(k, 40, sampling=sampling)).token_ids == want
