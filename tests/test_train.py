"""The training loop: it learns, resumes exactly, and does not depend on how a step is split."""

import json
import os
import resource
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from common import VOCAB, one_line_error, random_sequences, tiny_llama, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sdsat.cli import main as cli
from sdsat.config import DecodeConfig, SatConfig, TrainConfig
from sdsat.decoding.decoder import Decoder
from sdsat.models.adapter import read_config
from sdsat.models.compact import compacted, restored
from sdsat.models.loading import load
from sdsat.models.sat_model import SatModel
from sdsat.training import loop as training
from sdsat.training import loss, modes
from sdsat.training.loop import train
from sdsat.training.shards import TrainingExample


def lines_of(folder):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in open(folder / "train_log.jsonl")
    ]


def train_tiny(folder, dtype=torch.float32, **changed):
    """Trains a tiny model; returns the float32 weights of its last checkpoint."""
    settings = dict(steps=4, k=3, anchors=4, eval_every=2, held_out=2, warmup=1, lr=1e-2)
    if changed.get("mode") != "full":
        settings |= {"rank": 2}
    if changed.get("mode", "adapter") == "adapter":
        settings |= {"head": 8}
    model = SatModel(tiny_llama(dtype), None, "tiny")
    train(
        model,
        random_sequences([9, 13, 6, 11, 8, 10]),
        folder,
        TrainConfig(**{**settings, **changed}),
    )
    return last_weights(folder)


def last_weights(folder):
    (checkpoint,) = folder.glob("checkpoint_*")
    if (checkpoint / "state.pt").exists():
        return torch.load(checkpoint / "state.pt", weights_only=True)["adapter"]
    return load_file(checkpoint / "model.safetensors")


def assert_close(one, two, **tolerance):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, **tolerance)


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """Half of such a short run would be drawing; test_commands.py has a picture drawn."""
    monkeypatch.setattr(training, "plot_training", lambda log, path: path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """mode -> (folder, weights) of a run that nothing interrupted."""
    runs = {}

    def run(mode):
        if mode not in runs:
            folder = tmp_path_factory.mktemp("whole")
            runs[mode] = folder, train_tiny(folder, mode=mode)
        return runs[mode]

    return run


MODES = pytest.mark.parametrize("mode", ["adapter", "everywhere", "full"])
FILES = {
    "adapter": "adapter_model.safetensors",
    "everywhere": "adapter_model.safetensors",
    "full": "model.safetensors",
}


@MODES
def test_killed_training_resumes_exactly(tmp_path, monkeypatch, whole, mode):
    folder, weights = whole(mode)
    steps = []
    name = "sat_loss" if mode == "adapter" else "joint_loss"

    def killed(*arguments):
        steps.append(1)
        if len(steps) == 4:  # after the checkpoint of step 2, in step 4
            raise KeyboardInterrupt
        return getattr(loss, name)(*arguments)

    monkeypatch.setattr(f"sdsat.training.modes.{name}", killed)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "killed", mode=mode)
    monkeypatch.undo()
    (tmp_path / "killed" / "checkpoint_4").mkdir()  # a checkpoint that was being written
    assert_close(weights, train_tiny(tmp_path / "killed", mode=mode), rtol=0, atol=0)
    assert lines_of(tmp_path / "killed") == lines_of(folder)
    assert (tmp_path / "killed" / FILES[mode]).read_bytes() == (folder / FILES[mode]).read_bytes()


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    train_tiny(tmp_path / "run", steps=2)
    (file,) = tmp_path.glob("run/checkpoint_*/state.pt")
    saved = torch.load(file)
    del saved["adapter"]["head.copies"]
    torch.save(saved, file)
    (tmp_path / "run" / "adapter_config.json").unlink()
    with one_line_error(f"out={tmp_path / 'run'}: checkpoint_2", "head.copies", "--init"):
        train_tiny(tmp_path / "run", steps=2)


@MODES
def test_a_step_does_not_depend_on_how_it_is_split(tmp_path, mode):
    """One micro-batch of four sequences, two of two, and four of one."""
    whole = train_tiny(tmp_path / "4", batch_size=4, mode=mode)
    for size in (2, 1):
        split = train_tiny(tmp_path / str(size), batch_size=size, accumulate=4 // size, mode=mode)
        assert_close(whole, split, rtol=1e-3, atol=1e-5)


@pytest.fixture
def two_processes(own_process):
    """Call a function in two processes of one run, as torchrun does; returns their exit codes."""

    def run(function, *arguments):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        world = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        world |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        ranks = [
            own_process(function, *arguments, RANK=rank, LOCAL_RANK=rank, **world)
            for rank in ("0", "1")
        ]
        return [process.end() for process in ranks]

    return run


def train_two_at_once(folder, mode):
    train_tiny(folder, batch_size=2, mode=mode)


@pytest.mark.parametrize("mode", ["adapter", "full"])  # everywhere averages as adapter does
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path, two_processes, mode):
    """Two real processes, in float32: only the order of sums differs."""
    for code, _, errors in two_processes(train_two_at_once, tmp_path / "two", mode):
        assert code == 0, errors
    one = train_tiny(tmp_path / "one", batch_size=4, mode=mode)
    assert_close(one, last_weights(tmp_path / "two"), rtol=1e-3, atol=1e-5)
    assert (
        lines_of(tmp_path / "two")[-1]["sat_predictions"]
        == lines_of(tmp_path / "one")[-1]["sat_predictions"]
    )


def train_sharded(folder, kill_at=None):
    """Full mode under scripts/fsdp.yaml, in one of two CPU processes; accelerate itself shards on
    accelerators only.
    """
    for key, value in yaml.safe_load(
        (Path(__file__).parent.parent / "scripts" / "fsdp.yaml").read_text()
    )["fsdp_config"].items():
        os.environ[key.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    Accelerator.distributed_type = property(lambda self: DistributedType.FSDP)
    AcceleratorState.is_fsdp2 = property(lambda self: True)
    plugin = FullyShardedDataParallelPlugin()
    calls = []
    joint_loss = loss.joint_loss

    def accelerator(cpu):
        made = Accelerator(cpu=cpu)
        made.state._shared_state["fsdp_plugin"] = plugin
        return made

    def killed(*arguments):
        calls.append(1)
        if len(calls) == kill_at:
            os._exit(9)
        return joint_loss(*arguments)

    training.Accelerator = accelerator
    modes.joint_loss = killed
    settings = TrainConfig(
        4, k=3, anchors=4, batch_size=2, eval_every=2, held_out=2, warmup=1, lr=1e-2, mode="full"
    )
    training.train(
        SatModel(tiny_llama(torch.float32), None, "tiny"),
        random_sequences([9, 13, 6, 11, 8, 10]),
        folder,
        settings,
    )


def test_sharded_full_mode_equals_one_process_and_resumes(tmp_path, two_processes):
    def codes(name, kill_at):
        ended = two_processes(train_sharded, tmp_path / name, kill_at)
        return [process.code for process in ended]

    assert codes("sharded", None) == [0, 0]
    assert 0 not in codes("killed", 4)  # after the checkpoint of step 2, in step 4
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint_*")] == ["checkpoint_2"]
    assert codes("killed", None) == [0, 0]
    train_tiny(tmp_path / "one", batch_size=4, mode="full")
    sharded, killed, one = (
        load_file(tmp_path / name / "model.safetensors") for name in ("sharded", "killed", "one")
    )
    assert_close(one, sharded, rtol=1e-2, atol=1e-3)  # files in bfloat16
    assert_close(sharded, killed, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_full_mode_makes_an_ordinary_checkpoint(tmp_path, tied):
    """It loads, drafts, and decodes what AR decodes; the SAT is a new last token."""
    lm = tiny_llama(torch.float32, tie_word_embeddings=tied)
    tokenizer = tiny_tokenizer([f"<{i}>" for i in range(VOCAB)])
    data = [TrainingExample(torch.arange(2, 26) % 6 + 2, 0)] * 8
    config = TrainConfig(
        60,
        k=3,
        anchors=8,
        eval_every=60,
        held_out=2,
        warmup=5,
        lr=1e-2,
        mode="full",
        checkpointing=True,
    )
    train(SatModel(lm, tokenizer, "tiny"), data, tmp_path, config)
    assert lines_of(tmp_path)[-1]["accepted_per_loop"] > 2.5
    model = load(str(tmp_path), "float32", "cpu")
    assert model.sat == SatConfig(VOCAB, 3)
    assert model.vocabulary == VOCAB + 1
    prompt = (torch.arange(10) % 6 + 2).tolist()
    decoder = Decoder(model)
    ar, drafted = (decoder.generate(prompt, DecodeConfig(k, 24)) for k in (0, 3))
    assert drafted.token_ids == ar.token_ids
    assert drafted.accepted_per_loop > 1.5
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path).config.sdsat["training"]["config"]["mode"]
        == "full"
    )


def test_the_first_stage_trains_the_sat_alone(tmp_path):
    before = tiny_llama(torch.float32).state_dict()
    after = train_tiny(tmp_path, mode="full", embedding_steps=4, standard=0.5)
    for name, tensor in before.items():
        # the embedding has one row more
        trained = after[name][: len(tensor)] if name in after else tensor
        assert torch.equal(trained, tensor), name
    embedding = after["model.embed_tokens.weight"]
    assert (embedding[VOCAB] - embedding[:VOCAB].mean(0)).abs().max() > 1e-3


def test_training_learns_what_repeats(tmp_path):
    model = SatModel(tiny_llama(torch.float32), None, "tiny")
    data = [TrainingExample(torch.arange(2, 26) % 6 + 2, 0)] * 8
    train(
        model,
        data,
        tmp_path,
        TrainConfig(
            60, k=3, rank=4, head=8, anchors=8, eval_every=60, held_out=2, warmup=5, lr=3e-2
        ),
    )
    assert lines_of(tmp_path)[-1]["accepted_per_loop"] > 2.5


def test_init_starts_from_another_adapter(tmp_path):
    first = train_tiny(tmp_path / "first")
    second = train_tiny(tmp_path / "second", init=str(tmp_path / "first"), lr=1e-12, steps=1)
    held = restored(compacted(first))
    assert_close({name: held[name].float() for name in first}, second, rtol=0, atol=1e-6)
    with one_line_error(f"init={tmp_path / 'first'}", "rank is 2, expected 3"):
        train_tiny(tmp_path / "third", init=str(tmp_path / "first"), rank=3)
    with one_line_error(f"init={tmp_path / 'first'}", "head is 8", "0 or 4"):
        train_tiny(tmp_path / "third", init=str(tmp_path / "first"), head=4)
    train_tiny(tmp_path / "headless", head=0)
    added = train_tiny(tmp_path / "added", init=str(tmp_path / "headless"), lr=1e-12, steps=1)
    assert added["head.outer"].abs().max() < 1e-9  # a new head, which changes nothing yet


def test_everywhere_starts_from_a_gated_adapter_without_its_head(tmp_path):
    first = train_tiny(tmp_path / "first")
    second = train_tiny(
        tmp_path / "second", mode="everywhere", init=str(tmp_path / "first"), lr=1e-12, steps=1
    )
    held = restored(compacted(first))
    assert_close({name: held[name].float() for name in second}, second, rtol=0, atol=1e-6)
    left_out = set(first) - set(second)
    assert left_out == {name for name in first if name.startswith("head.")} and left_out
    assert (
        read_config(tmp_path / "second").everywhere
        and not read_config(tmp_path / "first").everywhere
    )


@pytest.mark.parametrize(("soft", "decay", "standard"), [(0.0, 1.0, 1.0), (0.3, 0.7, 0.5)])
def test_everywhere_learns_as_merged_weights_would(soft, decay, standard):
    """Loss and gradients against full mode's own pass through W + B A, with the SAT as one more row
    of the embedding.
    """
    config = TrainConfig(mode="everywhere", k=3, rank=2, soft=soft, decay=decay, standard=standard)
    lm = tiny_llama()
    mode = modes.EverywhereMode(SatModel(lm, None, "tiny"), config, Accelerator(cpu=True), [])
    adapter = mode.adapter.double()
    for parameter in adapter.up.values():
        torch.nn.init.normal_(parameter, std=0.3)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    batch = loss.sat_batch(random_sequences([9, 13]), 3, 4, 0.8, generators)
    value = mode.loss(batch)
    got = torch.autograd.grad(value, tuple(adapter.parameters()))
    adapter.detach()
    weights = {name: parameter.detach() for name, parameter in tiny_llama().named_parameters()}
    embedding = weights.pop("model.embed_tokens.weight")
    weights["lm_head.weight"] = torch.cat([weights["lm_head.weight"], torch.zeros(1, 32).double()])
    weights["model.embed_tokens.weight"] = torch.cat([embedding, adapter.sat_embedding[None]])
    for key, down in adapter.down.items():
        name = key.replace("/", ".") + ".weight"
        weights[name] = weights[name] + adapter.up[key] @ down

    class Merged(torch.nn.Module):
        config = lm.config

        def forward(self, **inputs):
            out = torch.func.functional_call(tiny_llama(vocab=VOCAB + 1), weights, kwargs=inputs)
            out.logits = out.logits[..., :VOCAB]  # what the adapter's pass has
            return out

    sats, plain = loss.joint_loss(Merged(), VOCAB, batch, soft, decay)
    expected = sats + standard * plain
    torch.testing.assert_close(value, expected)
    for one, two in zip(
        got, torch.autograd.grad(expected, tuple(adapter.parameters())), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def run_tiny(folder, data=None, lm=None, name="tiny", **changed):
    """Two steps of adapter mode, on the given data and base."""
    settings = dict(
        steps=2, k=3, rank=2, head=0, anchors=4, eval_every=2, held_out=2, warmup=1, lr=1e-2
    )
    model = SatModel(tiny_llama(torch.float32) if lm is None else lm, None, name)
    train(
        model,
        data or random_sequences([9, 13, 6, 11]),
        folder,
        TrainConfig(**{**settings, **changed}),
    )


def other_tokens(number, place=-1):
    """The data of `run_tiny` with one token changed: sizes are the same."""
    data = random_sequences([9, 13, 6, 11])
    data[number].ids[place] ^= 1
    return data


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(lr=0.5, steps=6), "lr=0.01"),
        (dict(data=other_tokens(3)), "data_sha256="),
        (dict(data=other_tokens(0)), "data_sha256="),  # a held-out answer
        (dict(data=other_tokens(2, 0)), "data_sha256="),  # a prompt
        (dict(data=[random_sequences([9, 13, 6, 11])[i] for i in (0, 1, 3, 2)]), "data_sha256="),
        (dict(lm=tiny_llama(torch.float32, seed=3)), "base_sha256="),
    ],
    ids=["settings", "an answer", "held out", "a prompt", "order", "base"],
)
def test_another_run_in_the_folder_is_refused(tmp_path, change, named):
    run_tiny(tmp_path)
    held = {
        file: file.read_bytes()
        for file in tmp_path.rglob("*")
        if file.is_file() and file.name != ".lock"
    }
    if "lm" in change:  # the same base but for one number that the adapter's sample does not hold
        change["lm"].load_state_dict(tiny_llama(torch.float32).state_dict())
        change["lm"].model.norm.weight.data[-1] += 1
    with one_line_error(f"out={tmp_path}: was begun with {named}", "choose another"):
        run_tiny(tmp_path, **{"steps": 4, **change})
    assert {file: file.read_bytes() for file in held} == held
    run_tiny(tmp_path, steps=4)
    with one_line_error("steps=2", "has done 4"):
        run_tiny(tmp_path)


def test_another_dtype_is_refused(tmp_path):
    """The base is a folder, whose files are the same."""
    tiny_llama(torch.float32).save_pretrained(tmp_path / "base")
    run_tiny(tmp_path / "out", name=str(tmp_path / "base"))
    with one_line_error(f"out={tmp_path / 'out'}", "dtype=float32, now it is bfloat16"):
        run_tiny(
            tmp_path / "out", lm=tiny_llama(torch.bfloat16), name=str(tmp_path / "base"), steps=4
        )


def test_another_init_of_the_same_name_is_refused(tmp_path):
    run_tiny(tmp_path / "init")
    run_tiny(tmp_path / "out", init=str(tmp_path / "init"))
    (tmp_path / "init").rename(tmp_path / "before")
    run_tiny(tmp_path / "init", seed=1)
    with one_line_error(f"out={tmp_path / 'out'}: was begun with init_sha256="):
        run_tiny(tmp_path / "out", init=str(tmp_path / "init"), steps=4)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "checkpoint_5").mkdir()
    (tmp_path / "checkpoint_5" / "state.json").write_text('{"step": 5}')
    with one_line_error(f"out={tmp_path}", "not one of this program"):
        run_tiny(tmp_path)


def test_two_runs_into_one_folder(tmp_path, monkeypatch):
    """The second begins while the first takes a step: it is refused; the first is as if alone."""
    run_tiny(tmp_path / "alone")
    refused = []

    def second(*arguments):
        if not refused:
            refused.append(1)
            with one_line_error(f"out={tmp_path / 'out'}: another run is writing to it"):
                run_tiny(tmp_path / "out")
        return loss.sat_loss(*arguments)

    monkeypatch.setattr("sdsat.training.modes.sat_loss", second)
    run_tiny(tmp_path / "out")
    assert refused
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "alone")
    run_tiny(tmp_path / "out", steps=3)  # the lock is gone with its run


def strict_json(text):
    """Parsed as JSON has it, which knows neither NaN nor Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@MODES
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, whole, mode, what):
    """In step 4; from the checkpoint of step 2 the run goes on as if nothing had been."""
    steps = []
    name = "sat_loss" if mode == "adapter" else "joint_loss"

    def spoilt(*arguments):
        steps.append(1)
        value = getattr(loss, name)(*arguments)
        part = value if mode == "adapter" else value[0]
        if len(steps) == 4:  # the root's slope at 0 is infinite, its value 0
            part = part * float("nan") if what == "loss" else part + (part - part).sqrt()
        return part if mode == "adapter" else (part, value[1])

    monkeypatch.setattr(f"sdsat.training.modes.{name}", spoilt)
    with one_line_error("lr=0.01", "step 4", "norm nan", "keeps its last checkpoint"):
        train_tiny(tmp_path / "out", mode=mode)
    monkeypatch.undo()
    out = tmp_path / "out"
    assert [path.name for path in out.glob("checkpoint_*")] == ["checkpoint_2"]
    assert not (out / FILES[mode]).exists()
    assert all(tensor.isfinite().all() for tensor in last_weights(out).values())
    for line in [
        *(out / "train_log.jsonl").read_text().splitlines(),
        (out / "checkpoint_2" / "state.json").read_text(),
    ]:
        strict_json(line)
    assert_close(whole(mode)[1], train_tiny(out, mode=mode), rtol=0, atol=0)


@MODES
def test_weights_that_overflow_are_not_kept(tmp_path, mode):
    """The loss of the only step is finite; what the step makes of the weights is not usable."""
    with one_line_error("not finite", "lower lr"):
        train_tiny(tmp_path, mode=mode, steps=1, lr=1e38)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.name != ".lock"]


def test_a_base_that_is_not_finite_is_refused(tmp_path):
    lm = tiny_llama(torch.float32)
    lm.lm_head.weight.data[5, 5] = float("nan")
    with one_line_error("logits: not finite", "base whose weights are finite"):
        run_tiny(tmp_path, lm=lm)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.name != ".lock"]


@pytest.mark.parametrize("stage", ["before its checkpoint is valid", "after"])
def test_a_run_killed_at_its_last_checkpoint_has_its_whole_log(tmp_path, monkeypatch, whole, stage):
    write_json = training.write_json
    remove = training.shutil.rmtree

    def kill_writing(path, document):
        if path.parent.name == "checkpoint_4":
            raise KeyboardInterrupt
        write_json(path, document)

    def kill_removing(path, *arguments, **settings):
        if Path(path).name == "checkpoint_2":
            raise KeyboardInterrupt
        remove(path, *arguments, **settings)

    if stage == "after":
        monkeypatch.setattr(training.shutil, "rmtree", kill_removing)
    else:
        monkeypatch.setattr(training, "write_json", kill_writing)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "killed")
    monkeypatch.undo()
    train_tiny(tmp_path / "killed", eval_every=2)
    assert lines_of(tmp_path / "killed") == lines_of(whole("adapter")[0])


def test_an_interrupted_run_goes_on_between_evaluations(tmp_path, monkeypatch):
    """From the latest checkpoint, and ends where an uninterrupted run does."""
    settings = dict(steps=6, eval_every=4, checkpoint_every=1)
    want = train_tiny(tmp_path / "whole", **settings)

    def killed(mode, step):
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(modes.AdapterMode, "before_update", killed)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "killed", **settings)
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint_*")] == ["checkpoint_3"]
    taken = []
    monkeypatch.setattr(modes.AdapterMode, "before_update", lambda mode, step: taken.append(step))
    assert_close(train_tiny(tmp_path / "killed", **settings), want, rtol=0, atol=0)
    assert taken == [3, 4, 5]
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")


def test_a_model_killed_while_saving_is_no_mixture(tmp_path, monkeypatch):
    """Full mode saves over an earlier result, and is killed before it puts each of its files in
    place, in turn.
    """
    trained = train_tiny(tmp_path, mode="full")
    replace_file = Path.replace
    moved = []

    def killed_before(number):
        def counted(file, target):
            moved.append(target)
            if len(moved) == number:
                raise KeyboardInterrupt
            return replace_file(file, target)

        return counted

    for number in (1, 2, 3):  # two of weights and generation settings, and the config
        moved.clear()
        monkeypatch.setattr(Path, "replace", killed_before(number))
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tmp_path, mode="full")
        monkeypatch.undo()
        with one_line_error(tmp_path):
            load(str(tmp_path), "float32", "cpu")
    train_tiny(tmp_path, mode="full")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.sdsat["k"] == 3
    saved = load_file(tmp_path / "model.safetensors")
    assert_close({name: trained[name].bfloat16() for name in saved}, saved, rtol=0, atol=0)
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith("model")) == [
        "model.safetensors"
    ]


REFUSED_AT_ONCE = ["train", "--data", "none", "--out", "none", "--device", "0+1"]


def test_training_threads_do_not_spin():
    """OpenMP itself says what it was told."""
    command = [sys.executable, "-m", "sdsat", *REFUSED_AT_ONCE]
    told = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {key: value for key, value in os.environ.items() if key not in told}
    environment["OMP_DISPLAY_ENV"] = "true"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        line = next((line for line in process.stderr if "OMP_WAIT_POLICY" in line), None)
        process.kill()  # as soon as torch is imported
    if line is None:
        pytest.skip("this build of torch has an OpenMP that does not show its settings")
    assert line.split("'")[1] == "PASSIVE"


@pytest.mark.parametrize(("given", "policy"), [(None, "PASSIVE"), ("active", "active")])
def test_what_the_caller_told_threads_stays(monkeypatch, given, policy):
    monkeypatch.setenv("OMP_WAIT_POLICY", str(given))
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(sys, "argv", ["sdsat", *REFUSED_AT_ONCE])
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ["OMP_WAIT_POLICY"] == policy


@MODES
def test_a_full_disk_is_one_line_and_the_run_resumes(tmp_path, whole, mode):
    """A file may not grow beyond 10 kB for a while, where weights are larger."""
    weights = whole(mode)[1]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with one_line_error(f"{tmp_path / 'full'}: cannot be written"):
            train_tiny(tmp_path / "full", mode=mode)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "full" / FILES[mode]).exists()
    assert_close(weights, train_tiny(tmp_path / "full", mode=mode), rtol=0, atol=0)


@MODES
def test_a_run_that_was_killed_while_saving_saves(tmp_path, mode):
    train_tiny(tmp_path, mode=mode)
    file = tmp_path / FILES[mode]
    saved = file.read_bytes()
    file.unlink()
    train_tiny(tmp_path, mode=mode)
    assert file.read_bytes() == saved


def test_other_answers_to_held_out_prompts_are_not_trained_on(tmp_path):
    first = random_sequences([9, 13, 6])
    again = [TrainingExample(torch.cat([s.ids[:2], s.ids[2:].flip(0)]), 2) for s in first]
    config = TrainConfig(1, k=3, rank=2, head=0, anchors=4, held_out=2, warmup=1)
    train(
        SatModel(tiny_llama(torch.float32), None, "tiny"), first + again, tmp_path / "out", config
    )
    # the third and its other answer
    assert read_config(tmp_path / "out").training["sequences"] == 2
    with one_line_error("held_out=3", "other prompts"):
        train(
            SatModel(tiny_llama(torch.float32), None, "tiny"),
            first + again,
            tmp_path / "none",
            replace(config, held_out=3),
        )


def test_data_of_another_vocabulary_is_refused(tmp_path):
    with one_line_error("token id 64", "tiny"):
        run_tiny(tmp_path, [TrainingExample(torch.tensor([1, 2, 64, 3]), 1)] * 5)
    assert not list(tmp_path.iterdir())


def test_settings_that_do_not_fit_together_are_refused(tmp_path):
    with one_line_error("embedding_steps=3", "only for mode full"):
        TrainConfig(embedding_steps=3)
    for name, value in (
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("standard", float("inf")),
        ("embedding_steps", -1),
    ):
        with one_line_error(f"{name}={value}: expected"):
            TrainConfig(mode="full", **{name: value})
    with one_line_error("mode=both", "adapter, everywhere, full"):
        TrainConfig(mode="both")
    with one_line_error("rank=2", "adapter and everywhere"):
        TrainConfig(mode="full", rank=2)
    for mode in ("everywhere", "full"):
        with one_line_error("head=0", "only for mode adapter"):
            TrainConfig(mode=mode, head=0)
    with one_line_error("dtype=torch.bfloat16", "float32"):
        train_tiny(tmp_path, torch.bfloat16, mode="full")
