"""Loading: by hub id, local directory, GGUF file, adapter directory, or embedded name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from sdsat.cache_folder import cache_dir
from sdsat.config import CONTEXT, InputError, SatConfig, SatIds, require, whole
from sdsat.models import adapter as adapters
from sdsat.models import attention, devices, embedded, gguf, hub
from sdsat.models.blocks import take_blocks
from sdsat.models.dtypes import (
    GGUF,
    INT8,
    WITH_INTEGERS,
    check_dtype,
    check_dtype_of,
    torch_dtype,
)
from sdsat.models.families import CODELLAMA_VOCABULARY, PUBLISHED, check_family
from sdsat.models.int8 import round_linears
from sdsat.models.mapped import MappedWeights
from sdsat.models.sat_model import SatModel


def check_model(model: Any, name: str) -> None:
    """Refuse a model that transformers has loaded in a way in which passes can't run.

    Raises InputError, with the reason.
    """
    check_family(model.config, name)
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    require(
        len(places) == 1 and places != ["meta"],
        f"model {name}: its weights are on {', '.join(places)}; expected one device",
    )
    check_dtype_of(model, name)


@contextmanager
def _one_line(name: str, path: str) -> Iterator[None]:
    """Turn whatever goes wrong while a model is read into one InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a dozen libraries meet here, each with exceptions of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(path).parent == cache_dir():
            raise InputError(
                f"cache {path}: damaged ({reason}); delete this folder and run again"
            ) from None
        if Path(path).is_dir():
            raise InputError(f"model {name}: this directory cannot be loaded ({reason})") from None
        hint = "a hub id, a local model or adapter directory, a GGUF file, or one of "
        hint += ", ".join(embedded.names())
        raise InputError(f"model {name}: not found ({reason}); expected {hint}") from None


def _path_of(base: str) -> str:
    """Return the folder or hub id of a base; what is no folder yet becomes one now."""
    if (model := embedded.named(base)) is not None:
        return str(embedded.base_dir(model))
    return str(gguf.directory(base)) if gguf.is_gguf(base) else base


def places(name: str) -> tuple[Path | None, str]:
    """Return the adapter's folder and the base's folder or hub id.

    The first is None where `name` is no adapter.

    Raises InputError for a damaged adapter, and for what only looks like a model.
    """
    return (adapter_directory(name) if is_adapter(name) else None), _path_of(_base_of(name))


def read_config(path: str) -> Any:
    """Read a base's configuration, by folder or hub id.

    Raises InputError, one line, where it can't be read.
    """
    with _one_line(path, path):
        return _auto_config(path)


def _place(path: str) -> tuple[str, dict[str, Any]]:
    """Return where `from_pretrained` reads a base, and its options that say so, too."""
    repository, revision = hub.split(path)
    where: dict[str, Any] = {"local_files_only": Path(path).is_dir()}
    return repository, where | ({"revision": revision} if revision else {})


def _auto_config(path: str) -> Any:
    """As `read_config`, with transformers' own errors."""
    place, where = _place(path)
    return AutoConfig.from_pretrained(place, **where)


def _adapter_of(name: str) -> hub.Found | None:
    """Find the adapter that a name stands for; None where it is none."""
    own = embedded.adapter_of(name)
    return hub.Found(own, False) if own else hub.find_adapter(name)


def is_adapter(name: str) -> bool:
    """Tell whether `name` is an adapter: embedded, or a directory or hub id of one."""
    return _adapter_of(name) is not None


def adapter_directory(name: str) -> Path:
    """Return the folder of an adapter."""
    found = _adapter_of(name)
    return found.folder if found else Path(name)


def _base_of(name: str) -> str:
    """Return what to read the weights from.

    Raises InputError for what only looks like a model: another file, or a folder of GGUF files.
    """
    found = _adapter_of(name)
    apart = found is not None and not found.has_base
    base = adapters.read_config(adapter_directory(name)).base_model if apart else name
    path = Path(base)
    require(path.exists() or path.suffix != ".gguf", f"model {name}: no such file")
    require(
        not path.is_file() or gguf.is_gguf(path),
        f"model {name}: a file that is not GGUF; expected a model directory (config.json, "
        "*.safetensors), a hub id or a GGUF file",
    )
    files = sorted(map(str, path.glob("*.gguf"))) if path.is_dir() else []
    require(
        not files or (path / "config.json").is_file(),
        f"model {name}: a folder of GGUF files; expected one of them, as {''.join(files[:1])}",
    )
    return base


def sized(name: str, dtype: str) -> devices.Size:
    """Compute how much memory `load(name, dtype)` takes, for `devices.place`; reads configs only.

    Raises InputError, one line, for a model that can't be decoded or read.
    """
    check_dtype(dtype)
    base = _base_of(name)
    path = _path_of(base)
    with _one_line(base, path):
        config = _auto_config(path)
        check_family(config, base)
        held = torch_dtype(dtype) or getattr(config, "dtype", None) or torch.float32
        # The file has two bytes a number; in memory are the adapter and its fused copy.
        weights = adapter_directory(name) / adapters.WEIGHTS_FILE
        adapter = (
            weights.stat().st_size * held.itemsize if is_adapter(name) and weights.is_file() else 0
        )
        return devices.model_size(name, config, held, adapter)


_CPU = {"": torch.device("cpu")}


def _is_plain(config: Any) -> bool:
    """Tell whether a checkpoint is a causal LM of transformers', as it is and not quantized."""
    names = getattr(config, "architectures", None) or []
    known = [name for name in names if name.endswith("ForCausalLM") and hasattr(transformers, name)]
    return len(names) == len(known) == 1 and getattr(config, "quantization_config", None) is None


def _from_tensors(
    config: Any, tensors: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Make a model of tensors, which stay where they are, as `from_pretrained` makes it of files.

    Args:
        config: of a checkpoint that `_is_plain`.
        tensors: by their names in the checkpoint.
        options: of `from_pretrained`.
    """
    path = config.name_or_path
    where = {name: options[name] for name in ("local_files_only", "revision") if name in options}
    kind = getattr(transformers, config.architectures[0])
    model, loaded = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
    model.name_or_path = model.config.name_or_path = path
    with suppress(OSError):  # not every checkpoint has one
        model.generation_config = GenerationConfig.from_pretrained(path, **where)
    return model, loaded


def load_base(
    name: str, dtype: torch.dtype | str, device_map: dict[str, torch.device]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, MappedWeights | None]:
    """Load a base's model and tokenizer. Raises InputError, one line, for what can't be read.

    On a CPU, weights that `dtype` leaves as they are stay in their files, which are returned too.
    """
    path = _path_of(name)
    place, where = _place(path)
    if where["local_files_only"]:
        transformers_logging.disable_progress_bar()  # for a download it is worth seeing
    with _one_line(name, path):
        config = _auto_config(path)
        mapped = MappedWeights(place, where) if device_map == _CPU and _is_plain(config) else None
        options = {
            "dtype": dtype,
            "attn_implementation": attention.NAME,
            "device_map": device_map,
            "output_loading_info": True,
            **where,
        }
        if mapped is None or not mapped.tensors:
            model, loaded = AutoModelForCausalLM.from_pretrained(place, **options)
        else:
            model, loaded = _from_tensors(config, mapped.tensors, options)
            mapped.tensors.clear()
        missing = sorted(loaded["missing_keys"])
        require(
            not missing,
            f"model {name}: its checkpoint lacks {len(missing)} tensors, such as {missing[:1]}",
        )
    return model.eval().requires_grad_(False), load_tokenizer(name), mapped


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer alone.

    name: as of `load`. Raises InputError, one line, for what can't be read.
    """
    base = _base_of(name)
    path = _path_of(base)
    with _one_line(base, path):
        place, where = _place(path)
        return AutoTokenizer.from_pretrained(place, **where)


def _published(name: str) -> SatConfig | None:
    """Return the SAT of a published checkpoint, None for any other name.

    The name is a hub id, a directory of its name, or a snapshot in the hub's cache folder.
    """
    folder = Path(name).resolve() if Path(name).is_dir() else Path(hub.split(name)[0])
    snapshot = folder.parent.name == "snapshots"  # models--ainergy--NAME/snapshots/<commit>
    return PUBLISHED.get(folder.parent.parent.name.rpartition("--")[2] if snapshot else folder.name)


def _sat_of_checkpoint(
    name: str, config: Any, token_id: SatIds | None, k: int | None
) -> SatConfig | None:
    """Find a checkpoint's SAT.

    The options come first, then config.json's key `sdsat`, then what is known of the published
    checkpoints.

    Args:
        name: of the checkpoint.
        config: transformers' configuration.
        token_id: of the SAT, or one a depth; None where no option gives it.
        k: how many SATs were trained; None where no option gives it.

    Returns:
        The SAT, None where there is none.

    Raises:
        InputError: for a damaged key, and for a k without a SAT.
    """
    own = getattr(config, "sdsat", None)
    known = _published(name)
    if own is not None:
        try:
            known = SatConfig.of(own["sat_token_id"], own["k"])
        except (KeyError, TypeError, InputError):
            raise InputError(
                f"model {name}: config.json's key 'sdsat' needs sat_token_id and k, not {own!r}"
            ) from None
    if token_id is not None:
        known = SatConfig.of(token_id, known.k if known else 5)
    if k is None:
        return known
    if known is None:
        raise InputError(f"trained_k={k}: model {name} has no SAT; expected sat_token_id too")
    return replace(known, k=k)


def sat_of(
    name: str, sat_token_id: SatIds | None = None, trained_k: int | None = None
) -> SatConfig | None:
    """Find the SAT that `load` will find, of settings alone.

    Raises InputError as `load`.
    """
    check_options(name, sat_token_id, trained_k)
    if is_adapter(name):
        return adapters.read_config(adapter_directory(name)).sat
    known = embedded.named(name) or gguf.is_gguf(name)  # a file has no place for a SAT
    config = None if known else read_config(_base_of(name))
    return _sat_of_checkpoint(name, config, sat_token_id, trained_k)


def in_papers_form(
    name: str, sat_token_id: SatIds | None = None, trained_k: int | None = None
) -> bool:
    """Tell whether this is a full SDSAT checkpoint of CodeLlama's form, as the paper's are.

    Only config.json is read. False, too, for what can't be loaded: `load` says why. Raises
    InputError as `load` for the SAT's options.
    """
    if embedded.named(name):
        return False
    if _published(name):
        return True
    if is_adapter(name):
        return False
    try:
        path = _path_of(name)
        config = _auto_config(path)
    except Exception:  # as in _one_line
        return False
    codellama = (config.model_type, getattr(config, "vocab_size", None)) == (
        "llama",
        CODELLAMA_VOCABULARY,
    )
    return codellama and _sat_of_checkpoint(name, config, sat_token_id, trained_k) is not None


def load(
    name: str = embedded.NAME,
    dtype: str = "bfloat16",
    device: str | None = None,
    sat_token_id: SatIds | None = None,
    trained_k: int | None = None,
    context: int = CONTEXT,
) -> SatModel:
    """Load a model by hub id, directory, GGUF file, adapter directory or embedded name.

    Args:
        name: of the model.
        dtype: 'float32', 'bfloat16', 'float16'; on a CPU 'int8' for linear layers in 8 bits
            (int8.py), or 'gguf' for those of a GGUF file in its own bits (blocks.py), and all else
            in bfloat16; or 'auto' for the checkpoint's own, which is read without a second copy in
            memory.
        device: see `devices.pick_devices`.
        sat_token_id: of the SAT, or one a depth, in place of what the checkpoint says.
        trained_k: how many SATs were trained, in place of what the checkpoint says; 5 where neither
            does.
        context: positions of the cache that memory must be left for; a model that can't fit is
            refused before it is loaded.

    Raises:
        InputError: in one line, for anything that can't be loaded.
    """
    expected = "a hub id, a directory, a GGUF file or an embedded name"
    named = isinstance(name, (str, Path)) and str(name).strip() and str(name).isprintable()
    require(bool(named), f"model={name!r}: expected {expected}")
    name = str(name)
    check_dtype(dtype)
    whole("context", context, "1 or more, a whole number", 1)
    check_options(name, sat_token_id, trained_k)
    found = devices.pick_devices(device)  # refuses a wrong name before anything is fetched
    require(
        dtype not in WITH_INTEGERS or found[0].type == "cpu",
        f"dtype={dtype}: on a CPU only; expected device=cpu, or bfloat16 or float16 on a GPU",
    )
    base = _base_of(name)
    file = _gguf_file(base) if dtype == GGUF else None
    device_map = devices.place(sized(name, dtype), device, context)
    model, tokenizer, mapped = load_base(base, torch_dtype(dtype) or "auto", device_map)
    equipped = equip(model, tokenizer, name, sat_token_id, trained_k)
    equipped.mapped = mapped
    if dtype == INT8:
        round_linears(model)  # after an adapter has compared the base with its own
    if file is not None and mapped is not None:
        take_blocks(model, gguf.held_weights(file, base, mapped.map_file(file)))
    return equipped


def _gguf_file(base: str) -> Path:
    """Return the GGUF file that a base is made of, fetched if need be.

    Raises InputError where there is none.
    """
    if (model := embedded.named(base)) is not None:
        return embedded.own_file(model)
    require(
        gguf.is_gguf(base),
        f"dtype={GGUF}: {base} is no GGUF file; expected such a file, an embedded model, or "
        f"dtype={INT8}",
    )
    return Path(base)


def check_options(name: str, sat_token_id: SatIds | None, trained_k: int | None) -> None:
    """Refuse options that don't go together, before weights are read.

    Raises InputError, one line.
    """
    if sat_token_id is not None or trained_k is not None:
        SatConfig.of(
            0 if sat_token_id is None else sat_token_id, 1 if trained_k is None else trained_k
        )
    given = {"sat_token_id": sat_token_id, "trained_k": trained_k}
    strange = [
        f"{option}={value}"
        for option, value in given.items()
        if value is not None and is_adapter(name)
    ]
    require(not strange, f"{', '.join(strange)}: {name} is an adapter and brings its own SAT")
    require(
        not is_adapter(name) or not adapters.read_config(adapter_directory(name)).everywhere,
        f"model {name}: this adapter's update acts on every row, so that the target itself "
        "would change; "
        "`sdsat export` makes it a draft for a server",
    )


def equip(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    sat_token_id: SatIds | None = None,
    trained_k: int | None = None,
) -> SatModel:
    """Add to a loaded base what `name` brings: an adapter, or the SAT of its own checkpoint.

    The model's attention becomes `attention.NAME`.

    Args:
        model: the base.
        tokenizer: of the base, if any.
        name: an adapter (directory or embedded name), or the model's own name.
        sat_token_id: as of `load`, already checked.
        trained_k: as of `load`, already checked.

    Raises:
        InputError: as `load`.
    """
    model.set_attn_implementation(attention.NAME)
    adapter = adapters.load(model, adapter_directory(name)) if is_adapter(name) else None
    sat = (
        adapter.config.sat
        if adapter
        else _sat_of_checkpoint(name, model.config, sat_token_id, trained_k)
    )
    equipped = SatModel(model, tokenizer, name, sat, adapter)
    equipped.sat = equipped.place_of_sat()
    return equipped
