"""What a pass costs in models of CodeLlama's sizes, and the speed-up that would follow: a
projection, not a measurement.

    python dev/projection.py --shape 7b | 13b | tiny [--summary SUMMARY.json] [--device GPU]
    [--out FILE.json]

Measured: passes of n tokens, choosing the next ones included, with random weights of the published
shapes in float16, medians of 20 turns, beside the memory-bandwidth floor (the weights' bytes at the
rate of a copy on the device), and drafting by a group of k SATs. Projected from these: speed-ups
over plain decoding, with the acceptance of --summary (`sdsat bench`, measured on another, smaller
model) and with 4 of 5 drafts accepted, beside what the paper (arXiv 2403.18647) reports. `tiny`:
for tests.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from sdsat.cli.options import Device
from sdsat.cli.program import run
from sdsat.config import SamplingConfig, SatConfig, require
from sdsat.decoding.decoder import Decoder
from sdsat.engines.base import Engine, PassInput, probe_tokens
from sdsat.engines.drafting import Guesses
from sdsat.engines.graphs import CudaCapture, Graphs, padded
from sdsat.engines.transformers import TransformersEngine
from sdsat.evaluation.records import environment
from sdsat.files import destination, read_json, write_json
from sdsat.method.layout import SatGroup
from sdsat.method.tree import make_tree
from sdsat.models import attention
from sdsat.models.devices import pick_devices
from sdsat.models.sat_model import SatModel

# Hidden and inner size, layers, heads.
SHAPES = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40), "tiny": (64, 128, 2, 4)}
CLAIMS = {"7b": 3.0, "13b": 3.5}  # the paper's speed-ups are 'over' these
COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
CONTEXTS = (512, 2048)
DEPTHS = (5, 7)
TURNS = 20
SUMMARY = Path(__file__).parent.parent / "results/reference/smollm2-135m-sdsat/greedy/summary.json"
VOCABULARY = 32016
SAT_ID = 32011


def make_decoder(shape: str, device: torch.device) -> Decoder:
    """Random weights on the device; the SAT in the vocabulary, as in the paper's models."""
    hidden, inner, layers, heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    with device:
        lm = AutoModelForCausalLM.from_config(
            config, dtype=torch.float16, attn_implementation=attention.NAME
        )
    model = SatModel(
        lm.eval().requires_grad_(False), None, f"random-{shape}", SatConfig(SAT_ID, max(DEPTHS))
    )
    graphs = Graphs(CudaCapture(device)) if device.type == "cuda" else None
    return Decoder(model, TransformersEngine(model, graphs=graphs))


def milliseconds(device: torch.device, work: Any) -> float:
    """Of one call, until the device has finished."""
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    began = time.perf_counter()
    work()
    finish()
    return 1000 * (time.perf_counter() - began)


@torch.inference_mode()
def measure_passes(engine: Engine, context: int) -> dict[int, float]:
    """{n: milliseconds of a pass of n tokens after `context` others, its choice read by the host};
    counts take turns.
    """
    device = engine.model.device
    tokens = probe_tokens(engine.model, context + max(COUNTS))
    cache = engine.new_cache(context + max(COUNTS) + 16)
    engine.prefill(cache, tokens[:context])

    def once(count: int) -> None:
        # a tree has 96 at most; the others are SATs, which cost the same here
        nodes = min(count, 64)
        groups = (SatGroup(0, count - nodes),) if count > nodes else ()
        part = tokens[context : context + nodes].tolist()
        chain = PassInput(cache, part, make_tree("chain", nodes - 1), groups)
        engine.largest(engine.forward([chain]).logits, 1)[1].tolist()

    times: dict[int, list[float]] = {count: [] for count in COUNTS}
    for turn in range(TURNS + 2):
        for count in COUNTS:
            taken = milliseconds(device, lambda count=count: once(count))
            if turn > 1:
                times[count].append(taken)
    return {count: round(statistics.median(taken), 4) for count, taken in times.items()}


@torch.inference_mode()
def measure_drafting(engine: Engine, k: int) -> float:
    """Milliseconds to turn the logits of a group of k SATs into drafts."""
    model = engine.model
    hidden = model.config.hidden_size
    states = torch.randn(k, hidden, device=model.device).to(model.dtype)
    logits = torch.randn(k, VOCABULARY, device=model.device).to(model.dtype)
    x = torch.zeros(1, dtype=torch.long, device=model.device)
    chain = make_tree("chain", k)
    guesses = Guesses(x, states, logits, 0, SamplingConfig())
    taken = [
        milliseconds(model.device, lambda: engine.draft(guesses, chain)) for _ in range(TURNS + 2)
    ]
    return round(statistics.median(taken[2:]), 4)


def floor_of(model: SatModel) -> tuple[int, float]:
    """(bytes of the weights that a pass reads, bytes a second that the device reads and writes: the
    fastest of ten copies).
    """
    size = sum(
        p.numel() * p.element_size()
        for name, p in model.lm.named_parameters()
        if "embed_tokens" not in name
    )
    # 1 GiB, 64 MiB
    source = torch.ones(2**28 if model.device.type == "cuda" else 2**24, device=model.device)
    target = torch.empty_like(source)
    best = min(milliseconds(model.device, lambda: target.copy_(source)) for _ in range(10))
    return size, 2 * source.numel() * source.element_size() / best * 1000


def measured_acceptance(summary: Path) -> dict[int, float]:
    """{k: accepted drafts a loop of the two-step runs}, by depth summed; a missing k is read from a
    deeper run. Raises InputError where no run is as deep as the deepest k.
    """
    document = read_json(summary)
    runs = document.get("runs", []) if isinstance(document, dict) else []
    by_depth = {
        each["k"]: each["acceptance_by_depth"] for each in runs if each["strategy"] == "two-step"
    }
    require(
        max(by_depth, default=0) >= max(DEPTHS),
        f"--summary={summary}: no two-step run with k={max(DEPTHS)} or more",
    )
    return {k: sum(by_depth[min(depth for depth in by_depth if depth >= k)][:k]) for k in DEPTHS}


def four_of_five() -> dict[int, float]:
    """{k: accepted drafts} where every draft is right, given those before, with the one probability
    that accepts 4 of 5.
    """
    low = 0.0
    high = 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(1, 6)) < 4 else (low, middle)
    return {k: sum(low**i for i in range(1, k + 1)) for k in DEPTHS}


def project(
    passes: dict[int, float], drafting: dict[int, float], acceptance: dict[int, float]
) -> list[dict[str, Any]]:
    """Of two-step (a draft and a verify pass of 1 + k rows) and one-pass (k + 1 nodes with k SATs
    at each).
    """
    projections = []
    for k in DEPTHS:
        two_step = 2 * passes[padded(1 + k)] + drafting[k]
        one_pass = passes[padded((k + 1) ** 2)] + (k + 1) * drafting[k]
        accepted = acceptance[k]
        for strategy, rows, tokens, cost in (
            ("two-step", 1 + k, 2 + accepted, two_step),
            ("one-pass", (k + 1) ** 2, 1 + accepted, one_pass),
        ):
            found = {
                "strategy": strategy,
                "k": k,
                "rows": rows,
                "accepted": round(accepted, 3),
                "tokens": round(tokens, 3),
            }
            speedup = round(tokens * passes[1] / cost, 3)
            projections.append(
                {
                    "is_projection": True,
                    **found,
                    "milliseconds": round(cost, 4),
                    "projected_speedup": speedup,
                }
            )
    return projections


def show(document: dict[str, Any]) -> None:
    console = Console()
    shape = document["shape"]
    floor = document["floor_milliseconds"]
    console.width = max(console.width, 120)
    title = (
        f"measured: {shape}, random weights, float16, "
        f"{document['environment']['device_name']}; floor "
        f"{floor:.2f} ms"
    )
    curves = {held["context"]: held for held in document["curves"]}
    columns = [f"{part} after {context}" for context in curves for part in ("ms", "times floor,")]
    table = Table("tokens", *columns, title=title, title_justify="left")
    for i, count in enumerate(COUNTS):
        pairs = [
            (f"{held['milliseconds'][i]:.2f}", f"{held['times_floor'][i]:.2f}")
            for held in curves.values()
        ]
        table.add_row(str(count), *(cell for pair in pairs for cell in pair))
    console.print(table)
    claim = f"over {CLAIMS[shape]}x" if shape in CLAIMS else ""
    columns = [
        "acceptance",
        "context",
        "strategy",
        "k",
        "rows",
        "accepted",
        "projected speed-up",
        "paper reports",
    ]
    table = Table(
        *columns,
        title=f"PROJECTION for {shape}: not a measurement of any trained model",
        title_justify="left",
    )
    for row in document["projections"]:
        cells = [str(row[key]) for key in ("acceptance", "context", "strategy", "k", "rows")]
        table.add_row(*cells, f"{row['accepted']:.2f}", f"{row['projected_speedup']:.2f}", claim)
    console.print(table)


def main(
    shape: Annotated[str, typer.Option(help="7b, 13b or tiny.")],
    summary: Annotated[
        Path, typer.Option(help="summary.json of a greedy bench with two-step runs.")
    ] = SUMMARY,
    device: Device = "",
    out: Path | None = None,
) -> None:
    """Measure, print both tables, and write all to --out."""
    require(shape in SHAPES, f"--shape={shape}: expected one of {', '.join(SHAPES)}")
    if out is not None:
        destination(out, "--out")
    measured = measured_acceptance(summary)
    decoder = make_decoder(shape, pick_devices(device)[0])
    engine = decoder.engine
    size, rate = floor_of(decoder.model)
    floor = 1000 * size / rate
    _ = engine.row_policy  # passes are padded as this finds, in every strategy
    drafting = {k: measure_drafting(engine, k) for k in DEPTHS}
    curves = []
    projections = []
    for context in CONTEXTS:
        passes = measure_passes(engine, context)
        times = [round(taken / floor, 4) for taken in passes.values()]
        curves.append(
            {"context": context, "milliseconds": list(passes.values()), "times_floor": times}
        )
        for name, acceptance in (("of --summary", measured), ("4 of 5", four_of_five())):
            head = {"acceptance": name, "context": context, "paper_reports_over": CLAIMS.get(shape)}
            projections += [{**head, **found} for found in project(passes, drafting, acceptance)]
    document = {
        "schema_version": 1,
        "environment": environment(decoder),
        "note": (
            "curves are measured with random weights; projections are computed from them "
            "and "
            "measured on no "
            "trained model"
        ),
        "shape": shape,
        "summary": str(summary),
        "weight_bytes": size,
        "bytes_per_second": round(rate),
        "floor_milliseconds": round(floor, 4),
        "drafting_milliseconds": drafting,
        "counts": COUNTS,
        "curves": curves,
        "projections": projections,
    }
    if out:
        write_json(out, document)
    show(document)


if __name__ == "__main__":
    run(main)
