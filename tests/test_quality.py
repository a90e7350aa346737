"""pass@k: the sandbox's verdicts on real problems, what is tested of an answer, and the figures over problems."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import one_line_error, tiny_llama, tiny_tokenizer

from sdsat import quality, sandbox
from sdsat.datasets import humaneval_problems
from sdsat.decode import Generation
from sdsat.model import SatModel
from sdsat.quality import QualityConfig, completion, evaluate

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
    ("body", "verdict"),
    [
        ("return None", "failed"),
        ("while True: pass", "timed out"),
        ("return len([0] * 10**9) > 0", "failed"),
        ("raise SystemExit(0)", "failed"),
        ("import os; os._exit(0)", "failed"),
        ("import socket; return bool(socket.create_connection(('127.0.0.1', 9), timeout=1))", "failed"),
        ("import os; os.system('touch /tmp/x')", "failed"),
        ("syntax error", "failed"),
    ],
)
def test_bad_answers_do_not_pass_and_do_no_harm(body, verdict):
    assert sandbox.check(PROBLEMS[0], f"    {body}\n", seconds=1.0).startswith(verdict)


def test_no_network_inside(tmp_path):
    """A server that waits outside sees nobody."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = server.getsockname()
        body = f"    import socket\n    socket.create_connection({address!r}, timeout=1)\n    return True\n"
        assert sandbox.check(PROBLEMS[0], body).startswith("failed")
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_sockets_inside_where_the_system_gives_no_namespace():
    script = (
        "import ctypes, types; ctypes.CDLL = lambda *_: types.SimpleNamespace(unshare=lambda flags: -1)\n"
        "from sdsat import sandbox; sandbox._cut_off()\n"
        "import socket, _socket, http.client, ssl\n"
        "connect = lambda: socket.create_connection(('127.0.0.1', 9))\n"
        "for make in (socket.socket, _socket.socket, ssl.SSLSocket, connect, http.client.HTTPConnection('127.0.0.1').connect):\n"
        "    try: make()\n"
        "    except (OSError, TypeError) as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    said = done.stdout.splitlines()
    assert (said.count("no network here"), len(said)) == (4, 5), done.stderr


def scripted(monkeypatch, answers):
    """generate() gives the texts of answers[(prompt number, k, seed)]: solved or not."""
    model = SatModel(tiny_llama(torch.float32), tiny_tokenizer(["?", *map(chr, range(32, 95))]), "tiny")
    calls = []

    def generate(model, prompt_ids, config):
        number = len(calls) // answers["runs"]
        calls.append(config)
        drawn = [replace(config.sampling, seed=seed).of_problem(PROBLEMS[number]["task_id"]).seed for seed in (0, 1)]
        good = answers[number][config.k, drawn.index(config.sampling.seed)]  # each problem has seeds of its own
        return Generation(
            token_ids=[1 + good, config.sampling.seed], text=PROBLEMS[number]["canonical_solution"] if good else "    pass\n"
        )

    monkeypatch.setattr(quality, "generate", generate)
    return model, calls


def test_figures_and_resumption(monkeypatch, tmp_path):
    """Problem 0 is solved by all, 1 by one sample of two, 2 by none; k=3 differs from AR once."""
    answers = {
        "runs": 4,
        0: {(k, seed): True for k in (0, 3) for seed in (0, 1)},
        1: {(0, 0): True, (3, 0): True, (0, 1): False, (3, 1): False},
        2: {(0, 0): False, (3, 0): True, (0, 1): False, (3, 1): False},
    }
    config = QualityConfig((3,), ("two-step",), temperature=1.0, samples=2, data_limit=3)
    out = tmp_path / "eval.json"
    model, calls = scripted(monkeypatch, answers)
    real, checks = sandbox.check, []

    def interrupted(problem, code):
        checks.append(code)
        if problem is PROBLEMS[1] or problem["task_id"] == PROBLEMS[1]["task_id"]:
            raise KeyboardInterrupt
        return real(problem, code)

    monkeypatch.setattr(sandbox, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, config, out)
    assert [p["task_id"] for p in json.loads(out.read_text())["problems"]] == [PROBLEMS[0]["task_id"]]
    assert len(checks) == 2  # the first problem's equal completions were run once
    monkeypatch.setattr(sandbox, "check", real)
    del calls[4:]
    document = evaluate(model, config, out)
    assert json.loads(out.read_text()) == document
    ar, drafted = document["summary"]
    assert (ar["num_passed"], ar["pass@1"], ar["pass@2"], ar["identical"]) == (3, 0.5, pytest.approx(2 / 3, abs=1e-4), 6)
    assert (drafted["num_passed"], drafted["pass@1"], drafted["pass@2"], drafted["identical"]) == (
        4,
        pytest.approx(4 / 6, abs=1e-4),
        1.0,
        5,
    )
    with one_line_error(out, "other settings"):
        evaluate(model, QualityConfig((5,), data_limit=3), out)


def test_settings_are_checked():
    assert QualityConfig((5, 3, 5), ("auto", "auto")).keys == [("ar", 0), ("auto", 3), ("auto", 5)]
    config = QualityConfig((5, 3), ("lookup", "auto"))
    assert config.keys == [("ar", 0), ("lookup", 0), ("auto", 3), ("auto", 5)]
    decoded = [config.decode(strategy, k, 0, "p", ()) for strategy, k in config.keys]
    assert [(c.k, c.strategy) for c in decoded] == [(0, "two-step"), (0, "lookup"), (3, "auto"), (5, "auto")]
    with one_line_error("strategy=beam: expected one of"):
        QualityConfig(strategies=("beam",))
    with one_line_error("samples=2", "expected 1"):
        QualityConfig(samples=2)
    with one_line_error("samples=0"):
        QualityConfig(samples=0)
    with one_line_error("data_limit=0"):
        QualityConfig(data_limit=0)
