"""SAT training: the batched layout against every anchor run as its own plain sequence."""

import json

import pytest
import torch
from conftest import VOCAB, one_line_error, tiny_llama, with_adapter

from sdsat.data import Sequence
from sdsat.model import SatModel
from sdsat.train import IGNORED, SatBatch, TrainConfig, sat_batch, sat_loss, sat_mask, train


def random_sequences(lengths, prompt_length=2):
    torch.manual_seed(0)
    return [Sequence(torch.randint(2, VOCAB, (n,)), prompt_length) for n in lengths]


def brute_force_loss(model, adapter, sequences, batch):
    """Each SAT group as one plain sequence: the standard tokens up to the anchor, then its SATs."""
    total, count = 0.0, 0
    for b, sequence in enumerate(sequences):
        for r in range(batch.label.shape[1]):
            label, anchor, depth = (int(t[b, r]) for t in (batch.label, batch.anchor, batch.depth))
            if label == IGNORED:
                continue
            assert label == sequence.ids[anchor + depth + 1]
            standard = model.model.get_input_embeddings()(sequence.ids[: anchor + 1])
            sats = adapter.sat_embedding.expand(depth, -1)
            length = anchor + 1 + depth
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            with adapter.on_rows(anchor + 1, length):
                logits = model.model(inputs_embeds=torch.cat([standard, sats])[None], attention_mask=mask).logits
            total = total + torch.nn.functional.cross_entropy(logits[0, -1], torch.tensor(label))
            count += 1
    return total, count


def test_loss_and_gradients_equal_brute_force():
    model = with_adapter(tiny_llama(), k=3)
    adapter = model.adapter.requires_grad_(True)
    sequences = random_sequences([9, 13, 6])
    batch = sat_batch(sequences, 3, 4, 0.7, torch.Generator().manual_seed(3))
    loss, count = sat_loss(model, adapter, batch)
    expected, expected_count = brute_force_loss(model, adapter, sequences, batch)
    assert count == expected_count > 10
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=1e-6)
    parameters = list(adapter.parameters())
    for got, want in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_mask_is_the_documented_one():
    row = dict(anchor=[0, 0, 2, 2, 0], depth=[1, 2, 1, 2, 0], label=[1, 1, 1, 1, IGNORED])
    batch = SatBatch(torch.zeros(1, 4, dtype=torch.long), *(torch.tensor([row[key]]) for key in row))
    assert sat_mask(batch)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 0, 0, 0, 1],
    ]


def test_anchors_lie_in_the_answer_and_have_targets():
    sequence = random_sequences([12], prompt_length=5)[0]
    batch = sat_batch([sequence], 3, 100, 1.0, torch.Generator())
    assert sorted(set(batch.anchor[0].tolist())) == list(range(4, 10))
    assert batch.label[0].tolist() == [int(sequence.ids[a + d + 1]) for a, d in zip(batch.anchor[0], batch.depth[0], strict=True)]


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
