"""Serving export: what vLLM and TensorRT-LLM read for parallel drafting, and how to serve it.

vLLM's parallel drafting is PARD (arXiv 2504.18583). A server's draft pass is `[x, mask * (K - 1)]`:
SDSAT's, with K - 1 SATs, where the guess at x itself is the first of K drafts. It knows the mask by
its id, `pard_token` in the draft's config.json, and has one set of weights for all rows of the
pass. So

    full checkpoint     one directory is target and draft; the mask is its SAT
    everywhere adapter  the base is the target, untouched; the draft is a copy of it with the update
                        merged into the weights, and the SAT's embedding in the row of a token that
                        nothing uses
    gated adapter       refused: its update acts on SATs alone, merged weights on every row

Input and output embeddings are written separately: a mask has an input, but must never be an
output.
"""

from __future__ import annotations

import copy
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdsat.config import InputError, require
from sdsat.files import new_folder
from sdsat.models import adapter as adapters
from sdsat.models import loading
from sdsat.models.sat_model import SatModel

# vLLM takes a draft with one of these in its path for one of another method.
_TAKEN_NAMES = ("eagle-", "eagle3", "dflash", "dspark")
_SPARE_NAMES = ("reserved", "unused", "extra_id", "mask", "pad")


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        target: hub id or directory to serve.
        draft: directory of its draft.
        mask_token_id: by which the draft's SATs are known.
        k: drafts a pass (K).
    """

    target: str
    draft: Path
    mask_token_id: int
    k: int

    def speculative_config(self, tensor_parallel: int = 1) -> str:
        """Write the JSON of vLLM's --speculative-config.

        The draft is split over as many GPUs as the target: vLLM wants that.
        """
        settings: dict[str, Any] = {
            "model": str(self.draft),
            "method": "draft_model",
            "parallel_drafting": True,
        }
        settings["num_speculative_tokens"] = self.k
        if tensor_parallel > 1:
            settings["draft_tensor_parallel_size"] = tensor_parallel
        return json.dumps(settings)

    def vllm_command(self, tensor_parallel: int = 1, *options: str) -> str:
        """Write `vllm serve` as it is typed into a shell."""
        parallel = ["--tensor-parallel-size", str(tensor_parallel)] if tensor_parallel > 1 else []
        parts = ["vllm", "serve", self.target, *parallel, *options, "--speculative-config"]
        return shlex.join([*parts, self.speculative_config(tensor_parallel)])

    def commands(self, gpus: int = 8, nodes: int = 2) -> str:
        """Write the commands that serve it, one a line.

        They are for one machine, several GPUs, several nodes, and TensorRT-LLM.
        """
        ray = self.vllm_command(gpus * nodes, "--distributed-executor-backend", "ray")
        ids = f"max_draft_len={self.k}, mask_token_id={self.mask_token_id}"
        tensorrt = f"PARDDecodingConfig(speculative_model={str(self.draft)!r}, {ids})"
        return "\n".join(
            [
                "# one GPU",
                self.vllm_command(),
                "# a CPU (scripts/setup_vllm.sh)",
                "LD_PRELOAD=.venv-vllm/lib/libiomp5.so VLLM_CPU_KVCACHE_SPACE=2 "
                + self.vllm_command(1, "--dtype", "bfloat16"),
                f"# {gpus} GPUs of one machine",
                self.vllm_command(gpus),
                (
                    f"# {nodes} nodes of {gpus} GPUs, with the same paths on each: on the "
                    "first, and then on every other"
                ),
                "ray start --head --port=6379",
                "ray start --address=FIRST_NODE:6379",
                "# on the first again",
                ray,
                "# TensorRT-LLM",
                f"LLM({self.target!r}, speculative_config={tensorrt})",
            ]
        )


def export(name: str, out: Path, k: int | None = None, mask_token_id: int | None = None) -> Export:
    """Write the draft of an SDSAT checkpoint or an everywhere adapter, whole or not at all.

    The weights keep the dtype of the checkpoint or base.

    Args:
        name: of the checkpoint or adapter.
        out: a new directory.
        k: drafts a pass, 2 to the trained depth + 1, which is the default.
        mask_token_id: for an adapter, the token whose input embedding becomes the SAT's; by default
            one that nothing uses.

    Returns:
        What was written.

    Raises:
        InputError: in one line, for what can't be exported.
    """
    taken = [part for part in _TAKEN_NAMES if part in str(out.absolute()).lower()]
    require(
        not taken,
        (
            f"out={out}: vLLM takes a draft with {taken and taken[0]!r} in its path for "
            "another method; choose another"
        ),
    )
    require(not out.exists(), f"out={out}: exists already; choose a new directory")
    config = (
        adapters.read_config(loading.adapter_directory(name)) if loading.is_adapter(name) else None
    )
    require(config is None or config.everywhere, _gated(name))
    source = loading.load(config.base_model if config else name, "auto", "cpu")
    sat = config.sat if config else source.sat
    if sat is None:
        raise InputError(
            f"model={name}: has no SAT; expected an SDSAT checkpoint or an adapter of "
            "`sdsat train --mode everywhere`"
        )
    require(
        not sat.deeper,
        f"model={name}: has a SAT for each depth; servers draft with one mask token for all",
    )
    k = sat.k + 1 if k is None else k
    require(
        2 <= k <= sat.k + 1,
        (
            f"num_speculative_tokens={k}: expected 2 to {sat.k + 1}, the trained depth and the "
            "guess before it"
        ),
    )
    if config:
        mask = _spare_token(source) if mask_token_id is None else mask_token_id
        _check_mask(source, mask)
        draft = _merged(source, name, mask)
        _, target = loading.places(name)
    else:
        given = (
            f"mask_token_id={mask_token_id}: only for an adapter; {name} has its SAT, "
            f"{sat.token_id}"
        )
        require(mask_token_id is None, given)
        mask = sat.token_id
        target = str(out.absolute())
        draft = _full(source, sat.token_id)
    draft.config.pard_token = mask
    draft.config.sdsat = {"sat_token_id": mask, "k": sat.k}
    _write(draft, source, out)
    return Export(target, out.absolute(), mask, k)


def _gated(name: str) -> str:
    """Say why a gated adapter is refused."""
    return (
        f"model={name}: a gated adapter can't be merged: its update acts on SATs alone, "
        "and a server's weights act on every row "
        "of a draft pass, so that the last token and the keys and values of all others "
        "would change; "
        "expected an adapter of `sdsat train --mode everywhere`"
    )


def _spare_token(model: SatModel) -> int:
    """Find an id that no text becomes.

    It is a padding row of the embedding, else a special token without a part in chats. Text that
    holds such a special token all the same is drafted badly; the target, and so the output, does
    not change. Raises InputError where there is none.
    """
    vocabulary = model.vocabulary
    tokenizer = model.tokenizer
    assert tokenizer is not None
    if max(tokenizer.get_vocab().values()) < vocabulary - 1:
        return vocabulary - 1
    template = str(tokenizer.chat_template or "")
    used = _tokens_with_a_part(model)
    spare = [
        (any(part in token.content.lower() for part in _SPARE_NAMES), i)
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and i not in used and token.content not in template
    ]
    require(
        len(spare) > 0,
        (
            f"mask_token_id: {model.name} has no special token that nothing uses; name one "
            "that your text never has"
        ),
    )
    return max(spare)[1]


def _tokens_with_a_part(model: SatModel) -> set[int]:
    """Collect the ids that begin, end or pad texts."""
    tokenizer = model.tokenizer
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    return {i for name in names if (i := getattr(tokenizer, name, None)) is not None} | set(
        model.stop_ids
    )


def _check_mask(model: SatModel, mask: int) -> None:
    vocabulary = model.vocabulary
    require(
        0 <= mask < vocabulary,
        f"mask_token_id={mask}: expected an id of the vocabulary, 0 to {vocabulary - 1}",
    )
    require(
        mask not in _tokens_with_a_part(model),
        f"mask_token_id={mask}: begins, ends or pads texts; expected a token that nothing uses",
    )


@torch.no_grad()
def _merged(source: SatModel, directory: str, mask: int) -> Any:
    """Merge the adapter's update into the base's weights.

    The SAT's embedding goes into the mask's input row.
    """
    adapter = adapters.load(source.lm, directory)
    lm = source.lm
    # The output is copied before the input row changes: the two may be one tensor.
    output = lm.get_output_embeddings().weight.clone()
    layers = dict(lm.named_modules())
    for key, down in adapter.down.items():
        weight = layers[key.replace("/", ".")].weight
        update = adapter.config.scale * adapter.up[key].float() @ down.float()
        weight.copy_(weight.float() + update)  # rounded once
    lm.get_input_embeddings().weight[mask] = adapter.sat_embedding
    return _untied(lm, output)


@torch.no_grad()
def _full(source: SatModel, sat: int) -> Any:
    """Give the checkpoint's SAT an output that is never the likeliest.

    It is the mean of the others, and so is its logit.
    """
    output = source.lm.get_output_embeddings().weight.clone()
    others = torch.arange(output.shape[0]) != sat
    output[sat] = output[others].float().mean(0)
    return _untied(source.lm, output)


def _untied(lm: Any, output: torch.Tensor) -> Any:
    """Make `lm` with an output embedding of its own; it shares all other weights with it."""
    config = copy.deepcopy(lm.config)
    config.tie_word_embeddings = False
    config.dtype = output.dtype
    with torch.device("meta"):
        untied = type(lm)(config)
    weights = {**lm.state_dict(), "lm_head.weight": output}
    untied.load_state_dict(weights, assign=True)
    for parameter in untied.parameters():
        parameter.requires_grad_(False)
    untied.generation_config = lm.generation_config
    return untied


def _write(draft: nn.Module, source: SatModel, out: Path) -> None:
    """Write model and tokenizer, whole or not at all.

    Raises InputError where that is not possible.
    """
    with new_folder(out, "out") as part:
        draft.save_pretrained(part)  # type: ignore[operator]
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(part)
