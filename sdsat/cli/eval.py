"""`sdsat eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from sdsat.cli.options import Model, from_settings, out_file
from sdsat.cli.program import check_template_options, load_decoder, show
from sdsat.config import HubConfig, LoadConfig
from sdsat.evaluation.sweep import QualityConfig
from sdsat.models import embedded
from sdsat.models.hub import at_revision


@from_settings
def evaluate(
    model: Model = embedded.NAME,
    *,
    hub: HubConfig,
    config: QualityConfig,
    load: LoadConfig,
    out: Annotated[
        Path | None,
        out_file("JSON file for every completion; an interrupted run resumes."),
    ] = None,
) -> None:
    """Run HumanEval answers of AR and SDSAT against the tests: pass@k side by side.

    Runs what the model writes, in a sandbox (docs/results.md says what it keeps out).
    """
    from sdsat.evaluation import quality

    model = at_revision(model, hub.revision)
    check_template_options(model, config.template_options)
    document = quality.evaluate(load_decoder(model, load), config, out)
    show(quality.quality_table(document, f"{model}, {load.dtype}: HumanEval"), 120)
    if line := quality.closing_line(document):
        print(line)
