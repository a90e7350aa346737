"""`sdsat export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdsat.config import require


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
    """  # noqa: D205 (`--help` shows it as one paragraph)
    from sdsat.interfaces.export import export as run

    require(gpus >= 1 and nodes >= 1, f"gpus={gpus}, nodes={nodes}: expected 1 or more")
    print(run(model, out, num_speculative_tokens, mask_token_id).commands(gpus, nodes))
