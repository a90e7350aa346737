"""Which model this is: hashes of its files, or of its tensors where it was never in files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from sdsat.environment import code_hash, folder_hash
from sdsat.files import sha256_of_all
from sdsat.models import adapter as adapters
from sdsat.models import loading
from sdsat.models.sat_model import SatModel

_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")


def identity(name: str, model: SatModel | None = None) -> dict[str, str | None]:
    """Hash what figures depend on beside the machine: this package's sources, base and adapter.

    model: what was loaded by that name. Files are hashed whole (large ones once: see kept.py); of a
    base from the hub it is the commit, and of one that was never in files its tensors. Raises
    InputError, one line, for a model that isn't there.
    """
    adapter, base = loading.places(name)
    found: str | None
    if Path(base).is_dir():
        found = folder_hash(Path(base), _MODEL_FILES)
    else:
        config = loading.read_config(base) if model is None else model.config
        commit = getattr(config, "_commit_hash", None)
        found = commit if commit or model is None else _tensors_hash(model.lm)
    held = folder_hash(adapter, (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE)) if adapter else None
    return {
        "code": code_hash(),
        "base": found,
        "adapter": held,
    }


def _tensors_hash(model: Any) -> str:
    """Of a model in memory."""
    tensors = (
        (name, tensor.detach().cpu().contiguous()) for name, tensor in model.state_dict().items()
    )
    flat = (
        (f"{name} {t.dtype} {tuple(t.shape)}", t.flatten().view(torch.uint8).numpy())
        for name, t in tensors
    )
    return sha256_of_all((name, hashlib.sha256(part.data).hexdigest()) for name, part in flat)
