"""pass@k: what is tested of an answer, and the figures over problems."""

import json
from dataclasses import replace

import pytest
import torch
from common import adapted, decoder_of, one_line_error, tiny_llama, tiny_tokenizer

from sdsat.config import InputError
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.sequence import Generation
from sdsat.evaluation import sandbox
from sdsat.evaluation.quality import completion, evaluate
from sdsat.evaluation.sweep import QualityConfig
from sdsat.tasks.datasets import humaneval_problems

PROBLEMS = humaneval_problems(3)


def test_given_solutions_pass_in_every_form_of_an_answer():
    for problem in PROBLEMS:
        body = problem["canonical_solution"]
        whole = problem["prompt"] + body
        for code in (
            completion(whole + "```\nThis works.", True),
            completion(body, True),
            completion(body + "\nprint(1/0)\n", False),
        ):
            assert sandbox.check(problem, code) == "passed"


@pytest.mark.parametrize(
    "answer",
    [
        "```python\nCODE```\nThis works.",  # the fence that the prompt has opened, once more
        "\n```python\nCODE\n```",
        "```\nCODE```",
        "```Python\nCODE",
        "Here is the function:\n\n```python\nCODE```\nIt is used so:\n```python\nprint(1)\n```",
        "Here is the function:\n```\nCODE```",
        "CODE```\nIt is used so:\n```python\nprint(1)\n```",
        "CODE",
    ],
)
def test_the_code_of_a_chat_answer(answer):
    code = "def double(x):\n    return 2 * x\n"
    assert completion(answer.replace("CODE", code), True).strip() == f"pass\n\n{code}".strip()


DRAFT = "Let me see:\n    - first\n```python\ndef double(x):\n    return x\n```\n"


@pytest.mark.parametrize(
    "answer",
    [
        DRAFT + "</think>\n\n```python\nCODE```\nIt is used so:\n```python\nprint(1)\n```",
        DRAFT + "[/THINK]Here:\n  - as asked\n```\nCODE",
        DRAFT + "<|end_of_thought|>\n```python\nCODE```",
        DRAFT
        + "So:\n```python\nCODE```",  # where the end is a special token, it is not in the text
    ],
)
def test_the_code_of_an_answer_that_thinks_first(answer):
    """What is tried out in the thought is not the answer."""
    code = "def double(x):\n    return 2 * x\n"
    assert (
        completion(answer.replace("CODE", code), True, thinks=True).strip()
        == f"pass\n\n{code}".strip()
    )
    assert completion("a thought that never ends", True, thinks=True) == ""


def with_sats():
    """A tiny model with SATs and a token for each character."""
    model = adapted(tiny_llama(torch.float32, 100, max_position_embeddings=2048), k=3)
    tokenizer = tiny_tokenizer(["?", *map(chr, range(10, 95))])
    return decoder_of(model.lm, tokenizer, sat=model.sat, adapter=model.adapter)


def scripted(monkeypatch, answers):
    """generate() gives the texts of answers[(prompt number, k, seed)]: solved or not."""
    decoder = with_sats()
    calls = []

    def generate(config):
        number = len(calls) // answers["runs"]
        calls.append(config)
        drawn = [
            replace(config.sampling, seed=seed).of_problem(PROBLEMS[number]["task_id"]).seed
            for seed in (0, 1)
        ]
        # each problem has seeds of its own
        good = answers[number][config.k, drawn.index(config.sampling.seed)]
        return Generation(
            token_ids=[1 + good, config.sampling.seed],
            text=PROBLEMS[number]["canonical_solution"] if good else "    pass\n",
            accepted_lengths=[3, 0, int(good)] if config.k else [],
        )

    monkeypatch.setattr(
        Decoder,
        "iterate_batch",
        lambda self, prompts, configs, batch_size: enumerate(map(generate, configs)),
    )
    return decoder, calls


def test_figures_and_resumption(monkeypatch, tmp_path):
    """Problem 0 is solved by all, 1 by one sample of two, 2 by none; k=3 differs from AR once."""
    answers = {
        "runs": 4,
        0: {(k, seed): True for k in (0, 3) for seed in (0, 1)},
        1: {(0, 0): True, (3, 0): True, (0, 1): False, (3, 1): False},
        2: {(0, 0): False, (3, 0): True, (0, 1): False, (3, 1): False},
    }
    config = QualityConfig(
        k_list=(3,), strategies=("two-step",), temperature=1.0, samples=2, data_limit=3
    )
    out = tmp_path / "eval.json"
    decoder, calls = scripted(monkeypatch, answers)
    real = sandbox.check
    checks = []

    def interrupted(problem, code):
        checks.append(code)
        if problem is PROBLEMS[1] or problem["task_id"] == PROBLEMS[1]["task_id"]:
            raise KeyboardInterrupt
        return real(problem, code)

    monkeypatch.setattr(sandbox, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(decoder, config, out)
    assert [p["task_id"] for p in json.loads(out.read_text())["problems"]] == [
        PROBLEMS[0]["task_id"]
    ]
    assert len(checks) == 2  # the first problem's equal completions were run once
    monkeypatch.setattr(sandbox, "check", real)
    del calls[4:]
    document = evaluate(decoder, config, out)
    assert json.loads(out.read_text()) == document
    ar, drafted = document["summary"]
    assert (ar["num_passed"], ar["pass@1"], ar["pass@2"], ar["identical"]) == (
        3,
        0.5,
        pytest.approx(2 / 3, abs=1e-4),
        6,
    )
    assert (drafted["num_passed"], drafted["pass@1"], drafted["pass@2"], drafted["identical"]) == (
        4,
        pytest.approx(4 / 6, abs=1e-4),
        1.0,
        5,
    )
    # Six answers of three loops, with 3 accepted drafts each, and one more in the four good ones.
    assert (ar["accepted_per_loop"], drafted["accepted_per_loop"]) == (None, round(22 / 18, 4))
    with one_line_error(out, "other settings (batch_size=1, not 2)"):
        evaluate(decoder, replace(config, batch_size=2), out)


def test_answers_that_the_sandbox_fails_to_test_are_in_no_figure_and_are_tested_again(
    monkeypatch, tmp_path
):
    """Problem 0 is solved by both and problem 1 by SDSAT only; at first nothing can be tested, then
    all but one answer.
    """
    answers = {"runs": 2, 0: {(0, 0): True, (3, 0): True}, 1: {(0, 0): False, (3, 0): True}}
    config = QualityConfig(k_list=(3,), strategies=("two-step",), data_limit=2)
    out = tmp_path / "eval.json"
    decoder, calls = scripted(monkeypatch, answers)
    real = sandbox.check
    monkeypatch.setattr(sandbox, "check", lambda problem, code: "sandbox error: no memory")
    with pytest.warns(UserWarning, match=r"2 problems are left out .*no memory.*eval.json"):
        rows = evaluate(decoder, config, out)["summary"]
    assert [
        (row["num_problems"], row["num_untested"], row["num_passed"], row["pass@1"]) for row in rows
    ] == [(2, 2, 0, None)] * 2
    # a comparison of tokens, which needs no test
    assert [row["identical"] for row in rows] == [
        2,
        1,
    ]

    fails = {PROBLEMS[1]["task_id"]}
    monkeypatch.setattr(
        sandbox,
        "check",
        lambda problem, code: (
            "sandbox error: x"
            if problem["task_id"] in fails and code != "    pass\n"
            else real(problem, code)
        ),
    )
    with pytest.warns(UserWarning, match="1 problems are left out"):
        rows = evaluate(decoder, config, out)["summary"]
    figures = [(row["num_untested"], row["num_passed"], row["pass@1"]) for row in rows]
    assert figures == [(1, 1, 1.0), (1, 1, 1.0)]  # without AR's failure too

    fails.clear()
    document = evaluate(decoder, config, out)
    assert [
        (row["num_untested"], row["num_passed"], row["pass@1"]) for row in document["summary"]
    ] == [(0, 1, 0.5), (0, 2, 1.0)]
    assert len(calls) == 4  # nothing was answered twice
    assert json.loads(out.read_text()) == document


def test_answers_are_the_same_at_any_batch_size_and_an_interrupt_keeps_whole_problems(
    monkeypatch, tmp_path
):
    decoder = with_sats()
    config = QualityConfig(
        k_list=(2, 3),
        strategies=("two-step",),
        temperature=1.0,
        samples=2,
        data_limit=3,
        max_new_tokens=12,
    )
    monkeypatch.setattr(sandbox, "check", lambda problem, code: f"result of {code}")
    alone = evaluate(decoder, config)
    assert all(run["identical"] for entry in alone["problems"] for run in entry["runs"])
    assert sum(run["num_loops"] for entry in alone["problems"] for run in entry["runs"])
    for size in (4, 18, 64):
        batched = replace(config, batch_size=size)
        assert evaluate(decoder, batched)["problems"] == alone["problems"]
        out = tmp_path / f"{size}.json"
        tested = []

        def interrupted(problem, code, tested=tested):
            tested.append(problem["task_id"])
            if len(set(tested)) == 3:
                raise KeyboardInterrupt
            return f"result of {code}"

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(sandbox, "check", interrupted)
            evaluate(decoder, batched, out)
        assert len(json.loads(out.read_text())["problems"]) == 2
        assert evaluate(decoder, batched, out)["problems"] == alone["problems"]


def test_what_does_not_fit_is_said_before_anything_is_answered(tmp_path):
    tokenizer = tiny_tokenizer(["?", *map(chr, range(10, 95))])
    lm = tiny_llama(torch.float32, 100, max_position_embeddings=450)  # a token for each character
    out = tmp_path / "eval.json"
    config = QualityConfig(k_list=(0,), data_limit=3, max_new_tokens=20, batch_size=2)
    with one_line_error("HumanEval/1: max_new_tokens=20: with a prompt of 506 tokens"):
        evaluate(decoder_of(lm, tokenizer), config, out)
    assert not out.exists()
    lm = tiny_llama(torch.float32, 100, max_position_embeddings=2048)
    with pytest.raises(InputError, match=r"^k=3: "):
        evaluate(decoder_of(lm, tokenizer), QualityConfig(k_list=(3,), data_limit=3), out)


def test_settings_are_checked():
    config = QualityConfig(k_list=(5, 3, 5), strategies=("auto", "auto"))
    assert [setting[:2] for setting in config.settings] == [("ar", 0), ("auto", 3), ("auto", 5)]
    config = QualityConfig(k_list=(5, 3), strategies=("lookup", "auto"))
    keys = [("ar", 0), ("lookup", 0), ("auto", 3), ("auto", 5)]
    assert [setting[:2] for setting in config.settings] == keys
    decoded = [setting.of(config.plain()) for setting in config.settings]
    assert [(c.k, c.strategy) for c in decoded] == [
        (0, "two-step"),
        (0, "lookup"),
        (3, "auto"),
        (5, "auto"),
    ]
    with one_line_error("strategy=beam: expected one of"):
        QualityConfig(strategies=("beam",))
    with one_line_error("strategy=ar: expected one of"):
        QualityConfig(strategies=("ar",))
    with one_line_error("samples=2", "expected 1"):
        QualityConfig(samples=2)
    with one_line_error("samples=0"):
        QualityConfig(samples=0)
    with one_line_error("data_limit=0"):
        QualityConfig(data_limit=0)
