r"""Draft trees: which drafts are verified together, and which tree nodes each one may attend to.

Node 0 is the root, x, the last true token; a node at depth i >= 1 holds one candidate of SAT i. A
SAT predicts a position and not a path: without a draft head all nodes of a depth have the same
candidates; with one they are ranked anew for every parent. So a node is a (parent, rank) pair.

    branching 2,1:      0            nodes    0 1 2 3 4        ancestors   0 1 2 3 4
                      /   \          parents  . 0 1 0 3              0     1
                     1     3         depths   0 1 2 1 2              1     1 1
                     |     |         ranks    . 0 0 1 0              2     1 1 1
                     2     4                                         3     1     1
                                                                     4     1     1 1

A tree's shape is given, or it grows (GROWN): of all nodes those are drafted for which the product
of confidences, from the root on, is highest (as in EAGLE-2, arXiv 2406.16858).

The path of first candidates is laid out first and contiguously: where rounding depends on the cache
slot, the likeliest path is then the one that AR would have computed. The order is topological:
parents come before children.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from sdsat.config import MAX_ROWS, InputError, require

# The tree that grows, and its nodes at most.
GROWN = "grown"
GROWN_NODES = 16

# Nodes per depth of the paper's sampling trees (28, 36, 46, 60 and 76 nodes). The totals, the first
# three depths and the narrow ends are the paper's program's; how the middle narrows isn't known to
# us and is our own.
PAPER_WIDTHS = {
    5: (4, 8, 8, 5, 3),
    7: (4, 8, 8, 6, 4, 3, 3),
    9: (4, 8, 8, 6, 5, 5, 4, 3, 3),
    11: (4, 8, 8, 8, 7, 6, 5, 5, 4, 3, 2),
    13: (4, 8, 8, 8, 8, 7, 7, 6, 6, 5, 4, 3, 2),
}


@dataclass(frozen=True)
class DraftTree:
    """A tree of N nodes, node 0 its root.

    parents[j] < j is the parent of node j (-1 for the root), ranks[j] its place among
    its parent's candidates, 0 the best.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """[N] how many steps each node is below the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @property
    def width(self) -> int:
        """How many candidates a SAT must supply."""
        return max(self.ranks) + 1

    def kept(self, nodes: list[int]) -> DraftTree:
        """Return the tree of these nodes only, in their old order.

        nodes: ascending, each with its parent.
        """
        place = {node: i for i, node in enumerate(nodes)}
        parents = tuple(
            -1 if self.parents[node] < 0 else place[self.parents[node]] for node in nodes
        )
        return DraftTree(parents, tuple(self.ranks[node] for node in nodes))

    def truncated(self, depth: int) -> DraftTree:
        """Return the tree without the nodes below `depth`.

        Near max_new_tokens a shallower tree is enough.
        """
        return self.kept([node for node, d in enumerate(self.depths) if d <= depth])

    def children(self) -> list[list[int]]:
        """List the children of each node, ascending."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                children[parent].append(node)
        return children

    def ancestors(self) -> Tensor:
        """Compute [N, N] bool: row j is true at j and at every ancestor of j."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask

    def path(self, node: int) -> list[int]:
        """List the nodes from the root to `node`."""
        nodes = [node]
        while nodes[-1]:
            nodes.append(self.parents[nodes[-1]])
        return nodes[::-1]

    def walk(self, tokens: list[int], targets: Sequence[int | None]) -> list[int]:
        """Follow the model's own next tokens down the tree, from the root on.

        Each step goes to the child that carries the token that the model chooses, until there is
        none.

        tokens[j]: the token at node j; targets[j]: the model's own next token after node j, None
        where it is not known. Returns the nodes of the verified path, root first; the target at its
        last node is the free true token (the next x).
        """
        children = self.children()
        path = [0]
        while True:
            matches = [child for child in children[path[-1]] if tokens[child] == targets[path[-1]]]
            if not matches:
                return path
            path.append(matches[0])


def laid_out(parents: Sequence[int], ranks: Sequence[int]) -> tuple[DraftTree, list[int]]:
    """Lay out a tree of nodes that are given likeliest first.

    It goes depth-first and to the likelier child first, so that the likeliest path leads.

    Args:
        parents: of each node, as a number in the given order; -1 for the root, which is the first.
        ranks: of each node among its parent's candidates.

    Returns:
        The tree, and for each of its nodes the number that it was given by.
    """
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], 1):
        children[parent].append(node)
    order = list[int]()
    waiting = [0]
    while waiting:
        node = waiting.pop()
        order.append(node)
        waiting += reversed(children[node])
    place = {node: i for i, node in enumerate(order)}
    above = (-1, *(place[parents[node]] for node in order[1:]))
    return DraftTree(above, tuple(ranks[node] for node in order)), order


def _from_levels(levels: list[list[tuple[int, int]]]) -> DraftTree:
    """Lay out levels of (parent's place in the level above, rank) pairs as a tree.

    It goes depth-first, so that first candidates lead.
    """
    parents = [-1]
    ranks = [0]

    def visit(node: int, depth: int, place: int) -> None:
        if depth == len(levels):
            return
        for child_place, (parent_place, rank) in enumerate(levels[depth]):
            if parent_place == place:
                parents.append(node)
                ranks.append(rank)
                visit(len(parents) - 1, depth + 1, child_place)

    visit(0, 0, 0)
    return DraftTree(tuple(parents), tuple(ranks))


def from_branching(branching: tuple[int, ...]) -> DraftTree:
    """Make the tree in which every node at depth i-1 has branching[i-1] children.

    So `1,1,1` is a chain of k = 3. Raises InputError for more than MAX_ROWS nodes.
    """
    levels = []
    size = 1
    nodes = 1
    for count in branching:
        nodes += size * count
        require(
            nodes <= MAX_ROWS,
            f"tree={branching}: more than {MAX_ROWS} nodes; use fewer or smaller widths",
        )
        levels.append([(parent, rank) for parent in range(size) for rank in range(count)])
        size *= count
    return _from_levels(levels)


def from_widths(widths: tuple[int, ...]) -> DraftTree:
    """Make the tree of widths[i-1] nodes at depth i, the likeliest ones.

    Of all (parent, rank) children those with the smallest sum of ranks along the path are taken:
    the sum stands for (un)likelihood; ties go to the better parent. Parents of a level are ordered
    the same way.
    """
    levels = []
    costs = [0]
    for width in widths:
        options = sorted(
            (cost + rank, parent, rank)
            for parent, cost in enumerate(costs)
            for rank in range(width)
        )
        levels.append([(parent, rank) for _, parent, rank in options[:width]])
        costs = [cost for cost, _, _ in options[:width]]
    return _from_levels(levels)


@cache
def make_tree(spec: str | tuple[int, ...], k: int) -> DraftTree:
    """Make the draft tree for k SATs.

    spec: 'chain', 'paper', or a branching list; a list shorter than k ends in a chain. 'auto' is a
    chain here: `resolved` in sdsat/decoding/resolve.py chooses by model. Raises InputError for
    another spec, for too many nodes, and for a k that the paper has no tree for; and for 'grown',
    whose shape is found with its tokens.
    """
    if spec in ("auto", "chain"):
        spec = (1,)
    if spec == "paper":
        require(
            k in PAPER_WIDTHS,
            f"tree=paper with k={k}: the paper's trees are for k in {sorted(PAPER_WIDTHS)}",
        )
        return from_widths(PAPER_WIDTHS[k])
    if isinstance(spec, str):
        raise InputError(
            f"tree={spec!r}: expected 'grown', 'chain', 'paper' or a branching list such as 2,1,1"
        )
    name = ",".join(map(str, spec))
    require(all(width >= 1 for width in spec), f"tree={name}: every width must be 1 or more")
    try:
        return from_branching((spec + (1,) * k)[:k])
    except InputError:
        message = (
            f"tree={name} with k={k}: more than {MAX_ROWS} nodes; expected fewer or smaller "
            "widths, or a smaller k"
        )
        raise InputError(message) from None


def given_tree(spec: str | tuple[int, ...], k: int) -> DraftTree | None:
    """Make the draft tree for k SATs whose shape is given; None for one that grows.

    Raises InputError as `make_tree`.
    """
    return None if spec == GROWN else make_tree(spec, k)


def parse_tree(text: str) -> str | tuple[int, ...]:
    """Read 'auto', 'grown', 'chain', 'paper', or '2,1,1' -> (2, 1, 1).

    Raises InputError for any other text.
    """
    if text in ("auto", "chain", "paper", GROWN):
        return text
    try:
        return tuple(int(width) for width in text.split(","))
    except (ValueError, AttributeError):
        raise InputError(
            f"tree={text!r}: expected 'auto', 'grown', 'chain', 'paper' or a branching list such "
            "as 2,1,1"
        ) from None
