"""What the text so far says of a candidate: has it followed the tokens before it already?

Texts repeat themselves: names, calls and phrases come again. Prompt lookup (lookup.py) copies what
followed the last time, whole; here the same evidence is laid before the draft head, which weighs it
beside what a SAT says (copy mechanism: arXiv 1603.06393).

    text   print(a, b); print(     candidates  a    b    (
    before          print (        facts       1111 0000 0000
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE = -1  # in place of a token that there is not
FACTS = 4  # of a candidate
_ROWS = 64  # rows whose facts are found together, for memory


def copy_facts(text: Tensor, known: Tensor, before: Tensor, ids: Tensor) -> Tensor:
    """Find what the text says of candidates.

    Args:
        text: [N, L] token ids, for each row the text it is about.
        known: [N] how many tokens of it are known where the row drafts.
        before: [N, 2] the two tokens before the candidates, the nearer one last; NONE where there
            is none.
        ids: [N, C] the candidates.

    Returns:
        [N, C, FACTS] bool: whether the candidate has followed the token before; whether it did so
        the last time that this token was followed by any; and both for the two tokens before.
    """
    parts = (tensor.split(_ROWS) for tensor in (text, known, before, ids))
    return torch.cat([_facts(*rows) for rows in zip(*parts, strict=True)])


def _facts(text: Tensor, known: Tensor, before: Tensor, ids: Tensor) -> Tensor:
    """Find the facts of a few rows: see `copy_facts`."""
    places = torch.arange(1, text.shape[1], device=text.device)  # of what follows
    once = (text[:, :-1] == before[:, 1:]) & (places < known[:, None])
    ahead = torch.nn.functional.pad(text, (1, 0), value=NONE - 1)[:, :-2]
    same = text[:, 1:, None] == ids[:, None]
    facts = []
    for follows in (once, once & (ahead == before[:, :1])):
        last = (follows * places).amax(-1, keepdim=True) if len(places) else known[:, None] * 0
        token = text.gather(1, last)
        facts.append((same & follows[..., None]).any(1))
        facts.append((token == ids) & (last > 0))
    return torch.stack(facts, -1)
