"""The draft head: what the token before says about the next, which a SAT alone cannot know.

All SATs of a group guess at once, so SAT i does not know which token the SAT before it led to. Once
that token is known or drafted, the head moves SAT i's last hidden state, and the best `SHORTLIST`
tokens of the SAT are ranked anew by the moved state (a light form of the sampler head of arXiv
2507.11851), and by whether the text has them after the same tokens already (method/copies.py). That
costs two small matmuls a depth, not a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from sdsat.method.copies import LONGEST
from sdsat.models import packed

SHORTLIST = 64  # tokens of a SAT that are ranked anew
EPS = torch.finfo(torch.float32).eps  # of the norms, in any dtype: embeddings are small


class DraftHead(nn.Module):
    """A two-layer perceptron on a SAT's state and the embedding of the token before it.

    That token stands at the SAT's own position. Weights: inner [size, 2 D], outer [D, size];
    copies [LONGEST], what each further token adds to the score of a candidate that the text has
    after the same tokens; sharpness [1], a factor of all else.
    """

    def __init__(self, hidden: int, size: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.inner = nn.Parameter(
            (torch.randn(size, 2 * hidden, device=device) / (2 * hidden) ** 0.5).to(dtype)
        )
        self.outer = nn.Parameter(torch.zeros(hidden, size, dtype=dtype, device=device))
        self.copies = nn.Parameter(torch.zeros(LONGEST, dtype=dtype, device=device))
        self.sharpness = nn.Parameter(torch.ones(1, dtype=dtype, device=device))
        self._fused: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None

    def fuse(self) -> None:
        """Prepare for decoding: pack the two matrices, without gradients.

        They are in the processor's own order where it has one.
        """
        self._fused = (
            packed.best_linear(self.inner.detach()),
            packed.best_linear(self.outer.detach()),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what `fuse` has made, as an adapter does."""
        return {**self.__dict__, "_fused": None}

    def forward(self, states: Tensor, before: Tensor) -> Tensor:
        """Compute moves [N, D] of SATs' states.

        states: [N, D] last hidden states of SATs. before: [N, D] embeddings of the tokens before.
        """
        both = torch.cat([rms_norm(x, x.shape[-1:], eps=EPS) for x in (states, before)], dim=-1)
        if self._fused:
            inner, outer = self._fused
            return outer(silu(inner(both)))
        return linear(silu(linear(both, self.inner.to(both))), self.outer.to(both))

    def rerank(
        self, scores: Tensor, states: Tensor, before: Tensor, rows: Tensor, copied: Tensor
    ) -> Tensor:
        """Rank a SAT's best tokens anew, given the token before and the text.

        Args:
            scores: [N, C] logits of the best tokens of N SATs.
            states: [N, D] last hidden states of the SATs.
            before: [N, D] embeddings of the tokens before.
            rows: [N, C, D] the output layer's rows of the best tokens.
            copied: [N, C, LONGEST] of the best tokens (`copies.copied`).

        Returns:
            [N, C] new scores.
        """
        moved = scores + (rows @ self(states, before)[:, :, None])[:, :, 0]
        return self.sharpness.to(moved) * moved + copied.to(moved) @ self.copies.to(moved)
