"""transformers' own `generate`: plainly, with its prompt lookup, and with its assisted generation.

A smaller embedded model assists a larger one; its tokens are translated, as they are others.
"""

from functools import cache
from importlib import metadata
from typing import Any

import torch

from programs import ASSISTED, DTYPE, LOOKUP, LOOKUP_NGRAM, LOOKUP_TOKENS, Decode
from sdsat.config import DecodeConfig
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.sequence import Generation
from sdsat.engines.transformers import TransformersEngine
from sdsat.evaluation.reference import transformers_generate
from sdsat.models.embedded import SMOLLM2, Embedded
from sdsat.models.loading import load_base
from sdsat.models.sat_model import SatModel

NAME = "transformers"
INSTALL = ""
CPU = {"": torch.device("cpu")}


def names(base: Embedded) -> list[str]:
    """List what can be measured; the smallest model has none to assist it."""
    return [NAME, NAME + LOOKUP, *([NAME + ASSISTED] if base.file != SMOLLM2.file else [])]


def version() -> str:
    """Look up the installed version."""
    return metadata.version("transformers")


@cache
def _loaded(base: str) -> Decoder:
    """A base as transformers loads it: no adapter, no packed layers."""
    lm, tokenizer, _ = load_base(base, getattr(torch, DTYPE), CPU)
    model = SatModel(lm, tokenizer, base)
    return Decoder(model, TransformersEngine(model))


def _drafting(name: str) -> dict[str, Any]:
    """The arguments of `generate` that make it draft."""
    if name.endswith(LOOKUP):
        return {
            "prompt_lookup_num_tokens": LOOKUP_TOKENS,
            "max_matching_ngram_size": LOOKUP_NGRAM,
        }
    if not name.endswith(ASSISTED):
        return {}
    lm, tokenizer, _ = load_base(SMOLLM2.base, getattr(torch, DTYPE), CPU)
    return {"assistant_model": lm, "assistant_tokenizer": tokenizer}


def decoder(name: str, base: Embedded, context: int) -> Decode:
    """Load one of `names`."""
    plain = _loaded(base.base)
    drafting = _drafting(name)
    passes = [0]
    plain.model.lm.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))

    def decode(ids: list[int], limit: int) -> Generation:
        passes[0] = 0
        config = DecodeConfig(0, max_new_tokens=limit, stop_ids=plain.model.stop_ids)
        out = transformers_generate(plain, ids, config, **drafting)
        out.num_passes = max(1, passes[0] - 1)  # without the prompt's
        return out

    return decode
