"""Drafting: from SATs' states and logits to a tree of tokens, through the draft head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sdsat.config import SamplingConfig
from sdsat.method.sampling import candidates
from sdsat.method.tree import DraftTree
from sdsat.models.head import SHORTLIST
from sdsat.models.sat_model import SatModel

Largest = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # see engines.base.Engine.largest


@dataclass(frozen=True)
class Guesses:
    """What the SATs of one group guess below x, and how tokens are drawn of it.

    Attributes:
        x: [1] the token at the root.
        states: [k, D] last hidden states of the SATs.
        logits: [k, V] of the SATs.
        index: emitted index of the first draft.
        sampling: how candidates are drawn, with the noise of their emitted positions.
    """

    x: Tensor
    states: Tensor
    logits: Tensor
    index: int
    sampling: SamplingConfig


def shortlist_of(width: int, vocabulary: int) -> int:
    """Return how many of a SAT's best tokens are looked at.

    width: candidates of a node at most.
    """
    return min(max(SHORTLIST, width), vocabulary)


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


def draft_tokens(model: SatModel, largest: Largest, guesses: Guesses, tree: DraftTree) -> Tensor:
    """Draft a tree below x with the SATs of one group, one SAT a depth. The host reads nothing.

    Without a head, all nodes of a depth draw from the same candidates; with one, the children of a
    node are the best given that node's token.

    Args:
        model: whose head and embeddings.
        largest: finds the largest logits.
        guesses: of the group.
        tree: its shape, at most k deep.

    Returns:
        [2, N] float64: the tokens of the tree's nodes, and how likely each seems given its parent,
        by the best tokens of its SAT that are looked at (`method.sampling.candidates`).
    """
    sats = _Sats(model, largest, guesses, tree.width)
    x = guesses.x
    tokens = x.repeat(len(tree))
    likely = torch.ones(len(tree), dtype=torch.float64, device=x.device)
    for i, (parents, nodes, places, ranks, width) in enumerate(_levels(tree, x.device)):
        found, shares = sats.candidates(i, tokens[parents], width)
        tokens[nodes] = found[places, ranks]
        likely[nodes] = shares[places, ranks]
    return torch.stack([tokens.double(), likely])


def grow_tokens(model: SatModel, largest: Largest, guesses: Guesses, nodes: int) -> Tensor:
    """Grow a tree below x: of all that could be drafted, the likeliest nodes.

    They are the likeliest by the product of confidences from the root on, which is never above
    their parents'. So no more nodes of a depth than there are of all need be looked at. The host
    reads nothing.

    Args:
        model: whose head and embeddings.
        largest: finds the largest logits.
        guesses: of the group.
        nodes: N, how many, the root included.

    Returns:
        [4, N] float64, likeliest first: parents (-1 for the root), ranks among the parents'
        candidates, tokens, and how likely each seems given its parent; 0 where there are no more.
    """
    x = guesses.x
    width = min(nodes - 1, guesses.logits.shape[-1])
    sats = _Sats(model, largest, guesses, width)
    none = torch.zeros_like(x)
    above = none  # the numbers of a depth's nodes, in the order in which they were found
    one = torch.ones(1, dtype=torch.float64, device=x.device)
    found = [(none, none, x, one, one)]  # by depth: parents, ranks, tokens, likely, through
    count = 1
    for i in range(len(guesses.states) if width else 0):
        _, _, before, _, through = found[-1]
        tokens, likely = sats.candidates(i, before, width)
        reached, best = _likeliest((through[:, None] * likely).flatten(), nodes - 1)
        taken = (tokens.flatten()[best], likely.flatten()[best], reached)
        found.append((above[best // width], best % width, *taken))
        above = torch.arange(count, count + len(best), device=x.device)
        count += len(best)
    parents, ranks, tokens, likely, through = (torch.cat(part) for part in zip(*found, strict=True))
    through, kept = _likeliest(through, nodes)
    places = torch.empty_like(parents)  # of all that was found, among what is kept
    places[kept] = torch.arange(len(kept), device=x.device)
    parents = places[parents[kept]]
    parents[0] = -1
    numbers = torch.stack([parents, ranks[kept], tokens[kept]]).double()
    return torch.cat([numbers, (likely[kept] * (through > 0))[None]])


def _likeliest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the largest values and their places; of equals those before come first."""
    values, places = values.sort(descending=True, stable=True)
    return values[:count], places[:count]


class _Sats:
    """The candidates of one group's SATs, which the draft head ranks by the token before them."""

    def __init__(self, model: SatModel, largest: Largest, guesses: Guesses, width: int):
        """Make the shortlist of each SAT. width: candidates of a node at most."""
        logits = guesses.logits
        self.model = model
        self.guesses = guesses
        self.scores, self.ids = largest(logits, shortlist_of(width, logits.shape[-1]))
        self.rows = model.output_rows(self.ids).to(guesses.states.dtype) if model.head else None

    def candidates(self, i: int, before: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Find the best tokens [P, width] of SAT i after each of `before` [P], and how likely."""
        given = self.scores[i].expand(len(before), -1)
        head = self.model.head
        if head is not None and self.rows is not None:
            embedded = self.model.embed_standard(before)
            states = self.guesses.states[i].expand_as(embedded)
            given = head.rerank(given, states, embedded, self.rows[i : i + 1])
        at = torch.full((len(before),), self.guesses.index + i, device=before.device)
        columns, likely = candidates(given, at, self.guesses.sampling, width, self.ids[i])
        return self.ids[i][columns], likely
