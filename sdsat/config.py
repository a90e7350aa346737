"""Settings as frozen dataclasses, which are checked when they are made.

A bad value raises `InputError`, which is every bad-input message of the program.
"""

from __future__ import annotations

import hashlib
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

NUM_LOOKUP = 12  # tokens that are looked up where nothing else is said


@dataclass(frozen=True)
class Strategy:
    """What a strategy drafts with; how it plans its passes is in decoding/strategies.py.

    Attributes:
        sats: whether SATs draft.
        lookup: how many tokens it looks up in the text so far where nothing else is said.
        int8: whether passes in 8 bits may draft.
        only_int8: whether nothing else drafts.
        wide: whether it takes a wide tree where trees have AR's bits: it verifies what pays.
        alternates: whether it drafts in one pass and verifies in the next.
    """

    sats: bool = True
    lookup: int = 0
    int8: bool = False
    only_int8: bool = False
    wide: bool = False
    alternates: bool = False


LOOKUP = "lookup"
STRATEGY = {
    LOOKUP: Strategy(sats=False, lookup=NUM_LOOKUP),
    "two-step": Strategy(alternates=True),
    "rounded": Strategy(int8=True, only_int8=True),
    "one-pass": Strategy(),
    "auto": Strategy(lookup=NUM_LOOKUP, int8=True, wide=True),
}
ALL_STRATEGIES = tuple(STRATEGY)
STRATEGIES = tuple(name for name, kind in STRATEGY.items() if kind.sats)
# Rows of one pass: bounds a draft tree with its SATs, and with them the cache's fixed length.
MAX_ROWS = 96
MAX_K = MAX_ROWS - 2  # x and, after a pass in 8 bits, one more draft than SATs
MAX_TRAINED_K = 16  # depth of an adapter
TRAIN_MODES = ("adapter", "everywhere", "full")
_ONLY_IN = {
    "rank": ("adapter", "everywhere"), "targets": ("adapter", "everywhere"), "head": ("adapter",),
    "standard": ("everywhere", "full"), "embedding_steps": ("full",), "checkpointing": ("full",),
}  # fmt: skip
# Linear layers that get a low-rank update.
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


class InputError(ValueError):
    """Bad input.

    The message is one line that names the argument, its value and what would be right; the CLI
    exits with 2.
    """


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def is_whole(value: Any) -> bool:
    """Tell whether this is a whole number, numpy's too but no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Tell whether this is a finite number, numpy's too but no bool."""
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return good and bool(-math.inf < value < math.inf)


def whole(
    name: str, value: Any, expected: str, low: int | None = None, high: int | None = None
) -> int:
    """Return `value` as an int.

    Args:
        name: of the argument, as the message has it.
        value: a whole number, numpy's too but no bool.
        expected: what would be right, as the message has it.
        low: the least that is right; None for no bound.
        high: the most that is right; None for no bound.

    Raises:
        InputError: for anything else.
    """
    good = is_whole(value)
    good = good and (low is None or value >= low) and (high is None or value <= high)
    require(good, f"{name}={value!r}: expected {expected}")
    return int(value)


def real(name: str, value: Any, expected: str, low: float, high: float = math.inf) -> float:
    """Return `value` as a float.

    Args:
        name: of the argument, as the message has it.
        value: a finite number, numpy's too but no bool.
        expected: what would be right, as the message has it.
        low: the least that is right.
        high: the most that is right.

    Raises:
        InputError: for anything else.
    """
    good = is_real(value) and low <= value <= high
    require(good, f"{name}={value!r}: expected {expected}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Return `value`, if it is True or False. Raises InputError for anything else."""
    require(isinstance(value, bool), f"{name}={value!r}: expected True or False")
    return bool(value)


def several(name: str, value: Any, expected: str) -> tuple[Any, ...]:
    """Return a list or tuple as a tuple.

    Raises InputError, which names it, for anything else; a text is neither.
    """
    require(isinstance(value, (list, tuple)), f"{name}={value!r}: expected {expected}")
    return tuple(value)


def _keep(config: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass while it is made.

    So numpy's numbers become Python's, and lists tuples.
    """
    for name, value in values.items():
        object.__setattr__(config, name, value)


def plain_warnings() -> None:
    """Print warnings as one line each, as every other message of the command line."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)  # type: ignore[assignment]


@dataclass(frozen=True)
class Text:
    """How one word of a command line holds a value.

    Attributes:
        read: (the option's name, the word) -> the value; raises InputError.
        write: the value -> the word.
    """

    read: Callable[[str, str], Any]
    write: Callable[[Any], str]


def _joined(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


def numbers_of(name: str, text: str, kind: Callable[[str], Any] = int) -> tuple[Any, ...]:
    """Read '0,1,5' -> (0, 1, 5).

    Raises InputError, which names the option, for anything else.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{name}={text}: expected numbers separated by commas") from None


WORD = Text(lambda _, text: text, str)
WORDS = Text(lambda _, text: tuple(text.split(",")) if text else (), _joined)
WHOLE_NUMBERS = Text(numbers_of, _joined)
NUMBERS = Text(lambda name, text: numbers_of(name, text, float), _joined)


@dataclass(frozen=True)
class Option:
    """How a field of settings is given on the command line: cli/options.py makes an option of it.

    Attributes:
        help: one line for `--help`.
        env: the environment variable that gives it, too.
        names: such as ('-k', '--k'); () for the field's own name.
        text: how a word holds the value; None where its type says that (numbers, flags, paths,
            texts).
        repeated: given once for each item of the tuple that it is.
        is_open: has no default on the command line; the command decides what stands for it.
    """

    help: str | None = None
    env: str | None = None
    names: tuple[str, ...] = ()
    text: Text | None = None
    repeated: bool = False
    is_open: bool = False


def option(default: Any, about: str | Option | None = None, **further: Any) -> Any:
    """Make a field of settings that is an option of commands too.

    Args:
        default: of the field, and of the option unless a command has another.
        about: its help, or an Option that several settings share.
        **further: other fields of Option.
    """
    if not isinstance(about, Option):
        about = Option(about, **further)
    return field(default=default, metadata={"option": about})


# Options of several settings.
TREE = Option(
    "Draft tree: auto, grown, chain, paper, or a branching list such as 2,1,1.",
    env="TREE",
    text=WORD,
)
MAX_NEW_TOKENS = Option(env="MAX_NEW_TOKENS")
SEED = Option(env="SEED")
TEMPERATURE = Option("0 is greedy.")
TEMPLATE_OPTIONS = Option(
    "KEY=VALUE for the chat template, as enable_thinking=false; repeat for more. "
    "Default: as the template has it.",
    env="TEMPLATE_OPTIONS",
    names=("--template-option",),
    repeated=True,
)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What `models.loading.load` goes by beside the place and the numbers, and the engine.

    Attributes:
        sat_token_id: id of the SAT, whatever the checkpoint says of it.
        trained_k: the depth of its training, whatever the checkpoint says of it.
        engine: 'native', 'transformers', or 'auto': native where it can be had.
    """

    sat_token_id: int | None = option(
        None, "Id of the SAT, whatever the checkpoint says.", env="SAT_TOKEN_ID"
    )
    trained_k: int | None = option(
        None, "Depth of its training, whatever the checkpoint says.", env="TRAINED_K"
    )
    engine: str = option("auto", "native, transformers, or auto: native where it can be had.")


@dataclass(frozen=True, kw_only=True)
class LoadConfig(CheckpointConfig):
    """How a model is loaded: see `models.loading.load`.

    Attributes:
        dtype: 'float32', 'bfloat16', 'float16', or 'auto' for the checkpoint's own.
        device: see `models.devices.pick_devices`.
    """

    dtype: str = option(
        "bfloat16",
        "float32, bfloat16, float16, or auto for the checkpoint's own.",
        env="DTYPE",
    )
    device: str = option(
        "",
        "cpu, a GPU number, or 0+1 for a model that one GPU can't hold; empty: GPU 0 where "
        "there is one, else the CPU.",
    )


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Temperature 0 is greedy; filters apply in the order temperature, top-k, top-p.

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
        _keep(
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

    Attributes:
        token_id: id of the SAT; below the vocabulary size when the checkpoint holds its embedding
            (full mode), equal to it when an adapter brings the embedding (adapter mode).
        k: the depth the SATs were trained for.
    """

    token_id: int
    k: int

    def __post_init__(self) -> None:
        token_id = whole("sat_token_id", self.token_id, "a token id, 0 or more", 0)
        _keep(
            self,
            token_id=token_id,
            k=whole("trained_k", self.k, f"a whole number from 1 to {MAX_K}", 1, MAX_K),
        )


@dataclass(frozen=True)
class DecodeConfig:
    """One generation.

    What it leaves open (None, 'auto') `decoding.resolve.resolved` chooses, for the model at hand.

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
                _keep(
                    self,
                    **{name: whole(name, getattr(self, name), expected.format(high), low, high)},
                )
        _keep(
            self,
            max_new_tokens=whole(
                "max_new_tokens", self.max_new_tokens, "1 or more, a whole number", 1
            ),
        )
        _keep(self, tree=_tree(self.tree), **_stops(self.stop_ids, self.stop_strings))
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
        """Whether passes in 8 bits may draft."""
        return self.num_sats > 0 and self.kind.int8

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


def utf8(name: str, text: str) -> str:
    """Return `text`, if it has characters alone.

    A command line that is not UTF-8 reaches Python as lone surrogates. Raises InputError, which
    names the argument, for these.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}: not UTF-8 at character {error.start}; expected text in UTF-8"
        ) from None
    return text


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


def beside(strategies: Sequence[str]) -> list[str]:
    """List the strategies of a table, and beside 'auto' what it is made of.

    That is lookup alone, and itself without lookup.
    """
    parts = [
        [LOOKUP, f"{name}:lookup=0", name] if has_sats(name) and looks_up(name) else [name]
        for name in strategies
    ]
    return list(dict.fromkeys(name for part in parts for name in part))


@dataclass(frozen=True)
class TrainConfig:
    """Training: steps of sequences with SAT groups at random places of each.

    Attributes:
        steps: how often the weights are updated.
        mode: 'adapter' (the base stays as it is), 'everywhere' (an adapter whose update acts on
            standard tokens too: for serving, it can be merged into a draft copy of the base) or
            'full' (all weights).
        k: SATs a group at most, the depth.
        rank: of the low-rank updates; not for 'full'.
        targets: names of the linear layers that get an update of this rank, with commas between;
            not for 'full'.
        head: inner size of the draft head that sees the token before; 0 for none; only for
            'adapter'.
        anchors: SAT groups of a sequence in a step at most.
        keep: depth i+1 of a group exists with this probability given depth i; expected rows a group
            (1 - keep^k) / (1 - keep).
        soft: share of distillation from the base's own distribution in the loss.
        decay: loss weight of a depth relative to the one before.
        batch_size: sequences per process and micro-batch.
        accumulate: micro-batches a step.
        lr: learning rate after the warm-up; None for 1e-3, in full mode 2e-5.
        warmup: steps of linear warm-up.
        clip: largest norm of a step's gradient.
        init: directory of an adapter of the same base and rank to start from, instead of from
            nothing.
        standard: weight of a standard token's loss beside a SAT's; not for 'adapter'.
        embedding_steps: for how many steps only the SAT's embedding trains; only for 'full'.
        checkpointing: gradients by recomputation; only for 'full'.
        held_out: sequences to evaluate on, never trained on.
        seed: of the start, the order and the anchors.
        eval_every: steps between evaluations, each with a checkpoint.
        checkpoint_every: steps between checkpoints; None: `eval_every`.
    """

    steps: int = option(2000)
    mode: str = option(
        "adapter",
        "adapter: on SATs only; everywhere: an adapter that a server can merge; full: all weights.",
    )
    k: int = option(7, "Depth: SATs per group.")
    rank: int = option(32, "Adapter: rank of the updates.")
    targets: str = option(TARGETS, "Adapter: names of the linear layers that get an update.")
    head: int = option(1024, "Adapter: inner size of the draft head, 0 for none.")
    anchors: int = option(96, "SAT groups per sequence and step.")
    keep: float = option(0.8, "A group goes one deeper with this probability.")
    soft: float = option(0.0, "Share of distillation from the base's own distribution in the loss.")
    decay: float = option(1.0, "Loss weight of a depth relative to the one before.")
    batch_size: int = option(2, "Sequences per micro-batch and process.")
    accumulate: int = option(1, "Micro-batches per step.")
    lr: float = option(None, "Default: 1e-3 for adapters, 2e-5 in full mode.")
    warmup: int = 50
    clip: float = 1.0
    init: str | None = option(None, "Adapter directory to start from.")
    standard: float = option(
        1.0, "Not for adapter: weight of a standard token's loss beside a SAT's."
    )
    embedding_steps: int = option(
        0, "Full mode: first train only the SAT's embedding, so many steps."
    )
    checkpointing: bool = option(
        False, "Full mode: gradient checkpointing, less memory for more time."
    )
    held_out: int = option(48, "Sequences to evaluate on, never trained on.")
    seed: int = option(0, SEED)
    eval_every: int = option(200)
    checkpoint_every: int = option(None, "Steps between checkpoints. Default: --eval-every.")

    def __post_init__(self) -> None:
        names = self.targets.split(",") if isinstance(self.targets, str) else [""]
        expected = "names of linear layers, with commas between"
        require(all(names), f"targets={self.targets!r}: expected {expected}")
        flag("checkpointing", self.checkpointing)
        good = self.init is None or (isinstance(self.init, (str, Path)) and str(self.init) != "")
        require(good, f"init={self.init!r}: expected an adapter directory")
        if self.checkpoint_every is None:
            _keep(self, checkpoint_every=self.eval_every)
        for name in (
            "steps",
            "k",
            "rank",
            "anchors",
            "batch_size",
            "accumulate",
            "eval_every",
            "checkpoint_every",
            "held_out",
        ):
            whole(name, getattr(self, name), "1 or more, a whole number", 1)
        for name in ("warmup", "embedding_steps"):
            whole(name, getattr(self, name), "0 or more, a whole number", 0)
        if self.lr is None:
            _keep(self, lr=2e-5 if self.mode == "full" else 1e-3)
        whole("head", self.head, "0 (none) or a positive size", 0)
        whole("k", self.k, f"a whole number from 1 to {MAX_TRAINED_K}", 1, MAX_TRAINED_K)
        whole("seed", self.seed, "a whole number")
        real("soft", self.soft, "a number from 0 to 1", 0, 1)
        real("standard", self.standard, "0 or more", 0)
        for name, high in (("keep", 1), ("decay", 1), ("lr", math.inf), ("clip", math.inf)):
            expected = "a number in (0, 1]" if high == 1 else "a positive number"
            require(
                real(name, getattr(self, name), expected, 0, high) > 0,
                f"{name}={getattr(self, name)}: expected {expected}",
            )
        require(
            self.mode in TRAIN_MODES, f"mode={self.mode}: expected one of {', '.join(TRAIN_MODES)}"
        )
        for name, modes in _ONLY_IN.items():
            held = getattr(self, name)
            default = getattr(type(self), name)
            only = " and ".join(modes)
            require(
                self.mode in modes or held == default,
                f"{name}={held}: only for mode {only}, not {self.mode}",
            )


@dataclass(frozen=True)
class DistillConfig:
    """Self-distillation: which prompts are answered, how, and how the answers are stored.

    Attributes:
        limit: how many prompts; None for all.
        temperatures: the prompts take these in turn; each prompt's next answer, of `answers`, the
            one after its last.
        answers: to each prompt.
        kinds: what is asked about functions, with weights (`tasks.prompts.parse_kinds`).
        avoid: benchmarks, beside HumanEval, that no prompt may overlap: .jsonl files.
        max_new_tokens: tokens of an answer at most.
        max_prompt_tokens: tokens of a prompt at most.
        template_options: see `tasks.prompts.encode`.
        batch_size: answers at once.
        shard_size: answers a file.
        seed: of which every answer has its own form.
    """

    limit: int | None = option(None, "How many prompts; default all.")
    temperatures: tuple[float, ...] = option(
        (0, 0, 0.2, 1.0), "The prompts take these in turn.", text=NUMBERS
    )
    answers: int = option(1, "Answers to a prompt, each at the temperature after the last one's.")
    kinds: str = option(
        "complete",
        "What is asked about functions: complete, words, fix, test, explain; with weights: "
        "complete=3,words.",
    )
    avoid: tuple[Path, ...] = option(
        (),
        "Benchmark that no prompt may overlap, beside HumanEval: a .jsonl file; repeat for more.",
        repeated=True,
    )
    max_new_tokens: int = option(224, MAX_NEW_TOKENS)
    max_prompt_tokens: int = option(224)
    template_options: tuple[str, ...] = option((), TEMPLATE_OPTIONS)
    batch_size: int = option(96)
    shard_size: int = option(512)
    seed: int = option(0, SEED)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "shard_size", "answers", "max_prompt_tokens"):
            whole(name, getattr(self, name), "1 or more, a whole number", 1)
        if self.limit is not None:
            whole("limit", self.limit, "1 or more, a whole number", 1)
        whole("seed", self.seed, "a whole number")
        require(isinstance(self.kinds, str), f"kinds={self.kinds!r}: expected a text")
        for name in ("avoid", "template_options"):
            several(name, getattr(self, name), "a tuple")
        temperatures = several("temperatures", self.temperatures, "a tuple of numbers")
        require(len(temperatures) > 0, "temperatures: none; expected one or more")
        for temperature in temperatures:
            SamplingConfig(temperature)  # refuses what can't be sampled at
