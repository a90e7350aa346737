"""Which recipe makes the best drafts: short training runs that differ from one base recipe in one thing each.

    python scripts/ablation.py OUT [VARIANT ...] [--data FOLDER] [--code FOLDER] [--steps N] [--collect FILE.json]

All runs see the same steps, sequences a step and held-out answers of the model's own; a run that is done is not repeated, a
killed one resumes. `--collect` writes the results of all that are in OUT.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import sdsat
from sdsat.cli import run
from sdsat.config import TrainConfig, require
from sdsat.data import Sequence, read_sequences
from sdsat.records import environment, write_json
from sdsat.train import train

HELD_OUT = 128
BASE = TrainConfig(anchors=48, warmup=16, held_out=HELD_OUT, eval_every=10**6)
ATTENTION, MLP = "q_proj,k_proj,v_proj,o_proj", "gate_proj,up_proj,down_proj"
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "rank 4": {"rank": 4},
    "rank 16": {"rank": 16},
    "rank 64": {"rank": 64},
    "rank 128": {"rank": 128},
    "targets attention": {"targets": ATTENTION},
    "targets mlp": {"targets": MLP},
    "targets q, v": {"targets": "q_proj,v_proj"},
    "k 5": {"k": 5},
    "k 9": {"k": 9},
    "k 11": {"k": 11},
    "soft 0.5": {"soft": 0.5},
    "soft 1": {"soft": 1.0},
    "decay 0.8": {"decay": 0.8},
    "decay 0.6": {"decay": 0.6},
    "head 256": {"head": 256},
    "head 1024": {"head": 1024},
    "prefix 32": {"prefix": 32},
    "sat per depth": {"per_depth": True},
    "data code": {"data": "code"},
    "data 64": {"data": 64},
    "data 192": {"data": 192},
}


def sequences(choice: Any, own: list[Sequence], code: Path) -> list[Sequence]:
    """Held-out answers, then what is trained on: own answers, so many of them, or ground-truth code in pieces as long."""
    held_out, rest = own[:HELD_OUT], own[HELD_OUT:]
    if choice == "code":
        tokenizer = sdsat.load("smollm2-135m-instruct").tokenizer
        length = sum(len(s.ids) for s in rest) // len(rest)
        return held_out + read_sequences(code, tokenizer, length)[: len(rest)]
    return held_out + (rest if choice is None else rest[:choice])


def main(
    out: Path,
    variants: Annotated[list[str] | None, typer.Argument()] = None,
    data: Path = Path("data/smollm2-135m-instruct"),
    code: Path = Path("runs/default/corpus"),
    steps: int = 120,
    collect: Path | None = None,
) -> None:
    own = read_sequences(data, None)
    for name in variants or ():
        require(name in VARIANTS, f"variant {name}: expected one of {', '.join(VARIANTS)}")
        settings = dict(VARIANTS[name])
        choice = settings.pop("data", None)
        config = replace(BASE, steps=steps, **settings)
        if not (out / name / "adapter_config.json").exists():
            train(sdsat.load("smollm2-135m-instruct"), sequences(choice, own, code), out / name, config)
    if collect:
        found = {
            name: json.loads((out / name / "train_log.jsonl").read_text().splitlines()[-1])
            for name in VARIANTS
            if (out / name).exists()
        }
        write_json(
            collect,
            {
                "schema_version": 1,
                "environment": environment(sdsat.load("smollm2-135m-instruct")),
                "steps": steps,
                "variants": found,
            },
        )


if __name__ == "__main__":
    run(main)
