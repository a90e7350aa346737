"""The embedded default model with its shipped adapter: a real model on real prompts."""

import pytest
import torch

from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.reference import transformers_generate
from sdsat.models import adapter as adapters
from sdsat.models import embedded
from sdsat.tasks.prompts import humaneval


@pytest.fixture(scope="module")
def decoder():
    return Decoder.load(dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def drafted(decoder):
    """[(prompt ids, its greedy output with drafts)] of two problems."""
    prompts = [list(problem.prompt_ids) for problem in humaneval(decoder.model.tokenizer, 2)]
    config = DecodeConfig(5, 12, stop_ids=decoder.model.stop_ids)
    return [(prompt_ids, decoder.generate(prompt_ids, config)) for prompt_ids in prompts]


def test_greedy_equals_transformers_generate(decoder, drafted):
    config = DecodeConfig(0, 12, stop_ids=decoder.model.stop_ids)
    for prompt_ids, out in drafted:
        want = transformers_generate(decoder, prompt_ids, config)
        ar = decoder.generate(prompt_ids, config)
        assert (ar.token_ids, ar.finish) == (want.token_ids, want.finish)
        assert out.token_ids == want.token_ids


def test_seeded_nucleus_equals_ar_and_seeds_differ(decoder):
    prompt = list(humaneval(decoder.model.tokenizer, 1)[0].prompt_ids)
    outputs = set()
    for seed, trees in ((0, ("chain", "paper")), (1, ("paper",))):
        sampling = SamplingConfig(1.0, 10, 0.95, seed)
        ar = decoder.generate(prompt, DecodeConfig(0, 24, "chain", sampling)).token_ids
        for tree in trees:
            out = decoder.generate(prompt, DecodeConfig(5, 24, tree, sampling))
            assert out.token_ids == ar
        outputs.add(tuple(ar))
    assert len(outputs) == 2


def test_shipped_adapter_drafts_well(drafted):
    accepted = [length for _, out in drafted for length in out.accepted_lengths]
    assert sum(accepted) / len(accepted) > 0.8  # committed results: see results/reference


def test_standard_logits_are_the_bases_bit_for_bit(decoder):
    tokens = torch.tensor([humaneval(decoder.model.tokenizer, 1)[0].prompt_ids])
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    with torch.inference_mode():
        attached = decoder.model.lm(tokens, attention_mask=mask).logits
        decoder.model.adapter.detach()
        base = decoder.model.lm(tokens, attention_mask=mask).logits
        decoder.model.adapter.attach(decoder.model.lm)
    assert torch.equal(attached, base)


def test_shipped_adapter_is_small_enough_and_says_how_it_was_trained():
    files = list(embedded.SMOLLM2.adapter.iterdir())
    assert sum(file.stat().st_size for file in files) <= 25 * 2**20
    logs = {"train_log.jsonl", *(f"train_log_stage{number}.jsonl" for number in range(1, 5))}
    assert {"adapter_config.json", "adapter_model.safetensors", *logs} == {
        file.name for file in files
    }
    training = adapters.read_config(embedded.SMOLLM2.adapter).training
    assert training["answer_tokens"] > 100_000 and training["seconds"] > 3600 / 2
