"""`sdsat generate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sdsat.cli.options import (
    Defaults,
    ModelOption,
    TemplateOptions,
    from_settings,
    writable,
)
from sdsat.cli.program import load_decoder
from sdsat.config import DecodeConfig, LoadConfig, SamplingConfig, require, utf8
from sdsat.models import embedded


@from_settings
def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue or answer.")],
    *,
    model: ModelOption = embedded.NAME,
    style: Annotated[
        str,
        typer.Option(
            "--as", help="chat: a chat turn; code: complete a Python function; raw: as it is."
        ),
    ] = "chat",
    template_option: TemplateOptions = None,
    decode: Annotated[DecodeConfig, Defaults(k=None, strategy="auto")],
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
    from sdsat.interfaces.terminal import generate_in_terminal
    from sdsat.method.tree import parse_tree

    require(prompt != "", "prompt: empty; expected some text")
    utf8("prompt", prompt)
    require(style in ("chat", "code", "raw"), f"--as={style}: expected chat, code or raw")
    decode = replace(decode, sampling=sampling, tree=parse_tree(decode.tree_name))
    options = tuple(template_option or ())
    generate_in_terminal(load_decoder(model, load), prompt, decode, style, options, compare, svg)
