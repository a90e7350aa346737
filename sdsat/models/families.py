"""Which models can be decoded: architectures, rope types, and the published checkpoints."""

from __future__ import annotations

from typing import Any

from sdsat.config import SatConfig, require
from sdsat.models import attention
from sdsat.models.dtypes import DTYPES

# The two published checkpoints (arXiv 2403.18647) say nothing of their SAT in config.json, and
# plain CodeLlama looks the same.
PUBLISHED = {
    "CodeLlama-SDSAT_L5_7B": SatConfig(token_id=32011, k=5),
    "CodeLlama-SDSAT_L7_13B": SatConfig(token_id=32011, k=7),
}
CODELLAMA_VOCABULARY = 32016
# Checked against `transformers` generate in tests/test_families.py.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_family(config: Any, name: str) -> None:
    """Refuse an architecture or a setting that the decoder isn't known to decode exactly.

    config: transformers' configuration. Raises InputError, with the reason.
    """
    kind = getattr(config, "model_type", None)
    require(
        kind in FAMILIES,
        (
            f"model {name}: architecture {kind!r} is not supported; expected one of "
            f"{', '.join(FAMILIES)}"
        ),
    )
    quantized = getattr(config, "quantization_config", None) is not None
    require(
        not quantized,
        (
            f"model {name}: quantized weights are not supported; expected a checkpoint of "
            f"{', '.join(DTYPES)}"
        ),
    )
    ropes = getattr(config, "rope_parameters", None) or {}
    # Gemma 3 has one for each type of layer.
    for settings in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        rope = settings.get("rope_type", "default")
        share = settings.get("partial_rotary_factor") or 1
        require(
            rope in ROPE_TYPES,
            f"model {name}: rope_type {rope!r} is not supported; expected one of "
            f"{', '.join(ROPE_TYPES)} "
            "(dynamic and longrope scale all positions by the furthest one of a pass, and "
            "drafts look ahead)",
        )
        require(
            share == 1, f"model {name}: partial_rotary_factor={share} is not supported; expected 1"
        )
    both_ways = getattr(config, "use_bidirectional_attention", None)
    require(
        not both_ways,
        f"model {name}: use_bidirectional_attention={both_ways} is not supported; expected false",
    )
    if kind in attention.TYPED_LAYERS:
        known = ["full_attention", *(["sliding_attention"] if config.sliding_window else [])]
        strange = [layer for layer in config.layer_types if layer not in known]
        require(
            not strange,
            f"model {name}: layer type {''.join(strange[:1])!r} with "
            f"sliding_window={config.sliding_window} is not supported; "
            f"expected {' or '.join(known)}",
        )
