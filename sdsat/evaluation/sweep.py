"""What is tried on which problems: the settings of `bench`, `verify`, `eval` and `inspect`.

A `Sweep` expands to a list of `Setting`s (strategy x k x lookup x tree) and a list of samplings;
each command decodes every problem with all of them. Nothing here needs torch before a sweep is
made, so that `sdsat --help` is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from sdsat.config import (
    ALL_STRATEGIES,
    DTYPE,
    MAX_NEW_TOKENS,
    NUM_LOOKUP,
    NUMBERS,
    SEED,
    TEMPERATURE,
    TEMPLATE_OPTIONS,
    TREE,
    WHOLE_NUMBERS,
    WORD,
    WORDS,
    CheckpointConfig,
    DecodeConfig,
    Option,
    SamplingConfig,
    Text,
    flag,
    keys_of,
    keys_with_parts,
    option,
    real,
    require,
    several,
    whole,
)
from sdsat.models.hub import split
from sdsat.tasks.datasets import (
    HUMANEVAL,
    INFILLING,
    INFILLING_PSM,
    NAMES,
    Limit,
    check_dataset,
    check_limit,
    limit_text,
    read_limit,
)

_DATA_LIMIT = Option(
    "How many problems: a number, a share such as 3%, or 'all'.",
    env="DATA_LIMIT",
    text=Text(lambda _, text: read_limit(text), limit_text),
)
_DATASET = Option(f"{', '.join(NAMES)}, or a .jsonl file of prompts.", env="DATASET")
_K_LIST = Option(env="K_LIST", text=WHOLE_NUMBERS)
_STRATEGIES = Option(
    "Of lookup, two-step, rounded, one-pass and auto, with commas between.",
    env="STRATEGIES",
    text=WORDS,
)


class Setting(NamedTuple):
    """One way to decode.

    Attributes:
        strategy: one of config.ALL_STRATEGIES, or a baseline that drafts nothing: 'ar', plain
            decoding, and 'transformers', the outside reference.
        k: SATs a group.
        lookup: tokens to look up; None: as the strategy has it.
        tree: as the command line has it.
    """

    strategy: str
    k: int = 0
    lookup: int | None = None
    tree: str = "auto"

    @property
    def drafts(self) -> bool:
        """Whether it is no baseline."""
        return self not in (AR, TRANSFORMERS)

    def of(self, plain: DecodeConfig) -> DecodeConfig:
        """Make the settings of a generation: `plain` (Sweep.plain), with what this one drafts by.

        Raises InputError for what can't be decoded with.
        """
        from sdsat.method.tree import parse_tree

        if not self.drafts:
            return plain
        tree = parse_tree(self.tree)
        return replace(plain, strategy=self.strategy, k=self.k, lookup=self.lookup, tree=tree)


AR = Setting("ar", lookup=0)
TRANSFORMERS = Setting("transformers", lookup=0)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which problems are answered, how they are asked, and how long an answer may be.

    Attributes:
        dataset: see `tasks.datasets.read_tasks`.
        source: what `tasks.datasets.read_tasks` returns as such, entered by what reads them.
        data_limit: see `tasks.datasets.limited`.
        max_new_tokens: tokens of an answer at most.
        template_options: see `tasks.prompts.encode`.
    """

    dataset: str = option(HUMANEVAL, _DATASET)
    source: str | None = None
    data_limit: Limit = option(None, _DATA_LIMIT)
    max_new_tokens: int = option(256, MAX_NEW_TOKENS)
    template_options: tuple[str, ...] = option((), TEMPLATE_OPTIONS)

    def __post_init__(self) -> None:
        """Refuse a data set, limit or form of the prompts that there is not, with an InputError."""
        check_dataset(self.dataset)
        check_limit(self.data_limit)
        several("template_options", self.template_options, "a tuple of KEY=VALUE")
        DecodeConfig(0, self.max_new_tokens)

    def plain(
        self,
        sampling: SamplingConfig | None = None,
        task_id: str = "",
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
    ) -> DecodeConfig:
        """Make the settings of plain decoding of a problem.

        Args:
            sampling: of which the problem has its own form; None for greedy.
            task_id: of the problem.
            stop_ids: token ids that end the answer.
            stop_strings: texts that end it.

        Raises:
            InputError: for ends that are no token ids or no texts.
        """
        own = (sampling or SamplingConfig()).of_problem(task_id)
        return DecodeConfig(
            0,
            self.max_new_tokens,
            sampling=own,
            stop_ids=tuple(stop_ids),
            stop_strings=tuple(stop_strings),
        )


@dataclass(frozen=True, kw_only=True)
class Sweep(Asked):
    """Every strategy at every k, and with every tree; AR is always among them.

    Attributes:
        k_list: values of k.
        strategies: of config.ALL_STRATEGIES.
        top_k: for temperatures above 0.
        top_p: for temperatures above 0.
    """

    k_list: tuple[int, ...] = option((5,), _K_LIST)
    strategies: tuple[str, ...] = option(("two-step", "auto"), _STRATEGIES)
    top_k: int = option(10)
    top_p: float = option(0.95)

    def __post_init__(self) -> None:
        """Refuse what can't be decoded with, in one line, before a model is loaded.

        Raises InputError.
        """
        from sdsat.method.tree import given_tree, parse_tree

        super().__post_init__()
        SamplingConfig(0, self.top_k, self.top_p)
        several("k_list", self.k_list, "a tuple of numbers")
        several("strategies", self.strategies, "a tuple of names")
        require(len(self.samplings) > 0, "temperature, seeds: none; expected one or more")
        for k in self.k_list:
            DecodeConfig(k)
        for strategy in self.strategies:
            DecodeConfig(None, strategy=strategy)
        for tree in self._trees:
            parse_tree(tree)
        for setting in self.settings:
            decode = setting.of(self.plain())
            if decode.k:
                given_tree(decode.tree, decode.k)

    @property
    def _trees(self) -> tuple[str, ...]:
        """The draft trees, as the command line has them."""
        raise NotImplementedError

    @property
    def samplings(self) -> list[SamplingConfig]:
        """How tokens are chosen, in turn. Raises InputError for what can't be chosen by."""
        raise NotImplementedError

    @property
    def settings(self) -> list[Setting]:
        """What is tried on each problem, AR first; what has no SATs is there once."""
        drafting = [
            Setting(strategy, k, None, tree)
            for strategy, k in keys_of(self.strategies, self.k_list)
            for tree in (self._trees if k else ("auto",))
        ]
        return [AR, *dict.fromkeys(drafting)]

    def _add_ar(self) -> None:
        """Have 0, AR, among the values of k. Raises InputError for what is no k."""
        k_list = several("k_list", self.k_list, "a tuple of numbers")
        for k in k_list:
            DecodeConfig(k)
        object.__setattr__(self, "k_list", tuple(sorted({0, *k_list})))

    def _samplings(
        self, temperatures: Sequence[float], seeds: Sequence[int]
    ) -> list[SamplingConfig]:
        """Greedy once, where 0 is among the temperatures; every other one with every seed.

        Raises InputError for what can't be sampled with.
        """
        several("temperatures", temperatures, "a tuple of numbers")
        for seed in seeds:
            whole("seed", seed, "a whole number")
        greedy = [SamplingConfig()] if 0 in temperatures else []
        return greedy + [
            SamplingConfig(temperature, self.top_k, self.top_p, seed)
            for temperature in temperatures
            if temperature != 0
            for seed in seeds
        ]


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Sweep, CheckpointConfig):
    """What is measured.

    Everything but data_limit must be the same for a results folder to be resumed.

    Attributes:
        model: hub id, directory, GGUF file or embedded name.
        method: 'greedy' or 'nucleus'; temperature, top_k and top_p hold for nucleus only.
        k_list: AR (0) is always among them.
        strategies: each at every k, but `auto` once, with the largest, beside what it is made of:
            'lookup' alone, and itself without lookup.
        tree: 'auto', 'grown', 'chain', 'paper' or a branching list, as the command line has it.
        temperature: for nucleus, a positive number.
        seed: each problem has its own form of it.
        dataset: see `tasks.datasets.read_tasks`.
        data_limit: see `tasks.datasets.limited`.
        max_new_tokens: tokens of an answer at most.
        dtype: of the weights.
        with_generate: also time transformers' own greedy `generate` on the same weights.
        lookup: how many tokens 'auto' and 'lookup' look up in the text so far; 0: 'auto' only
            without.
        turns: how often each is measured on each problem, of which the run of the median time
            counts.
        repeat: whether every worker measures all problems, not a part of them; intervals are then
            over workers.
    """

    model: str = field(kw_only=False)
    method: str = field(default="greedy", kw_only=False)
    k_list: tuple[int, ...] = option(
        (0, 1, 3, 5, 7),
        replace(_K_LIST, help="Values of k; AR (0) is always measured.", is_open=True),
    )
    tree: str = option(
        "auto",
        "auto, grown, chain, paper, or a branching list such as 2,1,1.",
        env="TREE",
        text=WORD,
        is_open=True,
    )
    temperature: float = 1.0
    seed: int = option(0, SEED)
    dataset: str = HUMANEVAL
    data_limit: Limit = option(None, replace(_DATA_LIMIT, is_open=True))
    max_new_tokens: int = option(256, replace(MAX_NEW_TOKENS, is_open=True))
    dtype: str = option("bfloat16", replace(DTYPE, is_open=True))
    with_generate: bool = option(
        False, "Also time transformers' own greedy generate.", names=("--with-generate",)
    )
    lookup: int = option(
        NUM_LOOKUP,
        "Tokens that auto and lookup look up; 0: auto without looking up, alone.",
        env="LOOKUP",
    )
    turns: int = option(1, "Times each is measured; the median run counts.", env="TURNS")
    repeat: bool = option(
        False,
        "Every worker measures all problems; intervals are over workers.",
        env="REPEAT",
        names=("--repeat",),
    )

    def __post_init__(self) -> None:
        """Refuse a method, sampling or list that cannot be measured, with an InputError."""
        from sdsat.models.dtypes import WITH_INTEGERS, check_dtype

        require(
            self.method in ("greedy", "nucleus"),
            f"method={self.method}: expected greedy or nucleus",
        )
        expected = "a positive number for nucleus sampling"
        level = real("temperature", self.temperature, expected, 0)
        require(self.method == "greedy" or level > 0, f"temperature={level}: expected {expected}")
        flag("with_generate", self.with_generate)
        flag("repeat", self.repeat)
        whole("seed", self.seed, "a whole number")
        require(
            not (self.with_generate and self.method == "nucleus"),
            "with_generate: transformers' generate draws other random numbers; use it with "
            "greedy only",
        )
        check_dtype(self.dtype)
        require(
            not self.with_generate or self.dtype not in WITH_INTEGERS,
            f"dtype={self.dtype}: transformers has no such layers for with_generate to time; "
            "expected bfloat16, or no with_generate",
        )
        whole("turns", self.turns, "1 or more, a whole number", 1)
        named = several("strategies", self.strategies, "a tuple of names")
        names = ",".join(map(str, named))
        require(names != "", f"strategies: none; expected some of {', '.join(ALL_STRATEGIES)}")
        twice = len(set(self.strategies)) < len(self.strategies)
        require(not twice, f"strategies={names}: one is there twice")
        self._add_ar()
        super().__post_init__()

    @property
    def _trees(self) -> tuple[str, ...]:
        return (self.tree,)

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are chosen: the one way."""
        (sampling,) = self.samplings
        return sampling

    @property
    def samplings(self) -> list[SamplingConfig]:
        """How tokens are chosen: one way alone."""
        return self._samplings([0 if self.method == "greedy" else self.temperature], [self.seed])

    @property
    def settings(self) -> list[Setting]:
        """What is measured on each problem, baselines first."""
        keys = keys_with_parts(self.strategies, self.k_list, self.lookup)
        drafting = [Setting(*key, self.tree if key[1] else "auto") for key in keys]
        return [TRANSFORMERS] * self.with_generate + [AR, *drafting]

    @property
    def folder(self) -> str:
        """Where the results go below the results folder.

        <model>/<greedy | nucleus_t1.0>[_<data set other than HumanEval>].
        """
        method = "greedy" if self.method == "greedy" else f"nucleus_t{self.temperature}"
        dataset = "" if self.dataset == HUMANEVAL else f"_{Path(self.dataset).stem}"
        name, revision = split(self.model)
        model = Path(name).name.removesuffix(".gguf")
        model += f"@{revision.replace('/', '-')}" if revision else ""
        return f"{model}/{method}{dataset}"


def paper_settings(method: str, dataset: str) -> dict[str, Any]:
    """Return what the paper measures (arXiv 2403.18647), as fields of BenchConfig.

    Weights are in their own dtype.
    """
    from sdsat.method.tree import PAPER_WIDTHS

    greedy = method == "greedy"
    infilling = dataset in (INFILLING, INFILLING_PSM)
    three_percent = Fraction(3, 100)
    limits = {
        HUMANEVAL: Fraction(1, 2),
        INFILLING: three_percent,
        INFILLING_PSM: three_percent,
    }
    return {
        "k_list": tuple(range(14)) if greedy else (0, *PAPER_WIDTHS),
        "tree": "auto" if greedy else "paper",
        "data_limit": limits.get(dataset),
        "max_new_tokens": 50 if infilling else 512,
        "dtype": "auto",
    }


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Sweep):
    """What is compared: every strategy, k and tree with every sampling.

    Greedy where temperatures holds 0, else every temperature with every seed, of which each problem
    has its own form.

    Attributes:
        k_list: values of k.
        strategies: () for all that the model has SATs and an engine for; 'lookup' is compared once,
            for it has neither k nor tree.
        trees: as the command line has them.
        temperatures: 0 is greedy, and compared with transformers too.
        seeds: for temperatures above 0.
        data_limit: see `tasks.datasets.limited`.
        max_new_tokens: tokens of an answer at most.
    """

    k_list: tuple[int, ...] = option((1, 3, 5, 7), _K_LIST)
    strategies: tuple[str, ...] = option(
        (),
        replace(
            _STRATEGIES,
            help="Of lookup, two-step, rounded, one-pass and auto; empty: all that run here.",
        ),
    )
    trees: tuple[str, ...] = option(
        ("auto",), "Draft tree; repeat for more.", names=("--tree",), repeated=True
    )
    temperatures: tuple[float, ...] = option(
        (0,),
        "Comma-separated; 0 is greedy, and compared with transformers too.",
        names=("--temperature",),
        text=NUMBERS,
    )
    seeds: tuple[int, ...] = option(
        (0,), "Comma-separated; for temperatures above 0.", text=WHOLE_NUMBERS
    )
    data_limit: Limit = option(40, _DATA_LIMIT)
    max_new_tokens: int = option(128, MAX_NEW_TOKENS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strategies:
            replace(self, strategies=ALL_STRATEGIES)  # refuses a tree that one can't have

    @property
    def _trees(self) -> tuple[str, ...]:
        return self.trees

    @property
    def samplings(self) -> list[SamplingConfig]:
        """How tokens are chosen, in turn. Raises InputError for bad temperatures or seeds."""
        return self._samplings(
            self.temperatures, several("seeds", self.seeds, "a tuple of numbers")
        )


@dataclass(frozen=True, kw_only=True)
class QualityConfig(Sweep):
    """What is answered and tested: each problem `samples` times by AR and by every strategy and k.

    Greedy once, or sampled with seeds 0, 1, ..., of which each problem has its own form.

    Attributes:
        dataset: 'humaneval', the one with tests.
        k_list: AR (0) is always among them.
        tree: as the command line has it.
        temperature: 0 for greedy.
        samples: answers to each problem; 1 for greedy.
        batch_size: answers decoded at once, of AR and SDSAT beside each other.
    """

    dataset: str = option(HUMANEVAL, replace(_DATASET, help="humaneval: no other has tests."))

    k_list: tuple[int, ...] = option(
        (5,), replace(_K_LIST, help="Values of k; AR (0) is always there.")
    )
    tree: str = option("auto", TREE)
    temperature: float = option(0.0, TEMPERATURE)
    samples: int = option(
        1, "Answers to each problem, with seeds 0, 1, ...; for temperatures above 0."
    )
    batch_size: int = option(
        1, "Answers decoded at once: faster; auto, one-pass and lookup then draft less."
    )

    def __post_init__(self) -> None:
        """Refuse samples or temperatures that do not go together, with an InputError."""
        self._add_ar()
        object.__setattr__(self, "strategies", tuple(dict.fromkeys(self.strategies)))
        require(
            self.dataset == HUMANEVAL,
            f"dataset={self.dataset}: has no tests to run answers against; expected {HUMANEVAL}",
        )
        whole("samples", self.samples, "1 or more, a whole number", 1)
        whole("batch_size", self.batch_size, "1 or more, a whole number", 1)
        real("temperature", self.temperature, "0 (greedy) or a positive number", 0)
        require(
            self.samples == 1 or self.temperature > 0,
            f"samples={self.samples}: greedy answers are all the same; expected 1",
        )
        super().__post_init__()

    @property
    def _trees(self) -> tuple[str, ...]:
        return (self.tree,)

    @property
    def samplings(self) -> list[SamplingConfig]:
        """How tokens are chosen, in turn."""
        return self._samplings([self.temperature], range(self.samples))


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Asked):
    """Which answers are inspected; they are drafted by the paper's strategy with the trained k.

    Attributes:
        text: .jsonl with the texts `prompt` and `completion` in every line; None: `dataset`.
        data_limit: see `tasks.datasets.limited`.
        max_new_tokens: tokens of an answer at most.
        anchors: places of each answer at which drafts are evaluated.
    """

    text: Path | None = option(None, ".jsonl with prompt and completion, instead of a dataset.")
    data_limit: Limit = option(16, _DATA_LIMIT)
    max_new_tokens: int = option(128, MAX_NEW_TOKENS)
    anchors: int = 32

    def __post_init__(self) -> None:
        """Refuse places that are no number, and a text that is not there, with an InputError."""
        super().__post_init__()
        whole("anchors", self.anchors, "1 or more, a whole number", 1)
        good = self.text is None or (isinstance(self.text, Path) and self.text.is_file())
        require(good, f"text={self.text}: no such file; expected a .jsonl")
        if self.text is not None:  # which goes before a DATASET of the environment
            object.__setattr__(self, "dataset", HUMANEVAL)
