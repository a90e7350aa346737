"""Margins of a first divergence against their definition, on logits made up for it; and what is
audited.
"""

import string

import pytest
import torch
from common import decoder_of, tiny_llama, tiny_tokenizer, with_adapter

from sdsat.config import SamplingConfig
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.sweep import VerifyConfig
from sdsat.evaluation.verify import sampled_margin, verify
from sdsat.method.sampling import choose, gumbel_noise
from sdsat.tasks.datasets import read_tasks

SEED = 3
INDEX = 7
PLAIN = SamplingConfig(0.5, seed=SEED)


def choice(logits, sampling):
    return int(choose(logits[None], torch.tensor([INDEX]), sampling))


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_without_filters_it_is_the_difference_of_logits_and_noise(rank):
    torch.manual_seed(rank)
    logits = torch.randn(64).double()
    noise = gumbel_noise(SEED, torch.tensor([INDEX]), torch.arange(64))[0]
    scores = logits + PLAIN.temperature * noise
    ours, theirs = scores.sort(descending=True).indices[[0, rank]].tolist()
    assert choice(logits, PLAIN) == ours
    # candidates that the rising token must pass as well
    between = scores.topk(rank).values[1:].tolist()
    want = max(
        [
            float(scores[ours] - scores[theirs]),
            *(2 * float(value - scores[theirs]) for value in between),
        ]
    )
    assert sampled_margin(logits, ours, theirs, INDEX, PLAIN) == pytest.approx(want, abs=1e-4)


def test_a_token_that_the_filter_drops_is_as_far_away_as_the_filters_edge():
    """Top-k 2 keeps tokens 0 and 1; token 2, which the noise prefers, lies a hair below token 1."""
    noise = gumbel_noise(SEED, torch.tensor([INDEX]), torch.arange(64))[0]
    liked, *others = noise.sort(descending=True).indices.tolist()
    logits = torch.full((64,), -20.0).double()
    logits[others[0]], logits[others[1]], logits[liked] = 1.0, 0.99, 0.9899
    sampling = SamplingConfig(1.0, top_k=2, seed=SEED)
    ours = choice(logits, sampling)
    assert ours != liked and choice(logits, SamplingConfig(1.0, seed=SEED)) == liked
    assert sampled_margin(logits, ours, liked, INDEX, sampling) < 1e-3


@pytest.mark.parametrize("sats", [True, False])
def test_lookup_is_audited_once_and_problems_have_seeds_of_their_own(monkeypatch, sats):
    """Without SATs it is all that there is to audit; whatever k and trees are asked for, it has
    neither.
    """
    lm = tiny_llama(torch.float32, vocab=101)
    decoder = with_adapter(lm, k=3) if sats else decoder_of(lm, name="plain")
    decoder.model.tokenizer = tiny_tokenizer(["<unk>", *string.printable])
    decoded = []

    generate = Decoder.generate

    def kept(decoder, prompt_ids, config):
        decoded.append(config)
        return generate(decoder, prompt_ids[:9], config)

    monkeypatch.setattr(Decoder, "generate", kept)
    strategies = ("lookup", "two-step") if sats else ()
    config = VerifyConfig(
        k_list=(1, 2),
        strategies=strategies,
        trees=("chain", "2,1"),
        temperatures=(1.0,),
        seeds=(5,),
        data_limit=2,
        max_new_tokens=6,
    )
    summary = verify(decoder, config)["summary"]
    drafted = [("two-step", k, tree) for k in (1, 2) for tree in ("chain", "2,1")] if sats else []
    assert [(row["against"], row["k"], row["tree"]) for row in summary] == [
        ("lookup", 0, None),
        *drafted,
    ]
    assert all((row["identical"], row["num_problems"], row["seed"]) == (2, 2, 5) for row in summary)
    assert len({config.sampling.seed for config in decoded}) == 2


def test_another_data_set_is_audited_under_its_name():
    """Its problems, and which file's they are, so that a changed one is not resumed."""
    decoder = with_adapter(tiny_llama(torch.float32, vocab=101), k=3)
    decoder.model.tokenizer = tiny_tokenizer(["<unk>", *string.printable])
    config = VerifyConfig(
        k_list=(2,), strategies=("two-step",), dataset="everyday", data_limit=2, max_new_tokens=4
    )
    document = verify(decoder, config)
    tasks, source = read_tasks("everyday")
    assert [problem["task_id"] for problem in document["problems"]] == [
        task.task_id for task in tasks[:2]
    ]
    assert [document["settings"][key] for key in ("dataset", "source")] == ["everyday", source]
    assert all(row["identical"] == 2 for row in document["summary"])
