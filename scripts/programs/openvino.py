"""OpenVINO GenAI on llama.cpp's Q8_0 file, without and with its prompt lookup.

It reads no Q5_0, so it can't have the file that the coder was made from.
"""

import time
from importlib import metadata, util

import numpy as np
import torch

from programs import LOOKUP, LOOKUP_NGRAM, LOOKUP_TOKENS, Decode, llama, stop_id_of, with_stop
from sdsat.decoding.sequence import Generation
from sdsat.models.embedded import Embedded

NAME = "OpenVINO"
KIND = "Q8_0"
INSTALL = "pip install openvino-genai==2026.4.1.0, and llama.cpp, which makes its file"


def names(base: Embedded) -> list[str]:
    """List what can be measured; nothing without OpenVINO GenAI and llama.cpp."""
    found = util.find_spec("openvino_genai") and llama.names(base)
    return [f"{NAME} {KIND}", f"{NAME} {KIND}{LOOKUP}"] if found else []


def version() -> str:
    """Look up the installed version."""
    return metadata.version("openvino-genai")


def decoder(name: str, base: Embedded, context: int) -> Decode:
    """Load one of `names`."""
    import openvino
    import openvino_genai

    drafting = {"prompt_lookup": True} if name.endswith(LOOKUP) else {}
    pipeline = openvino_genai.LLMPipeline(
        str(llama.gguf(base, KIND)),
        "CPU",
        INFERENCE_NUM_THREADS=torch.get_num_threads(),
        **drafting,
    )
    stop_id = stop_id_of(base)
    config = openvino_genai.GenerationConfig()
    config.do_sample = False
    config.eos_token_id = stop_id
    config.stop_token_ids = {stop_id}
    if drafting:
        config.num_assistant_tokens = LOOKUP_TOKENS
        config.max_ngram_size = LOOKUP_NGRAM

    def decode(ids: list[int], limit: int) -> Generation:
        config.max_new_tokens = limit
        tokens = openvino.Tensor(np.array([ids], np.int64))
        began = time.perf_counter()
        answer = pipeline.generate(tokens, config)
        seconds = time.perf_counter() - began
        found = list(answer.tokens[0])
        stopped = len(found) < limit or found[-1] == stop_id
        first = answer.perf_metrics.get_ttft().mean / 1000
        return Generation(
            token_ids=with_stop(found, stop_id, stopped),
            finish="stop_id" if stopped else "length",
            num_passes=max(1, len(found) - 1),  # at most: it does not say
            prefill_seconds=first,
            decode_seconds=seconds - first,
        )

    return decode
