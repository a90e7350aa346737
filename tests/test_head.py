"""The draft head: the tree's tokens against an oracle that ranks every node's children by itself,
and what a head can learn.
"""

import copy
import json
import math

import pytest
import torch
from common import VOCAB, random_sequences, text_adds, tiny_llama, with_adapter
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdsat.config import MAX_ROWS, SamplingConfig, TrainConfig
from sdsat.engines import drafting
from sdsat.engines.drafting import Guesses
from sdsat.method.sampling import choose, support
from sdsat.method.tree import from_branching, from_widths
from sdsat.models import head as heads
from sdsat.models.adapter import load
from sdsat.models.sat_model import SatModel
from sdsat.training import loss
from sdsat.training.loop import train
from sdsat.training.loss import predict, sat_batch, sat_states
from sdsat.training.shards import TrainingExample


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1.0, 0.01], ids=["large", "small"])
def test_a_head_says_the_same_in_any_dtype(dtype, size):
    """Whatever embeddings' size: Qwen's are some 0.015, below what bfloat16 tells from 1."""
    torch.manual_seed(0)
    head = heads.DraftHead(64, 32, torch.float32, torch.device("cpu"))
    torch.nn.init.normal_(head.outer, std=0.2)
    states, before = torch.randn(9, 64), size * torch.randn(9, 64)
    with torch.no_grad():
        want = head(states, before)
        found = copy.deepcopy(head).to(dtype)(states.to(dtype), before.to(dtype)).float()
    assert (found - want).norm() < 0.02 * want.norm()


def children_of(model, state, logits, text, path, index, sampling, count, size):
    """The `count` best next tokens after the text and the path: over the vocabulary, with all but
    the SAT's `size` best left out.

    Where the filters leave fewer, those: what fills a tree up then can never be drawn.
    """
    before = [*text, *path]
    move = model.head(state[None], model.lm.get_input_embeddings().weight[before[-1]][None])[0]
    moved = model.head.sharpness * model.lm.get_output_embeddings()(state + move)
    moved = moved + text_adds(model.head, text, before, range(VOCAB))
    dropped = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, logits.topk(size).indices, False)
    ranked = moved.masked_fill(dropped, float("-inf"))[None]
    left = (
        count if sampling.greedy else min(count, int(support(ranked, sampling)[1].isfinite().sum()))
    )
    return choose(ranked, index[None], sampling, left)[0].tolist()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    widths=st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple),
    branching=st.booleans(),
    length=st.sampled_from([0, 1, 40]),
    sampling=st.sampled_from(
        [SamplingConfig(), SamplingConfig(0.8, seed=5), SamplingConfig(1.0, 6, 0.9, 2)]
    ),
)
def test_every_node_gets_the_best_given_its_path(seed, widths, branching, length, sampling):
    assume(math.prod(widths) < MAX_ROWS / 2)
    tree = from_branching(widths) if branching else from_widths(widths)
    decoder = with_adapter(tiny_llama(seed=seed % 3), k=4, seed=seed, head=7)
    model = decoder.model
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(
        len(widths), model.config.hidden_size, generator=generator, dtype=torch.float64
    )
    logits = model.lm.get_output_embeddings()(states)
    index = torch.arange(3, 3 + len(widths))
    text = [*torch.randint(0, VOCAB, (length,), generator=generator).tolist(), 9]
    text = text * 3 if length else text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "SHORTLIST", 12)
        guesses = Guesses(torch.tensor(text), states, logits, 3, sampling)
        tokens, likely = decoder.engine.draft(guesses, tree).tolist()
    assert (tokens[0], likely[0]) == (9, 1)
    for node in range(1, len(tree)):
        i = tree.depths[node] - 1
        path = [int(tokens[above]) for above in tree.path(tree.parents[node])[1:]]
        count = tree.ranks[node] + 1
        best = children_of(model, states[i], logits[i], text, path, index[i], sampling, count, 12)
        assert tree.ranks[node] >= len(best) or tokens[node] == best[tree.ranks[node]]


def test_a_head_learns_what_only_the_token_before_tells(tmp_path):
    """Every token has two successors, taken by chance: knowing the token before, half of all
    guesses can be right.
    """
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(40):
        ids = [2]
        for coin in torch.randint(0, 2, (30,), generator=generator).tolist():
            ids.append(2 + (2 * (ids[-1] - 2) + coin) % 16)
        data.append(TrainingExample(torch.tensor(ids), 0))
    accuracy = {}
    for size in (0, 32):
        config = TrainConfig(
            80, k=2, rank=4, head=size, anchors=16, eval_every=80, held_out=8, warmup=5, lr=3e-2
        )
        train(SatModel(tiny_llama(torch.float32), None, "tiny"), data, tmp_path / str(size), config)
        log = (tmp_path / str(size) / "train_log.jsonl").read_text().splitlines()
        accuracy[size] = json.loads(log[-1])["accuracy_by_depth"]
    assert max(accuracy[0]) < 0.38  # at best one of four for SAT 1, one of eight for SAT 2
    assert min(accuracy[32]) > 0.42
    kept = load(tiny_llama(torch.float32), tmp_path / "32")
    assert kept.config.head == 32 and kept.head is not None and kept.head.outer.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_prepared_for_decoding_moves_the_same(dtype):
    head = heads.DraftHead(24, 10, dtype, torch.device("cpu"))
    torch.nn.init.normal_(head.outer)
    states = torch.randn(5, 24, dtype=dtype)
    before = torch.randn(5, 24, dtype=dtype)
    want = head(states, before)
    head.fuse()
    torch.testing.assert_close(head(states, before), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draft_ids", [(), (0, 1, *range(9, 60))], ids=["all", "some"])
def test_predictions_are_the_drafts_and_their_chances(draft_ids):
    """`predict`, which training logs and `inspect` rest on, takes the same best tokens as drafting
    and loses no probability.
    """
    lm = tiny_llama(torch.float64)
    decoder = with_adapter(lm, k=3, strength=0.3, head=8, draft_ids=draft_ids)
    model = decoder.model
    (sequence,) = random_sequences([30])
    sequence = TrainingExample(sequence.ids % 5, sequence.prompt_length)  # it repeats itself
    batch = sat_batch([sequence], 3, 9, 0.0, [torch.Generator().manual_seed(0)])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for module in (loss, drafting):
            patch.setattr(module, "SHORTLIST", 12)
        got = predict(model, batch)
        states, _ = sat_states(model, batch)
        own = model.lm.get_output_embeddings()(states)
        for i, anchor in enumerate(batch.anchor[0].tolist()):
            tree = from_widths((1,))
            text = sequence.ids[: anchor + 2]
            guessed = {*draft_ids, *text.tolist()} if draft_ids else set(range(VOCAB))
            own[i, sorted(set(range(VOCAB)) - guessed)] = -torch.inf
            ids = torch.tensor(sorted(guessed))
            logits = own[i : i + 1, ids]
            guesses = Guesses(text, states[i : i + 1], logits, 0, SamplingConfig(), ids)
            tokens, likely = decoder.engine.draft(guesses, tree)
            assert got[i].argmax() == tokens[1]
            short = own[i].topk(12).indices
            torch.testing.assert_close(likely[1], got[i][short].softmax(-1).max())
            p = own[i].softmax(-1)
            q = got[i].softmax(-1)
            torch.testing.assert_close(q[short].sum(), p[short].sum())
            rest = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, short, False)
            torch.testing.assert_close(q[rest], p[rest])
