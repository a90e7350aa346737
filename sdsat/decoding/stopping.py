"""Where an output ends: stop ids, stop strings, length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from sdsat.config import DecodeConfig

# Why an output ended; 'chooser' where a `Chooser` ended it, 'caller' where `on_tokens` did.
Finish = Literal["stop_id", "stop_string", "length", "chooser", "caller"]


def text_after(tokenizer: Any, before: int, tokens: list[int], skip_special: bool = True) -> str:
    """Decode `tokens` as they stand after the token `before`.

    Alone, many tokenizers would drop a space at their beginning.

    Args:
        tokenizer: transformers' one.
        before: the token before.
        tokens: to decode.
        skip_special: whether special tokens are left out.
    """
    decode = partial(
        tokenizer.decode, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
    )
    return decode([before, *tokens])[len(decode([before])) :]


def cut(
    tokenizer: Any, before: int, emitted: list[int], block: list[int], config: DecodeConfig
) -> tuple[int, Finish | None]:
    """Find where the output ends inside `block`.

    Args:
        tokenizer: for stop strings.
        before: the prompt's last token.
        emitted: the output's tokens before `block`.
        block: new tokens.
        config: stop ids, stop strings and length.

    Returns:
        How many tokens of the block belong to the output, and why it ends, None if it goes on.
    """
    stop_id = next((i for i, token in enumerate(block) if token in config.stop_ids), None)
    kept = len(block) if stop_id is None else stop_id + 1
    if config.stop_strings:

        def has_stop(count: int) -> bool:
            text = text_after(tokenizer, before, emitted + block[:count], skip_special=False)
            return any(stop in text for stop in config.stop_strings)

        if has_stop(kept):
            first = next(count for count in range(1, kept + 1) if has_stop(count))
            if stop_id is None or first < kept:
                return first, "stop_string"
    if stop_id is not None:
        return kept, "stop_id"
    return kept, "length" if len(emitted) + kept == config.max_new_tokens else None


def text_of(tokenizer: Any, before: int, token_ids: list[int], stop_strings: Sequence[str]) -> str:
    """Decode an output after the token `before`, cut before a stop string.

    Args:
        tokenizer: None gives ''.
        before: the prompt's last token.
        token_ids: of the output.
        stop_strings: as of DecodeConfig.
    """
    text = text_after(tokenizer, before, token_ids) if tokenizer else ""
    return text[: end_of_text(text, stop_strings)]


def end_of_text(text: str, stop_strings: Sequence[str]) -> int:
    """Find where an output's text ends, in characters.

    It ends before the first of the stop strings in it, else behind it.
    """
    return min((text.find(stop) for stop in stop_strings if stop in text), default=len(text))
