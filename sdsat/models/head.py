"""The draft head: what the token before says about the next, which a SAT alone cannot know.

All SATs of a group guess at once, so SAT i does not know which token the SAT before it led to. Once
that token is known or drafted, the head moves SAT i's last hidden state, and the best `SHORTLIST`
tokens of the SAT are ranked anew by the moved state (a light form of the sampler head of arXiv
2507.11851). That costs two small matmuls a depth, not a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from sdsat.models import packed

if TYPE_CHECKING:
    from sdsat.models.loading import SatModel

SHORTLIST = 64  # tokens of a SAT that are ranked anew


class DraftHead(nn.Module):
    """A two-layer perceptron on a SAT's state and the embedding of the token at the SAT's own
    position.
    """

    def __init__(self, hidden: int, size: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.inner = nn.Parameter(
            (torch.randn(size, 2 * hidden, device=device) / (2 * hidden) ** 0.5).to(dtype)
        )
        self.outer = nn.Parameter(torch.zeros(hidden, size, dtype=dtype, device=device))
        self._fused: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None

    def fuse(self) -> None:
        """Prepare for decoding: the two matrices in the processor's own order where it has one,
        without gradients.
        """
        self._fused = (
            packed.best_linear(self.inner.detach()),
            packed.best_linear(self.outer.detach()),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what `fuse` has made, as an adapter's."""
        return {**self.__dict__, "_fused": None}

    def forward(self, states: Tensor, before: Tensor) -> Tensor:
        """states [N, D]: last hidden states of SATs; before [N, D]: embeddings of the tokens
        before. Returns moves [N, D].
        """
        both = torch.cat(
            [rms_norm(states, states.shape[-1:]), rms_norm(before, before.shape[-1:])], dim=-1
        )
        if self._fused:
            inner, outer = self._fused
            return outer(silu(inner(both)))
        return linear(silu(linear(both, self.inner.to(both))), self.outer.to(both))


def rerank(
    model: SatModel, states: Tensor, logits: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """The best tokens of SATs, ranked anew.

    states [N, D], logits [N, V] of SATs, before [N] the tokens before.

    Returns (ids [N, C], scores [N, C]), C = SHORTLIST.
    """
    assert model.head is not None
    scores, ids = logits.topk(min(SHORTLIST, logits.shape[-1]))
    moves = model.head(states, model.model.get_input_embeddings()(before))
    rows = model.model.get_output_embeddings().weight[ids]
    return ids, scores + (rows @ moves[:, :, None])[:, :, 0]
