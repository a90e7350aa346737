"""Why acceptance is what it is: draft quality by depth, on the model's own and on given answers.

    sdsat inspect smollm2-135m-sdsat
    sdsat inspect runs/adapter --text my_prompts_and_completions.jsonl

Acceptance is measured against the model's own output. Drafts that are good on given text and bad on
the model's own were trained on the wrong data; bad on both, they were trained too little or on
another domain.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

from sdsat.config import require
from sdsat.decoding.loop import Decoder
from sdsat.evaluation.sweep import InspectConfig
from sdsat.training.evaluate import evaluate
from sdsat.training.loss import predict
from sdsat.training.shards import Sequence


def inspect(
    decoder: Decoder,
    answered: list[tuple[list[int], list[int]]],
    config: InspectConfig | None = None,
) -> dict[str, Any]:
    """Evaluate drafts after prompts.

    Args:
        decoder: of a model with SATs.
        answered: (prompt ids, given answer's ids).
        config: how long answers may be, and at how many places they are evaluated.

    Returns:
        {"k": the model's, "own": ..., "given": ..., "decoding": ..., "training": ..., "findings":
        [lines]}. own and given: `evaluate` at the same number of places of the model's greedy
        answer and of the given one. decoding: acceptance while those answers were made with k SATs;
        it is lower than at random places, because a loop begins where drafting has just failed.
        training: accepted drafts per loop on the adapter's held-out answers, where it says.

    Raises:
        InputError: for a model without SATs.
    """
    config = config or InspectConfig()
    model = decoder.model
    require(
        model.sat is not None,
        f"model={model.name}: has no SAT to inspect; expected an adapter or an SDSAT checkpoint",
    )
    assert model.sat is not None
    k = model.sat.k
    decode = replace(config.plain(stop_ids=model.stop_ids), k=k)
    own = []
    given = []
    accepted = torch.zeros(k)
    proposed = torch.zeros(k)
    loops = []
    for prompt, answer in tqdm(answered, desc="inspect", unit="prompt", disable=None):
        out = decoder.generate(prompt, decode)
        accepted += torch.tensor(out.accepted_by_depth)
        proposed += torch.tensor(out.proposed_by_depth)
        loops += out.accepted_lengths
        own.append(Sequence(torch.tensor(prompt + out.token_ids), len(prompt)))
        given.append(Sequence(torch.tensor(prompt + answer[: config.max_new_tokens]), len(prompt)))

    of_checkpoint = (getattr(model.config, "sdsat", None) or {}).get("training", {})
    facts = model.adapter.config.training if model.adapter else of_checkpoint
    acceptance = (accepted / proposed.clamp(min=1)).tolist()
    predicted = partial(predict, model)
    document: dict[str, Any] = {
        "k": k,
        "own": evaluate(predicted, own, k, model.device, config.anchors),
        "given": evaluate(predicted, given, k, model.device, config.anchors),
        "decoding": {
            "acceptance_by_depth": [round(value, 4) for value in acceptance],
            "accepted_per_loop": round(sum(loops) / max(1, len(loops)), 4),
        },
        "training": facts.get("accepted_per_loop"),
    }
    return {**document, "findings": findings(document)}


def findings(document: dict[str, Any]) -> list[str]:
    """Say what the figures of `inspect` mean, one sentence each."""
    own = document["own"]
    given = document["given"]
    training = document["training"]
    mine = own["accepted_per_loop"]
    theirs = given["accepted_per_loop"]
    lines = []
    if theirs > 1.1 * mine:
        lines.append(
            f"Data mismatch: drafts fit the given text ({theirs:.2f} accepted) better than "
            "the model's own output "
            f"({mine:.2f}). Train on the model's own answers: sdsat distill."
        )
    else:
        lines.append(
            f"No data mismatch: {mine:.2f} accepted on the model's own output, "
            f"{theirs:.2f} on the given text."
        )
    if training is not None:
        far = mine < 0.8 * training
        lines.append(
            f"{'Another domain' if far else 'The same domain'}: {training:.2f} accepted on "
            "held-out training answers, "
            f"{mine:.2f} here." + (" Distil prompts like these." if far else "")
        )
    worst = max(range(document["k"]), key=lambda i: own["lost_by_depth"][i])
    lines.append(
        f"Most chains break at depth {worst + 1}: {own['lost_by_depth'][worst]:.0%} of all."
    )
    gap = max(zip(own["calibration_error_by_depth"], range(1, document["k"] + 1), strict=True))
    lines.append(
        f"Confidence is {'well' if gap[0] < 0.1 else 'badly'} calibrated: at most "
        f"{gap[0]:.2f} off (depth {gap[1]})."
    )
    return lines


def inspection_table(document: dict[str, Any]) -> Table:
    """Make a table for a terminal, one row a depth."""
    title = (
        "accuracy of drafts on own and given answers, confidence, chains lost, and acceptance "
        "in decoding"
    )
    own = document["own"]
    given = document["given"]
    decoding = document["decoding"]
    columns = {
        "own": own["accuracy_by_depth"],
        "given": given["accuracy_by_depth"],
        "confidence": own["confidence_by_depth"],
        "off by": own["calibration_error_by_depth"],
        "lost here": own["lost_by_depth"],
        "decoding": decoding["acceptance_by_depth"],
    }
    accepted = {
        "own": own["accepted_per_loop"],
        "given": given["accepted_per_loop"],
        "decoding": decoding["accepted_per_loop"],
    }
    table = Table(title=title, title_justify="left")
    for column in ("depth", *columns):
        table.add_column(column, justify="right")
    for i in range(document["k"]):
        table.add_row(str(i + 1), *(f"{values[i]:.2f}" for values in columns.values()))
    table.add_section()
    cells = (f"{accepted[name]:.2f}" if name in accepted else "" for name in columns)
    table.add_row("accepted", *cells)
    return table
