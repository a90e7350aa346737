"""Settings of distillation and training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from sdsat.config.checks import flag, keep, real, require, several, whole
from sdsat.config.decoding import SamplingConfig
from sdsat.config.options import MAX_NEW_TOKENS, NUMBERS, SEED, TEMPLATE_OPTIONS, option

MAX_TRAINED_K = 16  # depth of an adapter
DRAFT_VOCABULARY = 16384  # tokens
TRAIN_MODES = ("adapter", "everywhere", "full")
_ONLY_IN = {
    "rank": ("adapter", "everywhere"), "targets": ("adapter", "everywhere"), "head": ("adapter",),
    "draft_vocabulary": ("adapter",),
    "standard": ("everywhere", "full"), "embedding_steps": ("full",), "checkpointing": ("full",),
}  # fmt: skip
# Linear layers that get a low-rank update.
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass(frozen=True)
class TrainConfig:
    """Training: steps of sequences with SAT groups at random places of each.

    Raises InputError for a value of another kind or out of its bounds, and for one that another
    mode alone has.

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
        draft_vocabulary: how many tokens SATs may guess, beside those of the text so far: the ones
            that the data use most; 0 for all; None for those of `init`, or DRAFT_VOCABULARY; only
            for 'adapter'. A model with fewer has all.
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
    draft_vocabulary: int = option(
        None,
        "Adapter: how many tokens SATs may guess, the data's most frequent; 0 for all. Default: "
        f"{DRAFT_VOCABULARY}, or those of --init.",
    )
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
            keep(self, checkpoint_every=self.eval_every)
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
            keep(self, lr=2e-5 if self.mode == "full" else 1e-3)
        whole("head", self.head, "0 (none) or a positive size", 0)
        if self.draft_vocabulary is not None:
            whole("draft_vocabulary", self.draft_vocabulary, "0 (all) or a number of tokens", 0)
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

    Raises InputError for a value of another kind or out of its bounds.

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
