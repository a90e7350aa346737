"""Inspection: its figures are those of decoding and of the loss's own evaluation, and its sentences
follow from them.
"""

from functools import partial

import pytest
import torch
from conftest import decoder_of, one_line_error, tiny_llama, with_adapter
from rich.console import Console

from sdsat.config import DecodeConfig
from sdsat.evaluation.inspection import findings, inspect, inspection_table
from sdsat.evaluation.sweep import InspectConfig
from sdsat.training.evaluate import evaluate
from sdsat.training.loss import predict
from sdsat.training.shards import Sequence

PROMPTS = ([5, 9, 2, 7], [11, 3])
GIVEN = ([4, 8] * 10, [6] * 20)


def test_own_output_is_what_ar_writes():
    decoder = with_adapter(tiny_llama(torch.float32), k=3, strength=0.1)
    config = InspectConfig(max_new_tokens=16, anchors=8)
    found = inspect(decoder, list(zip(PROMPTS, GIVEN, strict=True)), config)
    answers = [decoder.generate(prompt, DecodeConfig(0, 16)).token_ids for prompt in PROMPTS]
    for name, texts in (("own", answers), ("given", [answer[:16] for answer in GIVEN])):
        sequences = [
            Sequence(torch.tensor(p + t), len(p)) for p, t in zip(PROMPTS, texts, strict=True)
        ]
        assert found[name] == evaluate(
            partial(predict, decoder.model), sequences, 3, torch.device("cpu"), 8
        )
    loops = [
        n
        for prompt in PROMPTS
        for n in decoder.generate(prompt, DecodeConfig(3, 16)).accepted_lengths
    ]
    assert found["decoding"]["accepted_per_loop"] == pytest.approx(
        sum(loops) / len(loops), abs=1e-4
    )
    assert found["findings"] == findings(found)
    console = Console(record=True, width=140)
    console.print(inspection_table(found))
    assert f"{found['own']['accuracy_by_depth'][2]:.2f}" in console.export_text()


def document(own, given, training, lost=(0.2, 0.5, 0.1), error=(0.01, 0.02, 0.03)):
    figures = {"lost_by_depth": list(lost), "calibration_error_by_depth": list(error)}
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
    assert "depth 2" in findings(document(1, 1, 1, error=(0.0, 0.4, 0.2)))[-1]


def test_a_model_without_sats_is_refused():
    with one_line_error("model=plain", "no SAT"):
        inspect(decoder_of(tiny_llama(), name="plain"), [])
