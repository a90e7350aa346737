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
        text: [N, L] token ids, for each row the text it is about.
        known: [N] how many tokens of it are known where the row drafts.
        before: [N, LONGEST] the tokens before the candidates, NONE where there are fewer.
        ids: [N, C] the candidates.

    Returns:
        [N, C, LONGEST] bool, n ascending from 1: whether the candidate has followed the last n of
        the tokens before.
    """
    parts = (tensor.split(_ROWS) for tensor in (text, known, before, ids))
    return torch.cat([_copied(*rows) for rows in zip(*parts, strict=True)])


def _copied(text: Tensor, known: Tensor, before: Tensor, ids: Tensor) -> Tensor:
    """Do for a few rows what `copied` does."""
    length = text.shape[1] - 1
    follows = torch.arange(1, length + 1, device=text.device) < known[:, None]
    same = text[:, 1:, None] == ids[:, None]
    ahead = torch.nn.functional.pad(text, (LONGEST, 0), value=NONE - 1)
    found = []
    for n in range(LONGEST):  # the token n places before the one before a place
        start = LONGEST - n
        follows = follows & (ahead[:, start : start + length] == before[:, -1 - n, None])
        found.append((same & follows[..., None]).any(1))
    return torch.stack(found, -1)
