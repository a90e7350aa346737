"""One problem, measured with all settings of a benchmark in turns."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from typing import Any

from sdsat.decoding.decoder import Decoder
from sdsat.decoding.sequence import Generation
from sdsat.evaluation.reference import transformers_generate
from sdsat.evaluation.summary import seconds_of
from sdsat.evaluation.sweep import TRANSFORMERS, BenchConfig, Setting
from sdsat.tasks.prompts import WARM_UP, Problem, encode_prompt

_WARM_UP_TOKENS = 16


def measure_problem(
    decoder: Decoder, problem: Problem, config: BenchConfig, first: int
) -> dict[str, Any]:
    """Decode one problem with every setting, config.turns times in turn.

    Noise of the machine hits all settings alike, because they take turns.

    Args:
        decoder: what decodes.
        problem: the prompt, and what ends the answer beside the model's own end.
        config: what is measured.
        first: how many settings to go on from the first one; that one begins.

    Returns:
        The problem's entry in a worker document.

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
    runs: dict[Setting, list[dict[str, Any]]] = {setting: [] for setting in settings}
    for place in range(config.turns * len(settings)):
        setting = settings[(place + first) % len(settings)]
        run = transformers_generate if setting == TRANSFORMERS else Decoder.generate
        with warnings.catch_warnings():
            # That k is beyond the trained depth is said once, when the run starts.
            warnings.simplefilter("ignore")
            out = run(decoder, list(problem.prompt_ids), setting.of(plain))
        runs[setting].append(run_record(setting, out))
    return {
        "task_id": problem.task_id,
        "seed": None if plain.sampling.greedy else plain.sampling.seed,
        "num_prompt_tokens": len(problem.prompt_ids),
        "runs": [_of_turns(runs[setting]) for setting in settings],
    }


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


def _of_turns(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge a setting's turns: the run of the median time, and the outputs of all."""
    median = sorted(runs, key=seconds_of)[(len(runs) - 1) // 2]
    return {**median, "outputs_sha256": [sha for run in runs for sha in run["outputs_sha256"]]}


def warm_up(decoder: Decoder, config: BenchConfig) -> None:
    """Have everything made and learnt that is made once, on a prompt that is not measured."""
    tokenizer = decoder.model.tokenizer
    assert tokenizer is not None
    problem = Problem("warm-up", tuple(encode_prompt(tokenizer, WARM_UP)))
    short = replace(config, turns=1, max_new_tokens=min(_WARM_UP_TOKENS, config.max_new_tokens))
    measure_problem(decoder, problem, short, 0)
