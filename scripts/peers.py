"""Speed beside peers, on a CPU: transformers, its prompt lookup, this program's strategies, and
llama.cpp where it is installed.

    python scripts/peers.py [MODEL] [--ours two-step:5 ...] [--ours 'int8 auto' ...]
    [--data-limit N] [--general N] [--max-new-tokens N] [--out FILE.json]

MODEL: an embedded one, or an adapter for its base. All decoders take turns on each prompt
(HumanEval, and requests without code), greedy, on the same token ids and threads, in bfloat16; ours
also in 8 bits and in the bits of the file that the base was made from, and llama.cpp also in 8 bits
(Q8_0) and with that file, without and with its own prompt lookup. Peak memory: each in a process of
its own, on the first prompt. The same command resumes an interrupted run.
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
from sdsat.models.adapter import read_config
from sdsat.models.dtypes import check_dtype
from sdsat.models.embedded import NAME, Embedded, base_dir, fetched, named
from sdsat.models.loading import adapter_directory, is_adapter, load_base
from sdsat.models.sat_model import SatModel
from sdsat.tasks.prompts import WARM_UP, Problem, encode, encode_prompt, given_requests, humaneval

try:
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
except ImportError:
    llama_cpp = None

DTYPE = "bfloat16"
OURS = ("two-step:5", "auto", "int8 auto", "gguf auto")
WARM_UP_TOKENS = 16
LOOKUP_TOKENS = 10
AR = "ar"
TRANSFORMERS = {"transformers": None, "transformers prompt lookup": LOOKUP_TOKENS}
LLAMA = "llama.cpp "
LOOKUP = " prompt lookup"
INSTALL = 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-deps llama-cpp-python==0.3.36 diskcache'
GENERAL = Path(__file__).parent.parent / "data/general.jsonl"
COLUMNS = (
    "strategy",
    "tokens/s",
    "over ar",
    "over transformers",
    "over llama.cpp",
    "tokens/pass",
    "as its ar",
    "peak MiB",
    "less imports",
)
Decode = Callable[[list[int], int], Generation]  # (prompt ids, new tokens at most)


def decode_config(strategy: str, model: SatModel, max_new_tokens: int) -> DecodeConfig:
    """The settings of one of our strategies, as 'one-pass:5'."""
    return decode_config_of(strategy, max_new_tokens=max_new_tokens, stop_ids=model.stop_ids)


@cache
def own_decoder(name: str, dtype: str = DTYPE) -> Decoder:
    return Decoder.load(name, dtype, "cpu")


def base_of(name: str) -> Embedded:
    """The embedded base of an adapter, which the peers run."""
    base = named(read_config(adapter_directory(name)).base_model) if is_adapter(name) else None
    require(base is not None, f"model {name}: expected an adapter for an embedded base")
    assert base is not None
    return base


def kind_of(base: Embedded) -> str:
    """What llama.cpp calls the numbers of the base's file, as 'Q4_K_M'."""
    return re.findall(r"Q\d\w*(?=\.gguf)", base.file, re.IGNORECASE)[0].upper()


def llama_names(base: Embedded) -> list[str]:
    file = LLAMA + kind_of(base)
    return [LLAMA + DTYPE, f"{LLAMA}Q8_0", file, file + LOOKUP] if llama_cpp else []


def ar_of(strategy: str) -> str:
    """The decoder whose outputs a decoder's should be: its own without drafts."""
    if strategy in TRANSFORMERS or strategy.startswith(LLAMA):
        return strategy.removesuffix(LOOKUP)
    dtype, _ = of_ours(strategy)
    return AR if dtype == DTYPE else f"{dtype} {AR}"


def of_ours(strategy: str) -> tuple[str, str]:
    """The dtype and the strategy of one of ours, as 'int8 auto'; DTYPE is not named."""
    dtype, _, own = strategy.rpartition(" ")
    return dtype or DTYPE, own


@cache
def plain_base(base: Embedded) -> Decoder:
    """The base as transformers loads it: no adapter, no packed layers."""
    cpu = {"": torch.device("cpu")}
    lm, tokenizer, _ = load_base(base.base, getattr(torch, DTYPE), cpu)
    model = SatModel(lm, tokenizer, base.base)
    return Decoder(model, TransformersEngine(model))


def transformers_decoder(base: Embedded, lookup: int | None) -> Decode:
    """lookup: prompt_lookup_num_tokens of transformers' `generate`; None for plain decoding."""
    plain = plain_base(base)
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


def gguf(base: Embedded, kind: str) -> Path:
    """The base's GGUF file, kept in the cache folder: as it ships, or its weights as `kind`."""
    shipped = kind_of(base)
    target = cache_dir() / f"{base.base}.{kind}.gguf"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            made = Path(folder) / "made.gguf"
            if kind == shipped:
                with fetched(base) as file:
                    shutil.copyfile(file, made)
            else:
                logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
                settings = llama_cpp.llama_model_quantize_default_params()
                ftypes = {
                    "bfloat16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
                    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
                }
                settings.ftype = ftypes[kind]
                settings.allow_requantize = True
                code = llama_cpp.llama_model_quantize(
                    bytes(gguf(base, shipped)), bytes(made), ctypes.byref(settings)
                )
                require(code == 0, f"{target}: llama.cpp cannot make it (code {code})")
            made.replace(target)
    return target


def llama_decoder(file: Path, context: int, stop_id: int, lookup: bool) -> Decode:
    """llama.cpp fed with token ids; the next token is the largest logit.

    context: tokens of the longest prompt and answer. lookup: by its own `generate`, with its
    prompt lookup.
    """
    threads = torch.get_num_threads()
    draft = LlamaPromptLookupDecoding(num_pred_tokens=LOOKUP_TOKENS) if lookup else None
    llama = llama_cpp.Llama(
        str(file),
        n_ctx=context + LOOKUP_TOKENS,
        n_threads=threads,
        n_threads_batch=threads,
        draft_model=draft,
        verbose=False,
    )

    def looking_up(ids: list[int], limit: int) -> Generation:
        out = Generation()
        began = time.perf_counter()
        llama.reset()
        for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
            out.prefill_seconds = out.prefill_seconds or time.perf_counter() - began
            out.token_ids.append(token)
            if token == stop_id or len(out.token_ids) == limit:
                out.finish = "stop_id" if token == stop_id else "length"
                break
        out.decode_seconds = time.perf_counter() - began - out.prefill_seconds
        out.num_passes = max(1, len(out.token_ids) - 1)  # at most: it does not say
        return out

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

    return looking_up if lookup else decode


def make_decoder(strategy: str, name: str, base: Embedded, context: int) -> Decode:
    """Loads what the strategy needs, and nothing else."""
    if strategy in TRANSFORMERS:
        return transformers_decoder(base, TRANSFORMERS[strategy])
    if strategy.startswith(LLAMA):
        kind = ar_of(strategy).removeprefix(LLAMA)
        stop_id = GenerationConfig.from_pretrained(base_dir(base)).eos_token_id
        stop_id = stop_id[0] if isinstance(stop_id, list) else stop_id
        return llama_decoder(gguf(base, kind), context, stop_id, strategy.endswith(LOOKUP))
    dtype, own = of_ours(strategy)
    decoder = own_decoder(name, dtype)
    return lambda ids, limit: decoder.generate(ids, decode_config(own, decoder.model, limit))


def read_prompts(base: Embedded, data_limit: int, general: int) -> list[Problem]:
    tokenizer = AutoTokenizer.from_pretrained(base_dir(base))
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


def summarize(
    group: str, strategy: str, runs: list[dict[str, Any]], baselines: dict[str, str]
) -> dict[str, Any]:
    """Figures of a strategy over the prompts of one set.

    runs: {strategy: run} of each prompt. baselines: {name of a ratio: strategy it is over}.
    """
    counts = {
        name: np.array([[run[name]["num_new_tokens"], seconds_of(run[name])] for run in runs])
        for name in {strategy, *baselines.values()}
    }
    own = counts[strategy]
    ratios = {}
    for key, name in baselines.items():
        both = np.hstack([own, counts[name]])
        ratios[key] = round(float(speedup(both.sum(0))), 4)
        ratios[f"{key}_ci95"] = interval(both, speedup)
    same = ar_of(strategy)
    return {
        "prompts": group,
        "strategy": strategy,
        "num_prompts": len(runs),
        "tokens_per_second": round(float(own[:, 0].sum() / own[:, 1].sum()), 4),
        **ratios,
        "tokens_per_pass": round(
            float(own[:, 0].sum() / sum(run[strategy]["num_passes"] for run in runs)), 4
        ),
        "seconds_to_first_token": None  # transformers' generate doesn't tell
        if strategy in TRANSFORMERS
        else round(sum(run[strategy]["prefill_seconds"] for run in runs) / len(runs), 4),
        "identical_outputs": sum(
            run[strategy]["output_sha256"] == run[same]["output_sha256"] for run in runs
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
    baselines = {"speedup": AR, "speedup_over_transformers": "transformers"}
    for name in document["settings"]["strategies"]:
        if name.startswith(LLAMA) and name.endswith(LOOKUP):
            baselines["speedup_over_llama_cpp"] = ar_of(name)
    return [
        summarize(group, name, held, baselines)
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
                with_interval(row[key], row[f"{key}_ci95"]) if key in row else ""
                for key in ("speedup", "speedup_over_transformers", "speedup_over_llama_cpp")
            ]
            passes = f"{row['tokens_per_pass']:.2f}"
            same = f"{row['identical_outputs']}/{row['num_prompts']}"
            table.add_row(row["strategy"], speed, *ratios, passes, same, *map(str, memory.values()))
        console.print(table)


def main(
    model: Model = NAME,
    ours: Annotated[
        list[str] | None,
        typer.Option(help="'two-step:5', 'auto', 'int8 auto', ...; repeat for more."),
    ] = None,
    data_limit: Annotated[int, typer.Option(min=1, help="How many HumanEval problems.")] = 12,
    general: Annotated[int, typer.Option(min=1, help="How many requests without code.")] = 12,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    out: Annotated[
        Path | None, typer.Option(help="Default: results/reference/MODEL/peers.json.")
    ] = None,
    alone: Annotated[str, typer.Option("--memory-of", hidden=True)] = "",
) -> None:
    """Measure, print a table, and write --out after every prompt."""
    base = base_of(model)
    prompts = read_prompts(base, data_limit, general)
    context = max(len(prompt.prompt_ids) for prompt in prompts) + max_new_tokens
    if alone:
        imports = peak_mib()
        make_decoder(alone, model, base, context)(list(prompts[0].prompt_ids), max_new_tokens)
        print(json.dumps({"peak_mib": peak_mib(), "peak_less_imports_mib": peak_mib() - imports}))
        return
    if not llama_cpp:
        print(f"llama.cpp is left out, for it is not installed: {INSTALL}")
    given = ours or OURS
    plain = beside([name for name in given if of_ours(name)[0] == DTYPE])
    others = [name for name in given if of_ours(name)[0] != DTYPE]
    every = list(dict.fromkeys([AR, *plain, *(n for name in others for n in (ar_of(name), name))]))
    strategies = [*TRANSFORMERS, *every, *llama_names(base)]
    for strategy in every:  # refuses bad ones before anything is measured
        dtype, own = of_ours(strategy)
        check_dtype(dtype)
        decode_config(own, own_decoder(model).model, max_new_tokens)
    decoders = {name: make_decoder(name, model, base, context) for name in strategies}
    out = out or Path("results/reference") / Path(model).name / "peers.json"
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
