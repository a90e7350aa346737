"""`sdsat generate` in a terminal: text as it is accepted, accepted drafts in colour, and a closing line of figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from . import model as models
from .config import DecodeConfig, InputError, require
from .decode import Generation, generate, text_after
from .prompts import encode_prompt, encode_request

ACCEPTED = "bold green"


class TokenStream:
    """Turns tokens into styled text: each call returns what the new tokens add.

    Bytes that do not make a whole character yet are held back until they do. before: the prompt's last token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: int):
        self.tokenizer, self.before = tokenizer, before
        self.tokens: list[int] = []
        self.text = ""

    def add(self, tokens: list[int], drafted: list[bool]) -> Text:
        shown = Text()
        for token, accepted in zip(tokens, drafted, strict=True):
            self.tokens.append(token)
            text = text_after(self.tokenizer, self.before, self.tokens)
            if not text.endswith("\ufffd"):
                shown.append(text[len(self.text) :], style=ACCEPTED if accepted else "")
                self.text = text
        return shown

    def rest(self) -> Text:
        """What was held back to the end."""
        return Text(text_after(self.tokenizer, self.before, self.tokens)[len(self.text) :])


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, style: str) -> list[int]:
    """Token ids of a prompt as a chat turn, as a request to complete code, or as it is."""
    if style == "code":
        return encode_prompt(tokenizer, prompt)
    return tokenizer(prompt)["input_ids"] if style == "raw" else encode_request(tokenizer, prompt)


def figures(out: Generation, k: int) -> str:
    """The closing line."""
    line = f"{out.num_new_tokens} tokens, {out.tokens_per_second:.1f} tokens/s, {out.tokens_per_pass:.2f} tokens per pass"
    if k:
        line += f", {out.accepted_per_loop:.2f} drafts accepted a verify pass ({out.acceptance_rate:.0%})"
        if 2 * out.num_plain_passes > out.num_passes:
            line += "; drafts do not pay here: mostly plain decoding"
    return line


def generate_in_terminal(
    prompt: str,
    name: str,
    style: str,
    k: int | None,
    decode: DecodeConfig,
    dtype: str,
    device: str,
    sat_token_id: int | None,
    trained_k: int | None,
    engine: str,
    compare: bool,
    svg: Path | None,
) -> None:
    """Stream the answer, then its figures; see `sdsat generate --help` for the arguments. k None: the trained k."""
    require(prompt != "", "prompt: empty; expected some text")
    model = models.load(name, dtype, device, sat_token_id, engine, trained_k=trained_k)
    assert model.tokenizer is not None
    if k is None:
        k = model.sat.k if model.sat else 0
    decode = replace(decode, k=k, stop_ids=model.stop_ids)
    prompt_ids = encode(model.tokenizer, prompt, style)
    generate(model, prompt_ids, replace(decode, max_new_tokens=min(8, decode.max_new_tokens)))  # warm-up, for fair figures
    stream, console = TokenStream(model.tokenizer, prompt_ids[-1]), Console(record=svg is not None, highlight=False)

    def show(tokens: list[int], drafted: list[bool]) -> None:
        console.print(stream.add(tokens, drafted), end="", soft_wrap=True)

    out = generate(model, prompt_ids, decode, show)
    console.print(stream.rest())
    console.print(Text(figures(out, k), style="dim"), soft_wrap=True)
    if compare:
        ar = generate(model, prompt_ids, replace(decode, k=0))
        same = "the same text" if ar.token_ids == out.token_ids else "another text"
        ratio = out.tokens_per_second / ar.tokens_per_second
        console.print(
            Text(f"AR: {ar.tokens_per_second:.1f} tokens/s, {same}; SDSAT was {ratio:.2f} times as fast", style="dim"),
            soft_wrap=True,
        )
    if svg is not None:
        try:
            console.save_svg(str(svg), title=f"sdsat generate: accepted drafts in green ({name}, k = {k})")
        except OSError as error:
            raise InputError(f"--svg={svg}: cannot be written ({error.strerror})") from None
