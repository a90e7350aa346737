"""What a run is known by: the code, the base and the adapter that it measured."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import adapted, one_line_error, tiny_llama, with_adapter
from safetensors.torch import load_file, save_file

from sdsat import environment
from sdsat.config import InputError, SamplingConfig
from sdsat.evaluation import bench, records
from sdsat.evaluation import workers as workers_module
from sdsat.evaluation.records import identity
from sdsat.evaluation.summary import SCHEMA_VERSION
from sdsat.evaluation.sweep import BenchConfig
from sdsat.files import write_json
from sdsat.resume import Place
from sdsat.tasks.datasets import Task


@pytest.fixture
def adapter(tiny, tmp_path):
    """A copy of the tiny adapter and its base."""
    shutil.copytree(tiny.parent, tmp_path / "copy")
    config = tmp_path / "copy" / tiny.name / "adapter_config.json"
    config.write_text(
        json.dumps(
            {**json.loads(config.read_text()), "base_model": str(tmp_path / "copy" / "base")}
        )
    )
    return tmp_path / "copy" / tiny.name


def one_bit_more(file):
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, file)


def test_a_run_is_known_by_every_bit_of_code_base_and_adapter(adapter, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # unknown at once
    first = identity(str(adapter))
    assert all(isinstance(value, str) for value in first.values())
    (adapter.parent / "base" / "training.png").write_text("no part of the model")
    assert identity(str(adapter)) == first
    for part, file in (
        ("adapter", adapter / "adapter_model.safetensors"),
        ("base", adapter.parent / "base/model.safetensors"),
    ):
        one_bit_more(file)
        changed = identity(str(adapter))
        assert {key for key in first if changed[key] != first[key]} == {part}
        first = changed
    for part, file in (
        ("adapter", adapter / "adapter_config.json"),
        ("base", adapter.parent / "base/generation_config.json"),
    ):
        file.write_text(file.read_text() + "\n")
        changed = identity(str(adapter))
        assert {key for key in first if changed[key] != first[key]} == {part}
        first = changed
    package = Path(environment.__file__).parent
    shutil.copytree(package, tmp_path / "sdsat", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "sdsat" / "environment.py"))
    assert identity(str(adapter)) == first  # wherever it is installed
    native = "engines/native"
    for name in (f"{native}/interface.cpp", f"{native}/attention.h", "decoding/loop.py"):
        (tmp_path / "sdsat" / name).write_text((tmp_path / "sdsat" / name).read_text() + "\n")
        changed = identity(str(adapter))
        assert {key for key in first if changed[key] != first[key]} == {"code"}
        first = changed
    with one_line_error("model no/such-model: not found"):
        identity("no/such-model")


def test_a_model_that_was_never_in_files_is_known_by_its_tensors():
    one, same, other = (adapted(tiny_llama(torch.bfloat16, seed=seed)) for seed in (0, 0, 1))
    hashes = [identity("somewhere", model)["base"] for model in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_commit_is_named_only_where_it_holds_these_sources(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "sdsat"
    package.mkdir(parents=True)
    (package / "environment.py").write_text("x = 1\n")
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))

    def git(*arguments):
        command = [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b.c",
            *arguments,
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert environment.commit() is None  # no repository
    git("init")
    (tmp_path / ".gitignore").write_text("site-packages/\n")
    git("add", ".gitignore")
    git("commit", "-m", "another project's")
    assert environment.commit() is None  # installed beside a project that is not this one
    git("add", "-f", str(package))
    git("commit", "-m", "its own")
    assert environment.commit() == git("rev-parse", "HEAD")
    # A file that was only touched is no reason to write into the repository.
    os.utime(package / "environment.py", (0, 0))
    index = (tmp_path / ".git" / "index").read_bytes()
    assert environment.commit() == git("rev-parse", "HEAD")
    assert (tmp_path / ".git" / "index").read_bytes() == index
    (package / "environment.py").write_text("x = 2\n")
    assert environment.commit() is None


def test_what_an_older_version_did_not_note_is_not_taken_for_the_same(tmp_path):
    place = Place.file(tmp_path / "out.json", "--out")
    with one_line_error(
        f"{tmp_path}/out.json: was begun with code=None, now it is a; delete it or choose another"
    ):
        place.check_same({"torch": "2"}, {"torch": "2", "code": "a"})
    place.check_same({"code": "a", "commit": "b"}, {"code": "a", "commit": None})


def resumed(out, new):
    """What a script that begins now finds."""
    with records.resumed(out, new) as document:
        return document


def test_a_script_resumes_only_its_own_record_of_the_same_run(tmp_path):
    new = {"environment": {"code": "a", "script": "s"}, "settings": {"n": 1}, "runs": []}
    out = tmp_path / "new" / "out.json"
    assert resumed(out, new) == new
    write_json(out, {**new, "runs": [1]})
    assert resumed(out, new)["runs"] == [1]
    for part, key in (("environment", "code"), ("environment", "script"), ("settings", "n")):
        with one_line_error(f"{out}: was begun with {key}="):
            resumed(out, {**new, part: {**new[part], key: "other"}})
    for content in ([], {"settings": {}}):
        write_json(out, content)
        with one_line_error(f"{out}: not a record of this script"):
            resumed(out, new)
    with one_line_error("--out=/dev/full: cannot be written (it is no regular file"):
        resumed(Path("/dev/full"), new)


def test_one_run_at_a_time_writes_to_a_place(tmp_path):
    """A script's record, and a folder of several processes, of which the first holds the lock."""
    new = {"environment": {}, "settings": {}}
    out = tmp_path / "out.json"
    with records.resumed(out, new), one_line_error(f"{out}: another run is writing to it"):
        resumed(out, new)
    assert resumed(out, new) == new  # the lock is gone with its run
    waited = []

    class Processes:
        def __init__(self, first):
            self.is_main_process = first

        def wait_for_everyone(self):
            waited.append(self.is_main_process)

    place = Place.folder(tmp_path / "folder", "out=folder")
    with place.held(Processes(True)), place.held(Processes(False)):
        assert waited == [True, False]
        with (
            one_line_error("out=folder: another run is writing to it"),
            place.held(Processes(True)),
        ):
            pass


@pytest.mark.parametrize(
    "damage",
    [
        {"problems": None},
        {"problems": "x"},
        {"problems": [3]},
        {"problems": [{"task_id": "a"}]},
        {"problems": [{"runs": []}]},
        {"environment": None},
        {"settings": 3},
        {"schema_version": None},
    ],
    ids=str,
)
def test_a_damaged_record_is_one_line_and_stays(tmp_path, damage):
    model = with_adapter(tiny_llama(), k=3)
    config = SamplingConfig()
    out = tmp_path / "out.json"
    with records.open_record(model, config, out, "runs") as document:
        write_json(out, document)
    with records.open_record(model, config, out, "runs") as again:
        assert again == document
    write_json(out, document | damage)
    held = out.read_text()
    with (
        one_line_error(out, "not a whole record of this command"),
        records.open_record(model, config, out, "runs"),
    ):
        pass
    assert out.read_text() == held


def test_a_finished_benchmark_of_other_weights_or_code_is_not_taken_for_this_one(
    adapter, tmp_path, monkeypatch
):
    """Without a worker: also where all problems were measured before."""
    config = BenchConfig(str(adapter), k_list=(2,), strategies=("two-step",), data_limit=1)
    folder = tmp_path / config.folder
    folder.mkdir(parents=True)
    held = identity(str(adapter))

    def write(**changes):
        head = {
            "schema_version": SCHEMA_VERSION,
            "device": "cpu",
            "environment": {**held, **changes},
        }
        write_json(
            folder / "worker_cpu.json",
            {**head, "settings": records.recorded_settings(config), "problems": [done]},
        )

    done = {"task_id": "HumanEval/0", "runs": []}
    write()
    assert bench.bench(config, ["cpu"], tmp_path) == (folder, [])
    for key in held:
        write(**{key: "other"})
        with one_line_error(f"results folder {folder}: was begun with {key}=other"):
            bench.bench(config, ["cpu"], tmp_path)
    write()
    one_bit_more(adapter / "adapter_model.safetensors")
    with one_line_error(f"results folder {folder}: was begun with adapter={held['adapter']}"):
        bench.bench(config, ["cpu"], tmp_path)


class Pipe:
    """A worker as its parent sees it, without a process."""

    def __init__(self, said, code):
        self.said = list(said)
        self.exitcode = code

    def recv(self):
        if not self.said:
            raise EOFError
        return self.said.pop(0)

    def close(self):
        pass

    start = join = terminate = close


@pytest.mark.parametrize(
    ("workers", "dead"),
    [
        ([([("error", "full")], 2), ([("problem", 1), ("problem", 2)], 0)], ["worker cpu (full)"]),
        (
            [([("problem", 1)], -9), ([("problem", 2), ("error", "full")], 2)],
            ["exit code -9", "worker cpu.1 (full)"],
        ),
        ([([("error", "full")], 2), ([("error", "full")], 2)], None),
        ([([("problem", 1)], 0), ([("problem", 2)], 0)], []),
    ],
    ids=["one refuses", "one dies, one refuses", "all refuse", "none"],
)
def test_a_worker_that_cannot_go_on_does_not_end_the_others(tmp_path, monkeypatch, workers, dead):
    pipes = [Pipe(*worker) for worker in workers]
    waiting = iter(pipes)
    seen = []

    class Context:
        def Pipe(self, duplex):
            self.last = next(waiting)
            return self.last, self.last

        def Process(self, **_):
            return self.last

    monkeypatch.setattr(workers_module.multiprocessing, "get_context", lambda kind: Context())
    monkeypatch.setattr(workers_module, "wait", lambda pipes: pipes)
    monkeypatch.setattr(workers_module, "Connection", Pipe)
    config = replace(BenchConfig("x"), data_limit=2)
    arguments = (
        config,
        ["cpu", "cpu"],
        [[Task("a", "a")], [Task("b", "b")]],
        tmp_path,
        seen.append,
    )
    if dead is None:
        with pytest.raises(InputError, match="full"):
            workers_module.run_workers(*arguments)
    else:
        found = workers_module.run_workers(*arguments)
        assert len(found) == len(dead) and all(
            part in line for part, line in zip(dead, found, strict=True)
        )
    assert sorted(seen) == sorted(
        content for said, _ in workers for kind, content in said if kind == "problem"
    )
