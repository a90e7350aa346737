"""Speed beside peers, on a CPU: transformers' own `generate`, llama.cpp, OpenVINO and vLLM, each
plainly and with its own prompt lookup, and this program's strategies.

    python scripts/peers.py [MODEL] [--ours two-step:5 ...] [--ours 'int8 auto' ...]
    [--without 'transformers assisted' ...] [--data-limit N] [--general N] [--max-new-tokens N]
    [--out FILE.json]

MODEL: an embedded one, or an adapter for its base. All decoders take turns on each prompt
(HumanEval, and requests without code), greedy, on the same token ids and threads, in bfloat16; ours
also in 8 bits and in the bits of the file that the base was made from. Peers that are not installed
are left out (scripts/programs/ says how each is run). Peak memory and seconds to load: each in a
process of its own, on the first prompt. The same command resumes an interrupted run.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from programs import AR, ASSISTED, DTYPE, LOOKUP, LOOKUP_TOKENS, Decode, llama, openvino, ours, vllm
from programs import transformers_generate as transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer

from sdsat.cli.options import Model
from sdsat.cli.program import run
from sdsat.config import beside, require
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.records import environment, resumed
from sdsat.evaluation.report import with_interval
from sdsat.evaluation.summary import interval, seconds_of, speedup
from sdsat.files import sha256_of, sha256_of_all, write_json
from sdsat.models.adapter import read_config
from sdsat.models.dtypes import check_dtype
from sdsat.models.embedded import MODELS, NAME, Embedded, base_dir, named
from sdsat.models.loading import adapter_directory, is_adapter
from sdsat.tasks.prompts import WARM_UP, Problem, encode, encode_prompt, given_requests, humaneval

PEERS = (transformers, llama, openvino, vllm)
OURS = ("two-step:5", "auto", "int8 auto", "gguf auto")
WARM_UP_TOKENS = 16
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
    "load s",
)


def base_of(name: str) -> Embedded:
    """Find the embedded base of an adapter, which the peers run; raises InputError without one."""
    base = named(read_config(adapter_directory(name)).base_model) if is_adapter(name) else None
    require(base is not None, f"model {name}: expected an adapter for an embedded base")
    assert base is not None
    return base


def peer_of(strategy: str) -> Any:
    """The program that has this decoder; None for one of ours."""
    return next((peer for peer in PEERS if strategy.split()[0] == peer.NAME), None)


def ar_of(strategy: str) -> str:
    """The decoder whose outputs a decoder's should be: its own without drafts."""
    if peer_of(strategy):
        return strategy.removesuffix(LOOKUP).removesuffix(ASSISTED)
    return ours.ar_of(strategy)


def make_decoder(strategy: str, model: str, base: Embedded, context: int) -> Decode:
    """Load what the strategy needs, and nothing else."""
    peer = peer_of(strategy)
    return peer.decoder(strategy, base, context) if peer else ours.decoder(strategy, model)


def read_prompts(base: Embedded, data_limit: int, general: int) -> list[Problem]:
    """Read so many HumanEval problems and requests; raises InputError for more than there are."""
    tokenizer = AutoTokenizer.from_pretrained(base_dir(base))
    texts = list(given_requests([str(GENERAL)]))
    require(general <= len(texts), f"general={general}: expected {len(texts)} at most")
    requests = [
        Problem(f"general/{i}", tuple(encode(tokenizer, text)))
        for i, text in enumerate(texts[:general])
    ]
    return humaneval(tokenizer, data_limit) + requests


def peak_mib() -> int:
    """The peak of resident memory of this process, and of those that it began; ru_maxrss would also
    hold that of the process that started it.
    """
    this = psutil.Process()
    peaks = []
    for each in [this, *this.children(recursive=True)]:
        with suppress(OSError):  # one that has ended meanwhile
            status = Path(f"/proc/{each.pid}/status").read_text()
            peaks += re.findall(r"VmHWM:\s+(\d+)", status)
    return sum(map(int, peaks)) // 1024


def alone(strategy: str, model: str, base: Embedded, prompt: Problem, limit: int) -> dict[str, Any]:
    """What it takes in this process, which does nothing else."""
    imports = peak_mib()
    began = time.perf_counter()
    decode = make_decoder(strategy, model, base, len(prompt.prompt_ids) + limit)
    seconds = time.perf_counter() - began
    decode(list(prompt.prompt_ids), limit)
    peak = peak_mib()
    return {
        "peak_mib": peak,
        "peak_less_imports_mib": peak - imports,
        "load_seconds": round(seconds, 2),
    }


def memory_of(strategy: str, arguments: list[str]) -> dict[str, Any]:
    """Return what `--memory-of` prints in a fresh process; raises InputError where that fails."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--memory-of", strategy],
        stdout=subprocess.PIPE,
        text=True,
    )
    require(
        done.returncode == 0, f"{strategy}: failed in a process of its own; the lines above say why"
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
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
        # where a program tells
        "seconds_to_first_token": round(
            sum(run[strategy]["prefill_seconds"] for run in runs) / len(runs), 4
        )
        or None,
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
    names = document["settings"]["strategies"]
    baselines = {"speedup": AR}
    if transformers.NAME in names:
        baselines["speedup_over_transformers"] = transformers.NAME
    files = [name for name in names if peer_of(name) is llama and not name.endswith(LOOKUP)]
    if files:
        baselines["speedup_over_llama_cpp"] = files[-1]  # on the file that the base was made from
    return [
        summarize(group, name, held, baselines)
        for group, held in groups.items()
        for name in document["settings"]["strategies"]
    ]


def new_document(decoder: Decoder, strategies: list[str], max_new_tokens: int) -> dict[str, Any]:
    peers = {peer for name in strategies if (peer := peer_of(name))}
    engines = {"engine": decoder.engine.name} | {peer.NAME: peer.version() for peer in peers}
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
    programs = sorted(Path(__file__).parent.glob("programs/*.py"))
    engines["script"] = sha256_of_all(
        (file.name, sha256_of(file)) for file in (Path(__file__), *programs)
    )
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
    own: Annotated[
        list[str] | None,
        typer.Option("--ours", help="'two-step:5', 'auto', 'int8 auto', ...; repeat for more."),
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="A peer to leave out, as 'vLLM'; repeat for more.")
    ] = None,
    data_limit: Annotated[int, typer.Option(min=1, help="How many HumanEval problems.")] = 12,
    general: Annotated[int, typer.Option(min=1, help="How many requests without code.")] = 12,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    out: Annotated[Path | None, typer.Option(help="Default: runs/MODEL/peers.json.")] = None,
    memory: Annotated[str, typer.Option("--memory-of", hidden=True)] = "",
) -> None:
    """Measure, print a table, and write --out after every prompt."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers end with this
    base = base_of(model)
    prompts = read_prompts(base, data_limit, general)
    context = max(len(prompt.prompt_ids) for prompt in prompts) + max_new_tokens
    if memory:
        print(json.dumps(alone(memory, model, base, prompts[0], max_new_tokens)))
        return
    for peer in PEERS:
        if not peer.names(base):
            print(f"{peer.NAME} is left out, for it is not installed: {peer.INSTALL}")
    peers = [name for peer in PEERS for name in peer.names(base)]
    left_out = set(without or ())
    known = [name for each in MODELS for peer in PEERS for name in [peer.NAME, *peer.names(each)]]
    for name in left_out:
        require(name in known, f"without={name}: expected one of {', '.join(dict.fromkeys(known))}")
    given = own or OURS
    dtypes = {name: ours.dtype_and_strategy(name)[0] for name in given}
    plain = beside([name for name in given if dtypes[name] == DTYPE])
    others = [name for name in given if dtypes[name] != DTYPE]
    every = list(dict.fromkeys([AR, *plain, *(n for name in others for n in (ar_of(name), name))]))
    strategies = [*every, *(name for name in peers if not left_out & {name, name.split()[0]})]
    for strategy in every:  # refuses bad ones before anything is measured
        dtype, plan = ours.dtype_and_strategy(strategy)
        check_dtype(dtype)
        ours.decode_config(plan, ours.own_decoder(model).model, max_new_tokens)
    out = out or Path("runs") / Path(model).name / "peers.json"
    head = new_document(ours.own_decoder(model), strategies, max_new_tokens)
    with resumed(out, head) as document:
        options = [
            f"--data-limit={data_limit}",
            f"--general={general}",
            f"--max-new-tokens={max_new_tokens}",
        ]
        for strategy in strategies:
            if strategy not in document["memory"]:
                document["memory"][strategy] = memory_of(strategy, [model, *options])
                write_json(out, document)
        decoders = {name: make_decoder(name, model, base, context) for name in strategies}
        done = {prompt["id"] for prompt in document["prompts"]}
        warm_up = Problem(
            "warm-up", tuple(encode_prompt(ours.own_decoder(model).model.tokenizer, WARM_UP))
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
