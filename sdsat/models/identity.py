"""The identity of a run's weights: hashes of the base and of the adapter."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from sdsat.environment import folder_hash
from sdsat.files import sha256_of_all
from sdsat.models import adapter as adapters
from sdsat.models import loading

_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")


def base_hash(name: str, lm: Any = None) -> str | None:
    """Return what tells the base of model `name` from every other.

    Its files are hashed whole (large ones once: see cache_folder.py); of a base from the hub it is
    the commit, and of one that was never in files the hash of its tensors.

    lm: what was loaded by that name. Raises InputError, one line, for a model that isn't there.
    """
    _, base = loading.places(name)
    if Path(base).is_dir():
        return folder_hash(Path(base), _MODEL_FILES)
    config = loading.read_config(base) if lm is None else lm.config
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit if commit or lm is None else _tensors_hash(lm)


def adapter_hash(name: str) -> str | None:
    """Compute the hash of the adapter's files; None where model `name` is no adapter.

    Raises InputError, one line, for a model that isn't there.
    """
    folder, _ = loading.places(name)
    return adapter_files_hash(folder) if folder else None


def adapter_files_hash(folder: Path) -> str:
    """Compute the hash of the adapter in `folder`.

    Raises InputError, one line, for a file that can't be read.
    """
    return folder_hash(folder, (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE))


def _tensors_hash(lm: Any) -> str:
    """Compute one hash for all tensors of a model in memory."""
    tensors = (
        (name, tensor.detach().cpu().contiguous()) for name, tensor in lm.state_dict().items()
    )
    flat = (
        (f"{name} {t.dtype} {tuple(t.shape)}", t.flatten().view(torch.uint8).numpy())
        for name, t in tensors
    )
    return sha256_of_all((name, hashlib.sha256(part.data).hexdigest()) for name, part in flat)
