"""What a forward pass of n tokens costs, verifying and drafting: in the native engine or CUDA
graphs, and without either.

    python scripts/pass_cost.py [MODEL] [--dtype DTYPE] [--busy N] [--turns N] [--out FILE.json]

Counts of rows take turns, and at each count all contexts (256 to 4096 tokens) and both engines, so
that noise hits all alike; medians of all turns, in milliseconds. Beside them the memory-bandwidth
floor: the time to read as many bytes as the weights have. --busy N keeps N processes at work
meanwhile, as other programs do on a machine that is not ours alone; then the fastest engine alone
is measured, after 256 tokens. (With transformers' modules beside it a run had not ended after five
minutes.)
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from sdsat.cli.options import Device, Dtype, Model
from sdsat.cli.program import run
from sdsat.decoding.decoder import Decoder
from sdsat.engines.base import Engine, PassInput, probe_tokens
from sdsat.evaluation.records import environment
from sdsat.files import destination, write_json
from sdsat.method.layout import SatGroup
from sdsat.method.tree import make_tree
from sdsat.models.int8 import Int8Linear
from sdsat.models.sat_model import SatModel

COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 36, 64)
CONTEXTS = (256, 1024, 4096)
Times = dict[str, dict[int, float]]  # {variant: {n: milliseconds}}


@torch.inference_mode()
def measure(
    engines: dict[str, Engine], contexts: dict[int, tuple[int, ...]], turns: int
) -> dict[int, Times]:
    """Medians for every engine. contexts: {tokens before the pass: counts of rows}."""
    times: dict[tuple[int, str, int], list[float]] = {}
    caches = {}
    rows = max(map(max, contexts.values()))
    for (name, engine), context in product(engines.items(), contexts):
        tokens = probe_tokens(engine.model, max(contexts) + rows)
        caches[name, context] = engine.new_cache(context + rows + 16)
        engine.prefill(caches[name, context], tokens[:context])

    def once(name: str, context: int, count: int, sats: int, rounded: bool) -> float:
        engine = engines[name]
        nodes = count - sats
        part = tokens[context : context + nodes].tolist()
        groups = (SatGroup(0, sats),) if sats else ()
        cache = caches[name, context]
        began = time.perf_counter()
        chain = PassInput(cache, part, make_tree("chain", nodes - 1), groups)
        engine.forward([chain], rounded=rounded)
        engine.synchronize()
        return 1000 * (time.perf_counter() - began)

    for turn in range(turns + 2):
        for count in dict.fromkeys(count for counts in contexts.values() for count in counts):
            for context, (name, engine) in product(
                (c for c in contexts if count in contexts[c]), engines.items()
            ):
                kinds = {"verify": (0, False)}
                if engine.model.sat and count > 1:
                    kinds["draft"] = (count - 1, False)
                    if engine.has_rounded:
                        kinds["draft, rounded"] = (count - 1, True)
                for kind, (sats, rounded) in kinds.items():
                    taken = once(name, context, count, sats, rounded)
                    if turn > 1:
                        times.setdefault((context, f"{kind}, {name}", count), []).append(taken)
    found: dict[int, Times] = {context: {} for context in contexts}
    for (context, variant, count), values in sorted(times.items(), key=lambda item: item[0][2]):
        found[context].setdefault(variant, {})[count] = round(statistics.median(values), 2)
    return found


def weight_bytes(model: SatModel) -> int:
    """Bytes of the weights that a pass of one row reads: all but the embeddings' other rows."""
    lm: Any = model.lm
    head = lm.get_output_embeddings().weight
    inner = [p for name, p in lm.base_model.named_parameters() if "embed" not in name]
    every = {p.data_ptr(): p.nbytes for p in [head, *inner]}
    for layer in lm.modules():
        if isinstance(layer, Int8Linear):
            every[layer.weight.data_ptr()] = layer.num_bytes
    return sum(every.values())


def read_seconds(size: int, device: torch.device) -> float:
    """Seconds to read so many bytes: the fastest of ten sums over one tensor."""
    block = torch.ones(size // 8, dtype=torch.int64, device=device)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        block.sum()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


@contextmanager
def others_at_work(count: int) -> Iterator[None]:
    """Within this block, so many processes are never idle."""
    work = (
        f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # and no longer than this process
    )
    busy = [
        subprocess.Popen([sys.executable, "-c", work], start_new_session=True) for _ in range(count)
    ]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main(
    model: Model = "smollm2-135m-sdsat",
    dtype: Dtype = "bfloat16",
    device: Device = "",
    busy: Annotated[int, typer.Option(min=0, help="Processes that are at work beside.")] = 0,
    turns: Annotated[int, typer.Option(min=1)] = 20,
    out: Path | None = None,
) -> None:
    """Measure MODEL, print a table for each context, and write all to --out."""
    if out is not None:
        destination(out, "--out")
    best = Decoder.load(model, dtype, device)
    engines = {best.engine.name: best.engine}
    if not busy and "transformers" not in engines:
        plain = Decoder.load(model, dtype, device, engine="transformers", graphs=False)
        engines["transformers"] = plain.engine
    first = best.model
    weights = weight_bytes(first)
    floor = round(1000 * read_seconds(weights, first.device), 2)
    contexts = {
        context: COUNTS if context == CONTEXTS[0] else COUNTS[:6]
        for context in CONTEXTS[: 1 if busy else None]
    }
    with others_at_work(busy):
        measured = measure(engines, contexts, turns)
    for context, found in measured.items():
        beside = f", beside {busy} busy processes" if busy else ""
        title = (
            f"milliseconds a pass after {context} tokens, {model}, {dtype}, {first.device}{beside}"
        )
        table = Table(title=title, title_justify="left")
        for column in ("tokens", *found):
            table.add_column(column, justify="right")
        for count in contexts[context]:
            table.add_row(
                str(count),
                *(f"{costs[count]:.1f}" if count in costs else "" for costs in found.values()),
            )
        Console().print(table)
    print(f"memory-bandwidth floor: {weights / 1e6:.0f} MB of weights, {floor:.1f} ms")
    if out:
        head = {
            "schema_version": 3,
            "environment": environment(best),
            "busy": busy,
            "turns": turns,
            "weight_bytes": weights,
            "floor_milliseconds": floor,
        }
        write_json(
            out,
            {
                **head,
                "contexts": [
                    {"context": c, "milliseconds": found} for c, found in measured.items()
                ],
            },
        )


if __name__ == "__main__":
    run(main)
