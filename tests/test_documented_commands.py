"""Every command in the documents runs, as it stands there, on tiny models: only sizes are made
small, and names are filled in.
"""

import importlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from common import adapted, function, long_doc, tiny_llama, tiny_tokenizer, write
from gguf_files import KINDS, write_gguf
from programs import transformers_generate
from random_checkpoint import make_pieces, save_tokenizer
from test_docs import COMMANDS, ROOT

from sdsat.cli import main as cli
from sdsat.cli import program as running
from sdsat.models.adapter import AdapterConfig
from sdsat.models.embedded import SMOLLM2
from sdsat.models.loading import load_base

# What makes a run short. Of two equal options the last one counts.
SMALL = {
    "bench": "--data-limit 1 --max-new-tokens 3 --k-list 0,5 --dtype float32",
    "distill": (
        "--limit 8 --max-new-tokens 6 --batch-size 8 --max-prompt-tokens 4096 --dtype float32"
    ),
    "eval": "--data-limit 1 --max-new-tokens 4",
    "generate": "--max-new-tokens 8 --device cpu",
    "memory": "--dtype int8",
    "growth": "--models base:bfloat16 --threads 1 --turns 1",
    "inspect": "--data-limit 1 --max-new-tokens 6",
    "train": ("--steps 2 --eval-every 1 --held-out 2 --anchors 2 --batch-size 1 --dtype float32"),
    "verify": "--data-limit 1 --max-new-tokens 6",
    "batch_throughput": "--sizes 1,2 --prompts 2 --max-new-tokens 4 --dtype float32 --device cpu",
    "pass_cost": "--dtype float32 --device cpu --turns 2",
    "peers": "--data-limit 1 --general 1 --max-new-tokens 4",
    "soak": "--generations 20",
}
CONSTANTS = {
    "peers": {  # of the tiny adapter
        "base_of": lambda _: replace(SMOLLM2, base="base"),
        "base_dir": lambda _: Path("base"),
        "OURS": ("two-step:5", "auto", "int8 auto"),  # its base was made from no file
        "PEERS": (transformers_generate,),  # others are played in test_peers.py
    },
    "growth": {"CONTEXTS": (16, 64), "BATCHES": (1, 2), "PROMPT": 32, "READ_BYTES": 2**20},
    "pass_cost": {"COUNTS": (1, 4), "CONTEXTS": (16, 32, 64)},
    "profile_passes": {"SHAPES": ((2, 1),), "NEW_TOKENS": 12},
}
# Functions that start a process each time: the first is real, and the others have its result.
ONCE = {"peers": ("memory_of",)}
# These name something else, need what a test has not, or are what runs these tests.
ELSEWHERE = {
    "bash scripts/setup.sh": "runs before these tests",
    "bash scripts/test.sh": "runs these tests",
    "bash scripts/reference.sh": "takes over an hour",
    "bash scripts/gpu_default.sh": (
        "takes GPUs; its parts run on a stand-in for them in test_graphs.py and test_devices.py"
    ),
    "bash scripts/setup_vllm.sh": "installs gigabytes",
    "bash scripts/setup_llama.sh": "builds for ten minutes and more",
    ".venv-vllm/bin/python scripts/serve_vllm.py": (
        "takes that environment, and five minutes of load"
    ),
    "python scripts/make_prompts.py": (
        "fetches a gigabyte of packages; test_prompts.py runs it on a small corpus"
    ),
    "sdsat serve": "serves until it is ended; test_serve.py starts it",
    "python scripts/serve_check.py": "takes a minute of load",
    "python dev/measure_code.py": "reads the repository's history; test_measure_code.py runs it",
    "sdsat --install-completion": "changes the settings of a shell",
    "sdsat --show-completion": "asks which shell it runs in; test_package.py completes",
    "sdsat chat": "takes a terminal; test_chat.py has one",
    "accelerate launch": "takes GPUs",
    "torchrun": "test_train.py starts two processes",
}
# of these the model is an option, else the first argument
MODEL_OPTION = (
    "generate",
    "distill",
    "train",
)


def words_of(command):
    """(the program, its arguments), or None for a mere mention: a subcommand without what it must
    be given.
    """
    words = [word.strip("[]") for word in shlex.split(command)]
    if words[0] == "bash" and words[1].startswith("start_"):
        method = re.search(r"exec sdsat bench (\w+)", (ROOT / words[1]).read_text())[1]
        return "bench", [method, *words[2:]]
    if words[0] == "python":
        return Path(words[1]).stem, words[2:]
    if words[0] != "sdsat" or words[1:] in (
        ["bench"],
        ["export"],
        ["generate"],
        ["distill"],
        ["train"],
    ):
        return None
    if words[1] == "train" and "--out" not in words:
        return None
    return words[1], words[2:]


def is_elsewhere(command):
    return any(command.startswith(start) for start in ELSEWHERE)


def tiny(vocabulary):
    """Of sizes that the native engine takes."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return tiny_llama(
        torch.float32, vocab=vocabulary, max_position_embeddings=8192, eos_token_id=5, **sizes
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with all that the documents name, made of tiny random models."""
    root = tmp_path_factory.mktemp("documents")
    pieces = make_pieces()
    tokenizer = tiny_tokenizer(["<unk>", *map(chr, range(32, 127)), "\n"])
    published = "ainergy/CodeLlama-SDSAT_L5_7B"
    for name in (published, "runs/full", "runs/model", "base"):
        vocabulary = 32016 if name == published else 128
        lm = tiny(vocabulary)
        if name != "base":
            lm.config.sdsat = {"sat_token_id": vocabulary - 5, "k": 5}
        lm.save_pretrained(root / name)
        if vocabulary == 128:
            tokenizer.save_pretrained(root / name)
        else:
            save_tokenizer(pieces, root / name)
    stages = [f"runs/stage{number}" for number in range(1, 5)]
    for name in ("MODEL", "adapters/default", *stages, "runs/adapter", "runs/everywhere"):
        model = adapted(tiny(128), k=5)
        sample = model.adapter.config.base_sample
        everywhere = name == "runs/everywhere"
        model.adapter.config = AdapterConfig(
            "base", model.sat, 4, everywhere=everywhere, base_sample=sample
        )
        model.adapter.save(root / name)
    write_gguf(tiny(288), root / "file.gguf", KINDS.Q8_0)
    functions = "".join(function(f"f{i}", long_doc(f"number {i}")) for i in range(12))
    for name in ("path/to/python/packages", "corpus", "stdlib"):
        write(root / name, functions=functions)
    lm, _, _ = load_base(str(root / "file.gguf"), torch.bfloat16, {"": torch.device("cpu")})
    model = adapted(lm, k=5)
    sample = model.adapter.config.base_sample
    model.adapter.config = AdapterConfig("file.gguf", model.sat, 4, base_sample=sample)
    model.adapter.save(root / "adapters/file")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run(patch, "distill", ["--model", "base", "--source", "corpus", "--out", "runs/data"])
        run(patch, "bench", ["greedy", "MODEL", "cpu", "--results", "results"])
    shutil.copytree(root / "runs" / "data", root / "data" / "smollm2-135m-instruct")
    shutil.copytree(root / "results" / "MODEL", root / "results" / "OTHER")
    return root


def once(function):
    """`function` that runs at its first call only."""
    results = []

    def held(*arguments):
        if not results:
            results.append(function(*arguments))
        return results[0]

    return held


def quickly(command, **_):
    """What `subprocess.run` of a script does, in a process that begins at once."""
    _, script, *arguments = command
    with tempfile.TemporaryDirectory() as folder:
        process = processes.OwnProcess(Path(folder), run_apart, (Path(script).stem, arguments), {})
        done = process.end()
    return SimpleNamespace(returncode=done.code, stdout=done.out)


def run_apart(program, arguments):
    with pytest.MonkeyPatch.context() as patch:
        run(patch, program, arguments)


def run(patch, program, arguments):
    """As `sdsat program arguments` or `python scripts/program.py ..`, with what SMALL adds."""
    arguments = [*arguments, *SMALL.get(program, "").split()]
    if program == "train" and "full" not in arguments:
        arguments += ["--rank", "4"]  # full mode has no rank
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setattr(multiprocessing, "get_context", lambda kind: processes.context())
    patch.setattr(sys, "argv", ["sdsat", program, *arguments])
    main = cli.main
    if program in {path.stem for path in (ROOT / "scripts").glob("*.py")}:
        script = importlib.import_module(program)
        for name in ONCE.get(program, ()):
            patch.setattr(script, name, once(getattr(script, name)))
            patch.setattr(script, "subprocess", SimpleNamespace(run=quickly, PIPE=None))
        for name, value in CONSTANTS.get(program, {}).items():
            patch.setattr(script, name, value)
        patch.setattr(sys, "argv", [f"{program}.py", *arguments])
        main = lambda: running.run(script.main)  # noqa: E731
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code


def filled_in(program, arguments):
    """The arguments with names for placeholders, and with tiny models for those that must be
    fetched.
    """
    base = program in ("distill", "train")
    known = {
        "MODEL": "runs/full" if program == "export" else "base" if base else "MODEL",
        "GPUS": "cpu",
        "0,1,2,3": "cpu",
        "TEMPERATURE": "0.2",
        "PROMPT": "def f(x):",
        "FILE": "made.json",
        "FOLDER": "results/MODEL/greedy",
        "results/adapter/greedy": "results/MODEL/greedy",  # of the same weights
        "OTHER_FOLDER": "results/OTHER/greedy",
        "ainergy/CodeLlama-SDSAT_L7_13B": "ainergy/CodeLlama-SDSAT_L5_7B",
        "smollm2-135m-sdsat": "MODEL",
        "qwen2.5-coder-0.5b-sdsat": "adapters/file" if "gguf" in arguments else "MODEL",
        "qwen2.5-coder-0.5b-instruct": "base",
        "path/to/file.gguf": "file.gguf",
        "FILE.gguf": "file.gguf",
        "sdsat/adapters/smollm2-135m-sdsat": "adapters/default",
    }
    words = [known.get(word, word) for word in arguments]
    if program in MODEL_OPTION:
        return words if "--model" in words else [*words, "--model", "base" if base else "MODEL"]
    place = 1 if program == "bench" else 0
    if program not in ("doctor", "export", "growth", "report") and (
        len(words) <= place or words[place].startswith("--")
    ):
        words.insert(place, "MODEL")
    return words


def as_it_runs(command):
    """The program and those of its words that count here: options that SMALL sets anew don't."""
    program, arguments = words_of(command)
    words = filled_in(program, arguments)
    for option in SMALL.get(program, "").split()[::2]:
        while option in words:
            place = words.index(option)
            del words[place : place + 2]
    return program, *words


# Commands that are one and the same here run once.
RUNNABLE = {
    as_it_runs(command): command
    for command in sorted({command for command, _ in COMMANDS}, reverse=True)
    if not is_elsewhere(command) and words_of(command)
}


def test_what_is_left_out_is_in_the_documents():
    for start in ELSEWHERE:
        assert any(command.startswith(start) for command, _ in COMMANDS), start


@pytest.mark.usefixtures("sketches")
@pytest.mark.parametrize("command", sorted(RUNNABLE.values()))
def test_a_documented_command_runs(command, workplace, tmp_path, monkeypatch, capsys):
    program, arguments = words_of(command)
    words = filled_in(program, arguments)
    for name in workplace.iterdir():  # a copy that it may write in; models are read only
        (shutil.copytree if name.name in ("runs", "results") else os.symlink)(
            name, tmp_path / name.name
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESULTS_DIR", "made")
    made = "--out" in words and Path(words[words.index("--out") + 1])
    if not any(word.startswith("runs/") and word != str(made) for word in words):
        shutil.rmtree("runs")  # which no fresh clone has
    if made and str(made) not in words[: words.index("--out")]:
        shutil.rmtree(made, ignore_errors=True)
    began = time.time()
    run(monkeypatch, program, words)
    assert capsys.readouterr().out.strip()
    if made:
        files = [path for path in [made, *made.rglob("*")] if path.is_file()]
        assert any(path.stat().st_mtime > began - 1 for path in files)
        for path in files:
            if path.suffix == ".json":
                json.loads(path.read_text())
