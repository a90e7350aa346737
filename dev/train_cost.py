"""Training throughput and memory of three layouts of the same SAT groups: what sharing the base's
keys and values brings.

    python dev/train_cost.py [--data FOLDER] [--out FILE.json]

    own sequences   every group is a sequence of its own: its standard tokens again, then its SATs
    one pass        standard tokens and all groups of a sequence in one pass, kept for the
                    gradient (full mode's layout)
    shared          the base once, without gradients, and the groups on its keys and values
                    (adapter mode: loss.py)

Each in a process of its own, forward and backward over the same batches; the losses must agree.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sdsat.cli.program import run
from sdsat.config import SatConfig, TrainConfig
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.records import environment
from sdsat.files import destination, write_json
from sdsat.models.adapter import AdapterConfig, SatAdapter
from sdsat.models.embedded import BASE_NAME
from sdsat.training.loss import IGNORED, SatBatch, sat_batch, sat_loss, sat_mask
from sdsat.training.shards import read_sequences

LAYOUTS = ("own sequences", "one pass", "shared")
STEPS = 2
CONFIG = TrainConfig(anchors=48)


def own_sequences(batch: SatBatch, size: int = 8) -> list[SatBatch]:
    """The same groups as batches of `size` short sequences, which end at their anchors."""
    groups = []
    for b, r in ((batch.depth == 1) & (batch.label != IGNORED)).nonzero().tolist():
        end = r + 1
        while end < batch.depth.shape[1] and batch.depth[b, end] > 1:
            end += 1
        groups.append((b, slice(r, end)))
    groups.sort(key=lambda group: int(batch.anchor[group[0], group[1]][0]))
    parts = []
    for first in range(0, len(groups), size):
        rows = [
            [getattr(batch, name)[b, part] for b, part in groups[first : first + size]]
            for name in ("anchor", "depth", "label")
        ]
        anchor, depth, label = (
            torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filler)
            for values, filler in zip(rows, (0, 0, IGNORED), strict=True)
        )
        tokens = torch.stack(
            [batch.tokens[b, : int(anchor.max()) + 1] for b, _ in groups[first : first + size]]
        )
        parts.append(SatBatch(tokens, torch.full_like(tokens, IGNORED), anchor, depth, label))
    return parts


def measure(layout: str, data: Path, results: Any) -> None:
    """Put {seconds, predictions, loss, peak_mib, environment} into `results`."""
    decoder = Decoder.load(BASE_NAME)
    model = decoder.model
    sequences = read_sequences(data, None)
    adapter = SatAdapter(
        model.lm, AdapterConfig(BASE_NAME, SatConfig(49152, CONFIG.k), CONFIG.rank)
    ).float()
    adapter.attach(model.lm)
    model.adapter = adapter
    model.sat = adapter.config.sat

    def one_pass(batch: SatBatch) -> torch.Tensor:
        length = batch.tokens.shape[1]
        positions = torch.arange(length)
        causal = (positions <= positions[:, None]).expand(len(batch.tokens), 1, length, length)
        mask = torch.cat(
            [torch.nn.functional.pad(causal, (0, batch.depth.shape[1])), sat_mask(batch)], dim=2
        )
        ids = torch.cat(
            [batch.tokens, torch.full_like(batch.depth, adapter.config.sat.token_id)], dim=1
        )
        places = torch.cat([positions.expand(len(ids), length), batch.anchor + batch.depth], dim=1)
        with model.sat_rows(length, ids.shape[1]):
            masks = model.mask(mask, places, places)
            states = model.states(model.embed(ids), masks, places, None, use_cache=False)
        labelled = batch.label != IGNORED
        logits = model.lm.get_output_embeddings()(states[:, length:][labelled])
        return torch.nn.functional.cross_entropy(
            logits.float(), batch.label[labelled], reduction="sum"
        )

    def loss_and_gradients(batch: SatBatch) -> float:
        total = 0.0
        for part in own_sequences(batch) if layout == "own sequences" else [batch]:
            loss = sat_loss(model, part) if layout == "shared" else one_pass(part)
            loss.backward()
            total += loss.item()
        return total

    def batch_of(step: int, anchors: int) -> SatBatch:
        generators = [torch.Generator().manual_seed(2 * step + i) for i in range(2)]
        return sat_batch(
            sequences[2 * step : 2 * step + 2], CONFIG.k, anchors, CONFIG.keep, generators
        )

    loss_and_gradients(batch_of(0, 2))  # warms up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batches = [batch_of(step, CONFIG.anchors) for step in range(1, STEPS + 1)]
    predictions = sum(int((batch.label != IGNORED).sum()) for batch in batches)
    began = time.perf_counter()
    total = sum(loss_and_gradients(batch) for batch in batches)
    results[layout] = {
        "seconds": round(time.perf_counter() - began, 2),
        "predictions": predictions,
        "mean_loss": round(total / predictions, 4),
        "added_peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
    }
    results["environment"] = environment(decoder)


def main(data: Path = Path("data/smollm2-135m-instruct"), out: Path | None = None) -> None:
    """Measure the three layouts, print a table, and write it to --out."""
    if out is not None:
        destination(out, "--out")
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        for layout in LAYOUTS:
            process = context.Process(target=measure, args=(layout, data, results))
            process.start()
            process.join()
        found = dict(results)
    table = Table(title="training, default base, forward and backward")
    for column in ("layout", "SAT predictions/s", "ratio", "added peak memory, MiB", "mean loss"):
        table.add_column(column, justify="right")
    speed = {layout: found[layout]["predictions"] / found[layout]["seconds"] for layout in LAYOUTS}
    for layout in LAYOUTS:
        found[layout] |= {
            "predictions_per_second": round(speed[layout], 1),
            "ratio": round(speed[layout] / speed[LAYOUTS[0]], 2),
        }
        row = [
            found[layout][key]
            for key in ("predictions_per_second", "ratio", "added_peak_mib", "mean_loss")
        ]
        table.add_row(layout, *map(str, row))
    Console().print(table)
    if out:
        write_json(
            out, {"schema_version": 1, "environment": found.pop("environment"), "layouts": found}
        )


if __name__ == "__main__":
    run(main)
