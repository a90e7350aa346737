"""`sdsat export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdsat.cli.options import MODEL_HELP, from_settings
from sdsat.config import HubConfig, require
from sdsat.models.hub import at_revision


@from_settings
def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    *,
    hub_settings: HubConfig,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New directory for the draft that a server reads: of an SDSAT checkpoint, or of "
            "an adapter of `sdsat train --mode everywhere`."
        ),
    ] = None,
    hub: Annotated[
        Path | None,
        typer.Option(
            help="New directory for the hub, with the base: plain transformers code loads it."
        ),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --hub: folder of `sdsat bench` for the model card; repeat for more."
        ),
    ] = None,
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
    """Write what others load: a folder for the Hugging Face hub, or what vLLM's parallel drafting
    and TensorRT-LLM read, and the commands that serve it.
    """  # noqa: D205 (`--help` shows it as one paragraph)
    require((out is None) != (hub is None), "out, hub: expected one of --out DIR and --hub DIR")
    require(gpus >= 1 and nodes >= 1, f"gpus={gpus}, nodes={nodes}: expected 1 or more")
    model = at_revision(model, hub_settings.revision)
    if out is not None:
        from sdsat.interfaces.export import export as run

        require(not results, "results: only for the model card of --hub")
        print(run(model, out, num_speculative_tokens, mask_token_id).commands(gpus, nodes))
        return
    assert hub is not None
    for name, value in (
        ("num_speculative_tokens", num_speculative_tokens),
        ("mask_token_id", mask_token_id),
    ):
        require(value is None, f"{name}={value}: only for a server's draft, with --out")
    from sdsat.interfaces.hub_export import export_to_hub

    export_to_hub(model, hub, _measured(model, results or []))
    print(f"{hub}: written; try it as MODEL, and share it with `hf upload USER/NAME {hub}`")


def _measured(model: str, folders: list[Path]) -> str:
    """Write what results folders say of a model, as Markdown.

    Raises InputError, one line, for a folder without results, or with those of other weights.
    """
    from sdsat.evaluation.report import markdown_table
    from sdsat.evaluation.summary import describe, read_workers, summarize
    from sdsat.models.identity import adapter_hash, base_hash

    tables = []
    for folder in folders:
        documents = read_workers(folder)
        require(len(documents) > 0, f"results={folder}: holds no worker_*.json")
        summary = summarize(documents)
        measured = summary["environment"]
        for part, own in (("adapter", adapter_hash(model)), ("base", base_hash(model))):
            require(
                measured.get(part) == own,
                f"results={folder}: measured with another {part} than that of {model}",
            )
        tables.append(f"{describe(summary)}:\n\n{markdown_table(summary)}")
    return "\n".join(tables)
