"""The exactness audit: AR against SDSAT, and against transformers' own `generate`, on problems.

    sdsat verify smollm2-135m-sdsat --dtype float32 --k-list 1,3,5,7 --data-limit 40

Every pair of outputs is compared token by token. A difference is never hidden: its place, both
tokens and the AR logit margin are recorded, so that a reader can tell a tie that rounding broke
from a bug.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.records import open_record
from sdsat.evaluation.reference import transformers_generate
from sdsat.evaluation.sweep import TRANSFORMERS, VerifyConfig
from sdsat.files import write_json
from sdsat.method.sampling import choose
from sdsat.tasks.datasets import limited, read_tasks
from sdsat.tasks.prompts import Problem, encode_task

# A first divergence with a larger margin than this cannot be rounding. In half precision logits of
# 16 to 32 lie 1/8 (bfloat16) or 1/64 (float16) apart, and different kernels were seen to differ by
# a few such steps.
EXPLAINED = {"float32": 1e-3, "float16": 0.1, "bfloat16": 1.0, "int8": 1.0, "gguf": 1.0}
_COLUMNS = (
    "dtype",
    "against",
    "temperature",
    "seed",
    "k",
    "tree",
    "identical",
    "share",
    "largest_margin",
    "explained",
)


def first_divergence(
    decoder: Decoder, prompt_ids: list[int], ar: list[int], other: list[int], config: DecodeConfig
) -> dict[str, Any] | None:
    """Find where two outputs first differ, and by how much AR preferred its own token there.

    Args:
        decoder: what decoded.
        prompt_ids: of both.
        ar: token ids of AR's output.
        other: token ids of the other one.
        config: of whose sampling both are.

    Returns:
        None when they are equal, else {index, ar_token, token, ar_margin}. ar_margin, in logits:
        greedy, how far AR's token was ahead; sampling, by how much the two must move towards each
        other for AR to choose the other token, its noise and filters included. It is None, as the
        tokens are, where one output ends inside the other.
    """
    if ar == other:
        return None
    place = next((i for i, (a, b) in enumerate(zip(ar, other, strict=False)) if a != b), None)
    if place is None:
        return {
            "index": min(len(ar), len(other)),
            "ar_token": None,
            "token": None,
            "ar_margin": None,
        }
    logits = decoder.next_logits(prompt_ids + ar[:place], len(prompt_ids), config).double()
    ours = ar[place]
    theirs = other[place]
    if config.sampling.greedy:
        margin = float(logits[ours] - logits[theirs])
    else:
        margin = sampled_margin(logits, ours, theirs, place, config.sampling)
    return {"index": place, "ar_token": ours, "token": theirs, "ar_margin": round(margin, 6)}


def sampled_margin(
    logits: Tensor, ours: int, theirs: int, index: int, sampling: SamplingConfig
) -> float:
    """Find the smallest shift at which `theirs` is chosen, by bisection.

    Half of it moves `ours` down, and half of it `theirs` up.

    Args:
        logits: [V].
        ours: the token that is chosen without a shift.
        theirs: the other one.
        index: emitted index of the token.
        sampling: how it is chosen.

    Returns:
        The shift, in logits.
    """
    at = torch.tensor([index], device=logits.device)

    def changes(shift: float) -> bool:
        moved = logits.clone()
        moved[ours] -= shift / 2
        moved[theirs] += shift / 2
        return int(choose(moved[None], at, sampling)) == theirs

    low = 0.0
    high = 256.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if changes(middle) else (middle, high)
    return high


def verify(decoder: Decoder, config: VerifyConfig, out: Path | None = None) -> dict[str, Any]:
    """Compare outputs on problems and return the document.

    With `out` it is rewritten after every problem and an interrupted run resumes.

    Args:
        decoder: what decodes.
        config: what is compared, on which problems.
        out: the record's file; None for a document in memory.

    Raises:
        InputError: one line, for a record of another run, and for settings that don't fit the
            model.
    """
    model = decoder.model
    dtype = model.dtype_name
    if not config.strategies:
        config = replace(config, strategies=decoder.strategies)
    tasks, source = read_tasks(config.dataset)
    config = replace(config, source=source)
    options = config.template_options
    problems = [
        encode_task(model.tokenizer, task, config.dataset, options)
        for task in limited(tasks, config.data_limit)
    ]
    with open_record(decoder, config, out, "comparisons") as document:
        done = {problem["task_id"] for problem in document["problems"]}
        todo = [problem for problem in problems if problem.task_id not in done]
        for problem in tqdm(todo, desc=f"verify {dtype}", unit="problem", disable=None):
            comparisons = _compare(decoder, problem, config)
            document["problems"].append({"task_id": problem.task_id, "comparisons": comparisons})
            document["summary"] = _summarize(document["problems"], dtype)
            if out is not None:
                write_json(out, document)
    return document


def divergences(document: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    """Write a line for each first divergence of an audit.

    It says where, both tokens, AR's margin and whether rounding explains it.
    """
    dtype = document["settings"]["dtype"]
    for problem in document["problems"]:
        for comparison in problem["comparisons"]:
            if comparison["divergence"]:
                yield _divergence_line(problem["task_id"], dtype, comparison, tokenizer)


def _divergence_line(task_id: str, dtype: str, comparison: dict[str, Any], tokenizer: Any) -> str:
    """Write the line of one divergence.

    Args:
        task_id: of the problem.
        dtype: of the weights.
        comparison: an entry of the document, with a divergence.
        tokenizer: of the model.
    """
    found = comparison["divergence"]
    seed = "" if comparison["seed"] is None else f" seed {comparison['seed']}"
    drafts = f" k={comparison['k']} {comparison['tree']}" if comparison["k"] else ""
    where = (
        f"{task_id}, {dtype}, temperature {comparison['temperature']}{seed}, "
        f"{comparison['against']}{drafts}: token {found['index']}"
    )
    if found["ar_margin"] is None:
        return f"{where}: one output ends there, unexplained"
    ours, theirs = (
        f"{token} {tokenizer.decode([token], clean_up_tokenization_spaces=False)!r}"
        for token in (found["ar_token"], found["token"])
    )
    explained = abs(found["ar_margin"]) <= EXPLAINED[dtype]
    verdict = "within rounding" if explained else "more than rounding explains"
    return f"{where} is {ours} in AR, {theirs} there; AR's margin {found['ar_margin']}, {verdict}"


def audit_rows(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """List the summaries of audits in several dtypes, one after the other: a row a setting."""
    return [
        {"dtype": document["settings"]["dtype"], **row}
        for document in documents
        for row in document["summary"]
    ]


def audit_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Make a table of the rows of `audit_rows` for a terminal."""
    table = Table(*_COLUMNS, title=title)
    for row in rows:
        share = row["identical"] / row["num_problems"]
        cells = {
            **row,
            "identical": f"{row['identical']}/{row['num_problems']}",
            "share": f"{share:.0%}",
            "explained": "" if share == 1 else row["explained"],
        }
        table.add_row(*("" if cells[name] is None else str(cells[name]) for name in _COLUMNS))
    return table


def closing_line(rows: Sequence[dict[str, Any]]) -> str:
    """Say how many outputs of SDSAT are AR's."""
    ours = [row for row in rows if row["against"] != TRANSFORMERS.strategy]
    same = sum(row["identical"] for row in ours)
    count = sum(row["num_problems"] for row in ours)
    return f"{same} of SDSAT's {count} outputs are AR's, token for token"


def _compare(decoder: Decoder, problem: Problem, config: VerifyConfig) -> list[dict[str, Any]]:
    """Make every sampling's comparisons on one problem."""
    prompt_ids = list(problem.prompt_ids)
    ar_setting, *drafting = config.settings
    comparisons = list[dict[str, Any]]()
    for sampling in config.samplings:
        seed = None if sampling.greedy else sampling.seed
        facts = {"temperature": sampling.temperature, "seed": seed}
        # Stop strings don't end it: the longer an answer, the more is compared.
        stop_ids = decoder.model.stop_ids + problem.stop_ids
        plain = config.plain(sampling, problem.task_id, stop_ids)
        ar = decoder.generate(prompt_ids, ar_setting.of(plain)).token_ids
        if sampling.greedy:
            theirs = transformers_generate(decoder, prompt_ids, plain).token_ids
            divergence = first_divergence(decoder, prompt_ids, ar, theirs, plain)
            against = {"against": TRANSFORMERS.strategy, **facts, "k": 0, "tree": None}
            comparisons.append({**against, "divergence": divergence})
        for setting in drafting:
            decode = decoder.resolved(setting.of(plain))
            with warnings.catch_warnings():
                # Depth beyond the trained one changes speed, not the output.
                warnings.simplefilter("ignore")
                tokens = decoder.generate(prompt_ids, decode).token_ids
            tree = decode.tree_name if setting.k else None
            against = {"against": setting.strategy, **facts, "k": setting.k, "tree": tree}
            divergence = first_divergence(decoder, prompt_ids, ar, tokens, decode)
            comparisons.append({**against, "divergence": divergence})
    return comparisons


def _summarize(problems: list[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """Make one row for each compared setting.

    It says how many problems are identical, and the largest margin at a first divergence.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for comparison in (c for problem in problems for c in problem["comparisons"]):
        setting = {key: comparison[key] for key in ("against", "temperature", "seed", "k", "tree")}
        row = rows.setdefault(
            tuple(setting.values()), {**setting, "num_problems": 0, "identical": 0, "margins": []}
        )
        row["num_problems"] += 1
        if comparison["divergence"] is None:
            row["identical"] += 1
        else:
            row["margins"].append(comparison["divergence"]["ar_margin"])
    for row in rows.values():
        margins = row.pop("margins")
        row["largest_margin"] = None if None in margins or not margins else max(margins, key=abs)
        row["explained"] = None not in margins and all(
            abs(margin) <= EXPLAINED[dtype] for margin in margins
        )
    return list(rows.values())
