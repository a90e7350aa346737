"""Drafts: the tokens that SATs guess, and those looked up, as one tree below the last true token x.

A pass of the exact engine that has SATs gives the token after x itself, which is true, and drafts below it. A pass in 8 bits
(native.py) only drafts: what it says at x is the first draft, which is wrong now and then, and the SATs' come below that one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import MAX_ROWS, SamplingConfig
from .engine import top
from .head import SHORTLIST
from .sampling import choose_columns
from .tree import DraftTree

if TYPE_CHECKING:
    from .model import SatModel

_ROOT = DraftTree((-1,), (0,))
OWN = 0.97  # how likely the first draft of a pass in 8 bits is taken to be before anything is known


@dataclass
class Drafts:
    """A tree of drafts below x, which is node 0. likely[j]: how likely node j is right, given that its parent is.

    looked_up[j]: the draft comes from the text so far, and not (or not only) from a SAT. kind: where the SATs were that
    drafted, see planner.KINDS. rounded: they did in a pass in 8 bits, so that node 1 is what that pass says at x.
    """

    tree: DraftTree
    tokens: list[int]
    likely: list[float]
    looked_up: list[bool]
    kind: str = "none"
    rounded: bool = False

    @property
    def by_sats(self) -> bool:
        """Whether SATs have drafted."""
        return self.kind != "none"

    @classmethod
    def none(cls, x: int) -> Drafts:
        return cls(_ROOT, [x], [1.0], [False])

    @classmethod
    def of_sats(cls, tree: DraftTree, values: list[float], kind: str) -> Drafts:
        """values: what `draft_tokens` gave, flat."""
        nodes = len(tree)
        return cls(tree, [int(value) for value in values[:nodes]], values[nodes:], [False] * nodes, kind)

    @classmethod
    def of_rounded(cls, x: int, tree: DraftTree, values: list[float]) -> Drafts:
        """The tree one node lower: below x the token at its root, which a pass in 8 bits gave for x itself."""
        below = cls.of_sats(tree, values, "rounded")
        parents = (-1, *(parent + 1 for parent in tree.parents))
        likely, looked_up = [1.0, OWN, *below.likely[1:]], [False] * len(parents)
        return cls(DraftTree(parents, (0, *tree.ranks)), [x, *below.tokens], likely, looked_up, "rounded", True)

    def with_chain(self, tokens: list[int], likely: float) -> Drafts:
        """The tree with a looked-up chain added below x; where it says what a draft says already, that draft is in both."""
        if not tokens:
            return self
        parents, ranks = list(self.tree.parents), list(self.tree.ranks)
        out = replace(self, tokens=list(self.tokens), likely=list(self.likely), looked_up=list(self.looked_up))
        node = 0
        for token in tokens:
            same = [j for j in range(len(parents)) if parents[j] == node and out.tokens[j] == token]
            if not same and len(parents) >= MAX_ROWS:
                break
            if not same:
                parents.append(node)
                ranks.append(0)
                out.tokens.append(token)
                out.likely.append(likely)
                out.looked_up.append(True)
            node = same[0] if same else len(parents) - 1
            out.likely[node] = max(out.likely[node], likely)
            out.looked_up[node] = True
        out.tree = DraftTree(tuple(parents), tuple(ranks))
        return out

    def kept(self, nodes: list[int]) -> Drafts:
        if len(nodes) == len(self.tokens):
            return self
        tokens, likely = [self.tokens[node] for node in nodes], [self.likely[node] for node in nodes]
        looked_up = [self.looked_up[node] for node in nodes]
        return Drafts(self.tree.kept(nodes), tokens, likely, looked_up, self.kind, self.rounded and 1 in nodes)


@lru_cache(maxsize=256)
def _levels(tree: DraftTree, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor, Tensor, int]]:
    """For each depth: (its parents' nodes [P], its nodes [N], each one's place among the parents [N], and rank [N], width)."""
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
    model: SatModel, x: Tensor, states: Tensor, logits: Tensor, index: int, tree: DraftTree, sampling: SamplingConfig
) -> Tensor:
    """[2, N] float64: tokens of the tree's nodes, x [1] at the root and the SATs' candidates below, and how likely each seems.

    states [k, D], logits [k, V]: last hidden states and logits of the SATs; index: emitted index of the first draft. Without a
    head, all nodes of a depth draw from the same candidates; with one, the children of a node are the best given that node's
    token. Likely: the token's share among the SHORTLIST best of its SAT, or as many as the tree is wide. Nothing is read by the
    host.
    """
    shortlist = min(max(SHORTLIST, tree.width), logits.shape[-1])
    if model.native:
        return model.native.draft(x, states, logits, shortlist, index, tree, sampling)
    scores, ids = top(model, logits, shortlist)
    rows = model.model.get_output_embeddings().weight[ids].to(states.dtype) if model.head else None  # [k, C, D]
    tokens, likely = x.repeat(len(tree)), torch.ones(len(tree), dtype=torch.float64, device=x.device)
    for i, (parents, nodes, places, ranks, width) in enumerate(_levels(tree, x.device)):
        given = scores[i].expand(len(parents), -1)
        if model.head is not None and rows is not None:
            before = model.model.get_input_embeddings()(tokens[parents])
            given = given + model.head(states[i].expand_as(before), before) @ rows[i].T
        at = torch.full((len(parents),), index + i, device=x.device)
        columns = choose_columns(given, at, sampling, width, ids[i])
        tokens[nodes] = ids[i][columns][places, ranks]
        likely[nodes] = given.double().softmax(-1).gather(-1, columns)[places, ranks]
    return torch.stack([tokens.double(), likely])
