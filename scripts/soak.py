"""Memory over many generations: whether anything is kept that should not be.

    python scripts/soak.py [MODEL] [--generations N] [--out FILE.json]

Greedy and seeded nucleus generations with every strategy in turn, prompts of different length, up
to 64 new tokens. Resident memory (MiB) is read at every twentieth part, after a round in which
everything that is made at first use has been made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sdsat.cli.options import Model
from sdsat.cli.program import run
from sdsat.config import STRATEGIES, DecodeConfig, SamplingConfig, require
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.records import environment
from sdsat.files import new_destination, write_json
from sdsat.tasks.prompts import humaneval

OUT = Path("runs/soak.json")
SAMPLINGS = (SamplingConfig(), SamplingConfig(temperature=1.0, top_k=10, top_p=0.95))


def main(
    model: Model = "smollm2-135m-sdsat",
    generations: Annotated[int, typer.Option(help="How many; a multiple of 20.")] = 1000,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = OUT,
) -> None:
    """Resident memory over many generations."""
    require(
        generations >= 20 and generations % 20 == 0,
        f"generations={generations}: expected a multiple of 20",
    )
    new_destination(out, "--out")
    decoder = Decoder.load(model, device="cpu")
    loaded = decoder.model
    assert loaded.tokenizer is not None
    prompts = [list(problem.prompt_ids) for problem in humaneval(loaded.tokenizer)]
    process = psutil.Process()
    resident = []
    tokens = 0
    for turn in tqdm(range(-20, generations), desc="generations"):
        settings = {
            "k": 5,
            "strategy": STRATEGIES[turn % len(STRATEGIES)],
            "sampling": SAMPLINGS[turn // len(STRATEGIES) % 2],
        }
        config = DecodeConfig(max_new_tokens=64, stop_ids=loaded.stop_ids, **settings)
        tokens += decoder.generate(prompts[turn % len(prompts)], config).num_new_tokens
        if turn >= -1 and (turn + 1) % (generations // 20) == 0:
            resident.append(round(process.memory_info().rss / 2**20, 1))
    result = {
        "generations": generations,
        "new_tokens": tokens,
        "resident_mib": resident,
        "environment": environment(decoder),
    }
    write_json(out, result)
    table = Table("generations", "resident MiB")
    for i, size in enumerate(resident):
        table.add_row(str(i * generations // 20), f"{size:.1f}")
    Console().print(table)


if __name__ == "__main__":
    run(main)
