"""From SATs' states and logits to drafts, through the draft head."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdsat.config import SamplingConfig
from sdsat.engines.transformers import top
from sdsat.method.sampling import choose_columns
from sdsat.method.tree import DraftTree
from sdsat.models.head import SHORTLIST

if TYPE_CHECKING:
    from sdsat.models.loading import SatModel


@lru_cache(maxsize=256)
def _levels(
    tree: DraftTree, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, int]]:
    """For each depth: (its parents' nodes [P], its nodes [N], each one's place among the parents
    [N], and rank [N], width).
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
    x: Tensor,
    states: Tensor,
    logits: Tensor,
    index: int,
    tree: DraftTree,
    sampling: SamplingConfig,
) -> Tensor:
    """[2, N] float64: tokens of the tree's nodes, x [1] at the root and the SATs' candidates below,
    and how likely each seems.

    states [k, D], logits [k, V]: last hidden states and logits of the SATs; index: emitted index of
    the first draft. Without a head, all nodes of a depth draw from the same candidates; with one,
    the children of a node are the best given that node's token. Likely: the token's share among the
    SHORTLIST best of its SAT, or as many as the tree is wide. Nothing is read by the host.
    """
    shortlist = min(max(SHORTLIST, tree.width), logits.shape[-1])
    if model.native:
        return model.native.draft(x, states, logits, shortlist, index, tree, sampling)
    scores, ids = top(model, logits, shortlist)
    # [k, C, D]
    rows = model.model.get_output_embeddings().weight[ids].to(states.dtype) if model.head else None
    tokens = x.repeat(len(tree))
    likely = torch.ones(len(tree), dtype=torch.float64, device=x.device)
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
