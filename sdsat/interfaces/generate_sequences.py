"""The sequences of one call of `generate`: their settings, their choosers and their output."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as processors
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from sdsat.config import DecodeConfig, SamplingConfig, require, whole
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.resolve import check_context, check_tokens
from sdsat.decoding.sequence import Generation
from sdsat.interfaces.generate_arguments import refuse_without_room
from sdsat.method.sampling import choose, filtered
from sdsat.method.tree import parse_tree


@dataclass
class SdsatOutput(GenerateDecoderOnlyOutput):
    """The output of transformers, and how each sequence came about. No cache is given back.

    scores, logits: of a sequence that has ended, the padding token's score is 0 and all others are
    -inf.
    """

    generations: list[Generation] | None = None


# In the order in which transformers applies them, which is that of SamplingConfig.
_NATIVE = (
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
)
# Functions of (tokens so far, logits) alone: sequences of a batch may come one by one.
_STATELESS = (
    *_NATIVE,
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.ExponentialDecayLengthPenalty,
    processors.ForcedBOSTokenLogitsProcessor,
    processors.ForcedEOSTokenLogitsProcessor,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.MinPLogitsWarper,
    processors.NoBadWordsLogitsProcessor,
    processors.NoRepeatNGramLogitsProcessor,
    processors.RepetitionPenaltyLogitsProcessor,
    processors.SequenceBiasLogitsProcessor,
    processors.SuppressTokensAtBeginLogitsProcessor,
    processors.SuppressTokensLogitsProcessor,
    processors.TopHLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.WatermarkLogitsProcessor,
    StopStringCriteria,
)


def refuse_in_batch(steps: list[Any], streamer: Any) -> None:
    """Refuse what sequences that go on by themselves can't share, with an InputError.

    steps: processors and criteria. streamer: the caller's, if any.
    """
    require(
        streamer is None,
        (
            f"streamer={type(streamer).__name__}: each sequence of a batch goes on by itself; "
            "expected a single one"
        ),
    )
    for step in steps:
        require(
            type(step) in (*_STATELESS, EosTokenCriteria, MaxLengthCriteria),
            (
                f"{type(step).__name__}: it may keep state, and each sequence of a batch goes "
                "on by itself; expected a single one"
            ),
        )


def _native(step: Any) -> bool:
    """Tell whether SamplingConfig does exactly what this warper does."""
    if (
        getattr(step, "min_tokens_to_keep", 1) != 1
        or getattr(step, "filter_value", -math.inf) != -math.inf
    ):
        return False
    if type(step) is processors.TemperatureLogitsWarper:
        return 1e-6 <= step.temperature < math.inf
    return type(step) is processors.TopKLogitsWarper or (
        type(step) is processors.TopPLogitsWarper and step.top_p > 0
    )


def _first_native(steps: list[Any]) -> int:
    """Find from where on `steps` are nothing but warpers that SamplingConfig does, in its order."""
    first = len(steps)
    place = len(_NATIVE)
    while first and _native(steps[first - 1]) and _NATIVE.index(type(steps[first - 1])) < place:
        first -= 1
        place = _NATIVE.index(type(steps[first]))
    return first


def _sampling(steps: list[Any], seed: int) -> SamplingConfig:
    """Make the SamplingConfig of those warpers among `steps` that it knows."""
    names = ("temperature", "top_k", "top_p")
    found = {
        name: getattr(step, name)
        for step in steps
        if _native(step)
        for name in names
        if hasattr(step, name)
    }
    return SamplingConfig(**{"temperature": 1.0, **found}, seed=seed)


class Sequences:
    """The sequences of one call, [B, L] with their padding, and what is done at their tokens.

    Raises InputError where nothing limits the output's length, for an end that is no token id, and
    for criteria in a batch without an end or a padding token.

    Attributes:
        decoder: that generates.
        input_ids: [B, L].
        settings: transformers' generation config.
        seed: of the first sequence.
        own: processors that only a chooser can apply.
        native: processors after them, which SamplingConfig does.
        stop_ids: tokens that end a sequence.
        max_new_tokens: of each sequence.
        criteria: stopping criteria that only a chooser can apply.
        keep_scores: whether the output has scores.
        keep_logits: whether the output has logits.
        pad: the id behind a sequence's end.
        choosers: one a sequence, from `decode` on.
    """

    def __init__(
        self,
        decoder: Decoder,
        input_ids: Tensor,
        steps: list[Any],
        criteria: StoppingCriteriaList,
        settings: Any,
        seed: int,
    ):
        self.decoder = decoder
        self.input_ids = input_ids
        self.settings = settings
        self.seed = seed
        first = _first_native(steps) if settings.do_sample else len(steps)
        self.own = LogitsProcessorList(steps[:first])
        self.native = LogitsProcessorList(steps[first:])
        ends = [
            whole("eos_token_id", token, "token ids, 0 or more", 0)
            for c in criteria
            if type(c) is EosTokenCriteria
            for token in c.eos_token_id.tolist()
        ]
        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        require(
            bool(lengths), "max_new_tokens: nothing ends the output; expected a number of tokens"
        )
        self.stop_ids = tuple(ends)
        self.max_new_tokens = max(1, min(lengths) - input_ids.shape[1])
        self.criteria = StoppingCriteriaList(
            c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)
        )
        in_dict = bool(settings.return_dict_in_generate)
        self.keep_scores = in_dict and bool(settings.output_scores)
        self.keep_logits = in_dict and bool(settings.output_logits)
        pad = settings._pad_token_tensor
        several = len(input_ids) > 1
        require(
            pad is not None or not self.criteria or not several,
            (
                "pad_token_id=None: the sequences may end at different lengths; expected a "
                "token id to pad them with"
            ),
        )
        require(
            bool(ends) or not self.criteria or not several,
            f"{', '.join(type(each).__name__ for each in self.criteria)}: without an "
            "eos_token_id, plain generate goes on with "
            "sequences of a batch that it has ended; expected an eos_token_id too, or a "
            "single sequence",
        )
        self.pad = 0 if pad is None else int(pad)
        self.choosers: list[_Chooser] = []

    def decode(
        self, prompts: list[list[int]], settings: tuple[Any, ...], streamer: Any
    ) -> list[Generation]:
        """Generate for each prompt.

        settings: k, tree, strategy, budget and lookup of a DecodeConfig. Raises InputError where
        these, the prompts and the model do not fit together.
        """
        k, tree, strategy, budget, lookup = settings
        tree = parse_tree(tree) if isinstance(tree, str) else tree
        plain = not (self.own or self.criteria or self.keep_scores or self.keep_logits)
        asked = DecodeConfig(
            k,
            self.max_new_tokens,
            tree,
            SamplingConfig(),
            self.stop_ids,
            (),
            strategy,
            budget,
            lookup,
        )
        config = self.decoder.resolved(asked)
        for prompt in prompts:
            check_tokens("input_ids", prompt, self.decoder.model)
        longest = max(map(len, prompts))
        num = self.settings.num_return_sequences
        check_context(self.decoder.model, longest, config)
        rows = len(prompts)
        refuse_without_room(self.decoder.model, num, rows, self.max_new_tokens, longest)
        self.choosers = [_Chooser(self, row) for row in range(len(prompts))]
        configs = [replace(config, sampling=chooser.drafting) for chooser in self.choosers]
        on_tokens = None if streamer is None else partial(_stream, streamer)
        choosers = None if plain else self.choosers
        return self.decoder.generate_batch(prompts, configs, on_tokens, rows, choosers)

    def output(self, generations: list[Generation]) -> Tensor | SdsatOutput:
        """Put generations into the form that transformers returns."""
        longest = max(generation.num_new_tokens for generation in generations)
        new = torch.full((len(generations), longest), self.pad, dtype=torch.long)
        for row, generation in enumerate(generations):
            new[row, : generation.num_new_tokens] = torch.tensor(generation.token_ids)
        sequences = torch.cat([self.input_ids, new.to(self.input_ids.device)], dim=1)
        if not self.settings.return_dict_in_generate:
            return sequences
        scores, logits = (
            [getattr(chooser, name) for chooser in self.choosers] for name in ("scores", "logits")
        )
        return SdsatOutput(
            sequences=sequences,
            scores=self._stacked(scores) if self.keep_scores else None,
            logits=self._stacked(logits) if self.keep_logits else None,
            generations=generations,
        )

    def _stacked(self, kept: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """Stack what the sequences kept: for each position, [B, V]."""
        over = torch.full_like(kept[0][0], -math.inf)
        over[:, self.pad] = 0
        count = max(map(len, kept))
        return tuple(
            torch.cat([rows[i] if i < len(rows) else over for rows in kept]) for i in range(count)
        )


class _Chooser:
    """A `decoding.sequence.Chooser` of one sequence.

    It does what transformers' own loop does, in this order: processors, the choice, criteria.
    """

    def __init__(self, all_: Sequences, row: int):
        self.all = all_
        seed = all_.seed + (row << 32)
        sample = bool(all_.settings.do_sample)
        self.sampling = _sampling(all_.native, seed) if sample else SamplingConfig()
        self.drafting = _sampling([*all_.own, *all_.native], seed) if sample else SamplingConfig()
        prompt = all_.input_ids[row : row + 1]
        self.ids = torch.nn.functional.pad(prompt, (0, all_.max_new_tokens)).to(
            all_.decoder.model.device
        )
        self.length = prompt.shape[1]
        self.num_new = 0
        # The caller's mode, in which processors have made what they keep.
        self.inference = torch.is_inference_mode_enabled()
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor) -> tuple[int, bool]:
        own = self.all.own
        native = self.all.native
        so_far = self.ids[:, : self.length]
        index = torch.full((1,), self.num_new, device=logits.device)
        # Modes are as in plain generate, so that processors may use what they have kept.
        with torch.inference_mode(self.inference), torch.no_grad():
            scores = logits.to(torch.float32, copy=True)[None]
            if self.all.keep_logits:
                self.logits.append(scores.clone())
            if own:
                # Some processors make a number of a SAT's -inf, so it is masked again.
                scores = self.all.decoder.model.legal(own(so_far, scores))
                chosen = (
                    scores.argmax(-1)
                    if self.sampling.greedy
                    else choose(self._drawable(scores), index, self.sampling)[:, 0]
                )
            else:
                engine = self.all.decoder.engine
                chosen = engine.next_tokens(logits[None], index, self.sampling)
            if self.all.keep_scores:
                self.scores.append(filtered(scores, self.sampling) if native else scores)
            self.ids[:, self.length] = chosen
            self.length = self.length + 1
            self.num_new = self.num_new + 1
            scores_so_far = tuple(self.scores) if self.all.keep_scores else None
            ended = bool(self.all.criteria) and bool(
                self.all.criteria(self.ids[:, : self.length], scores_so_far).all()
            )
        return int(chosen), ended

    def _drawable(self, scores: Tensor) -> Tensor:
        """Return the scores [1, V], if a token can be drawn by them.

        Raises InputError otherwise, where plain generate fails, too.
        """
        require(
            bool(scores.max().isfinite()),
            "do_sample=True: after "
            f"{', '.join(type(step).__name__ for step in self.all.own)} no token is left "
            "to draw, or a "
            "score is NaN or infinite; expected other settings, or remove_invalid_values=True",
        )
        return scores


def _stream(streamer: Any, number: int, tokens: list[int], drafted: list[bool]) -> None:
    for token in tokens:
        streamer.put(torch.tensor([token]))
