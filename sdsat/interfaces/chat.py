"""A conversation with a model: its turns, what they took, and the cache that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdsat.config import DecodeConfig, require
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.kept import KeptCache
from sdsat.decoding.stopping import Finish, text_after
from sdsat.engines.base import OnRead
from sdsat.interfaces.terminal import Piece, Recorder, Step, TokenStream
from sdsat.tasks.prompts import text_of_turns


class Stopped(Exception):
    """Raised by what an answer is shown to: the answer ends here."""


def system_turns(text: str) -> list[dict[str, str]]:
    """Make the turns before the user's first one: what the model is told, or for '' none."""
    return [{"role": "system", "content": text}] if text else []


@dataclass(frozen=True)
class Answer:
    """The answer of one turn.

    Attributes:
        text: as it was shown.
        num_prompt: tokens of the prompt, the conversation so far.
        num_kept: tokens of the prompt that were kept from the turn before, and not read.
        steps: what its passes emitted, from when the question was asked.
        finish: why it ended; None where it was stopped.
    """

    text: str
    num_prompt: int
    num_kept: int
    steps: list[Step]
    finish: Finish | None

    @property
    def num_new_tokens(self) -> int:
        """Tokens of the answer."""
        return sum(len(step.tokens) for step in self.steps)

    @property
    def num_drafted(self) -> int:
        """Tokens of the answer that were accepted drafts."""
        return sum(sum(step.drafted) for step in self.steps)

    @property
    def first_seconds(self) -> float:
        """Seconds until the first token was there."""
        return self.steps[0].seconds

    @property
    def seconds(self) -> float:
        """Seconds until the last token was there."""
        return self.steps[-1].seconds


class Conversation:
    """Turns of a user and a model.

    Each prompt is the whole conversation so far, as the model's chat template writes it. What it
    shares with the text of the turn before is not read again: the answers stay the same.

    Attributes:
        decoder: of a chat model.
        decode: how it answers. Turn i is sampled with the seed + i * 2**32.
        turns: role and content of each, as chat templates take them.
        answers: what the model's turns took.
    """

    def __init__(
        self,
        decoder: Decoder,
        decode: DecodeConfig,
        system: str = "",
        template_options: Sequence[str] = (),
    ):
        """Begin a conversation.

        Args:
            decoder: of a chat model.
            decode: how it answers; the model's own ends are added.
            system: what the model is told before the first turn; '' leaves that to the template.
            template_options: see prompts.encode.

        Raises:
            InputError: where the settings and the model do not fit together.
        """
        self.decoder = decoder
        self.decode = decoder.resolved(replace(decode, stop_ids=decoder.model.stop_ids))
        self._system = system
        self._options = template_options
        self.reset()

    def reset(self) -> None:
        """Begin anew: without any turns, and nothing kept."""
        self.turns = system_turns(self._system)
        self.answers: list[Answer] = []
        self._kept = KeptCache()
        self._so_far: tuple[str, list[int]] = ("", [])  # text, and its tokens as they were

    @property
    def context(self) -> int:
        """Tokens of the conversation after its last answer; 0 before the first one."""
        last = self.answers[-1:]
        return sum(answer.num_prompt + answer.num_new_tokens for answer in last)

    def ask(
        self, question: str, show: Callable[[list[Piece]], None], on_read: OnRead | None = None
    ) -> Answer | None:
        """Have the model answer.

        Args:
            question: the user's turn.
            show: called with the pieces of each pass. It may raise `Stopped`: the conversation goes
                on with what was shown.
            on_read: as of `Decoder.generate`; it may raise `Stopped`, too.

        Returns:
            The answer; None where it was stopped before it had begun: then nothing was asked.

        Raises:
            InputError: where the context is full.
        """
        model = self.decoder.model
        assert model.tokenizer is not None
        num_kept = 0

        def add(tokens: list[int], drafted: list[bool]) -> None:
            show(stream.add(tokens, drafted))

        def reading(count: int, total: int) -> None:
            nonlocal num_kept
            num_kept = len(prompt_ids) - 1 - total  # the last token is the first pass's
            if on_read is not None:
                on_read(count, total)

        recorder = Recorder(add)
        turns = [*self.turns, {"role": "user", "content": question}]
        prompt = text_of_turns(model.tokenizer, turns, self._options)
        prompt_ids = self._encode(prompt)
        stream = TokenStream(model.tokenizer, prompt_ids[-1], self.decode.stop_strings)
        finish: Finish | None = None
        try:
            finish = self.decoder.generate(
                prompt_ids, self._settings(len(prompt_ids)), recorder, None, self._kept, reading
            ).finish
            show(stream.rest())
        except Stopped:
            if not recorder.steps:
                return None
        text = stream.text[: stream.shown]
        self.turns = [*turns, {"role": "assistant", "content": text}]
        answer = Answer(text, len(prompt_ids), num_kept, recorder.steps, finish)
        self.answers.append(answer)
        self._so_far = self._written(prompt, prompt_ids, answer)
        return answer

    def _encode(self, prompt: str) -> list[int]:
        """Encode a prompt; of what it shares with the conversation so far, the tokens stay.

        Its own tokenizer may split an answer otherwise than the model wrote it: then the answer
        would have to be read.
        """
        tokenizer: Any = self.decoder.model.tokenizer
        text, tokens = self._so_far
        rest = prompt.removeprefix(text)
        if not prompt.startswith(text) or not rest.startswith(tuple(tokenizer.get_added_vocab())):
            rest, tokens = prompt, []  # where no special token parts them, both may belong to one
        return [*tokens, *tokenizer(rest, add_special_tokens=False)["input_ids"]]

    def _written(self, prompt: str, prompt_ids: list[int], answer: Answer) -> tuple[str, list[int]]:
        """Find the conversation's text up to an answer's end, and the tokens that it came with.

        There is none where the answer's tokens say more than its text, as a stop string.
        """
        tokens = [token for step in answer.steps for token in step.tokens]
        if tokens[-1] in self.decode.stop_ids:
            tokens.pop()
        text = text_after(self.decoder.model.tokenizer, prompt_ids[-1], tokens, skip_special=False)
        return (prompt + text, prompt_ids + tokens) if text == answer.text else ("", [])

    def _settings(self, num_prompt: int) -> DecodeConfig:
        """Fit the settings to what the context has left behind a prompt of so many tokens.

        Raises InputError where that is nothing.
        """
        model = self.decoder.model
        room = model.max_context - num_prompt
        require(
            room > 0,
            f"context: full, the conversation has {num_prompt} tokens with this question, and "
            f"{model.name} takes {model.max_context}; expected /reset, which begins a new one, or "
            "a shorter question",
        )
        sampling = self.decode.sampling
        return replace(
            self.decode,
            max_new_tokens=min(room, self.decode.max_new_tokens),
            sampling=replace(sampling, seed=sampling.seed + (len(self.answers) << 32)),
        )

    @property
    def is_full(self) -> bool:
        """Whether the last answer ended because the context did."""
        return self.context >= self.decoder.model.max_context

    def figures(self) -> list[str]:
        """Say in some lines what the last answer took, what all took, and how full the context is.

        Without an answer it is one line that says so.
        """
        if not self.answers:
            return ["no answer yet"]
        last = self.answers[-1]
        count = len(self.answers)
        tokens = sum(answer.num_new_tokens for answer in self.answers)
        seconds = sum(answer.seconds for answer in self.answers)
        drafted = sum(answer.num_drafted for answer in self.answers)
        return [
            f"answer {count}: {last.num_new_tokens} tokens, "
            f"{last.num_new_tokens / last.seconds:.1f} tokens/s, the first after "
            f"{last.first_seconds:.2f} s; {last.num_prompt} tokens of prompt, {last.num_kept} kept",
            f"all {count}: {tokens} tokens, {tokens / seconds:.1f} tokens/s, "
            f"{drafted / tokens:.0%} of them accepted drafts",
            f"context: {self.context} of {self.decoder.model.max_context} tokens",
        ]
