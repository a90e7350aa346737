"""`sdsat train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sdsat.cli.options import ModelOption, Only, from_settings
from sdsat.cli.program import is_first, own_gpu
from sdsat.config import HubConfig, LoadConfig, TrainConfig, require
from sdsat.models import embedded
from sdsat.models.hub import at_revision


@from_settings
def train(
    *,
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
    hub: HubConfig,
    config: TrainConfig,
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
    load: Annotated[LoadConfig, Only("device")],
) -> None:
    """Train an adapter for a frozen base, or a whole model; also runs under `accelerate launch`."""
    # OpenMP reads this when torch is imported. Threads that spin where they wait for each other
    # keep from work the one they wait for as soon as another process has a core of theirs: a step
    # then takes two to ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from sdsat.models import devices, loading
    from sdsat.models.dtypes import WITH_INTEGERS
    from sdsat.training import loop, shards

    require(
        "+" not in load.device,
        f"device={load.device}: training takes one GPU a process; expected one, or accelerate "
        "launch for more",
    )
    device = load.device or own_gpu()
    dtype = "float32" if config.mode == "full" else dtype or devices.training_dtype(device)
    require(
        dtype not in WITH_INTEGERS,
        f"dtype={dtype}: only for decoding; expected float32 or bfloat16",
    )
    model = at_revision(model, hub.revision)
    loaded = loading.load(model, dtype, device)
    loop.train(loaded, shards.read_sequences(data, loaded.tokenizer), out, config)
    if is_first():
        hint = (
            f"sdsat export {out} --out DRAFT"
            if config.mode == "everywhere"
            else f'sdsat generate "..." --model {out}'
        )
        print(f"{out}: saved; try `{hint}`")
