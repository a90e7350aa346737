"""The draft head: what the token before says about the next, which a SAT alone cannot know.

All SATs of a group guess at once, so SAT i does not know which token the SAT before it led to. Once that token is known
or drafted, the head moves SAT i's last hidden state, and the best `SHORTLIST` tokens of the SAT are ranked anew by the moved
state (a light form of the sampler head of arXiv 2507.11851). That costs two small matmuls a depth, not a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from . import packed
from .config import SamplingConfig
from .sampling import choose
from .tree import DraftTree

if TYPE_CHECKING:
    from .model import SatModel

SHORTLIST = 64  # tokens of a SAT that are ranked anew


class DraftHead(nn.Module):
    """A two-layer perceptron on a SAT's state and the embedding of the token at the SAT's own position."""

    def __init__(self, hidden: int, size: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.inner = nn.Parameter((torch.randn(size, 2 * hidden, device=device) / (2 * hidden) ** 0.5).to(dtype))
        self.outer = nn.Parameter(torch.zeros(hidden, size, dtype=dtype, device=device))
        self._fused: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None

    def fuse(self) -> None:
        """Prepare for decoding: the two matrices in the processor's own order where it has one, without gradients."""
        self._fused = packed.best_linear(self.inner.detach()), packed.best_linear(self.outer.detach())

    def forward(self, states: Tensor, before: Tensor) -> Tensor:
        """states [N, D]: last hidden states of SATs; before [N, D]: embeddings of the tokens before. Returns moves [N, D]."""
        both = torch.cat([rms_norm(states, states.shape[-1:]), rms_norm(before, before.shape[-1:])], dim=-1)
        if self._fused:
            inner, outer = self._fused
            return outer(silu(inner(both)))
        return linear(silu(linear(both, self.inner.to(both))), self.outer.to(both))


def rerank(model: SatModel, states: Tensor, logits: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The best tokens of SATs, ranked anew. states [N, D], logits [N, V] of SATs, before [N] the tokens before.

    Returns (ids [N, C], scores [N, C]), C = SHORTLIST.
    """
    assert model.head is not None
    scores, ids = logits.topk(min(SHORTLIST, logits.shape[-1]))
    moves = model.head(states, model.model.get_input_embeddings()(before))
    rows = model.model.get_output_embeddings().weight[ids]
    return ids, scores + (rows @ moves[:, :, None])[:, :, 0]


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


@lru_cache(maxsize=256)
def _sources(tree: DraftTree, device: torch.device) -> Tensor:
    """[N] where node j's token stands in [y0, depth 1's candidates, depth 2's, ...]."""
    places = [0 if d == 0 else 1 + (d - 1) * tree.width + rank for d, rank in zip(tree.depths, tree.ranks, strict=True)]
    return torch.tensor(places, device=device)


def draft_tokens(
    model: SatModel, y0: Tensor, states: Tensor, logits: Tensor, index: Tensor, tree: DraftTree, sampling: SamplingConfig
) -> Tensor:
    """[N] tokens of the tree's nodes: y0 [1] at the root, the SATs' candidates below.

    states [k, D], logits [k, V], index [k]: last hidden state, logits and emitted index of each SAT. Without a head, all
    nodes of a depth draw from the same candidates; with one, the children of a node are the best given that node's token.
    """
    if model.head is None:
        candidates = choose(logits, index, sampling, tree.width)  # [k, width]
        return torch.cat([y0, candidates.flatten()])[_sources(tree, y0.device)]
    scores, ids = logits.topk(min(SHORTLIST, logits.shape[-1]))
    rows = model.model.get_output_embeddings().weight[ids]  # [k, C, D]
    tokens = y0.repeat(len(tree))
    for i, (parents, nodes, places, ranks, width) in enumerate(_levels(tree, y0.device)):
        before = model.model.get_input_embeddings()(tokens[parents])
        moves = model.head(states[i].expand_as(before), before)
        given = (scores[i] + moves @ rows[i].T, index[i].expand(len(parents)), sampling, width, ids[i].expand(len(parents), -1))
        tokens[nodes] = choose(*given)[places, ranks]
    return tokens
