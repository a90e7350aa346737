"""`sdsat inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console

from sdsat.cli.options import Model, Only, from_settings, out_file
from sdsat.cli.program import check_template_options, load_decoder
from sdsat.config import HubConfig, LoadConfig, require
from sdsat.evaluation.sweep import InspectConfig
from sdsat.files import write_json
from sdsat.models import embedded
from sdsat.models.hub import at_revision


@from_settings
def inspect(
    model: Model = embedded.NAME,
    *,
    hub: HubConfig,
    config: InspectConfig,
    out: Annotated[Path | None, out_file("JSON file for all figures.")] = None,
    load: Annotated[LoadConfig, Only("dtype", "device", "sat_token_id", "trained_k")],
) -> None:
    """Show draft quality by depth, and why acceptance is what it is."""
    from sdsat.evaluation import inspection
    from sdsat.tasks import prompts

    model = at_revision(model, hub.revision)
    check_template_options(model, config.template_options)
    loaded = load_decoder(model, load)
    answered = prompts.answered_problems(
        loaded.model.tokenizer,
        config.text or config.dataset,
        config.data_limit,
        config.template_options,
    )
    require(len(answered) > 0, f"text={config.text}: no prompts there")
    document = inspection.inspect(loaded, answered, config)
    if out is not None:
        write_json(out, document)
    console = Console()
    console.print(inspection.inspection_table(document))
    console.print(inspection.candidates_table(document))
    for line in document["findings"]:
        console.print(line, highlight=False)
