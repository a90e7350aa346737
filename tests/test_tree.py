"""Draft trees against literal matrices and brute force over rank paths."""

import itertools
import operator

import pytest
from common import one_line_error
from hypothesis import given
from hypothesis import strategies as st

from sdsat.config import MAX_ROWS
from sdsat.method.tree import PAPER_WIDTHS, from_branching, make_tree, parse_tree

BRANCHINGS = (
    st.lists(st.integers(1, 4), max_size=5)
    .map(tuple)
    .filter(lambda branching: sum(itertools.accumulate(branching, operator.mul)) < MAX_ROWS)
)


def path_to(tree, node):
    """Nodes from the root to `node`."""
    path = [node]
    while tree.parents[path[0]] >= 0:
        path.insert(0, tree.parents[path[0]])
    return path


def rank_paths(tree):
    """Each node but the root as the ranks along its path: a tree, whatever its numbering."""
    return [
        tuple(tree.ranks[step] for step in path_to(tree, node)[1:]) for node in range(1, len(tree))
    ]


def matrix(*rows):
    return [[int(cell) for cell in row.split()] for row in rows]


@pytest.mark.parametrize(
    ("spec", "k", "depths", "ranks", "ancestors"),
    [
        # 0
        ("chain", 0, (0,), (0,), matrix("1")),
        # 0 - 1 - 2 - 3
        (
            "chain",
            3,
            (0, 1, 2, 3),
            (0, 0, 0, 0),
            matrix("1 0 0 0", "1 1 0 0", "1 1 1 0", "1 1 1 1"),
        ),
        # 0 - 1 - 2
        #   \ 3 - 4
        (
            (2, 1),
            2,
            (0, 1, 2, 1, 2),
            (0, 0, 0, 1, 0),
            matrix("1 0 0 0 0", "1 1 0 0 0", "1 1 1 0 0", "1 0 0 1 0", "1 0 0 1 1"),
        ),
        # 0 - 1 - 2
        #       \ 3
        ((1, 2), 2, (0, 1, 2, 2), (0, 0, 0, 1), matrix("1 0 0 0", "1 1 0 0", "1 1 1 0", "1 1 0 1")),
        # a list shorter than k ends in a chain, a longer one is cut
        ((2,), 2, (0, 1, 2, 1, 2), (0, 0, 0, 1, 0), None),
        ((2, 1, 3, 3), 2, (0, 1, 2, 1, 2), (0, 0, 0, 1, 0), None),
    ],
    ids=str,
)
def test_small_trees(spec, k, depths, ranks, ancestors):
    tree = make_tree(spec, k)
    assert (tree.depths, tree.ranks) == (depths, ranks)
    if ancestors is not None:
        assert tree.ancestors().int().tolist() == ancestors


@given(BRANCHINGS)
def test_branching_trees(branching):
    tree = from_branching(branching)
    levels = [
        itertools.product(*map(range, branching[:depth])) for depth in range(1, len(branching) + 1)
    ]
    assert sorted(rank_paths(tree)) == sorted(path for level in levels for path in level)
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert tree.depths == tuple(len(path_to(tree, node)) - 1 for node in range(len(tree)))
    assert tree.width == max(branching, default=1)
    first = range(len(branching) + 1)  # the path of first candidates is nodes 0, 1, 2, ...
    assert tree.parents[: len(first)] == tuple(node - 1 for node in first)
    assert set(tree.ranks[: len(first)]) == {0}
    mask = tree.ancestors()
    assert mask.tolist() == [
        [node in path_to(tree, row) for node in range(len(tree))] for row in range(len(tree))
    ]


@pytest.mark.parametrize(("k", "nodes"), [(5, 28), (7, 36), (9, 46), (11, 60), (13, 76)])
def test_paper_trees(k, nodes):
    tree = make_tree("paper", k)
    assert len(tree) == 1 + nodes <= MAX_ROWS
    widths = [tree.depths.count(depth) for depth in range(1, k + 1)]
    assert widths[:3] == [4, 8, 8]
    assert widths[-1] in (2, 3)
    assert widths[1:] == sorted(widths[1:], reverse=True)
    assert tree.parents[: k + 1] == tuple(range(-1, k))
    assert set(tree.ranks[: k + 1]) == {0}
    assert all(parent < node for node, parent in enumerate(tree.parents))
    paths = rank_paths(tree)
    assert len(set(paths)) == nodes
    # each level holds the children with the smallest sums of ranks
    for depth, width in enumerate(widths, 1):
        above = [()] if depth == 1 else [path for path in paths if len(path) == depth - 1]
        sums = sorted(sum(path) + rank for path in above for rank in range(nodes))[:width]
        assert sorted(sum(path) for path in paths if len(path) == depth) == sums


@given(BRANCHINGS, st.integers(0, 5))
def test_truncated_is_the_tree_of_fewer_depths(branching, depth):
    assert from_branching(branching).truncated(depth) == from_branching(branching[:depth])


@pytest.mark.parametrize("depth", [0, 1, 3, 4, 5, 9])
def test_truncated_paper_tree_keeps_the_upper_levels_in_order(depth):
    tree = make_tree("paper", 5)
    cut = tree.truncated(depth)
    assert rank_paths(cut) == [path for path in rank_paths(tree) if len(path) <= depth]
    assert all(parent < node for node, parent in enumerate(cut.parents))


@given(BRANCHINGS, st.data())
def test_walk_is_the_longest_agreeing_path(branching, data):
    tree = from_branching(branching)
    # few ids, so that paths do agree
    candidates = [data.draw(st.permutations(range(4))) for _ in branching]
    tokens = [99] + [
        candidates[d - 1][r] for d, r in zip(tree.depths[1:], tree.ranks[1:], strict=True)
    ]
    targets = data.draw(st.lists(st.integers(0, 4), min_size=len(tree), max_size=len(tree)))
    paths = [path_to(tree, node) for node in range(len(tree))]
    agreeing = [
        path for path in paths if all(tokens[b] == targets[a] for a, b in itertools.pairwise(path))
    ]
    assert tree.walk(tokens, targets) == max(agreeing, key=len)


def test_walk_does_not_step_over_a_wrong_token():
    tree = make_tree((2, 1), 2)  # 0 - 1 - 2, 0 - 3 - 4
    assert tree.walk([9, 1, 2, 3, 4], [1, 2, 0, 0, 0]) == [0, 1, 2]
    assert tree.walk([9, 1, 2, 3, 4], [3, 2, 0, 4, 0]) == [0, 3, 4]
    assert tree.walk([9, 1, 2, 3, 4], [3, 2, 0, 2, 0]) == [0, 3]
    assert tree.walk([9, 1, 2, 3, 4], [2, 2, 0, 4, 0]) == [0]


@pytest.mark.parametrize(
    ("text", "spec"), [("chain", "chain"), ("paper", "paper"), ("2,1,1", (2, 1, 1)), ("4", (4,))]
)
def test_parse_tree(text, spec):
    assert parse_tree(text) == spec


@pytest.mark.parametrize("text", ["", "2,,1", "two", "2;1", "1.5", "papers"])
def test_parse_tree_refuses(text):
    with one_line_error(f"tree={text!r}"):
        parse_tree(text)


@pytest.mark.parametrize(
    ("spec", "k", "named"),
    [
        ("paper", 6, "k=6"),
        ("paper", 0, str(sorted(PAPER_WIDTHS))),
        ("bush", 5, "tree='bush'"),
        ((2, 0, 1), 3, "tree=2,0,1:"),
        ((-1,), 1, "tree=-1:"),
        ((10, 10), 2, "tree=10,10 with k=2"),
        ((10**15,), 1, "more than 96 nodes"),  # before there are so many
        ("chain", MAX_ROWS, f"{MAX_ROWS} nodes"),
    ],
    ids=str,
)
def test_make_tree_refuses(spec, k, named):
    with one_line_error("tree=", named):
        make_tree(spec, k)


def test_largest_tree():
    assert len(make_tree("chain", MAX_ROWS - 1)) == MAX_ROWS
