"""Settings of a generation: how the next token is chosen, the SAT, and how passes draft."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from sdsat.config.checks import is_whole, keep, real, require, several, utf8, whole
from sdsat.config.options import MAX_NEW_TOKENS, SEED, TEMPERATURE, TREE, option
from sdsat.config.strategies import ALL_STRATEGIES, LOOKUP, STRATEGIES, STRATEGY, Strategy

# Rows of one pass: bounds a draft tree with its SATs, and with them the cache's fixed length.
MAX_ROWS = 96
MAX_K = MAX_ROWS - 2  # x and, after a rounded pass, one more draft than SATs

SatIds = int | Sequence[int]  # of the SAT at every depth, or one a depth


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Temperature 0 is greedy; filters apply in the order temperature, top-k, top-p. Raises InputError
    for a number out of its bounds.

    Attributes:
        temperature: 0 for greedy, else a positive number that divides the logits.
        top_k: keep the k most likely tokens, and all that tie with the k-th; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps
            all.
        seed: with the index of the emitted token, the only source of randomness (see
            method/sampling.py).
    """

    temperature: float = option(0.0, TEMPERATURE)
    top_k: int = option(0, "0 is off.")
    top_p: float = option(1.0)
    seed: int = option(0, SEED)

    def __post_init__(self) -> None:
        expected = "0 (greedy) or a positive number, at least 1e-6"
        temperature = real("temperature", self.temperature, expected, 0)
        require(
            temperature == 0 or temperature >= 1e-6,
            f"temperature={temperature}: expected {expected}",
        )
        top_p = real("top_p", self.top_p, "a number in (0, 1]", 0, 1)
        require(top_p > 0, f"top_p={top_p}: expected a number in (0, 1]")
        top_k = whole("top_k", self.top_k, "0 (off) or a positive whole number", 0)
        keep(
            self,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=whole("seed", self.seed, "a whole number"),
        )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature == 0

    def of_problem(self, task_id: str) -> SamplingConfig:
        """Return the same with a seed of this problem's own.

        So the problems of a run are independent draws. The seed is the first 63 bits of the SHA-256
        of 'SEED TASK_ID'.
        """
        digest = hashlib.sha256(f"{self.seed} {task_id}".encode()).digest()
        return self if self.greedy else replace(self, seed=int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class SatConfig:
    """The semantic adaptive token (SAT) of a model.

    Raises InputError for what is no id, and for a k that is not from 1 to MAX_K.

    Attributes:
        token_id: id of the SAT; below the vocabulary size when the checkpoint holds its embedding
            (full mode), equal to it when an adapter brings the embedding (adapter mode).
        k: the depth the SATs were trained for.
        deeper: ids of the SATs behind the first of a group, where each depth has its own; what is
            behind the last takes the last.
    """

    token_id: int
    k: int
    deeper: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        expected = "a token id, 0 or more"
        ids = [whole("sat_token_id", each, expected, 0) for each in (self.token_id, *self.deeper)]
        keep(
            self,
            token_id=ids[0],
            k=whole("trained_k", self.k, f"a whole number from 1 to {MAX_K}", 1, MAX_K),
            deeper=tuple(ids[1:]),
        )

    @classmethod
    def of(cls, token_id: SatIds, k: int) -> SatConfig:
        """Make the SAT of one id, or of an id for each depth.

        Raises InputError for what is no id.
        """
        if not isinstance(token_id, (list, tuple)):
            return cls(cast(int, token_id), k)
        require(len(token_id) > 0, "sat_token_id: none; expected a token id, or one a depth")
        return cls(token_id[0], k, tuple(token_id[1:]))

    def ids(self, count: int) -> list[int]:
        """List the ids of a group of `count` SATs."""
        known = (self.token_id, *self.deeper)
        return [known[min(place, len(known) - 1)] for place in range(count)]


@dataclass(frozen=True)
class DecodeConfig:
    """One generation.

    What it leaves open (None, 'auto') `decoding.resolve.resolved` chooses, for the model at hand.
    Raises InputError for a value of another kind or out of its bounds, and for a k or lookup that
    the strategy has no use for.

    Attributes:
        k: SATs a group; for 'auto' at most so many; None: what they were trained for. 0 is AR,
            plain autoregressive decoding by the same loop, one token a pass, but for strategy
            'lookup', which has no SATs.
        max_new_tokens: tokens of the output at most.
        tree: 'grown' (where drafts are likeliest), 'chain', 'paper' (the paper's sampling trees,
            k = 5, 7, 9, 11, 13) or a branching list with one width a depth; 'auto': see
            `decoding.resolve.resolved`.
        sampling: how the next token is chosen.
        stop_ids: token ids that end the output; the id itself is kept as the last token, as
            `transformers` does.
        stop_strings: the output ends with the token that completes one; `Generation.text` is cut
            before it.
        strategy: 'two-step' (the paper's), 'rounded', 'one-pass', 'auto', or 'lookup', which works
            without SATs: see decoding/plan.py. All give the same output.
        budget: rows of a pass that 'one-pass' and 'auto' may use; None: as many as pay on this
            machine. With a number, 'one-pass' fills every pass up to it.
        lookup: how many tokens to look up in the text so far as further drafts; 0 for none; None:
            12 for 'auto' and 'lookup', else none.
    """

    k: int | None = option(
        0,
        "SATs per draft; 0 is plain decoding. Default: the trained k, which auto goes up to.",
        names=("-k", "--k"),
    )
    max_new_tokens: int = option(256, MAX_NEW_TOKENS)
    tree: str | tuple[int, ...] = option("auto", TREE)
    sampling: SamplingConfig = SamplingConfig()
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = option(
        (),
        "End the text before this string; repeat for more.",
        names=("--stop",),
        repeated=True,
    )
    strategy: str = option(
        "two-step",
        "auto, rounded, one-pass, two-step (the paper's), or lookup, without SATs; the text is "
        "the same.",
    )
    budget: int | None = option(
        None, "Rows of a pass that one-pass and auto may use. Default: as many as pay here."
    )
    lookup: int | None = option(
        None,
        "Tokens to look up in the text so far as further drafts. Default: 12 for auto and "
        "lookup, else 0.",
    )

    def __post_init__(self) -> None:
        require(
            self.strategy in ALL_STRATEGIES,
            f"strategy={self.strategy}: expected one of {', '.join(ALL_STRATEGIES)}",
        )
        require(
            isinstance(self.sampling, SamplingConfig),
            f"sampling={self.sampling!r}: expected a SamplingConfig",
        )
        optional = {
            "k": ("0 (AR) or a positive number of SATs, {} at most", 0, MAX_K),
            "budget": ("a number of rows from 2 to {}", 2, MAX_ROWS),
            "lookup": ("0 (off) to {} tokens", 0, 32),
        }
        for name, (expected, low, high) in optional.items():
            if getattr(self, name) is not None:
                keep(
                    self,
                    **{name: whole(name, getattr(self, name), expected.format(high), low, high)},
                )
        keep(
            self,
            max_new_tokens=whole(
                "max_new_tokens", self.max_new_tokens, "1 or more, a whole number", 1
            ),
        )
        keep(self, tree=_tree(self.tree), **_stops(self.stop_ids, self.stop_strings))
        if not self.kind.sats:
            name = self.strategy
            require(not self.k, f"k={self.k}: strategy={name} drafts without SATs; expected 0")
            require(
                self.lookup != 0,
                f"lookup=0: strategy={name} drafts nothing else; expected 1 to 32 tokens",
            )
        elif self.k == 0:
            require(
                not self.lookup,
                (
                    f"lookup={self.lookup}: k=0 is plain decoding; expected strategy={LOOKUP} "
                    "with it, or k above 0"
                ),
            )

    @property
    def kind(self) -> Strategy:
        """What the strategy drafts with."""
        return STRATEGY[self.strategy]

    @property
    def tree_name(self) -> str:
        """The tree as the command line has it."""
        return self.tree if isinstance(self.tree, str) else ",".join(map(str, self.tree))

    @property
    def depth(self) -> int:
        """How many drafts a pass can accept at most."""
        return max(self.num_sats + self.may_round, self.num_lookup)

    @property
    def may_round(self) -> bool:
        """Whether rounded passes may draft."""
        return self.num_sats > 0 and self.kind.rounded

    @property
    def num_sats(self) -> int:
        """The number of SATs a group: k, once it is resolved."""
        return self.k or 0

    @property
    def num_lookup(self) -> int:
        """The number of tokens to look up, once that is resolved."""
        return self.lookup or 0

    @property
    def plain(self) -> DecodeConfig:
        """AR with the same length, sampling and ends."""
        return replace(self, k=0, tree="auto", strategy=STRATEGIES[0], budget=None, lookup=None)


def _tree(tree: Any) -> str | tuple[int, ...]:
    """Check a tree: a name, or widths, which it returns as a tuple.

    Which names there are method/tree.py says. Raises InputError for anything else.
    """
    if isinstance(tree, str):
        return tree
    expected = "'auto', 'grown', 'chain', 'paper' or widths such as (2, 1, 1)"
    widths = several("tree", tree, expected)
    good = all(is_whole(width) and width >= 1 for width in widths)
    require(good and len(widths) > 0, f"tree={tree!r}: expected {expected}, every width 1 or more")
    return tuple(int(width) for width in widths)


def _stops(stop_ids: Any, stop_strings: Any) -> dict[str, Any]:
    ids = several("stop_ids", stop_ids, "a tuple of token ids")
    strings = several("stop_strings", stop_strings, "a tuple of texts")
    for text in strings:
        require(isinstance(text, str), f"stop_strings={text!r}: expected texts")
        require(text != "", "stop_strings: an empty string would stop at once; leave it out")
        utf8("stop_strings", text)
    return {
        "stop_ids": tuple(whole("stop_ids", token, "token ids, 0 or more", 0) for token in ids),
        "stop_strings": strings,
    }


def decode_config_of(text: str, **settings: Any) -> DecodeConfig:
    """Read the settings that a script's NAME[:K][:lookup=N] means.

    That is 'ar', 'lookup', 'two-step:5', 'auto' or 'auto:lookup=0', for example. Without K it is
    what the SATs were trained for.

    Args:
        text: what the script was given.
        **settings: further ones of DecodeConfig.

    Raises:
        InputError: for anything else.
    """
    name, *parts = text.split(":")
    given: dict[str, Any] = {"k": None, "strategy": name, **settings}
    for part in parts:
        key, equals, value = part.partition("=")
        key, value = (key, value) if equals else ("k", key)
        require(
            key in ("k", "lookup") and value.isdecimal(),
            f"strategy={text}: expected NAME, NAME:K or NAME:lookup=N",
        )
        given[key] = int(value)
    return DecodeConfig(**settings).plain if text == "ar" else DecodeConfig(**given)
