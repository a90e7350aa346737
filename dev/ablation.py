"""Which recipe makes the best drafts: short training runs that differ from one base recipe in one
thing each.

    python dev/ablation.py OUT [VARIANT ...] [--data FOLDER] [--code FOLDER] [--steps N]
    python dev/ablation.py OUT --collect FILE.json

All runs see the same steps, sequences a step and held-out answers of the model's own; a run that is
done is not repeated.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sdsat.cli.program import run
from sdsat.config import SamplingConfig, TrainConfig, require
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.sequence import num_slots
from sdsat.engines.base import PassInput, probe_tokens
from sdsat.engines.drafting import Guesses
from sdsat.evaluation.records import environment
from sdsat.files import destination, write_json
from sdsat.method.layout import SatGroup
from sdsat.method.tree import make_tree
from sdsat.models.adapter import SatAdapter
from sdsat.models.adapter import load as load_adapter
from sdsat.models.embedded import BASE_NAME
from sdsat.models.loading import load
from sdsat.training.loop import train
from sdsat.training.shards import TrainingExample, read_sequences

HELD_OUT = 128
CONTEXT = 300
TURNS = 20
BASE = TrainConfig(anchors=48, warmup=16, held_out=HELD_OUT, eval_every=10**6)
ATTENTION = "q_proj,k_proj,v_proj,o_proj"
MLP = "gate_proj,up_proj,down_proj"
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "no head": {"head": 0},
    "rank 4": {"rank": 4},
    "rank 128": {"rank": 128},
    "targets attention": {"targets": ATTENTION},
    "targets mlp": {"targets": MLP},
    "k 5": {"k": 5},
    "k 9": {"k": 9},
    "k 11": {"k": 11},
    "no head, soft 0.5": {"head": 0, "soft": 0.5},
    "soft 1": {"soft": 1.0},
    "decay 0.8": {"decay": 0.8},
    "head 256": {"head": 256},
    "head 2048": {"head": 2048},
    "data code": {"data": "code"},
    "data 64": {"data": 64},
}


def sequences(choice: Any, own: list[TrainingExample], code: Path) -> list[TrainingExample]:
    """Held-out answers, then what is trained on: own answers, so many of them, or ground-truth code
    in pieces as long.
    """
    held_out = own[:HELD_OUT]
    rest = own[HELD_OUT:]
    if choice == "code":
        tokenizer = load(BASE_NAME).tokenizer
        length = sum(len(s.ids) for s in rest) // len(rest)
        return held_out + read_sequences(code, tokenizer, length)[: len(rest)]
    return held_out + (rest if choice is None else rest[:choice])


def _shape(adapter: SatAdapter) -> tuple[Any, ...]:
    return adapter.config.sat.k, adapter.config.rank, adapter.config.targets, adapter.config.head


def draft_milliseconds(adapters: dict[str, Path]) -> dict[str, float]:
    """What a draft step costs with each adapter, its SATs and head included: medians of turns that
    all take one after another.
    """
    decoder = Decoder.load(BASE_NAME, engine="transformers")
    engine = decoder.engine
    model = decoder.model
    times = {name: [] for name in adapters}
    loaded = {name: load_adapter(model.lm, path).fuse() for name, path in adapters.items()}
    tokens = probe_tokens(model, CONTEXT)
    cache = engine.new_cache(num_slots(CONTEXT, 256))
    engine.prefill(cache, tokens)
    with torch.inference_mode():
        for turn in range(TURNS + 2):
            for name, adapter in loaded.items():
                adapter.attach(model.lm)
                model.adapter = adapter
                model.sat = adapter.config.sat
                k = adapter.config.sat.k
                began = time.perf_counter()
                x = tokens[:1]
                root = make_tree("chain", 0)
                row = PassInput(cache, x.tolist(), root, (SatGroup(0, k),))
                out = engine.forward([row])
                chain = make_tree("chain", k)
                how = (0, SamplingConfig(), model.draft_ids)
                engine.draft(Guesses(x, out.states[1:], out.sat_logits, *how), chain)
                if turn > 1:
                    times[name].append(1000 * (time.perf_counter() - began))
                adapter.detach()
    shapes: dict[tuple[Any, ...], list[float]] = {}
    for (
        name,
        adapter,
    ) in loaded.items():  # what has the same shape costs the same: one figure for all of them
        shapes.setdefault(_shape(adapter), []).extend(times[name])
    return {
        name: round(statistics.median(shapes[_shape(adapter)]), 2)
        for name, adapter in loaded.items()
    }


def collect(out: Path, file: Path, steps: int) -> None:
    """Write what every finished variant reached, and what its draft step costs, to `file`."""
    names = [name for name in VARIANTS if (out / name / "adapter_config.json").exists()]
    costs = draft_milliseconds({name: out / name for name in names})
    found = {}
    for name in names:
        last = json.loads((out / name / "train_log.jsonl").read_text().splitlines()[-1])
        accepted = last["accepted_per_loop"]
        cost = costs[name]
        kept = {
            key: last[key]
            for key in ("accepted_per_loop", "accuracy_by_depth", "sat_predictions", "loss")
        }
        found[name] = {
            **kept,
            "draft_ms": cost,
            "accepted_per_draft_second": round(1000 * accepted / cost, 2),
        }
    head = {
        "schema_version": 1,
        "environment": environment(Decoder.load(BASE_NAME)),
        "held_out": HELD_OUT,
        "steps": steps,
    }
    write_json(file, {**head, "variants": found})


def main(
    out: Path,
    variants: Annotated[list[str] | None, typer.Argument(help="Default: all.")] = None,
    data: Path = Path("data/smollm2-135m-instruct"),
    code: Annotated[Path, typer.Option(help="Ground-truth code.")] = Path("runs/default/corpus"),
    steps: int = 120,
    collect_to: Annotated[
        Path | None, typer.Option("--collect", help="JSON file; trains nothing.")
    ] = None,
) -> None:
    """Train the variants that OUT lacks, or --collect its results."""
    if collect_to:
        destination(collect_to, "--collect")
        return collect(out, collect_to, steps)
    own = read_sequences(data, None)
    for name in variants or VARIANTS:
        require(name in VARIANTS, f"variant {name}: expected one of {', '.join(VARIANTS)}")
        settings = dict(VARIANTS[name])
        choice = settings.pop("data", None)
        if not (out / name / "adapter_config.json").exists():
            train(
                load(BASE_NAME),
                sequences(choice, own, code),
                out / name,
                replace(BASE, steps=steps, **settings),
            )


if __name__ == "__main__":
    run(main)
