"""The command line: `sdsat generate | bench | report | verify | eval | inspect | distill | train |
export`.

Every bad input ends in one line on stderr and exit code 2; an interrupt in exit code 130; a dead
worker in exit code 1.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from sdsat.config import (
    NUM_LOOKUP,
    TARGETS,
    DecodeConfig,
    InputError,
    SamplingConfig,
    TrainConfig,
    plain_warnings,
    require,
    utf8,
)
from sdsat.files import destination, write_json
from sdsat.models import embedded

_INTERRUPTED = "interrupted; what was finished is kept, and the same command resumes"
UsageError: Any = (
    typer.BadParameter.__base__
)  # typer carries a click of its own, without a public name for it

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(
        "Faster generation with a model's own weights: speculative decoding with semantic "
        "adaptive tokens."
    ),
)
Model = Annotated[
    str, typer.Argument(help="Hub id, model directory, adapter directory, or the embedded default.")
]
Dtype = Annotated[
    str,
    typer.Option(
        envvar="DTYPE", help="float32, bfloat16, float16, or auto for the checkpoint's own."
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help=(
            "cpu, a GPU number, or 0+1 for a model that one GPU can't hold; empty: GPU 0 where "
            "there is one, else the CPU."
        )
    ),
]
Tree = Annotated[
    str,
    typer.Option(
        envvar="TREE", help="Draft tree: auto, chain, paper, or a branching list such as 2,1,1."
    ),
]
Strategies = Annotated[
    str,
    typer.Option(
        envvar="STRATEGIES",
        help="Of lookup, two-step, rounded, one-pass and auto, with commas between.",
    ),
]
Engine = Annotated[
    str, typer.Option(help="native, transformers, or auto: native where it can be had.")
]
SatId = Annotated[
    int | None,
    typer.Option(envvar="SAT_TOKEN_ID", help="Id of the SAT, whatever the checkpoint says."),
]
TrainedK = Annotated[
    int | None,
    typer.Option(envvar="TRAINED_K", help="Depth of its training, whatever the checkpoint says."),
]
DataLimit = Annotated[
    str,
    typer.Option(
        envvar="DATA_LIMIT", help="How many problems: a number, a share such as 3%, or 'all'."
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model", help="Hub id, model directory, adapter directory, or an embedded name."
    ),
]
_SOURCE_HELP = (
    "Folder of Python code, .jsonl (key prompt) or .txt file, or hub:NAME; repeat for more. "
    "Default: the Python installed here."
)
TemplateOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--template-option",
        envvar="TEMPLATE_OPTIONS",
        help=(
            "KEY=VALUE for the chat template, as enable_thinking=false; repeat for more. "
            "Default: as the template has it."
        ),
    ),
]
Sources = Annotated[list[str] | None, typer.Option("--source", help=_SOURCE_HELP)]


def _numbers(name: str, text: str, kind: Any = int) -> tuple[Any, ...]:
    """'0,1,5' -> (0, 1, 5)."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{name}={text}: expected numbers separated by commas") from None


def _number(name: str, text: str) -> float:
    """'0.2' -> 0.2."""
    found = _numbers(name, text, float)
    require(len(found) == 1, f"{name}={text}: expected one number")
    return found[0]


def _limit(data_limit: str) -> int | Fraction | None:
    """'all' -> None, '16' -> 16, '3%' -> 3/100."""
    if data_limit == "all":
        return None
    try:
        return Fraction(data_limit[:-1]) / 100 if data_limit.endswith("%") else int(data_limit)
    except (ValueError, ZeroDivisionError):
        raise InputError(
            f"data_limit={data_limit}: expected a number of problems, a share such as 3%, or 'all'"
        ) from None


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue or answer.")],
    model: ModelOption = embedded.NAME,
    style: Annotated[
        str,
        typer.Option(
            "--as", help="chat: a chat turn; code: complete a Python function; raw: as it is."
        ),
    ] = "chat",
    template_option: TemplateOptions = None,
    k: Annotated[
        int | None,
        typer.Option(
            "-k",
            "--k",
            help=(
                "SATs per draft; 0 is plain decoding. Default: the trained k, which auto "
                "goes up to."
            ),
        ),
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            help=(
                "auto, rounded, one-pass, two-step (the paper's), or lookup, without SATs; the "
                "text is the same."
            )
        ),
    ] = "auto",
    lookup: Annotated[
        int | None,
        typer.Option(
            help=(
                "Tokens to look up in the text so far as further drafts. Default: 12 for auto "
                "and lookup, else 0."
            )
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            help="Rows of a pass that one-pass and auto may use. Default: as many as pay here."
        ),
    ] = None,
    tree: Tree = "auto",
    max_new_tokens: Annotated[int, typer.Option(envvar="MAX_NEW_TOKENS")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: float = 1.0,
    seed: Annotated[int, typer.Option(envvar="SEED")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the text before this string; repeat for more.")
    ] = None,
    dtype: Dtype = "bfloat16",
    device: Device = "",
    sat_token_id: SatId = None,
    trained_k: TrainedK = None,
    engine: Engine = "auto",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run AR, and say whether the text is the same.")
    ] = False,
    svg: Annotated[
        Path | None,
        typer.Option(
            help="Save the coloured text as a picture; with --compare, an animated race against AR."
        ),
    ] = None,
) -> None:
    """Stream an answer; accepted drafts are green, the model's own tokens plain."""
    from sdsat.interfaces import terminal as show

    utf8("prompt", prompt)
    sampling = SamplingConfig(temperature, top_k, top_p, seed)
    from sdsat.method.tree import parse_tree

    decode = DecodeConfig(
        k,
        max_new_tokens,
        parse_tree(tree),
        sampling,
        (),
        tuple(stop or ()),
        strategy,
        budget,
        lookup,
    )
    require(style in ("chat", "code", "raw"), f"--as={style}: expected chat, code or raw")
    if svg is not None:
        destination(svg, "--svg")
    options = tuple(template_option or ())
    show.generate_in_terminal(
        prompt,
        model,
        style,
        options,
        decode,
        dtype,
        device,
        sat_token_id,
        trained_k,
        engine,
        compare,
        svg,
    )


@app.command()
def bench(
    method: Annotated[str, typer.Argument(help="greedy or nucleus.")],
    model: Model = "",
    gpus: Annotated[
        str,
        typer.Argument(
            help=(
                "cpu or 0,1,2,3, one worker each; 0+1,2+3: two GPUs a worker; empty: GPU 0 "
                "where there is one, else the CPU."
            )
        ),
    ] = "",
    temperature: Annotated[str, typer.Argument(help="For nucleus.")] = "1.0",
    k_list: Annotated[
        str | None, typer.Option(envvar="K_LIST", help="Values of k; AR (0) is always measured.")
    ] = None,
    strategies: Strategies = "two-step,auto",
    tree: Annotated[
        str | None,
        typer.Option(envvar="TREE", help="auto, chain, paper, or a branching list such as 2,1,1."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            envvar="DATASET",
            help=(
                "humaneval, infilling, infilling-psm or a .jsonl of prompts; more with commas "
                "between."
            ),
        ),
    ] = None,
    data_limit: DataLimit = "",
    max_new_tokens: Annotated[int | None, typer.Option(envvar="MAX_NEW_TOKENS")] = None,
    top_k: int = 10,
    top_p: float = 0.95,
    seed: Annotated[int, typer.Option(envvar="SEED")] = 0,
    dtype: Annotated[
        str | None, typer.Option(envvar="DTYPE", help="float32, bfloat16, float16, or auto.")
    ] = None,
    results: Annotated[Path, typer.Option(envvar="RESULTS_DIR")] = Path("results"),
    with_generate: Annotated[
        bool, typer.Option("--with-generate", help="Also time transformers' own greedy generate.")
    ] = False,
    lookup: Annotated[
        int,
        typer.Option(
            envvar="LOOKUP",
            help="Tokens that auto and lookup look up; 0: auto without looking up, alone.",
        ),
    ] = NUM_LOOKUP,
    template_option: TemplateOptions = None,
    turns: Annotated[
        int, typer.Option(envvar="TURNS", help="Times each is measured; the median run counts.")
    ] = 1,
    engine: Engine = "auto",
    sat_token_id: SatId = None,
    trained_k: TrainedK = None,
) -> None:
    """Measure AR and SDSAT, interleaved; writes JSON, a table and plots.

    What is left open is as in the paper for CodeLlama-form SDSAT checkpoints: HumanEval's first
    half, up to 512 new tokens, and the first 3 % of single-line infilling, up to 50; k = 0..13
    greedy, 0,5,7,9,11,13 with the paper's trees for nucleus; weights in their own dtype. For other
    models: HumanEval, all, up to 256; k = 0,1,3,5,7; bfloat16. On a CPU 6 problems.
    """
    import torch

    from sdsat.evaluation import report as reports
    from sdsat.evaluation.bench import BenchConfig, paper_settings
    from sdsat.evaluation.bench import bench as run
    from sdsat.models import loading

    model = model or embedded.NAME
    devices = (gpus or ("0" if torch.cuda.is_available() else "cpu")).split(",")
    like_paper = loading.in_papers_form(model, sat_token_id, trained_k)
    ks = None if k_list is None else _numbers("k_list", k_list)
    options = {"k_list": ks, "tree": tree, "max_new_tokens": max_new_tokens, "dtype": dtype}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if data_limit or "cpu" in devices:
        given["data_limit"] = _limit(data_limit or "6")
    configs = [
        BenchConfig(
            model=model,
            method=method,
            strategies=tuple(strategies.split(",")),
            temperature=_number("temperature", temperature),
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            dataset=name,
            with_generate=with_generate,
            turns=turns,
            engine=engine,
            sat_token_id=sat_token_id,
            trained_k=trained_k,
            lookup=lookup,
            template_options=tuple(template_option or ()),
            **{**(paper_settings(method, name) if like_paper else {}), **given},
        )
        for name in (dataset or ("humaneval,infilling" if like_paper else "humaneval")).split(",")
    ]
    died: list[str] = []
    for config in configs:
        folder, dead = run(config, devices, results)
        died += dead
        if any(folder.glob("worker_*.json")):
            summary = reports.report(folder)
            Console(width=max(110, Console().width)).print(reports.rich_table(summary))
            count = summary["runs"][0]["num_problems"]
            print(
                f"{count} problems of {config.dataset} (DATA_LIMIT=all for a full run); "
                f"JSON and plots: {folder}"
            )
    if died:
        raise SystemExit(
            f"error: {', '.join(died)} died; run the same command again to finish its problems"
        )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A results folder with worker_*.json.")],
    markdown: bool = False,
) -> None:
    """Merge a results folder again: print its table, rewrite summary.json, redraw the plots."""
    from sdsat.evaluation import report as reports

    summary = reports.report(folder)
    if markdown:
        print(reports.markdown_table(summary))
    else:
        Console(width=max(110, Console().width)).print(reports.rich_table(summary))


@app.command()
def verify(
    model: Model = embedded.NAME,
    k_list: Annotated[str, typer.Option(envvar="K_LIST")] = "1,3,5,7",
    strategies: Annotated[
        str,
        typer.Option(
            envvar="STRATEGIES",
            help="Of lookup, two-step, rounded, one-pass and auto; empty: all that run here.",
        ),
    ] = "",
    tree: Annotated[list[str] | None, typer.Option(help="Draft tree; repeat for more.")] = None,
    temperature: Annotated[
        str, typer.Option(help="Comma-separated; 0 is greedy, and compared with transformers too.")
    ] = "0",
    seeds: Annotated[str, typer.Option(help="Comma-separated; for temperatures above 0.")] = "0",
    top_k: int = 10,
    top_p: float = 0.95,
    data_limit: DataLimit = "40",
    template_option: TemplateOptions = None,
    max_new_tokens: Annotated[int, typer.Option(envvar="MAX_NEW_TOKENS")] = 128,
    dtype: Annotated[
        str, typer.Option(envvar="DTYPE", help="Comma-separated: float32, bfloat16, float16.")
    ] = "float32",
    device: Device = "",
    sat_token_id: SatId = None,
    trained_k: TrainedK = None,
    engine: Engine = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help=(
                "JSON file for every comparison; an interrupted audit resumes. Several dtypes: "
                "OUT_<dtype>.json each."
            )
        ),
    ] = None,
) -> None:
    """Audit exactness: SDSAT against AR, and AR against transformers' generate; exit code 1 on an
    unexplained difference.
    """
    import torch
    from rich.table import Table

    from sdsat.decoding.loop import Decoder
    from sdsat.evaluation.verify import VerifyConfig, divergences
    from sdsat.evaluation.verify import verify as run
    from sdsat.models import dtypes

    temperatures = _numbers("temperature", temperature, float)
    trees = tuple(tree or ["auto"])
    config = VerifyConfig(
        _numbers("k_list", k_list),
        tuple(strategies.split(",")) if strategies else (),
        trees,
        temperatures,
        _numbers("seeds", seeds),
        top_k,
        top_p,
        _limit(data_limit),
        max_new_tokens,
        tuple(template_option or ()),
    )
    names = list(dict.fromkeys(dtype.split(",")))
    files: dict[str, Path | None] = {}
    for name in names:
        dtypes.check_dtype(name)
        files[name] = (
            out.with_name(f"{out.stem}_{name}{out.suffix}")
            if out is not None and len(names) > 1
            else out
        )
        if (file := files[name]) is not None:
            destination(file, "--out")
    columns = (
        "dtype",
        "against",
        "temperature",
        "seed",
        "k",
        "tree",
        "identical",
        "share",
        "largest_margin",
        "explained",
    )
    table = Table(*columns, title=f"{model}: outputs equal to AR's, token for token")
    lines: list[str] = []
    rows: list[dict[str, Any]] = []
    for name in names:
        loaded = Decoder.load(model, name, device, sat_token_id, engine, trained_k=trained_k)
        document = run(loaded, config, files[name])
        lines += divergences(document, loaded.model.tokenizer)
        rows += [{"dtype": document["settings"]["dtype"], **row} for row in document["summary"]]
        del loaded  # before the next one is loaded
        gc.collect()
        torch.cuda.empty_cache()
    for row in rows:
        share = row["identical"] / row["num_problems"]
        texts = {"identical": f"{row['identical']}/{row['num_problems']}", "share": f"{share:.0%}"}
        if share == 1:
            texts["explained"] = ""
        cells = {**row, **texts}
        table.add_row(*("" if cells[column] is None else str(cells[column]) for column in columns))
    Console(width=max(120, Console().width)).print(table)
    for line in lines:
        print(line)
    ours = [row for row in rows if row["against"] != "transformers"]
    same, count = (sum(row[key] for row in ours) for key in ("identical", "num_problems"))
    print(f"{same} of SDSAT's {count} outputs are AR's, token for token")
    if not all(row["explained"] for row in rows):
        raise SystemExit("error: a difference that rounding can't explain; it is among those above")


@app.command("eval")
def evaluate(
    model: Model = embedded.NAME,
    k_list: Annotated[
        str, typer.Option(envvar="K_LIST", help="Values of k; AR (0) is always there.")
    ] = "5",
    strategies: Strategies = "two-step,auto",
    tree: Tree = "auto",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    samples: Annotated[
        int,
        typer.Option(
            help="Answers to each problem, with seeds 0, 1, ...; for temperatures above 0."
        ),
    ] = 1,
    top_k: int = 10,
    top_p: float = 0.95,
    data_limit: DataLimit = "all",
    template_option: TemplateOptions = None,
    max_new_tokens: Annotated[int, typer.Option(envvar="MAX_NEW_TOKENS")] = 256,
    dtype: Dtype = "bfloat16",
    device: Device = "",
    sat_token_id: SatId = None,
    trained_k: TrainedK = None,
    engine: Engine = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file for every completion; an interrupted run resumes."),
    ] = None,
) -> None:
    """Run HumanEval answers of AR and SDSAT against the tests: pass@k side by side.

    Runs what the model writes, in a sandbox (docs/results.md says what it keeps out).
    """
    from rich.table import Table

    from sdsat.decoding.loop import Decoder
    from sdsat.evaluation.quality import QualityConfig
    from sdsat.evaluation.quality import evaluate as run

    if out is not None:
        destination(out, "--out")
    limit = _limit(data_limit)
    ks = _numbers("k_list", k_list)
    names = tuple(strategies.split(","))
    options = tuple(template_option or ())
    config = QualityConfig(
        ks, names, tree, temperature, samples, top_k, top_p, limit, max_new_tokens, options
    )
    document = run(
        Decoder.load(model, dtype, device, sat_token_id, engine, trained_k=trained_k), config, out
    )
    table = Table(*document["summary"][0], title=f"{model}, {dtype}: HumanEval")
    for row in document["summary"]:
        table.add_row(*map(str, row.values()))
    Console(width=max(120, Console().width)).print(table)
    drafted = document["summary"][1:]
    if drafted:
        same, count = (sum(row[key] for row in drafted) for key in ("identical", "num_completions"))
        print(f"{same} of SDSAT's {count} completions are AR's, token for token")


@app.command()
def inspect(
    model: Model = embedded.NAME,
    text: Annotated[
        Path | None, typer.Option(help=".jsonl with prompt and completion. Default: HumanEval.")
    ] = None,
    data_limit: DataLimit = "16",
    template_option: TemplateOptions = None,
    max_new_tokens: Annotated[int, typer.Option(envvar="MAX_NEW_TOKENS")] = 128,
    out: Annotated[Path | None, typer.Option(help="JSON file for all figures.")] = None,
    dtype: Dtype = "bfloat16",
    device: Device = "",
    sat_token_id: SatId = None,
    trained_k: TrainedK = None,
) -> None:
    """Show draft quality by depth, and why acceptance is what it is."""
    from sdsat.decoding.loop import Decoder
    from sdsat.evaluation import inspection
    from sdsat.tasks import prompts
    from sdsat.tasks.datasets import check_limit

    limit = _limit(data_limit)
    check_limit(limit)
    require(text is None or text.is_file(), f"text={text}: no such file")
    if out is not None:
        destination(out, "--out")
    loaded = Decoder.load(model, dtype, device, sat_token_id, trained_k=trained_k)
    answered = prompts.answered_problems(
        loaded.model.tokenizer, text, limit, tuple(template_option or ())
    )
    require(len(answered) > 0, f"text={text}: no prompts there")
    document = inspection.inspect(loaded, answered, max_new_tokens)
    if out is not None:
        write_json(out, document)
    console = Console()
    console.print(inspection.inspection_table(document))
    for line in document["findings"]:
        console.print(line, highlight=False)


@app.command()
def distill(
    out: Annotated[Path, typer.Option(help="Folder for the token shards.")],
    source: Sources = None,
    model: ModelOption = embedded.BASE_NAME,
    limit: Annotated[int | None, typer.Option(help="How many prompts; default all.")] = None,
    temperatures: Annotated[
        str, typer.Option(help="The prompts take these in turn.")
    ] = "0,0,0.2,1.0",
    answers: Annotated[
        int, typer.Option(help="Answers to a prompt, each at the temperature after the last one's.")
    ] = 1,
    kinds: Annotated[
        str,
        typer.Option(
            help=(
                "What is asked about functions: complete, words, fix, test, explain; with "
                "weights: complete=3,words."
            )
        ),
    ] = "complete",
    avoid: Annotated[
        list[Path] | None,
        typer.Option(
            help=(
                "Benchmark that no prompt may overlap, beside HumanEval: a .jsonl file; repeat "
                "for more."
            )
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(envvar="MAX_NEW_TOKENS")] = 224,
    max_prompt_tokens: int = 224,
    template_option: TemplateOptions = None,
    batch_size: int = 96,
    shard_size: int = 512,
    seed: Annotated[int, typer.Option(envvar="SEED")] = 0,
    dtype: Dtype = "bfloat16",
    device: Device = "",
) -> None:
    """Write the model's own answers to prompts, as training shards; resumes."""
    from sdsat.decoding.loop import Decoder
    from sdsat.tasks import prompts
    from sdsat.training import distill

    levels = _numbers("temperatures", temperatures, float)
    manifest = distill.distill(
        Decoder.load(model, dtype, device or _own_gpu()),
        source or prompts.default_sources(),
        out,
        limit,
        levels,
        max_new_tokens,
        max_prompt_tokens,
        batch_size,
        shard_size,
        seed,
        answers,
        tuple(template_option or ()),
        prompts.parse_kinds(kinds),
        tuple(avoid or ()),
    )
    tokens = sum(shard["num_answer_tokens"] for shard in manifest["shards"])
    if _is_first():
        print(f"{out}: {tokens} answer tokens; prompts: {manifest['settings']['prompts']}")


@app.command()
def train(
    data: Annotated[
        Path,
        typer.Option(
            help="Folder written by `sdsat distill`, or plain text or code: a file or a folder."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the result; an interrupted run resumes from it.")
    ],
    model: ModelOption = embedded.BASE_NAME,
    mode: Annotated[
        str,
        typer.Option(
            help=(
                "adapter: on SATs only; everywhere: an adapter that a server can merge; full: "
                "all weights."
            )
        ),
    ] = "adapter",
    steps: int = 2000,
    k: Annotated[int, typer.Option(help="Depth: SATs per group.")] = 7,
    rank: Annotated[int, typer.Option(help="Adapter: rank of the updates.")] = 32,
    targets: Annotated[
        str, typer.Option(help="Adapter: names of the linear layers that get an update.")
    ] = TARGETS,
    head: Annotated[
        int, typer.Option(help="Adapter: inner size of the draft head, 0 for none.")
    ] = 1024,
    anchors: Annotated[int, typer.Option(help="SAT groups per sequence and step.")] = 96,
    keep: Annotated[
        float, typer.Option(help="A group goes one deeper with this probability.")
    ] = 0.8,
    soft: Annotated[
        float,
        typer.Option(help="Share of distillation from the base's own distribution in the loss."),
    ] = 0.0,
    decay: Annotated[
        float, typer.Option(help="Loss weight of a depth relative to the one before.")
    ] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Sequences per micro-batch and process.")] = 2,
    accumulate: Annotated[int, typer.Option(help="Micro-batches per step.")] = 1,
    lr: Annotated[
        float | None, typer.Option(help="Default: 1e-3 for adapters, 2e-5 in full mode.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="Adapter directory to start from.")] = None,
    standard: Annotated[
        float,
        typer.Option(help="Not for adapter: weight of a standard token's loss beside a SAT's."),
    ] = 1.0,
    embedding_steps: Annotated[
        int, typer.Option(help="Full mode: first train only the SAT's embedding, so many steps.")
    ] = 0,
    checkpointing: Annotated[
        bool, typer.Option(help="Full mode: gradient checkpointing, less memory for more time.")
    ] = False,
    held_out: Annotated[int, typer.Option(help="Sequences to evaluate on, never trained on.")] = 48,
    seed: Annotated[int, typer.Option(envvar="SEED")] = 0,
    eval_every: int = 200,
    dtype: Annotated[
        str | None,
        typer.Option(
            envvar="DTYPE",
            help=(
                "Of the frozen base. Default: bfloat16 where the device is fast in it; full "
                "mode: float32."
            ),
        ),
    ] = None,
    device: Device = "",
) -> None:
    """Train an adapter for a frozen base, or a whole model; also runs under `accelerate launch`."""
    # OpenMP reads this when torch is imported. Threads that spin where they wait for each other
    # keep from work the one they wait for as soon as another process has a core of theirs: a step
    # then takes two to ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from sdsat.models import devices, loading
    from sdsat.training import shards
    from sdsat.training.loop import train as run

    config = TrainConfig(
        steps=steps,
        k=k,
        rank=rank,
        targets=targets,
        head=head,
        anchors=anchors,
        keep=keep,
        soft=soft,
        decay=decay,
        batch_size=batch_size,
        accumulate=accumulate,
        lr=lr if lr is not None else (2e-5 if mode == "full" else 1e-3),
        init=init,
        mode=mode,
        standard=standard,
        embedding_steps=embedding_steps,
        checkpointing=checkpointing,
        seed=seed,
        eval_every=eval_every,
        held_out=held_out,
    )
    require(
        "+" not in device,
        (
            f"device={device}: training takes one GPU a process; expected one, or accelerate "
            "launch for more"
        ),
    )
    device = device or _own_gpu()
    dtype = "float32" if mode == "full" else dtype or devices.training_dtype(device)
    loaded = loading.load(model, dtype, device)
    run(loaded, shards.read_sequences(data, loaded.tokenizer), out, config)
    if _is_first():
        hint = (
            f"sdsat export {out} --out DRAFT"
            if mode == "everywhere"
            else f'sdsat generate "..." --model {out}'
        )
        print(f"{out}: saved; try `{hint}`")


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="An SDSAT checkpoint, or an adapter of `sdsat train --mode everywhere`."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New directory for the draft that a server reads.")],
    num_speculative_tokens: Annotated[
        int | None,
        typer.Option(
            help="Drafts a pass, the guess at the last token included. Default: the trained k + 1."
        ),
    ] = None,
    mask_token_id: Annotated[
        int | None,
        typer.Option(help="Adapter: token that becomes the SAT. Default: one that nothing uses."),
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of a machine, for the printed commands.")] = 8,
    nodes: Annotated[int, typer.Option(help="Machines, for the printed commands.")] = 2,
) -> None:
    """Write what vLLM's parallel drafting and TensorRT-LLM read, and print the commands that serve
    it.
    """
    from sdsat.interfaces.export import export as run

    require(gpus >= 1 and nodes >= 1, f"gpus={gpus}, nodes={nodes}: expected 1 or more")
    print(run(model, out, num_speculative_tokens, mask_token_id).commands(gpus, nodes))


def _is_first() -> bool:
    """Whether this is the only process, or the first that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _own_gpu() -> str:
    """Under a launcher, each process's own GPU."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    return local if local and torch.cuda.is_available() else ""


def run(command: Callable[..., None]) -> None:
    """Entry point of a script with one command, whose arguments and errors are handled as this
    program's own.
    """
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    script.command()(command)
    main(script)


def main(application: typer.Typer = app) -> None:
    """Entry point: run the app and turn every expected failure into one line and an exit code."""
    plain_warnings()
    try:
        code = application(standalone_mode=False)
        if code == 130:  # how typer reports an interrupt
            code = _fail(_INTERRUPTED, code)
    except InputError as error:
        code = _fail(str(error), 2)
    except UsageError as error:
        code = _fail(error.format_message(), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail(_INTERRUPTED, 130)
    except SystemExit as error:
        code = _fail(error.code, 1) if isinstance(error.code, str) else error.code
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be imported
            raise
        code = _fail(str(error).splitlines()[0], 1)
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    Console(stderr=True, soft_wrap=True).print(
        Text(message if message.startswith("error") else f"error: {message}")
    )
    return code
