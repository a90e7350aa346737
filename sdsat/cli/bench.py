"""`sdsat bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdsat.cli.options import Given, Model, from_settings
from sdsat.cli.program import show
from sdsat.cli.report import write_page
from sdsat.config import HubConfig, numbers_of, require
from sdsat.evaluation.sweep import BenchConfig, paper_settings
from sdsat.models import embedded
from sdsat.models.hub import at_revision
from sdsat.tasks.datasets import NAMES

_CPU_PROBLEMS = 6  # of a run on a CPU where nothing else is said


@from_settings
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
    *,
    hub: HubConfig,
    asked: Given[BenchConfig],
    dataset: Annotated[
        str | None,
        typer.Option(
            envvar="DATASET",
            help=(f"{', '.join(NAMES)} or a .jsonl of prompts; more with commas between."),
        ),
    ] = None,
    results: Annotated[Path, typer.Option(envvar="RESULTS_DIR")] = Path("results"),
) -> None:
    """Measure AR and SDSAT, interleaved; writes JSON, texts, a table, plots and a page.

    What is left open is as in the paper for CodeLlama-form SDSAT checkpoints: HumanEval's first
    half, up to 512 new tokens, and the first 3 % of single-line infilling, up to 50; k = 0..13
    greedy, 0,5,7,9,11,13 with the paper's trees for nucleus; weights in their own dtype. For other
    models: HumanEval, all, up to 256; k = 0,1,3,5,7; bfloat16. On a CPU 6 problems.
    """
    import torch

    from sdsat.evaluation.bench import bench as run

    model = at_revision(model or embedded.NAME, hub.revision)
    devices = (gpus or ("0" if torch.cuda.is_available() else "cpu")).split(",")
    if "cpu" in devices:
        asked.values.setdefault("data_limit", _CPU_PROBLEMS)
    died: list[str] = []
    for config in _configs(asked, method, model, temperature, dataset):
        folder, dead = run(config, devices, results)
        died += dead
        _report(folder, config.dataset)
    if died:
        raise SystemExit(
            f"error: {', '.join(died)} died; run the same command again to finish its problems"
        )


def _configs(
    asked: Given[BenchConfig], method: str, model: str, temperature: str, dataset: str | None
) -> list[BenchConfig]:
    """Make the settings for each data set.

    What is left open is the paper's for models of its form.

    Args:
        asked: the options that were given.
        method: as the command has it.
        model: as the command has it.
        temperature: one number, as a text.
        dataset: names with commas between; None where nothing was said.

    Raises:
        InputError: for what can't be measured.
    """
    from sdsat.models import loading

    level = numbers_of("temperature", temperature, float)
    require(len(level) == 1, f"temperature={temperature}: expected one number")
    like_paper = loading.in_papers_form(
        model, asked.values.get("sat_token_id"), asked.values["trained_k"]
    )
    names = dataset or ("humaneval,infilling" if like_paper else "humaneval")
    return [
        asked.make(
            paper_settings(method, name) if like_paper else {},
            model=model,
            method=method,
            temperature=level[0],
            dataset=name,
        )
        for name in names.split(",")
    ]


def _report(folder: Path, dataset: str) -> None:
    """Print the table of what was measured; nothing where no problem is finished."""
    from sdsat.evaluation import report as reports

    if any(folder.glob("worker_*.json")):
        summary = reports.report(folder)
        show(reports.rich_table(summary), reports.WIDTH)
        write_page([folder], [summary], folder / "index.html")
        count = summary["runs"][0]["num_problems"]
        print(
            f"{count} problems of {dataset} (DATA_LIMIT=all for a full run); "
            f"JSON, texts, plots and page: {folder}"
        )
