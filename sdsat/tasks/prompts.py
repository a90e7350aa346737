"""Prompts as token ids: of benchmark problems, and for self-distillation.

The latter are of whatever the model should speed up. A source is a folder of Python code (its
functions become requests of the chosen kinds: kinds.py), a .jsonl or .txt file of prompts, or
`hub:NAME` for a data set of the Hugging Face hub. What overlaps a benchmark is dropped, and
counted.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sdsat.config import InputError, require
from sdsat.files import reason
from sdsat.tasks.datasets import (
    HUMANEVAL,
    INFILLING,
    Limit,
    Task,
    hub_rows,
    humaneval_problems,
    limited,
    read_lines,
    read_tasks,
    rows_of,
)
from sdsat.tasks.kinds import KINDS, Request, ask, completion, functions

# What warms a model up before anything is measured: no problem of any data set.
WARM_UP = (
    'def seconds_of_day(clock):\n    """Return the seconds since midnight of a clock such as '
    '"07:30:05"."""\n'
)
COMPLETE = {"complete": 1.0}
# What follows a completed function (arXiv 2107.03374).
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# What a chat template ends with that has the model think first: <think>, [THINK], <thinking>,
# <|begin_of_thought|>, ..
_THOUGHT = re.compile(
    r"[<\[](?!\W*(/|end))\W{0,2}[\w:]*(think|thought|reason)\w*\W{0,2}[>\]]\s*$", re.IGNORECASE
)
_INFILLING_TOKENS = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
_MARK = "☺"  # text that no token joins to what follows
NGRAM = 10  # words that a prompt may not share with a benchmark in a row


@dataclass(frozen=True)
class Problem:
    """One benchmark prompt.

    Attributes:
        task_id: its name.
        prompt_ids: the tokens that the model continues.
        stop_ids: tokens that end the answer, beside the model's own.
        stop_strings: texts that end the answer.
    """

    task_id: str
    prompt_ids: tuple[int, ...]
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


def encode_task(
    tokenizer: PreTrainedTokenizerBase, task: Task, dataset: str, options: Sequence[str] = ()
) -> Problem:
    """Ask a problem as the benchmark does.

    That is code to complete, a line to fill in, or a prompt of the user's own. A chat model ends
    its answer itself; one that continues HumanEval's code is stopped behind the function.

    Args:
        tokenizer: of the model.
        task: the problem.
        dataset: that the problem is of.
        options: see `encode`.

    Raises:
        InputError: for options or a task that the tokenizer has no use for.
    """
    if task.suffix is not None:
        require(
            not options,
            (
                f"template_option={' '.join(options)}: dataset={dataset} has no chat turns; "
                "leave it out"
            ),
        )
        ids, end = encode_infilling(tokenizer, task.prompt, task.suffix, dataset == INFILLING)
        return Problem(task.task_id, tuple(ids), (end,))
    if dataset != HUMANEVAL:
        return Problem(task.task_id, tuple(encode_request(tokenizer, task.prompt, options)))
    stops = () if tokenizer.chat_template else HUMANEVAL_STOPS
    return Problem(
        task.task_id, tuple(encode_prompt(tokenizer, task.prompt, options)), stop_strings=stops
    )


def encode_infilling(
    tokenizer: PreTrainedTokenizerBase, prefix: str, suffix: str, suffix_first: bool
) -> tuple[list[int], int]:
    """Encode CodeLlama's infilling prompt (arXiv 2308.12950).

    The suffix gets no space in front, as CodeLlama was trained; CodeLlamaTokenizer of transformers
    5 puts one there.

    Args:
        tokenizer: CodeLlama's.
        prefix: the text before the line.
        suffix: the text after it.
        suffix_first: `<PRE> <SUF>suffix <MID> prefix`, else `<PRE> prefix <SUF>suffix <MID>`.

    Returns:
        Token ids, and the id of the token that ends the answer.

    Raises:
        InputError: for a tokenizer without CodeLlama's tokens.
    """
    vocabulary = tokenizer.get_vocab()
    lacking = [token for token in _INFILLING_TOKENS if token not in vocabulary]
    require(
        not lacking,
        (
            "dataset: infilling needs CodeLlama's tokens, but this tokenizer lacks "
            f"{', '.join(lacking)}"
        ),
    )
    pre, suf, mid, end = (vocabulary[token] for token in _INFILLING_TOKENS)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before: list[int] = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    mark, marked = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (_MARK, _MARK + suffix)
    )
    after: list[int] = marked[len(mark) :]
    body = [suf, *after, mid, *before] if suffix_first else [*before, suf, *after, mid]
    return [*begin, pre, *body], end


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, code: str, options: Sequence[str] = ()
) -> list[int]:
    """Encode a request to complete `code`: a chat turn that opens a code fence, or else raw.

    Where the template has the model think first, there is no fence: it would stand inside the
    thought. options: see `encode`, which says what is refused.
    """
    return encode(tokenizer, completion(code), options)


def encode_request(
    tokenizer: PreTrainedTokenizerBase, request: str, options: Sequence[str] = ()
) -> list[int]:
    """Encode a prompt as a chat turn for chat models, else as it is.

    options: see `encode`, which says what is refused.
    """
    return encode(tokenizer, Request(request), options)


def encode(
    tokenizer: PreTrainedTokenizerBase, request: Request, options: Sequence[str] = ()
) -> list[int]:
    """Encode a request: for chat models as a user's turn, else as what is to be continued.

    The turn is followed by the opening of the answer, unless the template opens a thought.

    options: KEY=VALUE for the chat template, as `enable_thinking=false`; what is not given is as
    the template has it. Raises InputError for options that the template doesn't know.
    """
    if not tokenizer.chat_template:
        require(
            not options,
            f"template_option={' '.join(options)}: the model has no chat template; leave it out",
        )
        return tokenizer(request.code or request.text + request.opening)["input_ids"]
    text = _chat(tokenizer, [{"role": "user", "content": request.text}], options)
    return tokenizer(
        text + ("" if _opens_thought(text) else request.opening), add_special_tokens=False
    )["input_ids"]


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], options: Sequence[str] = ()
) -> list[int]:
    """Encode a conversation that the model is to answer; of one user's turn, as `encode_request`.

    Arguments and errors as of `text_of_turns`.
    """
    text = text_of_turns(tokenizer, turns, options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_of_turns(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], options: Sequence[str] = ()
) -> str:
    """Write a conversation as the model's chat template does, up to where the next answer begins.

    Args:
        tokenizer: of the model.
        turns: each with the texts `role` and `content`.
        options: see `encode`.

    Raises:
        InputError: for a model without a chat template, and for turns that its template refuses.
    """
    lacking = "model: it has no chat template to write turns with; expected a chat model"
    require(bool(tokenizer.chat_template), lacking)
    return _chat(tokenizer, turns, options)


def thinks_first(tokenizer: PreTrainedTokenizerBase, options: Sequence[str] = ()) -> bool:
    """Tell whether answers begin inside a thought that the chat template opens.

    Raises InputError as `encode`.
    """
    return bool(tokenizer.chat_template) and _opens_thought(
        _chat(tokenizer, [{"role": "user", "content": ""}], options)
    )


def _chat(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], options: Sequence[str]
) -> str:
    given = _template_options(tokenizer, options)
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **given
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise InputError(
            f"tokenizer: its chat template refuses these turns ({reason(error)})"
        ) from None


def _opens_thought(text: str) -> bool:
    return _THOUGHT.search(text) is not None


def _template_options(tokenizer: PreTrainedTokenizerBase, options: Sequence[str]) -> dict[str, Any]:
    """Read ('enable_thinking=false',) as {'enable_thinking': False}: values are JSON, or else text.

    Raises InputError for what the template doesn't know.
    """
    given = {}
    template = tokenizer.get_chat_template() if options else ""
    for option in options:
        key, equals, value = option.partition("=")
        require(
            bool(equals) and key.isidentifier(),
            f"template_option={option}: expected KEY=VALUE, as enable_thinking=false",
        )
        own = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
        require(
            key not in own,
            (
                f"template_option={option}: {key} is set by this program; expected one of the "
                "template's own"
            ),
        )
        known = re.search(rf"\b{key}\b", template) is not None
        require(
            known,
            (
                f"template_option={option}: the chat template does not know {key}; expected "
                "one that it reads"
            ),
        )
        try:
            given[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            given[key] = value
    return given


def humaneval(
    tokenizer: PreTrainedTokenizerBase, limit: Limit = None, options: Sequence[str] = ()
) -> list[Problem]:
    """Encode the first HumanEval problems as prompts. Raises InputError as `encode`."""
    return [
        Problem(p["task_id"], tuple(encode_prompt(tokenizer, p["prompt"], options)))
        for p in humaneval_problems(limit)
    ]


class Decontaminator:
    """What recognises overlap with HumanEval or further benchmarks.

    Overlap is a function name, or `NGRAM` words in a row in common.

    avoid: benchmarks as .jsonl files, such as MBPP's; of every line all texts count, and the
    functions that they define. Raises InputError for a file that can't be read.
    """

    def __init__(self, avoid: Sequence[Path] = ()) -> None:
        problems = humaneval_problems()
        self.names = {p["entry_point"] for p in problems}
        self.ngrams = {
            gram for p in problems for gram in self._ngrams(p["prompt"] + p["canonical_solution"])
        }
        for file in avoid:
            for row in rows_of(file, (), "avoid"):
                self.names |= {row.get("entry_point", ""), *defined(" ".join(_texts(row)))} - {""}
                self.ngrams |= {gram for text in _texts(row) for gram in self._ngrams(text)}

    @staticmethod
    def _ngrams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}

    def overlaps(self, name: str, text: str) -> bool:
        """Tell whether a function of this name, or this text, overlaps a benchmark."""
        return name in self.names or not self.ngrams.isdisjoint(self._ngrams(text))


def defined(text: str) -> list[str]:
    """List the names of the functions that a text defines."""
    return re.findall(r"\bdef (\w+)", text)


def _texts(value: object) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def answered_problems(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path,
    limit: Limit,
    options: Sequence[str] = (),
) -> list[tuple[Problem, list[int]]]:
    """Encode the first problems, each with the token ids of its given answer.

    Args:
        tokenizer: of the model.
        source: a data set as `read_tasks` takes it, of which only HumanEval has answers, its own
            solutions, and the others' are []; or a .jsonl file, as a Path, with the texts `prompt`
            and `completion` in every line.
        limit: how many problems.
        options: see `encode`.

    Raises:
        InputError: for a damaged file, and as `encode`.
    """
    if isinstance(source, Path):
        rows = limited(list(rows_of(source, ("prompt", "completion"), "text")), limit)
        tasks = [Task(f"{source.stem}/{i}", row["prompt"]) for i, row in enumerate(rows)]
        answers = [row["completion"] for row in rows]
    else:
        tasks = limited(read_tasks(source)[0], limit)
        answers = [""] * len(tasks)
    if source == HUMANEVAL:
        problems = humaneval_problems(limit)
        repeats = bool(tokenizer.chat_template)  # an answer in a chat starts with the header again
        answers = [(p["prompt"] if repeats else "") + p["canonical_solution"] for p in problems]
    return [
        (
            encode_task(tokenizer, task, str(source), options),
            tokenizer(answer, add_special_tokens=False)["input_ids"],
        )
        for task, answer in zip(tasks, answers, strict=True)
    ]


def python_files(folders: list[Path]) -> list[Path]:
    """List every Python file below `folders` in a shuffled order (seed 0).

    Test folders are left out.
    """
    skipped = {"tests", "test", "testing", "idlelib", "site-packages"}
    files = []
    for folder in folders:
        files += [
            path
            for path in sorted(folder.rglob("*.py"))
            if not skipped & set(path.relative_to(folder).parts)
        ]
    random.Random(0).shuffle(files)
    return files


def _lines_of(file: Path) -> Iterator[Request]:
    """Yield the prompts of a .jsonl file or a text file, one a line.

    A .jsonl file has in every line the key `prompt`, and `opening` for how the answer begins.
    Raises InputError for other lines.
    """
    if file.suffix == ".jsonl":
        for row in rows_of(file, ("prompt",), "source"):
            opening = row.get("opening", "")
            require(
                isinstance(opening, str), f"source={file}: opening={opening!r}: expected a text"
            )
            yield Request(row["prompt"], opening)
    else:
        yield from (Request(line) for line in read_lines(file, "source") if line.strip())


def _hub_prompts(source: str) -> Iterator[Request]:
    """Yield the prompts of `hub:NAME` or `hub:NAME:COLUMN`, split `train`.

    It is a data set read through the library `datasets`. Raises InputError where it can't be had,
    or has no texts in the column.
    """
    name, _, column = source.removeprefix("hub:").partition(":")
    column = column or "prompt"
    rows = hub_rows(name, f"source={source}")
    require(
        column in rows.column_names,
        f"source={source}: has columns {', '.join(rows.column_names)}; add :COLUMN",
    )
    for row in rows[column]:
        require(
            isinstance(row, str),
            f"source={source}: column {column} does not hold texts; choose another",
        )
        yield Request(row)


def default_sources() -> list[str]:
    """Return the folders of the standard library and of the installed packages."""
    paths = sysconfig.get_paths()
    return [paths["stdlib"], paths["purelib"]]


def licences(sources: Sequence[str]) -> dict[str, str]:
    """Find {package version: licence} of the packages whose code lies in a source folder."""
    found = {}
    for package in importlib.metadata.distributions(
        path=[source for source in sources if Path(source).is_dir()]
    ):
        facts = package.metadata
        named = [
            line.rpartition(" :: ")[2]
            for line in facts.get_all("Classifier") or ()
            if line.startswith("License ::")
        ]
        stated = [
            *(facts.get_all("License-Expression") or ()),
            ", ".join(named),
            *(facts.get_all("License") or ()),
            "not stated",
        ]
        found[f"{facts['Name']} {package.version}"] = next(
            text.split("\n")[0] for text in stated if text
        )
    return dict(sorted(found.items()))


def given_requests(sources: Sequence[str]) -> Iterator[Request]:
    """Yield the prompts of the sources that are files or data sets, in order.

    Raises InputError for one that can't be read.
    """
    for source in sources:
        if not Path(source).is_dir():
            yield from (
                _hub_prompts(source) if source.startswith("hub:") else _lines_of(Path(source))
            )


class Sieve:
    """What turns requests into token ids, but those that it drops.

    Dropped is what came before, what overlaps a benchmark (`Decontaminator`), and what has more
    than `max_length` tokens.

    Attributes:
        tokenizer: of the model.
        max_length: tokens of a request at most.
        options: see `encode`.
        decontaminator: of HumanEval and the benchmarks to avoid.
        overlap: the count of what overlaps a benchmark.
        counts: how many were found and dropped, and why.
        seen: what came before.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        avoid: Sequence[Path] = (),
        options: Sequence[str] = (),
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.options = options
        self.decontaminator = Decontaminator(avoid)
        self.overlap = "benchmark_overlap" if avoid else "humaneval_overlap"
        self.counts = {"found": 0, "duplicate": 0, self.overlap: 0, "too_long": 0}
        self.seen: set[tuple[str, str]] = set()

    def ids(self, request: Request) -> list[int]:
        """Encode a request; [] if it is dropped. Raises InputError as `encode`."""
        self.counts["found"] += 1
        if (turn := (request.text, request.opening)) in self.seen:
            self.counts["duplicate"] += 1
            return []
        self.seen.add(turn)
        text = request.code or request.text
        if any(self.decontaminator.overlaps(name, text) for name in {request.name, *defined(text)}):
            self.counts[self.overlap] += 1
            return []
        if len(ids := encode(self.tokenizer, request, self.options)) > self.max_length:
            self.counts["too_long"] += 1
            return []
        return ids


def code_requests(
    folders: Sequence[Path], kinds: Mapping[str, float], sieve: Sieve
) -> Iterator[tuple[Request, list[int]]]:
    """Yield (request, token ids) about the functions in folders of Python code, shuffled.

    There is one for a function at most. It is asked about in the kind that is furthest behind its
    weight, of those that suit it and that `sieve` lets pass.

    kinds: {kind: weight}.
    """
    done = dict.fromkeys(kinds, 0)
    for path in python_files(list(folders)):
        for function in functions(path):
            for kind in sorted(kinds, key=lambda kind: done[kind] / kinds[kind]):
                request = ask(function, kind)
                if request and (ids := sieve.ids(request)):
                    done[kind] += 1
                    yield request, ids
                    break


def check_sources(sources: Sequence[str]) -> None:
    """Refuse what is no source, with an InputError."""
    expected = "expected a folder of Python code, a .jsonl or .txt file, or hub:NAME"
    for source in sources:
        known = (
            source.startswith("hub:")
            or Path(source).is_dir()
            or Path(source).suffix in (".jsonl", ".txt")
        )
        require(known, f"source={source}: {expected}")


def parse_kinds(text: str) -> dict[str, float]:
    """Read 'complete=3,words' -> {'complete': 3.0, 'words': 1.0}.

    Raises InputError for unknown kinds and for weights that are not positive.
    """
    kinds = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        require(
            name in KINDS, f"kinds={text}: {name or 'an empty name'} is none of {', '.join(KINDS)}"
        )
        try:
            kinds[name] = float(weight or 1)
        except ValueError:
            kinds[name] = 0.0
        require(0 < kinds[name] < float("inf"), f"kinds={text}: {part}: expected a positive number")
    return kinds


def collect_prompts(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    max_length: int,
    options: Sequence[str] = (),
    kinds: Mapping[str, float] = COMPLETE,
    avoid: Sequence[Path] = (),
) -> tuple[list[list[int]], dict[str, int]]:
    """Collect distinct, decontaminated, shuffled (seed 0) prompts as token ids.

    Files and data sets come first, in order, then folders of code.

    Args:
        sources: folders, files and data sets.
        tokenizer: of the model.
        limit: how many prompts at most; None for all.
        max_length: tokens of a prompt at most.
        options: see `encode`.
        kinds: what functions are asked, see `code_requests`.
        avoid: further benchmarks, see `Decontaminator`.

    Returns:
        Prompts, and counts of what was found and dropped.

    Raises:
        InputError: for what is no source or can't be read, and where no prompt is left.
    """
    check_sources(sources)
    sieve = Sieve(tokenizer, max_length, avoid, options)
    given = (sieve.ids(request) for request in given_requests(sources))
    of_code = code_requests(
        [Path(source) for source in sources if Path(source).is_dir()], kinds, sieve
    )
    admitted = filter(None, chain(given, (ids for _, ids in of_code)))
    prompts = list(islice(admitted, limit))
    require(len(prompts) > 0, f"source={', '.join(sources)}: no prompt found")
    random.Random(0).shuffle(prompts)
    return prompts, sieve.counts
