"""`sdsat generate` in a terminal: text as it is accepted, and a closing line of figures.

Accepted drafts are in colour; the text can be saved as a picture too, and beside AR as a race.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sdsat.config import DecodeConfig, require
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.sequence import Generation, OnTokens
from sdsat.decoding.stopping import end_of_text, text_after
from sdsat.engines.base import OnRead
from sdsat.environment import machine
from sdsat.files import replacing
from sdsat.interfaces.race import Lane, LanePass, race_svg
from sdsat.tasks.prompts import WARM_UP, encode_prompt, encode_request

ACCEPTED = "bold green"
LONG_PROMPT = 2000  # tokens to read, above which a bar shows how far it has come
Piece = tuple[str, bool]  # of a text, and whether it is of accepted drafts
_ACTING = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def plain(pieces: Sequence[Piece]) -> str:
    """Join pieces, every character as it is."""
    return "".join(text for text, _ in pieces)


def styled(pieces: Sequence[Piece]) -> Text:
    """Style pieces for a terminal, where a model's control characters must not act.

    Accepted drafts are green.
    """
    return Text.assemble(
        *((_ACTING.sub("\ufffd", text), ACCEPTED if drafted else "") for text, drafted in pieces)
    )


def write(pieces: Sequence[Piece]) -> None:
    """Write pieces to a stdout that is no terminal."""
    try:
        sys.stdout.write(plain(pieces))
        sys.stdout.flush()
    except BrokenPipeError:  # as of `sdsat chat | head`
        Console().on_broken_pipe()


class TokenStream:
    """What turns tokens into pieces of text, up to where `Generation.text` ends.

    Each call returns what the new tokens add. Held back until it is known: bytes that do not make a
    whole character yet, and what may become a stop string.

    before: the prompt's last token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: int, stop_strings: Sequence[str] = ()
    ):
        self.tokenizer = tokenizer
        self.before = before
        self.stop_strings = stop_strings
        self.tokens: list[int] = []
        # The text of all tokens, but for bytes at the end that make no character yet.
        self.text = ""
        # For each character of the text, whether it came with an accepted draft.
        self.drafted: list[bool] = []
        self.shown = 0  # characters of the text that were returned

    def add(self, tokens: list[int], drafted: list[bool]) -> list[Piece]:
        """Return what these tokens add to the text.

        drafted: for each token, whether it was an accepted draft.
        """
        for token, accepted in zip(tokens, drafted, strict=True):
            self.tokens.append(token)
            text = text_after(self.tokenizer, self.before, self.tokens)
            if not text.endswith("\ufffd"):
                self._take(text, accepted)
        return self._up_to(len(self.text) - self._begun(self.text))

    def rest(self) -> list[Piece]:
        """Return what was held back to the end."""
        self._take(text_after(self.tokenizer, self.before, self.tokens), False)
        return self._up_to(len(self.text))

    def _take(self, text: str, drafted: bool) -> None:
        self.drafted += [drafted] * (len(text) - len(self.text))
        self.text = text

    def _begun(self, text: str) -> int:
        """Count the characters at the end of `text` that are the beginning of a stop string."""
        sizes = (
            size
            for stop in self.stop_strings
            for size in range(1, len(stop))
            if text.endswith(stop[:size])
        )
        return max(sizes, default=0)

    def _up_to(self, end: int) -> list[Piece]:
        """Return the text from what was returned before to `end`, or to where the output ends."""
        end = min(end, end_of_text(self.text, self.stop_strings))
        runs = groupby(range(self.shown, end), key=self.drafted.__getitem__)
        new = [("".join(self.text[place] for place in places), drafted) for drafted, places in runs]
        self.shown = max(self.shown, end)
        return new


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, style: str, options: Sequence[str] = ()
) -> list[int]:
    """Encode a prompt as a chat turn, as a request to complete code, or as it is.

    Args:
        tokenizer: of the model.
        prompt: its text.
        style: 'chat', 'code' or 'raw'.
        options: see prompts.encode.

    Raises:
        InputError: for options without a chat turn, or that its template doesn't know.
    """
    if style == "raw":
        require(
            not options,
            f"template_option={' '.join(options)}: --as=raw has no chat turns; leave it out",
        )
        return tokenizer(prompt)["input_ids"]
    return (encode_prompt if style == "code" else encode_request)(tokenizer, prompt, options)


@dataclass(frozen=True)
class Step:
    """What one pass emitted.

    Attributes:
        seconds: since the beginning, when it was there; what showing took is left out.
        tokens: that it emitted.
        drafted: for each token, whether it was an accepted draft.
    """

    seconds: float
    tokens: list[int]
    drafted: list[bool]


@dataclass(frozen=True)
class Run:
    """A generation, and when its passes brought what: one step or more."""

    out: Generation
    steps: list[Step]

    @property
    def seconds(self) -> float:
        """Seconds of prefill and decoding."""
        return self.steps[-1].seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of prefill and decoding."""
        return self.out.num_new_tokens / self.seconds


class Recorder:
    """An `OnTokens` that writes down when each pass was there, from when it was made.

    show: called with what every pass emits; the clock stands still meanwhile.
    """

    def __init__(self, show: OnTokens | None = None):
        self.steps: list[Step] = []
        self._show = show
        self._began = time.perf_counter()

    def __call__(self, tokens: list[int], drafted: list[bool]) -> None:
        """Take what a pass emits."""
        now = time.perf_counter()
        self.steps.append(Step(now - self._began, tokens, drafted))
        if self._show is not None:
            self._show(tokens, drafted)
        self._began += time.perf_counter() - now


@contextmanager
def reading_bar() -> Iterator[OnRead]:
    """Give what shows how far a long prompt has been read: a bar on stderr, if that is a terminal.

    It goes when the prompt is read.
    """
    bar = None

    def on_read(count: int, total: int) -> None:
        nonlocal bar
        if bar is None and total > LONG_PROMPT:
            bar = tqdm(total=total, desc="reading", unit="token", disable=None, leave=False)
        if bar is not None:
            bar.update(count - bar.n)
            if count == total:
                bar.close()

    try:
        yield on_read
    finally:
        if bar is not None:
            bar.close()


def timed(
    decoder: Decoder, prompt_ids: list[int], decode: DecodeConfig, show: OnTokens | None = None
) -> Run:
    """Generate, and write down when each pass was there.

    Args:
        decoder: that generates.
        prompt_ids: tokens of the prompt.
        decode: how.
        show: see `Recorder`.

    Raises:
        InputError: as `Decoder.generate`.
    """
    recorder = Recorder(show)
    with reading_bar() as on_read:
        out = decoder.generate(prompt_ids, decode, recorder, on_read=on_read)
    return Run(out, recorder.steps)


def warm_up(decoder: Decoder, decode: DecodeConfig) -> None:
    """Have all measured and made that a first generation waits for.

    The prompt is another one: planners learn as they go. Raises InputError as `Decoder.generate`.
    """
    assert decoder.model.tokenizer is not None
    prompt_ids = encode_prompt(decoder.model.tokenizer, WARM_UP)
    decoder.generate(prompt_ids, replace(decode, max_new_tokens=min(8, decode.max_new_tokens)))


def figures(run: Run, depth: int) -> str:
    """Write the closing line. depth: how many drafts a pass may accept at most."""
    out = run.out
    line = (
        f"{out.num_new_tokens} tokens, {run.tokens_per_second:.1f} tokens/s, "
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


def _how(decode: DecodeConfig) -> str:
    """Say in a few words how a generation drafts."""
    parts = [decode.strategy] if decode.depth else ["no drafts"]
    parts += [f"k = {decode.k}"] if decode.k else []
    parts += [f"lookup {decode.num_lookup}"] if decode.num_lookup else []
    return ", ".join(parts)


def _lane(title: str, run: Run, remark: str, stream: TokenStream) -> Lane:
    """Make a side of the race.

    Args:
        title: of the side.
        run: what it shows.
        remark: what stands after its figures.
        stream: a fresh one.
    """
    added = [stream.add(step.tokens, step.drafted) for step in run.steps]
    added[-1] += stream.rest()
    passes = [
        LanePass(step.seconds, len(step.tokens), pieces)
        for step, pieces in zip(run.steps, added, strict=True)
    ]
    done = f"{run.out.num_new_tokens} tokens in {run.seconds:.2f} s"
    return Lane(title, f"{done}, {run.tokens_per_second:.0f} tokens/s{remark}", passes)


def generate_in_terminal(
    decoder: Decoder,
    prompt: str,
    decode: DecodeConfig,
    style: str = "chat",
    template_options: Sequence[str] = (),
    compare: bool = False,
    svg: Path | None = None,
) -> None:
    """Stream the answer, then its figures.

    Args:
        decoder: of a model with a tokenizer.
        prompt: what to continue or answer.
        decode: how; the model's own ends are added.
        style: 'chat', 'code' or 'raw': see `encode`.
        template_options: see prompts.encode.
        compare: also run AR, and say how much faster SDSAT was and whether the text is the same.
        svg: where to save a picture: the coloured text or, with `compare`, the race.

    Raises:
        InputError: where the prompt, the settings and the model do not fit together, and for a
            picture that can't be written.
    """
    require(prompt != "", "prompt: empty; expected some text")
    model = decoder.model
    assert model.tokenizer is not None
    decode = decoder.resolved(replace(decode, stop_ids=model.stop_ids))
    prompt_ids = encode(model.tokenizer, prompt, style, template_options)
    warm_up(decoder, decode)
    new_stream = partial(TokenStream, model.tokenizer, prompt_ids[-1], decode.stop_strings)
    stream = new_stream()
    console = Console(record=svg is not None, highlight=False)

    def show(pieces: list[Piece]) -> None:
        if console.is_terminal or console.record:
            console.print(styled(pieces), end="", soft_wrap=True)
        else:
            write(pieces)

    run = timed(decoder, prompt_ids, decode, lambda *step: show(stream.add(*step)))
    show([*stream.rest(), ("\n", False)])
    console.print(Text(figures(run, decode.depth), style="dim"), soft_wrap=True)
    if compare:
        ar = timed(decoder, prompt_ids, decode.plain)
        same = "the same text" if ar.out.token_ids == run.out.token_ids else "another text"
        ratio = f"{run.tokens_per_second / ar.tokens_per_second:.2f} times as fast"
        line = f"AR: {ar.tokens_per_second:.1f} tokens/s, {same}; SDSAT was {ratio}"
        console.print(Text(line, style="dim"), soft_wrap=True)
    if svg is None:
        return
    if compare:
        sides = (
            _lane("Plain decoding (AR)", ar, "", new_stream()),
            _lane(f"SDSAT: {_how(decode)}", run, f": {ratio}", new_stream()),
        )
        where = machine(model.devices, model.dtype_name, decoder.engine.name)["device_name"]
        picture = race_svg(sides, f"{model.name}, {model.dtype_name}, {where}: {same}")
    else:
        title = f"sdsat generate: accepted drafts in green ({model.name}, {_how(decode)})"
        picture = console.export_svg(title=title)
    with replacing(svg) as part:
        part.write_text(picture, encoding="utf-8")
