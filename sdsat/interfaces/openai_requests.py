"""What of OpenAI's requests is served; all else is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Text = Annotated[str, Field(min_length=1)]
_Stop = Annotated[str, Field(min_length=1, max_length=128)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
_Several = Annotated[list[_Text | _Ids], Field(min_length=1, fail_fast=True)]
# Many clients send these, which ask for nothing.
_NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "logprobs": False,
    "echo": False, "best_of": 1, "store": False, "tools": [], "tool_choice": "none",
    "response_format": {"type": "text"},
}  # fmt: skip


def _is_neutral(name: str, value: Any) -> bool:
    neutral = _NEUTRAL.get(name)
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


class _Strict(BaseModel):
    """An object with these fields alone; null is as good as none."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _asking(cls, data: Any) -> Any:
        given = data.items() if isinstance(data, dict) else ()
        asks = {k: v for k, v in given if v is not None and not _is_neutral(k, v)}
        return asks if isinstance(data, dict) else data


class _StreamOptions(_Strict):
    include_usage: bool = False


class _Part(_Strict):
    type: Literal["text"]
    text: str


class _Turn(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        said = self.content
        return said if isinstance(said, str) else "".join(part.text for part in said)


class Asked(_Strict):
    """What both endpoints take; `top_k` is not OpenAI's, `user` is for the caller's records."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16, fail_fast=True)] = Field([])
    stream: bool = False
    stream_options: _StreamOptions | None = None
    user: str = ""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatAsked(Asked):
    """A conversation to answer."""

    messages: list[_Turn] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation as chat templates take it."""
        return [{"role": turn.role, "content": turn.text} for turn in self.messages]


class TextAsked(Asked):
    """Text, or token ids, to continue."""

    prompt: _Text | _Ids | _Several
