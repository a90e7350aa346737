"""Batches: every output, and what it cost, is what that prompt alone gives, whatever stands beside
it, enters and leaves.
"""

import importlib
import json
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from common import CHARACTERS, drafted, forward, one_line_error, tiny_llama, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import EXACT, NUCLEUS, WHOLE, drafting
from test_families import ADAPTED, narrow
from test_native import passes
from test_planner import curve
from transformers import AutoModelForCausalLM

from sdsat.config import LOOKUP, MAX_ROWS, STRATEGIES, DecodeConfig, InputError, SamplingConfig
from sdsat.decoding.auto_planner import AutoPlanner
from sdsat.decoding.decoder import Decoder
from sdsat.engines.base import PassInput
from sdsat.engines.transformers import SharedCaches
from sdsat.method.costs import CONTEXTS
from sdsat.method.drafts import Drafts
from sdsat.method.layout import batch_layout
from sdsat.method.tree import make_tree
from sdsat.models import attention

VOCAB = 64
SAT = 64
K = 4
ENGINES = {
    "native, float32": (True, torch.float32),
    "native, bfloat16": (True, torch.bfloat16),
    "modules, float32": (False, torch.float32),
}
# Where logits are compared: through modules a pass over many rounds otherwise than one alone, and a
# random model makes of that what float32 has no bound for.
PRECISE = {"modules, float64": (False, torch.float64)}
PROMPTS = [[1, 5, 9, 2, 7], [3], [8, 4, 4, 11, 60, 2, 9, 33, 17, 5, 6], [1, 5, 9, 2, 7], [7] * 30]


@cache
def decoder_with(engine, head=6):
    native, dtype = (ENGINES | PRECISE)[engine]
    decoder = drafting(tiny_llama(dtype, **WHOLE), native=native, k=K, head=head)
    decoder.model.tokenizer = tiny_tokenizer(CHARACTERS)
    return decoder


def strategies(engine):
    return (LOOKUP, *(STRATEGIES if ENGINES[engine][0] else EXACT))


def what_counts(out, config):
    """All of a Generation but its seconds; of `auto` and `one-pass` without a budget, which learn
    as they go, the output.
    """
    held = {name: value for name, value in asdict(out).items() if not name.endswith("seconds")}
    learns = config.strategy == "auto" or (config.strategy == "one-pass" and config.budget is None)
    return {name: held[name] for name in ("token_ids", "text", "finish")} if learns else held


def assert_as_alone(decoder, prompts, configs, **options):
    outs = decoder.generate_batch(prompts, configs, **options)
    for prompt, config, out in zip(prompts, configs, outs, strict=True):
        assert what_counts(out, config) == what_counts(decoder.generate(prompt, config), config)
        assert out.prefill_seconds > 0 and out.decode_seconds > 0
    return outs


@pytest.mark.parametrize("sampling", [SamplingConfig(), NUCLEUS], ids=["greedy", "nucleus"])
@pytest.mark.parametrize(
    ("engine", "strategy"),
    [(engine, strategy) for engine in ENGINES for strategy in strategies(engine)],
    ids=str,
)
def test_each_row_equals_that_row_alone(engine, strategy, sampling):
    for k, tree, lookup, size in ((K, "chain", 0, 5), (3, (2, 2, 1), 5, 2), (K, "grown", 0, 3)):
        budget = 24 if strategy == "one-pass" else None
        config = drafted(strategy, k, lookup, 12, tree, sampling, stop_ids=(9,), budget=budget)
        configs = [replace(config, max_new_tokens=4 + 2 * i) for i in range(len(PROMPTS))]
        assert_as_alone(decoder_with(engine), PROMPTS, configs, batch_size=size)


@st.composite
def requests(draw, engine):
    sampling = SamplingConfig(
        draw(st.sampled_from([0.0, 0.7, 1.3])),
        draw(st.sampled_from([0, 5])),
        seed=draw(st.integers(-3, 3)),
    )
    config = drafted(
        draw(st.sampled_from(strategies(engine))),
        draw(st.integers(0, K)),
        draw(st.sampled_from([0, 4])),
        draw(st.integers(1, 14)),
        draw(st.just("grown") | st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)),
        sampling,
        tuple(draw(st.sets(st.integers(0, VOCAB - 1), max_size=2))),
        ("ab",) if draw(st.booleans()) else (),
        budget=draw(st.integers(4, 32)),
    )
    return draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)), config


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_prompts_with_any_settings_at_once(engine, data):
    prompts, configs = zip(
        *data.draw(st.lists(requests(engine), min_size=1, max_size=6)), strict=True
    )
    assert_as_alone(decoder_with(engine), prompts, configs, batch_size=data.draw(st.integers(1, 6)))


def filled(decoder, contexts):
    caches = decoder.engine.batch_caches(len(contexts), 256)
    return caches, caches.enter(contexts, [256] * len(contexts))


@pytest.mark.parametrize("engine", ["native, float32", "native, bfloat16", *PRECISE])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
@torch.inference_mode()
def test_rows_of_a_pass_over_many_have_the_logits_that_they_have_alone(engine, data):
    """After each pass a path is kept, and sequences leave: natively, to the last bit."""
    decoder = decoder_with(engine)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    contexts = [
        data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=70))
        for _ in range(data.draw(st.integers(2, 4)))
    ]
    contexts.insert(data.draw(st.integers(0, 1)), contexts[0])  # two that are read once
    room, caches = filled(decoder, contexts)
    alone = [filled(decoder, [context])[1][0] for context in contexts]
    while caches:
        parts = []
        for held in caches:
            tree, groups = data.draw(passes(6))
            tokens = torch.randint(VOCAB, (len(tree),), generator=generator).tolist()
            parts.append(PassInput(held, tokens, tree, groups))
        out = decoder.engine.forward(parts)
        states, logits = out.states, torch.cat([out.logits, out.sat_logits])
        node = 0
        sat = sum(len(part.tokens) for part in parts)
        for part, cache_alone in zip(parts, alone, strict=True):
            tokens = torch.tensor([*part.tokens, *[SAT] * part.num_sats])
            rows = [*range(node, node + len(part.tokens)), *range(sat, sat + part.num_sats)]
            for got, want in zip(
                (states, logits),
                forward(decoder, cache_alone, tokens, part.tree, part.groups),
                strict=True,
            ):
                if decoder.engine.exact_trees:
                    assert torch.equal(got[rows], want)
                else:
                    torch.testing.assert_close(got[rows], want, rtol=1e-10, atol=1e-10)
            node = node + len(part.tokens)
            sat = sat + part.num_sats
            path = [0]
            while children := part.tree.children()[path[-1]]:
                path.append(children[0])
            part.cache.commit(tuple(path))
            cache_alone.commit(tuple(path))
        gone = data.draw(st.integers(0, len(caches) - 1))
        room.leave(caches.pop(gone))
        alone.pop(gone)


def test_layout_of_a_pass():
    """One sequence brings x and a draft with a SAT at it, the other x with two SATs; one row is
    padding.
    """
    shapes = [(make_tree("chain", 1), ((1, 1),)), (make_tree("chain", 0), ((0, 2),))]
    layout = batch_layout(shapes, 7, torch.device("cpu"))
    # nodes, nodes, nodes, SAT, SATs, padding
    assert layout.sequences.tolist() == [
        0,
        0,
        1,
        0,
        1,
        1,
        1,
    ]
    assert layout.places.tolist() == [0, 1, 0, 2, 1, 2, 3]
    assert layout.offsets.tolist()[:6] == [0, 1, 0, 2, 1, 2]
    assert layout.within.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 1, 0, 0],
        [0, 0, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("family", ADAPTED)
def test_windows_and_caps_in_batches(family):
    """Generations run far past the windows of these models."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(narrow(family)).eval().requires_grad_(False)
    lm.set_attn_implementation(attention.NAME)
    decoder = drafting(lm, k=3)
    vocab = lm.config.vocab_size - 1
    prompts = [[token % vocab for token in prompt] for prompt in PROMPTS[:3]]
    for strategy in EXACT:
        assert_as_alone(
            decoder,
            prompts,
            [DecodeConfig(3, 8 + 3 * i, (2, 1), strategy=strategy) for i in range(3)],
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_one_prompt_with_many_seeds(engine):
    configs = [DecodeConfig(K, 12, sampling=replace(NUCLEUS, seed=seed)) for seed in range(6)]
    outs = assert_as_alone(decoder_with(engine), [PROMPTS[0]] * 6, configs)
    assert len({tuple(out.token_ids) for out in outs}) == 6


@pytest.mark.parametrize("engine", ENGINES)
def test_waiting_prompts_enter_as_others_leave(engine, monkeypatch):
    decoder = decoder_with(engine)
    counts = []
    events = {}
    kind = type(decoder.engine)
    real = kind.forward

    def counted(self, inputs, *rest, **named):
        counts.append(len(inputs))
        return real(self, inputs, *rest, **named)

    def on_tokens(number, tokens, drafted):
        assert len(tokens) == len(drafted)
        events.setdefault(number, []).append((len(counts), tokens))

    monkeypatch.setattr(kind, "forward", counted)
    limits = [12, 3, 11, 4, 7]
    ended = [
        number
        for number, _ in decoder.iterate_batch(
            PROMPTS, [DecodeConfig(0, n) for n in limits], batch_size=2
        )
    ]
    assert ended == [1, 0, 2, 3, 4]
    assert counts == [2] * 16 + [1] * 5  # passes 1-12, 1-3, 4-14, 13-16 and 15-21
    outs = decoder.generate_batch(
        PROMPTS, [DecodeConfig(0, n) for n in limits], on_tokens, batch_size=2
    )
    for number, out in enumerate(outs):
        assert len(out.token_ids) == limits[number]
        assert [token for _, tokens in events[number] for token in tokens] == out.token_ids
    assert [events[2][0][0] - events[1][-1][0], events[3][0][0] - events[0][-1][0]] == [1, 1]


@pytest.mark.parametrize("engine", ["native, bfloat16", "modules, float32"])
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_what_arrives_while_others_go_on_is_as_alone(engine, data):
    """And whatever is ended by its caller is the beginning of that."""
    decoder = decoder_with(engine)
    asked = dict(enumerate(data.draw(st.lists(requests(engine), min_size=1, max_size=7))))
    leaves = {number: data.draw(st.none() | st.integers(1, 6)) for number in asked}
    size = data.draw(st.integers(1, 4))
    coming = list(asked)
    told = {number: [] for number in asked}
    free_places = []

    def arrivals(free):
        free_places.append(free)
        count = data.draw(st.integers(0, free)) if free < size else free  # none would end it
        come, coming[:] = coming[:count], coming[count:]
        return [decoder.request(number, *asked[number]) for number in come]

    def on_tokens(number, tokens, drafted):
        told[number] += tokens
        return leaves[number] is not None and len(told[number]) >= leaves[number]

    outs = {}
    for number, out in decoder.iterate_arrivals(arrivals, 32, on_tokens, size):
        assert number not in outs
        outs[number] = out
    assert outs.keys() == asked.keys() and min(free_places) >= 1
    for number, out in outs.items():
        alone = decoder.generate(*asked[number])
        assert out.token_ids == told[number] == alone.token_ids[: len(out.token_ids)]
        if out.finish == "caller":
            assert len(out.token_ids) >= leaves[number]
        else:
            assert (out.token_ids, out.text, out.finish) == (
                alone.token_ids,
                alone.text,
                alone.finish,
            )


def test_a_caller_ends_its_output_and_no_other():
    decoder = decoder_with("native, float32")
    config = DecodeConfig(0, 12)
    outs = decoder.generate_batch(PROMPTS[:2], config, lambda number, *_: number == 1)
    alone = [decoder.generate(prompt, config) for prompt in PROMPTS[:2]]
    assert outs[0].token_ids == alone[0].token_ids and outs[0].finish == "length"
    assert outs[1].token_ids == alone[1].token_ids[:1] and outs[1].finish == "caller"
    assert outs[1].text and alone[1].text.startswith(outs[1].text)


def test_of_many_places_several_are_filled_at_once(monkeypatch):
    decoder = decoder_with("modules, float32")
    seen = []
    prompts = [[1 + i % 60] * (1 + i % 5) for i in range(80)]
    configs = [DecodeConfig(0, 1 + i % 4) for i in range(80)]
    plain = SharedCaches.enter

    def enter(caches, prompts, slots):
        seen.append(len(prompts))
        return plain(caches, prompts, slots)

    monkeypatch.setattr(SharedCaches, "enter", enter)
    outs = decoder.generate_batch(prompts, configs, batch_size=40)
    assert seen[0] == 40 and all(count >= 3 for count in seen[:-1]) and sum(seen) == 80
    assert [out.token_ids for out in outs] == [
        decoder.generate(*each).token_ids for each in zip(prompts, configs, strict=True)
    ]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [2, 6])
def test_answers_to_one_prompt_share_its_pass(engine, size, monkeypatch):
    """And are those of each alone, though some need more room and some wait for others."""
    prompts = [prompt for prompt in ([5, 9] * 35, [8, 4, 11], [3]) for _ in range(3)]
    sampling = [SamplingConfig(1.3 * (i % 3 > 0), seed=i) for i in range(9)]
    configs = [
        DecodeConfig(i % 2 * K, 5 + 10 * (i % 3), sampling=each) for i, each in enumerate(sampling)
    ]
    kind = type(decoder_with(engine).engine)
    _ = decoder_with(engine).engine.row_policy  # looking for it reads a text of its own
    read = []
    plain = kind.prefill

    def prefill(self, cache, tokens, *further):
        if len(tokens):
            read.append(tokens.shape)
        plain(self, cache, tokens, *further)

    monkeypatch.setattr(kind, "prefill", prefill)
    decoder_with(engine).generate_batch(prompts, configs, batch_size=size)
    sequences = sum(shape[0] if len(shape) > 1 else 1 for shape in read)
    # a native one reads no last tokens, and the third prompt is nothing else
    assert sequences == 2 if ENGINES[engine][0] else 3 <= sequences < 9
    assert_as_alone(decoder_with(engine), prompts, configs, batch_size=size)


def test_nothing_to_do_and_more_room_than_prompts():
    decoder = decoder_with("native, float32")
    assert decoder.generate_batch([], DecodeConfig(0, 5)) == []
    (out,) = decoder.generate_batch([PROMPTS[0]], DecodeConfig(2, 5), batch_size=8)
    assert out.token_ids == decoder.generate(PROMPTS[0], DecodeConfig(0, 5)).token_ids


def test_bad_input_names_the_prompt_and_nothing_is_decoded(monkeypatch):
    decoder = decoder_with("modules, float32")
    monkeypatch.setattr("sdsat.decoding.decoder.Loop", None)
    with one_line_error("prompts[1]: prompt: no tokens"):
        decoder.generate_batch([[1], [], [2]], DecodeConfig(0, 5))
    with one_line_error("prompts[2]: prompt: token id 99 is not in the model's vocabulary of 64"):
        decoder.generate_batch([[1], [2], [99]], DecodeConfig(0, 5))
    with one_line_error("prompts[0]: max_new_tokens=510"):
        decoder.generate_batch(PROMPTS, [DecodeConfig(0, 510), *[DecodeConfig(0, 5)] * 4])
    with one_line_error("prompts[1]: strategy=rounded"):
        decoder.generate_batch(
            PROMPTS[:2], [DecodeConfig(2, 5), DecodeConfig(2, 5, strategy="rounded")]
        )
    for arguments, message in [
        ((5, DecodeConfig()), "prompts=5"),
        (([[1, "x"]], DecodeConfig()), "prompts[0]: prompt: token id 'x'"),
        (([[1, True]], DecodeConfig()), "prompts[0]: prompt: token id True"),
        ((["ab"], DecodeConfig()), "prompts[0]: prompt='ab'"),
        (([[1]], 5), "configs=5"),
        (([[1]], [5]), "prompts[0]: config=5"),
        (([[1]], DecodeConfig(), 5), "on_tokens=5"),
        (([[1]], DecodeConfig(), None, "x"), "batch_size='x'"),
        (([[1]], DecodeConfig(), None, 0), "batch_size=0"),
        (([[1]], DecodeConfig(), None, 2, 5), "choosers=5"),
        (([[1]], DecodeConfig(), None, 2, []), "choosers: 0; expected a list of 1"),
        (([[1]], DecodeConfig(), None, 2, [5]), "choosers=5"),
    ]:
        with one_line_error(message):
            decoder.iterate_batch(*arguments)
    with one_line_error("chooser=5", "expected a function"):
        decoder.generate([1], DecodeConfig(), chooser=5)
    with one_line_error("model=5", "expected a SatModel"):
        Decoder(5)
    with one_line_error("configs: 2 for 5 prompts"):
        decoder.generate_batch(PROMPTS, [DecodeConfig(0, 5)] * 2)
    with pytest.raises(InputError, match=r"^batch_size=0: expected 1 or more$"):
        decoder.generate_batch(PROMPTS, DecodeConfig(0, 5), batch_size=0)


# ---- what `auto` makes of batches ----

# As on a CPU: rows are nearly free up to some number, then each adds as much.
KNEE = curve(
    lambda n: 1 + 0.02 * n + 0.1 * max(0, n - 8),
    rounded=lambda n: 0.7 + 0.02 * n + 0.08 * max(0, n - 8),
)


def test_a_share_of_a_pass_in_which_all_do_as_much():
    planner = AutoPlanner(DecodeConfig(5, strategy="auto"), KNEE, 5, [0.6] * 5)
    alone = [planner.costs.seconds(n, 0, 100) for n in (1, 4)]
    planner.share(8, 100)
    assert (
        planner.costs.seconds(1, 0, 100) == pytest.approx(KNEE.seconds(8, 0, 100) / 8)
        and planner.costs.seconds(1, 0, 100) < alone[0]
    )
    assert planner.costs.seconds(4, 0, 100) == pytest.approx(KNEE.seconds(32, 0, 100) / 8)
    assert (
        planner.costs.seconds(4, 0, 100) / planner.costs.seconds(1, 0, 100)
        > 2
        > alone[1] / alone[0]
    )
    planner.share(1, 100)
    assert [planner.costs.seconds(n, 0, 100) for n in (1, 4)] == alone
    for context in CONTEXTS:  # beyond the table in proportion
        assert KNEE.seconds(3 * MAX_ROWS, 0, context) == pytest.approx(
            3 * KNEE.seconds(MAX_ROWS, 0, context)
        )
        assert KNEE.rounded_seconds(2 * MAX_ROWS - 1, context) == pytest.approx(
            2 * KNEE.rounded_seconds(MAX_ROWS - 1, context)
        )


@pytest.mark.parametrize("costs", [KNEE, replace(KNEE, rounded=[])], ids=["rounded", "exact"])
def test_with_growing_batches_auto_goes_over_to_plain_passes(costs):
    def drafts_now(batch):
        planner = AutoPlanner(DecodeConfig(5, strategy="auto"), costs, 5, [0.5] * 5)
        planner.share(batch, 100)
        none = Drafts.none(0)
        return bool(planner.draft_first(none, 100, 100) or planner.plan(none, 100, 100).groups)

    found = [drafts_now(batch) for batch in (1, 2, 4, 8, 16, 32, 64)]
    assert found[0] and not found[-1] and found == sorted(found, reverse=True)


def test_of_a_batch_where_nothing_pays_one_sequence_tries_again_now_and_then():
    costs = curve(lambda n: 1.0 * n, rounded=lambda n: 0.9 * n)
    planner = AutoPlanner(DecodeConfig(5, strategy="auto", lookup=0), costs, 5, [0.1] * 5)
    tried = 0
    for _ in range(500):
        planner.share(16, 100)
        sizes = [planner.draft_first(Drafts.none(0), 100, 100) for _ in range(16)]
        assert sum(map(bool, sizes)) <= 1
        tried += sum(map(bool, sizes))
        every = [
            Drafts.of_rounded(0, make_tree("chain", n), [0] * (n + 1), [0.1] * (n + 1))
            if n
            else Drafts.none(0)
            for n in sizes
        ]
        plans = [planner.plan(drafts, 100, 100) for drafts in every]
        for drafts, plan in zip(every, plans, strict=True):
            planner.observe(drafts.kept(plan.nodes), plan, [0])
        planner.observe_pass(16, 0, 100, costs.seconds(16, 0, 100, 16))
    assert tried == 3  # after 48 passes, 96 more, 192 more


def test_sequences_of_one_batch_share_what_auto_learns():
    decoder = decoder_with("native, float32")
    decoder.planners.clear()
    decoder.generate_batch(PROMPTS, DecodeConfig(K, 12, strategy="auto"))
    (planner,) = decoder.planners.kept.values()
    assert planner.costs.num_timed > 3


def test_what_is_learned_of_many_temperatures_is_not_kept_for_ever():
    """A server may be asked with another one each time."""
    decoder = decoder_with("native, float32")
    for number in range(40):
        sampling = SamplingConfig(temperature=0.5 + number / 100)
        decoder.planner(decoder.resolved(DecodeConfig(K, strategy="auto", sampling=sampling)))
    assert len(decoder.planners.kept) == 32
    decoder.planners.clear()


# ---- scripts/batch_throughput.py ----


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("batch_throughput")


def test_throughput_script(script, tmp_path, monkeypatch, capsys):
    # the engine is compiled before the cache folder, for the cost curve, is another
    decoder_with("native, float32")
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tiny"
    out = tmp_path / "results" / "batch.json"
    tiny_llama(torch.float32, max_position_embeddings=4096, **WHOLE).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "sdsat": {"sat_token_id": 63, "k": 3}})
    )
    tiny_tokenizer(CHARACTERS).save_pretrained(folder)

    def measure(**changes):
        options = dict(
            sizes="2,1",
            strategy=["two-step:2", "auto"],
            prompts=3,
            max_new_tokens=5,
            turns=1,
            dtype="float32",
        )
        script.main(str(folder), **{**options, **changes}, device="cpu", out=out)
        return json.loads(out.read_text())

    # auto, and what it is made of
    document = measure()
    names = ("ar", "two-step:2", "lookup", "auto:lookup=0", "auto")
    assert [(run["batch_size"], run["strategy"]) for run in document["runs"]] == [
        *((1, name) for name in names), *((2, name) for name in (*names[1:], "ar")),
    ]  # fmt: skip
    rows = document["summary"]["rows"]
    assert [(row["batch_size"], row["strategy"]) for row in rows] == [
        (n, s) for n in (1, 2) for s in names
    ]
    assert all(row["identical_outputs"] == 3 and row["tokens_per_second"] > 0 for row in rows)
    assert rows[0]["over_ar"] == rows[5]["over_ar"] == rows[0]["over_first_ar"] == 1
    assert set(document["summary"]["stops_paying_at"]) == {*names[1:]}
    assert document["environment"]["engine"] == "native" and "two-step:2" in capsys.readouterr().out
    assert measure() == document  # nothing is measured again
    with one_line_error(out, "max_new_tokens=5, now it is 6"):
        measure(max_new_tokens=6)
    for changes, words in (
        (dict(sizes="1,0"), "--sizes=1,0"),
        (
            dict(strategy=["two-step:x"]),
            "strategy=two-step:x: expected NAME, NAME:K or NAME:lookup=N",
        ),
        (dict(strategy=["ar"]), "--strategy=ar: one is there twice, or is ar"),
    ):
        with one_line_error(words):
            measure(**changes)


def test_where_strategies_stop_paying_is_read_off_the_figures(script):
    seconds = {
        ("ar", 1): 1.0,
        ("ar", 4): 0.5,
        ("two-step:3", 1): 0.5,
        ("two-step:3", 4): 0.625,
        ("auto", 1): 0.5,
        ("auto", 4): 0.4,
    }
    runs = [
        {
            "turn": turn,
            "batch_size": size,
            "strategy": name,
            "seconds": taken * (1 + turn),
            "num_new_tokens": 10,
            "num_passes": 5,
            "outputs_sha256": ["a", "b" if name == "ar" else "c"],
        }
        for (name, size), taken in seconds.items()
        for turn in (0, 1)
    ]
    found = script.summarize(
        {"settings": {"sizes": [1, 4], "strategies": ["ar", "two-step:3", "auto"]}, "runs": runs}
    )
    assert found["stops_paying_at"] == {"two-step:3": 4, "auto": None}
    rows = {(row["strategy"], row["batch_size"]): row for row in found["rows"]}
    assert rows["two-step:3", 4]["over_ar"] == pytest.approx(0.8) and rows["two-step:3", 4][
        "over_first_ar"
    ] == pytest.approx(1.6)
    assert rows["ar", 4]["identical_outputs"] == 2 and rows["auto", 4]["identical_outputs"] == 1
    assert rows["ar", 4]["tokens_per_second"] == pytest.approx(20 / 1.5, abs=0.01)
    assert [rows[name, 4]["identical_outputs"] for name in ("ar", "auto")] == [2, 1]


def test_a_prompt_may_be_a_tuple():
    decoder = decoder_with("native, float32")
    for k in (0, K):
        config = DecodeConfig(k, 9)
        want = [decoder.generate(prompt, config).token_ids for prompt in PROMPTS]
        tuples = [tuple(prompt) for prompt in PROMPTS]
        assert [out.token_ids for out in decoder.generate_batch(tuples, config)] == want
        assert decoder.generate(tuples[0], config).token_ids == want[0]


@pytest.mark.parametrize("token", [-1, VOCAB, 10**6])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_chooser_chooses_of_the_vocabulary(engine, token):
    decoder = decoder_with(engine)
    for k in (0, K):
        with one_line_error(f"chooser: it chose token {token}", f"0 to {VOCAB - 1}"):
            decoder.generate([5], DecodeConfig(k, 5), chooser=lambda _: (token, False))
