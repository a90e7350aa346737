"""Loading: a model argument is a hub id, a local directory, an adapter directory, or the name of the embedded default."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from . import adapter as adapters
from . import attention, embedded
from .config import InputError, SatConfig, require
from .graphs import CudaCapture, Graphs
from .head import DraftHead
from .native import NativeEngine, Unavailable
from .packed import PackedLinears, can_pack

if TYPE_CHECKING:
    from .costs import CostCurve
    from .engine import RowPolicy
    from .planner import AutoPlanner

# The two published checkpoints (arXiv 2403.18647) say nothing of their SAT in config.json, and plain CodeLlama looks the same.
PUBLISHED = {
    "CodeLlama-SDSAT_L5_7B": SatConfig(token_id=32011, k=5),
    "CodeLlama-SDSAT_L7_13B": SatConfig(token_id=32011, k=7),
}
CODELLAMA_VOCABULARY = 32016
# Checked against `transformers` generate in tests/test_families.py.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ENGINES = ("auto", "native", "transformers")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class SatModel:
    """A causal LM with what it takes to draft: its SAT settings and, in adapter mode, the adapter.

    sat is None for a plain model: it decodes with k = 0 only. native: the CPU engine, None where passes go through
    transformers' modules; then packed may hold their linear layers' weights in the processor's own order. row_policy: see
    engine.probe_rows; costs: see costs.py; planners: what `auto` has learned, by settings. graphs: see graphs.py, None off GPUs.
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

    @cached_property
    def rounded(self) -> NativeEngine | None:
        """The CPU engine in 8 bits for passes that only draft, made when first asked for; None without a CPU engine."""
        return NativeEngine(self.model, self.adapter, self.max_context, rounded=True) if self.native else None

    @property
    def engine_name(self) -> str:
        return "native" if self.native else "cuda graphs" if self.graphs and self.graphs.works else "transformers"

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

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

    def mask(self, attend: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """A pass's bool mask in the form that every layer's attention uses as it is; arguments as of `attention.layer_masks`."""
        config = self.model.config
        groups = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        masks = attention.layer_masks(config, attend, rows, columns)
        if isinstance(masks, dict):
            return {kind: attention.folded_mask(mask, groups, self.dtype) for kind, mask in masks.items()}
        return attention.folded_mask(masks, groups, self.dtype)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Last hidden states [..., D] -> logits [..., V], as the model's own forward makes them."""
        logits = self.model.get_output_embeddings()(states)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def legal(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., V], changed in place so that the SAT, where it is in the vocabulary, is never chosen."""
        if self.sat is not None and self.sat.token_id < logits.shape[-1]:
            logits[..., self.sat.token_id] = float("-inf")
        return logits

    @property
    def max_context(self) -> int:
        """Positions the model can take."""
        return getattr(self.model.config, "max_position_embeddings", None) or 2**31

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[1, S] token ids -> [1, S, D] input embeddings; the SAT's id takes the adapter's embedding, scaled as all (Gemma)."""
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


def check_dtype(dtype: str) -> None:
    require(dtype == "auto" or dtype in DTYPES, f"dtype={dtype}: expected auto, {', '.join(DTYPES)}")


def check_family(config: Any, name: str) -> None:
    """Refuse, with the reason, an architecture or a setting that the decoder isn't known to decode exactly."""
    kind = getattr(config, "model_type", None)
    require(kind in FAMILIES, f"model {name}: architecture {kind!r} is not supported; expected one of {', '.join(FAMILIES)}")
    quantized = getattr(config, "quantization_config", None) is not None
    require(not quantized, f"model {name}: quantized weights are not supported; expected a checkpoint of {', '.join(DTYPES)}")
    ropes = getattr(config, "rope_parameters", None) or {}
    for settings in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):  # Gemma 3: one a type of layer
        rope, share = settings.get("rope_type", "default"), settings.get("partial_rotary_factor") or 1
        require(
            rope in ROPE_TYPES,
            f"model {name}: rope_type {rope!r} is not supported; expected one of {', '.join(ROPE_TYPES)} "
            "(dynamic and longrope scale all positions by the furthest one of a pass, and drafts look ahead)",
        )
        require(share == 1, f"model {name}: partial_rotary_factor={share} is not supported; expected 1")
    both_ways = getattr(config, "use_bidirectional_attention", None)
    require(not both_ways, f"model {name}: use_bidirectional_attention={both_ways} is not supported; expected false")
    if kind in attention.TYPED_LAYERS:
        known = ["full_attention", *(["sliding_attention"] if config.sliding_window else [])]
        strange = [layer for layer in config.layer_types if layer not in known]
        require(
            not strange,
            f"model {name}: layer type {''.join(strange[:1])!r} with sliding_window={config.sliding_window} is not supported; "
            f"expected {' or '.join(known)}",
        )


def pick_device(device: str | None) -> torch.device:
    """None -> CUDA device 0 where there is one, else the CPU; 'cpu' or a GPU number otherwise."""
    if device in (None, ""):
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = f"this machine has {count} GPU{'' if count == 1 else 's'}"
    require(
        str(device).isdecimal() and int(device) < count,
        f"GPUS={device}: {known}; expected 'cpu' or a number below {count}",
    )
    return torch.device(f"cuda:{device}")


def _load_base(name: str, dtype: torch.dtype | str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = str(embedded.base_dir()) if name == embedded.BASE_NAME else name
    if local := Path(path).is_dir():
        transformers_logging.disable_progress_bar()  # for a download it is worth seeing
    try:
        check_family(AutoConfig.from_pretrained(path, local_files_only=local), name)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention.NAME,
            device_map={"": device},
            local_files_only=local,
            output_loading_info=True,
        )
        missing = sorted(loaded["missing_keys"])
        require(not missing, f"model {name}: its checkpoint lacks {len(missing)} tensors, such as {missing[:1]}")
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local)
    except InputError:
        raise
    except Exception as error:  # a dozen libraries meet here, each with exceptions of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if name == embedded.BASE_NAME:
            raise InputError(f"cache {path}: damaged ({reason}); delete this folder and run again") from None
        if local:
            raise InputError(f"model {name}: this directory cannot be loaded ({reason})") from None
        hint = f"a hub id, a local model or adapter directory, or {embedded.NAME}"
        raise InputError(f"model {name}: not found ({reason}); expected {hint}") from None
    return model.eval().requires_grad_(False), tokenizer


def _with_engine(model: SatModel, engine: str, graphs: bool) -> SatModel:
    """The model with what its passes run on."""
    if engine != "transformers":
        try:
            model.native = NativeEngine(model.model, model.adapter, model.max_context)
            return model
        except Unavailable as reason:
            require(engine == "auto", f"engine=native: not to be had for {model.name} ({reason}); expected auto")
            if model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float32):
                warnings.warn(f"passes go through transformers' modules, which is slower: {reason}", stacklevel=3)
    if can_pack(model.device, model.dtype):
        model.packed = PackedLinears(model.model).attach()
    if graphs and model.device.type == "cuda":
        model.graphs = Graphs(CudaCapture(model.device))
    return model


def _published(name: str) -> SatConfig | None:
    """The SAT of a published checkpoint: a hub id, a directory of its name, or a snapshot in the hub's cache folder."""
    folder = Path(name).resolve() if Path(name).is_dir() else Path(name)
    snapshot = folder.parent.name == "snapshots"  # models--ainergy--NAME/snapshots/<commit>
    return PUBLISHED.get(folder.parent.parent.name.rpartition("--")[2] if snapshot else folder.name)


def _sat_of_checkpoint(name: str, config: Any, token_id: int | None, k: int | None) -> SatConfig | None:
    """What the options say, then config.json's key `sdsat`, then what is known of the published checkpoints."""
    own, known = getattr(config, "sdsat", None), _published(name)
    if own is not None:
        try:
            known = SatConfig(own["sat_token_id"], own["k"])
        except (KeyError, TypeError):
            raise InputError(f"model {name}: config.json's key 'sdsat' needs sat_token_id and k, not {own!r}") from None
    if token_id is not None:
        known = SatConfig(token_id, known.k if known else 5)
    if k is None:
        return known
    if known is None:
        raise InputError(f"trained_k={k}: model {name} has no SAT; expected sat_token_id too")
    return replace(known, k=k)


def is_adapter(name: str) -> bool:
    return name == embedded.NAME or (Path(name) / adapters.CONFIG_FILE).is_file()


def in_papers_form(name: str, sat_token_id: int | None = None, trained_k: int | None = None) -> bool:
    """Whether this is a full SDSAT checkpoint of CodeLlama's form, as the paper's are; only config.json is read.

    False, too, for what can't be loaded: `load` says why.
    """
    if is_adapter(name) or name == embedded.BASE_NAME:
        return False
    if _published(name):
        return True
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=Path(name).is_dir())
    except Exception:  # as in _load_base
        return False
    codellama = (config.model_type, getattr(config, "vocab_size", None)) == ("llama", CODELLAMA_VOCABULARY)
    return codellama and _sat_of_checkpoint(name, config, sat_token_id, trained_k) is not None


def load(
    name: str = embedded.NAME,
    dtype: str = "bfloat16",
    device: str | None = None,
    sat_token_id: int | None = None,
    engine: str = "auto",
    graphs: bool = True,
    trained_k: int | None = None,
) -> SatModel:
    """Load a model by hub id, directory, adapter directory or embedded name.

    dtype: 'float32', 'bfloat16', 'float16', or 'auto' for the checkpoint's own, which is read without a second copy in memory.
    device: see `pick_device`. sat_token_id, trained_k: override what the checkpoint says; k is 5 where neither does.
    engine: 'native', 'transformers', or 'auto' for native where it can be had (a CPU, float32 or bfloat16, a C++ compiler).
    graphs: on a GPU, passes are recorded as CUDA graphs (graphs.py).
    Raises InputError, one line, for anything that can't be loaded.
    """
    check_dtype(dtype)
    require(engine in ENGINES, f"engine={engine}: expected one of {', '.join(ENGINES)}")
    torch_device, torch_dtype = pick_device(device), DTYPES.get(dtype, "auto")
    directory = embedded.ADAPTER_DIR if name == embedded.NAME else Path(name)
    if is_adapter(name):
        given = {"sat_token_id": sat_token_id, "trained_k": trained_k}
        strange = [f"{option}={value}" for option, value in given.items() if value is not None]
        require(not strange, f"{', '.join(strange)}: {name} is an adapter and brings its own SAT")
        config = adapters.read_config(directory)
        require(
            not config.everywhere,
            f"model {name}: this adapter's update acts on every row, so that the target itself would change; "
            "`sdsat export` makes it a draft for a server",
        )
        base = config.base_model
        model, tokenizer = _load_base(base, torch_dtype, torch_device)
        adapter = adapters.load(model, directory).fuse().attach(model)
        return _with_engine(SatModel(model, tokenizer, name, adapter.config.sat, adapter), engine, graphs)
    model, tokenizer = _load_base(name, torch_dtype, torch_device)
    sat = _sat_of_checkpoint(name, model.config, sat_token_id, trained_k)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    require(
        sat is None or sat.token_id < vocabulary,
        f"sat_token_id={sat and sat.token_id}: the model's vocabulary ends at {vocabulary - 1}",
    )
    return _with_engine(SatModel(model, tokenizer, name, sat), engine, graphs)
