"""A folder for the Hugging Face hub: what plain transformers code loads and generates with.

    config.json, *.safetensors, tokenizer    the base, or a full checkpoint, as transformers has it
    adapter/                                 the adapter, where there is one
    custom_generate/generate.py              what `custom_generate=` runs: the package `sdsat`
    README.md                                the model card

The base's files are copied as they are, so that weights are the adapter's own to the last bit:
an adapter fits the numbers of its base, not those of another quantization. The adapter's own files
are in a folder of their own because PEFT, where it is installed, takes an `adapter_config.json`
beside a checkpoint for one of its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.utils import CONFIG_NAME, cached_file

from sdsat import __version__
from sdsat.config import InputError, require
from sdsat.files import new_folder, read_json, write_json
from sdsat.models import adapter as adapters
from sdsat.models import embedded, hub, loading
from sdsat.models.sat_model import SatModel

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_OTHERS = ("*.json", "*.model", "*.txt", "*.jinja")

_GENERATE = '''"""SDSAT, for `model.generate(.., custom_generate=PLACE, trust_remote_code=True)`."""

import threading

import sdsat

_attaching = threading.Lock()


def generate(inputs=None, *, model, trust_remote_code=None, revision=None, **arguments):
    """Generate what the model generates alone, in less time: https://arxiv.org/abs/2403.18647.

    All arguments of transformers' `generate` are honoured or refused by name; `strategy`, `k`,
    `tree`, `budget`, `lookup` and `seed` are those of `sdsat.generate`.
    """
    with _attaching:
        if getattr(model, "sdsat", None) is None:
            sdsat.attach(model, revision=getattr(model.config, "_commit_hash", None))
    arguments["custom_generate"] = sdsat.generate
    return type(model).generate(model, inputs, **arguments)
'''

_CARD = """\
---
license: {licence}
{base_model}library_name: transformers
pipeline_tag: text-generation
tags:
- custom_generate
- sdsat
- speculative-decoding
---

# {title}

{base} with semantic adaptive tokens (SATs): the model drafts its own next tokens and verifies them
in its next pass ([SDSAT](https://arxiv.org/abs/2403.18647)). So it takes fewer passes, and the
output is plain decoding's, token for token; in half precision it may differ from plain `generate`'s
where two tokens are as good as equally likely.

## Use it

With the package `sdsat` installed, `PLACE` being this repository's id or a folder that holds it:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PLACE")
model = AutoModelForCausalLM.from_pretrained("PLACE")
inputs = tokenizer("def add(a, b):", return_tensors="pt")
output = model.generate(
    **inputs, max_new_tokens=64, custom_generate="PLACE", trust_remote_code=True
)
print(tokenizer.decode(output[0]))
```

Without `custom_generate` the model generates plainly. In a terminal:

    sdsat generate "def add(a, b):" --as code --model PLACE

## What it is

{facts}

## Measured

{measured}

## Licence

{terms}
"""


def export_to_hub(name: str, out: Path, measured: str = "") -> None:
    """Write a model, an adapter with its base or a full checkpoint, in the hub's form.

    Args:
        name: of the model.
        out: a new directory, which appears whole or not at all.
        measured: what the model card says of its speed, in Markdown; empty: that nothing was
            measured.

    Raises:
        InputError: in one line, for a model that can't be loaded or has no SAT, for weights in
            another form than safetensors, and where `out` can't be written.
    """
    require(not out.exists(), f"hub={out}: exists already; choose a new directory")
    source = loading.load(name, "auto", "cpu")  # refuses what could not be loaded from there
    require(
        source.sat is not None,
        f"model={name}: has no SAT; expected an adapter or an SDSAT checkpoint",
    )
    folder, base = loading.places(name)
    checkpoint = _checkpoint(base)
    with new_folder(out, "hub") as part:
        _copy(checkpoint, part)
        if folder is None:
            _name_sat(part / CONFIG_NAME, source)
        else:
            _copy_adapter(folder, part / hub.BESIDE_BASE)
        own = part / "custom_generate"
        own.mkdir()
        (own / "generate.py").write_text(_GENERATE)
        (own / "requirements.txt").write_text(f"sdsat>={__version__}\n")
        (part / "README.md").write_text(_card(name, source, checkpoint, measured), "utf-8")


def _checkpoint(base: str) -> Path:
    """Find the folder of a base's files; of the hub, as loading has just fetched them."""
    if Path(base).is_dir():
        return Path(base)
    repository, revision = hub.split(base)
    return Path(str(cached_file(repository, CONFIG_NAME, revision=revision))).parent


def _copy(checkpoint: Path, target: Path) -> None:
    """Copy what transformers loads; raises InputError where there are no safetensors."""
    weights = [file for pattern in _WEIGHTS for file in checkpoint.glob(pattern)]
    require(
        len(weights) > 0,
        f"model {checkpoint}: has no *.safetensors; expected weights in that form",
    )
    others = [file for pattern in _OTHERS for file in checkpoint.glob(pattern)]
    for file in {*weights, *others}:
        shutil.copyfile(file, target / file.name)


def _name_sat(config: Path, source: SatModel) -> None:
    """Write into a full checkpoint's configuration which tokens its SATs are."""
    assert source.sat is not None
    own = source.sat
    token_id = [own.token_id, *own.deeper] if own.deeper else own.token_id
    sat = {"sat_token_id": token_id, "k": own.k}
    write_json(config, {**read_json(config), "sdsat": sat})


def _copy_adapter(folder: Path, target: Path) -> None:
    """Copy an adapter; of a base that is a folder or file of this machine the name alone stays."""
    target.mkdir()
    shutil.copyfile(folder / hub.WEIGHTS_FILE, target / hub.WEIGHTS_FILE)
    config = read_json(folder / hub.CONFIG_FILE)
    write_json(target / hub.CONFIG_FILE, {**config, "base_model": _base_name(config["base_model"])})


def _base_name(base: str) -> str:
    """Return a base's name for others: an embedded name or hub id, or a path's last part."""
    return Path(base).name if Path(base).exists() else base


def _card(name: str, source: SatModel, checkpoint: Path, measured: str) -> str:
    """Write the model card."""
    known = embedded.named(name) or embedded.named(_base_of(source, name))
    base = known.origin if known else _base_name(_base_of(source, name))
    licence = known.licence if known else _licence(checkpoint)
    is_id = known is not None or (not Path(_base_of(source, name)).exists() and "/" in base)
    return _CARD.format(
        licence=licence.lower() if licence else "unknown",
        base_model=f"base_model: {hub.split(base)[0]}\n" if is_id else "",
        title=Path(_base_name(name)).name.removesuffix(".gguf"),
        base=base,
        facts=_facts(source, base, known),
        measured=measured or "Not measured yet.",
        terms=_terms(licence, base, source),
    )


def _base_of(source: SatModel, name: str) -> str:
    return source.adapter.config.base_model if source.adapter else name


def _facts(source: SatModel, base: str, known: embedded.Embedded | None) -> str:
    """List what is recorded of the model: its base, its SATs, and their training."""
    assert source.sat is not None
    lines = [f"- Base: {base}" + (f", dequantized from {known.file}" if known else "")]
    lines.append(f"- SATs: k = {source.sat.k}, token {source.sat.token_id}")
    if source.adapter is not None:
        config = source.adapter.config
        head = f", draft head of {config.head}" if config.head else ""
        among = config.draft_vocabulary
        lines[-1] += f", rank {config.rank}{head}" + (f", {among} draft tokens" if among else "")
        lines += _training(config)
        lines.append("- The base's weights are as they were: the adapter acts on SATs alone.")
    return "\n".join(lines)


def _training(config: adapters.AdapterConfig) -> list[str]:
    """List what the adapter's configuration says of its training."""
    training = config.training
    lines = []
    if {"sequences", "answer_tokens"} <= training.keys():
        data = f"- Data: {training['sequences']} texts, {training['answer_tokens']} answer tokens"
        sha256 = training.get("data_sha256")
        lines.append(data + (f", sha256 {sha256}" if sha256 else ""))
    if "accepted_per_loop" in training:
        lines.append(
            f"- Accepted drafts a loop, held out, k = {config.sat.k}: "
            f"{training['accepted_per_loop']:.2f}"
        )
    return lines


def _licence(checkpoint: Path) -> str:
    """Read the licence that a checkpoint's own model card names; empty where none does."""
    card = checkpoint / "README.md"
    if not card.is_file():
        return ""
    from huggingface_hub import ModelCard

    try:
        return str(ModelCard.load(card).data.get("license") or "")
    except (ValueError, OSError) as error:
        raise InputError(f"{card}: cannot be read ({error})") from None


def _terms(licence: str, base: str, source: SatModel) -> str:
    what = "The base's weights" if source.adapter else "The weights"
    if licence:
        return f"{what} ({base}): {licence}. The package `sdsat`: Apache-2.0."
    return f"{what}: see {base}. The package `sdsat`: Apache-2.0."
