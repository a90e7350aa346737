"""Speed beside peers, on a CPU: transformers, its prompt lookup, this program's strategies, and
llama.cpp where it is installed.

    python scripts/peers.py [MODEL] [--ours two-step:5 ...] [--data-limit N] [--general N]
    [--max-new-tokens N] [--out FILE.json]

MODEL: the embedded default, or an adapter for the same base. All strategies take turns on each
prompt (HumanEval, and requests without code), greedy, on the same token ids and threads, in
bfloat16, and llama.cpp also in 4 bits: with the file that the base was made from (Q4_1), and with
that rounded once more to its fastest kind (Q4_0). Peak memory: each in a process of its own, on the
first prompt. The same command resumes an interrupted run.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import re
import shutil
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

from sdsat.cache_folder import cache_dir
from sdsat.cli.options import Model
from sdsat.cli.program import run
from sdsat.config import DecodeConfig, beside, decode_config_of, require
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.sequence import Generation
from sdsat.engines.transformers import TransformersEngine
from sdsat.evaluation.records import environment, resumed
from sdsat.evaluation.reference import transformers_generate
from sdsat.evaluation.report import with_interval
from sdsat.evaluation.summary import interval, seconds_of, speedup
from sdsat.files import sha256_of, write_json
from sdsat.models.embedded import BASE_NAME, NAME, SMOLLM2, base_dir, fetched
from sdsat.models.loading import load_base
from sdsat.models.sat_model import SatModel
from sdsat.tasks.prompts import WARM_UP, Problem, encode, encode_prompt, given_requests, humaneval

try:
    import llama_cpp
except ImportError:
    llama_cpp = None

DTYPE = "bfloat16"
WARM_UP_TOKENS = 16
LOOKUP_TOKENS = 10
AR = "ar"
TRANSFORMERS = {"transformers": None, "transformers prompt lookup": LOOKUP_TOKENS}
LLAMA = (
    {"llama.cpp bfloat16": "bfloat16", "llama.cpp Q4_1": "Q4_1", "llama.cpp Q4_0": "Q4_0"}
    if llama_cpp
    else {}
)
INSTALL = 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-deps llama-cpp-python==0.3.36 diskcache'
GENERAL = Path(__file__).parent.parent / "data/general.jsonl"
OUT = Path("results/reference/smollm2-135m-sdsat/peers.json")
COLUMNS = (
    "strategy",
    "tokens/s",
    "over ar",
    "over transformers",
    "tokens/pass",
    "as ar",
    "peak MiB",
    "less imports",
)
Decode = Callable[[list[int], int], Generation]  # (prompt ids, new tokens at most)


def decode_config(strategy: str, model: SatModel, max_new_tokens: int) -> DecodeConfig:
    """The settings of one of our strategies, as 'one-pass:5'."""
    return decode_config_of(strategy, max_new_tokens=max_new_tokens, stop_ids=model.stop_ids)


@cache
def own_decoder(name: str) -> Decoder:
    decoder = Decoder.load(name, DTYPE, "cpu")
    model = decoder.model
    same = model.adapter is not None and model.adapter.config.base_model == BASE_NAME
    require(same, f"model {name}: expected an adapter for {BASE_NAME}, the base that the peers run")
    return decoder


@cache
def plain_base() -> Decoder:
    """The base as transformers loads it: no adapter, no packed layers."""
    cpu = {"": torch.device("cpu")}
    lm, tokenizer, _ = load_base(BASE_NAME, getattr(torch, DTYPE), cpu)
    model = SatModel(lm, tokenizer, BASE_NAME)
    return Decoder(model, TransformersEngine(model))


def transformers_decoder(lookup: int | None) -> Decode:
    """lookup: prompt_lookup_num_tokens of transformers' `generate`; None for plain decoding."""
    plain = plain_base()
    passes = [0]
    lm = plain.model.lm
    lm.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))

    def decode(ids: list[int], limit: int) -> Generation:
        passes[0] = 0
        # `generate` takes from it what a call leaves open.
        lm.generation_config.prompt_lookup_num_tokens = lookup
        out = transformers_generate(plain, ids, decode_config(AR, plain.model, limit))
        out.num_passes = max(1, passes[0] - 1)  # without the prompt's
        return out

    return decode


def gguf(kind: str) -> Path:
    """The base's GGUF file, kept in the cache folder: Q4_1 as it ships, the same weights as
    bfloat16, or rounded to Q4_0.
    """
    target = cache_dir() / f"{BASE_NAME}.{kind}.gguf"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            made = Path(folder) / "made.gguf"
            if kind == "Q4_1":
                with fetched(SMOLLM2) as file:
                    shutil.copyfile(file, made)
            else:
                logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
                settings = llama_cpp.llama_model_quantize_default_params()
                ftypes = {
                    "bfloat16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
                    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
                }
                settings.ftype = ftypes[kind]
                settings.allow_requantize = True
                code = llama_cpp.llama_model_quantize(
                    bytes(gguf("Q4_1")), bytes(made), ctypes.byref(settings)
                )
                require(code == 0, f"{target}: llama.cpp cannot make it (code {code})")
            made.replace(target)
    return target


def llama_decoder(kind: str, context: int, stop_id: int) -> Decode:
    """llama.cpp fed with token ids; the next token is the largest logit.

    context: tokens of the longest prompt and answer.
    """
    threads = torch.get_num_threads()
    llama = llama_cpp.Llama(
        str(gguf(kind)), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def decode(ids: list[int], limit: int) -> Generation:
        out = Generation()
        tokens = ids
        began = time.perf_counter()
        llama.reset()
        while out.finish is None:
            llama.eval(tokens)
            logits = np.ctypeslib.as_array(
                llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),)
            )
            tokens = [int(logits.argmax())]
            out.prefill_seconds = out.prefill_seconds or time.perf_counter() - began
            out.token_ids += tokens
            if tokens[0] == stop_id:
                out.finish = "stop_id"
            elif len(out.token_ids) == limit:
                out.finish = "length"
        out.decode_seconds = time.perf_counter() - began - out.prefill_seconds
        out.num_passes = max(1, len(out.token_ids) - 1)
        return out

    return decode


def make_decoder(strategy: str, name: str, context: int) -> Decode:
    """Loads what the strategy needs, and nothing else."""
    if strategy in TRANSFORMERS:
        return transformers_decoder(TRANSFORMERS[strategy])
    if strategy in LLAMA:
        return llama_decoder(
            LLAMA[strategy], context, GenerationConfig.from_pretrained(base_dir()).eos_token_id
        )
    decoder = own_decoder(name)
    return lambda ids, limit: decoder.generate(ids, decode_config(strategy, decoder.model, limit))


def read_prompts(data_limit: int, general: int) -> list[Problem]:
    tokenizer = AutoTokenizer.from_pretrained(base_dir())
    texts = list(given_requests([str(GENERAL)]))[:general]
    requests = [
        Problem(f"general/{i}", tuple(encode(tokenizer, text))) for i, text in enumerate(texts)
    ]
    return humaneval(tokenizer, data_limit) + requests


def peak_mib() -> int:
    """This process's own peak of resident memory; ru_maxrss would also hold that of the process
    that started it.
    """
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) // 1024


def memory_of(strategy: str, arguments: list[str]) -> dict[str, int]:
    """What `--memory-of` prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--memory-of", strategy],
        stdout=subprocess.PIPE,
        text=True,
    )
    require(
        done.returncode == 0, f"{strategy}: failed in a process of its own; the lines above say why"
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(prompt: Problem, decoders: dict[str, Decoder], limit: int, turn: int) -> dict[str, Any]:
    """Every strategy once on one prompt, in an order that rotates with `turn`."""
    names = list(decoders)
    runs = {}
    for name in (names[(place + turn) % len(names)] for place in range(len(names))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # k beyond the trained depth
            out = decoders[name](list(prompt.prompt_ids), limit)
        runs[name] = {
            key: round(getattr(out, key), 6) for key in ("prefill_seconds", "decode_seconds")
        } | {
            **{key: getattr(out, key) for key in ("num_passes", "num_new_tokens", "finish")},
            "output_sha256": hashlib.sha256(" ".join(map(str, out.token_ids)).encode()).hexdigest(),
        }
    return {"id": prompt.task_id, "num_prompt_tokens": len(prompt.prompt_ids), "runs": runs}


def summarize(group: str, strategy: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a strategy over the prompts of one set; runs: {strategy: run} of each prompt."""
    names = (strategy, AR, "transformers")
    own, ar, peer = (
        np.array([[run[name]["num_new_tokens"], seconds_of(run[name])] for run in runs])
        for name in names
    )
    return {
        "prompts": group,
        "strategy": strategy,
        "num_prompts": len(runs),
        "tokens_per_second": round(float(own[:, 0].sum() / own[:, 1].sum()), 4),
        "speedup": round(float(speedup(np.hstack([own, ar]).sum(0))), 4),
        "speedup_ci95": interval(np.hstack([own, ar]), speedup),
        "speedup_over_transformers": round(float(speedup(np.hstack([own, peer]).sum(0))), 4),
        "speedup_over_transformers_ci95": interval(np.hstack([own, peer]), speedup),
        "tokens_per_pass": round(
            float(own[:, 0].sum() / sum(run[strategy]["num_passes"] for run in runs)), 4
        ),
        "identical_outputs": sum(
            run[strategy]["output_sha256"] == run[AR]["output_sha256"] for run in runs
        ),
    }


def summarize_all(document: dict[str, Any], asked: set[str]) -> list[dict[str, Any]]:
    """A summary for each prompt set and strategy, over the prompts that were asked for."""
    runs = [
        (prompt["id"].split("/")[0], prompt["runs"])
        for prompt in document["prompts"]
        if prompt["id"] in asked
    ]
    groups = {group: [run for of, run in runs if of == group] for group, _ in runs}
    return [
        summarize(group, name, held)
        for group, held in groups.items()
        for name in document["settings"]["strategies"]
    ]


def new_document(decoder: Decoder, strategies: list[str], max_new_tokens: int) -> dict[str, Any]:
    version = llama_cpp and llama_cpp.__version__
    engines = {"engine": decoder.engine.name, "llama_cpp_python": version}
    settings = {
        "model": decoder.model.name,
        "dtype": DTYPE,
        "strategies": strategies,
        "max_new_tokens": max_new_tokens,
    }
    settings |= {
        "prompt_lookup_num_tokens": LOOKUP_TOKENS,
        "general_sha256": hashlib.sha256(GENERAL.read_bytes()).hexdigest(),
    }
    engines["script"] = sha256_of(Path(__file__))
    head = {
        "schema_version": 1,
        "environment": environment(decoder) | engines,
        "settings": settings,
    }
    return {**head, "memory": {}, "summary": [], "prompts": []}


def show(document: dict[str, Any]) -> None:
    console = Console()
    summary = document["summary"]
    console.width = max(console.width, 130)
    for group in dict.fromkeys(row["prompts"] for row in summary):
        rows = [row for row in summary if row["prompts"] == group]
        device = document["environment"]["device_name"]
        table = Table(
            *COLUMNS,
            title=f"{group}, {rows[0]['num_prompts']} prompts, greedy, {device}",
            title_justify="left",
        )
        for row in rows:
            speed = f"{row['tokens_per_second']:.1f}"
            memory = document["memory"][row["strategy"]]
            ratios = [
                with_interval(row[key], row[f"{key}_ci95"])
                for key in ("speedup", "speedup_over_transformers")
            ]
            passes = f"{row['tokens_per_pass']:.2f}"
            same = f"{row['identical_outputs']}/{row['num_prompts']}"
            table.add_row(row["strategy"], speed, *ratios, passes, same, *map(str, memory.values()))
        console.print(table)


def main(
    model: Model = NAME,
    ours: Annotated[
        list[str] | None, typer.Option(help="'two-step:5', 'auto', ...; repeat for more.")
    ] = None,
    data_limit: Annotated[int, typer.Option(min=1, help="How many HumanEval problems.")] = 12,
    general: Annotated[int, typer.Option(min=1, help="How many requests without code.")] = 12,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    out: Path = OUT,
    alone: Annotated[str, typer.Option("--memory-of", hidden=True)] = "",
) -> None:
    """Measure, print a table, and write --out after every prompt."""
    prompts = read_prompts(data_limit, general)
    context = max(len(prompt.prompt_ids) for prompt in prompts) + max_new_tokens
    if alone:
        imports = peak_mib()
        make_decoder(alone, model, context)(list(prompts[0].prompt_ids), max_new_tokens)
        print(json.dumps({"peak_mib": peak_mib(), "peak_less_imports_mib": peak_mib() - imports}))
        return
    if not llama_cpp:
        print(f"llama.cpp is left out, for it is not installed: {INSTALL}")
    strategies = [*TRANSFORMERS, AR, *beside(ours or ["two-step:5"]), *LLAMA]
    for strategy in ours or ():
        # refuses bad ones before anything is measured
        decode_config(strategy, own_decoder(model).model, max_new_tokens)
    decoders = {strategy: make_decoder(strategy, model, context) for strategy in strategies}
    with resumed(out, new_document(own_decoder(model), strategies, max_new_tokens)) as document:
        options = [
            f"--data-limit={data_limit}",
            f"--general={general}",
            f"--max-new-tokens={max_new_tokens}",
        ]
        for strategy in strategies:
            if strategy not in document["memory"]:
                document["memory"][strategy] = memory_of(strategy, [model, *options])
                write_json(out, document)
        done = {prompt["id"] for prompt in document["prompts"]}
        warm_up = Problem(
            "warm-up", tuple(encode_prompt(own_decoder(model).model.tokenizer, WARM_UP))
        )
        measure(warm_up, decoders, min(WARM_UP_TOKENS, max_new_tokens), 0)
        for turn, prompt in enumerate(tqdm(prompts, unit="prompt", disable=None)):
            if prompt.task_id not in done:
                document["prompts"].append(measure(prompt, decoders, max_new_tokens, turn))
                write_json(out, document)
        document["summary"] = summarize_all(document, {prompt.task_id for prompt in prompts})
        write_json(out, document)
        show(document)


if __name__ == "__main__":
    run(main)
