"""Prompt lookup against a plain search, and looked-up chains in a tree against the set of its
paths.
"""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdsat.config import MAX_ROWS
from sdsat.method.drafts import Drafts
from sdsat.method.lookup import Lookup
from sdsat.method.tree import DraftTree, make_tree


def search(text, num_tokens):
    """What followed the last occurrence of the last three tokens, else of the last two."""
    for size in (3, 2):
        for start in range(len(text) - size - 1, -1, -1):
            if len(text) >= size and text[start : start + size] == text[-size:]:
                return text[start + size : start + size + num_tokens]
    return []


TEXTS = st.integers(1, 4).flatmap(lambda kinds: st.lists(st.integers(0, kinds), max_size=40))


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.integers(1, 12), st.lists(st.integers(1, 6), min_size=1))
def test_drafts_are_those_of_a_plain_search(text, num_tokens, sizes):
    lookup = Lookup([], num_tokens)
    first = 0
    for size in itertools.chain(sizes, itertools.repeat(3)):  # in pieces, as passes add them
        lookup.add(text[first : first + size])
        first = min(first + size, len(text))
        assert lookup.drafts() == search(text[:first], num_tokens)
        if first == len(text):
            break
    assert lookup.drafts() == Lookup(text, num_tokens).drafts()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ""),
        ("a", ""),
        ("aa", ""),
        ("aaa", "a"),  # overlaps with itself
        ("abab", "ab"),
        ("abcxabcyabc", "yab"),  # the latest one
        ("abcxbcyabc", "xbc"),  # three tokens before two, though two stood later
        ("bcxabc", "xab"),
        ("cxabc", ""),  # one is not enough
    ],
)
def test_some_texts(text, found):
    tokens = [ord(letter) for letter in text]
    assert (
        "".join(map(chr, Lookup(tokens, 3).drafts()))
        == found
        == "".join(map(chr, search(tokens, 3)))
    )


@st.composite
def token_trees(draw):
    """Drafts of SATs over few tokens, siblings distinct."""
    parents = [-1]
    tokens = [9]
    ranks = [0]
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.integers(0, len(parents) - 1))
        siblings = [tokens[node] for node in range(len(parents)) if parents[node] == parent]
        free = [token for token in range(4) if token not in siblings]
        if free:
            tokens.append(draw(st.sampled_from(free)))
            parents.append(parent)
            ranks.append(len(siblings))
    likely = [1.0, *(draw(st.sampled_from([0.1, 0.5, 0.9])) for _ in tokens[1:])]
    return Drafts(
        DraftTree(tuple(parents), tuple(ranks)),
        tokens,
        likely,
        [False] * len(tokens),
        "root" if len(tokens) > 1 else "none",
    )


def paths(drafts):
    """{tokens from below x to a node: (likely, looked up)}."""
    out = {}
    for node in range(len(drafts.tokens)):
        path = ()
        at = node
        while at:
            path = (drafts.tokens[at], *path)
            at = drafts.tree.parents[at]
        assert path not in out
        out[path] = drafts.likely[node], drafts.looked_up[node]
    return out


@settings(max_examples=40, deadline=None)
@given(token_trees(), st.lists(st.integers(0, 3), max_size=8))
def test_a_chain_joins_the_tree(drafts, chain):
    before = paths(drafts)
    joined = drafts.with_chain(chain, 0.6)
    prefixes = [tuple(chain[:n]) for n in range(1, len(chain) + 1)]
    want = {
        path: (max(before.get(path, (0, 0))[0], 0.6), True) if path in prefixes else before[path]
        for path in {*before, *prefixes}
    }
    assert paths(joined) == want
    tree = joined.tree
    assert (
        len(tree)
        == len(joined.tokens)
        == len(joined.likely)
        == len(joined.looked_up)
        == len(tree.ranks)
    )
    assert all(parent < node for node, parent in enumerate(tree.parents))
    # the nodes of before are where they were
    assert tree.parents[: len(drafts.tokens)] == drafts.tree.parents
    assert joined.tokens[: len(drafts.tokens)] == drafts.tokens
    assert joined.by_sats == drafts.by_sats
    assert paths(drafts) == before  # unchanged


@pytest.mark.parametrize(
    ("spec", "k"), [("chain", 0), ("chain", 60), ("paper", 13), ((9, 9), 2)], ids=str
)
def test_a_chain_never_makes_more_rows_than_a_pass_may_have(spec, k):
    tree = make_tree(spec, k)
    drafts = Drafts(tree, list(range(len(tree))), [0.5] * len(tree), [False] * len(tree), "root")
    joined = drafts.with_chain(list(range(1000, 1032)), 0.6)
    assert len(joined.tokens) == len(joined.tree) == min(len(tree) + 32, MAX_ROWS)
    assert joined.tokens[len(tree) :] == list(range(1000, 1000 + len(joined.tokens) - len(tree)))


@settings(max_examples=40, deadline=None)
@given(token_trees(), st.lists(st.integers(0, 3), max_size=8), st.data())
def test_kept_drafts_are_the_same_paths(drafts, chain, data):
    joined = drafts.with_chain(chain, 0.6)
    nodes = [0]
    for node in range(1, len(joined.tokens)):
        if joined.tree.parents[node] in nodes and data.draw(st.booleans()):
            nodes.append(node)
    before = paths(joined)
    after = paths(joined.kept(nodes))
    assert len(after) == len(nodes) and all(before[path] == after[path] for path in after)
