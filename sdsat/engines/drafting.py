"""Drafting: from SATs' states and logits to a tree of tokens, through the draft head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sdsat.config import SamplingConfig
from sdsat.method.copies import LONGEST, copied, last_tokens
from sdsat.method.sampling import candidates
from sdsat.method.tree import DraftTree
from sdsat.models.head import SHORTLIST
from sdsat.models.sat_model import SatModel

Largest = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # see engines.base.Engine.largest


@dataclass(frozen=True)
class Guesses:
    """What the SATs of one group guess below x, and how tokens are drawn of it.

    Attributes:
        text: [L] tokens of prompt and output up to the root's one, which is the last.
        states: [k, D] last hidden states of the SATs.
        logits: [k, C] of the SATs.
        index: emitted index of the first draft.
        sampling: how candidates are drawn, with the noise of their emitted positions.
        ids: [C] the token of each logit; None: one for each token of the vocabulary.
    """

    text: Tensor
    states: Tensor
    logits: Tensor
    index: int
    sampling: SamplingConfig
    ids: Tensor | None = None

    @property
    def path(self) -> Tensor:
        """[1, LONGEST] the text's last tokens, of which x is the last."""
        return last_tokens(self.text)[None]


def shortlist_of(width: int, logits: int) -> int:
    """Return how many of a SAT's best tokens are looked at.

    width: candidates of a node at most. logits: how many a SAT has.
    """
    return min(max(SHORTLIST, width), logits)


@lru_cache(maxsize=256)
def _levels(
    tree: DraftTree, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, int]]:
    """List what drafting needs of each depth of a tree, from depth 1 on.

    For each depth: the path to each of its parents [P, LONGEST], its nodes [N], each one's place
    among the parents [N], and rank [N]; and how many children a parent has at most. Nodes are
    numbered from -1 + LONGEST on, because the tokens before the root come first.
    """
    first = LONGEST - 1
    levels = []
    for depth in range(1, max(tree.depths) + 1):
        nodes = [node for node, d in enumerate(tree.depths) if d == depth]
        parents = sorted({tree.parents[node] for node in nodes})
        places = [parents.index(tree.parents[node]) for node in nodes]
        ranks = [tree.ranks[node] for node in nodes]
        above = [[*range(first), *(first + node for node in tree.path(p))] for p in parents]
        paths = [path[-LONGEST:] for path in above]
        nodes = [first + node for node in nodes]
        tensors = [torch.tensor(part, device=device) for part in (paths, nodes, places, ranks)]
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
    device = guesses.text.device
    tokens = torch.nn.functional.pad(guesses.path[0], (0, len(tree) - 1))
    likely = torch.ones(len(tokens), dtype=torch.float64, device=device)
    for i, (paths, nodes, places, ranks, width) in enumerate(_levels(tree, device)):
        found, shares = sats.candidates(i, tokens[paths], width)
        tokens[nodes] = found[places, ranks]
        likely[nodes] = shares[places, ranks]
    return torch.stack([tokens.double(), likely])[:, LONGEST - 1 :]


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
    path = guesses.path  # [P, LONGEST] to a depth's nodes
    x = path[:, -1]
    width = min(nodes - 1, guesses.logits.shape[-1])
    sats = _Sats(model, largest, guesses, width)
    none = torch.zeros_like(x)
    above = none  # the numbers of a depth's nodes, in the order in which they were found
    one = torch.ones(1, dtype=torch.float64, device=x.device)
    found = [(none, none, x, one, one)]  # by depth: parents, ranks, tokens, likely, through
    count = 1
    for i in range(len(guesses.states) if width else 0):
        *_, through = found[-1]
        tokens, likely = sats.candidates(i, path, width)
        reached, best = _likeliest((through[:, None] * likely).flatten(), nodes - 1)
        taken = tokens.flatten()[best]
        path = torch.cat([path[best // width, 1:], taken[:, None]], 1)
        found.append((above[best // width], best % width, taken, likely.flatten()[best], reached))
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
    """The candidates of one group's SATs, which the draft head ranks by the tokens before them."""

    def __init__(self, model: SatModel, largest: Largest, guesses: Guesses, width: int):
        """Make the shortlist of each SAT. width: candidates of a node at most."""
        logits = guesses.logits
        self.model = model
        self.guesses = guesses
        self.scores, places = largest(logits, shortlist_of(width, logits.shape[-1]))
        self.ids = places if guesses.ids is None else guesses.ids[places]
        self.rows = model.output_rows(self.ids).to(guesses.states.dtype) if model.head else None

    def candidates(self, i: int, path: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Find the best tokens [P, width] of SAT i after a path [P, LONGEST], and how likely."""
        count = len(path)
        given = self.scores[i].expand(count, -1)
        head = self.model.head
        if head is not None and self.rows is not None:
            embedded = self.model.embed_standard(path[:, -1])
            states = self.guesses.states[i].expand_as(embedded)
            text = self.guesses.text
            known = torch.full((1,), len(text), device=text.device)
            found = copied(text[None], known, path, self.ids[i : i + 1])
            given = head.rerank(given, states, embedded, self.rows[i : i + 1], found)
        at = torch.full((count,), self.guesses.index + i, device=path.device)
        columns, likely = candidates(given, at, self.guesses.sampling, width, self.ids[i])
        return self.ids[i][columns], likely
