"""Loading: a model argument is a hub id, a local directory, an adapter directory, or the name of
the embedded default.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from sdsat.config import LOOKUP, STRATEGIES, InputError, SatConfig, require, whole
from sdsat.decoding.lock import FairLock
from sdsat.engines.graphs import CudaCapture, Graphs
from sdsat.engines.native.bindings import Unavailable
from sdsat.engines.native.weights import NativeEngine
from sdsat.models import adapter as adapters
from sdsat.models import attention, devices, embedded
from sdsat.models.head import DraftHead
from sdsat.models.packed import PackedLinears, can_pack, in_use
from sdsat.models.weights import Snapshot, strange_part

if TYPE_CHECKING:
    from sdsat.decoding.auto_planner import AutoPlanner
    from sdsat.engines.base import RowPolicy
    from sdsat.method.costs import CostCurve
from sdsat.models.dtypes import DTYPES, _check_dtype_of, check_dtype
from sdsat.models.families import CODELLAMA_VOCABULARY, PUBLISHED, check_family

ENGINES = ("auto", "native", "transformers")


@dataclass
class SatModel:
    """A causal LM with what it takes to draft: its SAT settings and, in adapter mode, the adapter.

    sat is None for a plain model: it decodes with k = 0 only. native: the CPU engine, None where
    passes go through transformers' modules; then packed may hold their linear layers' weights in
    the processor's own order. row_policy: see engine.probe_rows; costs: see costs.py; planners:
    what `auto` has learned, by settings. graphs: see graphs.py, None off GPUs.
    lock: held by the thread whose passes run (decode.py).
    engine, record: the options `engine` and `graphs` of `load`, by which `renew` makes all these;
    None for a model that was put together by hand, which stays as it is. made_of: what they were
    made of.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    sat: SatConfig | None = None
    adapter: adapters.SatAdapter | None = None
    packed: PackedLinears | None = None
    row_policy: RowPolicy | None = None
    native: NativeEngine | None = None
    costs: CostCurve | None = None
    planners: dict[Any, AutoPlanner] = field(default_factory=dict)
    graphs: Graphs | None = None
    lock: FairLock = field(default_factory=FairLock)
    engine: str | None = None
    record: bool = True
    made_of: Snapshot | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a pickle hold: no engine, which has addresses of this process; `renew`
        makes new ones.
        """
        names = ("model", "tokenizer", "name", "sat", "adapter", "costs", "engine", "record")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __copy__(self) -> SatModel:
        """The same model with the same engines, as `copy.copy` of any other object."""
        return replace(self)

    def renew(self) -> None:
        """Make what passes run on again if weights or modules are others than it was made of.

        Before every generation.

        Raises InputError, one line, where the model can't be decoded any more, and in a forked
        process.
        """
        if self.engine is None:
            return
        _refuse_in_fork(self)
        with self.lock.held():
            if self.made_of is None or not self.made_of.holds():
                with torch.inference_mode(False), torch.no_grad():
                    _make_engine(self)

    @cached_property
    def rounded(self) -> NativeEngine | None:
        """The CPU engine in 8 bits for passes that only draft, made when first asked for; None
        without a CPU engine.
        """
        return (
            NativeEngine(self.model, self.adapter, self.max_context, rounded=True)
            if self.native
            else None
        )

    @property
    def engine_name(self) -> str:
        return (
            "native"
            if self.native
            else "cuda graphs"
            if self.graphs and self.graphs.works
            else "transformers"
        )

    @property
    def strategies(self) -> tuple[str, ...]:
        """Those that it has SATs and an engine for: only the native one has 8 bits, and looking
        tokens up takes nothing.
        """
        with_sats = STRATEGIES if self.sat else ()
        return (
            LOOKUP,
            *(
                strategy
                for strategy in with_sats
                if strategy != "rounded" or self.native is not None
            ),
        )

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def devices(self) -> list[torch.device]:
        """Every device that holds weights; inputs and logits are on `device`, the first."""
        return list(
            dict.fromkeys(
                [self.device, *(parameter.device for parameter in self.model.parameters())]
            )
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def head(self) -> DraftHead | None:
        return self.adapter.head if self.adapter else None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids of the model's generation config."""
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list) else (eos,)

    def mask(
        self, attend: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """A pass's bool mask in the form that every layer's attention uses as it is; arguments as
        of `attention.layer_masks`.
        """
        config = self.model.config
        groups = config.num_attention_heads // (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        masks = attention.layer_masks(config, attend, rows, columns)
        if isinstance(masks, dict):
            return {
                kind: attention.folded_mask(mask, groups, self.dtype)
                for kind, mask in masks.items()
            }
        return attention.folded_mask(masks, groups, self.dtype)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Last hidden states [..., D] -> logits [..., V], as the model's own forward makes them."""
        with in_use():
            logits = self.model.get_output_embeddings()(states)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def legal(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., V], changed in place so that the SAT, where it is in the vocabulary, is
        never chosen.
        """
        if self.sat is not None and self.sat.token_id < logits.shape[-1]:
            logits[..., self.sat.token_id] = float("-inf")
        return logits

    @property
    def max_context(self) -> int:
        """Positions the model can take."""
        return getattr(self.model.config, "max_position_embeddings", None) or 2**31

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[1, S] token ids -> [1, S, D] input embeddings; the SAT's id takes the adapter's
        embedding, scaled as all (Gemma).
        """
        embeddings = self.model.get_input_embeddings()
        if self.adapter is None or self.sat is None:
            return embeddings(tokens)
        is_sat = tokens == self.sat.token_id
        plain = embeddings(tokens.masked_fill(is_sat, 0))
        own = self.adapter.sat_embedding.to(plain.dtype) * getattr(embeddings, "embed_scale", 1)
        return torch.where(is_sat[..., None], own, plain)

    def sat_rows(self, start: int, end: int) -> AbstractContextManager[None]:
        """Within this context, rows start..end-1 of a pass are SATs."""
        return self.adapter.on_rows(start, end) if self.adapter else nullcontext()


def check_model(model: Any, name: str) -> None:
    """Refuse a model that transformers has loaded in a way in which passes can't run."""
    check_family(model.config, name)
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    require(
        len(places) == 1 and places != ["meta"],
        f"model {name}: its weights are on {', '.join(places)}; expected one device",
    )
    _check_dtype_of(model, name)


@contextmanager
def _one_line(name: str, path: str) -> Iterator[None]:
    """Whatever goes wrong while a model is read, as one InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a dozen libraries meet here, each with exceptions of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if name == embedded.BASE_NAME:
            raise InputError(
                f"cache {path}: damaged ({reason}); delete this folder and run again"
            ) from None
        if Path(path).is_dir():
            raise InputError(f"model {name}: this directory cannot be loaded ({reason})") from None
        hint = f"a hub id, a local model or adapter directory, or {embedded.NAME}"
        raise InputError(f"model {name}: not found ({reason}); expected {hint}") from None


def _path_of(base: str) -> str:
    return str(embedded.base_dir()) if base == embedded.BASE_NAME else base


def places(name: str) -> tuple[Path | None, str]:
    """The adapter's folder, where `name` is an adapter, and the folder or hub id of the base."""
    return (_adapter_directory(name) if is_adapter(name) else None), _path_of(_base_of(name))


def read_config(path: str) -> Any:
    """A base's configuration, by folder or hub id; InputError, one line, where it can't be read."""
    with _one_line(path, path):
        return AutoConfig.from_pretrained(path, local_files_only=Path(path).is_dir())


def is_adapter(name: str) -> bool:
    return name == embedded.NAME or (Path(name) / adapters.CONFIG_FILE).is_file()


def _adapter_directory(name: str) -> Path:
    return embedded.ADAPTER_DIR if name == embedded.NAME else Path(name)


def _base_of(name: str) -> str:
    """What to read the weights from.

    Raises InputError for what only looks like a model: a file, or a folder of GGUF files.
    """
    base = adapters.read_config(_adapter_directory(name)).base_model if is_adapter(name) else name
    path = Path(base)
    expected = (
        "expected the hub id or the directory (config.json, *.safetensors) that it was made from"
    )
    require(
        not path.is_file(), f"model {name}: a file, such as GGUF, not a model directory; {expected}"
    )
    gguf = (
        next(path.glob("*.gguf"), None)
        if path.is_dir() and not (path / "config.json").is_file()
        else None
    )
    require(
        gguf is None,
        (
            f"model {name}: holds GGUF weights ({gguf and gguf.name}), which only llama.cpp "
            f"reads; {expected}"
        ),
    )
    return base


def sized(name: str, dtype: str) -> devices.Size:
    """How much memory `load(name, dtype)` takes, for `devices.place`; reads configs only."""
    check_dtype(dtype)
    base = _base_of(name)
    path = _path_of(base)
    with _one_line(base, path):
        config = AutoConfig.from_pretrained(path, local_files_only=Path(path).is_dir())
        check_family(config, base)
        torch_dtype = DTYPES.get(dtype) or getattr(config, "dtype", None) or torch.float32
        # two bytes a number; held as it is and fused
        weights = _adapter_directory(name) / adapters.WEIGHTS_FILE
        adapter = (
            weights.stat().st_size * torch_dtype.itemsize
            if is_adapter(name) and weights.is_file()
            else 0
        )
        return devices.model_size(name, config, torch_dtype, adapter)


def _load_base(
    name: str, dtype: torch.dtype | str, device_map: dict[str, torch.device]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = _path_of(name)
    if local := Path(path).is_dir():
        transformers_logging.disable_progress_bar()  # for a download it is worth seeing
    with _one_line(name, path):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention.NAME,
            device_map=device_map,
            local_files_only=local,
            output_loading_info=True,
        )
        missing = sorted(loaded["missing_keys"])
        require(
            not missing,
            f"model {name}: its checkpoint lacks {len(missing)} tensors, such as {missing[:1]}",
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local)
    return model.eval().requires_grad_(False), tokenizer


_made_in: int | None = None  # the process whose threads have computed with a model


def _refuse_in_fork(model: SatModel) -> None:
    """A forked process has none of its parent's threads, but their locks: with more than one thread
    it would wait for ever.
    """
    alone = model.device.type == "cpu" and torch.get_num_threads() == 1
    require(
        _made_in in (None, os.getpid()) or alone,
        f"model {model.name}: this process was forked from {_made_in}, which had made it "
        "ready, and its passes would hang; "
        "expected a process of the start method 'spawn', or torch.set_num_threads(1) here",
    )


def _make_engine(model: SatModel) -> None:
    """What passes of this model run on, as its weights and modules are now.

    What there was is dropped.
    """
    global _made_in
    lm = model.model
    again = model.made_of is not None
    if model.packed is not None:
        model.packed.detach()
    model.made_of = model.native = model.packed = model.graphs = model.row_policy = None
    model.__dict__.pop("rounded", None)
    if again:
        model.costs = None
    model.planners.clear()
    _check_dtype_of(lm, model.name)
    lm.set_attn_implementation(attention.NAME)
    if model.adapter is not None:
        model.adapter.follow(lm)
    model.sat = _place_of_sat(model)
    _made_in = _made_in or os.getpid()
    _choose_engine(model)
    model.made_of = Snapshot(lm, model.adapter)


def _place_of_sat(model: SatModel) -> SatConfig | None:
    """The model's SAT.

    That of an adapter has no row in the embedding, so its id is the first one behind all rows,
    however many tokens have been added: no token of a tokenizer is taken for it.
    """
    lm = model.model
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    if model.adapter is not None:
        return replace(model.adapter.config.sat, token_id=max(vocabulary, lm.config.vocab_size))
    require(
        model.sat is None or model.sat.token_id < vocabulary,
        (
            f"sat_token_id={model.sat and model.sat.token_id}: the model's vocabulary ends at "
            f"{vocabulary - 1}"
        ),
    )
    return model.sat


def _choose_engine(model: SatModel) -> None:
    """The native engine, or transformers' modules with what makes them faster; for a model of
    strange parts only if it can be.
    """
    from sdsat.engines.transformers import check_rows

    if model.engine != "transformers":
        try:
            model.native = NativeEngine(model.model, model.adapter, model.max_context)
            return
        except Unavailable as reason:
            require(
                model.engine == "auto",
                f"engine=native: not to be had for {model.name} ({reason}); expected auto",
            )
            if model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float32):
                warnings.warn(
                    f"passes go through transformers' modules, which is slower: {reason}",
                    stacklevel=5,
                )
    if can_pack(model.device, model.dtype):
        model.packed = PackedLinears(model.model).attach()
    strange = strange_part(model.model)
    if strange is not None:
        check_rows(model, strange)
    # a graph records one GPU
    if model.record and model.device.type == "cuda" and len(model.devices) == 1 and strange is None:
        model.graphs = Graphs(CudaCapture(model.device))


def _published(name: str) -> SatConfig | None:
    """The SAT of a published checkpoint: a hub id, a directory of its name, or a snapshot in the
    hub's cache folder.
    """
    folder = Path(name).resolve() if Path(name).is_dir() else Path(name)
    snapshot = folder.parent.name == "snapshots"  # models--ainergy--NAME/snapshots/<commit>
    return PUBLISHED.get(folder.parent.parent.name.rpartition("--")[2] if snapshot else folder.name)


def _sat_of_checkpoint(
    name: str, config: Any, token_id: int | None, k: int | None
) -> SatConfig | None:
    """What the options say, then config.json's key `sdsat`, then what is known of the published
    checkpoints.
    """
    own = getattr(config, "sdsat", None)
    known = _published(name)
    if own is not None:
        try:
            known = SatConfig(own["sat_token_id"], own["k"])
        except (KeyError, TypeError, InputError):
            raise InputError(
                f"model {name}: config.json's key 'sdsat' needs sat_token_id and k, not {own!r}"
            ) from None
    if token_id is not None:
        known = SatConfig(token_id, known.k if known else 5)
    if k is None:
        return known
    if known is None:
        raise InputError(f"trained_k={k}: model {name} has no SAT; expected sat_token_id too")
    return replace(known, k=k)


def in_papers_form(
    name: str, sat_token_id: int | None = None, trained_k: int | None = None
) -> bool:
    """Whether this is a full SDSAT checkpoint of CodeLlama's form, as the paper's are; only
    config.json is read.

    False, too, for what can't be loaded: `load` says why.
    """
    if is_adapter(name) or name == embedded.BASE_NAME:
        return False
    if _published(name):
        return True
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=Path(name).is_dir())
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
    sat_token_id: int | None = None,
    engine: str = "auto",
    graphs: bool = True,
    trained_k: int | None = None,
    context: int = 2048,
) -> SatModel:
    """Load a model by hub id, directory, adapter directory or embedded name.

    dtype: 'float32', 'bfloat16', 'float16', or 'auto' for the checkpoint's own, which is read
    without a second copy in memory.
    device: see `devices.pick_devices`. sat_token_id, trained_k: override what the checkpoint says;
    k is 5 where neither does.
    engine: 'native', 'transformers', or 'auto' for native where it can be had (a CPU, float32 or
    bfloat16, a C++ compiler).
    graphs: on a GPU, passes are recorded as CUDA graphs (graphs.py).
    context: positions of the cache that memory must be left for; a model that can't fit is refused
    before it is loaded. Raises InputError, one line, for anything that can't be loaded.
    """
    require(
        isinstance(name, (str, Path)),
        f"model={name!r}: expected a hub id, a directory or an embedded name",
    )
    name = str(name)
    check_dtype(dtype)
    whole("context", context, "1 or more, a whole number", 1)
    check_options(name, sat_token_id, engine, trained_k)
    devices.pick_devices(device)  # a wrong name is said before anything is fetched
    device_map = devices.place(sized(name, dtype), device, context)
    model, tokenizer = _load_base(_base_of(name), DTYPES.get(dtype, "auto"), device_map)
    return equip(model, tokenizer, name, sat_token_id, engine, graphs, trained_k)


def check_options(name: str, sat_token_id: int | None, engine: str, trained_k: int | None) -> None:
    """Refuse options that don't go together, before weights are read."""
    require(engine in ENGINES, f"engine={engine}: expected one of {', '.join(ENGINES)}")
    if sat_token_id is not None or trained_k is not None:
        SatConfig(
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
        not is_adapter(name) or not adapters.read_config(_adapter_directory(name)).everywhere,
        f"model {name}: this adapter's update acts on every row, so that the target itself "
        "would change; "
        "`sdsat export` makes it a draft for a server",
    )


def equip(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    sat_token_id: int | None = None,
    engine: str = "auto",
    graphs: bool = True,
    trained_k: int | None = None,
) -> SatModel:
    """A loaded base model with what `name` adds: an adapter (directory or embedded name), or the
    SAT of its own checkpoint.

    Options, already checked, and errors as those of `load`. The model's attention becomes
    `attention.NAME`.
    """
    model.set_attn_implementation(attention.NAME)
    adapter = adapters.load(model, _adapter_directory(name)) if is_adapter(name) else None
    sat = (
        adapter.config.sat
        if adapter
        else _sat_of_checkpoint(name, model.config, sat_token_id, trained_k)
    )
    whole = SatModel(model, tokenizer, name, sat, adapter, engine=engine, record=graphs)
    whole.renew()
    return whole
