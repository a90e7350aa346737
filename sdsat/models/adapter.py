"""The SDSAT adapter: a SAT embedding and low-rank updates that act on SAT rows only.

The updates are LoRA's (arXiv 2106.09685). For a linear layer y = W x the adapter adds B A x on the
rows named by `on_rows`, and nothing anywhere else: standard tokens never enter its arithmetic, so
their logits are bit-identical to the base's (gated LoRA: arXiv 2507.11851).

    attach(model)                  the hooks go in; nothing changes until rows are named
    with adapter.on_rows(1, 6):    rows 1..5 of the pass are SATs
        model(inputs_embeds=...)

Files: `adapter_config.json` (base, a sample of its weights, SAT settings, rank, training facts, the
hash of the other file), `adapter_model.safetensors` (matrices in 8 bits, see compact.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn
from torch.nn.functional import linear

from sdsat.config import TARGETS, InputError, SatConfig, require
from sdsat.models import packed
from sdsat.models.compact import compacted, restored
from sdsat.models.head import DraftHead
from sdsat.models.hub import CONFIG_FILE, WEIGHTS_FILE

FORMAT = "sdsat-adapter"
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
GAINS = ("head.copies", "head.sharpness")  # which the first adapters do not have


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is and where it belongs.

    Attributes:
        base_model: hub id, directory, GGUF file or embedded name of the base.
        sat: the id and number of its SATs.
        rank: of the low-rank updates.
        scale: factor of the updates.
        targets: names of the linear layers that get an update.
        head: inner size of the draft head, 0 for none.
        draft_vocabulary: how many tokens SATs may guess, 0 for all (method/vocabulary.py).
        everywhere: the update was trained to act on every row of a draft pass, not on SATs alone
            (interfaces/export.py).
        base_sample: a few weights of the base, {tensor: numbers}.
        training: free-form facts on how it was made.
        weights_sha256: of the weights' file beside it; None in adapters that were saved without.
    """

    base_model: str
    sat: SatConfig
    rank: int = 32
    scale: float = 1.0
    targets: tuple[str, ...] = tuple(TARGETS.split(","))
    head: int = 0
    draft_vocabulary: int = 0
    everywhere: bool = False
    base_sample: dict[str, list[float]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = field(default=None, compare=False)


def sample_weights(model: nn.Module) -> dict[str, list[float]]:
    """Take eight numbers from each of a dozen weights spread over the model.

    They tell a base from others in any dtype it is loaded in.
    """
    parameters = sorted(
        (name, p) for name, p in model.named_parameters() if p.dim() >= 1 and p.numel() >= 8
    )
    chosen = parameters[:: max(1, len(parameters) // 12)]
    return {
        name: [round(value, 6) for value in p.detach().flatten()[:8].float().tolist()]
        for name, p in chosen
    }


class _Fused:
    """The updates of layers that read the same input, as one pair of matmuls.

    They are computed by the first layer and kept for the others.
    """

    def __init__(self, downs: list[Tensor], ups: list[Tensor], scale: float):
        self.sizes = [up.shape[0] for up in ups]
        self.down = packed.best_linear(torch.cat(downs))
        self.up = packed.best_linear(scale * torch.block_diag(*ups))

    def update(self, x: Tensor, on: _Pass, index: int) -> Tensor:
        """Compute the update of the group's layer `index`, [B, rows, out].

        x: [B, S, in], the layers' input. on: the pass.
        """
        read, updates = on.computed.pop(self, (None, ()))
        if read is not x:
            updates = self.up(self.down(x[:, on.rows])).split(self.sizes, dim=-1)
        if index + 1 < len(self.sizes):  # the last of the group keeps no memory
            on.computed[self] = x, updates
        return updates[index]


@dataclass
class _Pass:
    """A forward pass with SATs.

    Attributes:
        adapter: whose SATs.
        rows: in which they are.
        computed: what its layers have computed for others of their group.
    """

    adapter: SatAdapter
    rows: slice
    computed: dict[_Fused, tuple[Tensor | None, tuple[Tensor, ...]]] = field(default_factory=dict)


# The pass that runs in this thread. Another thread's pass, on the same modules, has its own; plain
# `generate` has none.
_CURRENT: ContextVar[_Pass | None] = ContextVar("sdsat_pass", default=None)


class SatAdapter(nn.Module):
    """A SAT embedding [D] and one (A [r, in], B [out, r]) pair for each targeted linear layer.

    draft_ids: [C] the tokens that SATs may guess, ascending; None for all.
    """

    def __init__(self, model: Any, config: AdapterConfig, initial: bool = True):
        """Make the adapter of a model, whose outputs it doesn't change yet.

        initial: the SAT embedding begins as the mean of all embeddings; otherwise as any numbers,
        for what is read from a file: the mean takes the embeddings' memory twice.

        Raises InputError where the model has no linear layer of a target's name.
        """
        super().__init__()
        self.config = config
        self._handles: list[Any] = []
        self._hooks: dict[str, _Update] = {}
        self._fused: dict[str, tuple[_Fused, int]] = {}
        embedding = model.get_input_embeddings().weight
        dtype = embedding.dtype
        device = embedding.device
        mean = embedding.detach().mean(0, dtype=torch.float32) if initial else embedding[0]
        self.sat_embedding = nn.Parameter(mean.detach().to(dtype, copy=True))
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        for name, layer in self._targeted(model):
            key = name.replace(".", "/")
            plain = _linear_of(layer)
            where = plain.weight.device  # on several GPUs not always the embedding's
            down = (
                torch.randn(config.rank, plain.in_features, device=where) / plain.in_features**0.5
            )
            self.down[key] = nn.Parameter(down.to(dtype))
            self.up[key] = nn.Parameter(
                torch.zeros(plain.out_features, config.rank, dtype=dtype, device=where)
            )
        self.head = (
            DraftHead(embedding.shape[1], config.head, dtype, device) if config.head else None
        )
        size = config.draft_vocabulary
        ids = torch.arange(size, device=device) if size else None
        self.draft_ids: Tensor | None
        self.register_buffer("draft_ids", ids)
        known = {key.rpartition("/")[2] for key in self.down}
        strange = [name for name in config.targets if name not in known]
        require(
            not strange,
            (
                f"targets={','.join(config.targets)}: the model has no linear layer named "
                f"{', '.join(strange)}"
            ),
        )

    def _targeted(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield the layers that get an update, by name.

        One may be a wrapper around its linear layer (PEFT).
        """
        for name, layer in model.named_modules():
            if name.rsplit(".", 1)[-1] in self.config.targets and _linear_of(layer) is not None:
                yield name, layer

    def attach(self, model: nn.Module) -> SatAdapter:
        """Add the low-rank updates to `model`'s linear layers, as hooks; `detach` undoes it.

        Raises InputError where it is attached already.
        """
        require(not self._handles, "adapter: already attached; detach it first")
        for name, layer in self._targeted(model):
            key = name.replace(".", "/")
            # The same hook goes in again: to weights.Snapshot another one is a change.
            hook = self._hooks.setdefault(key, _Update(self, key))
            self._handles.append(layer.register_forward_hook(hook))
        return self

    def fuse(self) -> SatAdapter:
        """Prepare for decoding: updates then take half the matmuls, and have no gradients."""
        for key in self.down:
            parent, _, name = key.rpartition("/")
            names = next((names for names in _SAME_INPUT if name in names), (name,))
            keys = [member for other in names if (member := f"{parent}/{other}") in self.down]
            if key == keys[0]:
                downs = [self.down[member].detach() for member in keys]
                ups = [self.up[member].detach() for member in keys]
                group = _Fused(downs, ups, self.config.scale)
                self._fused.update({member: (group, index) for index, member in enumerate(keys)})
        if self.head is not None:
            self.head.fuse()
        return self

    def follow(self, model: nn.Module) -> SatAdapter:
        """Go where `model`, the one that it was made for, is now; and fuse.

        The adapter takes the model's dtype, devices and layers. Raises InputError where a layer or
        a token that SATs may guess is gone, and for numbers that are NaN or infinite.
        """
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        layers = dict(self._targeted(model))
        gone = [key for key in self.down if key.replace("/", ".") not in layers]
        require(
            not gone,
            (
                f"adapter: the model has no linear layer {''.join(gone[:1]).replace('/', '.')} "
                "any more"
            ),
        )
        _check_draft_ids(self.draft_ids, model, "adapter")
        self.detach()
        self.to(embedding.device, embedding.dtype)
        for key in self.down:
            weight = _linear_of(layers[key.replace("/", ".")]).weight
            for part in (self.down[key], self.up[key]):
                part.data = part.data.to(weight.device)
        strange = [name for name, part in self.named_parameters() if not part.isfinite().all()]
        require(
            not strange,
            f"adapter: {''.join(strange[:1])} holds NaN or infinite numbers; expected finite ones",
        )
        return self.fuse().attach(model)

    def detach(self) -> None:
        """Take the hooks out again."""
        while self._handles:
            self._handles.pop().remove()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what `fuse` has made: memory in an order that only this process knows."""
        return {**self.__dict__, "_fused": {}}

    def _current(self) -> _Pass | None:
        """Return the pass of this thread, if it has SATs of this adapter."""
        on = _CURRENT.get()
        return on if on is not None and on.adapter is self else None

    @contextmanager
    def on_rows(self, start: int, end: int) -> Iterator[None]:
        """Make rows start..end-1 of this thread's forward passes SATs, within this block."""
        before = _CURRENT.set(_Pass(self, slice(start, end)) if end > start else None)
        try:
            yield
        finally:
            _CURRENT.reset(before)

    def save(self, directory: str | Path) -> None:
        """Write both files; each appears whole or not at all.

        A pair of which only one was replaced is refused by `load`. Raises OSError where they can't
        be written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().cpu().contiguous() for name, p in self.state_dict().items()}
        content = tensors_to_bytes(compacted(weights), metadata={"format": "pt"})
        self.config = replace(self.config, weights_sha256=hashlib.sha256(content).hexdigest())
        config = {"format": FORMAT, "format_version": 2, "base_model": self.config.base_model}
        config |= {"sat_token_id": self.config.sat.token_id, "k": self.config.sat.k}
        config |= {
            "rank": self.config.rank,
            "scale": self.config.scale,
            "targets": list(self.config.targets),
        }
        config |= {"head": self.config.head, "draft_vocabulary": self.config.draft_vocabulary}
        config |= {"everywhere": self.config.everywhere}
        config |= {"weights_sha256": self.config.weights_sha256}
        config |= {"base_sample": self.config.base_sample, "training": self.config.training}
        # The config comes last: until it is there, the hash in the one before tells that these
        # weights are not its own.
        files = {WEIGHTS_FILE: content, CONFIG_FILE: (json.dumps(config, indent=1) + "\n").encode()}
        parts = {directory / name: directory / f"{name}.part" for name in files}
        try:
            for part, data in zip(parts.values(), files.values(), strict=True):
                part.write_bytes(data)
            for file, part in parts.items():
                part.replace(file)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)


class _Update:
    """The forward hook that adds an adapter's update to the SAT rows of one layer.

    A copy of it belongs to the copied adapter.
    """

    def __init__(self, adapter: SatAdapter, key: str):
        self.adapter = adapter
        self.key = key

    def __call__(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        adapter = self.adapter
        on = adapter._current()
        if on is None:
            return None
        if self.key in adapter._fused:
            group, index = adapter._fused[self.key]
            output[:, on.rows].add_(group.update(inputs[0], on, index))
            return None
        x = inputs[0][:, on.rows]
        down = adapter.down[self.key]
        up = adapter.up[self.key]
        # Two dimensions and F.linear: on a CPU in bfloat16 a third of the time of `x @ down.T @
        # up.T` on three.
        update = linear(linear(x.flatten(0, 1), down.to(x)), up.to(x)).view(*x.shape[:2], -1)
        if adapter.config.scale != 1:
            update = adapter.config.scale * update
        if update.shape == output.shape:  # every row is a SAT, as in training: keep autograd simple
            return output + update
        output[:, on.rows].add_(update)
        return output


def _linear_of(layer: nn.Module) -> Any:
    """Find the linear layer that this is, or that it is a wrapper of: the first one in it.

    None where there is none.
    """
    return next((part for part in layer.modules() if isinstance(part, nn.Linear)), None)


def _plain_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Name a model's parameters as before they were moved.

    PEFT, or a parametrization of torch's, moves them.
    """
    moved = {".base_layer.": ".", ".parametrizations.weight.original": ".weight"}
    named = dict[str, Tensor]()
    for name, parameter in model.named_parameters():
        for longer, shorter in moved.items():
            name = name.replace(longer, shorter)
        named[name] = parameter
    return named


def read_config(directory: str | Path) -> AdapterConfig:
    """Read and check the `adapter_config.json` of an adapter directory.

    Raises InputError, one line, for anything odd in it.
    """
    where = f"adapter {directory}: {CONFIG_FILE}"
    try:
        raw = {**_SINCE, **json.loads((Path(directory) / CONFIG_FILE).read_text(encoding="utf-8"))}
        require(raw.get("format") == FORMAT, f"its format is not {FORMAT!r}")
        for key, kind in _KINDS.items():
            require(
                isinstance(raw[key], kind) and isinstance(raw[key], bool) == (kind is bool),
                f"{key}={raw[key]!r} is of the wrong kind",
            )
        require(raw["rank"] >= 1, f"rank={raw['rank']}: expected 1 or more")
        require(
            all(isinstance(name, str) for name in raw["targets"]),
            f"targets={raw['targets']}: expected names",
        )
        require(raw["head"] >= 0, f"head={raw['head']}: expected 0 (none) or a positive size")
        size = raw["draft_vocabulary"]
        require(size >= 0, f"draft_vocabulary={size}: expected 0 (all) or a number of tokens")
        for name, numbers in raw["base_sample"].items():
            require(
                len(numbers) == 8 and all(isinstance(n, (int, float)) for n in numbers),
                f"base_sample of {name} is damaged",
            )
        accuracy = raw["training"].get("accuracy_by_depth", [])
        require(
            isinstance(accuracy, list)
            and all(isinstance(n, (int, float)) and 0 <= n <= 1 for n in accuracy),
            f"accuracy_by_depth={accuracy}: expected numbers from 0 to 1",
        )
        require(math.isfinite(raw["scale"]), f"scale={raw['scale']}: expected a finite number")
        require(len(raw["base_sample"]) > 0, "base_sample is empty: expected numbers of the base")
        sat = SatConfig(raw["sat_token_id"], raw["k"])
        targets = tuple(raw["targets"])
        rest = {
            key: raw[key]
            for key in (
                "rank",
                "scale",
                "head",
                "draft_vocabulary",
                "everywhere",
                "base_sample",
                "training",
            )
        }
        weights_sha256 = raw["weights_sha256"] or None
        return AdapterConfig(
            raw["base_model"], sat, targets=targets, weights_sha256=weights_sha256, **rest
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where} cannot be read ({error!r})") from None


_KINDS: dict[str, Any] = {
    "base_model": str,
    "sat_token_id": int,
    "k": int,
    "rank": int,
    "scale": (int, float),
    "targets": list,
    "head": int,
    "draft_vocabulary": int,
    "everywhere": bool,
    "base_sample": dict,
    "training": dict,
    "weights_sha256": str,
}
# Keys that the first adapters do not have.
_SINCE: dict[str, Any] = {
    "head": 0,
    "draft_vocabulary": 0,
    "everywhere": False,
    "weights_sha256": "",
}


def _check_base(model: nn.Module, config: AdapterConfig, directory: str | Path) -> None:
    parameters = _plain_parameters(model)
    for name, numbers in config.base_sample.items():
        found = (
            parameters[name].detach().flatten()[:8].float().cpu() if name in parameters else None
        )
        if found is None or not torch.allclose(found, torch.tensor(numbers), rtol=0.02, atol=1e-4):
            raise InputError(
                f"adapter {directory}: made for base {config.base_model}, but this model's "
                f"{name} differs; load that base"
            )


def _read_weights(directory: Path, sha256: str | None) -> dict[str, Tensor]:
    """Read the tensors of an adapter directory.

    sha256: of those that its config was written with, None where it doesn't say. Raises InputError
    for others, and for a damaged file.
    """
    where = f"adapter {directory}: {WEIGHTS_FILE}"
    try:
        content = (directory / WEIGHTS_FILE).read_bytes()
        tensors = parse_tensors(content)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{where} is missing or damaged ({error})") from None
    require(
        sha256 in (None, hashlib.sha256(content).hexdigest()),
        (
            f"{where} is damaged, or not the one that {CONFIG_FILE} was written with; run "
            "the command that makes it again"
        ),
    )
    try:
        return restored(tensors)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check_sizes(config: AdapterConfig, weights: dict[str, Tensor], directory: str | Path) -> None:
    """Refuse sizes that are not the file's, before memory is taken for them.

    Raises InputError.
    """

    def rows(weight: Tensor) -> int:
        return weight.shape[0] if weight.dim() == 2 else 0

    ranks = {rows(weight) for name, weight in weights.items() if name.startswith("down.")}
    held = ", ".join(map(str, sorted(ranks))) or "0"
    require(
        ranks == {config.rank} or not config.targets,
        f"adapter {directory}: rank={config.rank}: its file holds updates of rank {held}",
    )
    size = rows(weights.get("head.inner", torch.empty(0)))
    require(
        config.head == size,
        f"adapter {directory}: head={config.head}: its file holds one of size {size}",
    )
    size = weights.get("draft_ids", torch.empty(0)).numel()
    require(
        config.draft_vocabulary == size,
        f"adapter {directory}: draft_vocabulary={config.draft_vocabulary}: its file holds {size} "
        "tokens",
    )


def _check_draft_ids(ids: Tensor | None, model: Any, name: str) -> None:
    """Refuse a draft vocabulary [C] that is not one of the model's.

    name: of the adapter. Raises InputError.
    """
    if ids is None:
        return
    size = model.get_output_embeddings().weight.shape[0]
    good = int(ids[0]) >= 0 and int(ids[-1]) < size and bool((ids.diff() > 0).all())
    outside = f"{name}: draft_ids: expected ascending tokens below {size}, the model's"
    require(good, f"{outside}; they go from {int(ids[0])} to {int(ids[-1])}")


@torch.no_grad()
def load(model: nn.Module, directory: str | Path) -> SatAdapter:
    """Read an adapter for `model`, in the model's dtype and device, not yet attached.

    Raises InputError for a base other than the adapter's, for tensors of the wrong name or shape,
    and for a damaged file.
    """
    config = read_config(directory)
    _check_base(model, config, directory)
    weights = _read_weights(Path(directory), config.weights_sha256)
    _check_sizes(config, weights, directory)
    try:
        adapter = SatAdapter(model, config, initial=False)
    except InputError as error:
        raise InputError(f"adapter {directory}: {error}") from None
    expected = adapter.state_dict()
    # Adapters of before stay as they were made: what they lack changes nothing until it is trained.
    weights = {name: expected[name] for name in GAINS if name in expected} | weights
    for name in sorted(expected.keys() ^ weights.keys()):
        raise InputError(
            f"adapter {directory}: tensor {name} is "
            f"{'missing' if name in expected else 'not expected'}"
        )
    for name, parameter in expected.items():
        require(
            bool(weights[name].isfinite().all()),
            f"adapter {directory}: {name} holds NaN or infinite numbers; expected finite ones",
        )
        shape = tuple(weights[name].shape)
        require(
            shape == tuple(parameter.shape),
            (
                f"adapter {directory}: {name} has shape {shape}, this base needs "
                f"{tuple(parameter.shape)}"
            ),
        )
        parameter.copy_(weights[name])
    _check_draft_ids(adapter.draft_ids, model, f"adapter {directory}")
    return adapter.requires_grad_(False)
