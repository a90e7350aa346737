"""`model.generate(..., custom_generate=sdsat.generate)` against transformers' own loop, on tiny
models of three families.

The oracle is a model that transformers alone has loaded. Greedy: its plain `generate`. Sampling:
its own `_sample` with our noise as the last logits processor, which leaves one token to draw; so
its warpers and its loop judge ours.
"""

import runpy
import string
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from common import adapted, one_line_error, tiny_tokenizer
from test_families import COSTS, FAMILIES, PROMPT, SAT, VOCAB, alone, checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    WatermarkingConfig,
)

import sdsat
from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.interfaces.generate_arguments import ONLY
from sdsat.method.sampling import gumbel_noise

NUM = 16
MODELS = [
    ("llama 3", "native"),
    ("llama 3", "transformers"),
    ("qwen3", "native"),
    ("gemma 2, tied", "transformers"),
]
LETTERS = string.ascii_lowercase[:VOCAB]  # the text of a token
HOW = [
    dict(strategy="two-step"),
    dict(strategy="two-step", tree="2,2,1"),
    dict(strategy="one-pass", k=2),
    dict(strategy="auto"),
    dict(),
    dict(k=0),
]
PAD = 0


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """(family, engine) -> a model of transformers alone, and ours with its tokenizer; each is made
    once.
    """
    made = {}

    def get(name, engine):
        if name not in made:
            made[name] = checkpoint(tmp_path_factory.mktemp("family"), FAMILIES[name])
            tiny_tokenizer(LETTERS).save_pretrained(made[name])
            made[name, "alone"] = alone(made[name])
        if (name, engine) not in made:
            made[name, engine] = sdsat.load(made[name], "float32", "cpu", engine=engine)
            made[name, engine][0].sdsat.costs = COSTS
        return made[name, "alone"], *made[name, engine]

    return get


@pytest.fixture
def llama(family):
    return family("llama 3", "native")


def batch(*prompts):
    """Prompts with padding on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    return dict(
        input_ids=ids,
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    )


def plainly(lm, inputs=None, num=NUM, suppress_tokens=(), **settings):
    settings = (
        dict(
            max_new_tokens=num,
            pad_token_id=PAD,
            do_sample=False,
            suppress_tokens=[SAT, *suppress_tokens],
        )
        | settings
    )
    return lm.generate(**(inputs or batch(PROMPT)), **settings)


def drafting(model, inputs=None, num=NUM, **settings):
    settings = dict(max_new_tokens=num, pad_token_id=PAD, do_sample=False) | settings
    return model.generate(**(inputs or batch(PROMPT)), custom_generate=sdsat.generate, **settings)


class Alternating(LogitsProcessor):
    """Keeps state: at every second call it takes away the likeliest token.

    It wants one position a call, in order.
    """

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == 1 and input_ids.dtype == torch.long
        self.lengths.append(input_ids.shape[1])
        if len(self.lengths) % 2:
            scores[0, scores.argmax()] = -torch.inf  # in place, as some do
        return scores


class Sum(StoppingCriteria):
    def __init__(self, most):
        self.most = most
        self.lengths = []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids.sum(-1) > self.most


def no_two_neighbours(batch_id, ids):
    return [token for token in range(VOCAB) if abs(token - int(ids[-1])) > 1]


# 'found': ids or strings that come up in the output without settings.
GREEDY = {
    "nothing": {},
    "max_length": dict(max_new_tokens=None, max_length=len(PROMPT) + 9),
    "one new token": dict(max_new_tokens=1),
    "eos": dict(eos_token_id="found"),
    "eos, held back": dict(eos_token_id="found", min_new_tokens=13),
    "min_length": dict(eos_token_id="found", min_length=len(PROMPT) + 13),
    "length penalty": dict(eos_token_id="found", exponential_decay_length_penalty=(2, 1.5)),
    "repetition_penalty": dict(repetition_penalty=1.4),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=2),
    "bad_words_ids": dict(bad_words_ids=[[3], [4, 5], [7, 7]]),
    "suppress_tokens": dict(suppress_tokens=[2, 9]),
    "begin_suppress_tokens": dict(begin_suppress_tokens=list(range(8))),
    "sequence_bias": dict(sequence_bias=[[[3], 2.5], [[9, 4], -8.0]]),
    "forced_eos_token_id": dict(forced_eos_token_id=4),
    "invalid values, normalised": dict(remove_invalid_values=True, renormalize_logits=True),
    "encoder penalties": dict(encoder_repetition_penalty=1.3, encoder_no_repeat_ngram_size=2),
    "guidance": dict(guidance_scale=1.8),
    "watermark": dict(watermarking_config=WatermarkingConfig(bias=3.0)),
    "stop string": dict(stop_strings="found"),
    "a function of the prefix": dict(prefix_allowed_tokens_fn=no_two_neighbours),
    "a processor with state": dict(logits_processor=Alternating),
    "a criterion of one's own": dict(stopping_criteria=lambda: Sum(120)),
    "much together": dict(
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        min_new_tokens=5,
        eos_token_id="found",
        logits_processor=Alternating,
        stopping_criteria=lambda: Sum(300),
        stop_strings=["nd", "ih"],
    ),
}


@cache
def plain_output(lm):
    """The output without settings."""
    return plainly(lm)[0, len(PROMPT) :].tolist()


def made(settings, lm):
    """The settings with objects of their own, and with ends that will come up."""
    settings = dict(settings)
    if "found" in settings.values():
        new = plain_output(lm)
        # of all tokens the one that comes up last for the first time
        last = max(set(new), key=new.index)
        if settings.get("eos_token_id"):
            settings["eos_token_id"] = [last, SAT]
        if settings.get("stop_strings"):
            settings["stop_strings"] = [
                LETTERS[new[new.index(last) - 1]] + LETTERS[last],
                "no such",
            ]
    if "logits_processor" in settings:
        settings["logits_processor"] = LogitsProcessorList([settings["logits_processor"]()])
    if "stopping_criteria" in settings:
        settings["stopping_criteria"] = StoppingCriteriaList([settings["stopping_criteria"]()])
    return settings


def cases(settings, name, engine):
    """(place, name, settings): all for the native engine; through transformers' modules, which
    takes long, each for one model.
    """
    for place, (case, chosen) in enumerate(settings.items()):
        if engine == "native" or place % 2 == (name == "llama 3"):
            yield place, case, chosen


@pytest.mark.parametrize(("name", "engine"), MODELS)
def test_greedy_equals_plain_generate(family, name, engine):
    lm, model, tokenizer = family(name, engine)
    accepted = 0
    outputs = set()
    for place, case, settings in cases(GREEDY, name, engine):
        want = plainly(lm, **made(settings, lm), tokenizer=tokenizer)
        how = HOW[place % len(HOW)]
        own = made(settings, lm)
        out = drafting(model, **own, **how, return_dict_in_generate=True)
        assert torch.equal(out.sequences, want), (case, how)
        assert not out.sequences.is_inference()
        # once each position, in order
        for seen in (
            *own.get("logits_processor", ()),
            *own.get("stopping_criteria", ()),
        ):
            first = len(PROMPT) + isinstance(seen, Sum)
            assert seen.lengths == list(range(first, first + want.shape[1] - len(PROMPT))), case
        accepted += sum(out.generations[0].accepted_lengths)
        outputs.add(tuple(want[0].tolist()))
    assert accepted > 0 and len(outputs) > 5


SAMPLED = {
    "nothing": {},
    "temperature": dict(temperature=0.6),
    "top_k": dict(top_k=4),
    "top_p": dict(top_k=0, top_p=0.7),
    "all three": dict(temperature=1.4, top_k=8, top_p=0.9),
    "min_p": dict(temperature=1.3, min_p=0.1),
    "typical_p": dict(typical_p=0.6),
    "top_h": dict(top_h=0.4),
    "epsilon, eta": dict(epsilon_cutoff=0.05, eta_cutoff=0.1),
    "penalty before": dict(temperature=0.8, top_p=0.9, repetition_penalty=1.3),
    "normalised": dict(temperature=0.8, top_k=6, renormalize_logits=True),
    "watermark": dict(top_p=0.9, watermarking_config=WatermarkingConfig(bias=3.0)),
    "eos": dict(eos_token_id="found", min_new_tokens=4, top_p=0.95),
    "stop string": dict(stop_strings=["d", "hi"]),
    "a processor with state": dict(logits_processor=Alternating, temperature=1.2),
}


class Coupled(LogitsProcessor):
    """Leaves the token for which log p + noise is largest."""

    def __init__(self, seed, start):
        self.seed = seed
        self.start = start

    def __call__(self, input_ids, scores):
        index = torch.full((1,), input_ids.shape[1] - self.start)
        noise = gumbel_noise(self.seed, index, torch.arange(scores.shape[-1]))
        best = (scores.log_softmax(-1).double() + noise).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, best, 0.0)


def sampled_plainly(lm, seed, tokenizer, **settings):
    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        steps = LogitsProcessorList([*logits_processor, Coupled(seed, input_ids.shape[1])])
        return model._sample(input_ids, steps, stopping_criteria, generation_config, **kwargs)

    stop = settings.pop("stop_strings", None)
    if stop:  # transformers has no tokenizer for a callable
        settings["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(tokenizer, stop)])
    return plainly(lm, do_sample=True, custom_generate=loop, **settings)


@pytest.mark.parametrize(("name", "engine"), MODELS)
def test_sampling_equals_transformers_loop_with_the_same_noise(family, name, engine):
    lm, model, tokenizer = family(name, engine)
    accepted = 0
    for place, case, settings in cases(SAMPLED, name, engine):
        want = sampled_plainly(lm, place, tokenizer, **made(settings, lm))
        for how in (HOW[place % len(HOW)], dict(k=0)):
            out = drafting(
                model,
                **made(settings, lm),
                **how,
                do_sample=True,
                seed=place,
                return_dict_in_generate=True,
            )
            assert torch.equal(out.sequences, want), (case, how)
            accepted += sum(out.generations[0].accepted_lengths)
    assert accepted > 0


def test_plain_sampling_equals_decode_generate(llama):
    _, model, _ = llama
    ours = drafting(model, do_sample=True, temperature=0.7, top_k=6, top_p=0.9, seed=11)
    config = DecodeConfig(0, NUM, sampling=SamplingConfig(0.7, 6, 0.9, 11))
    assert ours[0, len(PROMPT) :].tolist() == model.sdsat.generate(PROMPT, config).token_ids


PROMPTS = ([1, 5, 9, 2, 7, 3, 12], [4, 8], [6, 6, 11, 2, 13, 1, 5, 9, 9, 2])


@pytest.mark.parametrize(("name", "engine"), MODELS)
@pytest.mark.parametrize(
    "case",
    ["nothing", "eos", "eos, held back", "repetition_penalty", "sequence_bias", "stop string"],
)
def test_batches_with_padding(family, name, engine, case):
    lm, model, tokenizer = family(name, engine)
    settings = made(GREEDY[case], lm)
    if case == "stop string":
        settings["eos_token_id"] = (
            14  # without one, transformers goes on with sequences that a string has ended
        )
    want = plainly(lm, batch(*PROMPTS), **settings, tokenizer=tokenizer)
    assert torch.equal(drafting(model, batch(*PROMPTS), **settings), want)


@pytest.mark.parametrize(
    "settings",
    [
        dict(repetition_penalty=1.7),
        dict(no_repeat_ngram_size=1),
        dict(bad_words_ids=[[PAD, 8], [8, PAD]]),
    ],
)
def test_what_processors_see_of_a_batch_is_what_they_see_in_plain_generate(llama, settings):
    """Padding, too: where it is the end token, a padded row may go on longer than it does alone.

    Without them it may not.
    """
    lm, model, _ = llama
    inputs = batch(PROMPT, [8])
    settings = settings | dict(eos_token_id=PAD)
    assert torch.equal(drafting(model, inputs, **settings), plainly(lm, inputs, **settings))
    rows = drafting(model, inputs, eos_token_id=PAD)
    for row, prompt in zip(rows, (PROMPT, [8]), strict=True):
        (alone,) = drafting(model, batch(prompt), eos_token_id=PAD)
        new = row[len(PROMPT) :]
        assert (
            torch.equal(new[: len(alone) - len(prompt)], alone[len(prompt) :])
            and not new[len(alone) - len(prompt) :].any()
        )


def test_prompts_that_hold_the_padding_token(llama, family):
    """transformers leaves it out of the mask that it makes, wherever it stands; sliding windows
    count it all the same.
    """
    lm, model, _ = llama
    inputs = dict(input_ids=torch.tensor([[3, PAD, 8, PAD, PAD, 5], [PAD, PAD, 4, 9, PAD, 2]]))
    assert torch.equal(drafting(model, inputs), plainly(lm, inputs))
    whole = {**inputs, "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    assert torch.equal(drafting(model, whole), plainly(lm, whole))
    with one_line_error("attention_mask", "last token"):
        drafting(model, dict(input_ids=torch.tensor([[3, 8, PAD]])))
    _, windowed, _ = family("mistral, window", "transformers")
    with one_line_error("attention_mask", "sliding window"):
        drafting(windowed, inputs)


class Remembering(LogitsProcessor):
    """Keeps a tensor of its own, which it changes in place."""

    def __init__(self):
        self.counts = torch.zeros(VOCAB)

    def __call__(self, input_ids, scores):
        self.counts += torch.arange(VOCAB) == scores.argmax(-1)
        return scores - self.counts


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_inside_inference_mode(family, engine):
    lm, model, tokenizer = family("llama 3", engine)
    for settings in (
        {},
        dict(repetition_penalty=1.4),
        dict(stop_strings="d"),
        dict(sequence_bias=[[[3], 2.5], [[9, 4], -8.0]]),
        dict(return_dict_in_generate=True, output_scores=True, output_logits=True),
    ):
        with torch.inference_mode():
            out = drafting(model, **settings)
            want = plainly(lm, **settings, tokenizer=tokenizer)
        if "output_scores" in settings:
            assert len(out.scores) == len(out.logits) == NUM
            out = out.sequences
            want = want.sequences
        assert torch.equal(out, want), settings
    want = plainly(lm, logits_processor=LogitsProcessorList([Remembering()]))
    assert torch.equal(drafting(model, logits_processor=LogitsProcessorList([Remembering()])), want)
    with torch.inference_mode():
        assert torch.equal(
            drafting(model, logits_processor=LogitsProcessorList([Remembering()])), want
        )
        drafting(model, do_sample=True, seed=1, min_p=0.1)


def test_scores_and_logits(llama):
    lm, model, _ = llama
    wanted = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    legal = [token for token in range(VOCAB) if token != SAT]
    for settings in ({}, dict(repetition_penalty=1.3), dict(no_repeat_ngram_size=2)):
        want = plainly(lm, **wanted, **settings)
        out = drafting(model, **wanted, **settings)
        assert (
            torch.equal(out.sequences, want.sequences)
            and len(out.scores) == len(want.scores) == len(out.logits) == NUM
        )
        for name in ("scores", "logits"):
            mine, theirs = (torch.cat(getattr(each, name))[:, legal] for each in (out, want))
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert not any(tensor.is_inference() for tensor in (*out.scores, *out.logits))
        assert all(tensor.dtype == torch.float32 for tensor in (*out.scores, *out.logits))
    sampled = dict(do_sample=True, temperature=0.7, top_k=6, top_p=0.9, seed=3)
    out = drafting(model, **wanted, **sampled)
    # asking for scores changes nothing
    assert torch.equal(out.sequences, drafting(model, **sampled))
    assert all(int((row > -torch.inf).sum()) <= 6 for row in out.scores)
    shares = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert shares.shape == (1, NUM) and bool((shares <= 0).all()) and bool(shares.isfinite().all())
    ended = drafting(model, batch(*PROMPTS), **made(GREEDY["eos"], lm), **wanted)
    lengths = [generation.num_new_tokens for generation in ended.generations]
    assert len(ended.scores) == max(lengths) > min(lengths)
    over = ended.scores[-1][lengths.index(min(lengths))]
    assert over[PAD] == 0 and int((over == -torch.inf).sum()) == VOCAB - 1


def test_seeds_and_return_sequences(llama):
    _, model, _ = llama

    def sampled(**settings):
        return drafting(model, do_sample=True, top_k=0, **settings)[:, len(PROMPT) :].tolist()

    rows = sampled(seed=7, num_return_sequences=3)
    assert len(set(map(tuple, rows))) == 3
    for row, ids in enumerate(rows):
        config = DecodeConfig(0, NUM, sampling=SamplingConfig(1.0, seed=7 + row * 2**32))
        assert ids == model.sdsat.generate(PROMPT, config).token_ids
    assert sampled(seed=7) == rows[:1] != sampled(seed=8)
    torch.manual_seed(5)
    first = sampled()
    second = sampled()
    torch.manual_seed(5)
    assert [first, second] == [sampled(), sampled()] and first != second
    assert (
        sampled(generator=torch.Generator().manual_seed(1))
        == sampled(generator=torch.Generator().manual_seed(1))
        != first
    )


class Listening:
    def __init__(self):
        self.values = []
        self.ended = 0

    def put(self, value):
        assert not self.ended
        self.values.append(value)

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("settings", [{}, dict(repetition_penalty=1.3), dict(stop_strings="d")])
def test_streamers_see_the_prompt_and_then_every_token(llama, settings):
    lm, model, tokenizer = llama
    heard = Listening()
    want = plainly(lm, **settings, tokenizer=tokenizer)
    out = drafting(model, **settings, streamer=heard)
    assert torch.equal(out, want) and heard.ended == 1
    assert heard.values[0].tolist() == [PROMPT] and all(
        value.shape == (1,) for value in heard.values[1:]
    )
    assert [int(value) for value in heard.values[1:]] == want[0, len(PROMPT) :].tolist()
    texts = TextIteratorStreamer(tokenizer, skip_prompt=True)
    drafting(model, **settings, streamer=texts)
    assert "".join(texts) == tokenizer.decode(want[0, len(PROMPT) :])


def test_max_time_ends_the_output(llama):
    _, model, _ = llama
    out = drafting(model, max_time=1e-9)
    assert out.shape[1] == len(PROMPT) + 1


def test_a_watermark_with_state(llama):
    """SynthID's processor remembers what it saw: it must be called as in plain generate."""
    lm, model, _ = llama
    marked = dict(
        watermarking_config=SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=3)
    )
    assert torch.equal(drafting(model, **marked), plainly(lm, **marked))


@pytest.mark.parametrize("name", ["llama 3", "mistral, window", "gemma 2, tied"])
def test_the_loaded_model_is_a_plain_one_too(family, name):
    lm, model, _ = family(name, "transformers")
    for inputs in (batch(PROMPT), batch(*PROMPTS), dict(input_ids=torch.tensor([PROMPT]))):
        assert torch.equal(plainly(model, inputs), plainly(lm, inputs))
        real = inputs.get("attention_mask", torch.ones(1, len(PROMPT))).bool()
        with torch.no_grad():
            torch.testing.assert_close(
                model(**inputs).logits[real], lm(**inputs).logits[real], rtol=1e-4, atol=1e-4
            )
    sampled = plainly(
        model,
        batch(*PROMPTS),
        do_sample=True,
        num_beams=2,
        stop_strings="d",
        tokenizer=family(name, "transformers")[2],
    )
    assert sampled.shape[0] == 3


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_attached_to_a_model_that_transformers_loaded(tmp_path, engine):
    folder = checkpoint(tmp_path / "base", FAMILIES["llama 3"], sat=False)
    lm = alone(folder)
    equipped = adapted(alone(folder), k=3, strength=0.2)
    equipped.adapter.save(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sdsat.attach(model, None, str(tmp_path / "adapter"), engine=engine) is model
    model.sdsat.costs = COSTS
    wanted = dict(return_dict_in_generate=True, output_logits=True)
    for how in HOW:
        out = drafting(model, **how, **wanted)
        want = plainly(lm, **wanted, suppress_tokens=[])
        assert torch.equal(out.sequences, want.sequences)
        torch.testing.assert_close(
            torch.cat(out.logits), torch.cat(want.logits), rtol=1e-4, atol=1e-4
        )
    assert torch.equal(plainly(model), plainly(lm))
    with one_line_error("already attached"):
        sdsat.attach(model, None, str(tmp_path / "adapter"))


def test_models_that_are_not_ready_are_refused(tmp_path):
    folder = checkpoint(tmp_path, FAMILIES["llama 3"], sat=False)
    model = alone(folder)
    with one_line_error(folder, "not prepared for sdsat.generate", "sdsat.load", "sdsat.attach"):
        drafting(model)
    with one_line_error("adapter=nowhere", "not an adapter directory"):
        sdsat.attach(model, None, "nowhere")
    with one_line_error("engine=fast", "native"):
        sdsat.attach(model, engine="fast")
    with one_line_error("tokenizer=5", "a tokenizer of transformers"):
        sdsat.attach(model, tokenizer=5)
    with one_line_error("graphs='x'", "True or False"):
        sdsat.attach(model, graphs="x")
    with one_line_error("torch.float64", "float32, bfloat16, float16"):
        sdsat.attach(alone(folder).double())
    sdsat.attach(model)
    with one_line_error("has no SATs", "adapter", "k=0"):
        drafting(model)
    with one_line_error("k=3", "no SAT"):
        drafting(model, k=3)
    assert torch.equal(drafting(model, k=0), plainly(alone(folder), suppress_tokens=[]))


TWO = batch(*PROMPTS[:2])
EMBEDDED = torch.zeros(1, 3, 64)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (dict(num_beams=3), ["num_beams=3", "expected 1"]),
        (dict(penalty_alpha=0.6, top_k=4), ["penalty_alpha=0.6"]),
        (dict(prompt_lookup_num_tokens=4), ["prompt_lookup_num_tokens=4"]),
        (dict(assistant_early_exit=2), ["assistant_early_exit=2"]),
        (dict(use_mtp=True), ["use_mtp=True"]),
        (dict(dola_layers="low"), ["dola_layers=low"]),
        (dict(use_cache=False), ["use_cache=False"]),
        (dict(output_attentions=True, return_dict_in_generate=True), ["output_attentions=True"]),
        (
            dict(output_hidden_states=True, return_dict_in_generate=True),
            ["output_hidden_states=True"],
        ),
        (dict(prefill_chunk_size=4), ["prefill_chunk_size=4"]),
        (
            dict(cache_implementation="offloaded"),
            ["cache_implementation=offloaded", "leave it out"],
        ),
        (dict(past_key_values=DynamicCache()), ["past_key_values", "leave it out"]),
        (dict(position_ids=torch.arange(3, 10)[None]), ["position_ids", "count from 0"]),
        (dict(inputs=dict(inputs_embeds=EMBEDDED)), ["inputs_embeds"]),
        (
            dict(
                inputs=dict(
                    input_ids=TWO["input_ids"].flip(1), attention_mask=TWO["attention_mask"].flip(1)
                )
            ),
            ["attention_mask", "left"],
        ),
        (dict(synced_gpus=True), ["synced_gpus"]),
        (
            dict(inputs=TWO, logits_processor=LogitsProcessorList([Alternating()])),
            ["Alternating", "expected a single one"],
        ),
        (
            dict(inputs=TWO, stopping_criteria=StoppingCriteriaList([Sum(9)])),
            ["Sum", "expected a single one"],
        ),
        (dict(inputs=TWO, max_time=9.0), ["MaxTimeCriteria", "expected a single one"]),
        (
            dict(inputs=TWO, guidance_scale=2.0),
            ["UnbatchedClassifierFreeGuidance", "expected a single one"],
        ),
        (dict(inputs=TWO, streamer=Listening()), ["streamer=Listening", "expected a single one"]),
        (
            dict(inputs=TWO, stop_strings="d", pad_token_id=None),
            ["pad_token_id=None", "expected a token id"],
        ),
        (dict(do_sample=True, seed=1, generator=torch.Generator()), ["seed=1", "not both"]),
        (dict(strategy="fast"), ["strategy=fast", "two-step"]),
        (dict(k=-1), ["k=-1"]),
        (dict(k="5"), ["k='5'", "expected 0 (AR) or a positive number"]),
        (dict(k=2.0), ["k=2.0", "expected 0 (AR)"]),
        (dict(k=True), ["k=True", "expected 0 (AR)"]),
        (dict(k=99), ["k=99", "94 at most"]),
        (dict(tree=3), ["tree=3", "chain"]),
        (dict(tree=[2, "1"]), ["tree=[2, '1']", "every width"]),
        (dict(tree=(2, 0)), ["tree=(2, 0)", "every width"]),
        (dict(tree=(9, 9)), ["tree=9,9 with k=", "more than 96 nodes"]),
        (dict(budget=2.5), ["budget=2.5", "2 to 96"]),
        (dict(budget=False), ["budget=False", "2 to 96"]),
        (dict(lookup=3.5), ["lookup=3.5", "0 (off) to 32"]),
        (dict(lookup=33), ["lookup=33", "0 (off) to 32"]),
        (dict(seed=1.5), ["seed=1.5", "a whole number"]),
        (dict(do_sample=True, seed="1"), ["seed='1'", "a whole number"]),
        (dict(do_sample=True, generator=7), ["generator=7", "torch.Generator"]),
        (dict(streamer=7), ["streamer=7", "put and end"]),
        (dict(strategy=7), ["strategy=7", "two-step"]),
        (
            dict(inputs=dict(input_ids=torch.zeros(1, 0, dtype=torch.long))),
            ["input_ids: no tokens", "at least one"],
        ),
        (
            dict(
                inputs=dict(
                    input_ids=TWO["input_ids"],
                    attention_mask=TWO["attention_mask"] * torch.tensor([[1], [0]]),
                )
            ),
            ["attention_mask: prompt 1", "no tokens"],
        ),
        (
            dict(inputs=dict(input_ids=TWO["input_ids"], attention_mask=2 * TWO["attention_mask"])),
            ["attention_mask", "0 or 1"],
        ),
        (
            dict(inputs=TWO, stop_strings="d", eos_token_id=None),
            ["StopStringCriteria", "eos_token_id"],
        ),
        (dict(tree="bush"), ["tree='bush'", "chain"]),
        (dict(max_new_tokens=300), ["max_new_tokens=300", "256"]),
        (dict(max_new_tokens="5"), ["max_new_tokens='5'", "1 or more, a whole number"]),
        (dict(max_new_tokens=-1), ["max_new_tokens=-1", "1 or more"]),
        (dict(max_length=5.5, max_new_tokens=None), ["max_length=5.5", "a whole number"]),
        (dict(num_return_sequences="2"), ["num_return_sequences='2'", "a whole number"]),
        (dict(min_new_tokens="x"), ["min_new_tokens='x'", "a whole number"]),
        (dict(top_k="x", do_sample=True), ["top_k='x'", "a whole number"]),
        (dict(temperature="x", do_sample=True), ["temperature='x'", "a number"]),
        (dict(top_p=[1], do_sample=True), ["top_p=[1]", "a number"]),
        (dict(max_time="x"), ["max_time='x'", "a number"]),
        (dict(do_sample="no"), ["do_sample='no'", "True or False"]),
        (dict(pad_token_id="x"), ["pad_token_id='x'", "a whole number"]),
        (dict(eos_token_id=-1), ["eos_token_id=-1", "token ids, 0 or more"]),
        (
            dict(inputs=dict(input_ids=torch.tensor([[1, VOCAB]]))),
            [f"input_ids: token id {VOCAB} is not in the model's vocabulary of {VOCAB}"],
        ),
        (dict(eos_token_id="x"), ["eos_token_id='x'", "a token id, or a list of them"]),
        (dict(eos_token_id=[1, 2.5]), ["eos_token_id=[1, 2.5]", "a token id"]),
        (dict(stop_strings=5), ["stop_strings=5", "a text, or a list of them"]),
        (dict(stop_strings=["a", ""]), ["stop_strings=['a', '']", "none empty"]),
        (dict(tokenizer=5, stop_strings="d"), ["tokenizer=5", "a tokenizer of transformers"]),
        (dict(past_key_values="x"), ["past_key_values=str", "leave it out"]),
        (dict(assistant_model="x"), ["assistant_model=str", "leave it out"]),
        (dict(inputs=dict(input_ids=[[1, 2]])), ["input_ids=[[1, 2]]", "token ids [B, L]"]),
        (dict(inputs=dict(input_ids=torch.arange(3))), ["input_ids=", "token ids [B, L]"]),
        (
            dict(inputs=dict(input_ids=TWO["input_ids"], attention_mask="x")),
            ["attention_mask='x'", "a tensor"],
        ),
        (dict(position_ids=[1]), ["position_ids=[1]", "a tensor"]),
        (dict(stopping_criteria=[5]), ["stopping_criteria: 5", "expected functions"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_not_honoured_is_refused_by_name(llama, settings, parts):
    _, model, _ = llama
    with one_line_error(*parts):
        drafting(model, **settings)


def test_plain_generate_takes_what_transformers_takes(llama):
    """What ours refuses is not refused in its name elsewhere."""
    _, model, _ = llama
    cache = DynamicCache()
    plainly(model, past_key_values=cache)
    assert cache.get_seq_length() > len(PROMPT)


def test_a_batch_of_no_prompts_is_refused(llama):
    _, model, _ = llama
    with one_line_error("input_ids", "[0, 3]", "one prompt or more"):
        model.generate(
            torch.zeros((0, 3), dtype=torch.long),
            max_new_tokens=4,
            custom_generate=sdsat.generate,
            pad_token_id=PAD,
        )


def test_numbers_of_numpy_are_numbers(llama):
    _, model, _ = llama
    plain = dict(k=2, lookup=3, budget=9, tree=(2, 1), strategy="one-pass", seed=7, do_sample=True)
    of_numpy = dict(
        k=np.int64(2),
        lookup=np.int32(3),
        budget=np.uint8(9),
        tree=[np.int64(2), 1],
        strategy="one-pass",
    )
    assert torch.equal(
        drafting(model, **of_numpy, seed=np.uint64(7), do_sample=True), drafting(model, **plain)
    )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (dict(foo=3), ["foo=3", "no such option", "sat_token_id, engine, graphs, trained_k"]),
        (dict(graphs="x"), ["graphs='x'", "True or False"]),
        (dict(name=""), ["model=''", "a hub id, a directory, a GGUF file"]),
        (dict(name="a\nb"), ["model='a\\nb'", "a hub id"]),
        (dict(name="a\0"), ["model='a\\x00'", "a hub id"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_load_cannot_take_is_refused_by_name(arguments, parts):
    with one_line_error(*parts):
        sdsat.load(**{"name": "anything", **arguments})


class Small(TorchDispatchMode):
    """No operation in it makes a tensor of more than a million numbers."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            assert not isinstance(part, torch.Tensor) or part.numel() <= 10**6, function
        return out


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (dict(max_new_tokens=5 * 10**8), ["max_new_tokens=500000000", "1 to 256"]),
        (dict(max_new_tokens=None, max_length=10**9), ["max_length=1000000000", "1 to 256"]),
        (
            dict(max_new_tokens=5 * 10**8, cache_implementation="static"),
            ["max_new_tokens=500000000", "1 to 256"],
        ),
        (
            dict(max_new_tokens=5 * 10**8, return_dict_in_generate=True, output_scores=True),
            ["max_new_tokens=500000000"],
        ),
        (
            dict(do_sample=True, num_return_sequences=10**8),
            ["num_return_sequences=100000000", "GiB of cache", "fewer sequences"],
        ),
        (dict(do_sample=True, num_return_sequences=10**9, use_cache=False), ["use_cache=False"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("as_config", [False, True], ids=["arguments", "a config"])
def test_nothing_is_made_for_what_is_refused(llama, settings, parts, as_config):
    _, model, _ = llama
    settings = dict(max_new_tokens=9, pad_token_id=PAD) | settings
    given = dict(generation_config=GenerationConfig(**settings)) if as_config else settings
    with Small(), one_line_error(*parts):
        model.generate(**batch(PROMPT), **given, custom_generate=sdsat.generate)


def test_an_assistant_is_refused(llama):
    lm, model, _ = llama
    with one_line_error("assistant_model"):
        drafting(model, assistant_model=lm)


def test_sampling_where_no_token_is_left_is_refused(llama):
    """Where transformers' own draw fails: every score is -inf, or one is NaN."""
    lm, model, _ = llama
    none = dict(suppress_tokens=list(range(VOCAB)), do_sample=True)
    with pytest.raises(RuntimeError):
        plainly(lm, **none)
    with one_line_error("do_sample=True", "SuppressTokensLogitsProcessor", "no token is left"):
        drafting(model, **none)


def test_typing_errors_are_transformers_to_refuse(llama):
    _, model, _ = llama
    with pytest.raises(ValueError, match="strategie"):
        drafting(model, strategie="auto")


# Settings that reach sdsat.generate as processors, criteria or prompts, or that it reads itself.
HONOURED = {
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "max_time",
    "stop_strings",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "renormalize_logits",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "token_healing",
    "guidance_scale",
    "watermarking_config",
    "num_return_sequences",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "cache_implementation",
}
# Settings that mean nothing without beams, an assistant, a static cache, compilation or an encoder,
# in plain generate as here.
IDLE = {
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "max_matching_ngram_size",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "speculation_type",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "decoder_start_token_id",
    "transformers_version",
}


def test_every_setting_of_transformers_is_known():
    """A release with a new one fails here, so that it is not ignored."""
    every = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert every - HONOURED - IDLE - set(ONLY) == set()


def test_the_example_runs(llama, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["dropin.py", llama[1].sdsat.model.name, "--prompt", "abc", "--stop", "d"]
    )
    runpy.run_path(
        str(Path(__file__).parent.parent / "examples" / "dropin.py"), run_name="__main__"
    )
    assert "the same" in capsys.readouterr().out
