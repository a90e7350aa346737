"""vLLM's server on the CPU, plainly and with its prompt lookup.

scripts/setup_vllm.sh installs it.
"""

import json
import os
import subprocess
import time

from programs import DTYPE, LOOKUP, LOOKUP_NGRAM, LOOKUP_TOKENS, ROOT, Decode, stop_id_of, with_stop
from programs.server import served
from sdsat.decoding.sequence import Generation
from sdsat.models.embedded import Embedded, base_dir

NAME = "vLLM"
INSTALL = "bash scripts/setup_vllm.sh"
PROGRAM = ROOT / ".venv-vllm/bin/vllm"


def names(base: Embedded) -> list[str]:
    """List what can be measured; nothing where vLLM is not installed."""
    return [NAME, NAME + LOOKUP] if PROGRAM.is_file() else []


def version() -> str:
    """Ask vLLM for its version."""
    done = subprocess.run([PROGRAM, "--version"], capture_output=True, check=True)
    return done.stdout.decode().split()[-1]


def environment() -> dict[str, str]:
    """What it is told of this machine."""
    found = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_NO_USAGE_STATS": "1",
    }
    # came with vLLM, which wants it loaded first where it verifies drafts
    openmp = PROGRAM.parent.parent / "lib/libiomp5.so"
    return found | ({"LD_PRELOAD": str(openmp)} if openmp.is_file() else {})


def decoder(name: str, base: Embedded, context: int) -> Decode:
    """Start a server that runs one of `names` until this process ends."""
    command = [str(PROGRAM), "serve", str(base_dir(base)), "--dtype", DTYPE]
    command += ["--max-model-len", str(context + LOOKUP_TOKENS), "--max-num-seqs", "1"]
    command += ["--served-model-name", NAME, "--no-enable-prefix-caching"]
    if name.endswith(LOOKUP):
        lookup = {
            "method": "ngram",
            "num_speculative_tokens": LOOKUP_TOKENS,
            "prompt_lookup_max": LOOKUP_NGRAM,
        }
        command += ["--speculative-config", json.dumps(lookup)]
    server = served(command, environment())
    stop_id = stop_id_of(base)

    def decode(ids: list[int], limit: int) -> Generation:
        asked = {"model": NAME, "prompt": ids, "max_tokens": limit, "temperature": 0}
        began = time.perf_counter()
        answer = json.loads(server.open("v1/completions", {**asked, "return_token_ids": True}))
        seconds = time.perf_counter() - began
        (choice,) = answer["choices"]
        stopped = choice["finish_reason"] == "stop"
        return Generation(
            token_ids=with_stop(choice["token_ids"], stop_id, stopped),
            finish="stop_id" if stopped else "length",
            num_passes=max(1, len(choice["token_ids"]) - 1),  # at most: it does not say
            decode_seconds=seconds,
        )

    return decode
