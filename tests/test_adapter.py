"""The adapter leaves standard rows alone to the bit, and its files round-trip or are refused."""

import hashlib
import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from common import adapted, one_line_error, tiny_llama
from hypothesis import given
from hypothesis.strategies import booleans, floats, integers, sampled_from
from safetensors.torch import load_file, save_file

from sdsat.config import SatConfig
from sdsat.models import adapter as adapters
from sdsat.models.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, SatAdapter
from sdsat.models.compact import LARGEST, compacted, restored

IDS = torch.tensor([[1, 5, 9, 2, 7, 64, 64, 64]])  # 64 is the SAT
STANDARD = 5
DRAFT_IDS = (0, 1, 9, 20, 63)
QUERY = "down.model/layers/0/self_attn/q_proj"  # one of the tensors
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def logits_of(model, num_sats=0, ids=IDS):
    """[S, V] logits of one causal pass whose last `num_sats` rows are named SATs."""
    rows = ids.shape[1]
    with model.sat_rows(rows - num_sats, rows), torch.no_grad():
        mask = torch.ones(1, 1, rows, rows, dtype=torch.bool).tril()
        return model.lm(inputs_embeds=model.embed(ids), attention_mask=mask).logits[0]


def base_logits(lm, ids):
    """[S, V] logits of a plain causal pass."""
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    return lm(ids, attention_mask=mask).logits[0]


@DTYPES
def test_base_is_untouched_while_no_rows_are_named(dtype):
    lm = tiny_llama(dtype)
    ids = IDS[:, :STANDARD]
    want = base_logits(lm, ids)
    model = adapted(lm, strength=3.0)
    assert torch.equal(base_logits(lm, ids), want)
    assert torch.equal(logits_of(model, ids=ids), want)
    with model.adapter.on_rows(3, 3):
        assert torch.equal(base_logits(lm, ids), want)


@DTYPES
@pytest.mark.parametrize("num_sats", [1, 2, 3])
def test_standard_rows_are_untouched_beside_sat_rows(dtype, num_sats):
    model = adapted(tiny_llama(dtype), strength=3.0)
    ids = IDS[:, : STANDARD + num_sats]
    plain = logits_of(model, 0, ids)
    named = logits_of(model, num_sats, ids)
    assert torch.equal(named[:STANDARD], plain[:STANDARD])
    assert (named - plain)[STANDARD:].abs().amax(-1).min() > 0.1


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fused_updates_are_the_same_updates(scale):
    model = adapted(tiny_llama())
    model.adapter.config = AdapterConfig("tiny", SatConfig(64, 3), 4, scale=scale)
    model.adapter.detach()
    model.adapter.attach(model.lm)
    want = logits_of(model, 3)
    model.adapter.detach()
    model.adapter.fuse().attach(model.lm)
    for _ in range(2):
        torch.testing.assert_close(logits_of(model, 3), want, rtol=1e-10, atol=1e-10)
    assert torch.equal(
        logits_of(model, 0, IDS[:, :STANDARD]), base_logits(tiny_llama(), IDS[:, :STANDARD])
    )


def test_sat_rows_are_the_merged_low_rank_update():
    """All rows named: the same as a base whose weights are W + scale * B A."""
    model = adapted(tiny_llama())
    model.adapter.config = AdapterConfig("tiny", SatConfig(64, 3), 4, scale=0.5)
    model.adapter.detach()
    model.adapter.attach(model.lm)
    got = logits_of(model, IDS.shape[1])
    model.adapter.detach()
    for name, layer in model.lm.named_modules():
        key = name.replace(".", "/")
        if key in model.adapter.down:
            layer.weight += 0.5 * model.adapter.up[key] @ model.adapter.down[key]
    torch.testing.assert_close(got, logits_of(model))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_rows_are_named_within_the_block_only(error):
    lm = tiny_llama()
    ids = IDS[:, :STANDARD]
    want = base_logits(lm, ids)
    model = adapted(lm)
    with pytest.raises(error) if error else nullcontext(), model.adapter.on_rows(0, 8):
        assert not torch.equal(base_logits(lm, ids), want)
        if error:
            raise error
    assert torch.equal(base_logits(lm, ids), want)


def test_new_adapter_changes_nothing_but_the_embedding():
    lm = tiny_llama()
    adapter = SatAdapter(lm, AdapterConfig("tiny", SatConfig(64, 3))).attach(lm)
    want = base_logits(lm, IDS[:, :STANDARD])
    with adapter.on_rows(0, STANDARD):
        assert torch.equal(base_logits(lm, IDS[:, :STANDARD]), want)
    assert {p.shape[0] for p in adapter.down.values()} == {32}
    torch.testing.assert_close(adapter.sat_embedding, lm.get_input_embeddings().weight.mean(0))


def test_detach_restores_the_base():
    lm = tiny_llama()
    model = adapted(lm)
    with_update = logits_of(model, 3)
    with one_line_error("already attached"):
        model.adapter.attach(lm)
    model.adapter.detach()
    without = logits_of(model, 3)
    assert not torch.equal(with_update, without)
    assert not any(module._forward_hooks for module in lm.modules())
    assert torch.equal(without, logits_of(model))
    model.adapter.attach(lm)
    assert torch.equal(logits_of(model, 3), with_update)


def test_embed_puts_the_sat_embedding_in_its_places():
    model = adapted(tiny_llama())
    weight = model.lm.get_input_embeddings().weight
    want = [weight[token] if token < 64 else model.adapter.sat_embedding for token in IDS[0]]
    assert torch.equal(model.embed(IDS)[0], torch.stack(want))


@pytest.mark.parametrize("targets", [("c_attn",), ("q_proj", "c_attn")])
def test_every_target_must_be_in_the_model(targets):
    with one_line_error(f"targets={','.join(targets)}", "no linear layer named c_attn"):
        SatAdapter(tiny_llama(), AdapterConfig("tiny", SatConfig(64, 3), targets=targets))


@pytest.fixture
def saved(tmp_path):
    """(base, directory of an adapter made for it, that adapter)."""
    lm = tiny_llama(torch.float32)
    model = adapted(lm, draft_ids=DRAFT_IDS)
    with torch.no_grad():
        held = restored(compacted(dict(model.adapter.named_parameters())))
        for name, parameter in model.adapter.named_parameters():
            parameter.copy_(held[name])
    model.adapter.save(tmp_path / "adapter")
    model.adapter.detach()
    return lm, tmp_path / "adapter", model.adapter


def test_save_and_load_round_trip(saved):
    lm, directory, adapter = saved
    assert {file.name for file in directory.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    loaded = adapters.load(lm, directory)
    assert loaded.config == adapter.config
    state = loaded.state_dict()
    assert state.keys() == adapter.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in adapter.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(module._forward_hooks for module in lm.modules())


@given(
    rows=integers(1, 9),
    columns=integers(1, 40),
    size=floats(1e-30, 1e30),
    zeros=booleans(),
    dtype=sampled_from([torch.float32, torch.bfloat16]),
    seed=integers(0, 99),
)
def test_matrices_in_8_bits_are_off_by_half_a_step_at_most(rows, columns, size, zeros, dtype, seed):
    torch.manual_seed(seed)
    weight = (size * torch.randn(rows, columns)).to(dtype)
    weight[0] *= 1 - zeros
    kept = compacted({"w": weight, "v": weight[0]})
    assert kept["w"].dtype == torch.int8 and kept["v"].dtype == torch.bfloat16
    found = restored(kept)
    assert found.keys() == {"w", "v"}
    step = weight.double().abs().amax(1, keepdim=True) / LARGEST
    off = (found["w"].double() - weight.double()).abs()
    assert (off <= 0.5001 * step).all()
    assert torch.equal(found["v"], weight[0].bfloat16())


def test_an_adapter_saved_in_bfloat16_loads(saved):
    """As the first ones were."""
    lm, directory, adapter = saved
    whole = {name: p.detach().bfloat16() for name, p in adapter.named_parameters()}
    edit_weights(lambda tensors: (tensors.clear(), tensors.update(whole)))(directory)
    edit_config(draft_vocabulary=0)(directory)
    loaded = dict(adapters.load(lm, directory).named_parameters())
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in whole.items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_none_in_the_file(saved, bad):
    lm, directory, adapter = saved
    with torch.no_grad():
        next(iter(adapter.up.values()))[1, 0] = bad
    adapter.save(directory)
    with one_line_error(directory, "NaN or infinite"):
        adapters.load(lm, directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_load_takes_the_dtype_of_the_base(saved, dtype):
    _, directory, adapter = saved
    loaded = adapters.load(tiny_llama(torch.float32).to(dtype), directory)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.equal(loaded.sat_embedding.float(), adapter.sat_embedding)


def edit_config(**changes):
    def edit(directory):
        raw = json.loads((directory / CONFIG_FILE).read_text())
        raw = {key: value for key, value in {**raw, **changes}.items() if value is not None}
        (directory / CONFIG_FILE).write_text(json.dumps(raw))

    return edit


def edit_weights(change):
    def edit(directory):
        weights = load_file(directory / WEIGHTS_FILE)
        change(weights)
        save_file(weights, directory / WEIGHTS_FILE)
        edit_config(
            weights_sha256=hashlib.sha256((directory / WEIGHTS_FILE).read_bytes()).hexdigest()
        )(directory)

    return edit


def edit_ids(ids):
    return edit_weights(lambda weights: weights.update(draft_ids=torch.tensor(ids)))


def cut(name, num_bytes):
    return lambda directory: (directory / name).write_bytes(
        (directory / name).read_bytes()[:num_bytes]
    )


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (edit_weights(lambda w: w.pop("sat_embedding")), "sat_embedding is missing"),
        (edit_weights(lambda w: w.update(extra=torch.zeros(2))), "extra is not expected"),
        (edit_weights(lambda w: w.pop(f"{QUERY}.scale")), f"needs {QUERY}.scale [4]"),
        (
            edit_weights(lambda w: w.update(sat_embedding=torch.zeros(7))),
            "sat_embedding has shape (7,)",
        ),
        (edit_config(rank=5), "rank=5: its file holds updates of rank 4"),
        (edit_config(rank=10**12), f"rank={10**12}: its file holds updates of rank 4"),
        (edit_config(rank=10**400), f"rank={10**400}: its file"),
        (edit_weights(lambda w: w.update({QUERY: torch.tensor(1.0)})), "updates of rank 0"),
        (edit_config(head=10**12), f"head={10**12}: its file holds one of size"),
        (edit_config(draft_vocabulary=10**12), f"draft_vocabulary={10**12}: its file holds 5"),
        (edit_config(draft_vocabulary=0), "draft_vocabulary=0: its file holds 5"),
        (edit_config(draft_vocabulary=-1), "draft_vocabulary=-1: expected 0"),
        (edit_ids([3, 1, 9, 20, 63]), "draft_ids: expected ascending"),
        (edit_ids([-1, 1, 9, 20, 63]), "draft_ids: expected ascending"),
        (edit_ids([0, 1, 9, 20, 64]), "draft_ids: expected ascending tokens below 64"),
        (edit_ids([0, 1, 9, 9, 63]), "draft_ids: expected ascending"),
        (edit_weights(lambda w: w.update(draft_ids=torch.zeros(5))), "draft_ids"),
        (edit_config(targets=["q_proj"]), "not expected"),
        (cut(WEIGHTS_FILE, 0), WEIGHTS_FILE),
        (cut(WEIGHTS_FILE, 100), WEIGHTS_FILE),
        (cut(WEIGHTS_FILE, -1), WEIGHTS_FILE),
        (lambda directory: (directory / WEIGHTS_FILE).unlink(), WEIGHTS_FILE),
        (cut(CONFIG_FILE, 0), CONFIG_FILE),
        (cut(CONFIG_FILE, -20), CONFIG_FILE),
        (lambda directory: (directory / CONFIG_FILE).write_text("[1, 2]"), CONFIG_FILE),
        (lambda directory: (directory / CONFIG_FILE).unlink(), CONFIG_FILE),
        (edit_config(k=None), "'k'"),
        (edit_config(k="seven"), CONFIG_FILE),
        (edit_config(base_sample=None), "base_sample"),
        (edit_config(base_sample={}), "base_sample is empty"),
        (edit_config(scale=math.nan), "scale=nan"),
        (edit_config(training={"accuracy_by_depth": [0.5, None]}), "accuracy_by_depth=[0.5, None]"),
        (edit_config(training={"accuracy_by_depth": [math.nan]}), "accuracy_by_depth=[nan]"),
        (edit_config(format="peft"), "sdsat-adapter"),
    ],
)
def test_load_refuses_damage(saved, damage, named):
    lm, directory, _ = saved
    damage(directory)
    with one_line_error(directory, named):
        adapters.load(lm, directory)


@pytest.mark.parametrize(
    "other", [dict(seed=5), dict(num_hidden_layers=1), dict(hidden_size=16)], ids=str
)
def test_load_refuses_another_base(saved, other):
    _, directory, _ = saved
    with one_line_error(directory, "made for base tiny"):
        adapters.load(tiny_llama(torch.float32, **other), directory)


@pytest.mark.parametrize("kept", [CONFIG_FILE, WEIGHTS_FILE])
def test_files_of_two_saves_are_no_pair(saved, tmp_path, kept):
    """Both have the right names and shapes: a save that was killed between the two, or a copy of
    one file.
    """
    lm, directory, _ = saved
    other = adapted(tiny_llama(torch.float32), seed=9).adapter
    other.save(tmp_path / "other")
    (directory / kept).write_bytes((tmp_path / "other" / kept).read_bytes())
    with one_line_error(
        directory, f"{WEIGHTS_FILE} is damaged, or not the one that {CONFIG_FILE} was written with"
    ):
        adapters.load(lm, directory)


def test_a_flipped_bit_is_seen(saved):
    lm, directory, _ = saved
    content = bytearray((directory / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (directory / WEIGHTS_FILE).write_bytes(content)
    with one_line_error(directory, WEIGHTS_FILE, "damaged"):
        adapters.load(lm, directory)


def test_an_adapter_saved_without_a_hash_loads(saved):
    lm, directory, adapter = saved
    edit_config(weights_sha256=None)(directory)
    assert torch.equal(adapters.load(lm, directory).sat_embedding, adapter.sat_embedding)


def fail_at(monkeypatch, method, number):
    """Make the `number`th call of this method of Path fail, as a full disk does; a write leaves
    half of its content.
    """
    real = getattr(Path, method)
    calls = []

    def failing(path, *arguments):
        calls.append(path)
        if len(calls) == number:
            if method == "write_bytes":
                real(path, b"half")
            raise OSError("disk full")
        return real(path, *arguments)

    monkeypatch.setattr(Path, method, failing)


@pytest.mark.parametrize("number", [1, 2], ids=["weights", "config"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh folder", "over an old adapter"])
def test_a_failing_save_leaves_nothing_half_written(saved, tmp_path, monkeypatch, number, fresh):
    lm, directory, _ = saved
    target = tmp_path / "new" if fresh else directory
    old = {file.name: file.read_bytes() for file in target.iterdir()} if not fresh else {}
    changed = adapted(tiny_llama(torch.float32), seed=9).adapter
    fail_at(monkeypatch, "write_bytes", number)
    with pytest.raises(OSError, match="disk full"):
        changed.save(target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == old
    monkeypatch.undo()
    changed.save(target)
    assert torch.equal(
        adapters.load(lm, target).sat_embedding, changed.sat_embedding.bfloat16().float()
    )
    assert {file.name for file in target.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}


@pytest.mark.parametrize("number", [1, 2])
def test_a_save_that_ends_between_its_files_is_never_a_mixture(saved, monkeypatch, number):
    lm, directory, adapter = saved
    changed = adapted(tiny_llama(torch.float32), seed=9).adapter
    fail_at(monkeypatch, "replace", number)
    with pytest.raises(OSError, match="disk full"):
        changed.save(directory)
    monkeypatch.undo()
    if number == 1:  # nothing had been replaced
        assert torch.equal(adapters.load(lm, directory).sat_embedding, adapter.sat_embedding)
    else:
        with one_line_error(directory, WEIGHTS_FILE, "again"):
            adapters.load(lm, directory)
