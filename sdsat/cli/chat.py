"""`sdsat chat`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sdsat.cli.options import PLANNED, Defaults, Model, TemplateOptions, from_settings
from sdsat.cli.program import decode_settings, load_decoder
from sdsat.config import DecodeConfig, HubConfig, LoadConfig, SamplingConfig, require, utf8
from sdsat.models import embedded
from sdsat.models.hub import at_revision


@from_settings
def chat(
    model: Model = embedded.NAME,
    *,
    hub: HubConfig,
    system: Annotated[str, typer.Option(help="What the model is told before the first turn.")] = "",
    template_option: TemplateOptions = None,
    decode: Annotated[DecodeConfig, Defaults(**PLANNED, max_new_tokens=1024)],
    sampling: SamplingConfig,
    load: LoadConfig,
) -> None:
    """Talk with a model; accepted drafts are green. Piped, each line is a turn."""
    from sdsat.interfaces.chat import system_turns
    from sdsat.interfaces.chat_terminal import Face, Piped, Typed, chat_in_terminal
    from sdsat.models import loading
    from sdsat.tasks.prompts import text_of_turns

    for name in ("stdin", "stdout"):
        require(getattr(sys, name) is not None, f"{name}: closed; expected a terminal or a pipe")
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    face: Face = Typed() if typed else Piped(sys.stdin.buffer)
    model = at_revision(model, hub.revision)
    decode = decode_settings(model, decode, sampling, load)
    options = tuple(template_option or ())
    turns = [*system_turns(utf8("system", system)), {"role": "user", "content": ""}]
    text_of_turns(loading.load_tokenizer(model), turns, options)  # refuses what it doesn't take
    if typed:
        face.note(f"loading {model}")
    chat_in_terminal(load_decoder(model, load), decode, face, system, options)
