"""What a forward pass of n tokens costs: verifying, drafting, and both with the base's linear layers as they are, not packed.

    python scripts/pass_cost.py [MODEL] [--dtype DTYPE] [--out FILE.json]

All variants take turns, so that noise hits all alike; medians of 20 turns, in milliseconds, after 300 tokens of context.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import sdsat
from sdsat.cache import SlotCache
from sdsat.cli import Device, Dtype, Model, run
from sdsat.decode import forward, num_slots, prefill, probe_rows
from sdsat.embedded import NAME
from sdsat.model import RowPolicy
from sdsat.records import environment, write_json
from sdsat.tree import make_tree

COUNTS, CONTEXT, TURNS = (1, 2, 4, 6, 8, 12, 16, 24, 36, 64), 300, 20


@torch.inference_mode()
def measure(model: sdsat.SatModel) -> dict[str, dict[int, float]]:
    """{variant: {n: median milliseconds}}."""
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(CONTEXT + max(COUNTS), device=model.device) * 7919 + 11) % vocabulary
    cache = SlotCache(model.model.config.num_hidden_layers, num_slots(CONTEXT, 256))
    prefill(model, cache, tokens[:CONTEXT])
    unpadded = RowPolicy(1, 1)

    def once(count: int, sats: int) -> float:
        began = time.perf_counter()
        forward(model, cache, unpadded, tokens[CONTEXT : CONTEXT + count], make_tree("chain", count - 1), sats)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return 1000 * (time.perf_counter() - began)

    found: dict[str, dict[int, float]] = {}
    for count in COUNTS:
        times: dict[str, list[float]] = {}
        for turn in range(TURNS + 2):
            for packed in (True, False) if model.packed else (False,):
                if model.packed:
                    model.packed.attach() if packed else model.packed.detach()
                for sats in (0, count - 1) if model.sat and count > 1 else (0,):
                    name = ("draft" if sats else "verify") + ("" if packed or not model.packed else ", plain layers")
                    taken = once(count, sats)
                    if turn > 1:
                        times.setdefault(name, []).append(taken)
        for name, values in times.items():
            found.setdefault(name, {})[count] = round(statistics.median(values), 2)
    if model.packed:
        model.packed.attach()
    return found


def main(model: Model = NAME, dtype: Dtype = "bfloat16", device: Device = "", out: Path | None = None) -> None:
    """Measure MODEL, print a table, and write it to --out."""
    loaded = sdsat.load(model, dtype, device)
    probe_rows(loaded)
    found = measure(loaded)
    table = Table(title=f"milliseconds a pass, {model}, {dtype}, {loaded.device}")
    for column in ("tokens", *found):
        table.add_column(column, justify="right")
    for count in COUNTS:
        table.add_row(str(count), *(f"{costs[count]:.1f}" if count in costs else "" for costs in found.values()))
    Console().print(table)
    if out:
        write_json(out, {"schema_version": 1, "environment": environment(loaded), "context": CONTEXT, "milliseconds": found})


if __name__ == "__main__":
    run(main)
