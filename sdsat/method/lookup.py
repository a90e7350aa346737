"""Prompt lookup: what followed the last tokens earlier in the text, as drafts that cost nothing.

Copied spans (names, signatures, quoted text) are then verified many tokens a pass, beside what SATs
draft. The idea is A. Saxena's prompt lookup decoding (transformers' `prompt_lookup_num_tokens`);
here its drafts join the tree of the SATs'.
"""

from __future__ import annotations

LONGEST = 3  # tokens that must match, tried first; then one fewer, down to 2


class Lookup:
    """An index of the text so far: after which place the last two or three tokens stood before.

    token_ids: the text at the beginning. num_tokens: how many tokens are drafted at most.
    """

    def __init__(self, token_ids: list[int], num_tokens: int):
        self.ids: list[int] = []
        self.num_tokens = num_tokens
        self._after: dict[tuple[int, ...], int] = {}
        self.add(token_ids)

    def add(self, token_ids: list[int]) -> None:
        """Add tokens to the end of the text."""
        for token in token_ids:
            for size in range(2, LONGEST + 1):
                if len(self.ids) >= size:
                    self._after[tuple(self.ids[-size:])] = len(self.ids)  # the place of `token`
            self.ids.append(token)

    def drafts(self) -> list[int]:
        """Return what followed the latest earlier occurrence of the last tokens.

        It is up to num_tokens tokens; [] where there is no such occurrence.
        """
        for size in range(LONGEST, 1, -1):
            place = self._after.get(tuple(self.ids[-size:])) if len(self.ids) >= size else None
            if place is not None:
                return self.ids[place : place + self.num_tokens]
        return []
