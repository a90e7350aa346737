"""Drafts: the tokens that SATs guess, and those looked up, as one tree below the true token x.

A pass of the exact engine that has SATs gives the token after x itself, which is true, and drafts
below it. A rounded pass (sdsat/engines/native) only drafts: what it says at x is the first draft,
which is wrong now and then, and the SATs' come below that one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sdsat.config import MAX_ROWS
from sdsat.method.tree import DraftTree

_ROOT = DraftTree((-1,), (0,))
FIRST_OF_ROUNDED = (
    0.97  # how likely the first draft of a rounded pass is taken to be before anything is known
)


@dataclass
class Drafts:
    """A tree of drafts below x, which is node 0.

    Attributes:
        tree: its shape, N nodes.
        tokens: [N] the token at each node.
        likely: [N] how likely each node is right, given that its parent is.
        looked_up: [N] whether the draft comes from the text so far, and not (or not only) from a
            SAT.
        kind: where the SATs were that drafted, one of KINDS in sdsat/decoding.
        rounded: whether they drafted in a rounded pass, so that node 1 is what that pass says at
            x.
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
        """Make a tree of x alone."""
        return cls(_ROOT, [x], [1.0], [False])

    @classmethod
    def of_sats(cls, tree: DraftTree, tokens: list[int], likely: list[float], kind: str) -> Drafts:
        """Make the drafts of an exact pass's SATs.

        Args:
            tree: its root is x, the token that the pass gave.
            tokens: [N] at the tree's nodes.
            likely: [N] how likely each is right, given that its parent is.
            kind: where the SATs were, one of KINDS in sdsat/decoding.
        """
        return cls(tree, tokens, likely, [False] * len(tree), kind)

    @classmethod
    def of_rounded(cls, x: int, tree: DraftTree, tokens: list[int], likely: list[float]) -> Drafts:
        """Make the drafts of a rounded pass: its tree, one node lower.

        Below x comes the token at the tree's root, which that pass gave for x itself.

        Args:
            x: the last true token.
            tree: what the SATs drafted.
            tokens: [N] at the tree's nodes.
            likely: [N] how likely each is right, given that its parent is.
        """
        parents = (-1, *(parent + 1 for parent in tree.parents))
        lower = DraftTree(parents, (0, *tree.ranks))
        chances = [1.0, FIRST_OF_ROUNDED, *likely[1:]]
        return cls(lower, [x, *tokens], chances, [False] * len(parents), "rounded", True)

    def with_chain(self, tokens: list[int], likely: float) -> Drafts:
        """Add a looked-up chain below x.

        Where it says what a draft says already, that draft comes from both.

        tokens: of the chain. likely: how likely each of them is right.
        """
        if not tokens:
            return self
        parents = list(self.tree.parents)
        ranks = list(self.tree.ranks)
        out = replace(
            self, tokens=list(self.tokens), likely=list(self.likely), looked_up=list(self.looked_up)
        )
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
        """Return the drafts at these nodes alone.

        nodes: ascending, each with its parent.
        """
        if len(nodes) == len(self.tokens):
            return self
        tokens = [self.tokens[node] for node in nodes]
        likely = [self.likely[node] for node in nodes]
        looked_up = [self.looked_up[node] for node in nodes]
        return Drafts(
            self.tree.kept(nodes), tokens, likely, looked_up, self.kind, self.rounded and 1 in nodes
        )
