"""Where the time goes: within a pass of the native engine (by Linux perf, where it is installed),
and within a generation.

python scripts/profile_passes.py [MODEL] [--out FILE.json]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sdsat.cli.options import Model
from sdsat.cli.program import run
from sdsat.config import DecodeConfig
from sdsat.decoding import auto_planner, fixed_planner
from sdsat.decoding.decoder import Decoder
from sdsat.engines.base import Engine, PassInput, probe_tokens
from sdsat.evaluation.records import environment
from sdsat.files import destination, write_json
from sdsat.method.layout import SatGroup
from sdsat.method.tree import make_tree
from sdsat.tasks.prompts import humaneval

CONTEXT = 256
SHAPES = ((1, 0), (6, 0), (6, 5), (16, 0))  # rows, SATs among them
NEW_TOKENS = 200  # of a generation
PARTS = {
    "rows into 8 bits": r"\bQuantizer\b",
    "linear layers": r"\b(multiply_\w+|LinearShare|LowRank)<",
    "norms": r"\brms_norm<",
    "waiting for the other threads": r"0x[0-9a-f]{16}|gomp|\bBarrier\b",
    "attention, rotary embedding, activations, cache": r"\b(forward|attend\w*|attention_layer|"
    r"rotate\w*|softmax|score_slots|add_values|gather_values|gate_and_up)<",
}


@torch.inference_mode()
def shares_of_pass(engine: Engine, rows: int, sats: int) -> dict[str, float]:
    """The share of samples in each part, over two seconds of passes."""
    nodes = rows - sats
    tokens = probe_tokens(engine.model, CONTEXT + nodes)
    cache = engine.new_cache(CONTEXT + rows)
    engine.prefill(cache, tokens[:CONTEXT])
    groups = (SatGroup(nodes - 1, sats),) if sats else ()
    part = PassInput(cache, tokens[CONTEXT:].tolist(), make_tree("chain", nodes - 1), groups)
    with tempfile.NamedTemporaryFile() as file:
        record = ["perf", "record", "-q", "-o", file.name, "-p", str(os.getpid())]
        with subprocess.Popen(record, stderr=subprocess.DEVNULL) as perf:
            end = time.perf_counter() + 3
            while time.perf_counter() < end:
                engine.forward([part])
            perf.terminate()
        report = [
            "perf",
            "report",
            "-i",
            file.name,
            "--no-children",
            "--sort",
            "dso,symbol",
            "--percent-limit",
            "0.05",
        ]
        text = subprocess.run(report, capture_output=True, text=True).stdout
    shares = dict.fromkeys([*PARTS, "Python, torch and the system"], 0.0)
    for line in text.splitlines():
        if found := re.match(r"\s+([\d.]+)%\s+(.*)", line):
            name = next(
                (name for name, pattern in PARTS.items() if re.search(pattern, found[2])),
                "Python, torch and the system",
            )
            shares[name] += float(found[1]) / 100
    return {name: round(share, 3) for name, share in shares.items()}


def shares_of_generation(
    decoder: Decoder, prompt: list[int], config: DecodeConfig
) -> dict[str, float]:
    """The share of decode seconds spent in each of a generation's steps."""
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = function(*args, **kwargs)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            return out

        return call

    steps = {"forward": "passes", "draft": "draft head", "next_tokens": "choosing tokens"}
    engine = decoder.engine
    kinds = (fixed_planner.FixedPlanner, auto_planner.AutoPlanner)
    plans = {
        (kind, name): getattr(kind, name) for kind in kinds for name in ("draft_first", "plan")
    }
    try:
        for name, label in steps.items():
            setattr(engine, name, timed(label, getattr(engine, name)))
        for (kind, name), plan in plans.items():
            setattr(kind, name, timed("planning", plan))
        out = decoder.generate(prompt, config)
    finally:
        for name in steps:
            delattr(engine, name)  # the class's own is there again
        for (kind, name), plan in plans.items():
            setattr(kind, name, plan)
    shares = {name: round(seconds / out.decode_seconds, 3) for name, seconds in spent.items()}
    return {**shares, "the loop itself": round(1 - sum(spent.values()) / out.decode_seconds, 3)}


def main(model: Model = "smollm2-135m-sdsat", out: Path | None = None) -> None:
    """Profile MODEL in bfloat16 on the CPU, print two tables, and write them to --out."""
    if out is not None:
        destination(out, "--out")
    decoder = Decoder.load(model, "bfloat16", "cpu")
    document: dict[str, Any] = {
        "schema_version": 1,
        "environment": environment(decoder),
        "context": CONTEXT,
    }
    prompt = list(humaneval(decoder.model.tokenizer, 1)[0].prompt_ids)
    found = {}
    for name, k in (("ar", 0), ("two-step", 5), ("rounded", 5), ("auto", 7)):
        config = DecodeConfig(k, NEW_TOKENS, strategy=name if k else "two-step")
        decoder.generate(prompt, config)
        found[name] = shares_of_generation(decoder, prompt, config)
    document["generation"] = found
    if decoder.engine.name == "native" and shutil.which("perf"):
        document["pass"] = {
            f"{rows} rows, {sats} SATs": shares_of_pass(decoder.engine, rows, sats)
            for rows, sats in SHAPES
        }
    else:
        print("no native engine, or no Linux perf: shares within a pass are left out")
    for title in ("generation", "pass"):
        columns = document.get(title, {})
        table = Table("share of", *columns, title=title, title_justify="left")
        for row in dict.fromkeys(key for shares in columns.values() for key in shares):
            table.add_row(
                row, *(f"{shares[row]:.1%}" if row in shares else "" for shares in columns.values())
            )
        Console().print(table)
    if out:
        write_json(out, document)


if __name__ == "__main__":
    run(main)
