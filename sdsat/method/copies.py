"""What the text so far says of a candidate: has it come after the same tokens already?

Texts repeat themselves: names, calls and phrases come again. Prompt lookup (lookup.py) copies what
followed the last time, whole; here the same evidence is laid before the draft head, which weighs it
beside what a SAT says (as pointer networks mix copying in, arXiv 1609.07843).

    x = sum ( a ) ; y = sum ( ?     a has followed "(" and "sum (" and "= sum (", not "y = sum (";
                                    b has followed none of them
"""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST = 4  # tokens before a candidate that are compared
NONE = -1  # in place of a token that there is not
_ROWS = 64  # rows that are looked at together, for memory


def last_tokens(text: Tensor) -> Tensor:
    """Return the last LONGEST tokens of a text [L], NONE in front where it has fewer."""
    return torch.nn.functional.pad(text[-LONGEST:], (LONGEST, 0), value=NONE)[-LONGEST:]


def copied(text: Tensor, known: Tensor, before: Tensor, ids: Tensor) -> Tensor:
    """Find the candidates that a text has after the same tokens.

    Args:
        text: [N, L] token ids, for each row the text it is about; [1, L] for one that all share,
            with the candidates.
        known: [N] or [1], how many tokens of it are known where the row drafts.
        before: [N, LONGEST] the tokens before the candidates, NONE where there are fewer.
        ids: [N, C] or [1, C], the candidates.

    Returns:
        [N, C, LONGEST] bool, n ascending from 1: whether the candidate has followed the last n of
        the tokens before.
    """
    if len(text) == 1:
        counts = _follows(text, known, before).flatten(0, 1) @ _same(text, ids)[0]
        return (counts.unflatten(0, (-1, LONGEST)) > 0).mT
    parts = (tensor.split(_ROWS) for tensor in (text, known, before, ids))
    rows = zip(*parts, strict=True)
    return torch.cat([(_follows(t, k, b) @ _same(t, i) > 0).mT for t, k, b, i in rows])


def _same(text: Tensor, ids: Tensor) -> Tensor:
    """Tell which candidate each token but the first is: [N, L - 1, C], 0 or 1."""
    return (text[:, 1:, None] == ids[:, None]).float()


def _follows(text: Tensor, known: Tensor, before: Tensor) -> Tensor:
    """Tell which tokens but the first follow the last n tokens before: [N, LONGEST, L - 1]."""
    length = text.shape[1] - 1
    follows = torch.arange(1, length + 1, device=text.device) < known[:, None]
    ahead = torch.nn.functional.pad(text, (LONGEST, 0), value=NONE - 1)
    found = []
    for n in range(LONGEST):  # the token n places before the one before a place
        start = LONGEST - n
        follows = follows & (ahead[:, start : start + length] == before[:, -1 - n, None])
        found.append(follows)
    return torch.stack(found, 1).float()
