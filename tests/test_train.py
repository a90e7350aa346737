"""The training loop: it learns, resumes exactly, and does not depend on how a step is split."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import one_line_error, random_sequences, tiny_llama

from sdsat.data import Sequence
from sdsat.loss import sat_loss
from sdsat.model import SatModel
from sdsat.train import TrainConfig, train


def lines_of(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in open(folder / "train_log.jsonl")]


def train_tiny(folder, **changed):
    settings = dict(steps=4, k=3, rank=2, anchors=4, eval_every=2, held_out=2, warmup=1, lr=1e-2)
    model = SatModel(tiny_llama(torch.float32), None, "tiny")
    return train(model, random_sequences([9, 13, 6, 11, 8, 10]), folder, TrainConfig(**{**settings, **changed}))


def test_killed_training_resumes_exactly(tmp_path, monkeypatch):
    whole = train_tiny(tmp_path / "whole")
    steps = []

    def killed(*arguments):
        steps.append(1)
        if len(steps) == 4:  # after the checkpoint of step 2, in step 4
            raise KeyboardInterrupt
        return sat_loss(*arguments)

    monkeypatch.setattr("sdsat.train.sat_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "killed")
    monkeypatch.undo()
    resumed = train_tiny(tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")
    saved = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert saved[0] == saved[1]


def test_a_step_does_not_depend_on_how_it_is_split(tmp_path):
    """One micro-batch of four sequences, two of two, and four of one."""
    whole = train_tiny(tmp_path / "4", batch_size=4)
    for size in (2, 1):
        split = train_tiny(tmp_path / str(size), batch_size=size, accumulate=4 // size)
        for a, b in zip(whole.parameters(), split.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path):
    """Two real processes, in float32: only the order of sums differs."""
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nfrom test_train import train_tiny\n"
        f"train_tiny(Path({str(tmp_path / 'two')!r}), batch_size=2)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    one = train_tiny(tmp_path / "one", batch_size=4).state_dict()
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)["adapter"]
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    assert lines_of(tmp_path / "two")[-1]["sat_predictions"] == lines_of(tmp_path / "one")[-1]["sat_predictions"]


def test_training_learns_what_repeats(tmp_path):
    model = SatModel(tiny_llama(torch.float32), None, "tiny")
    data = [Sequence(torch.arange(2, 26) % 6 + 2, 2)] * 8
    train(model, data, tmp_path, TrainConfig(60, k=3, rank=4, anchors=8, eval_every=60, held_out=2, warmup=5, lr=3e-2))
    assert lines_of(tmp_path)[-1]["accepted_per_loop"] > 2.5


def test_init_starts_from_another_adapter(tmp_path):
    first = train_tiny(tmp_path / "first")
    second = train_tiny(tmp_path / "second", init=str(tmp_path / "first"), lr=1e-12, steps=1)
    for old, new in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(new, old.bfloat16().float(), rtol=0, atol=1e-6)
    with one_line_error(f"init={tmp_path / 'first'}", "rank is 2, expected 3"):
        train_tiny(tmp_path / "third", init=str(tmp_path / "first"), rank=3)


def test_other_settings_in_the_folder_are_refused(tmp_path):
    train_tiny(tmp_path)
    with one_line_error(tmp_path, "other settings"):
        train_tiny(tmp_path, lr=0.5, steps=6)
    with one_line_error("steps=4", "has done 4"):
        train_tiny(tmp_path)
