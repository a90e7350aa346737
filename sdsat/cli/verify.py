"""`sdsat verify`."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sdsat.cli.options import Model, Only, from_settings, out_file
from sdsat.cli.program import check_template_options, load_decoder, show
from sdsat.config import DTYPE, DTYPES, HubConfig, LoadConfig
from sdsat.evaluation.sweep import VerifyConfig
from sdsat.models import embedded
from sdsat.models.hub import at_revision


@from_settings
def verify(
    model: Model = embedded.NAME,
    *,
    hub: HubConfig,
    config: VerifyConfig,
    dtype: Annotated[
        str,
        typer.Option(envvar=DTYPE.env, help=f"With commas between: {DTYPES}."),
    ] = "float32",
    load: Annotated[LoadConfig, Only("device", "sat_token_id", "trained_k", "engine")],
    out: Annotated[
        Path | None,
        out_file(
            "JSON file for every comparison; an interrupted audit resumes. Several dtypes: "
            "OUT_<dtype>.json each."
        ),
    ] = None,
) -> None:
    """Audit exactness: SDSAT against AR, and AR against transformers' generate; exit code 1 on an
    unexplained difference.
    """  # noqa: D205 (`--help` shows it as one paragraph)
    import torch

    from sdsat.evaluation import verify as audits
    from sdsat.models import dtypes

    model = at_revision(model, hub.revision)
    names = list(dict.fromkeys(dtype.split(",")))
    for name in names:
        dtypes.check_dtype(name)
    check_template_options(model, config.template_options)
    documents: list[dict[str, Any]] = []
    lines: list[str] = []
    for name in names:
        file = out.with_name(f"{out.stem}_{name}{out.suffix}") if out and len(names) > 1 else out
        loaded = load_decoder(model, replace(load, dtype=name))
        documents.append(audits.verify(loaded, config, file))
        lines += audits.divergences(documents[-1], loaded.model.tokenizer)
        del loaded  # before the next one is loaded
        gc.collect()
        torch.cuda.empty_cache()
    rows = audits.audit_rows(documents)
    show(audits.audit_table(rows, f"{model}: outputs equal to AR's, token for token"), 120)
    for line in lines:
        print(line)
    print(audits.closing_line(rows))
    if not all(row["explained"] for row in rows):
        raise SystemExit("error: a difference that rounding can't explain; it is among those above")
