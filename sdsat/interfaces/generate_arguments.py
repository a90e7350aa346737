"""What `generate` is given: what can't be honoured is refused, by name.

Checks come in the order of a call: what transformers would stumble over, the settings it has
prepared, then prompts and whether their caches fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdsat.config import is_real, is_whole, require, whole
from sdsat.decoding.sequence import num_slots
from sdsat.models.attention import sliding_window
from sdsat.models.devices import GIB, free_bytes
from sdsat.models.sat_model import SatModel

# Settings that plain decoding leaves at these values; others ask for another kind of decoding, or
# for what isn't kept.
ONLY = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "use_mtp": False,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "is_assistant": False,
    "use_cache": True,
    "prefill_chunk_size": None,
    "low_memory": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
_ELSEWHERE = ("offloaded", "quantized")  # caches that are kept elsewhere or otherwise than here
# What transformers hands over with every call, beside what the caller gave.
_PREPARED = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")


def refuse_arguments(kwargs: dict[str, Any], assistant_model: Any, streamer: Any) -> None:
    """Refuse what transformers would stumble over before it comes to `generate`.

    Raises InputError.

    Args:
        kwargs: of the call.
        assistant_model: the caller's, if any.
        streamer: the caller's, if any.
    """
    cache = kwargs.get("past_key_values")
    require(
        cache is None,
        f"past_key_values={type(cache).__name__}: sdsat.generate starts with a cache of its own; "
        "leave it out",
    )
    require(
        assistant_model is None,
        f"assistant_model={type(assistant_model).__name__}: sdsat.generate drafts by itself; "
        "leave it out",
    )
    streams = all(callable(getattr(streamer, name, None)) for name in ("put", "end"))
    require(
        streamer is None or streams,
        f"streamer={streamer!r}: expected an object with put and end, such as "
        "transformers' TextStreamer",
    )
    check_tokenizer(kwargs.get("tokenizer"))
    check_kinds(kwargs)


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is no tokenizer, with an InputError; None is none."""
    good = tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase)
    require(good, f"tokenizer={tokenizer!r}: expected a tokenizer of transformers")


def check_kinds(settings: dict[str, Any]) -> None:
    """Refuse settings of the wrong kind, with an InputError; those that are None are left out."""
    for name, (fits, expected) in _KINDS.items():
        value = settings.get(name)
        require(value is None or fits(value), f"{name}={_in_line(value)}: expected {expected}")


def _in_line(value: Any) -> str:
    """Write a value in one line, which may leave out its end."""
    line = " ".join(repr(value).split())
    return line if len(line) <= 80 else f"{line[:80]}.."


def _is_positive(value: Any) -> bool:
    return is_whole(value) and bool(value >= 1)


def _is_flag(value: Any) -> bool:
    return isinstance(value, (int, np.bool_))  # plain generate takes 0 and 1, too


def _are_ids(value: Any) -> bool:
    some = value if isinstance(value, (list, tuple)) else [value]
    return isinstance(value, Tensor) or (len(some) > 0 and all(map(is_whole, some)))


def _are_texts(value: Any) -> bool:
    some = value if isinstance(value, (list, tuple)) else [value]
    return len(some) > 0 and all(isinstance(text, str) and text != "" for text in some)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_table(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


# {setting: (what fits, what is expected)}, for those of which a wrong kind would be one of Python's
# own errors somewhere in transformers.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("max_new_tokens", "max_length", "num_return_sequences"),
        (_is_positive, "1 or more, a whole number"),
    ),
    **dict.fromkeys(
        (
            "min_new_tokens",
            "min_length",
            "no_repeat_ngram_size",
            "top_k",
            "pad_token_id",
            "bos_token_id",
        ),
        (is_whole, "a whole number"),
    ),
    **dict.fromkeys(
        (
            "temperature",
            "top_p",
            "min_p",
            "top_h",
            "typical_p",
            "epsilon_cutoff",
            "eta_cutoff",
            "repetition_penalty",
            "guidance_scale",
            "max_time",
        ),
        (is_real, "a number"),
    ),
    **dict.fromkeys(
        ("do_sample", "return_dict_in_generate", "output_scores", "output_logits"),
        (_is_flag, "True or False"),
    ),
    "input_ids": (_is_table, "token ids [B, L]"),
    **dict.fromkeys(("attention_mask", "position_ids", "inputs_embeds"), (_is_tensor, "a tensor")),
    "eos_token_id": (_are_ids, "a token id, or a list of them"),
    "stop_strings": (_are_texts, "a text, or a list of them, none empty"),
}


def refuse_settings(generation_config: Any) -> None:
    """Refuse settings that are not honoured, with an InputError."""
    for name, only in ONLY.items():
        value = getattr(generation_config, name, None)
        require(
            value is None or value == only,
            f"{name}={value}: sdsat.generate does not support it; expected {only}",
        )
    cache = generation_config.cache_implementation
    require(
        not str(cache).startswith(_ELSEWHERE),
        f"cache_implementation={cache}: sdsat.generate has a cache of its own; leave it out",
    )


def refuse_inputs(model_kwargs: dict[str, Any], criteria: Iterable[Any]) -> None:
    """Refuse inputs beside token ids and their mask, and criteria that are no functions.

    Raises InputError.
    """
    for step in criteria:
        require(callable(step), f"stopping_criteria: {step!r} in it; expected functions")
    for name, value in model_kwargs.items():
        known = name in _PREPARED or value is None or value is False
        require(
            known, f"{name}: sdsat.generate can't take it; expected input_ids and attention_mask"
        )


def refuse_without_room(
    sat: SatModel, num_return_sequences: int, rows: int, max_new_tokens: int, longest: int = 1
) -> None:
    """Refuse sequences whose caches are larger than the free memory, with an InputError.

    Args:
        sat: the model.
        num_return_sequences: for the message.
        rows: how many sequences.
        max_new_tokens: of each.
        longest: tokens of the longest prompt, at most.
    """
    config = sat.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    position = 2 * config.num_hidden_layers * heads * dim * sat.dtype.itemsize
    needed = rows * num_slots(longest, max_new_tokens) * position
    free = sum(free_bytes(device) for device in sat.devices)
    argument = (
        f"num_return_sequences={num_return_sequences}" if num_return_sequences > 1 else "input_ids"
    )
    require(
        needed <= free,
        f"{argument}: {rows} sequences of up to {longest + max_new_tokens} tokens need "
        f"{needed / GIB:.1f} GiB of cache, and "
        f"{free / GIB:.1f} are free; expected fewer sequences, or a smaller max_new_tokens",
    )


def prompts_of(sat: SatModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> list[list[int]]:
    """Strip from the prompts [B, L] what the attention mask leaves out.

    That is padding on the left and, where transformers has made the mask, padding tokens anywhere.
    Positions count what is left, so the model never knows of the rest. Raises InputError for ids, a
    mask or positions that are not of that form.
    """
    whole_ids = (
        input_ids.dim() == 2 and not input_ids.is_floating_point() and input_ids.dtype != torch.bool
    )
    require(
        whole_ids,
        (
            f"input_ids: {input_ids.dtype} {list(input_ids.shape)}; expected token ids [B, L], "
            "whole numbers"
        ),
    )
    require(
        len(input_ids) > 0,
        f"input_ids: of shape {list(input_ids.shape)}; expected one prompt or more",
    )
    require(input_ids.shape[1] > 0, "input_ids: no tokens; expected at least one in every prompt")
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device).long()
    good = mask.shape == input_ids.shape and bool(((mask == 0) | (mask == 1)).all())
    require(
        good,
        (
            f"attention_mask: {list(mask.shape)}; expected 0 or 1 for each of "
            f"{list(input_ids.shape)} tokens"
        ),
    )
    empty = [row for row, seen in enumerate(mask.tolist()) if not any(seen)]
    require(
        not empty,
        (
            f"attention_mask: prompt {empty and empty[0]} (from 0) has no tokens; expected at "
            "least one"
        ),
    )
    require(
        bool(mask[:, -1].all()),
        "attention_mask: it leaves out a prompt's last token; expected padding_side='left'",
    )
    left = bool((mask.diff(dim=-1) >= 0).all())
    require(
        left or sliding_window(sat.config) is None,
        "attention_mask: it leaves out tokens inside a prompt, which the sliding window "
        f"of {sat.name} counts; expected padding "
        "on the left alone, and a mask where a prompt holds pad_token_id",
    )
    positions = model_kwargs.get("position_ids")
    counted = mask.cumsum(-1) - 1
    require(
        positions is None or bool(((positions.to(mask.device) == counted) | (mask == 0)).all()),
        "position_ids: expected every prompt to count from 0; leave them out",
    )
    return [ids[seen == 1].tolist() for ids, seen in zip(input_ids, mask, strict=True)]


def seed_of(seed: int | None, generator: torch.Generator | None, sample: bool) -> int:
    """Choose the seed of a call; without sampling it is of no account.

    Args:
        seed: the caller's, if any.
        generator: in place of a seed; without either it is drawn from torch's global one.
        sample: whether tokens are sampled.

    Raises:
        InputError: for what is none of these, and for both.
    """
    seed = None if seed is None else whole("seed", seed, "a whole number")
    good = generator is None or isinstance(generator, torch.Generator)
    require(good, f"generator={generator!r}: expected a torch.Generator")
    require(seed is None or generator is None, f"seed={seed}: expected it or a generator, not both")
    if seed is not None or not sample:
        return seed or 0
    return int(
        torch.randint(
            2**63 - 1, (), generator=generator, device=generator.device if generator else "cpu"
        )
    )
