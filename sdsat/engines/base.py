"""What an engine is: passes over draft trees and SAT groups, whatever runs them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdsat.engines.cache import SlotCache, SlotPlace
from sdsat.engines.native.weights import NativeCache
from sdsat.method.tree import DraftTree

if TYPE_CHECKING:
    pass


AnyCache = SlotCache | SlotPlace | NativeCache  # of one sequence


@dataclass
class Part:
    """What one sequence brings into a pass: the tokens of a draft tree's nodes, x first, and SAT
    groups (node, size) at some.
    """

    cache: AnyCache
    tokens: list[int]
    tree: DraftTree
    groups: tuple[tuple[int, int], ...] = ()
    sats: int = field(init=False)

    def __post_init__(self) -> None:
        self.sats = sum(size for _, size in self.groups)


@dataclass(frozen=True)
class RowPolicy:
    """How a pass is padded so that each of its rows is computed by the same kernels whatever their
    number.

    stable: whether logits were found bit-equal under this policy (`probe_rows`).
    """

    minimum: int
    multiple: int
    stable: bool = True

    def rows(self, count: int) -> int:
        """The padded number of rows of a pass of `count` rows."""
        return max(self.minimum, -(-count // self.multiple) * self.multiple)


_POLICIES = (
    RowPolicy(1, 1),
    RowPolicy(2, 1),
    RowPolicy(4, 1),
    RowPolicy(4, 4),
    RowPolicy(8, 8),
    RowPolicy(16, 16),
)
