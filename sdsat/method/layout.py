"""Rows of a pass: who sees whom, and at which position."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sdsat.method.tree import DraftTree


class SatGroup(NamedTuple):
    """`size` SATs that draft what follows the token after a node of a draft tree."""

    node: int
    size: int


@lru_cache(maxsize=1024)
def pass_layout(
    tree: DraftTree, groups: tuple[SatGroup, ...], rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Lay out the rows of one sequence's pass: the tree's nodes, then its SAT groups, then padding.

    A node sees its ancestors and itself; a SAT its node, that node's ancestors and the SATs of its
    group up to itself; a padding row itself. Offsets count from the root, which stands at 0; SAT i
    of a node at depth d stands at d + i.

        chain of 2, groups       within  1              offsets  0
        (0, 2) and (1, 1):               1 1                     1
                                         1   1                   1
                                         1   1 1                 2
                                         1 1     1               2

    Args:
        tree: of drafts, x at its root.
        groups: where SATs stand, and how many.
        rows: of the pass, padding included.
        device: of the result.

    Returns:
        Within [rows, rows] bool, which rows a row sees, and position offsets [rows].
    """
    within = torch.eye(rows, dtype=torch.bool)
    nodes = len(tree)
    depths = tree.depths
    within[:nodes, :nodes] = tree.ancestors()
    offsets = torch.zeros(rows, dtype=torch.long)
    offsets[:nodes] = torch.tensor(depths)
    first = nodes
    for node, size in groups:
        for i in range(size):
            row = first + i
            within[row, :nodes] = within[node, :nodes]
            within[row, first : row + 1] = True
            offsets[row] = depths[node] + 1 + i
        first += size
    return within.to(device), offsets.to(device)


@dataclass(frozen=True)
class Layout:
    """Where the R rows of a pass over one or more sequences stand: nodes, then SATs, then padding.

    Attributes:
        within: [R, R] bool, which rows of the pass a row sees.
        sequences: [R] which sequence a row belongs to.
        offsets: [R] a row's position, from that sequence's length on.
        places: [R] a row's slot from there on, which is its number among the sequence's own rows.
        width: how many rows a sequence has at most.
    """

    within: Tensor
    offsets: Tensor
    sequences: Tensor
    places: Tensor
    width: int


# What one sequence brings into a pass: nodes, and SAT groups.
Shape = tuple[DraftTree, tuple[SatGroup, ...]]


def batch_layout(shapes: list[Shape], rows: int, device: torch.device) -> Layout:
    """Lay out a pass over sequences of these shapes.

    Rows beyond theirs, up to `rows`, are padding and belong to the last sequence.

    Two sequences, x alone and x with a SAT:

        within  1          sequences  0    offsets  0    places  0
                  1                   1             0            0
                  1 1                 1             1            1
    """
    if len(shapes) == 1:
        return _layout_of_one(*shapes[0], rows, device)
    counts = [len(tree) + sum(size for _, size in groups) for tree, groups in shapes]
    held = [*counts[:-1], rows - sum(counts[:-1])]
    parts = [
        pass_layout(tree, groups, size, device)
        for (tree, groups), size in zip(shapes, held, strict=True)
    ]
    # Row numbers, counted sequence by sequence, of nodes, of SATs and of padding.
    kinds: tuple[list[int], list[int], list[int]] = ([], [], [])
    places = list[int]()
    sequences = list[int]()
    first = 0
    for number, ((tree, _), count, size) in enumerate(zip(shapes, counts, held, strict=True)):
        ends = (0, len(tree), count, size)
        for kind, start, end in zip(kinds, ends[:-1], ends[1:], strict=True):
            kind += range(first + start, first + end)
        places += range(size)
        sequences += [number] * size
        first += size
    order = torch.tensor([number for kind in kinds for number in kind], device=device)
    within = torch.block_diag(*(within for within, _ in parts)).bool()[order][:, order]
    offsets = torch.cat([offsets for _, offsets in parts])[order]
    whose, where = (torch.tensor(part, device=device)[order] for part in (sequences, places))
    return Layout(within, offsets, whose, where, max(held))


@lru_cache(maxsize=1024)
def _layout_of_one(
    tree: DraftTree, groups: tuple[SatGroup, ...], rows: int, device: torch.device
) -> Layout:
    numbers = torch.arange(rows, device=device)
    return Layout(
        *pass_layout(tree, groups, rows, device), torch.zeros_like(numbers), numbers, rows
    )
