"""Inspection: its figures are those of decoding and of the loss's own evaluation, and its sentences
follow from them.
"""

from functools import partial

import pytest
import torch
from common import decoder_of, one_line_error, tiny_llama, with_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from sdsat.config import DecodeConfig
from sdsat.evaluation.inspection import candidates_table, findings, inspect, inspection_table
from sdsat.evaluation.sweep import InspectConfig
from sdsat.tasks.prompts import Problem
from sdsat.training.evaluate import BEST, among_best, evaluate
from sdsat.training.loss import predict
from sdsat.training.shards import TrainingExample

PROMPTS = ([5, 9, 2, 7], [11, 3])
PROBLEMS = [Problem(str(i), tuple(prompt)) for i, prompt in enumerate(PROMPTS)]
GIVEN = ([4, 8] * 10, [6] * 20)


def test_own_output_is_what_ar_writes():
    decoder = with_adapter(tiny_llama(torch.float32), k=3, strength=0.1)
    config = InspectConfig(max_new_tokens=16, anchors=8)
    found = inspect(decoder, list(zip(PROBLEMS, GIVEN, strict=True)), config)
    answers = [decoder.generate(prompt, DecodeConfig(0, 16)).token_ids for prompt in PROMPTS]
    for name, texts in (("own", answers), ("given", [answer[:16] for answer in GIVEN])):
        sequences = [
            TrainingExample(torch.tensor(p + t), len(p))
            for p, t in zip(PROMPTS, texts, strict=True)
        ]
        places = (partial(predict, decoder.model), sequences, 3, torch.device("cpu"), 8)
        # Without a head the SATs' own best tokens are what is drafted.
        assert found[name] == {**evaluate(*places), **among_best(*places)}
    loops = [
        n
        for prompt in PROMPTS
        for n in decoder.generate(prompt, DecodeConfig(3, 16)).accepted_lengths
    ]
    assert found["decoding"]["accepted_per_loop"] == pytest.approx(
        sum(loops) / len(loops), abs=1e-4
    )
    assert found["findings"] == findings(found)
    assert found["environment"]["adapter"] is None and found["settings"]["anchors"] == 8
    console = Console(record=True, width=140)
    console.print(inspection_table(found))
    assert f"{found['own']['accuracy_by_depth'][2]:.2f}" in console.export_text()


def ranks_by_plain_passes(model, ids, prompt_length, k):
    """For every place of an answer, what rank the token that followed has for each SAT there."""
    places = []
    for anchor in range(prompt_length - 1, len(ids) - 2):
        inputs = torch.cat([ids[: anchor + 1], torch.full((k,), model.sat.token_id)])
        length = len(inputs)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        with model.sat_rows(length - k, length):
            rows = model.lm(inputs_embeds=model.embed(inputs[None]), attention_mask=mask).logits
        best_first = [sorted(range(len(row)), key=lambda v: -row[v]) for row in rows[0, -k:]]
        followed = ids[anchor + 2 : anchor + 2 + k].tolist()
        places.append([best_first[i].index(token) for i, token in enumerate(followed)])
    return places


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    k=st.integers(1, 4),
    head=st.sampled_from([0, 6]),
    length=st.integers(3, 9),
)
def test_candidates_are_those_of_plain_passes_head_or_no_head(seed, k, head, length):
    """Every place of the model's own answers, each in a pass of its own, sorted one by one."""
    decoder = with_adapter(
        tiny_llama(vocab=101, seed=seed % 3), k=k, seed=seed, strength=0.3, head=head
    )
    found = inspect(
        decoder,
        [(problem, []) for problem in PROBLEMS],
        InspectConfig(max_new_tokens=length, anchors=100),
    )
    places = []
    for prompt in PROMPTS:
        answer = decoder.generate(prompt, DecodeConfig(0, length)).token_ids
        places += ranks_by_plain_passes(
            decoder.model, torch.tensor(prompt + answer), len(prompt), k
        )
    own = found["own"]
    assert own["predictions"] == sum(map(len, places))
    assert own["proposed_per_loop"] == pytest.approx(own["predictions"] / len(places), abs=1e-4)
    for n in BEST:
        for depth in range(k):
            ranks = [place[depth] for place in places if len(place) > depth]
            share = sum(rank < n for rank in ranks) / max(1, len(ranks))
            assert own["among_best_by_depth"][str(n)][depth] == pytest.approx(share, abs=1e-4)
        leading = [
            next((i for i, rank in enumerate(place) if rank >= n), len(place)) for place in places
        ]
        accepted = sum(leading) / len(places)
        assert own["accepted_of_best"][str(n)] == pytest.approx(accepted, abs=1e-4)
    if not head:
        assert own["accuracy_by_depth"] == own["among_best_by_depth"]["1"]
        assert own["accepted_per_loop"] == own["accepted_of_best"]["1"]
    assert found["given"] is None
    console = Console(record=True, width=140)
    console.print(inspection_table(found))
    console.print(candidates_table(found))
    shown = console.export_text()
    assert f"{own['accepted_of_best']['64']:.2f}" in shown.splitlines()[-2]
    assert "given" not in shown.splitlines()[2] and "data mismatch" not in found["findings"][0]


def document(own, given, training, lost=(0.2, 0.5, 0.1), error=(0.01, 0.02, 0.03), path=2.0):
    figures = {"lost_by_depth": list(lost), "calibration_error_by_depth": list(error)}
    figures |= {"accepted_of_best": {"64": path}, "proposed_per_loop": 3.0}
    mine, theirs = ({**figures, "accepted_per_loop": value} for value in (own, given))
    return {"k": 3, "own": mine, "given": theirs, "training": training}


@pytest.mark.parametrize(
    ("own", "given", "training", "starts"),
    [
        (0.5, 1.5, 0.5, ["Data mismatch", "The same domain"]),
        (1.5, 1.4, 1.6, ["No data mismatch", "The same domain"]),
        (0.5, 0.4, 1.6, ["No data mismatch", "Another domain"]),
        (0.5, 0.4, None, ["No data mismatch", "Most chains break at depth 2: 50%"]),
    ],
)
def test_findings_name_the_fault(own, given, training, starts):
    lines = findings(document(own, given, training))
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=False))
    assert lines[-1].startswith("Confidence is well calibrated")
    assert "limit" in lines[-2]
    assert "depth 2" in findings(document(1, 1, 1, error=(0.0, 0.4, 0.2)))[-1]


@pytest.mark.parametrize(
    ("drafted", "path", "limit"),
    [(1.0, 2.5, "The choice among candidates (draft head) is"), (1.0, 1.5, "The SATs (body) are")],
)
def test_the_limit_is_where_more_drafts_are_lost(drafted, path, limit):
    lines = findings(document(drafted, drafted, None, path=path))
    assert lines[-2].startswith(limit) and f"{path:.2f}" in lines[-2]


def test_a_model_without_sats_is_refused():
    with one_line_error("model=plain", "no SAT"):
        inspect(decoder_of(tiny_llama(), name="plain"), [])
