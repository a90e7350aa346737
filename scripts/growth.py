"""How the time of a token grows: with the text before it, sequences in a batch, threads, and the
size of the model.

    python scripts/growth.py [--models smollm2-135m-instruct:bfloat16,1.5b:int8,...]
    [--threads 1,2] [--turns N] [--out FILE.json] [--plot FILE.png]

Plain decoding: passes of one row a sequence, after so many tokens each. Their keys and values are
random numbers, which take the time that a text's take. 1.5b and 7b are Qwen2.5's and CodeLlama's
shapes with random weights, made in a folder of the cache folder and removed at the end (7b: 13.5 GB
of disk for a while). Beside the time stands the share of the memory floor that is reached: the time
to read weights, keys and values once, at the rate at which the same threads add up a large tensor.
Reading a prompt is compared with the arithmetic of torch's own products in float32.
What does not fit into memory is left out, and the document says so.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from pass_cost import read_seconds, weight_bytes
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from sdsat.cache_folder import cache_dir
from sdsat.cli.program import run
from sdsat.config import InputError, require
from sdsat.decoding.decoder import Decoder
from sdsat.engines.base import PassInput, probe_tokens
from sdsat.engines.native.engine import NativeCache
from sdsat.environment import commit, cpu_name, system
from sdsat.figures import new_figure, save
from sdsat.files import new_destination, write_json
from sdsat.method.tree import make_tree
from sdsat.models.embedded import BASE_NAME, base_dir

CONTEXTS = (256, 1024, 4096, 16384)  # tokens before the pass, of one sequence
BATCHES = (1, 2, 4, 8, 16, 32)  # sequences, after CONTEXTS[0] tokens each
PROMPT = 512  # tokens that are read
MOST_CACHE = 2**31  # bytes of keys and values, at most
SIZES = {
    "1.5b": Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    ),
    "7b": LlamaConfig(
        vocab_size=32_016,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=16_384,
        tie_word_embeddings=False,
    ),
}
MODELS = (
    "smollm2-135m-instruct:bfloat16,smollm2-135m-instruct:int8,qwen2.5-coder-0.5b-instruct:bfloat16,"
    "qwen2.5-coder-0.5b-instruct:int8,1.5b:int8,7b:int8"
)
READ_BYTES = 2**28  # of the tensor by which the memory's rate is found


def write_random(config: PreTrainedConfig, folder: Path) -> None:
    """Write a checkpoint of this shape, one file a layer. Equal tensors have equal numbers."""
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(folder)
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(".".join(name.split(".")[:3]), []).append(name)
    files = {}
    held: dict[torch.Size, torch.Tensor] = {}
    for number, names in enumerate(parts.values()):
        for name in names:
            shape = shapes[name]
            if shape not in held:
                held[shape] = torch.randn(shape).mul_(0.02).bfloat16()
            files[name] = f"part{number}.safetensors"
        save_file(
            {name: held[shapes[name]].clone() for name in names},
            folder / f"part{number}.safetensors",
            {"format": "pt"},
        )
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in base_dir().glob("*token*"):  # some tokenizer, which a model comes with
        shutil.copy(file, folder)


@contextmanager
def loaded(name: str, dtype: str) -> Iterator[Decoder]:
    """A model of SIZES, made for this block, or any other."""
    if name not in SIZES:
        yield Decoder.load(name, dtype, "cpu", engine="native")
        return
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="growth-") as folder:
        write_random(SIZES[name], Path(folder))
        yield Decoder.load(folder, dtype, "cpu", engine="native")


@torch.inference_mode()
def measure(decoder: Decoder, context: int, batch: int, turns: int) -> dict[str, Any]:
    """The median time of a pass that gives each of `batch` sequences a token."""
    engine = decoder.engine
    caches = [cast(NativeCache, engine.new_cache(context + 16)) for _ in range(batch)]
    for cache in caches:
        cache.keys.normal_()
        cache.values.normal_()
        cache.length = context
    inputs = [PassInput(cache, [7], make_tree("chain", 0)) for cache in caches]
    seconds = []
    for _ in range(turns + 1):
        began = time.perf_counter()
        engine.forward(inputs)
        seconds.append(time.perf_counter() - began)
    size = sum(2 * cache.keys[:, :, :context].nbytes for cache in caches)
    return {
        "context": context,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "milliseconds": round(1000 * statistics.median(seconds[1:]), 2),
        "cache_bytes": size,
    }


@torch.inference_mode()
def reading(decoder: Decoder) -> dict[str, float]:
    """How fast a prompt is read, and which share of the arithmetic of torch's products that is."""
    engine = decoder.engine
    tokens = probe_tokens(decoder.model, PROMPT)
    linear = [m for m in decoder.model.lm.base_model.modules() if hasattr(m, "in_features")]
    products = 2 * PROMPT * sum(m.in_features * m.out_features for m in linear)
    square = torch.randn(PROMPT, 2 * PROMPT)
    taken = {"prompt": float("inf"), "torch": float("inf")}
    for _ in range(3):
        cache = engine.new_cache(PROMPT + 16)
        began = time.perf_counter()
        engine.prefill(cache, tokens)
        taken["prompt"] = min(taken["prompt"], time.perf_counter() - began)
        began = time.perf_counter()
        torch.mm(square, square.T)
        taken["torch"] = min(taken["torch"], time.perf_counter() - began)
    rate = 4 * PROMPT**3 / taken["torch"]
    return {
        "threads": torch.get_num_threads(),
        "tokens_per_second": round(PROMPT / taken["prompt"], 1),
        "of_torchs_float32_products": round(products / taken["prompt"] / rate, 3),
    }


def points(decoder: Decoder) -> list[tuple[int, int]]:
    """(context, batch) of all that is measured of a model."""
    most = decoder.model.max_context - 16
    cache = cast(NativeCache, decoder.engine.new_cache(CONTEXTS[0]))
    a_token = 2 * cache.keys.nbytes // cache.keys.shape[2]
    every = [*((context, 1) for context in CONTEXTS), *((CONTEXTS[0], b) for b in BATCHES[1:])]
    return [(c, b) for c, b in every if c <= most and c * b * a_token <= MOST_CACHE]


def measured(name: str, dtype: str, threads: list[int], turns: int) -> dict[str, Any]:
    """All rows of one model, or why there are none."""
    head = {"model": name, "dtype": dtype}
    try:
        with loaded(name, dtype) as decoder:
            size = weight_bytes(decoder.model)
            rows, prompts = [], []
            for count in threads:
                torch.set_num_threads(count)
                rate = READ_BYTES / read_seconds(READ_BYTES, decoder.model.device)
                prompts.append(reading(decoder))
                for context, batch in points(decoder):
                    row = measure(decoder, context, batch, turns)
                    floor = 1000 * (size + row["cache_bytes"]) / rate
                    rows.append(row | {"floor_share": round(floor / row["milliseconds"], 3)})
            parameters = sum(p.numel() for p in decoder.model.lm.parameters())
            found = {"parameters": parameters, "weight_bytes": size}
            return {**head, **found, "prompts": prompts, "rows": rows}
    except (InputError, MemoryError) as reason:
        return {**head, "left_out": str(reason) or "memory ended", "rows": []}


def show(models: list[dict[str, Any]]) -> None:
    for model in models:
        title = f"{model['model']}, {model['dtype']}"
        if "left_out" in model:
            print(f"{title}: left out, {model['left_out']}")
            continue
        table = Table(title=title, title_justify="left")
        for column in ("threads", "context", "batch", "ms a pass", "tokens/s", "of the floor"):
            table.add_column(column, justify="right")
        for row in model["rows"]:
            speed = 1000 * row["batch"] / row["milliseconds"]
            table.add_row(
                *(str(row[key]) for key in ("threads", "context", "batch")),
                f"{row['milliseconds']:.1f}",
                f"{speed:.1f}",
                f"{100 * row['floor_share']:.0f} %",
            )
        Console().print(table)
        for each in model["prompts"]:
            share = f"{100 * each['of_torchs_float32_products']:.0f} %"
            speed = f"{each['tokens_per_second']:.0f} tokens/s"
            print(
                f"  reading a prompt, {each['threads']} threads: {speed}, {share} of torch's rate"
            )


def plot(models: list[dict[str, Any]], threads: int, title: str, file: Path) -> None:
    """Draw milliseconds of a token against the text before it, a line a model."""
    figure, axes = new_figure(title, "tokens before it", "milliseconds a token")
    for model in models:
        rows = [row for row in model["rows"] if row["batch"] == 1 and row["threads"] == threads]
        label = f"{model['model']}, {model['dtype']}"
        places = [row["context"] for row in rows]
        axes.plot(places, [row["milliseconds"] for row in rows], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xticks(CONTEXTS, [f"{context:,}" for context in CONTEXTS])
    axes.legend(frameon=False, fontsize=8)
    save(figure, file)


def main(
    models: Annotated[
        str, typer.Option(help="MODEL:DTYPE, with commas between; MODEL may be 1.5b or 7b.")
    ] = MODELS,
    threads: Annotated[str, typer.Option(help="Numbers, with commas between.")] = "1,2",
    turns: Annotated[int, typer.Option(min=1, help="Passes; medians count.")] = 5,
    out: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="A PNG file.")] = None,
) -> None:
    """Time of a token against context, batch, threads and size of the model."""
    names = [name.rpartition(":") for name in models.split(",")]
    for name, colon, dtype in names:
        good = bool(name and colon and dtype)
        require(good, f"models={models}: expected MODEL:DTYPE, as {BASE_NAME}:int8")
    counts = threads.split(",")
    good = all(count.isdecimal() and int(count) > 0 for count in counts)
    require(good, f"threads={threads}: expected whole numbers from 1, with commas between")
    for option, file in (("--out", out), ("--plot", plot_file)):
        if file is not None:
            new_destination(file, option)
    found = []
    for name, _, dtype in tqdm(names, unit="model", disable=None):
        found.append(measured(name, dtype, [int(count) for count in counts], turns))
        if out is not None:
            environment = {"cpu": cpu_name(), **system(), "commit": commit(), "turns": turns}
            write_json(out, {"environment": environment, "models": found})
    show(found)
    if plot_file is not None:
        most = max(map(int, counts))
        plot(found, most, f"plain decoding, native engine, {most} threads", plot_file)


if __name__ == "__main__":
    run(main)
