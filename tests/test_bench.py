"""Where measured outputs end, and a worker's last words: everything it prints is in its log, and the closing line quotes it."""

import signal
import string
import subprocess
import sys

import pytest
from conftest import VOCAB, tiny_llama, tiny_tokenizer, with_adapter

from sdsat import bench
from sdsat.config import DecodeConfig, InputError
from sdsat.decode import Generation, generate
from sdsat.prompts import HUMANEVAL_STOPS, Problem

DEATHS = {
    "raise RuntimeError('CUDA out of memory')": (1, "RuntimeError: CUDA out of memory"),
    "import os; os.system('echo from native code'); os.abort()": (-6, "Fatal Python error: Aborted"),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_workers_last_words_are_in_its_log(tmp_path, death):
    code, trace = DEATHS[death]
    log = tmp_path / "worker_0+1.log"
    log.write_text("of an earlier run\n")
    script = (
        f"from pathlib import Path; from sdsat import bench; bench._log_to(Path({str(log)!r}), 'title'); print('said'); {death}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    text = log.read_text()
    assert text.startswith("of an earlier run\n") and "title\n" in text and trace in text
    assert ("from native code" in text) == (code == -6)
    line = bench._obituary("0+1", code, log)
    assert line == f"worker 0+1 (exit code {code}{', ' + trace if code > 0 else ''}; log: {log})"


def test_labels_are_distinct():
    assert bench._labels(["cpu", "0", "cpu", "0+1", "0+1", "cpu"]) == ["cpu", "0", "cpu.1", "0+1", "0+1.1", "cpu.2"]


def test_stop_strings_end_every_output_alike():
    """AR, drafts and transformers' own generate: the token that completes one is the last."""
    model = with_adapter(tiny_llama())
    free = generate(model, [1, 5, 9], DecodeConfig(0, 20)).token_ids
    last = next(i for i in range(4, 20) if len({*free[: i + 1]}) > len({*free[:i]}) and free[i - 1] not in free[: i - 1])
    pieces = [*string.ascii_letters, *string.digits, "?", "!"][:VOCAB]
    pieces[free[last - 1]], pieces[free[last]] = "\n", "#"
    model.tokenizer = tiny_tokenizer(pieces)
    config = bench.BenchConfig("x", k_list=(0, 3), max_new_tokens=20, with_generate=True)
    runs = bench.measure_problem(model, Problem("p", (1, 5, 9), stop_strings=HUMANEVAL_STOPS), config, 0)["runs"]
    assert [(run["strategy"], run["num_new_tokens"], run["finish"]) for run in runs] == [
        (strategy, last + 1, "stop_string") for strategy in ("transformers", "ar", "two-step", "auto")
    ]
    assert len({run["output_sha256"] for run in runs}) == 1


def test_of_several_turns_the_median_run_is_kept(monkeypatch):
    """They take turns, so that a slow minute of the machine hits all alike."""
    times = {"ar": [9.0, 1.0, 2.0, 3.0], "two-step": [5.0, 8.0, 7.0, 6.0]}
    measured = []

    def scripted(model, prompt, config):
        strategy = config.strategy if config.k else "ar"
        measured.append(strategy)
        return Generation([7], decode_seconds=times[strategy][measured.count(strategy) - 1])

    monkeypatch.setattr(bench, "generate", scripted)
    config = bench.BenchConfig("x", k_list=(0, 3), strategies=("two-step",), turns=4)
    runs = bench.measure_problem(with_adapter(tiny_llama()), Problem("p", (1,)), config, 0)["runs"]
    assert measured == ["ar", "two-step"] * 4
    assert [run["decode_seconds"] for run in runs] == [2.0, 6.0]  # of four the second
    with pytest.raises(InputError, match="turns=0: expected 1 or more"):
        bench.BenchConfig("x", turns=0)


@pytest.mark.parametrize(("held", "then"), [(signal.SIG_IGN, signal.SIG_IGN), (signal.default_int_handler, signal.SIG_DFL)])
def test_a_worker_ignores_interrupts_where_its_run_does(held, then):
    before = signal.signal(signal.SIGINT, held)
    try:
        bench.heed_interrupts()
        assert signal.getsignal(signal.SIGINT) == then
    finally:
        signal.signal(signal.SIGINT, before)
