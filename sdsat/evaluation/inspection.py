"""Why acceptance is what it is: draft quality by depth, on the model's own and on given answers.

    sdsat inspect smollm2-135m-sdsat
    sdsat inspect smollm2-135m-sdsat --dataset everyday
    sdsat inspect runs/adapter --text my_prompts_and_completions.jsonl

Acceptance is measured against the model's own output. Drafts that are good on given text and bad on
the model's own were trained on the wrong data; bad on both, they were trained too little or on
another domain. Where the right token is among a SAT's best but is not drafted, the draft head is
the limit; where it is not among them, the SATs are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

from sdsat.config import require
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.records import record_head
from sdsat.evaluation.sweep import InspectConfig
from sdsat.models.head import SHORTLIST
from sdsat.models.sat_model import SatModel
from sdsat.tasks.prompts import Problem
from sdsat.training.evaluate import BEST, among_best, evaluate
from sdsat.training.loss import SatBatch, over_all, predict, sat_logits, sat_states
from sdsat.training.shards import TrainingExample


def inspect(
    decoder: Decoder,
    answered: list[tuple[Problem, list[int]]],
    config: InspectConfig | None = None,
) -> dict[str, Any]:
    """Evaluate drafts after prompts.

    Args:
        decoder: of a model with SATs.
        answered: problems, each with its given answer's ids, [] for none.
        config: how long answers may be, and at how many places they are evaluated.

    Returns:
        {"schema_version", "environment", "settings", "k": the model's, "own": ..., "given": ...,
        "decoding": ..., "training": ..., "findings": [lines]}. own and given: `evaluate` at as many
        places of the model's greedy answer and of the given one, with what `among_best` finds of
        the SATs without their head; given is None where no answers are. decoding: acceptance while
        those answers were made with k SATs; it is lower than at random places, because a loop
        begins where drafting has just failed. training: accepted drafts per loop on the adapter's
        held-out answers, where it says.

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
    own = []
    given = []
    accepted = torch.zeros(k)
    proposed = torch.zeros(k)
    loops = []
    for problem, answer in tqdm(answered, desc="inspect", unit="prompt", disable=None):
        prompt = list(problem.prompt_ids)
        ends = (model.stop_ids + problem.stop_ids, problem.stop_strings)
        out = decoder.generate(prompt, replace(config.plain(None, "", *ends), k=k))
        accepted += torch.tensor(out.accepted_by_depth)
        proposed += torch.tensor(out.proposed_by_depth)
        loops += out.accepted_lengths
        own.append(TrainingExample(torch.tensor(prompt + out.token_ids), len(prompt)))
        if answer:
            text = prompt + answer[: config.max_new_tokens]
            given.append(TrainingExample(torch.tensor(text), len(prompt)))

    of_checkpoint = (getattr(model.config, "sdsat", None) or {}).get("training", {})
    facts = model.adapter.config.training if model.adapter else of_checkpoint
    acceptance = (accepted / proposed.clamp(min=1)).tolist()

    document: dict[str, Any] = {
        **record_head(decoder, config),
        "k": k,
        "own": _figures(model, own, config.anchors),
        "given": _figures(model, given, config.anchors) if given else None,
        "decoding": {
            "acceptance_by_depth": [round(value, 4) for value in acceptance],
            "accepted_per_loop": round(sum(loops) / max(1, len(loops)), 4),
        },
        "training": facts.get("accepted_per_loop"),
    }
    return {**document, "findings": findings(document)}


def _figures(model: SatModel, sequences: list[TrainingExample], anchors: int) -> dict[str, Any]:
    """Evaluate drafts at so many places of each sequence, and the SATs without their head."""
    assert model.sat is not None
    where = (sequences, model.sat.k, model.device, anchors)
    passes = list[torch.Tensor]()  # states of the SATs, which take the time, batch by batch

    def without_head(batch: SatBatch) -> torch.Tensor:
        passes.append(sat_states(model, batch)[0])
        return over_all(*sat_logits(model, batch, passes[-1]), model.vocabulary)

    sats = among_best(without_head, *where)
    again = iter(passes)  # the places are the same ones
    return {**evaluate(lambda batch: predict(model, batch, next(again)), *where), **sats}


def findings(document: dict[str, Any]) -> list[str]:
    """Say what the figures of `inspect` mean, one sentence each."""
    own = document["own"]
    given = document["given"]
    training = document["training"]
    mine = own["accepted_per_loop"]
    theirs = given["accepted_per_loop"] if given else None
    lines = []
    if theirs is not None and theirs > 1.1 * mine:
        lines.append(
            f"Data mismatch: drafts fit the given text ({theirs:.2f} accepted) better than "
            "the model's own output "
            f"({mine:.2f}). Train on the model's own answers: sdsat distill."
        )
    elif theirs is not None:
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
    lines.append(_limit(own))
    gap = max(zip(own["calibration_error_by_depth"], range(1, document["k"] + 1), strict=True))
    lines.append(
        f"Confidence is {'well' if gap[0] < 0.1 else 'badly'} calibrated: at most "
        f"{gap[0]:.2f} off (depth {gap[1]})."
    )
    return lines


def _limit(own: dict[str, Any]) -> str:
    """Say whether more drafts are lost among the SATs' best tokens or for want of the right one."""
    drafted = own["accepted_per_loop"]
    best_path = own["accepted_of_best"][str(SHORTLIST)]
    proposed = own["proposed_per_loop"]
    by_choice = best_path - drafted > proposed - best_path
    limit = "The choice among candidates (draft head)" if by_choice else "The SATs (body)"
    return (
        f"{limit} {'is' if by_choice else 'are'} the limit: {drafted:.2f} of {proposed:.2f} "
        f"drafts are accepted, and {best_path:.2f} are on the best path among "
        f"{SHORTLIST} candidates each."
    )


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
        **({"given": given["accuracy_by_depth"]} if given else {}),
        "confidence": own["confidence_by_depth"],
        "off by": own["calibration_error_by_depth"],
        "lost here": own["lost_by_depth"],
        "decoding": decoding["acceptance_by_depth"],
    }
    accepted = {
        "own": own["accepted_per_loop"],
        **({"given": given["accepted_per_loop"]} if given else {}),
        "decoding": decoding["accepted_per_loop"],
    }
    return _by_depth(title, columns, accepted)


def candidates_table(document: dict[str, Any]) -> Table:
    """Make a table for a terminal: what is drafted, beside the SATs' best tokens, by depth."""
    title = (
        "own answers: how often the token that followed is drafted, and is among a SAT's best; "
        "drafts accepted if the right one were always chosen"
    )
    own = document["own"]
    names = {f"best {n}": str(n) for n in BEST}
    columns = {"drafted": own["accuracy_by_depth"]}
    accepted = {"drafted": own["accepted_per_loop"]}
    for name, n in names.items():
        columns[name] = own["among_best_by_depth"][n]
        accepted[name] = own["accepted_of_best"][n]
    return _by_depth(title, columns, accepted)


def _by_depth(title: str, columns: dict[str, list[float]], accepted: dict[str, float]) -> Table:
    """Make a table of one row a depth, and a last one with what is accepted in all.

    Args:
        title: of the table.
        columns: by name, one number a depth.
        accepted: of some of the columns.
    """
    table = Table(title=title, title_justify="left")
    for column in ("depth", *columns):
        table.add_column(column, justify="right")
    for depth, values in enumerate(zip(*columns.values(), strict=True), 1):
        table.add_row(str(depth), *(f"{value:.2f}" for value in values))
    table.add_section()
    cells = (f"{accepted[name]:.2f}" if name in accepted else "" for name in columns)
    table.add_row("accepted", *cells)
    return table
