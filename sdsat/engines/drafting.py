"""Drafting: from SATs' states and logits to a tree of tokens, through the draft head."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from sdsat.config import SamplingConfig
from sdsat.method.sampling import choose_columns
from sdsat.method.tree import DraftTree
from sdsat.models.head import SHORTLIST
from sdsat.models.sat_model import SatModel

Largest = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # see engines.base.Engine.largest


def shortlist_of(tree: DraftTree, vocabulary: int) -> int:
    """Return how many of a SAT's best tokens are looked at, at least the width of the tree."""
    return min(max(SHORTLIST, tree.width), vocabulary)


@lru_cache(maxsize=256)
def _levels(
    tree: DraftTree, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, int]]:
    """List what drafting needs of each depth of a tree, from depth 1 on.

    For each depth: its parents' nodes [P], its nodes [N], each one's place among the parents [N],
    and rank [N]; and how many children a parent has at most.
    """
    levels = []
    for depth in range(1, max(tree.depths) + 1):
        nodes = [node for node, d in enumerate(tree.depths) if d == depth]
        parents = sorted({tree.parents[node] for node in nodes})
        places = [parents.index(tree.parents[node]) for node in nodes]
        ranks = [tree.ranks[node] for node in nodes]
        tensors = [torch.tensor(part, device=device) for part in (parents, nodes, places, ranks)]
        levels.append((tensors[0], tensors[1], tensors[2], tensors[3], max(ranks) + 1))
    return levels


def draft_tokens(
    model: SatModel,
    largest: Largest,
    x: Tensor,
    states: Tensor,
    logits: Tensor,
    index: int,
    tree: DraftTree,
    sampling: SamplingConfig,
) -> Tensor:
    """Draft a tree below x with the SATs of one group, one SAT a depth. The host reads nothing.

    Without a head, all nodes of a depth draw from the same candidates; with one, the children of a
    node are the best given that node's token.

    Args:
        model: whose head and embeddings.
        largest: finds the largest logits.
        x: [1] the token at the root.
        states: [k, D] last hidden states of the SATs.
        logits: [k, V] of the SATs.
        index: emitted index of the first draft.
        tree: its shape, at most k deep.
        sampling: how candidates are drawn, with the noise of their emitted positions.

    Returns:
        [2, N] float64: the tokens of the tree's nodes, and how likely each seems given its parent:
        its share among the best tokens of its SAT that are looked at.
    """
    scores, ids = largest(logits, shortlist_of(tree, logits.shape[-1]))
    head = model.head
    rows = model.output_rows(ids).to(states.dtype) if head else None  # [k, C, D]
    tokens = x.repeat(len(tree))
    likely = torch.ones(len(tree), dtype=torch.float64, device=x.device)
    for i, (parents, nodes, places, ranks, width) in enumerate(_levels(tree, x.device)):
        given = scores[i].expand(len(parents), -1)
        if head is not None and rows is not None:
            before = model.embed_standard(tokens[parents])
            given = head.rerank(given, states[i].expand_as(before), before, rows[i : i + 1])
        at = torch.full((len(parents),), index + i, device=x.device)
        columns = choose_columns(given, at, sampling, width, ids[i])
        tokens[nodes] = ids[i][columns][places, ranks]
        likely[nodes] = given.double().softmax(-1).gather(-1, columns)[places, ranks]
    return torch.stack([tokens.double(), likely])
