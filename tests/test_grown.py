"""Trees that grow: against all that could be drafted, every path of it enumerated."""

import itertools
import math

import pytest
import torch
from common import VOCAB, one_line_error, text_adds, tiny_llama, with_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.decoding.passes import drafts_of
from sdsat.engines import drafting
from sdsat.method.sampling import filtered, gumbel_noise
from sdsat.method.tree import GROWN, laid_out, make_tree, parse_tree

SAMPLINGS = [
    SamplingConfig(),
    SamplingConfig(0.7, seed=5),
    SamplingConfig(1.0, 6, 0.9, 2),
    SamplingConfig(1.5, 0, 0.75, 7),
]
CANDIDATES = 12  # of a SAT that are looked at
INDEX = 3


TEXT = [3, 9, 7, 9, 5, 3, 9, 7, 5, 5, 9]  # the root's token is its last


def grown(engine, model, states, nodes, sampling):
    logits = model.lm.get_output_embeddings()(states)
    guesses = drafting.Guesses(torch.tensor(TEXT), states, logits, INDEX, sampling)
    return engine.grow(guesses, nodes)


def children(model, state, depth, path, sampling):
    """(token, how likely it seems) of all candidates below a path from the root, best first.

    By the probability of each, or where noise is added by its share of probability and noise.
    """
    lm = model.lm
    own = lm.get_output_embeddings()(state)
    score = own.clone()
    if model.head is not None:
        before = [*TEXT, *path[1:]]
        move = model.head(state[None], lm.get_input_embeddings().weight[before[-1]][None])[0]
        score = model.head.sharpness * lm.get_output_embeddings()(state + move)
        score = score + text_adds(model.head, TEXT, before, range(VOCAB))
    ids = own.topk(CANDIDATES).indices
    score = score[ids].float()
    if sampling.greedy:
        share = score.double().softmax(-1)
    else:
        kept = torch.full((VOCAB,), -math.inf).scatter(0, ids, score)
        log_p = filtered(kept[None], sampling)[0].double()
        noise = gumbel_noise(sampling.seed, torch.tensor([INDEX + depth]), torch.arange(VOCAB))[0]
        weight = (sampling.temperature * (log_p + noise)).exp()
        share = (weight / weight.sum())[ids]
    found = sorted(zip(share.tolist(), ids.tolist(), strict=True), reverse=True)
    return [(token, chance) for chance, token in found if chance > 0]


def everything(model, states, sampling):
    """All that could be drafted: {tokens from the root on: (ranks, likely, through)}."""
    root = (TEXT[-1],)
    paths = {root: ((), 1.0, 1.0)}
    level = [root]
    for depth, state in enumerate(states):
        below = []
        for path in level:
            ranks, _, through = paths[path]
            for rank, (token, chance) in enumerate(children(model, state, depth, path, sampling)):
                paths[(*path, token)] = ((*ranks, rank), chance, through * chance)
                below.append((*path, token))
        level = below
    return paths


def paths_of(tree, tokens):
    """The tokens from the root to each node, and the ranks."""
    found = []
    for node, parent in enumerate(tree.parents):
        above, ranks = found[parent] if node else ((), ())
        found.append(((*above, tokens[node]), (*ranks, tree.ranks[node]) if node else ()))
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "all", "nucleus", "top-p"])
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    depth=st.integers(1, 3),
    nodes=st.integers(1, CANDIDATES + 1),
    head=st.sampled_from([0, 7]),
    sharpness=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_it_holds_the_likeliest_of_all_paths(sampling, seed, depth, nodes, head, sharpness):
    decoder = with_adapter(tiny_llama(seed=seed % 3), k=4, seed=seed, head=head)
    generator = torch.Generator().manual_seed(seed)
    hidden = decoder.model.config.hidden_size
    states = sharpness * torch.randn(depth, hidden, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "SHORTLIST", CANDIDATES)
        found = grown(decoder.engine, decoder.model, states, nodes, sampling)
    drafted = drafts_of(None, found.tolist())
    tree = drafted.tree
    all_paths = everything(decoder.model, states, sampling)
    likeliest = sorted((through for *_, through in all_paths.values()), reverse=True)[:nodes]
    assert len(tree) == len(likeliest)
    held = paths_of(tree, drafted.tokens)
    assert len({path for path, _ in held}) == len(tree)
    through = []
    for node, (path, ranks) in enumerate(held):
        want_ranks, likely, chance = all_paths[path]
        assert ranks == want_ranks
        assert drafted.likely[node] == pytest.approx(likely, rel=1e-4, abs=1e-9)
        through.append(chance)
    assert sorted(through, reverse=True) == pytest.approx(likeliest, rel=1e-4, abs=1e-9)
    # the likeliest path leads, contiguously, and siblings come likeliest first
    for below in tree.children():
        chances = [drafted.likely[child] for child in below]
        assert chances == sorted(chances, reverse=True)
    first = 0
    while below := tree.children()[first]:
        assert below[0] == first + 1
        first += 1


@given(st.data(), st.integers(1, 30))
def test_laid_out_is_the_same_tree_depth_first(data, count):
    parents = [-1] + [data.draw(st.integers(0, node - 1)) for node in range(1, count)]
    ranks = list(range(count))  # as names
    tree, order = laid_out(parents, ranks)
    assert sorted(order) == list(range(count)) and order[0] == 0
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert list(tree.ranks) == order
    for node, parent in enumerate(tree.parents):
        assert parents[order[node]] == (order[parent] if node else -1)
    # each child follows its elder sibling's whole tree, and the first one its parent
    for node, below in enumerate(tree.children()):
        assert [order[child] for child in below] == sorted(order[child] for child in below)
        assert not below or below[0] == node + 1
        for elder, child in itertools.pairwise(below):
            inside = tree.ancestors()[:, elder].sum()
            assert child == elder + int(inside)


def test_its_shape_is_not_known_before_its_tokens():
    assert parse_tree("grown") == GROWN
    with one_line_error("tree='grown'", "expected"):
        make_tree(GROWN, 3)
    with one_line_error("tree='grow'", "'grown'"):
        parse_tree("grow")
    decoder = with_adapter(tiny_llama(), k=2)
    with one_line_error("tree='grow'"):
        decoder.generate([1, 5], DecodeConfig(2, 5, tree="grow"))
