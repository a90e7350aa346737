"""llama.cpp's own server, fed with token ids: scripts/setup_llama.sh builds it.

In bfloat16, in 8 bits (Q8_0), and with the file that a base was made from; with that also with its
prompt lookup, `ngram-simple`.
"""

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from programs import (
    DTYPE,
    LOOKUP,
    LOOKUP_NGRAM,
    LOOKUP_TOKENS,
    ROOT,
    Decode,
    kind_of,
    stop_id_of,
    with_stop,
)
from programs.server import served
from sdsat.cache_folder import cache_dir
from sdsat.config import require
from sdsat.decoding.sequence import Generation
from sdsat.models.embedded import Embedded, fetched

NAME = "llama.cpp"
INSTALL = "bash scripts/setup_llama.sh"
BUILT = ROOT / "build/llama.cpp"  # by setup_llama.sh
FTYPES = {"bfloat16": "BF16", "Q8_0": "Q8_0"}  # what llama-quantize calls them


def _program(name: str) -> str | None:
    return shutil.which(name, path=BUILT) or shutil.which(name)


def names(base: Embedded) -> list[str]:
    """List what can be measured; nothing without llama-server."""
    if _program("llama-server") is None:
        return []
    file = f"{NAME} {kind_of(base)}"
    return [f"{NAME} {DTYPE}", f"{NAME} Q8_0", file, file + LOOKUP]


def version() -> str:
    """Ask llama-server for its version."""
    done = subprocess.run([str(_program("llama-server")), "--version"], capture_output=True)
    return (done.stdout + done.stderr).decode().split("version: ")[-1].splitlines()[0]


def gguf(base: Embedded, kind: str) -> Path:
    """The base's GGUF file, kept in the cache folder: as it ships, or its weights as `kind`.

    Raises InputError where llama-quantize can't make it.
    """
    shipped = kind_of(base)
    target = cache_dir() / f"{base.base}.{kind}.gguf"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        made = Path(folder) / "made.gguf"
        if kind == shipped:
            with fetched(base) as file:
                shutil.copyfile(file, made)
        else:
            command = [str(_program("llama-quantize")), "--allow-requantize"]
            done = subprocess.run(
                [*command, str(gguf(base, shipped)), str(made), FTYPES[kind]], capture_output=True
            )
            said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            require(done.returncode == 0, f"{target}: llama-quantize cannot make it: {said}")
        made.replace(target)
    return target


def decoder(name: str, base: Embedded, context: int) -> Decode:
    """Start a server that runs one of `names` until this process ends."""
    kind = name.removeprefix(f"{NAME} ").removesuffix(LOOKUP)
    threads = str(torch.get_num_threads())
    command = [str(_program("llama-server")), "--model", str(gguf(base, kind)), "--offline"]
    command += ["--ctx-size", str(context + LOOKUP_TOKENS), "--parallel", "1", "--no-ui"]
    command += ["--threads", threads, "--threads-batch", threads]
    if name.endswith(LOOKUP):
        command += ["--spec-type", "ngram-simple"]
        command += ["--spec-ngram-simple-size-n", str(LOOKUP_NGRAM)]
        command += ["--spec-ngram-simple-size-m", str(LOOKUP_TOKENS)]
    server = served(command)
    stop_id = stop_id_of(base)
    greedily = {"temperature": 0, "return_tokens": True, "cache_prompt": False}

    def decode(ids: list[int], limit: int) -> Generation:
        began = time.perf_counter()
        asked = {"prompt": ids, "n_predict": limit, **greedily}
        answer = json.loads(server.open("completion", asked))
        seconds = time.perf_counter() - began
        stopped = answer["stop_type"] == "eos"
        timings = answer["timings"]
        first = timings["prompt_ms"] / 1000
        return Generation(
            token_ids=with_stop(answer["tokens"], stop_id, stopped),
            finish="stop_id" if stopped else "length",
            num_passes=max(1, timings["predicted_n"] - timings.get("draft_n_accepted", 0) - 1),
            prefill_seconds=first,
            decode_seconds=seconds - first,
        )

    return decode
