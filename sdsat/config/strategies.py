"""Strategies: what each drafts with, and which combinations with k are tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NUM_LOOKUP = 12  # tokens that are looked up where nothing else is said


@dataclass(frozen=True)
class Strategy:
    """What a strategy drafts with; how it plans its passes is in decoding/strategies.py.

    Attributes:
        sats: whether SATs draft.
        lookup: how many tokens it looks up in the text so far where nothing else is said.
        rounded: whether rounded passes may draft.
        only_rounded: whether nothing else drafts.
        wide: whether it takes a wide tree where trees have AR's bits: it verifies what pays.
        alternates: whether it drafts in one pass and verifies in the next.
    """

    sats: bool = True
    lookup: int = 0
    rounded: bool = False
    only_rounded: bool = False
    wide: bool = False
    alternates: bool = False


LOOKUP = "lookup"
STRATEGY = {
    LOOKUP: Strategy(sats=False, lookup=NUM_LOOKUP),
    "two-step": Strategy(alternates=True),
    "rounded": Strategy(rounded=True, only_rounded=True),
    "one-pass": Strategy(),
    "auto": Strategy(lookup=NUM_LOOKUP, rounded=True, wide=True),
}
ALL_STRATEGIES = tuple(STRATEGY)
STRATEGIES = tuple(name for name, kind in STRATEGY.items() if kind.sats)


def has_sats(strategy: str) -> bool:
    """Tell whether a strategy drafts with SATs."""
    return strategy in STRATEGY and STRATEGY[strategy].sats


def looks_up(strategy: str) -> bool:
    """Tell whether a strategy looks tokens up where nothing else is said."""
    return strategy in STRATEGY and STRATEGY[strategy].lookup > 0


def speed_bound(strategy: str, k: int) -> float | None:
    """Return the speed-up that a strategy can't exceed, where there is such a number.

    two-step drafts in one pass and verifies in the next: k + 2 tokens in two passes at most.
    """
    alternates = strategy in STRATEGY and STRATEGY[strategy].alternates
    return (k + 2) / 2 if alternates else None


def keys_of(strategies: Sequence[str], k_list: Sequence[int]) -> list[tuple[str, int]]:
    """List (strategy, k) of all combinations that draft: one without SATs once."""
    return [
        (strategy, k)
        for strategy in strategies
        for k in (k_list if has_sats(strategy) else [0])
        if k or not has_sats(strategy)
    ]


def keys_with_parts(
    strategies: Sequence[str], k_list: Sequence[int], lookup: int
) -> list[tuple[str, int, int]]:
    """List (strategy, k, tokens to look up) of all combinations that draft.

    These are what `bench` measures. A strategy that looks tokens up beside its SATs, 'auto', is
    there once, with the largest k; where lookup is not 0, what it is made of stands before it:
    lookup alone, and itself without.
    """
    keys: list[tuple[str, int, int]] = []
    most = max(k_list)
    for strategy in strategies:
        if not (has_sats(strategy) and looks_up(strategy)):
            tokens = lookup if looks_up(strategy) else 0
            keys += [(name, k, tokens) for name, k in keys_of([strategy], k_list)]
        elif most:
            parts = [(LOOKUP, 0, lookup), (strategy, most, 0)] if lookup else []
            keys += [*parts, (strategy, most, lookup)]
    return list(dict.fromkeys(keys))


def beside(strategies: Sequence[str]) -> list[str]:
    """List the strategies of a table, and beside 'auto' what it is made of.

    That is lookup alone, and itself without lookup.
    """
    parts = [
        [LOOKUP, f"{name}:lookup=0", name] if has_sats(name) and looks_up(name) else [name]
        for name in strategies
    ]
    return list(dict.fromkeys(name for part in parts for name in part))
