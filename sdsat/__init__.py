"""SDSAT: a language model that drafts and verifies its own tokens (arXiv 2403.18647).

import sdsat
model = sdsat.load("smollm2-135m-sdsat")
out = sdsat.generate(model, prompt_ids, sdsat.DecodeConfig(k=5, stop_ids=model.stop_ids))
"""

from .config import DecodeConfig, InputError, SamplingConfig
from .decode import Generation, generate
from .model import SatModel, load

__all__ = ["DecodeConfig", "Generation", "InputError", "SamplingConfig", "SatModel", "generate", "load"]
