"""Throughput against batch size: tokens/s over all sequences, for AR and for SDSAT, and where SDSAT
stops paying.

    python scripts/batch_throughput.py [MODEL] [--sizes 1,2,4,8,16,32] [--strategy two-step:3 ...]
    [--prompts N] [--out FILE.json]

The same HumanEval prompts, greedy, at every batch size: N prompts wait, and as many as the batch
size are decoded at once. At each batch size all strategies take turns, in an order that rotates;
ratios are of the same turn. Seconds are those of whole calls, prefill included. At the end of a
call no prompt waits any more and batches get smaller: take prompts for several batches of the
largest size. The same command resumes an interrupted run.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sdsat.cli.options import Device, Dtype, Model
from sdsat.cli.program import run
from sdsat.config import DecodeConfig, beside, decode_config_of, require
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.records import environment, resumed
from sdsat.files import sha256_of, write_json
from sdsat.models.embedded import NAME
from sdsat.tasks.prompts import WARM_UP, encode_prompt, humaneval

AR = "ar"
WARM_UP_TOKENS = 12
STRATEGIES = ("two-step:3", "rounded:3", "auto")
COLUMNS = (
    "batch size",
    "strategy",
    "tokens/s",
    "over ar",
    "of each turn",
    "over ar, batch size 1",
    "tokens/pass",
    "as ar",
)


def measure(
    decoder: Decoder, prompts: list[list[int]], config: DecodeConfig, size: int
) -> dict[str, Any]:
    """One call over all prompts, `size` at once. tokens/pass: of one sequence."""
    began = time.perf_counter()
    outs = decoder.generate_batch(prompts, config, batch_size=size)
    seconds = time.perf_counter() - began
    ids = [out.token_ids for out in outs]
    return {
        "seconds": round(seconds, 6),
        "num_new_tokens": sum(map(len, ids)),
        "num_passes": sum(out.num_passes for out in outs),
        "outputs_sha256": [
            hashlib.sha256(" ".join(map(str, each)).encode()).hexdigest()[:16] for each in ids
        ],
    }


def summarize(document: dict[str, Any]) -> dict[str, Any]:
    """Figures for each batch size and strategy over the turns, and the first size at which a
    strategy is no faster than AR.
    """
    settings = document["settings"]
    held = {(run["turn"], run["batch_size"], run["strategy"]): run for run in document["runs"]}
    turns = sorted({turn for turn, _, _ in held})
    rows = []

    def rate(size: int, strategy: str, turn: int) -> float:
        run = held[turn, size, strategy]
        return run["num_new_tokens"] / run["seconds"]

    def over_turns(size: int, strategy: str) -> float:
        runs = [held[turn, size, strategy] for turn in turns]
        return sum(run["num_new_tokens"] for run in runs) / sum(run["seconds"] for run in runs)

    ar_runs = [run for (_, _, strategy), run in held.items() if strategy == AR]
    for size in settings["sizes"]:
        for strategy in settings["strategies"]:
            runs = [held[turn, size, strategy] for turn in turns]
            ratios = [rate(size, strategy, turn) / rate(size, AR, turn) for turn in turns]
            # of every turn, prompt by prompt
            outputs = [run["outputs_sha256"] for run in (*ar_runs, *runs)]
            rows.append(
                {
                    "batch_size": size,
                    "strategy": strategy,
                    "tokens_per_second": round(over_turns(size, strategy), 2),
                    "over_ar": round(over_turns(size, strategy) / over_turns(size, AR), 4),
                    "over_ar_of_turns": [round(min(ratios), 4), round(max(ratios), 4)],
                    "over_first_ar": round(
                        over_turns(size, strategy) / over_turns(settings["sizes"][0], AR), 4
                    ),
                    "tokens_per_pass": round(
                        sum(run["num_new_tokens"] for run in runs)
                        / sum(run["num_passes"] for run in runs),
                        4,
                    ),
                    "identical_outputs": sum(
                        len({*shas}) == 1 for shas in zip(*outputs, strict=True)
                    ),
                }
            )
    stops = {}
    for strategy in settings["strategies"]:
        slower = [
            row["batch_size"] for row in rows if row["strategy"] == strategy and row["over_ar"] <= 1
        ]
        if strategy != AR:
            stops[strategy] = min(slower, default=None)
    return {"stops_paying_at": stops, "rows": rows}


def show(document: dict[str, Any]) -> None:
    summary = document["summary"]
    settings = document["settings"]
    num_prompts = settings["num_prompts"]
    sizes = settings["sizes"]
    where = document["environment"]["device_name"]
    title = (
        f"{settings['model']}, {num_prompts} HumanEval prompts, greedy, "
        f"{settings['dtype']}, "
        f"{where}"
    )
    table = Table(*COLUMNS, title=title, title_justify="left")
    for row in summary["rows"]:
        turns = "{:.2f} to {:.2f}".format(*row["over_ar_of_turns"])
        same = f"{row['identical_outputs']}/{num_prompts}"
        rates = (
            f"{row['tokens_per_second']:.1f}",
            f"{row['over_ar']:.2f}",
            turns,
            f"{row['over_first_ar']:.2f}",
        )
        last = row["strategy"] == settings["strategies"][-1]
        table.add_row(
            str(row["batch_size"]),
            row["strategy"],
            *rates,
            f"{row['tokens_per_pass']:.2f}",
            same,
            end_section=last,
        )
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    for strategy, size in summary["stops_paying_at"].items():
        print(
            f"{strategy}: "
            + (
                f"pays up to batch size {sizes[-1]}"
                if size is None
                else f"stops paying at batch size {size}"
            )
        )


def main(
    model: Model = NAME,
    sizes: Annotated[str, typer.Option(help="Batch sizes, with commas between.")] = "1,2,4,8,16,32",
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "'two-step:3', 'auto', 'auto:lookup=0', 'lookup', ..; repeat for more. AR is "
                "always "
                "there."
            )
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many HumanEval prompts.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    turns: Annotated[int, typer.Option(min=1)] = 2,
    dtype: Dtype = "bfloat16",
    device: Device = "",
    out: Path | None = None,
) -> None:
    """Measure, print a table, and write --out after every run (default:
    runs/MODEL/batch.json).
    """
    numbers = sizes.split(",")
    require(
        all(n.isdecimal() and int(n) > 0 for n in numbers),
        f"--sizes={sizes}: expected positive numbers with commas between",
    )
    counts = sorted({int(n) for n in numbers})
    strategies = [AR, *beside(strategy or STRATEGIES)]
    require(
        len(set(strategies)) == len(strategies),
        f"--strategy={','.join(strategies[1:])}: one is there twice, or is {AR}",
    )
    out = out or Path("runs") / Path(model).name / "batch.json"
    decoder = Decoder.load(model, dtype, device)
    loaded = decoder.model
    configs = {
        name: decode_config_of(name, max_new_tokens=max_new_tokens, stop_ids=loaded.stop_ids)
        for name in strategies
    }
    warm_up = [encode_prompt(loaded.tokenizer, WARM_UP)] * max(counts)
    problems = humaneval(loaded.tokenizer, prompts)
    ids = [list(problem.prompt_ids) for problem in problems]
    settings = {
        "model": loaded.name,
        "dtype": dtype,
        "num_prompts": len(ids),
        "max_new_tokens": max_new_tokens,
        "turns": turns,
        "sizes": counts,
        "strategies": strategies,
    }
    head = {"schema_version": 1, "environment": environment(decoder), "settings": settings}
    head["environment"]["script"] = sha256_of(Path(__file__))
    with resumed(out, {**head, "summary": {}, "runs": []}) as document:
        done = {(run["turn"], run["batch_size"], run["strategy"]) for run in document["runs"]}
        for name in strategies:  # what is measured once, and compiled, and learned
            short = replace(configs[name], max_new_tokens=min(WARM_UP_TOKENS, max_new_tokens))
            decoder.generate_batch(warm_up, short, batch_size=max(counts))
        keys = [
            (turn, size, place)
            for turn in range(turns)
            for size in counts
            for place in range(len(strategies))
        ]
        for turn, size, place in tqdm(keys, unit="run", disable=None):
            name = strategies[(place + turn + counts.index(size)) % len(strategies)]
            if (turn, size, name) not in done:
                found = measure(decoder, ids, configs[name], size)
                document["runs"].append(
                    {"turn": turn, "batch_size": size, "strategy": name, **found}
                )
                write_json(out, document)
        document["summary"] = summarize(document)
        write_json(out, document)
        show(document)


if __name__ == "__main__":
    run(main)
