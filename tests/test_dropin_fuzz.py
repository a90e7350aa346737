"""1,000 random settings and prompts, single and batched: `sdsat.generate` gives what plain
`generate` does, or refuses by name.

The oracle is transformers' own `generate` of a model that knows nothing of sdsat; sampling, its
loop with our noise as the last logits processor (test_dropin.py). The SAT is an adapter's, so that
all of the vocabulary is the model's own.
"""

import os
import random
from collections import Counter

import pytest
import torch
from common import tiny_llama, tiny_tokenizer, with_adapter
from test_dropin import LETTERS
from test_families import COSTS
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StopStringCriteria,
    WatermarkingConfig,
)
from transformers.generation.stopping_criteria import StoppingCriteriaList

import sdsat
from sdsat.config import InputError
from sdsat.method.sampling import as_seed, gumbel_noise

VOCAB = 16
COUNT = 1000
SEED = int(os.environ.get("FUZZ_SEED", "0"))
TOKENIZER = tiny_tokenizer(LETTERS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(transformers' own, {engine: the same with a random adapter})."""
    folder = tmp_path_factory.mktemp("fuzz")
    sizes = dict(
        vocab=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        head_dim=32,
        max_position_embeddings=64,
        num_hidden_layers=1,
    )
    lm, *copies = (tiny_llama(torch.float32, **sizes) for _ in range(3))
    lm.set_attn_implementation("sdpa")
    decoder = with_adapter(tiny_llama(torch.float32, **sizes), k=3, strength=0.2)
    decoder.model.adapter.save(folder)
    ours = {
        engine: sdsat.attach(copy, TOKENIZER, str(folder), engine=engine)
        for engine, copy in zip(ENGINES, copies, strict=True)
    }
    for model in ours.values():
        model.sdsat.costs = COSTS
    return lm, ours


ENGINES = ("native", "transformers")


def tokens(rng, count):
    return [rng.randrange(VOCAB) for _ in range(count)]


# Each with a maker of a random value. What is not honoured is among them: it must be refused,
# whatever stands beside it.
ANYWHERE = {
    "repetition_penalty": lambda rng: rng.choice([0.7, 1.0, 1.3, 5.0]),
    "no_repeat_ngram_size": lambda rng: rng.randrange(4),
    "encoder_repetition_penalty": lambda rng: rng.choice([0.8, 1.0, 1.5]),
    "encoder_no_repeat_ngram_size": lambda rng: rng.randrange(3),
    "bad_words_ids": lambda rng: [tokens(rng, rng.randint(1, 3)) for _ in range(rng.randint(1, 3))],
    "sequence_bias": lambda rng: [
        [[rng.randint(1, 15) for _ in range(rng.randint(1, 2))], rng.uniform(-9, 9)]
        for _ in range(2)
    ],
    "suppress_tokens": lambda rng: tokens(rng, 4),
    "begin_suppress_tokens": lambda rng: tokens(rng, 6),
    "forced_eos_token_id": lambda rng: rng.choice([3, [3, 5]]),
    "forced_bos_token_id": lambda rng: 2,
    "min_new_tokens": lambda rng: rng.randrange(6),
    "min_length": lambda rng: rng.randrange(9),
    "exponential_decay_length_penalty": lambda rng: (rng.randrange(4), rng.uniform(1, 3)),
    "guidance_scale": lambda rng: rng.choice([1.0, 1.5]),
    "watermarking_config": lambda rng: WatermarkingConfig(bias=rng.uniform(0, 4)),
    "renormalize_logits": lambda rng: rng.random() < 0.5,
    "remove_invalid_values": lambda rng: rng.random() < 0.5,
    "stop_strings": lambda rng: rng.choice(["d", ["ab", "k"], ["c", "dd"]]),
    "max_time": lambda rng: 1e6,
    "cache_implementation": lambda rng: rng.choice(["dynamic", "offloaded"]),
    "length_penalty": lambda rng: 2.0,
    "output_scores": lambda rng: True,
    "output_logits": lambda rng: True,
    "return_dict_in_generate": lambda rng: True,
}
SAMPLING = {
    "temperature": lambda rng: rng.choice([0.1, 0.7, 1.0, 2.5]),
    "top_k": lambda rng: rng.choice([0, 1, 3, 8, 50]),
    "top_p": lambda rng: rng.choice([0.01, 0.5, 0.9, 1.0]),
    "min_p": lambda rng: rng.choice([0.0, 0.1, 0.6]),
    "typical_p": lambda rng: rng.choice([0.3, 0.9, 1.0]),
    "top_h": lambda rng: rng.choice([0.2, 0.8]),
    "epsilon_cutoff": lambda rng: rng.choice([0.0, 0.03]),
    "eta_cutoff": lambda rng: rng.choice([0.0, 0.05]),
    "num_return_sequences": lambda rng: rng.randint(1, 3),
}
NEVER = {
    "num_beams": lambda rng: 2,
    "penalty_alpha": lambda rng: 0.6,
    "prompt_lookup_num_tokens": lambda rng: 3,
    "assistant_early_exit": lambda rng: 1,
    "use_cache": lambda rng: False,
    "output_attentions": lambda rng: True,
    "output_hidden_states": lambda rng: True,
    "prefill_chunk_size": lambda rng: 4,
    "past_key_values": lambda rng: DynamicCache(),
}
ARGUMENTS = ("past_key_values",)  # of `generate`, and none of GenerationConfig's
DRAFTING = {
    "strategy": lambda rng: rng.choice(["two-step", "one-pass", "auto", "auto", "lookup"]),
    "tree": lambda rng: rng.choice(["auto", "chain", "grown", "2,2,1", (3, 1)]),
    "budget": lambda rng: rng.randint(2, 20),
}


def some(rng, makers, share):
    return {name: make(rng) for name, make in makers.items() if rng.random() < share}


def case(number):
    """(settings, arguments of ours alone, inputs, the way of handing settings over) of a number."""
    rng = random.Random(f"{SEED} {number}")
    settings = some(rng, ANYWHERE, 0.09) | some(rng, NEVER, 0.01)
    if rng.random() < 0.4:
        settings |= {"do_sample": True} | some(rng, SAMPLING, 0.35)
    ends = rng.choice([None, 3, [3, 5, 7], 0])
    settings |= {
        "eos_token_id": ends,
        "pad_token_id": rng.choice([0, 0, 3, None]),
        "max_new_tokens": rng.randint(1, 7),
    }
    how = some(rng, DRAFTING, 0.5)
    if how.get("strategy") != "lookup":
        how |= rng.choice([{}, {"k": rng.randint(0, 3)}])
    lengths = [rng.randint(1, 6) for _ in range(rng.choice([1, 1, 2, 3]))]
    pad = settings["pad_token_id"] or 0
    ids = torch.tensor([[pad] * (max(lengths) - n) + tokens(rng, n) for n in lengths])
    mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
    whole = len(lengths) == 1 and rng.random() < 0.3
    return (
        settings,
        how,
        {"input_ids": ids} if whole else {"input_ids": ids, "attention_mask": mask},
        rng.random() < 0.3,
    )


class Coupled(LogitsProcessor):
    """Leaves, in each row, the token for which log p + that row's noise is largest."""

    def __init__(self, seed, shape):
        self.seeds = torch.tensor([as_seed(seed + (row << 32)) for row in range(shape[0])])
        self.start = shape[1]

    def __call__(self, input_ids, scores):
        index = torch.full((len(scores),), input_ids.shape[1] - self.start)
        if not scores.max(-1).values.isfinite().all():
            raise RuntimeError("as torch.multinomial does")
        noise = gumbel_noise(self.seeds, index, torch.arange(scores.shape[-1]))
        best = (scores.log_softmax(-1).double() + noise).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, best, 0.0)


def arguments(settings, as_config):
    """Settings as arguments, or as a GenerationConfig with the rest beside it."""
    if not as_config:
        return dict(settings)
    rest = {name: settings[name] for name in ARGUMENTS if name in settings}
    return {
        "generation_config": GenerationConfig(
            **{k: v for k, v in settings.items() if k not in rest}
        ),
        **rest,
    }


def plainly(lm, settings, inputs, as_config, seed):
    if not settings.get("do_sample"):
        return lm.generate(**inputs, **arguments(settings, as_config), tokenizer=TOKENIZER)

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        steps = LogitsProcessorList([*logits_processor, Coupled(seed, input_ids.shape)])
        return model._sample(input_ids, steps, stopping_criteria, generation_config, **kwargs)

    settings = dict(settings)
    stop = settings.pop("stop_strings", None)
    criteria = StoppingCriteriaList([StopStringCriteria(TOKENIZER, stop)] if stop else [])
    return lm.generate(
        **inputs, **arguments(settings, as_config), custom_generate=loop, stopping_criteria=criteria
    )


def outcome(run):
    """Token ids, or the error."""
    try:
        out = run()
    except (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError) as error:
        return error
    return out if isinstance(out, torch.Tensor) else out.sequences


# What stands for a setting in a message: the criteria and processors that a batch can't have.
CLASSES = {
    "MaxTimeCriteria": "max_time",
    "StopStringCriteria": "stop_strings",
    "UnbatchedClassifierFreeGuidance": "guidance_scale",
    "EncoderRepetitionPenalty": "encoder_repetition_penalty",
    "EncoderNoRepeatNGram": "encoder_no_repeat_ngram_size",
}


def verdict(number, models):
    """'greedy' or 'sampled' for the same output, 'refused NAME', or 'error' where both raise the
    same; else AssertionError.
    """
    lm, ours = models
    settings, how, inputs, as_config = case(number)
    model = ours[ENGINES[number % 5 == 4]]
    seed = number if settings.get("do_sample") else None

    def run():
        return model.generate(
            **inputs,
            **arguments(settings, as_config),
            **how,
            seed=seed,
            custom_generate=sdsat.generate,
        )

    mine = outcome(run)
    if isinstance(mine, InputError):
        name = str(mine).replace(":", "=").split("=")[0]
        name = next((setting for kind, setting in CLASSES.items() if name.startswith(kind)), name)
        given = {**settings, **how}
        if (
            "attention_mask" not in inputs
            and inputs["input_ids"][0, -1] == settings["pad_token_id"]
        ):
            given["attention_mask"] = "transformers' own, which leaves the last token out"
        assert "\n" not in str(mine) and name in given, (number, mine, settings, how)
        return f"refused {name}"
    want = outcome(lambda: plainly(lm, settings, inputs, as_config, number))
    if isinstance(want, Exception):
        assert type(mine) is type(want), (number, mine, want, settings, how)
        return "error"
    assert not NEVER.keys() & settings.keys(), (number, settings)
    assert isinstance(mine, torch.Tensor) and torch.equal(mine, want), (
        number,
        mine,
        want,
        settings,
        how,
    )
    return "sampled" if settings.get("do_sample") else "greedy"


@pytest.fixture
def one_table(monkeypatch):
    """A watermark's table of a million numbers, which comes from a constant seed, is drawn once."""
    made = {}

    def randperm(size, *, generator, device):
        key = (size, generator.initial_seed(), device)
        if size < 10**6:
            return real(size, generator=generator, device=device)
        if key not in made:
            made[key] = real(size, generator=generator, device=device)
        return made[key]

    real = torch.randperm
    monkeypatch.setattr(torch, "randperm", randperm)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_table")
def test_any_settings_give_plain_generates_output_or_are_refused_by_name(models):
    found = Counter(verdict(number, models) for number in range(COUNT))
    assert found["greedy"] > 0.3 * COUNT and found["sampled"] > 0.2 * COUNT, found
    assert {f"refused {name}" for name in NEVER} <= found.keys(), found
