"""The model that is decoded: a causal LM, its tokenizer, its SAT and maybe its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdsat.config import InputError, SatConfig, require
from sdsat.models import attention
from sdsat.models.adapter import SatAdapter
from sdsat.models.blocks import BlockLinear
from sdsat.models.dtypes import GGUF, INT8, check_dtype_of
from sdsat.models.head import DraftHead
from sdsat.models.int8 import Int8Linear
from sdsat.models.mapped import MappedWeights
from sdsat.models.packed import in_use


@dataclass
class SatModel:
    """A causal LM with what it takes to draft: its SAT settings and, in adapter mode, the adapter.

    Everything that runs passes takes a `SatModel` and keeps its own state elsewhere (sdsat/engines,
    sdsat/decoding).

    Attributes:
        lm: transformers' model; its attention is `attention.NAME`.
        tokenizer: None where there is none.
        name: for messages and results.
        sat: None for a plain model, which decodes without SATs only.
        adapter: None for a checkpoint that has its SAT itself, and for a plain model.
        mapped: the files that its weights are views of; None where they are in memory.
    """

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    sat: SatConfig | None = None
    adapter: SatAdapter | None = None
    mapped: MappedWeights | None = None

    def follow(self) -> None:
        """Take the LM as it is now: its dtype, its devices and its layers may have changed.

        Raises InputError, one line, where SATs can't be drafted with it any more.
        """
        check_dtype_of(self.lm, self.name)
        self.lm.set_attn_implementation(attention.NAME)
        for part in self.lm.modules():
            if isinstance(part, BlockLinear):
                part.follow()
        if self.adapter is not None:
            self.adapter.follow(self.lm)
        self.sat = self.place_of_sat()

    def place_of_sat(self) -> SatConfig | None:
        """Find the model's SAT, at an id that no token of a tokenizer has.

        That of an adapter has no row in the embedding, so its id is the first one behind all rows,
        however many tokens have been added. Raises InputError for one behind a checkpoint's rows.
        """
        if self.adapter is not None:
            first_free = max(self.vocabulary, self.lm.config.vocab_size)
            return replace(self.adapter.config.sat, token_id=first_free)
        if self.sat is not None:
            largest = max(self.sat.token_id, *self.sat.deeper, 0)
            require(
                largest < self.vocabulary,
                f"sat_token_id={largest}: the model's vocabulary ends at {self.vocabulary - 1}",
            )
        return self.sat

    @property
    def config(self) -> Any:
        """The configuration that transformers has of the LM."""
        return self.lm.config

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        return self.lm.get_input_embeddings().weight.shape[0]

    @property
    def num_layers(self) -> int:
        """Decoder layers, each of which has keys and values of its own."""
        return self.lm.config.num_hidden_layers

    @property
    def max_context(self) -> int:
        """Positions that the model can take."""
        return getattr(self.lm.config, "max_position_embeddings", None) or 2**31

    @property
    def device(self) -> torch.device:
        """Where inputs and logits are."""
        return self.lm.get_input_embeddings().weight.device

    @property
    def devices(self) -> list[torch.device]:
        """Every device that holds weights, `device` first."""
        places = [self.device, *(parameter.device for parameter in self.lm.parameters())]
        return list(dict.fromkeys(places))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of embeddings, states, keys, values and logits; as a rule of all weights."""
        return self.lm.get_input_embeddings().weight.dtype

    @property
    def dtype_name(self) -> str:
        """The name of the dtype that the model was loaded in, as `models.loading.load` takes it."""
        kinds = set(map(type, self.lm.modules()))
        if BlockLinear in kinds:
            return GGUF
        return INT8 if Int8Linear in kinds else str(self.dtype).removeprefix("torch.")

    @property
    def head(self) -> DraftHead | None:
        """The adapter's draft head, None where there is none."""
        return self.adapter.head if self.adapter else None

    @property
    def draft_ids(self) -> Tensor | None:
        """The tokens [C] that SATs may guess, beside those of the text so far; None: all."""
        return self.adapter.draft_ids if self.adapter else None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids of the model's generation config."""
        eos = self.lm.generation_config.eos_token_id
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, list) else (eos,)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed token ids [1, S] -> [1, S, D].

        The SAT's id takes the adapter's embedding, scaled as all (Gemma).
        """
        embeddings = self.lm.get_input_embeddings()
        if self.adapter is None or self.sat is None:
            return embeddings(tokens)
        is_sat = tokens == self.sat.token_id
        plain = embeddings(tokens.masked_fill(is_sat, 0))
        own = self.adapter.sat_embedding.to(plain.dtype) * getattr(embeddings, "embed_scale", 1)
        return torch.where(is_sat[..., None], own, plain)

    def embed_standard(self, tokens: Tensor) -> Tensor:
        """Embed ids of standard tokens [...] -> [..., D]."""
        return self.lm.get_input_embeddings()(tokens)

    def output_rows(self, ids: Tensor) -> Tensor:
        """Take the output layer's rows of token ids: [...] -> [..., D]."""
        # several times as fast as by an index
        return embedding(ids, self.lm.get_output_embeddings().weight)

    def mask(self, attend: Tensor, rows: Tensor, columns: Tensor) -> Tensor | dict[str, Tensor]:
        """Make a pass's bool mask in the form that every layer's attention uses as it is.

        Arguments as of `attention.layer_masks`.
        """
        config = self.lm.config
        heads = config.num_attention_heads
        groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
        masks = attention.layer_masks(config, attend, rows, columns)
        if isinstance(masks, dict):
            folded = attention.folded_mask
            return {kind: folded(mask, groups, self.dtype) for kind, mask in masks.items()}
        return attention.folded_mask(masks, groups, self.dtype)

    def states(
        self,
        embeddings: Tensor,
        mask: Tensor | dict[str, Tensor],
        positions: Tensor,
        cache: Any,
        **inputs: Any,
    ) -> Tensor:
        """Run a pass through the decoder layers as transformers has them.

        Args:
            embeddings: [B, S, D].
            mask: of `mask`.
            positions: [B|1, S].
            cache: transformers' cache, which keeps the rows' keys and values.
            inputs: further ones for the attention function.

        Returns:
            [B, S, D] last hidden states.
        """
        return self.lm.base_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            **inputs,
        ).last_hidden_state

    def logits(self, states: Tensor) -> Tensor:
        """Compute logits [..., V] of last hidden states [..., D] as the model's forward does."""
        with in_use():
            return self._capped(self.lm.get_output_embeddings()(states))

    def logits_of(self, states: Tensor, ids: Tensor) -> Tensor:
        """Compute logits [N, C] of last hidden states [N, D], of the tokens ids [C] alone."""
        head = self.lm.get_output_embeddings()
        bias = None if head.bias is None else head.bias[ids]
        return self._capped(linear(states, self.output_rows(ids), bias))

    def _capped(self, logits: Tensor) -> Tensor:
        cap = getattr(self.lm.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def legal(self, logits: Tensor) -> Tensor:
        """Mask SATs in the vocabulary, which are never chosen: logits [..., V] change in place."""
        sats = (self.sat.token_id, *self.sat.deeper) if self.sat is not None else ()
        for token_id in sats:
            if token_id < logits.shape[-1]:
                logits[..., token_id] = float("-inf")
        return logits

    def sat_rows(self, start: int, end: int) -> AbstractContextManager[None]:
        """Make rows start..end-1 of a pass SATs, within this context."""
        return self.adapter.on_rows(start, end) if self.adapter else nullcontext()

    @contextmanager
    def detached(self, attention_name: str) -> Iterator[None]:
        """Take the adapter from the LM within this block, and give it transformers' attention.

        attention_name: which of transformers' attentions.
        """
        if self.adapter is not None:
            self.adapter.detach()
        self.lm.set_attn_implementation(attention_name)
        try:
            yield
        finally:
            self.lm.set_attn_implementation(attention.NAME)
            if self.adapter is not None:
                self.adapter.attach(self.lm)

    def check_finite(self, largest: float) -> None:
        """Refuse a pass whose logits are NaN or infinite.

        largest: `max()` of its logits, NaN where one is. Raises InputError, with the reason.
        """
        if largest < torch.inf:
            return
        weights = self.lm.named_parameters()
        broken = next((name for name, part in weights if not part.isfinite().all()), None)
        if broken is None:
            raise InputError(
                f"model {self.name}: a pass gave NaN or infinite logits, though all weights are "
                f"finite: its numbers don't fit in {self.dtype_name}; expected another dtype, as "
                "a rule bfloat16 or float32"
            )
        raise InputError(
            f"model {self.name}: the weight {broken} holds NaN or infinite numbers; expected "
            "finite ones"
        )
