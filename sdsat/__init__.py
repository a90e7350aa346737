"""SDSAT: a language model that drafts and verifies its own tokens (arXiv 2403.18647).

import sdsat
model = sdsat.load("smollm2-135m-sdsat")
out = sdsat.generate(model, prompt_ids, sdsat.DecodeConfig(k=5, stop_ids=model.stop_ids))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DecodeConfig, InputError, SamplingConfig
    from .decode import Generation, generate, generate_batch
    from .model import SatModel, load

__version__ = "0.1.0"
__all__ = ["DecodeConfig", "Generation", "InputError", "SamplingConfig", "SatModel", "generate", "generate_batch", "load"]

_HOMES = {**dict.fromkeys(("Generation", "generate", "generate_batch"), ".decode"), "SatModel": ".model", "load": ".model"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `sdsat --help` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'sdsat' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, ".config"), __name__), name)
