"""The Hugging Face hub: names with a revision, and the adapter that a repository or folder holds.

    NAME@REVISION            a repository as it is at a branch, tag or commit
    adapter_config.json      an adapter, as `sdsat train` writes it
    adapter/ of a checkpoint an adapter with its base beside it, as `sdsat export --hub` writes it

What a name is called by goes through the program as one text, into results too.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from sdsat.config import InputError, require
from sdsat.files import reason
from sdsat.models import embedded

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BESIDE_BASE = "adapter"  # the folder of an adapter in its base's checkpoint
_PLACES = ("", f"{BESIDE_BASE}/")  # of a repository, where an adapter is looked for
_PROBE_SECONDS = 5  # to find out that the hub can't be reached


class Found(NamedTuple):
    """An adapter that a name stands for.

    Attributes:
        folder: of its two files.
        has_base: whether the base is what the name stands for, too.
    """

    folder: Path
    has_base: bool


def at_revision(name: str, revision: str | None) -> str:
    """Return what a model at a revision is called by; without a revision the name as it is.

    revision: a branch, a tag or a commit. Raises InputError for a name that is no hub id.
    """
    if not revision:
        return name
    name = str(name)
    require(
        _may_be_hub_id(name) and "@" not in name and revision.isprintable() and " " not in revision,
        f"revision={revision}: {name} is no hub id; expected USER/NAME, or no revision",
    )
    return f"{name}@{revision}"


def split(name: str) -> tuple[str, str | None]:
    """Return a name without its revision, and the revision; None where it has none."""
    plain, at, revision = name.rpartition("@")
    return (plain, revision) if at and _may_be_hub_id(name) else (name, None)


def _may_be_hub_id(name: str) -> bool:
    """Tell whether a name can be a hub id: nothing else that is known here."""
    return embedded.named(name) is None and not Path(name).exists()


def find_adapter(name: str) -> Found | None:
    """Find the adapter of a folder or a hub id; None where it has none.

    An adapter of the hub is fetched. Raises InputError, one line, where that fails halfway.
    """
    folder = Path(name)
    if (folder / CONFIG_FILE).is_file():
        return Found(folder, False)
    if folder.is_dir():
        inner = folder / BESIDE_BASE
        beside = (inner / CONFIG_FILE).is_file() and (folder / "config.json").is_file()
        return Found(inner, True) if beside else None
    repository, revision = split(name)
    own = repository.count("/") == 1 and _may_be_hub_id(repository)
    return fetch_adapter(repository, revision) if own and all(repository.split("/")) else None


@cache
def fetch_adapter(repository: str, revision: str | None) -> Found | None:
    """Find the adapter of a repository, as `find_adapter`; asks once a process.

    Where the hub can't be reached, what an earlier process has fetched counts. Raises InputError,
    one line, where that is nothing: its library would try again for half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub import try_to_load_from_cache as held
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
    )

    for inner in _PLACES:
        file = inner + CONFIG_FILE
        try:
            url = hf_hub_url(repository, file, revision=revision)
            get_hf_file_metadata(url, timeout=_PROBE_SECONDS)
        except (EntryNotFoundError, HFValidationError):
            continue
        except Exception as error:  # of several libraries, each with exceptions of its own
            found = _held(repository, revision)
            at_once = isinstance(error, (HfHubHTTPError, OfflineModeIsEnabled))
            hopeful = at_once or held(repository, "config.json", revision=revision)
            require(
                bool(found or hopeful),
                f"model {at_revision(repository, revision)}: nothing of that name is here, and the "
                f"hub cannot be reached ({reason(error)})",
            )
            return found
        try:
            config = hf_hub_download(repository, file, revision=revision)
            hf_hub_download(repository, inner + WEIGHTS_FILE, revision=revision)
        except Exception as error:
            why = f"its adapter cannot be fetched ({reason(error)})"
            raise InputError(f"model {repository}: {why}; run it again") from None
        return Found(Path(config).parent, bool(inner))
    return None


def _held(repository: str, revision: str | None) -> Found | None:
    """Find the adapter of a repository in the hub's own cache folder."""
    from huggingface_hub import try_to_load_from_cache

    for inner in _PLACES:
        held = try_to_load_from_cache(repository, inner + CONFIG_FILE, revision=revision)
        if isinstance(held, str):
            return Found(Path(held).parent, bool(inner))
    return None
