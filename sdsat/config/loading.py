"""Settings of loading a model."""

from __future__ import annotations

from dataclasses import dataclass

from sdsat.config.options import DTYPE, WHOLE_NUMBERS, option

# Positions of the cache that memory must be left for where nobody says how many.
CONTEXT = 2048


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Which version of a model is meant, where it comes from the hub: see `models.hub`.

    Attributes:
        revision: a branch, a tag or a commit; None for what is there now.
    """

    revision: str | None = option(
        None, "Branch, tag or commit, of a model on the hub.", env="REVISION"
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What `models.loading.load` goes by beside the place and the numbers, and the engine.

    Attributes:
        sat_token_id: id of the SAT, or one a depth, whatever the checkpoint says of it.
        trained_k: the depth of its training, whatever the checkpoint says of it.
        engine: 'native', 'transformers', or 'auto': native where it can be had.
    """

    sat_token_id: tuple[int, ...] | None = option(
        None,
        "Id of the SAT, or one a depth with commas between, whatever the checkpoint says.",
        env="SAT_TOKEN_ID",
        text=WHOLE_NUMBERS,
        is_open=True,
    )
    trained_k: int | None = option(
        None, "Depth of its training, whatever the checkpoint says.", env="TRAINED_K"
    )
    engine: str = option("auto", "native, transformers, or auto: native where it can be had.")


@dataclass(frozen=True, kw_only=True)
class LoadConfig(CheckpointConfig):
    """How a model is loaded: see `models.loading.load`.

    Attributes:
        dtype: 'float32', 'bfloat16', 'float16', 'int8' (see models/int8.py), 'gguf' (see
            models/blocks.py), or 'auto' for the checkpoint's own.
        device: see `models.devices.pick_devices`.
    """

    dtype: str = option("bfloat16", DTYPE)
    device: str = option(
        "",
        "cpu, a GPU number, or 0+1 for a model that one GPU can't hold; empty: GPU 0 where "
        "there is one, else the CPU.",
    )
