"""Where an output ends: stop ids, stop strings, length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from sdsat.config import DecodeConfig
from sdsat.decoding.sequence import Generation
from sdsat.models.loading import SatModel


def text_after(tokenizer: Any, before: int, tokens: list[int], skip_special: bool = True) -> str:
    """The text of `tokens` after the token `before`: alone, many tokenizers would drop a space at
    its beginning.
    """
    decode = partial(
        tokenizer.decode, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
    )
    return decode([before, *tokens])[len(decode([before])) :]


def _cut(
    model: SatModel, before: int, emitted: list[int], block: list[int], config: DecodeConfig
) -> tuple[int, str]:
    """Where the output ends inside `block`: (number of its tokens to keep, why), or (all, '') to go
    on.

    before: the prompt's last token.
    """
    stop_id = next((i for i, token in enumerate(block) if token in config.stop_ids), None)
    kept = len(block) if stop_id is None else stop_id + 1
    if config.stop_strings and _has_stop(model, before, emitted + block[:kept], config):
        first = next(
            n for n in range(1, kept + 1) if _has_stop(model, before, emitted + block[:n], config)
        )
        if stop_id is None or first < kept:
            return first, "stop_string"
    if stop_id is not None:
        return kept, "stop_id"
    return kept, "length" if len(emitted) + kept == config.max_new_tokens else ""


def _has_stop(model: SatModel, before: int, tokens: list[int], config: DecodeConfig) -> bool:
    text = text_after(model.tokenizer, before, tokens, skip_special=False)
    return any(stop in text for stop in config.stop_strings)


def _text(model: SatModel, before: int, out: Generation, config: DecodeConfig) -> str:
    text = text_after(model.tokenizer, before, out.token_ids) if model.tokenizer else ""
    return text[: end_of_text(text, config.stop_strings)]


def end_of_text(text: str, stop_strings: Sequence[str]) -> int:
    """Where an output's text ends: before the first of the stop strings in it, else behind it."""
    return min((text.find(stop) for stop in stop_strings if stop in text), default=len(text))
