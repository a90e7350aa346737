"""`sdsat distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdsat.cli.options import ModelOption, Only, from_settings
from sdsat.cli.program import check_template_options, is_first, own_gpu
from sdsat.config import DistillConfig, HubConfig, LoadConfig
from sdsat.models import embedded
from sdsat.models.hub import at_revision


@from_settings
def distill(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the token shards.")],
    source: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Folder of Python code, .jsonl (key prompt) or .txt file, or hub:NAME; repeat for "
                "more. Default: the Python installed here."
            )
        ),
    ] = None,
    model: ModelOption = embedded.BASE_NAME,
    hub: HubConfig,
    config: DistillConfig,
    load: Annotated[LoadConfig, Only("dtype", "device")],
) -> None:
    """Write the model's own answers to prompts, as training shards; resumes."""
    from sdsat.decoding.decoder import Decoder
    from sdsat.tasks import prompts
    from sdsat.training import distill as distillation

    model = at_revision(model, hub.revision)
    sources = source or prompts.default_sources()
    prompts.check_sources(sources)
    prompts.parse_kinds(config.kinds)
    check_template_options(model, config.template_options)
    manifest = distillation.distill(
        Decoder.load(model, load.dtype, load.device or own_gpu()),
        sources,
        out,
        config,
    )
    tokens = sum(shard["num_answer_tokens"] for shard in manifest["shards"])
    if is_first():
        print(f"{out}: {tokens} answer tokens; prompts: {manifest['settings']['prompts']}")
