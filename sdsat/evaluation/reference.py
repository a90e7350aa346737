"""The outside reference: transformers' own greedy `generate` on the same weights.

None of this package's code is in it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import GenerationConfig

from sdsat.config import DecodeConfig, require
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.sequence import Generation
from sdsat.decoding.stopping import Finish


@torch.inference_mode()
def transformers_generate(
    decoder: Decoder, prompt_ids: list[int], config: DecodeConfig, **drafting: Any
) -> Generation:
    """Run transformers' greedy `generate` with its own linear layers, attention and cache.

    Ours are detached for the duration.

    Args:
        decoder: of the model.
        prompt_ids: token ids.
        config: of which only max_new_tokens, stop_ids and stop_strings are used.
        drafting: further arguments of `generate`, that make it draft.

    Returns:
        The generation; all seconds are in decode_seconds.

    Raises:
        InputError: for a sampling that is not greedy.
    """
    require(
        config.sampling.greedy, "transformers_generate: greedy only, its random numbers are its own"
    )
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        eos_token_id=list(config.stop_ids) or None,
        pad_token_id=config.stop_ids[0] if config.stop_ids else 0,
        stop_strings=list(config.stop_strings) or None,
    )
    model = decoder.model
    tokens = torch.tensor([prompt_ids], device=model.device)
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    # Here sdpa would leave Gemma 2's caps out.
    plain = "eager" if capped else "sdpa"
    tokenizer = model.tokenizer if config.stop_strings or drafting else None
    with decoder.engine.detached(), model.detached(plain):
        began = time.perf_counter()
        output = model.lm.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=settings,
            tokenizer=tokenizer,
            **drafting,
        )
        token_ids = output[0, len(prompt_ids) :].tolist()
        seconds = time.perf_counter() - began
    finish: Finish = "length"
    if token_ids[-1] in config.stop_ids:
        finish = "stop_id"
    elif config.stop_strings and len(token_ids) < config.max_new_tokens:
        finish = "stop_string"
    return Generation(
        token_ids=token_ids,
        finish=finish,
        num_passes=max(1, len(token_ids) - 1),
        decode_seconds=seconds,
    )
