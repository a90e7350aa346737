"""`sdsat generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdsat.cli.options import (
    PLANNED,
    Defaults,
    ModelOption,
    TemplateOptions,
    from_settings,
    writable,
)
from sdsat.cli.program import decode_settings, load_decoder
from sdsat.config import DecodeConfig, HubConfig, LoadConfig, SamplingConfig, require, utf8
from sdsat.models import embedded
from sdsat.models.hub import at_revision


@from_settings
def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue or answer.")],
    *,
    model: ModelOption = embedded.NAME,
    hub: HubConfig,
    style: Annotated[
        str,
        typer.Option(
            "--as", help="chat: a chat turn; code: complete a Python function; raw: as it is."
        ),
    ] = "chat",
    template_option: TemplateOptions = None,
    decode: Annotated[DecodeConfig, Defaults(**PLANNED)],
    sampling: SamplingConfig,
    load: LoadConfig,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run AR, and say whether the text is the same.")
    ] = False,
    svg: Annotated[
        Path | None,
        typer.Option(help="Save the coloured text as a picture.", callback=writable),
    ] = None,
) -> None:
    """Stream an answer; accepted drafts are green, the model's own tokens plain."""
    from sdsat.interfaces.terminal import encode, generate_in_terminal
    from sdsat.models import loading

    require(prompt != "", "prompt: empty; expected some text")
    utf8("prompt", prompt)
    require(style in ("chat", "code", "raw"), f"--as={style}: expected chat, code or raw")
    model = at_revision(model, hub.revision)
    decode = decode_settings(model, decode, sampling, load)
    options = tuple(template_option or ())
    if options:
        encode(loading.load_tokenizer(model), prompt, style, options)  # refuses them, as well
    generate_in_terminal(load_decoder(model, load), prompt, decode, style, options, compare, svg)
