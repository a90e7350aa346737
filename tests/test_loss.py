"""The training loss: the batched layout against every anchor run as its own plain sequence."""

import pytest
import torch
from conftest import random_sequences, tiny_llama, with_adapter

from sdsat.loss import IGNORED, SatBatch, sat_batch, sat_loss, sat_mask


def brute_force_loss(model, adapter, sequences, batch, soft, decay):
    """Each SAT group as one plain sequence: the standard tokens up to the anchor, then its SATs."""
    total, weights = 0.0, 0.0
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
                logits = model.model(inputs_embeds=torch.cat([standard, sats])[None], attention_mask=mask).logits[0, -1]
            teacher = model.model(sequence.ids[None, :length], attention_mask=mask).logits[0, -1]
            hard = torch.nn.functional.cross_entropy(logits, torch.tensor(label))
            distilled = torch.nn.functional.cross_entropy(logits, teacher.softmax(-1))
            total = total + decay ** (depth - 1) * ((1 - soft) * hard + soft * distilled)
            weights += decay ** (depth - 1)
    return total, weights


@pytest.mark.parametrize(("soft", "decay"), [(0.0, 1.0), (1.0, 1.0), (0.3, 0.7)])
def test_loss_and_gradients_equal_brute_force(soft, decay):
    model = with_adapter(tiny_llama(), k=3)
    adapter = model.adapter.requires_grad_(True)
    sequences = random_sequences([9, 13, 6])
    batch = sat_batch(sequences, 3, 4, 0.7, [torch.Generator().manual_seed(3 + i) for i in range(3)])
    loss, weight = sat_loss(model, adapter, batch, soft, decay)
    expected, expected_weight = brute_force_loss(model, adapter, sequences, batch, soft, decay)
    assert (batch.label != IGNORED).sum() > 10
    assert weight.item() == pytest.approx(expected_weight, rel=1e-12)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)  # transformers' norms are float32 inside
    parameters = list(adapter.parameters())
    for got, want in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=3e-5)


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
    batch = sat_batch([sequence], 3, 100, 1.0, [torch.Generator()])
    assert sorted(set(batch.anchor[0].tolist())) == list(range(4, 10))
    assert batch.label[0].tolist() == [int(sequence.ids[a + d + 1]) for a, d in zip(batch.anchor[0], batch.depth[0], strict=True)]
