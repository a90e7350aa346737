"""SDSAT: a language model that drafts and verifies its own tokens (arXiv 2403.18647).

import sdsat

model, tokenizer = sdsat.load("smollm2-135m-sdsat")
inputs = tokenizer("def add(a, b):", return_tensors="pt")
output = model.generate(**inputs, custom_generate=sdsat.generate)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdsat.config import InputError
    from sdsat.interfaces.transformers_hook import SdsatOutput, attach, generate, load

__version__ = "0.1.0"
__all__ = ["InputError", "SdsatOutput", "attach", "generate", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `sdsat --help` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'sdsat' has no attribute {name!r}")
    module = ".config" if name == "InputError" else ".interfaces.transformers_hook"
    return getattr(importlib.import_module(module, __name__), name)
