"""The training loss: the batched layout against every anchor run as its own plain sequence."""

from types import SimpleNamespace

import pytest
import torch
from common import adapted, one_line_error, random_sequences, text_adds, tiny_llama

from sdsat.config import SatConfig
from sdsat.models.sat_model import SatModel
from sdsat.training.evaluate import evaluate
from sdsat.training.loss import (
    IGNORED,
    SatBatch,
    joint_loss,
    predict,
    sat_batch,
    sat_loss,
    sat_mask,
)
from sdsat.training.shards import TrainingExample


def ranked_anew(model, state, logits, text, before):
    """[V] logits of a SAT once its draft head knows the tokens before, and the text up to the first
    draft: its best tokens by the moved state and by the text, no others.
    """
    embedding = model.lm.get_input_embeddings().weight
    head = model.head

    def normed(x):
        return x / (x * x).mean().add(torch.finfo(x.dtype).eps).sqrt()

    inner = head.inner.to(state) @ torch.cat([normed(state), normed(embedding[before[-1]])])
    moved = state + head.outer.to(state) @ (inner * inner.sigmoid())
    best = logits.topk(20).indices
    score = head.sharpness.to(state) * (model.lm.get_output_embeddings().weight[best] @ moved)
    found = torch.stack([only(size, text, before, best) for size in range(4)], 1)
    score = score + found.to(state) @ head.copies.to(state)
    return torch.full_like(logits, float("-inf")).index_put((best,), score)


def only(size, text, before, tokens):
    """Whether each token has followed so many tokens before it: what this alone would add."""
    head = SimpleNamespace(copies=torch.eye(4)[size])
    return text_adds(head, text, before, tokens.tolist())


def brute_force_loss(model, adapter, sequences, batch, soft, decay):
    """Each SAT group as one plain sequence: the standard tokens up to the anchor, then its SATs."""
    total = 0.0
    weights = 0.0
    for b, sequence in enumerate(sequences):
        for r in range(batch.label.shape[1]):
            label, anchor, depth = (int(t[b, r]) for t in (batch.label, batch.anchor, batch.depth))
            if label == IGNORED:
                continue
            assert label == sequence.ids[anchor + depth + 1]
            standard = model.lm.get_input_embeddings()(sequence.ids[: anchor + 1])
            sats = adapter.sat_embedding.expand(depth, -1)
            length = anchor + 1 + depth
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            with adapter.on_rows(anchor + 1, length):
                inputs = torch.cat([standard, sats])[None]
                state = model.lm.base_model(
                    inputs_embeds=inputs, attention_mask=mask
                ).last_hidden_state[0, -1]
            logits = model.lm.get_output_embeddings()(state)
            teacher = model.lm(sequence.ids[None, :length], attention_mask=mask).logits[0, -1]
            weights += decay ** (depth - 1)
            ids = sequence.ids.tolist()
            if model.draft_ids is not None:
                guessed = {*model.draft_ids.tolist(), *ids[: anchor + 2]}
                never = torch.tensor([token not in guessed for token in range(len(logits))])
                if never[label]:
                    continue
                logits, teacher = (x.masked_fill(never, -1e9) for x in (logits, teacher))
            hard = torch.nn.functional.cross_entropy(logits, torch.tensor(label))
            distilled = torch.nn.functional.cross_entropy(logits, teacher.softmax(-1))
            total = total + decay ** (depth - 1) * ((1 - soft) * hard + soft * distilled)
            if model.head is not None:
                before = ids[: anchor + depth + 1]
                ranked = ranked_anew(model, state, logits, ids[: anchor + 2], before)
                if ranked[label] > float("-inf"):
                    total = total + decay ** (depth - 1) * torch.nn.functional.cross_entropy(
                        ranked, torch.tensor(label)
                    )
    return total, weights


@pytest.mark.parametrize(
    ("soft", "decay", "head", "draft_ids"),
    [
        (0.0, 1.0, 0, ()),
        (1.0, 1.0, 0, ()),
        (0.3, 0.7, 0, ()),
        (0.0, 0.7, 6, ()),
        (0.0, 0.7, 6, (1, 2, *range(30, 60))),
        (0.3, 1.0, 0, (2, 3, *range(30, 40))),
    ],
)
def test_loss_and_gradients_equal_brute_force(soft, decay, head, draft_ids, monkeypatch):
    monkeypatch.setattr("sdsat.training.loss.SHORTLIST", 20)
    model = adapted(tiny_llama(), k=3, head=head, strength=0.3, draft_ids=draft_ids)
    adapter = model.adapter.requires_grad_(True)
    sequences = [TrainingExample(s.ids % 5, s.prompt_length) for s in random_sequences([9, 13, 6])]
    batch = sat_batch(
        sequences, 3, 4, 0.7, [torch.Generator().manual_seed(3 + i) for i in range(3)]
    )
    loss = sat_loss(model, batch, soft, decay)
    expected, expected_weight = brute_force_loss(model, adapter, sequences, batch, soft, decay)
    assert (batch.label != IGNORED).sum() > 10
    assert batch.weights(decay).sum().item() == pytest.approx(expected_weight, rel=1e-12)
    # transformers' norms are float32 inside
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    parameters = list(adapter.parameters())
    for got, want in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=3e-5)


def test_mask_is_the_documented_one():
    row = dict(anchor=[0, 0, 2, 2, 0], depth=[1, 2, 1, 2, 0], label=[1, 1, 1, 1, IGNORED])
    batch = SatBatch(
        torch.zeros(1, 4, dtype=torch.long),
        torch.zeros(1, 4, dtype=torch.long),
        *(torch.tensor([row[key]]) for key in row),
    )
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
    assert batch.label[0].tolist() == [
        int(sequence.ids[a + d + 1]) for a, d in zip(batch.anchor[0], batch.depth[0], strict=True)
    ]


def test_evaluate_counts_what_it_says():
    """Scripted predictions: SAT i of every group is right for i = 1, right at every other place for
    i = 2, wrong for i = 3.
    """
    sequence = TrainingExample(torch.arange(20) % 7 + 2, 3)

    def scripted(batch):
        labelled = batch.label != IGNORED
        depth, anchor, label = (
            tensor[labelled] for tensor in (batch.depth, batch.anchor, batch.label)
        )
        right = (depth == 1) | ((depth == 2) & (anchor % 2 == 0))
        best = torch.where(right, label, label + 1)
        logits = torch.zeros(len(label), 64)
        logits[torch.arange(len(label)), best] = torch.tensor(
            63 * 0.75 / 0.25
        ).log()  # a confidence of 3/4
        return logits

    found = evaluate(scripted, [sequence], 3, torch.device("cpu"), anchors=100)
    # Anchors 2..17. SAT 2 has a target for 2..16: eight even, seven odd; SAT 3 for 2..15.
    assert found["predictions"] == 16 + 15 + 14
    assert found["accuracy_by_depth"] == [1.0, pytest.approx(8 / 15, abs=1e-4), 0.0]
    assert found["confidence_by_depth"] == [0.75] * 3
    assert found["calibration_error_by_depth"] == [
        0.25,
        pytest.approx(abs(0.75 - 8 / 15), abs=1e-4),
        0.75,
    ]
    # Lost at depth 2: the seven odd anchors that have a SAT 2; at depth 3: even anchors with a SAT
    # 3, all but 16.
    assert found["lost_by_depth"] == [
        0.0,
        pytest.approx(7 / 16, abs=1e-4),
        pytest.approx(7 / 16, abs=1e-4),
    ]
    assert found["accepted_per_loop"] == pytest.approx((16 + 8) / 16)


def test_evaluate_needs_a_target():
    with one_line_error("answers", "two tokens"):
        evaluate(None, [TrainingExample(torch.arange(5), 4)], 3, torch.device("cpu"))


@pytest.mark.parametrize("ids", [(), (60, 7)], ids=["adapter", "a SAT for each depth"])
def test_evaluate_reads_the_drafts_of_a_chain(ids):
    """Its drafts are the ones that decoding proposes after the same tokens."""
    model = adapted(tiny_llama(torch.float32), k=3, strength=0.3)
    if ids:
        model = SatModel(tiny_llama(torch.float32), None, "tiny", SatConfig.of(ids, 3))
    prompt = torch.tensor([5, 9, 2, 7])
    batch = SatBatch(
        prompt[None],
        prompt[None],
        *(torch.tensor([row]) for row in ([3, 3, 3], [1, 2, 3], [1, 1, 1])),
    )
    sats = torch.tensor([60, 7, 7] if ids else [model.sat.token_id] * 3)
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    with model.sat_rows(4, 7):
        want = model.lm(
            inputs_embeds=model.embed(torch.cat([prompt, sats])[None]), attention_mask=mask
        ).logits[0, 4:]
    torch.testing.assert_close(predict(model, batch), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("soft", "decay"), [(0.0, 1.0), (0.3, 0.7)])
def test_joint_loss_and_gradients_equal_brute_force(soft, decay):
    """Full mode: all weights learn from SATs and standard tokens, as if every group were a plain
    sequence.
    """
    sat = 63
    lm = tiny_llama().requires_grad_(True)
    plain = tiny_llama().requires_grad_(True)
    sequences = random_sequences([9, 13, 6])
    batch = sat_batch(
        sequences, 3, 4, 0.7, [torch.Generator().manual_seed(3 + i) for i in range(3)]
    )
    sats, standard = joint_loss(lm, sat, batch, soft, decay)
    wanted = 0.0
    wanted_standard = 0.0
    count = 0
    for b, sequence in enumerate(sequences):
        causal = torch.ones(1, 1, len(sequence.ids), len(sequence.ids), dtype=torch.bool).tril()
        logits = plain(sequence.ids[None], attention_mask=causal).logits[0]
        first = sequence.prompt_length - 1
        wanted_standard += torch.nn.functional.cross_entropy(
            logits[first:-1], sequence.ids[first + 1 :], reduction="sum"
        )
        count += len(sequence.ids) - 1 - first
        for r in range(batch.label.shape[1]):
            label, anchor, depth = (int(t[b, r]) for t in (batch.label, batch.anchor, batch.depth))
            if label != IGNORED:
                ids = torch.cat([sequence.ids[: anchor + 1], torch.full((depth,), sat)])
                mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool).tril()
                drafted = plain(ids[None], attention_mask=mask).logits[0, -1]
                hard = torch.nn.functional.cross_entropy(drafted, torch.tensor(label))
                distilled = torch.nn.functional.cross_entropy(
                    drafted, logits[anchor + depth].detach().softmax(-1)
                )
                wanted += decay ** (depth - 1) * ((1 - soft) * hard + soft * distilled)
    assert batch.num_standard == count
    torch.testing.assert_close(
        torch.stack([sats, standard]), torch.stack([wanted, wanted_standard]), rtol=1e-6, atol=1e-6
    )
    pairs = ((sats + standard, lm), (wanted + wanted_standard, plain))
    both = [torch.autograd.grad(total, list(model.parameters())) for total, model in pairs]
    for got, want in zip(*both, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
