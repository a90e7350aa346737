"""GGUF files: one of a supported family becomes an ordinary model directory.

A GGUF file, llama.cpp's format, holds a model's settings, tokenizer and weights; the weights are
mostly quantized. `directory` converts it once and keeps the result in the cache folder. Weights
are read, dequantized and written one at a time, so that a conversion takes the memory of the
largest one, in float32 and once more in the dtype that is written. Transformers reads GGUF too,
but holds all weights at once, leaves out how positions are scaled, and may round otherwise in
another release.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sdsat.cache_folder import PATIENCE_SECONDS, cache_dir, creating, remembered_sha256
from sdsat.config import InputError, is_whole, require
from sdsat.files import read_json, reason, write_json
from sdsat.models.blocks import TYPES, HeldWeight
from sdsat.models.dtypes import GGUF, INT8, SAFETENSORS_DTYPES
from sdsat.models.families import check_family
from sdsat.models.gguf_header import FileTensor, GgufFile, Unread
from sdsat.models.gguf_tokenizer import read_tokenizer
from sdsat.models.mapped import MappedFile

# llama.cpp's name of an architecture: transformers'. Mistral and CodeLlama are `llama` there.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Sizes of a model that are those of its tensors, or fewer.
_BOUNDED = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "rope.dimension_count",
)
_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
    "unknown_token_id": "unk_token_id",
}
# Types that llama.cpp has given up, whose files are still about.
_GIVEN_UP = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
_ROPE_FACTORS = "rope_freqs.weight"
_LIST = "files"  # in a kept directory: {name: bytes} of its files, as JSON
_FORM = 2  # version of what a file is converted to


def is_gguf(path: str | Path) -> bool:
    """Tell whether this is a GGUF file, by its first bytes; False for what can't be read."""
    try:
        if not Path(path).is_file():
            return False
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except (OSError, ValueError):
        return False


def directory(file: str) -> Path:
    """Return the model directory made of a GGUF file, which is converted on the first call.

    Its name in the cache folder has the file's sha256. Raises InputError, one line, for a file
    that can't be converted, and where the cache folder can't be written to.
    """
    key = f"gguf-{_FORM}-{remembered_sha256(Path(file))}"
    return kept(key, lambda target: convert(Path(file), target, file))


def kept(key: str, make: Callable[[Path], None], earlier: tuple[str, ...] = ()) -> Path:
    """Return the model directory `key` of the cache folder, made on the first call.

    Several processes may call at once: one makes it, the others wait. A folder that is there and
    whole is used as it is, also where nothing can be written; one that isn't is made again.

    Args:
        key: its name in the cache folder.
        make: makes the directory that it is given.
        earlier: the files of one that an earlier version made, which left no list of them; () for
            none that would be known.

    Raises:
        InputError: in one line, where it can be neither found nor made.
    """
    target = cache_dir() / key
    if _is_whole(target, earlier):
        return target
    try:
        with creating(key, PATIENCE_SECONDS):
            if not _is_whole(target, earlier):
                with tempfile.TemporaryDirectory(dir=target.parent, prefix=key + "-part-") as part:
                    made = Path(part) / "model"
                    make(made)
                    sizes = {file.name: file.stat().st_size for file in made.iterdir()}
                    write_json(made / _LIST, sizes)
                    if target.exists():
                        target.rename(Path(part) / "damaged")
                    made.rename(target)  # atomic: the folder is whole or absent
    except OSError as error:
        raise InputError(
            f"cache folder {target.parent}: cannot be written ({error}); set SDSAT_CACHE"
        ) from None
    return target


def _is_whole(folder: Path, earlier: tuple[str, ...]) -> bool:
    """Tell whether all files are there and as long as when they were made.

    A copy that was cut short is not. earlier: as of `kept`.
    """
    try:
        found = {file.name: file.stat().st_size for file in folder.iterdir()}
        if earlier and _LIST not in found:
            sizes = {name: found[name] for name in earlier}
        else:
            sizes = dict(read_json(folder / _LIST))
        if any(found.get(name) != size for name, size in sizes.items()):
            return False
        for name in ("config.json", "tokenizer.json"):
            read_json(folder / name)
        # To open checks the header against the file's size.
        with safe_open(folder / "model.safetensors", "pt") as weights:
            return len(weights.keys()) > 0
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return False


def convert(file: Path, target: Path, name: str, as_transformers: bool = False) -> None:
    """Convert a GGUF file to a model directory.

    Weights that the file holds as plain numbers keep their dtype; others become bfloat16.

    Args:
        file: to be read.
        target: the folder to make.
        name: of the model, for messages.
        as_transformers: take the tokenizer as transformers reads it.

    Raises:
        InputError: in one line, for a file that can't be read or is of no supported family.
        OSError: where `target` can't be written.
    """
    opened, model, wanted = _opened(file, name)
    config = model.config
    try:
        tokenizer = (
            transformers_tokenizer(file, config)
            if as_transformers
            else read_tokenizer(lambda key: opened.value(f"tokenizer.{key}"), name)
        )
    except InputError:
        raise
    except Exception as error:  # as above
        said = reason(error)
        raise InputError(f"model {name}: its tokenizer cannot be read ({said})") from None
    target.mkdir()
    config.architectures = [type(model).__name__]
    config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _write_weights(target / "model.safetensors", opened, wanted, config, name)


def held_weights(file: Path, name: str, data: MappedFile) -> dict[str, HeldWeight]:
    """Find the quantized matrices of a file's linear layers, {transformers' name: weight}.

    Args:
        file: as of `convert`.
        name: of the model, for messages.
        data: the file, of which the weights are views.

    Raises:
        InputError: in one line, for a file that can't be read, that has no such matrix, or one of
            a type that is not computed with.
    """
    _, model, wanted = _opened(file, name)
    parts = [part for part in model.modules() if isinstance(part, nn.Linear)]
    weights = {id(part.weight) for part in parts}
    linears = {own for own, weight in model.named_parameters() if id(weight) in weights}
    held = {}
    for own, tensor in wanted.items():
        kind = tensor.kind.name
        if own not in linears or kind in _PLAIN:
            continue
        require(
            kind in TYPES,
            f"dtype={GGUF}: {name} holds {tensor.name} in {kind}; expected {', '.join(TYPES)} or "
            f"plain numbers, or another dtype, as {INT8}",
        )
        outputs = tensor.shape[1]
        there = data.part(tensor.begin, tensor.begin + tensor.num_bytes).view(outputs, -1)
        order = torch.arange(outputs)[:, None]
        heads = _heads_in_another_order(own, model.config)
        held[own] = HeldWeight(there, kind, _in_halves(order, heads)[:, 0] if heads else None)
    require(bool(held), f"dtype={GGUF}: {name}: its linear layers are plain numbers; expected auto")
    return held


def _opened(file: Path, name: str) -> tuple[GgufFile, Any, dict[str, FileTensor]]:
    """Read all of a file but its weights and tokenizer.

    Returns it, transformers' model of it without weights, and the tensors that are the model's, by
    transformers' names. Raises InputError, one line, for what can't be read or is of no supported
    family.
    """
    with _reading(name):
        opened = GgufFile(file)
        _check_types(opened.tensors, name)
        config = _config(opened, name)
        check_family(config, name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        return opened, model, _wanted(model, opened, name)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn whatever a wrong byte leads to into one InputError."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"model {name}: cannot be read ({reason(error)})") from None
    except Exception as error:
        raise InputError(f"model {name}: {_said(error)}") from None


def _said(error: Exception) -> str:
    """Say why a file can't be read: its form, the type of a tensor, or damage."""
    if isinstance(error, Unread):
        return str(error)
    found = re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error))
    if found is None:
        return f"damaged or cut short, as a GGUF file ({reason(error)}); fetch it again"
    number = int(found[1])
    return _unreadable(_GIVEN_UP.get(number, f"number {number}"))


def _unreadable(kind: str) -> str:
    readable = ", ".join(kind.name for kind in gguf.GGMLQuantizationType if _is_readable(kind))
    return f"quantized as {kind}, which can't be read; expected one of {readable}"


def _is_readable(kind: gguf.GGMLQuantizationType) -> bool:
    if kind.name in _PLAIN:
        return True
    try:
        size = gguf.GGML_QUANT_SIZES[kind][1]
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except (NotImplementedError, KeyError):
        return False
    return True


def _check_types(tensors: dict[str, FileTensor], name: str) -> None:
    for kind in {tensor.kind for tensor in tensors.values()}:
        require(_is_readable(kind), f"model {name}: {_unreadable(kind.name)}")


def _config(file: GgufFile, name: str) -> Any:
    """Make transformers' configuration of a file's settings.

    Raises InputError for a setting that is missing, or that no configuration can express.
    """
    settings, tensors = file.settings, file.tensors
    require(
        settings.get("split.count", 1) == 1,
        f"model {name}: one of {settings.get('split.count')} parts; expected a whole file, as "
        "`llama-gguf-split --merge` makes it",
    )
    kind = str(settings.get("general.architecture"))
    require(
        kind in ARCHITECTURES,
        f"model {name}: architecture {kind!r} is not read from GGUF; expected one of "
        f"{', '.join(ARCHITECTURES)}, or the model's own directory",
    )
    needed = [f"{kind}.{key}" for key in _SIZES] + ["token_embd.weight"]
    missing = [key for key in needed if key not in settings and key not in tensors]
    require(not missing, f"model {name}: lacks {''.join(missing[:1])}; expected a whole GGUF file")
    _check_sizes(kind, settings, tensors, name)
    given = {own: settings[f"{kind}.{key}"] for key, own in _SIZES.items()}
    for key, own in _TOKENS.items():
        if (token := settings.get(f"tokenizer.ggml.{key}")) is not None:
            given[own] = token
    heads = given["num_attention_heads"]
    rotated = settings.get(f"{kind}.rope.dimension_count")
    head_dim = settings.get(f"{kind}.attention.key_length", rotated)
    require(
        rotated in (None, head_dim),
        f"model {name}: rotates {rotated} of {head_dim} numbers of a head; expected all",
    )
    if head_dim is not None:
        given["head_dim"] = head_dim
    if "general.name" in settings:
        given["_model_name_or_path"] = settings["general.name"]
    config = AutoConfig.for_model(
        ARCHITECTURES[kind],
        **given,
        num_key_value_heads=settings.get(f"{kind}.attention.head_count_kv", heads),
        vocab_size=tensors["token_embd.weight"].shape[-1],
        tie_word_embeddings="output.weight" not in tensors,
        rope_parameters=_rope(kind, settings, name),
        dtype=_dtype(tensors),
    )
    if _ROPE_FACTORS in tensors:
        factors = file.numbers(tensors[_ROPE_FACTORS])
        config.rope_parameters = _llama3_rope(config, torch.from_numpy(factors.copy()), name)
    return config


def _check_sizes(
    kind: str, settings: dict[str, Any], tensors: dict[str, FileTensor], name: str
) -> None:
    """Refuse sizes that no model of these tensors has, before one is made of them.

    Raises InputError.
    """
    largest = max(size for tensor in tensors.values() for size in tensor.shape)
    for key in _BOUNDED:
        size = settings.get(f"{kind}.{key}", 1)
        most = len(tensors) if key == "block_count" else largest
        require(
            is_whole(size) and 1 <= size <= most,
            f"model {name}: {kind}.{key} is {size!r}, of tensors that allow 1 to {most}; fetch it "
            "again",
        )


def _dtype(tensors: dict[str, FileTensor]) -> torch.dtype:
    """Choose the dtype: of plain matrices their own, else bfloat16."""
    kinds = {tensor.kind.name for tensor in tensors.values() if len(tensor.shape) > 1}
    return _PLAIN[kinds.pop()] if len(kinds) == 1 and kinds <= set(_PLAIN) else torch.bfloat16


def _rope(kind: str, settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Say how positions are rotated, and scaled beyond what was trained."""
    prefix = f"{kind}.rope"
    rope = {"rope_type": "default", "rope_theta": settings.get(f"{prefix}.freq_base", 10000.0)}
    scaling = settings.get(f"{prefix}.scaling.type", "none")
    factor = settings.get(f"{prefix}.scaling.factor", settings.get(f"{prefix}.scale_linear", 1.0))
    if scaling == "none" and f"{prefix}.scale_linear" in settings:
        scaling = "linear"
    if scaling == "none" or factor == 1.0:
        return rope
    rope |= {"rope_type": scaling, "factor": factor}
    if scaling == "yarn":
        length = settings.get(f"{prefix}.scaling.original_context_length")
        rope |= {"original_max_position_embeddings": length}
    others = [
        key
        for key in settings
        if key.startswith(f"{prefix}.scaling.")
        and key.rpartition(".")[2] not in ("type", "factor", "original_context_length", "finetuned")
    ]
    require(
        scaling in ("linear", "yarn") and not others,
        f"model {name}: scales positions by {scaling} {' '.join(others[:1])}; expected linear or "
        "yarn, with a factor",
    )
    return rope


def _llama3_rope(config: Any, factors: Tensor, name: str) -> dict[str, Any]:
    """Find Llama 3's settings of rope, of which a GGUF file holds what they come to.

    factors: by which each frequency is divided. Raises InputError for other factors.
    """
    plain = config.rope_parameters
    rope = {**plain, "rope_type": "llama3", "factor": float(factors.max())}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    config.rope_parameters = rope
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(factors)
    frequencies = plain["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    same = scaled.shape == frequencies.shape and torch.allclose(
        scaled.double(), frequencies / factors.double(), rtol=1e-4
    )
    require(
        same and plain["rope_type"] == "default",
        f"model {name}: its {_ROPE_FACTORS} are not Llama 3's; expected those, or none",
    )
    return rope


def _wanted(model: Any, file: GgufFile, name: str) -> dict[str, FileTensor]:
    """Find the file's tensor for each of the model's, {the model's name: tensor}.

    Raises InputError where the two are not the same tensors.
    """
    kind, tensors = file.settings["general.architecture"], file.tensors
    architecture = next(key for key, own in gguf.MODEL_ARCH_NAMES.items() if own == kind)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    expected = dict(model.named_parameters())  # tied ones once
    found = {own: names.get_name(own, (".weight", ".bias")) for own in expected}
    lacking = [own for own, other in found.items() if other not in tensors]
    strange = sorted(tensors.keys() - set(found.values()) - {_ROPE_FACTORS})
    require(not lacking, f"model {name}: lacks {''.join(lacking[:1])}; fetch a whole GGUF file")
    require(
        not strange,
        f"model {name}: holds {''.join(strange[:1])}, which transformers' "
        f"{model.config.model_type} has no place for",
    )
    for own, parameter in expected.items():
        shape = [*reversed(tensors[str(found[own])].shape)]
        require(
            shape == list(parameter.shape),
            f"model {name}: {found[own]} has shape {shape}, expected {list(parameter.shape)}",
        )
    return {own: tensors[str(other)] for own, other in found.items()}


def _write_weights(
    target: Path, file: GgufFile, tensors: dict[str, FileTensor], config: Any, name: str
) -> None:
    """Write a safetensors file, one tensor after the other.

    Args:
        target: to be written; the format: https://github.com/huggingface/safetensors#format.
        file: the GGUF file.
        tensors: {the model's name: the tensor}.
        config: of the model; its dtype is that of the numbers.
        name: of the model.
    """
    dtype = config.dtype
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for own, tensor in sorted(tensors.items()):
        begin, end = end, end + prod(tensor.shape) * dtype.itemsize
        shape = [*reversed(tensor.shape)]
        header[own] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    bar = tqdm(total=end, desc=f"{name}: converting", unit="B", unit_scale=True, disable=None)
    with target.open("wb") as out, bar:
        out.write(len(head).to_bytes(8, "little") + head)
        for own, tensor in sorted(tensors.items()):
            numbers = np.require(file.numbers(tensor), None, "W")
            values = torch.from_numpy(numbers).to(dtype)
            if heads := _heads_in_another_order(own, config):
                values = _in_halves(values, heads)
            out.write(values.contiguous().view(torch.uint8).numpy().data)
            bar.update(values.nbytes)


def _heads_in_another_order(own: str, config: Any) -> int:
    """Count the heads of a weight whose rows llama.cpp has in another order; 0: it has not."""
    if config.model_type == "llama" and own.endswith("q_proj.weight"):
        return int(config.num_attention_heads)
    if config.model_type == "llama" and own.endswith("k_proj.weight"):
        return int(config.num_key_value_heads)
    return 0


def _in_halves(weight: Tensor, heads: int) -> Tensor:
    """Put a head's rows from llama.cpp's order, rotated pairs side by side, into transformers'.

    There the first numbers of all pairs come first. weight: [heads * 2 * pairs, in].
    """
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def transformers_tokenizer(file: Path, config: Any) -> PreTrainedTokenizerBase:
    """Read a file's tokenizer as transformers does.

    It is near `read_tokenizer`'s; adapters that were trained with it need it as it is.
    """
    with tempfile.TemporaryDirectory() as alone:  # no other files beside it
        (Path(alone) / "model.gguf").symlink_to(file.resolve())
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            alone, gguf_file="model.gguf", config=config
        )
    return tokenizer
