"""Speed beside peers, on a CPU: transformers, its prompt lookup, this program's strategies, and llama.cpp where it is installed.

    python scripts/peers.py [MODEL] [--ours two-step:5 ...] [--data-limit N] [--general N] [--max-new-tokens N] [--out FILE.json]

MODEL: the embedded default, or an adapter for the same base. All strategies take turns on each prompt (HumanEval, and requests
without code), greedy, on the same token ids and threads, in bfloat16, and llama.cpp also with the 4-bit file that the base was
made from. Peak memory: each in a process of its own, on the first prompt. The same command resumes an interrupted run.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig

import sdsat
from sdsat.cli import Model, run
from sdsat.config import DecodeConfig, require
from sdsat.decode import Generation, probe_rows
from sdsat.embedded import BASE_NAME, NAME, _fetch, base_dir, cache_dir
from sdsat.model import SatModel, _load_base
from sdsat.prompts import Problem, encode_request, humaneval, read_sources
from sdsat.records import environment, read_json, write_json
from sdsat.reference import transformers_generate
from sdsat.report import _bootstrap, _interval, seconds_of

DTYPE, WARM_UP_TOKENS, LOOKUP_TOKENS = "bfloat16", 16, 10
TRANSFORMERS, LOOKUP, AR = "transformers", "transformers prompt lookup", "ar"
LLAMA = {"llama.cpp bfloat16": "bfloat16", "llama.cpp 4-bit": "Q4_1"}
GENERAL, OUT = Path(__file__).parent.parent / "data/general.jsonl", Path("results/reference/smollm2-135m-sdsat/peers.json")
INSTALL = 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-deps llama-cpp-python==0.3.36 diskcache'
Decoder = Callable[[list[int], int], Generation]  # (prompt ids, new tokens at most)


def decode_config(strategy: str, max_new_tokens: int, stop_ids: tuple[int, ...]) -> DecodeConfig:
    """The settings of one of our strategies: 'ar', 'two-step:5', 'one-pass:5', 'auto'."""
    name, _, k = strategy.partition(":")
    more: dict[str, Any] = {} if name in (AR, "two-step") else {"strategy": name}
    return DecodeConfig(int(k or 0), max_new_tokens, stop_ids=stop_ids, **more)


@cache
def own_model(name: str) -> SatModel:
    model = sdsat.load(name, DTYPE, "cpu")
    same = model.adapter is not None and model.adapter.config.base_model == BASE_NAME
    require(same, f"model {name}: expected an adapter for {BASE_NAME}, the base that the peers run")
    return model


@cache
def plain_base() -> SatModel:
    """The base as transformers loads it: no adapter, no packed layers. Both of transformers' strategies share it."""
    return SatModel(*_load_base(BASE_NAME, getattr(torch, DTYPE), torch.device("cpu")), BASE_NAME)


def transformers_decoder(lookup: int | None) -> Decoder:
    """lookup: prompt_lookup_num_tokens of transformers' `generate`; None for plain decoding."""
    plain, passes = plain_base(), [0]
    plain.model.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))

    def decode(ids: list[int], limit: int) -> Generation:
        passes[0] = 0
        plain.model.generation_config.prompt_lookup_num_tokens = lookup  # `generate` takes from it what a call leaves open
        out = transformers_generate(plain, ids, decode_config(AR, limit, plain.stop_ids))
        out.num_passes = max(1, passes[0] - 1)  # without the prompt's
        return out

    return decode


def gguf(kind: str) -> Path:
    """The base's GGUF file, kept in the cache folder: Q4_1 as it ships, or the same weights as bfloat16."""
    target = cache_dir() / f"{BASE_NAME}.{kind}.gguf"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            made = _fetch(Path(folder)) if kind == "Q4_1" else _as_bfloat16(gguf("Q4_1"), Path(folder) / "made.gguf")
            made.replace(target)
    return target


def _as_bfloat16(source: Path, target: Path) -> Path:
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, True
    code = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(settings))
    require(code == 0, f"{source}: llama.cpp cannot convert it (code {code})")
    return target


def llama_decoder(kind: str, context: int, stop_ids: tuple[int, ...]) -> Decoder:
    """llama.cpp fed with token ids; the next token is the largest logit. context: tokens of the longest prompt and answer."""
    import llama_cpp

    threads = torch.get_num_threads()
    llama = llama_cpp.Llama(str(gguf(kind)), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)

    def decode(ids: list[int], limit: int) -> Generation:
        out, tokens, began = Generation(finish=""), ids, time.perf_counter()
        llama.reset()
        while not out.finish:
            llama.eval(tokens)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),))
            tokens = [int(logits.argmax())]
            out.prefill_seconds = out.prefill_seconds or time.perf_counter() - began
            out.token_ids += tokens
            out.finish = "stop_id" if tokens[0] in stop_ids else "length" if len(out.token_ids) == limit else ""
        out.decode_seconds = time.perf_counter() - began - out.prefill_seconds
        out.num_passes = max(1, len(out.token_ids) - 1)
        return out

    return decode


def make_decoder(strategy: str, name: str, context: int) -> Decoder:
    """Loads what the strategy needs, and nothing else."""
    stop = GenerationConfig.from_pretrained(base_dir()).eos_token_id
    stop_ids = tuple(stop) if isinstance(stop, list) else (stop,)
    if strategy in (TRANSFORMERS, LOOKUP):
        return transformers_decoder(LOOKUP_TOKENS if strategy == LOOKUP else None)
    if strategy in LLAMA:
        return llama_decoder(LLAMA[strategy], context, stop_ids)
    model = own_model(name)
    return lambda ids, limit: sdsat.generate(model, ids, decode_config(strategy, limit, stop_ids))


def read_prompts(data_limit: int, general: int) -> list[Problem]:
    tokenizer = AutoTokenizer.from_pretrained(base_dir())
    texts = [text for _, text, _ in read_sources([str(GENERAL)])][:general]
    requests = [Problem(f"general/{i}", tuple(encode_request(tokenizer, text))) for i, text in enumerate(texts)]
    return humaneval(tokenizer, data_limit) + requests


def peak_mib() -> int:
    """This process's own peak of resident memory; ru_maxrss would hold its parent's too, from before the exec."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


def memory_of(strategy: str, arguments: list[str]) -> dict[str, int]:
    """What `--memory-of` prints in a fresh process."""
    command = [sys.executable, __file__, *arguments, "--memory-of", strategy]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    require(done.returncode == 0, f"{strategy}: could not be run in a process of its own; the lines above say why")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(prompt: Problem, decoders: dict[str, Decoder], limit: int, turn: int) -> dict[str, Any]:
    """Every strategy once on one prompt, in an order that rotates with `turn`."""
    names, runs = list(decoders), {}
    for place in range(len(names)):
        name = names[(place + turn) % len(names)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # k beyond the trained depth
            out = decoders[name](list(prompt.prompt_ids), limit)
        runs[name] = {
            "prefill_seconds": round(out.prefill_seconds, 6),
            "decode_seconds": round(out.decode_seconds, 6),
            "num_passes": out.num_passes,
            "num_new_tokens": out.num_new_tokens,
            "finish": out.finish,
            "output_sha256": hashlib.sha256(" ".join(map(str, out.token_ids)).encode()).hexdigest(),
        }
    runs = {name: runs[name] for name in names}
    return {"id": prompt.task_id, "place_in_run": turn, "num_prompt_tokens": len(prompt.prompt_ids), "runs": runs}


def summarize(prompts: list[dict[str, Any]], strategies: list[str]) -> list[dict[str, Any]]:
    """One object for each prompt set and strategy."""
    summary = []
    for group in dict.fromkeys(prompt["id"].split("/")[0] for prompt in prompts):
        held = [prompt["runs"] for prompt in prompts if prompt["id"].startswith(group)]
        for strategy in strategies:
            columns = [[(r[s]["num_new_tokens"], seconds_of(r[s])) for r in held] for s in (strategy, AR, TRANSFORMERS)]
            summary.append({"prompts": group, "strategy": strategy, "num_prompts": len(held)} | _speeds(np.hstack(columns)))
            summary[-1]["tokens_per_pass"] = round(sum(c[0] for c in columns[0]) / sum(r[strategy]["num_passes"] for r in held), 4)
            summary[-1]["identical_outputs"] = sum(r[strategy]["output_sha256"] == r[AR]["output_sha256"] for r in held)
    return summary


def _speeds(rows: np.ndarray) -> dict[str, Any]:
    """rows [prompts, 6]: new tokens and seconds of a strategy, of ar and of transformers."""
    found: dict[str, Any] = {"tokens_per_second": round(float(rows[:, 0].sum() / rows[:, 1].sum()), 4)}
    for key, base in (("speedup", 2), ("speedup_over_transformers", 4)):

        def ratio(sums: np.ndarray, base: int = base) -> np.ndarray:
            return sums[..., 0] / sums[..., 1] / (sums[..., base] / sums[..., base + 1])

        found |= {key: round(float(ratio(rows.sum(0))), 4), f"{key}_ci95": _bootstrap(rows, ratio)}
    return found


def open_document(out: Path, settings: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A new document, or the one that an interrupted run of the same settings left in the same environment."""
    new = {"schema_version": 1, "environment": found, "settings": settings, "memory": {}, "summary": [], "prompts": []}
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return new
    held: dict[str, Any] = read_json(out)
    for part in ("environment", "settings"):
        for key, value in new[part].items():
            before = held.get(part, {}).get(key)
            require(before == value, f"{out}: was begun with {key}={before}, now it is {value}; delete it or choose another --out")
    return held


def table(document: dict[str, Any]) -> Table:
    shown = Table(title=f"{document['settings']['model']}, greedy, {document['environment']['device_name']}", title_justify="left")
    for column in ("prompts", "strategy", "tokens/s", "over ar", "over transformers", "tokens/pass", "as ar", "peak MiB", "- imports"):
        shown.add_column(column, justify="left" if column in ("prompts", "strategy") else "right")
    for row in document["summary"]:
        memory = document["memory"][row["strategy"]]
        shown.add_row(
            row["prompts"], row["strategy"], f"{row['tokens_per_second']:.1f}", _interval(row["speedup"], row["speedup_ci95"]),
            _interval(row["speedup_over_transformers"], row["speedup_over_transformers_ci95"]), f"{row['tokens_per_pass']:.2f}",
            f"{row['identical_outputs']}/{row['num_prompts']}", str(memory["peak_mib"]),
            str(memory["peak_mib"] - memory["imports_mib"]), end_section=row["strategy"] == document["settings"]["strategies"][-1],
        )  # fmt: skip
    return shown


def main(
    model: Model = NAME,
    ours: Annotated[list[str] | None, typer.Option(help="'two-step:5', ...; repeat for more.")] = None,
    data_limit: Annotated[int, typer.Option(min=0, help="How many HumanEval problems.")] = 12,
    general: Annotated[int, typer.Option(min=0, help="How many requests without code.")] = 12,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    out: Path = OUT,
    alone: Annotated[str, typer.Option("--memory-of", hidden=True)] = "",
) -> None:
    """Measure, print a table, and write --out after every prompt."""
    prompts = read_prompts(data_limit, general)
    require(len(prompts) > 0, "data_limit=0, general=0: no prompt")
    context = max(len(prompt.prompt_ids) for prompt in prompts) + max_new_tokens
    if alone:
        before = peak_mib()
        make_decoder(alone, model, context)(list(prompts[0].prompt_ids), max_new_tokens)
        print(json.dumps({"imports_mib": before, "peak_mib": peak_mib()}))
        return
    with_llama = importlib.util.find_spec("llama_cpp") is not None
    if not with_llama:
        print(f"llama.cpp is left out, for it is not installed: {INSTALL}")
    strategies = [TRANSFORMERS, LOOKUP, AR, *(ours or ["two-step:5"]), *(LLAMA if with_llama else ())]
    decoders = {strategy: make_decoder(strategy, model, context) for strategy in strategies}
    probe_rows(own_model(model))
    versions = {"llama_cpp_python": importlib.metadata.version("llama_cpp_python") if with_llama else None}
    digest = hashlib.sha256(GENERAL.read_bytes()).hexdigest()
    settings = {
        "model": model, "dtype": DTYPE, "strategies": strategies, "max_new_tokens": max_new_tokens,
        "prompt_lookup_num_tokens": LOOKUP_TOKENS, "general_sha256": digest,
    }  # fmt: skip
    document = open_document(out, settings, environment(own_model(model)) | versions)
    options = {"--data-limit": data_limit, "--general": general, "--max-new-tokens": max_new_tokens}
    for strategy in strategies:
        if strategy not in document["memory"]:
            arguments = [model, *(str(part) for option in options.items() for part in option)]
            document["memory"][strategy] = memory_of(strategy, arguments)
    done = {prompt["id"] for prompt in document["prompts"]}
    measure(prompts[0], decoders, min(WARM_UP_TOKENS, max_new_tokens), 0)
    for turn, prompt in enumerate(tqdm(prompts, unit="prompt", disable=None)):
        if prompt.task_id not in done:
            document["prompts"].append(measure(prompt, decoders, max_new_tokens, turn))
            write_json(out, document)
    asked = {prompt.task_id for prompt in prompts}
    document["summary"] = summarize([p for p in document["prompts"] if p["id"] in asked], strategies)
    write_json(out, document)
    Console().print(table(document))


if __name__ == "__main__":
    run(main)
