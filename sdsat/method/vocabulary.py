"""The draft vocabulary: the tokens that SATs may guess, few of a large vocabulary.

Of 152 thousand tokens answers use a few thousand, but a SAT's logits over all of them are a quarter
of a drafting pass, and a third of a training step. So an adapter may name the tokens that count
(FR-Spec, arXiv 2502.14856). To these come, for each text, its own other tokens: the names in a
prompt are rare everywhere else. The model's own choice stays over all tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def most_used(texts: Iterable[Tensor], size: int) -> Tensor:
    """Find the tokens that texts use most.

    Args:
        texts: token ids [L] of each.
        size: of how many tokens; fewer are found where the texts have fewer.

    Returns:
        [C] ids, ascending. Of tokens that are used as often, lower ids are taken.
    """
    counts = torch.cat([torch.zeros(0, dtype=torch.long), *texts]).bincount()
    order = counts.argsort(descending=True, stable=True)
    return order[: min(size, int((counts > 0).sum()))].sort().values


class OtherTokens:
    """The tokens of a growing text that a draft vocabulary lacks, each once.

    Attributes:
        ids: [E] these tokens, in the order in which they came.
    """

    def __init__(self, vocabulary: Tensor, tokens: list[int]):
        """Take the text's first tokens. vocabulary: [C] ids; those that are found are there too."""
        self._held = set(vocabulary.tolist())
        self.ids = vocabulary[:0]
        self.add(tokens)

    def add(self, tokens: list[int]) -> None:
        """Take the text's next tokens."""
        new = [token for token in dict.fromkeys(tokens) if token not in self._held]
        if new:
            self._held.update(new)
            self.ids = torch.cat([self.ids, self.ids.new_tensor(new)])
