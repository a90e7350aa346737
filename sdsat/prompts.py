"""Prompts as token ids: of benchmark problems, and for self-distillation of whatever the model should speed up.

A source is a folder of Python code (its documented functions become requests to complete them), a .jsonl or .txt file of
prompts, or `hub:NAME` for a data set of the Hugging Face hub. What overlaps HumanEval is dropped, and counted.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .config import require
from .datasets import HUMANEVAL, INFILLING, Limit, Task, hub_rows, humaneval_problems, limited, read_lines, rows_of

# What warms a model up before anything is measured: no problem of any data set.
WARM_UP = 'def seconds_of_day(clock):\n    """Return the seconds since midnight of a clock such as "07:30:05"."""\n'
_FENCE = "```python\n"
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # arXiv 2107.03374: what follows a completed function
# What a chat template ends with that has the model think first: <think>, [THINK], <thinking>, <|begin_of_thought|>, ..
_THOUGHT = re.compile(r"[<\[](?!\W*(/|end))\W{0,2}[\w:]*(think|thought|reason)\w*\W{0,2}[>\]]\s*$", re.IGNORECASE)
_INFILLING_TOKENS = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
_MARK = "☺"  # text that no token joins to what follows
_NGRAM = 10  # words that a prompt may not share with HumanEval in a row


@dataclass(frozen=True)
class Problem:
    """One benchmark prompt: its id, the token ids that the model continues, and what ends the answer beside the model's own."""

    task_id: str
    prompt_ids: tuple[int, ...]
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


def encode_task(tokenizer: PreTrainedTokenizerBase, task: Task, dataset: str, options: Sequence[str] = ()) -> Problem:
    """How the benchmark asks a problem of `dataset`: code to complete, a line to fill in, or a prompt of the user's own.

    A chat model ends its answer itself; one that continues HumanEval's code is stopped behind the function.
    """
    if task.suffix is not None:
        require(not options, f"template_option={' '.join(options)}: dataset={dataset} has no chat turns; leave it out")
        ids, end = encode_infilling(tokenizer, task.prompt, task.suffix, dataset == INFILLING)
        return Problem(task.task_id, tuple(ids), (end,))
    if dataset != HUMANEVAL:
        return Problem(task.task_id, tuple(encode_request(tokenizer, task.prompt, options)))
    stops = () if tokenizer.chat_template else HUMANEVAL_STOPS
    return Problem(task.task_id, tuple(encode_prompt(tokenizer, task.prompt, options)), stop_strings=stops)


def encode_infilling(tokenizer: PreTrainedTokenizerBase, prefix: str, suffix: str, suffix_first: bool) -> tuple[list[int], int]:
    """(token ids of CodeLlama's infilling prompt (arXiv 2308.12950), id of the token that ends the answer).

    suffix_first: `<PRE> <SUF>suffix <MID> prefix`, else `<PRE> prefix <SUF>suffix <MID>`. The suffix gets no space in front,
    as CodeLlama was trained; CodeLlamaTokenizer of transformers 5 puts one there.
    """
    vocabulary = tokenizer.get_vocab()
    lacking = [token for token in _INFILLING_TOKENS if token not in vocabulary]
    require(not lacking, f"dataset: infilling needs CodeLlama's tokens, but this tokenizer lacks {', '.join(lacking)}")
    pre, suf, mid, end = (vocabulary[token] for token in _INFILLING_TOKENS)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before: list[int] = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    mark, marked = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (_MARK, _MARK + suffix))
    after: list[int] = marked[len(mark) :]
    body = [suf, *after, mid, *before] if suffix_first else [*before, suf, *after, mid]
    return [*begin, pre, *body], end


def encode_prompt(tokenizer: PreTrainedTokenizerBase, code: str, options: Sequence[str] = ()) -> list[int]:
    """Token ids that ask for the completion of `code`: a chat turn that opens a code fence for chat models, else raw.

    Where the template has the model think first, there is no fence: it would stand inside the thought.
    """
    if not tokenizer.chat_template:
        return _encode_plain(tokenizer, code, options)
    return encode_chat(tokenizer, f"Complete this Python function.\n{_FENCE}{code.rstrip()}\n```", _FENCE, options)


def encode_request(tokenizer: PreTrainedTokenizerBase, request: str, options: Sequence[str] = ()) -> list[int]:
    """Token ids of a prompt as a chat turn for chat models, else as it is."""
    return (encode_chat if tokenizer.chat_template else _encode_plain)(tokenizer, request, options=options)


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, options: Sequence[str] = ()) -> list[int]:
    require(not options, f"template_option={' '.join(options)}: the model has no chat template; leave it out")
    return tokenizer(text)["input_ids"]


def encode_chat(tokenizer: PreTrainedTokenizerBase, question: str, opening: str = "", options: Sequence[str] = ()) -> list[int]:
    """Token ids of a user's turn and, unless the template opens a thought, the opening of the model's answer.

    options: KEY=VALUE for the chat template, as `enable_thinking=false`; what is not given is as the template has it.
    """
    text = _chat(tokenizer, question, options)
    return tokenizer(text + ("" if _opens_thought(text) else opening), add_special_tokens=False)["input_ids"]


def thinks_first(tokenizer: PreTrainedTokenizerBase, options: Sequence[str] = ()) -> bool:
    """Whether answers begin inside a thought that the chat template opens."""
    return bool(tokenizer.chat_template) and _opens_thought(_chat(tokenizer, "", options))


def _chat(tokenizer: PreTrainedTokenizerBase, question: str, options: Sequence[str]) -> str:
    turns = [{"role": "user", "content": question}]
    given = _template_options(tokenizer, options)
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **given)


def _opens_thought(text: str) -> bool:
    return _THOUGHT.search(text) is not None


def _template_options(tokenizer: PreTrainedTokenizerBase, options: Sequence[str]) -> dict[str, Any]:
    """('enable_thinking=false',) as {'enable_thinking': False}: values are JSON, or else text."""
    given, template = {}, tokenizer.get_chat_template() if options else ""
    for option in options:
        key, equals, value = option.partition("=")
        require(bool(equals) and key.isidentifier(), f"template_option={option}: expected KEY=VALUE, as enable_thinking=false")
        own = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
        require(key not in own, f"template_option={option}: {key} is set by this program; expected one of the template's own")
        known = re.search(rf"\b{key}\b", template) is not None
        require(known, f"template_option={option}: the chat template does not know {key}; expected one that it reads")
        try:
            given[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            given[key] = value
    return given


def humaneval(tokenizer: PreTrainedTokenizerBase, limit: Limit = None, options: Sequence[str] = ()) -> list[Problem]:
    """The first HumanEval problems as prompts."""
    return [Problem(p["task_id"], tuple(encode_prompt(tokenizer, p["prompt"], options))) for p in humaneval_problems(limit)]


def function_prompts(path: Path) -> Iterator[tuple[str, str]]:
    """(function name, header with docstring) of every documented function in a Python file."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = list(ast.walk(ast.parse(source)))
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return
    lines = source.split("\n")  # as ast counts them
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)) and len(doc) >= 40:
            header = lines[node.lineno - 1 : node.body[0].end_lineno]
            yield node.name, textwrap.dedent("\n".join(header)) + "\n"


class Decontaminator:
    """Recognises prompts that overlap HumanEval: the same function name, or `_NGRAM` words in a row in common."""

    def __init__(self) -> None:
        problems = humaneval_problems()
        self.names = {p["entry_point"] for p in problems}
        self.ngrams = {gram for p in problems for gram in self._ngrams(p["prompt"] + p["canonical_solution"])}

    @staticmethod
    def _ngrams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1)}

    def overlaps(self, name: str, text: str) -> bool:
        return name in self.names or not self.ngrams.isdisjoint(self._ngrams(text))


def answered_problems(
    tokenizer: PreTrainedTokenizerBase, file: Path | None, limit: Limit, options: Sequence[str] = ()
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, ids of the given answer) of the first problems.

    file: .jsonl with the texts `prompt` and `completion` in every line; None: HumanEval and its own solutions.
    """
    if file is None:
        problems = humaneval_problems(limit)
        repeats = bool(tokenizer.chat_template)  # a chat answer starts with the header again
        answers = [(p["prompt"] if repeats else "") + p["canonical_solution"] for p in problems]
        asked = [encode_prompt(tokenizer, p["prompt"], options) for p in problems]
    else:
        rows = limited(list(rows_of(file, ("prompt", "completion"), "text")), limit)
        answers = [row["completion"] for row in rows]
        asked = [encode_request(tokenizer, row["prompt"], options) for row in rows]
    return [(ids, tokenizer(answer, add_special_tokens=False)["input_ids"]) for ids, answer in zip(asked, answers, strict=True)]


def python_files(folders: list[Path]) -> list[Path]:
    """Every Python file below `folders` in a shuffled order (seed 0); test folders are left out."""
    skipped, files = {"tests", "test", "testing", "idlelib", "site-packages"}, []
    for folder in folders:
        files += [path for path in sorted(folder.rglob("*.py")) if not skipped & set(path.relative_to(folder).parts)]
    random.Random(0).shuffle(files)
    return files


def _lines_of(file: Path) -> Iterator[str]:
    """The prompts of a .jsonl file (the key `prompt` of every line) or a text file (one prompt a line)."""
    if file.suffix == ".jsonl":
        yield from (row["prompt"] for row in rows_of(file, ("prompt",), "source"))
    else:
        yield from (line for line in read_lines(file, "source") if line.strip())


def _hub_prompts(source: str) -> Iterator[str]:
    """The prompts of `hub:NAME` or `hub:NAME:COLUMN`, a data set's split `train`, through the library `datasets`."""
    name, _, column = source.removeprefix("hub:").partition(":")
    column = column or "prompt"
    rows = hub_rows(name, f"source={source}")
    require(column in rows.column_names, f"source={source}: has columns {', '.join(rows.column_names)}; add :COLUMN")
    for row in rows[column]:
        require(isinstance(row, str), f"source={source}: column {column} does not hold texts; choose another")
        yield row


def default_sources() -> list[str]:
    """The standard library and the installed packages."""
    paths = sysconfig.get_paths()
    return [paths["stdlib"], paths["purelib"]]


def licences(sources: Sequence[str]) -> dict[str, str]:
    """{package version: licence} of the installed packages whose code lies in a source folder."""
    found = {}
    for package in importlib.metadata.distributions(path=[source for source in sources if Path(source).is_dir()]):
        facts = package.metadata
        named = [line.rpartition(" :: ")[2] for line in facts.get_all("Classifier") or () if line.startswith("License ::")]
        stated = [*(facts.get_all("License-Expression") or ()), ", ".join(named), *(facts.get_all("License") or ()), "not stated"]
        found[f"{facts['Name']} {package.version}"] = next(text.split("\n")[0] for text in stated if text)
    return dict(sorted(found.items()))


def read_sources(sources: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """(function name or '', text, whether it is code to complete) of every prompt: files and data sets in order, then folders."""
    expected = "expected a folder of Python code, a .jsonl or .txt file, or hub:NAME"
    for source in sources:
        known = source.startswith("hub:") or Path(source).is_dir() or Path(source).suffix in (".jsonl", ".txt")
        require(known, f"source={source}: {expected}")
    for source in sources:
        if not Path(source).is_dir():
            found = _hub_prompts(source) if source.startswith("hub:") else _lines_of(Path(source))
            yield from (("", text, False) for text in found)
    for path in python_files([Path(source) for source in sources if Path(source).is_dir()]):
        for name, text in function_prompts(path):
            yield name, text, True


def collect_prompts(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    max_length: int,
    options: Sequence[str] = (),
) -> tuple[list[list[int]], dict[str, int]]:
    """Distinct, decontaminated, shuffled (seed 0) prompts as token ids. Returns (prompts, counts of what was dropped)."""
    decontaminator = Decontaminator()
    counts = {"found": 0, "duplicate": 0, "humaneval_overlap": 0, "too_long": 0}
    seen: set[str] = set()
    prompts: list[list[int]] = []
    for name, text, is_code in read_sources(sources):
        if limit is not None and len(prompts) >= limit:
            break
        counts["found"] += 1
        if text in seen:
            counts["duplicate"] += 1
            continue
        seen.add(text)
        asked = [name] if name else re.findall(r"\bdef (\w+)", text) or [""]
        if any(decontaminator.overlaps(function, text) for function in asked):
            counts["humaneval_overlap"] += 1
        elif len(ids := (encode_prompt if is_code else encode_request)(tokenizer, text, options)) > max_length:
            counts["too_long"] += 1
        elif ids:
            prompts.append(ids)
    require(len(prompts) > 0, f"source={', '.join(sources)}: no prompt found")
    random.Random(0).shuffle(prompts)
    return prompts, counts
