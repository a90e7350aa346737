"""Memory that a model takes, read from outside of its process.

    python scripts/memory.py [MODEL] [--dtype bfloat16,int8,gguf] [--out FILE.json]

For each dtype a process of its own loads the model, decodes with two-step and auto (and rounded,
where auto has such passes), and waits; what the system says of it is compared with a process that
has only imported the package. Own memory (RssAnon) is what can't go; file pages (RssFile) can, at
any time. MiB everywhere. Linux only.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sdsat.cli.options import Model
from sdsat.cli.program import run
from sdsat.config import require
from sdsat.environment import cpu_name, system
from sdsat.files import destination, write_json
from sdsat.models.dtypes import check_dtype

_CHILD = """
import sys
from sdsat.config import DecodeConfig
from sdsat.decoding.decoder import Decoder
model, dtype = sys.argv[1:]
if dtype != "imports":
    print("ready", flush=True)
    sys.stdin.readline()
    decoder = Decoder.load(model, dtype, "cpu")
    rounds = decoder.engine.rounding_pays
    decoder.engine.prepare(rounds)
    print("ready", flush=True)
    sys.stdin.readline()
    prompt = decoder.model.tokenizer("def reverse(items):" * 20)["input_ids"]
    for strategy in ("two-step", "auto", *["rounded"] * rounds):
        decoder.generate(prompt, DecodeConfig(None, 64, strategy=strategy))
    sizes = {p.data_ptr(): p.nbytes for p in decoder.model.lm.parameters()}
    for m in decoder.model.lm.modules():
        if hasattr(m, "num_bytes"):
            sizes[m.weight.data_ptr()] = m.num_bytes
    print(sum(sizes.values()), decoder.engine.name, flush=True)
    sys.stdin.readline()
"""


def _memory(pid: int) -> dict[str, float]:
    """Read a process's memory: all, own, of files, and the most that it ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    names = {"resident": "VmRSS", "own": "RssAnon", "file_pages": "RssFile", "peak": "VmHWM"}
    return {name: round(int(facts[key].split()[0]) / 1024, 1) for name, key in names.items()}


def _measure(model: str, dtype: str) -> dict[str, Any]:
    """Measure one dtype of a model, in a process of its own."""
    command = [sys.executable, "-c", _CHILD, model, dtype]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        found = []
        for _ in range(3):
            said = child.stdout.readline()
            require(said != "", f"model={model}: its process ended; see its message above")
            found.append(_memory(child.pid))
            child.stdin.write("\n")
            child.stdin.flush()
    weights, engine = said.split()
    imports, loaded, decoded = found
    mib = int(weights) / 2**20
    return {
        "dtype": dtype,
        "engine": engine,
        "weights_mib": round(mib, 1),
        "imports": imports,
        "loaded": loaded,
        "decoded": decoded,
        "own_over_weights": round((decoded["own"] - imports["own"]) / mib, 3),
        "peak_loading_over_weights": round((loaded["peak"] - imports["peak"]) / mib, 3),
    }


def main(
    model: Model = "smollm2-135m-sdsat",
    dtype: Annotated[str, typer.Option(help="Several, joined by commas.")] = "bfloat16,int8,gguf",
    out: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
) -> None:
    """Memory of a model from outside of its process."""
    for name in dtype.split(","):
        check_dtype(name)
    require(Path("/proc/self/status").is_file(), "platform: this needs Linux's /proc")
    if out is not None:
        destination(out, "--out")
    rows = [_measure(model, name) for name in dtype.split(",")]
    if out is not None:
        environment = {"cpu": cpu_name(), **system()}
        write_json(out, {"model": model, "rows": rows, "environment": environment})
    table = Table(
        "dtype", "weights", "own", "over weights", "file pages", "peak loading, over weights"
    )
    for row in rows:
        decoded = row["decoded"]
        table.add_row(
            row["dtype"],
            str(row["weights_mib"]),
            f"{decoded['own'] - row['imports']['own']:.0f}",
            str(row["own_over_weights"]),
            str(decoded["file_pages"]),
            str(row["peak_loading_over_weights"]),
        )
    Console().print(table)


if __name__ == "__main__":
    run(main)
