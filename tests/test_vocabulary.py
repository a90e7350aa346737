"""The draft vocabulary: what SATs may guess, in choosing it, training and decoding."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from common import VOCAB, adapted, drafted, one_line_error, random_sequences, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import drafting

from sdsat.config import ALL_STRATEGIES, DecodeConfig, SamplingConfig, SatConfig, TrainConfig
from sdsat.decoding.decoder import Decoder
from sdsat.engines.base import PassInput
from sdsat.method.layout import SatGroup
from sdsat.method.tree import make_tree
from sdsat.method.vocabulary import OtherTokens, most_used
from sdsat.models.adapter import CONFIG_FILE, load
from sdsat.models.sat_model import SatModel
from sdsat.training.evaluate import among_best
from sdsat.training.loop import train
from sdsat.training.loss import IGNORED

IDS = (0, 3, 7, *range(20, 53))
# What the native engine takes.
WHOLE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
PROMPT = [1, 5, 9, 2, 5, 33, 60, 5]


@given(st.lists(st.lists(st.integers(0, 12), max_size=30), max_size=4), st.integers(1, 14))
def test_the_tokens_that_texts_use_most(texts, size):
    counts = Counter(token for text in texts for token in text)
    want = sorted(sorted(counts, key=lambda token: (-counts[token], token))[:size])
    assert (
        most_used([torch.tensor(text, dtype=torch.long) for text in texts], size).tolist() == want
    )


@given(st.lists(st.lists(st.integers(0, 20), max_size=9), min_size=1), st.sets(st.integers(0, 20)))
def test_other_tokens_of_a_text_come_once(parts, vocabulary):
    others = OtherTokens(torch.tensor(sorted(vocabulary), dtype=torch.long), parts[0])
    for part in parts[1:]:
        others.add(part)
    text = dict.fromkeys(token for part in parts for token in part)
    assert others.ids.tolist() == [token for token in text if token not in vocabulary]


def with_vocabulary(dtype=torch.float32, native=True, draft_ids=IDS):
    lm = tiny_llama(dtype, **WHOLE)
    return drafting(lm, native=native, k=4, head=6, strength=0.3, draft_ids=draft_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounded", [False, True])
@torch.inference_mode()
def test_a_native_pass_leaves_out_the_other_tokens_and_nothing_else(dtype, rounded):
    """To the last bit, against a pass without a draft vocabulary."""
    found = []
    for ids in (IDS, ()):
        engine = with_vocabulary(dtype, draft_ids=ids).engine
        caches = [engine.new_cache(64) for _ in range(2)]
        for cache in caches:
            engine.prefill(cache, torch.tensor(PROMPT[:-1]))
        tree = make_tree((2, 1), 2)
        tokens = [5, 7, 8, 9, 10][: len(tree)]
        groups = ((SatGroup(0, 4),), (SatGroup(1, 2), SatGroup(2, 4)))
        parts = [
            PassInput(cache, tokens, tree, group)
            for cache, group in zip(caches, groups, strict=True)
        ]
        found.append(engine.forward(parts, rounded=rounded))
    own, whole = found
    assert torch.equal(own.states, whole.states)
    assert own.sat_logits.shape == (10, len(IDS))
    assert torch.equal(own.sat_logits, whole.sat_logits[:, IDS])
    if rounded:
        assert torch.equal(own.logits[:, IDS], whole.logits[:, IDS])
        rest = sorted(set(range(VOCAB)) - set(IDS))
        assert own.logits[:, rest].isneginf().all()
    else:
        assert torch.equal(own.logits, whole.logits)


@pytest.mark.parametrize("native", [True, False], ids=["native", "transformers"])
@pytest.mark.parametrize("strategy", ["two-step", "one-pass", "rounded"])
def test_sats_guess_among_the_vocabulary_and_the_text_so_far(native, strategy, monkeypatch):
    """And their logits are those that they would have over all tokens."""
    if strategy == "rounded" and not native:
        pytest.skip("transformers' modules have no rounded weights")
    decoder = with_vocabulary(native=native)
    model = decoder.model
    config = DecodeConfig(4, 40, "chain", strategy=strategy, lookup=0)
    seen = []
    draft = type(decoder.engine).draft

    def spy(engine, guesses, tree):
        seen.append(guesses)
        return draft(engine, guesses, tree)

    monkeypatch.setattr(type(decoder.engine), "draft", spy)
    out = decoder.generate(PROMPT, config)
    assert out.token_ids == decoder.generate(PROMPT, DecodeConfig(0, 40)).token_ids
    text = PROMPT + out.token_ids
    others = set()
    for guesses in seen:
        ids = guesses.ids.tolist()
        assert tuple(ids[: len(IDS)]) == IDS
        assert len(set(ids)) == len(ids)
        assert set(PROMPT) - set(IDS) <= set(ids[len(IDS) :]) <= set(guesses.text.tolist())
        others |= set(ids[len(IDS) :])
        exact = model.lm.get_output_embeddings()(guesses.states)[:, guesses.ids]
        near = dict(rtol=0.1, atol=0.5) if strategy == "rounded" else dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(guesses.logits, exact, **near)
    assert set(PROMPT) - set(IDS) < others <= set(text)


@pytest.mark.parametrize("native", [True, False], ids=["native", "transformers"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_outputs_do_not_depend_on_the_vocabulary(native, data):
    """Batches of all strategies, greedy and sampled, against plain decoding."""
    draft_ids = data.draw(st.sets(st.integers(0, VOCAB - 1), min_size=2, max_size=20))
    decoder = with_vocabulary(torch.float32, native, tuple(sorted(draft_ids)))
    strategies = ["two-step", "one-pass", *(["rounded"] if native else [])]
    configs = [
        DecodeConfig(
            data.draw(st.integers(1, 4)),
            12,
            data.draw(st.sampled_from(["chain", (2, 2), "grown"] if native else ["chain"])),
            data.draw(st.sampled_from([SamplingConfig(), SamplingConfig(1.0, 9, 0.9, 3)])),
            strategy=data.draw(st.sampled_from(strategies)),
            lookup=data.draw(st.sampled_from([0, 4])),
        )
        for _ in range(3)
    ]
    outs = decoder.generate_batch([PROMPT] * 3, configs, batch_size=2)
    plain = [DecodeConfig(0, 12, sampling=config.sampling) for config in configs]
    want = decoder.generate_batch([PROMPT] * 3, plain)
    assert [out.token_ids for out in outs] == [out.token_ids for out in want]


@pytest.mark.parametrize("engine", ["native", "transformers"])
@torch.inference_mode()
def test_a_sat_that_is_a_token_is_never_guessed(engine):
    """A checkpoint whose SAT is in its vocabulary; that token's logits are the largest of all."""
    lm = tiny_llama(torch.float32, **WHOLE)
    sat = SatConfig(VOCAB - 1, 4)
    states = lm.base_model(torch.tensor([[*PROMPT, *[sat.token_id] * 4]])).last_hidden_state[0]
    lm.get_output_embeddings().weight[sat.token_id] = states.sum(0)
    engine = Decoder(SatModel(lm, None, "tiny", sat), engine).engine
    for rounded in {False, engine.has_rounded}:
        cache = engine.new_cache(64)
        engine.prefill(cache, torch.tensor(PROMPT[:-1]))
        root = PassInput(cache, PROMPT[-1:], make_tree("chain", 0), (SatGroup(0, 4),))
        out = engine.forward([root], rounded=rounded)
        for logits in (out.logits, out.sat_logits):
            assert logits[:, sat.token_id].isneginf().all()
            assert logits[:, : sat.token_id].isfinite().all()


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize("strategy", ALL_STRATEGIES)
def test_a_sat_for_each_depth(engine, strategy):
    """Their logits are what the checkpoint itself says of these tokens; none is ever emitted."""
    lm = tiny_llama(torch.float32, **WHOLE)
    ids = (60, 3, 41)
    sat = SatConfig.of(ids, 4)
    assert sat.ids(2) == [60, 3] and sat.ids(5) == [60, 3, 41, 41, 41]
    decoder = Decoder(SatModel(lm, None, "tiny", sat), engine)
    prompt = [1, 5, 9, 2, 5, 33, 5]
    cache = decoder.engine.new_cache(64)
    decoder.engine.prefill(cache, torch.tensor(prompt[:-1]))
    groups = (SatGroup(0, 4), SatGroup(1, 2))
    root = PassInput(cache, [5, 7], make_tree("chain", 1), groups)
    found = decoder.engine.forward([root]).sat_logits
    want = torch.cat(
        [lm(torch.tensor([prompt + more])).logits[0, -count:] for more, count in (
            ([60, 3, 41, 41], 4), ([7, 60, 3], 2)
        )]
    )  # fmt: skip
    want[:, list(ids)] = -torch.inf
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    if strategy in decoder.strategies:
        lm.get_output_embeddings().weight[list(ids)] *= 30  # the likeliest of all, half the time
        out = decoder.generate(prompt, drafted(strategy, 4, 4, 20))
        assert out.token_ids == decoder.generate(prompt, DecodeConfig(0, 20)).token_ids
        assert not {*out.token_ids} & {*ids}


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_an_output_layer_that_lost_tokens_of_the_vocabulary(engine):
    lm = tiny_llama(torch.float32, **WHOLE)
    decoder = Decoder(adapted(lm, k=4, draft_ids=IDS), engine)
    config = DecodeConfig(4, 6, "chain", strategy="two-step")
    plain = DecodeConfig(0, 6)
    for size in (VOCAB + 9, IDS[-1] + 1):
        lm.resize_token_embeddings(size, mean_resizing=False)
        prompt = [*PROMPT[:4], size - 1]
        want = decoder.generate(prompt, plain).token_ids
        assert decoder.generate(prompt, config).token_ids == want
    lm.resize_token_embeddings(IDS[-1])
    with one_line_error("draft_ids", f"below {IDS[-1]}", f"from {IDS[0]} to {IDS[-1]}"):
        decoder.generate(PROMPT[:4], config)


def test_a_token_that_no_sat_can_guess_is_not_among_the_best():
    """Nor where fewer can be guessed than are counted as the best."""

    def only_zero(batch):
        logits = torch.full((int((batch.label != IGNORED).sum()), VOCAB), -torch.inf)
        return logits.index_fill(1, torch.tensor([0]), 0.0)

    found = among_best(only_zero, random_sequences([9, 12]), 2, torch.device("cpu"))
    assert set(found["accepted_of_best"].values()) == {0.0}


def trained(out, **settings):
    """Train on texts of ten tokens, of which 0 is the most frequent, 9 the least."""
    data = [replace(s, ids=(s.ids * s.ids) % 10) for s in random_sequences([24] * 12)]
    settings = dict(steps=2, k=2, rank=2, head=4, anchors=4, held_out=2, eval_every=2) | settings
    config = TrainConfig(**settings)
    train(SatModel(tiny_llama(torch.float32), None, "tiny"), data, out, config)
    return data, load(tiny_llama(torch.float32), out)


def test_training_takes_the_data_s_most_frequent_tokens_and_keeps_them(tmp_path):
    data, adapter = trained(tmp_path / "first", draft_vocabulary=3)
    counts = Counter(token for sequence in data[:-2] for token in sequence.ids.tolist())
    raw = json.loads((tmp_path / "first" / CONFIG_FILE).read_text())
    assert raw["draft_vocabulary"] == 3
    ids = adapter.draft_ids.tolist()
    assert len(ids) == 3 and ids == sorted(ids)
    assert min(counts[token] for token in ids) >= max(
        count for token, count in counts.items() if token not in ids
    ) - sum(len(s.ids) for s in data[-2:])
    first = str(tmp_path / "first")
    with one_line_error("draft_vocabulary=5", f"{first} has one of 3 tokens"):
        trained(tmp_path / "refused", init=first, draft_vocabulary=5)
    _, second = trained(tmp_path / "second", init=first)
    assert second.draft_ids.tolist() == ids
    _, fewer = trained(tmp_path / "fewer", draft_vocabulary=60)
    assert fewer.draft_ids.tolist() == sorted({t for s in data for t in s.ids.tolist()})
    for size in (0, VOCAB):
        _, whole = trained(tmp_path / str(size), draft_vocabulary=size)
        assert whole.draft_ids is None and whole.config.draft_vocabulary == 0
    with one_line_error("draft_vocabulary=5", "only for mode adapter"):
        TrainConfig(mode="full", draft_vocabulary=5)
