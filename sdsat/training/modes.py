"""What training changes: an adapter on a frozen base, or (the paper's way) all its weights.

A mode owns the weights that train, and says what a batch's loss is, how to store them on the way,
and how to save the result.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from sdsat.config import DRAFT_VOCABULARY, SatConfig, TrainConfig, require
from sdsat.method.vocabulary import most_used
from sdsat.models.adapter import AdapterConfig, SatAdapter, sample_weights
from sdsat.models.adapter import load as load_adapter
from sdsat.models.packed import PackedLinears, can_pack, in_use
from sdsat.models.sat_model import SatModel
from sdsat.training.evaluate import evaluate, standard_loss
from sdsat.training.loss import SatBatch, joint_logits, joint_loss, predict, sat_loss
from sdsat.training.shards import TrainingExample

GAIN_RATE = 50.0  # how much faster than matrices a draft head's few single numbers learn


class Mode(Protocol):
    """The training loop's view of what trains.

    Attributes:
        optimizer: torch's, of the weights that train.
    """

    optimizer: Any

    def parameters(self) -> Iterator[nn.Parameter]:
        """List the weights that train."""

    def weight(self, batch: SatBatch) -> float:
        """Compute this batch's part of what the summed losses of a step are divided by."""

    def loss(self, batch: SatBatch) -> Tensor:
        """Sum the weighted loss of a batch."""

    def evaluate(self, held_out: list[TrainingExample]) -> dict[str, Any]:
        """Compute the figures of a log entry.

        They are draft quality on held-out answers, and what else this mode may change. Raises
        InputError for figures that are not finite.
        """

    def average_gradients(self) -> None:
        """Leave the mean over all processes in every `.grad`."""

    def before_update(self, step: int) -> None:
        """Hold back what does not train yet."""

    def store(self, folder: Path) -> None:
        """Write weights and optimiser into `folder`."""

    def restore(self, folder: Path) -> None:
        """Read what `store` has written."""

    def save(self, out: Path, training: dict[str, Any]) -> None:
        """Write the result, which `sdsat.load(out)` takes."""


class AdapterMode:
    """SAT embedding and gated low-rank updates in float32; the base stays as it is, to the bit.

    Raises InputError for a model that has SATs already, and for an adapter to start from that is of
    another kind.
    """

    everywhere = False

    def __init__(
        self,
        model: SatModel,
        config: TrainConfig,
        accelerator: Accelerator,
        data: Sequence[TrainingExample],
    ):
        require(
            model.sat is None,
            f"model={model.name}: expected a plain base model, this one already has SATs",
        )
        self.config = config
        vocabulary = model.vocabulary
        sat = SatConfig(vocabulary, config.k)
        targets = tuple(name.strip() for name in config.targets.split(","))
        sample = sample_weights(model.lm)
        # So that it is found from any folder.
        base = str(Path(model.name).resolve()) if Path(model.name).exists() else model.name
        head = 0 if self.everywhere else config.head
        start = None if config.init is None else load_adapter(model.lm, config.init)
        draft_ids = None if self.everywhere else _draft_ids(start, vocabulary, config, data)
        settings = AdapterConfig(
            base,
            sat,
            config.rank,
            targets=targets,
            head=head,
            draft_vocabulary=0 if draft_ids is None else len(draft_ids),
            everywhere=self.everywhere,
            base_sample=sample,
        )
        torch.manual_seed(config.seed)
        self.adapter = SatAdapter(model.lm, settings).float()
        if start is not None:
            self._start_from(start)
        if draft_ids is not None:
            self.adapter.draft_ids = draft_ids.to(model.device)
        if can_pack(model.device, model.dtype):  # the frozen base alone is read so
            PackedLinears(model.lm).attach()
        self.adapter.attach(model.lm)
        self.model = replace(model, sat=sat, adapter=self.adapter)
        self.accelerator = accelerator
        head_of = self.adapter.head
        gains = [head_of.copies, head_of.sharpness] if head_of is not None else []
        self.optimizer: Any = adam(self.adapter.parameters(), config, gains)

    def _start_from(self, start: SatAdapter) -> None:
        """Take over the weights of another adapter; raises InputError for one that doesn't fit."""
        own = self.adapter.config
        other = start.config
        name = f"init={self.config.init}"
        require(other.rank == own.rank, f"{name}: its rank is {other.rank}, expected {own.rank}")
        require(
            (other.targets, other.scale) == (own.targets, own.scale),
            f"{name}: has targets and scale of its own; expected {own.targets}, {own.scale}",
        )
        known = sorted({0, own.head})  # without a head, a new one is added
        require(
            self.everywhere or other.head in known,
            f"{name}: its head is {other.head}, expected {' or '.join(map(str, known))}",
        )
        held = self.adapter.state_dict()
        taken = {key: value for key, value in start.state_dict().items() if key in held}
        self.adapter.load_state_dict(held | taken)

    def parameters(self) -> Iterator[nn.Parameter]:
        """See Mode.parameters."""
        return self.adapter.parameters()

    def weight(self, batch: SatBatch) -> float:
        """See Mode.weight."""
        return batch.weights(self.config.decay).sum().item()

    def loss(self, batch: SatBatch) -> Tensor:
        """See Mode.loss."""
        return sat_loss(self.model, batch, self.config.soft, self.config.decay)

    def evaluate(self, held_out: list[TrainingExample]) -> dict[str, Any]:
        """See Mode.evaluate."""
        return evaluate(partial(predict, self.model), held_out, self.config.k, self.model.device)

    def average_gradients(self) -> None:
        """See Mode.average_gradients."""
        for parameter in self.adapter.parameters():
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def before_update(self, step: int) -> None:
        """See Mode.before_update; here all trains at once."""

    def store(self, folder: Path) -> None:
        """See Mode.store."""
        if self.accelerator.is_main_process:
            content = {
                "adapter": self.adapter.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            torch.save(content, folder / "state.pt")

    def restore(self, folder: Path) -> None:
        """See Mode.restore; raises InputError for a checkpoint of another version's adapter."""
        saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        held = saved["adapter"].keys()
        require(
            held == self.adapter.state_dict().keys(),
            f"out={folder.parent}: {folder.name} is of another version of the adapter, without "
            f"{', '.join(sorted(self.adapter.state_dict().keys() - held))}; expected one of this "
            "version: save it with that version, and go on with --init",
        )
        self.adapter.load_state_dict(saved["adapter"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def save(self, out: Path, training: dict[str, Any]) -> None:
        """See Mode.save."""
        self.adapter.config = replace(self.adapter.config, training=training)
        if self.accelerator.is_main_process:
            self.adapter.save(out)
        self.adapter.detach()


class EverywhereMode(AdapterMode):
    """The same updates on every row of a draft pass, which a server can merge into a draft copy.

    They act on standard tokens' rows too. A server's draft model is one set of weights, so it can't
    tell SATs from standard tokens, as a gated adapter does. Its keys and values are its own, and so
    is its guess at the last true token: both learn here, as in full mode.
    """

    everywhere = True

    @cached_property
    def lm(self) -> _Updated:
        """The base with the update on every row."""
        return _Updated(self.model)

    @property
    def token_id(self) -> int:
        """The id of the SAT."""
        return self.adapter.config.sat.token_id

    def weight(self, batch: SatBatch) -> float:
        """See Mode.weight; standard tokens count too."""
        return super().weight(batch) + self.config.standard * batch.num_standard

    def loss(self, batch: SatBatch) -> Tensor:
        """See Mode.loss."""
        sats, standard = joint_loss(
            self.lm, self.token_id, batch, self.config.soft, self.config.decay
        )
        return sats + self.config.standard * standard

    def evaluate(self, held_out: list[TrainingExample]) -> dict[str, Any]:
        """See Mode.evaluate."""
        return _evaluate_jointly(self.lm, self.token_id, held_out, self.config.k, self.model.device)


class _Updated(nn.Module):
    """A base with its adapter's update on every row, called as a causal LM is."""

    def __init__(self, model: SatModel):
        super().__init__()
        self.model = model
        self.config = model.config

    @in_use()
    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        with self.model.sat_rows(0, input_ids.shape[1]):
            return self.model.lm(inputs_embeds=self.model.embed(input_ids), **inputs)


def _evaluate_jointly(
    lm: Callable[..., Any],
    token_id: int,
    held_out: list[TrainingExample],
    k: int,
    device: torch.device,
) -> dict[str, Any]:
    """Compute draft quality and standard tokens' loss of an LM that has both in one pass.

    Args:
        lm: a causal LM, as `joint_logits` takes it.
        token_id: of the SAT.
        held_out: prompts with their answers.
        k: depth of the drafts.
        device: on which batches are made.
    """
    drafts = evaluate(lambda batch: joint_logits(lm, token_id, batch)[0], held_out, k, device)
    return {**drafts, "standard_loss": standard_loss(lm, token_id, held_out, device)}


class FullMode:
    """All weights, on standard tokens and SATs alike (paper, section 3.1).

    The result is an ordinary HF checkpoint. The SAT is a new last row of the embedding, unless the
    model has one. Under FSDP or DDP the model is wrapped by accelerate; master weights are float32
    and passes run in bfloat16 where `accelerate launch --mixed_precision bf16` says so.

    Raises InputError for a model and settings that can't be trained so.
    """

    def __init__(
        self,
        model: SatModel,
        config: TrainConfig,
        accelerator: Accelerator,
        data: Sequence[TrainingExample],
    ):
        del data  # SATs guess among all tokens
        require(
            model.adapter is None,
            f"model={model.name}: an adapter; full mode expects a base or an SDSAT checkpoint",
        )
        require(config.init is None, f"init={config.init}: full mode starts from --model")
        sharded = accelerator.distributed_type == DistributedType.FSDP
        require(
            not (sharded and config.embedding_steps),
            f"embedding_steps={config.embedding_steps}: not under FSDP; expected 0",
        )
        require(
            model.dtype == torch.float32, f"dtype={model.dtype}: full mode trains float32 weights"
        )
        require(
            accelerator.mixed_precision in ("no", "bf16"),
            f"mixed_precision={accelerator.mixed_precision}: expected no or bf16",
        )
        lm = model.lm.requires_grad_(True).train()
        require(
            model.sat is None or not model.sat.deeper,
            f"model={model.name}: has a SAT for each depth; full mode trains one for all",
        )
        token_id = model.sat.token_id if model.sat else _new_token(lm)
        self.sat = SatConfig(token_id, config.k)
        if config.checkpointing:
            lm.gradient_checkpointing_enable()
        self.config = config
        self.accelerator = accelerator
        self.tokenizer = model.tokenizer
        self.optimizer: Any
        self.lm, self.optimizer = accelerator.prepare(lm, adam(lm.parameters(), config))

    def parameters(self) -> Iterator[nn.Parameter]:
        """See Mode.parameters."""
        return self.lm.parameters()

    def weight(self, batch: SatBatch) -> float:
        """See Mode.weight; standard tokens count too."""
        return (
            batch.weights(self.config.decay).sum().item()
            + self.config.standard * batch.num_standard
        )

    def loss(self, batch: SatBatch) -> Tensor:
        """See Mode.loss."""
        with self.accelerator.autocast():
            sats, standard = joint_loss(
                self.lm, self.sat.token_id, batch, self.config.soft, self.config.decay
            )
        return sats + self.config.standard * standard

    def evaluate(self, held_out: list[TrainingExample]) -> dict[str, Any]:
        """See Mode.evaluate."""
        with self.accelerator.autocast():
            return _evaluate_jointly(
                self.lm, self.sat.token_id, held_out, self.config.k, self.accelerator.device
            )

    def average_gradients(self) -> None:
        """See Mode.average_gradients; the wrapper has done it."""

    def before_update(self, step: int) -> None:
        """Train the SAT's embedding alone first, then everything: the two-stage variant."""
        if step >= self.config.embedding_steps:
            return
        embedding = self.accelerator.unwrap_model(self.lm).get_input_embeddings().weight
        for parameter in self.lm.parameters():
            if parameter is not embedding:
                parameter.grad = None
            elif parameter.grad is not None:
                row = parameter.grad[self.sat.token_id].clone()
                parameter.grad.zero_()[self.sat.token_id] = row

    def store(self, folder: Path) -> None:
        """See Mode.store."""
        self.accelerator.save_state(str(folder))

    def restore(self, folder: Path) -> None:
        """See Mode.restore."""
        self.accelerator.load_state(str(folder))

    def save(self, out: Path, training: dict[str, Any]) -> None:
        """See Mode.save."""
        lm = self.accelerator.unwrap_model(self.lm)
        lm.config.sdsat = {"sat_token_id": self.sat.token_id, "k": self.sat.k, "training": training}
        weights = {
            name: tensor.to(torch.bfloat16)
            for name, tensor in self.accelerator.get_state_dict(self.lm).items()
        }
        lm.config.dtype = torch.bfloat16
        part = out / "model.part"
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed while saving
        self.accelerator.wait_for_everyone()
        lm.save_pretrained(
            part, state_dict=weights, is_main_process=self.accelerator.is_main_process
        )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(part)
            _move_in(part, out, "config.json")


def _move_in(part: Path, out: Path, last: str) -> None:
    """Move all files of `part` to `out`.

    Without its file `last` a folder is no model: it never holds a mixture of two.
    """
    (out / last).unlink(missing_ok=True)
    for file in sorted(part.iterdir(), key=lambda file: file.name == last):
        if (out / file.name).is_dir():
            shutil.rmtree(out / file.name)
        file.replace(out / file.name)
    part.rmdir()


MODES: dict[str, Any] = {"adapter": AdapterMode, "everywhere": EverywhereMode, "full": FullMode}


def _draft_ids(
    start: SatAdapter | None, vocabulary: int, config: TrainConfig, data: Sequence[TrainingExample]
) -> Tensor | None:
    """Choose the tokens [C] that SATs may guess, None for all.

    Args:
        start: adapter to start from, whose draft vocabulary is kept; None where there is none.
        vocabulary: how many tokens there are.
        config: says how many tokens are wanted.
        data: whose tokens count.

    Raises:
        InputError: where another number is wanted than `start` has.
    """
    wanted = config.draft_vocabulary
    if start is not None and start.draft_ids is not None:
        held = len(start.draft_ids)
        message = f"draft_vocabulary={wanted}: {config.init} has one of {held} tokens"
        require(wanted in (None, held), message)
        return start.draft_ids
    size = DRAFT_VOCABULARY if wanted is None else wanted
    if size == 0 or size >= vocabulary:
        return None
    return most_used((sequence.ids for sequence in data), size)


def adam(
    parameters: Iterator[nn.Parameter], config: TrainConfig, gains: Sequence[nn.Parameter] = ()
) -> torch.optim.AdamW:
    """Make the optimiser of these weights.

    gains: those of them that are numbers of size 1, and learn GAIN_RATE times as fast.
    """
    fast = {id(gain) for gain in gains}
    groups = [{"params": [p for p in parameters if id(p) not in fast], "factor": 1.0}]
    groups += [{"params": list(gains), "factor": GAIN_RATE}] if gains else []
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def _new_token(lm: Any) -> int:
    """Append a row to the embedding (and to an untied head): the mean of the others.

    Returns its id.
    """
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    lm.resize_token_embeddings(vocabulary + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            layer.weight[-1] = layer.weight[:-1].mean(0)
    return vocabulary
