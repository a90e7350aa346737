"""`sdsat generate` in a terminal: text as it is accepted, accepted drafts in colour, and a closing
line of figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from sdsat.config import DecodeConfig, require
from sdsat.decoding.loop import generate, resolved
from sdsat.decoding.sequence import Generation
from sdsat.decoding.stopping import end_of_text, text_after
from sdsat.files import replacing
from sdsat.models.loading import SatModel
from sdsat.tasks.prompts import WARM_UP, encode_prompt, encode_request

ACCEPTED = "bold green"


class TokenStream:
    """Turns tokens into styled text: each call returns what the new tokens add, up to where
    `Generation.text` ends.

    Held back until it is known: bytes that do not make a whole character yet, and what may become a
    stop string.
    before: the prompt's last token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: int, stop_strings: Sequence[str] = ()
    ):
        self.tokenizer = tokenizer
        self.before = before
        self.stop_strings = stop_strings
        self.tokens: list[int] = []
        self.text = ""  # of all tokens, but for bytes at the end that make no character yet
        self.drafted: list[
            bool
        ] = []  # of each character of it, whether it came with an accepted draft
        self.shown = 0  # characters of it that were returned

    def add(self, tokens: list[int], drafted: list[bool]) -> Text:
        for token, accepted in zip(tokens, drafted, strict=True):
            self.tokens.append(token)
            text = text_after(self.tokenizer, self.before, self.tokens)
            if not text.endswith("\ufffd"):
                self._take(text, accepted)
        return self._up_to(len(self.text) - self._begun(self.text))

    def rest(self) -> Text:
        """What was held back to the end."""
        self._take(text_after(self.tokenizer, self.before, self.tokens), False)
        return self._up_to(len(self.text))

    def _take(self, text: str, drafted: bool) -> None:
        self.drafted += [drafted] * (len(text) - len(self.text))
        self.text = text

    def _begun(self, text: str) -> int:
        """How many characters at the end of `text` are the beginning of a stop string."""
        sizes = (
            size
            for stop in self.stop_strings
            for size in range(1, len(stop))
            if text.endswith(stop[:size])
        )
        return max(sizes, default=0)

    def _up_to(self, end: int) -> Text:
        """The text from what was returned before to `end`, or to where the output ends."""
        end = min(end, end_of_text(self.text, self.stop_strings))
        new = Text()
        for drafted, places in groupby(range(self.shown, end), key=self.drafted.__getitem__):
            new.append(
                "".join(self.text[place] for place in places), style=ACCEPTED if drafted else ""
            )
        self.shown = max(self.shown, end)
        return new


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, style: str, options: Sequence[str] = ()
) -> list[int]:
    """Token ids of a prompt as a chat turn, as a request to complete code, or as it is.

    options: see prompts.encode.
    """
    if style == "raw":
        require(
            not options,
            f"template_option={' '.join(options)}: --as=raw has no chat turns; leave it out",
        )
        return tokenizer(prompt)["input_ids"]
    return (encode_prompt if style == "code" else encode_request)(tokenizer, prompt, options)


def figures(out: Generation, depth: int) -> str:
    """The closing line. depth: how many drafts a pass may accept at most."""
    line = (
        f"{out.num_new_tokens} tokens, {out.tokens_per_second:.1f} tokens/s, "
        f"{out.tokens_per_pass:.2f} tokens per pass"
    )
    if depth:
        line += (
            f", {out.accepted_per_loop:.2f} drafts accepted a verify pass "
            f"({out.acceptance_rate:.0%})"
        )
        if 2 * out.num_plain_passes > out.num_passes:
            line += "; drafts do not pay here: mostly plain decoding"
    return line


def generate_in_terminal(
    model: SatModel,
    prompt: str,
    decode: DecodeConfig,
    style: str = "chat",
    template_options: Sequence[str] = (),
    compare: bool = False,
    svg: Path | None = None,
) -> None:
    """Stream the answer, then its figures.

    Args:
        model: one with a tokenizer.
        prompt: what to continue or answer.
        decode: how; the model's own ends are added.
        style: 'chat', 'code' or 'raw': see `encode`.
        template_options: see prompts.encode.
        compare: also run AR, and say whether the text is the same.
        svg: where to save the coloured text as a picture.

    Raises:
        InputError: where the prompt, the settings and the model do not fit together.
    """
    assert model.tokenizer is not None
    decode = resolved(model, replace(decode, stop_ids=model.stop_ids))
    prompt_ids = encode(model.tokenizer, prompt, style, template_options)
    warm_up = encode_prompt(model.tokenizer, WARM_UP)  # another prompt: planners learn as they go
    generate(model, warm_up, replace(decode, max_new_tokens=min(8, decode.max_new_tokens)))
    stream = TokenStream(model.tokenizer, prompt_ids[-1], decode.stop_strings)
    console = Console(record=svg is not None, highlight=False)

    def show(tokens: list[int], drafted: list[bool]) -> None:
        console.print(stream.add(tokens, drafted), end="", soft_wrap=True)

    out = generate(model, prompt_ids, decode, show)
    console.print(stream.rest())
    console.print(Text(figures(out, decode.depth), style="dim"), soft_wrap=True)
    if compare:
        ar = generate(model, prompt_ids, decode.plain)
        same = "the same text" if ar.token_ids == out.token_ids else "another text"
        ratio = out.tokens_per_second / ar.tokens_per_second
        line = (
            f"AR: {ar.tokens_per_second:.1f} tokens/s, {same}; SDSAT was {ratio:.2f} times as fast"
        )
        console.print(Text(line, style="dim"), soft_wrap=True)
    if svg is not None:
        how = f"{model.name}, {decode.strategy}, k = {decode.k}"
        with replacing(svg) as part:
            console.save_svg(str(part), title=f"sdsat generate: accepted drafts in green ({how})")
