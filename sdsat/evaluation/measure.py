"""One problem, measured with all settings of a benchmark in turns."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from sdsat.config import DecodeConfig
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.sequence import Generation
from sdsat.evaluation.outputs import Output
from sdsat.evaluation.reference import transformers_generate
from sdsat.evaluation.summary import Key, key_of, seconds_of
from sdsat.evaluation.sweep import TRANSFORMERS, BenchConfig, Setting
from sdsat.interfaces.terminal import TokenStream
from sdsat.tasks.prompts import WARM_UP, Problem, encode_prompt

_WARM_UP_TOKENS = 16


class Measured(NamedTuple):
    """A problem that was measured.

    Attributes:
        entry: its entry in a worker document.
        outputs: what each of its runs generated.
    """

    entry: dict[str, Any]
    outputs: list[tuple[Key, Output]]


class _Turn(NamedTuple):
    """One generation. drafted: for each token, whether it was an accepted draft."""

    record: dict[str, Any]
    out: Generation
    drafted: list[bool]


def measure_problem(
    decoder: Decoder, problem: Problem, config: BenchConfig, first: int
) -> Measured:
    """Decode one problem with every setting, config.turns times in turn.

    Noise of the machine hits all settings alike, because they take turns.

    Args:
        decoder: what decodes.
        problem: the prompt, and what ends the answer beside the model's own end.
        config: what is measured.
        first: how many settings to go on from the first one; that one begins.

    Raises:
        InputError: for a prompt and settings that don't fit the model.
    """
    settings = config.settings
    plain = config.plain(
        config.sampling,
        problem.task_id,
        decoder.model.stop_ids + problem.stop_ids,
        problem.stop_strings,
    )
    turns: dict[Setting, list[_Turn]] = {setting: [] for setting in settings}
    for place in range(config.turns * len(settings)):
        setting = settings[(place + first) % len(settings)]
        turns[setting].append(_generate(decoder, list(problem.prompt_ids), setting, plain))
    kept = [_median(turns[setting]) for setting in settings]
    entry = {
        "task_id": problem.task_id,
        "seed": None if plain.sampling.greedy else plain.sampling.seed,
        "num_prompt_tokens": len(problem.prompt_ids),
        "runs": [_of_turns(turn, turns[of]) for of, turn in zip(settings, kept, strict=True)],
    }
    text_of = partial(
        marked, decoder.model.tokenizer, problem.prompt_ids[-1], stop_strings=problem.stop_strings
    )
    return Measured(
        entry, [(key_of(turn.record), text_of(turn.out.token_ids, turn.drafted)) for turn in kept]
    )


def _generate(
    decoder: Decoder, prompt_ids: list[int], setting: Setting, plain: DecodeConfig
) -> _Turn:
    """Decode once with a setting.

    Args:
        decoder: what decodes.
        prompt_ids: the prompt's tokens.
        setting: how.
        plain: the settings of plain decoding.
    """
    config = setting.of(plain)
    drafted = list[bool]()
    with warnings.catch_warnings():
        # That k is beyond the trained depth is said once, when the run starts.
        warnings.simplefilter("ignore")
        if setting == TRANSFORMERS:
            out = transformers_generate(decoder, prompt_ids, config)
            drafted += [False] * out.num_new_tokens
        else:
            out = decoder.generate(prompt_ids, config, lambda _, flags: drafted.extend(flags))
    return _Turn(run_record(setting, out), out, drafted)


def marked(
    tokenizer: Any,
    before: int,
    token_ids: list[int],
    drafted: list[bool],
    stop_strings: Sequence[str],
) -> Output:
    """Decode an output and mark its accepted drafts.

    Args:
        tokenizer: None gives an empty text.
        before: the prompt's last token.
        token_ids: of the output.
        drafted: for each token, whether it was an accepted draft.
        stop_strings: before which the text ends.
    """
    if tokenizer is None:
        return Output("", [])
    stream = TokenStream(tokenizer, before, stop_strings)
    stream.add(token_ids, drafted)
    stream.rest()
    accepted = list[list[int]]()
    for is_draft, places in groupby(range(stream.shown), key=stream.drafted.__getitem__):
        if is_draft:
            stretch = list(places)
            accepted.append([stretch[0], stretch[-1] + 1])
    return Output(stream.text[: stream.shown], accepted)


def run_record(setting: Setting, out: Generation) -> dict[str, Any]:
    """Collect what a worker document keeps of one generation."""
    histogram = [0] * (len(out.proposed_by_depth) + 1)
    for accepted in out.accepted_lengths:
        histogram[accepted] += 1
    return {
        "strategy": setting.strategy,
        "k": setting.k,
        "lookup": setting.lookup,
        "prefill_seconds": round(out.prefill_seconds, 6),
        "decode_seconds": round(out.decode_seconds, 6),
        "num_passes": out.num_passes,
        "num_plain_passes": out.num_plain_passes,
        "num_rounded_passes": out.num_rounded_passes,
        "num_new_tokens": out.num_new_tokens,
        "finish": out.finish,
        "proposed_by_depth": out.proposed_by_depth,
        "accepted_by_depth": out.accepted_by_depth,
        "accepted_histogram": histogram,
        "outputs_sha256": [hashlib.sha256(" ".join(map(str, out.token_ids)).encode()).hexdigest()],
    }


def _median(turns: list[_Turn]) -> _Turn:
    """Choose the turn of the median time."""
    return sorted(turns, key=lambda turn: seconds_of(turn.record))[(len(turns) - 1) // 2]


def _of_turns(kept: _Turn, turns: list[_Turn]) -> dict[str, Any]:
    """Merge a setting's turns: the one that is kept, and the outputs of all."""
    hashes = [sha for turn in turns for sha in turn.record["outputs_sha256"]]
    return {**kept.record, "outputs_sha256": hashes}


def warm_up(decoder: Decoder, config: BenchConfig) -> None:
    """Have everything made and learnt that is made once, on a prompt that is not measured."""
    tokenizer = decoder.model.tokenizer
    assert tokenizer is not None
    problem = Problem("warm-up", tuple(encode_prompt(tokenizer, WARM_UP)))
    short = replace(config, turns=1, max_new_tokens=min(_WARM_UP_TOKENS, config.max_new_tokens))
    measure_problem(decoder, problem, short, 0)
