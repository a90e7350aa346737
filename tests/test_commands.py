"""Whole commands, as a user types them: both start scripts, killed and resumed, and one line for
every bad input.
"""

import json
import os
import re
import resource
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import processes
import psutil
import pytest
import torch
from common import PLOTS, adapted, tiny_tokenizer
from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from sdsat.cli import main as cli
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.records import RECORD_VERSION
from sdsat.evaluation.summary import SCHEMA_VERSION
from sdsat.evaluation.sweep import BenchConfig
from sdsat.models import devices

ROOT = Path(__file__).parent.parent
RUN_KEYS = {
    "dataset",
    "strategy",
    "k",
    "num_problems",
    "num_new_tokens",
    "num_passes",
    "tokens_per_second",
    "speedup",
    "speedup_ci95",
    "acceptance_rate",
    "acceptance_by_depth",
    "accepted_per_loop",
    "mean_accepted_tokens",
    "tokens_per_pass",
    "identical_outputs",
}


SETTINGS = {
    "K_LIST": "0,2,5",
    "DATA_LIMIT": "2",
    "MAX_NEW_TOKENS": "8",
    "DTYPE": "float32",
    "OMP_NUM_THREADS": "1",
}
SHORT = {"K_LIST": "0,2", "MAX_NEW_TOKENS": "4"}  # where the figures do not matter


@pytest.fixture
def start(tiny, tmp_path):
    """Start `start_greedy.sh` with the tiny model; settings are environment variables."""

    def run(*arguments):
        command = ["bash", str(ROOT / "start_greedy.sh"), str(tiny), *arguments]
        environment = {**os.environ, **SETTINGS, "RESULTS_DIR": str(tmp_path / "results")}
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    run.results = tmp_path / "results" / "tiny-sdsat"
    return run


@pytest.fixture
def measure(command, monkeypatch, start):
    """Run what `start` runs, but in this process: (exit code, stdout, stderr)."""

    def run(method, devices="", model="TINY", **changed):
        settings = {**SETTINGS, "RESULTS_DIR": str(start.results.parent), **changed}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        return command("bench", method, model, devices)

    return run


@pytest.fixture
def begin_apart(own_process, start, tiny):
    """Begin what `start` runs in a process of its own, which can be killed."""

    def begin(method, largest_file=None, **changed):
        settings = {**SETTINGS, "RESULTS_DIR": str(start.results.parent), **changed}
        return own_process(bench_apart, method, str(tiny), largest_file, **settings)

    return begin


def bench_apart(method, model, largest_file):
    processes.fork_workers()
    os.setsid()  # a group of its own, whose interrupts it heeds
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["sdsat", "bench", method, model, "cpu"]
    cli.main()


def documents(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("worker_*.json"))]


def wait_for_problems(folder, count):
    for _ in range(2000):
        if sum(len(document["problems"]) for document in documents(folder)) >= count:
            return
        time.sleep(0.1)
    raise AssertionError("the benchmark never finished a problem")


def assert_texts(folder, may_hold_more=False):
    """Every run that a worker's document names has a line, once and in this order.

    may_hold_more: lines behind these are of the problem in hand.
    """
    for document in documents(folder):
        named = [
            (problem["task_id"], run["strategy"], run["k"], run["lookup"])
            for problem in document["problems"]
            for run in problem["runs"]
        ]
        text = (folder / f"outputs_{document['device']}.jsonl").read_text()
        lines = [json.loads(line) for line in text.split("\n")[: len(named)]]
        keys = ("task_id", "strategy", "k", "lookup")
        assert [tuple(line[key] for key in keys) for line in lines] == named
        assert may_hold_more or text.count("\n") == len(named)


def assert_measured(folder, out):
    """All that a run of SETTINGS makes and says."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["schema_version"] == SCHEMA_VERSION
    assert summary["environment"]["torch"] and summary["settings"]["seed"] == 0
    assert [(run["strategy"], run["k"], run["lookup"]) for run in summary["runs"]] == [
        ("ar", 0, 0),
        ("lookup", 0, 12),
        ("two-step", 2, 0),
        ("two-step", 5, 0),
        ("auto", 5, 0),
        ("auto", 5, 12),
    ]
    for run in summary["runs"]:
        assert run.keys() >= RUN_KEYS
        assert run["num_problems"] == run["identical_outputs"] == 2
        # whose own first draft comes before those of its SATs
        rounded = run["strategy"] == "auto"
        assert len(run["acceptance_by_depth"]) == (run["lookup"] or run["k"] + rounded)
    for plot in PLOTS:
        assert (folder / f"{plot}.png").exists()
    assert_texts(folder)
    assert "two-step" in out and str(folder) in out


def test_start_greedy(start):
    out, _ = start("cpu")
    assert_measured(start.results / "greedy", out)


def test_start_nucleus_is_that_script_but_for_the_method_and_a_temperature():
    """So that one of the two runs here: each begins two new Pythons."""
    greedy, nucleus = (
        [line for line in (ROOT / f"start_{method}.sh").read_text().splitlines() if line[0] != "#"]
        for method in ("greedy", "nucleus")
    )
    assert nucleus == [*greedy[:-1], f'{greedy[-1].replace("greedy", "nucleus")} "${{3:-1.0}}"']


@pytest.mark.usefixtures("sketches")
def test_what_is_finished_is_not_measured_again(start, measure):
    folder = start.results / "nucleus_t1.0"
    code, out, _ = measure("nucleus")
    assert code == 0
    assert_measured(folder, out)
    before = documents(folder)
    for file in (*folder.glob("*.png"), folder / "summary.json", folder / "index.html"):
        file.unlink()
    code, out, errors = measure("nucleus")
    assert code == 0
    assert "measured before" in errors or "measured before" in out
    assert documents(folder) == before
    assert_measured(folder, out)


def last_line(errors):
    """The one line that says what went wrong."""
    assert "Traceback" not in errors
    return errors.strip().splitlines()[-1]


@pytest.mark.usefixtures("sketches")
def test_interrupted_run_resumes_and_keeps_others_out_while_it_runs(begin_apart, start, measure):
    process = begin_apart("greedy", DATA_LIMIT="all")
    wait_for_problems(start.results / "greedy", 1)
    code, _, errors = measure("greedy", DATA_LIMIT="all")
    assert code == 2
    assert last_line(errors) == (
        f"error: results folder {start.results / 'greedy'}: another run is writing to it; "
        "wait for it or "
        "choose another"
    )
    os.killpg(process.pid, signal.SIGINT)
    code, _, errors = process.end()
    assert code == 130, errors
    assert "resumes" in last_line(errors)
    kept = documents(start.results / "greedy")[0]["problems"]
    assert_texts(start.results / "greedy", may_hold_more=True)
    limit = len(kept) + 2
    assert measure("greedy", DATA_LIMIT=str(limit))[0] == 0
    problems = documents(start.results / "greedy")[0]["problems"]
    assert problems[: len(kept)] == kept
    assert [problem["task_id"] for problem in problems] == [f"HumanEval/{i}" for i in range(limit)]
    assert_texts(start.results / "greedy")


def test_workers_end_with_a_killed_run(begin_apart, start):
    process = begin_apart("greedy", DATA_LIMIT="164", **SHORT)
    wait_for_problems(start.results / "greedy", 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    assert process.end().code == -signal.SIGKILL
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert gone and not alive
    assert sum(len(document["problems"]) for document in documents(start.results / "greedy")) >= 1
    assert_texts(start.results / "greedy", may_hold_more=True)


@pytest.mark.usefixtures("sketches")
def test_full_disk_is_one_line_and_loses_no_problem(begin_apart, start, measure):
    """A file may not grow beyond 8 kB: the third problem or so can't be written."""
    code, _, errors = begin_apart("greedy", 8000, DATA_LIMIT="12").end()
    file = start.results / "greedy" / "worker_cpu.json"
    assert code == 2
    assert last_line(errors) == f"error: {file}: cannot be written (File too large)"
    kept = json.loads(file.read_text())["problems"]
    assert 1 <= len(kept) < 12
    assert not list(file.parent.glob("*.part"))
    assert measure("greedy", DATA_LIMIT=str(len(kept) + 1))[0] == 0
    assert json.loads(file.read_text())["problems"][:-1] == kept


def test_a_new_users_path_as_the_readme_has_it(command, measure, tmp_path):
    """Distill, train, measure: a random Qwen2, and sizes made small."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(["<unk>", *string.printable])
    shape = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=5, **shape
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    (tmp_path / "code").mkdir()
    functions = (
        f'def f{i}(x):\n    """Function number {i}, with a docstring that is long enough."""\n'
        for i in range(60)
    )
    (tmp_path / "code" / "functions.py").write_text("".join(functions))
    readme = (ROOT / "README.md").read_text().split("## Train your own\n\n")[1].split("\n\n")[0]
    commands = [
        line.split() for line in readme.replace("MODEL", str(tmp_path / "qwen")).splitlines()
    ]
    assert [words[:2] for words in commands] == [
        ["sdsat", "distill"],
        ["sdsat", "train"],
        ["bash", "start_greedy.sh"],
    ]
    smaller = (
        ["--source", "code", "--max-new-tokens", "12"],
        ["--steps", "2", "--eval-every", "2"],
    )
    for words, options in zip(commands, smaller, strict=False):
        code, _, errors = command(*words[1:], *options)
        assert code == 0, errors
    assert {file.name for file in (tmp_path / "runs/adapter").iterdir()} >= {
        "train_log.jsonl",
        "training.png",
        "adapter_config.json",
    }
    script, model = commands[2][1:]
    assert script == "start_greedy.sh"
    code, _, errors = measure("greedy", model=str(tmp_path / model), **SHORT)
    assert code == 0, errors
    summary = json.loads((tmp_path / "results/adapter/greedy/summary.json").read_text())
    assert {run["strategy"] for run in summary["runs"]} == {"ar", "lookup", "two-step", "auto"}
    assert {run["identical_outputs"] for run in summary["runs"]} == {2}


@pytest.mark.usefixtures("sketches")
def test_two_workers_write_all_that_the_published_program_writes(measure, start):
    """Each of its outputs has a file here, as docs/reproduction.md names it; both run all."""
    code, out, errors = measure("greedy", "cpu,cpu", REPEAT="1", **SHORT)
    assert code == 0, errors
    folder = start.results / "greedy"
    text = (ROOT / "docs/reproduction.md").read_text().split("## What the published program writes")
    rows = [line for line in text[1].split("\n## ")[0].splitlines() if line.startswith("| ")][2:]
    named = [re.findall(r"`([\w<>]+\.(?:jsonl?|png|html))`", row.split("|")[2]) for row in rows]
    assert len(named) == 9 and all(named)
    for file in {file for files in named for file in files}:
        for device in ("cpu", "cpu.1"):
            assert (folder / file.replace("<device>", device)).is_file()
    both = [{p["task_id"] for p in document["problems"]} for document in documents(folder)]
    assert both == [{"HumanEval/0", "HumanEval/1"}] * 2
    assert_texts(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_workers"] == 2 and summary["runs"][0]["num_problems"] == 2
    assert "1.96 standard errors over 2 workers" in " ".join(out.split())
    before = documents(folder)
    # one more problem: each worker measures it, and nothing anew
    assert measure("greedy", "cpu,cpu", REPEAT="1", **{**SHORT, "DATA_LIMIT": "3"})[0] == 0
    for one, other in zip(before, documents(folder), strict=True):
        assert other["problems"][:2] == one["problems"] and len(other["problems"]) == 3
    assert_texts(folder)


def test_a_page_is_made_where_plotly_is(command, measure, start, monkeypatch):
    folder = start.results / "greedy"
    shutil.copytree(ROOT / "results/reference/smollm2-135m-sdsat/greedy_everyday", folder)
    monkeypatch.setattr("sdsat.evaluation.page.NEEDED", ("no_such_package",))
    code, _, errors = command("report", str(folder))
    assert code == 0 and "no page was made: it takes plotly" in errors
    assert not (folder / "index.html").exists()
    code, _, errors = command("report", str(folder), "--out", "page.html")
    assert code == 2 and last_line(errors).startswith("error: no page was made: it takes plotly")


@pytest.mark.usefixtures("sketches")
def test_dead_worker_is_named_and_the_others_finish(measure, start, quick_workers):
    def kill():
        while not quick_workers:
            time.sleep(0.01)
        quick_workers[0].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    code, _, errors = measure("greedy", "cpu,cpu", DATA_LIMIT="8", **SHORT)
    killer.join()
    assert code == 1
    assert "worker cpu" in last_line(errors) and "exit code -9" in last_line(errors)
    label = last_line(errors).split()[2]
    log = start.results / "greedy" / f"worker_{label}.log"
    assert str(log) in last_line(errors)
    survivors = documents(start.results / "greedy")
    assert sum(len(document["problems"]) for document in survivors) == 4
    summary = start.results / "greedy/summary.json"
    assert json.loads(summary.read_text())["runs"][0]["num_problems"] == 4
    assert measure("greedy", DATA_LIMIT="8", **SHORT)[0] == 0
    assert json.loads(summary.read_text())["runs"][0]["num_problems"] == 8


@pytest.fixture
def command(monkeypatch, capsys, tiny, tmp_path, quick_workers):
    """Run `sdsat ...` in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    # an unknown model is unknown at once, also where a hub is reachable
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # in this process, too

    def run(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["sdsat", *(str(tiny) if a == "TINY" else a for a in arguments)]
        )
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


BAD_INPUT = [
    (["bench", "greedy", "no/such-model"], "model no/such-model: not found"),
    (["bench", "greedy", "TINY", "7"], "GPUS=7: this machine has"),
    (["bench", "greedy", "TINY", "gpu"], "GPUS=gpu: this machine has"),
    (["bench", "greedy", "TINY", "7+8,9"], "GPUS=7+8: this machine has"),
    (
        ["train", "--data", "none", "--out", "out", "--device", "0+1"],
        "device=0+1: training takes one GPU a process",
    ),
    (["bench", "beam", "TINY"], "method=beam: expected greedy or nucleus"),
    (["bench", "nucleus", "TINY", "cpu", "0"], "temperature=0.0: expected a positive number"),
    (["bench", "nucleus", "TINY", "cpu", "--", "-1"], "temperature=-1.0: expected"),
    (["bench", "nucleus", "TINY", "cpu", "warm"], "temperature=warm: expected"),
    (["bench", "nucleus", "TINY", "cpu", "nan"], "temperature=nan: expected"),
    (["bench", "nucleus", "TINY", "cpu", "--top-p", "0"], "top_p=0.0: expected a number in (0, 1]"),
    (
        ["bench", "nucleus", "TINY", "cpu", "--top-p", "1.5"],
        "top_p=1.5: expected a number in (0, 1]",
    ),
    (
        ["bench", "greedy", "TINY", "cpu", "--k-list", "0,-1"],
        "k=-1: expected 0 (AR) or a positive number",
    ),
    (["bench", "greedy", "TINY", "cpu", "--k-list", "five"], "k_list=five: expected a number"),
    (["bench", "greedy", "TINY", "cpu", "--tree", "bush"], "tree='bush': expected"),
    (["bench", "greedy", "TINY", "cpu", "--data-limit", "0"], "data_limit=0: expected 1 or more"),
    (
        ["bench", "greedy", "TINY", "cpu", "--data-limit", "half"],
        "data_limit=half: expected a number of problems, a share",
    ),
    (
        ["bench", "greedy", "TINY", "cpu", "--dataset", "mbpp"],
        "dataset=mbpp: expected humaneval, everyday, infilling",
    ),
    (["bench", "greedy", "TINY", "cpu", "--trained-k", "5"], "trained_k=5: "),
    (
        ["bench", "greedy", "TINY", "cpu", "--dataset", "infilling"],
        "infilling needs CodeLlama's tokens",
    ),
    (
        ["bench", "greedy", "TINY", "cpu", "--max-new-tokens", "0"],
        "max_new_tokens=0: expected 1 or more",
    ),
    (["bench", "greedy", "TINY", "cpu", "--dtype", "int3"], "dtype=int3: expected"),
    (
        ["bench", "greedy", "TINY", "cpu", "--results", "a-file/x"],
        "a-file/x/tiny-sdsat/greedy: cannot be written",
    ),
    (
        ["generate", "hello", "--model", "TINY", "--max-new-tokens", "9999"],
        "max_new_tokens=9999: with a prompt of 5 tokens",
    ),
    (["generate", "hello", "--model", "TINY", "--temperature", "-2"], "temperature=-2.0: expected"),
    (
        ["generate", "hello", "--model", "TINY", "--as", "verse"],
        "--as=verse: expected chat, code or raw",
    ),
    (["generate", "", "--model", "TINY"], "prompt: empty"),
    (["generate", "caf\udce9", "--model", "TINY"], "prompt: not UTF-8 at character 3"),
    (["generate", "hello", "--model", "TINY", "--stop", "\udcff"], "stop_strings: not UTF-8"),
    (
        ["generate", "hello", "--model", "TINY", "-k", "99"],
        "k=99: expected 0 (AR) or a positive number of SATs, 94 at most",
    ),
    (
        ["generate", "hello", "--model", "TINY", "-k", "2.5"],
        "Invalid value for '-k' / '--k': Input should be a valid integer",
    ),
    (
        ["generate", "hello", "--model", "TINY", "--budget", "1"],
        "budget=1: expected a number of rows from 2 to 96",
    ),
    (
        ["generate", "hello", "--model", "TINY", "--tree", "9,9"],
        "tree=9,9 with k=5: more than 96 nodes",
    ),
    (
        ["generate", "hello", "--model", "a-file"],
        "model a-file: a file that is not GGUF; expected a model directory",
    ),
    (
        ["generate", "hello", "--model", "gguf"],
        "model gguf: a folder of GGUF files; expected one of them, as gguf/loading.gguf",
    ),
    (["bench", "greedy", "gguf", "cpu"], "model gguf: a folder of GGUF files"),
    (["verify", "gguf/loading.gguf"], "model gguf/loading.gguf: damaged or cut short"),
    (["inspect", "none.gguf"], "model none.gguf: no such file"),
    (["bench", "nucleus", "TINY", "cpu", "0.2,1.0"], "temperature=0.2,1.0: expected one number"),
    (["verify", "TINY", "--temperature", "0,-1"], "temperature=-1.0: expected 0 (greedy)"),
    (["verify", "TINY", "--k-list", "99"], "k=99: expected"),
    (["verify", "TINY", "--max-new-tokens", "0"], "max_new_tokens=0: expected 1 or more"),
    (["inspect", "TINY", "--max-new-tokens", "0"], "max_new_tokens=0: expected 1 or more"),
    (["eval", "TINY", "--dataset", "everyday"], "dataset=everyday: has no tests"),
    (["inspect", "TINY", "--dataset", "mbpp"], "dataset=mbpp: expected humaneval, everyday"),
    (
        ["train", "--data", "none", "--out", "out", "--lr", "nan"],
        "lr=nan: expected a positive number",
    ),
    (
        ["train", "--data", "none", "--out", "out", "--k", "99"],
        "k=99: expected a whole number from 1 to 16",
    ),
    (
        ["distill", "--source", "none", "--out", "out", "--model", "TINY", "--temperatures", "-1"],
        "temperature=-1.0: expected",
    ),
    (
        [
            "distill",
            "--source",
            "none",
            "--out",
            "out",
            "--model",
            "TINY",
            "--max-prompt-tokens",
            "0",
        ],
        "max_prompt_tokens=0: expected",
    ),
    (
        ["generate", "hello", "--model", "TINY", "--svg", "none/x.svg"],
        "--svg=none/x.svg: no such folder",
    ),
    (
        ["generate", "hello", "--model", "TINY", "--compare", "--svg", "none/race.svg"],
        "--svg=none/race.svg: no such folder",
    ),
    (
        ["generate", "hello", "--model", "TINY", "--compare", "--svg", "."],
        "--svg=.: cannot be written (it is a folder; expected a file or a new name)",
    ),
    (
        ["generate", "hello", "--model", "TINY", "--svg", "/dev/full"],
        "--svg=/dev/full: cannot be written (it is no regular file",
    ),
    (
        ["inspect", "TINY", "--out", "/dev/full"],
        "--out=/dev/full: cannot be written (it is no regular file; expected a file",
    ),
    (
        ["verify", "TINY", "--out", "/dev/full"],
        "--out=/dev/full: cannot be written (it is no regular file; expected a file",
    ),
    (
        ["eval", "TINY", "--out", "/dev/full"],
        "--out=/dev/full: cannot be written (it is no regular file; expected a file",
    ),
    (
        ["eval", "TINY", "--out", "."],
        "--out=.: cannot be written (it is a folder; expected a file or a new name)",
    ),
    (["verify", "TINY", "--out", "none/x.json"], "--out=none/x.json: no such folder"),
    (
        [
            "distill",
            "--source",
            str(ROOT / "sdsat"),
            "--limit",
            "2",
            "--out",
            "a-file",
            "--model",
            "TINY",
        ],
        "out=a-file: cannot be written (File exists)",
    ),
    (["export", "TINY", "--out", "a-file"], "out=a-file: exists already; choose a new directory"),
    (["generate", "hello", "--no-such-option"], "--no-such-option"),
    (["generate"], "Missing argument 'prompt'"),
    (
        ["generate", "hello", "--model", "TINY", "--sat-token-id", "one"],
        "sat_token_id=one: expected a number, or several with commas between",
    ),
    (["report", "none", "other"], "results folder none: no such folder"),
    (["report", "TINY", "--out", "no/page.html"], "--out=no/page.html: no such folder"),
    (["report", "none"], "results folder none: no such folder"),
    (["train", "--data", "none", "--out", "out"], "data=none: no such file or folder"),
    (
        ["distill", "--source", "none", "--out", "out", "--model", "TINY"],
        "source=none: expected a folder of Python code",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "settings", "expected"),
    [
        (["greedy", "", "cpu"], {}, [dict(data_limit=6)]),
        (["nucleus", "TINY", "0", "0.2"], {}, [dict(method="nucleus", temperature=0.2)]),
        (
            ["greedy", "ainergy/CodeLlama-SDSAT_L5_7B", "0,1,2,3"],
            {},
            [
                dict(
                    dataset="humaneval",
                    data_limit=Fraction(1, 2),
                    max_new_tokens=512,
                    k_list=tuple(range(14)),
                    dtype="auto",
                ),
                dict(
                    dataset="infilling",
                    data_limit=Fraction(3, 100),
                    max_new_tokens=50,
                    k_list=tuple(range(14)),
                    dtype="auto",
                ),
            ],
        ),
        (
            ["nucleus", "ainergy/CodeLlama-SDSAT_L7_13B", "0", "0.2"],
            {
                "DATASET": "infilling-psm",
                "K_LIST": "0,5",
                "TREE": "chain",
                "DATA_LIMIT": "all",
                "SAT_TOKEN_ID": "32011,32012",
                "TRAINED_K": "6",
            },
            [
                dict(
                    method="nucleus",
                    temperature=0.2,
                    dataset="infilling-psm",
                    max_new_tokens=50,
                    k_list=(0, 5),
                    dtype="auto",
                    sat_token_id=(32011, 32012),
                    trained_k=6,
                    tree="chain",
                )
            ],
        ),
    ],
    ids=["embedded", "adapter", "published", "published but otherwise"],
)
def test_what_is_measured_by_default(
    command, monkeypatch, tiny, tmp_path, arguments, settings, expected
):
    """The small run for the embedded default, the paper's settings for its checkpoints; the
    environment overrides both.
    """
    measured = []
    monkeypatch.setattr(
        "sdsat.evaluation.bench.bench", lambda config, *_: (measured.append(config) or tmp_path, [])
    )
    monkeypatch.setattr("sdsat.evaluation.report.report", lambda _: {"runs": [{"num_problems": 1}]})
    monkeypatch.setattr("sdsat.evaluation.report.rich_table", lambda _: "")
    monkeypatch.setattr("sdsat.cli.bench.write_page", lambda *_: None)
    for name in ("K_LIST", "TREE", "DTYPE", "DATASET", "DATA_LIMIT", "MAX_NEW_TOKENS", "TRAINED_K"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert command("bench", *arguments)[0] == 0
    model = {"": "smollm2-135m-sdsat", "TINY": str(tiny)}.get(arguments[1], arguments[1])
    assert measured == [BenchConfig(model, **fields) for fields in expected]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_INPUT, ids=[" ".join(a)[:60] for a, _ in BAD_INPUT]
)
def test_bad_input_is_one_line_and_exit_code_2(command, tmp_path, arguments, message):
    (tmp_path / "a-file").write_text("")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "loading.gguf").write_bytes(b"GGUF")
    code, _, errors = command(*arguments)
    lines = errors.strip().splitlines()
    assert code == 2
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "results") == [
        "a-file",
        "gguf",
    ]


def test_a_cache_that_is_whole_but_no_model_is_named(command, tmp_path, monkeypatch, tiny):
    folder = tmp_path / "cache" / "smollm2-135m-instruct"
    shutil.copytree(tiny.parent / "base", folder)
    (folder / "config.json").write_text("{}")
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / "files").write_text(json.dumps(sizes))
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path / "cache"))
    code, _, errors = command("generate", "hello", "--model", "smollm2-135m-instruct")
    assert code == 2
    assert f"cache {folder}: damaged" in errors and "delete this folder" in errors


@pytest.mark.parametrize("compare", [True, False])
def test_generate_compares_and_draws(command, tmp_path, compare):
    code, out, _ = command(
        *(
            "generate",
            "hello",
            "--model",
            "TINY",
            "-k",
            "3",
            "--dtype",
            "float32",
            "--max-new-tokens",
            "40",
        ),
        *(["--compare"] if compare else []),
        *("--svg", str(tmp_path / "x.svg")),
    )
    assert code == 0
    assert "40 tokens" in out and ("the same text" in out) == compare
    picture = (tmp_path / "x.svg").read_text()
    assert picture.startswith("<svg")
    assert ("@keyframes" in picture, "Plain decoding (AR)" in picture) == (compare, compare)


def test_generate_warns_beyond_the_trained_depth(command):
    code, _, errors = command(
        "generate",
        "hello",
        "--model",
        "TINY",
        "-k",
        "9",
        "--dtype",
        "float32",
        "--max-new-tokens",
        "5",
    )
    assert code == 0
    assert any(
        line.startswith("warning: k=9 is beyond the depth k=5") for line in errors.splitlines()
    )


def test_verify_compares_everything_and_resumes(command, tmp_path):
    audit = [
        "verify",
        "TINY",
        "--data-limit",
        "2",
        "--max-new-tokens",
        "4",
        "--temperature",
        "0,1.0",
        "--seeds",
        "0,1",
    ]
    audit += [
        "--strategies",
        "two-step,one-pass",
        "--k-list",
        "2,5",
        "--tree",
        "chain",
        "--tree",
        "2,2",
        "--out",
        str(tmp_path / "audit.json"),
    ]
    code, _, _ = command(*audit)
    document = json.loads((tmp_path / "audit.json").read_text())
    assert code == 0
    # generate; (greedy, two seeds) x strategy x k x tree
    assert len(document["summary"]) == 1 + 3 * 2 * 2 * 2
    assert all(row["identical"] == row["num_problems"] == 2 for row in document["summary"])
    document["problems"].pop()
    (tmp_path / "audit.json").write_text(json.dumps(document))
    assert command(*audit)[0] == 0
    assert len(json.loads((tmp_path / "audit.json").read_text())["problems"]) == 2


def retrained(tiny, folder, seed):
    """An adapter at `folder` like TINY, with other weights for another seed."""
    base = AutoModelForCausalLM.from_pretrained(tiny.parent / "base", dtype=torch.float64)
    made = adapted(base, k=5, seed=seed)
    made.adapter.config = replace(made.adapter.config, base_model=str(tiny.parent / "base"))
    made.adapter.save(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["verify", "eval"])
def test_another_adapter_at_the_same_place_is_another_run(command, tmp_path, tiny, name):
    adapter = retrained(tiny, tmp_path / "mine", 1)
    out = tmp_path / "out.json"
    run = [
        name,
        adapter,
        "--k-list",
        "2",
        "--strategies",
        "two-step",
        "--max-new-tokens",
        "4",
        "--dtype",
        "float32",
    ]
    run += ["--out", str(out), "--data-limit"]
    assert command(*run, "1")[0] == 0
    held = out.read_text()
    assert retrained(tiny, tmp_path / "mine", 1) == adapter  # trained again, to the same weights
    assert command(*run, "1")[0] == 0
    retrained(tiny, tmp_path / "mine", 2)
    for limit, reason in (("1", "was begun with adapter="), ("2", "holds a run of other settings")):
        code, _, errors = command(*run, limit)
        assert code == 2 and f"{out}: {reason}" in last_line(errors)
    assert out.read_text() == held


def written(folder, name, **content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_results_of_an_older_schema_or_of_other_settings_are_refused_and_kept(command, tmp_path):
    folder = Path("results/tiny-sdsat/greedy")
    file = written(folder, "worker_cpu.json", schema_version=1, problems=[])
    code, _, errors = command("bench", "greedy", "TINY", "cpu")
    assert code == 2
    expected = (
        f"schema_version 1, expected {SCHEMA_VERSION}; delete the folder or choose "
        "another "
        "RESULTS_DIR"
    )
    assert last_line(errors) == f"error: {file}: {expected}"
    assert json.loads(file.read_text()) == {"schema_version": 1, "problems": []}
    written(
        folder,
        "worker_cpu.json",
        schema_version=SCHEMA_VERSION,
        settings={"max_new_tokens": 12},
        environment={},
        problems=[],
    )
    code, _, errors = command("bench", "greedy", "TINY", "cpu", "--max-new-tokens", "13")
    assert code == 2 and "holds results for" in last_line(errors)
    for name in ("verify", "eval"):
        out = written(tmp_path, "out.json", schema_version=1, settings={}, problems=[])
        code, _, errors = command(
            name, "TINY", "--data-limit", "1", "--dtype", "float32", "--out", str(out)
        )
        assert code == 2
        assert last_line(errors) == (
            f"error: {out}: schema_version 1, expected {RECORD_VERSION}; delete it or "
            "choose "
            "another file"
        )
        with FileLock(tmp_path / ".out.json.lock"):
            code, _, errors = command(
                name, "TINY", "--data-limit", "1", "--dtype", "float32", "--out", str(out)
            )
        assert code == 2
        assert (
            last_line(errors)
            == f"error: {out}: another run is writing to it; wait for it or choose another"
        )
        assert json.loads(out.read_text()) == {"schema_version": 1, "settings": {}, "problems": []}


def test_workers_that_cannot_fit_together_are_refused_before_one_starts(
    command, tmp_path, monkeypatch
):
    monkeypatch.setattr(devices, "free_bytes", lambda device: 3 << 27)  # 0.4 GiB: enough for one
    code, _, errors = command("bench", "greedy", "TINY", "cpu,cpu", "--dtype", "float32")
    assert code == 2
    assert last_line(errors).startswith("error: GPUS=cpu: model")
    assert "free beside other workers; expected fewer workers" in last_line(errors)
    assert not list((tmp_path / "results").rglob("worker_*"))
    code, _, errors = command("bench", "greedy", "TINY", "cpu,")
    assert code == 2 and "GPUS=cpu,: one is empty" in last_line(errors)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), "CUDA out of memory."),
        (RuntimeError("[..] DefaultCPUAllocator: can't allocate\nMore"), "[..] DefaultCPU"),
        (MemoryError(), "out of memory"),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_memory_that_ran_out_is_one_line(command, monkeypatch, error, line):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(Decoder, "load", load)
    code, _, errors = command("verify", "TINY")
    assert code == 1 and errors.count("\n") == 1 and errors.startswith(f"error: {line}")


def test_eval_shows_that_completions_are_the_same_and_resumes(command, tmp_path):
    out = tmp_path / "eval.json"
    run = [
        "eval",
        "TINY",
        "--k-list",
        "2,3",
        "--strategies",
        "two-step,one-pass,auto",
        "--temperature",
        "1",
        "--samples",
        "2",
    ]
    run += ["--data-limit", "2", "--max-new-tokens", "6", "--dtype", "float32", "--out", str(out)]
    code, text, _ = command(*run)
    document = json.loads(out.read_text())
    assert code == 0
    assert "24 of SDSAT's 24 completions are AR's, token for token" in text
    keys = [("ar", 0), *((s, k) for s in ("two-step", "one-pass", "auto") for k in (2, 3))]
    assert [(row["strategy"], row["k"]) for row in document["summary"]] == keys
    assert all(
        {"pass@1", "pass@2"} <= row.keys() and row["identical"] == 4 for row in document["summary"]
    )
    document["problems"].pop()
    out.write_text(json.dumps(document))
    assert command(*run)[0] == 0
    again = json.loads(out.read_text())
    assert len(again["problems"]) == 2 and again["problems"][0] == document["problems"][0]


def test_verify_takes_several_dtypes_one_file_each(command, tmp_path, monkeypatch):
    audit = [
        "verify",
        "TINY",
        "--data-limit",
        "1",
        "--max-new-tokens",
        "6",
        "--k-list",
        "2",
        "--strategies",
        "auto",
    ]
    honest = Decoder.load
    loaded = []

    def load(*arguments, **options):
        assert not any(earlier() for earlier in loaded)  # one in memory at a time
        found = honest(*arguments, **options)
        loaded.append(weakref.ref(found.model.lm))
        return found

    monkeypatch.setattr(Decoder, "load", load)
    code, text, _ = command(
        *audit, "--dtype", "float32,int8", "--out", str(tmp_path / "audit.json")
    )
    assert code == 0 and len(loaded) == 2
    assert "100%" in text and "float32" in text and "int8" in text
    assert text.splitlines()[-1] == "2 of SDSAT's 2 outputs are AR's, token for token"
    files = sorted(file.name for file in tmp_path.glob("*.json"))
    assert files == ["audit_float32.json", "audit_int8.json"]
    for file in files:
        document = json.loads((tmp_path / file).read_text())
        assert f"audit_{document['settings']['dtype']}.json" == file and document["problems"]
    code, _, errors = command(*audit, "--dtype", "float32,int3")
    assert code == 2 and "dtype=int3: expected" in last_line(errors)


def test_verify_exits_1_on_an_unexplained_difference(command, monkeypatch):
    honest = Decoder.generate

    def wrong(decoder, prompt_ids, config, *rest):
        out = honest(decoder, prompt_ids, config, *rest)
        if config.k:
            out.token_ids[3] = (out.token_ids[3] + 1) % 64
        return out

    monkeypatch.setattr(Decoder, "generate", wrong)
    code, out, _ = command(
        "verify", "TINY", "--data-limit", "1", "--max-new-tokens", "8", "--k-list", "2"
    )
    assert code == 1
    assert "False" in out and "0/1" in out
    lines = [
        line
        for line in out.splitlines()
        if line.startswith("HumanEval/0, float32, temperature 0.0, two-step k=2 chain: token 3")
    ]
    assert len(lines) == 1 and lines[0].endswith("more than rounding explains")


def test_damaged_adapter_is_one_line(command, tmp_path, tiny):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "adapter_config.json").write_text((tiny / "adapter_config.json").read_text())
    save_file({}, folder / "adapter_model.safetensors")
    code, _, errors = command("generate", "hello", "--model", str(folder))
    assert code == 2
    assert len(errors.strip().splitlines()) == 1 and f"adapter {folder}" in errors
