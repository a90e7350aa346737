"""`sdsat serve`: OpenAI's endpoints for one model on one machine.

uvicorn speaks HTTP, FastAPI checks requests, and answers have the form of the openai package's
types. What is asked enters the batch of served_batch.py between two passes.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from typing import Annotated, Any

import h11
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from openai.types import Completion
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST, Counter, generate_latest
from starlette import exceptions
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from sdsat.config import DecodeConfig, InputError, SamplingConfig, ServeConfig, require
from sdsat.decoding import sequence
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.sequence import Generation
from sdsat.interfaces.openai_requests import Asked, ChatAsked, TextAsked
from sdsat.interfaces.served_batch import Full, ServedBatch
from sdsat.interfaces.terminal import TokenStream, encode, plain
from sdsat.tasks.prompts import encode_turns

MAX_BODY = 2**20  # bytes
PATIENCE = 30  # seconds until a client must have sent its request, or read what it was sent
REFUSED = Counter("sdsat_refused_requests", "Requests without an answer.", ["status"])
Key = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


class Server:
    """The endpoints.

    Attributes:
        app: the application.
        decoder: of a model with a tokenizer.
        tokenizer: the model's.
        decode: how it drafts, and the length of an answer where a request says none.
        config: who may ask, and how much.
        options: of the chat template, see prompts.encode.
    """

    def __init__(
        self, decoder: Decoder, decode: DecodeConfig, config: ServeConfig, options: Sequence[str]
    ):
        self.decoder = decoder
        self.decode = decoder.resolved(replace(decode, stop_ids=decoder.model.stop_ids))
        self.config = replace(config, context=min(config.context, decoder.model.max_context))
        self.options = options
        self.tokenizer: Any = decoder.model.tokenizer
        self._numbers = count()
        self._batch = ServedBatch(decoder, self.config)
        errors = (InputError, RequestValidationError, exceptions.HTTPException, Exception)
        handlers: Any = dict.fromkeys(errors, _failed)
        self.app = app = FastAPI(
            title="sdsat", lifespan=self._lifespan, exception_handlers=handlers
        )
        app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY)
        app.get("/health")(_health)
        app.get("/metrics", response_class=Response)(_metrics)
        rest: Any = {"dependencies": [Depends(self._check_key)]}
        app.get("/v1/models", **rest)(self.models)
        refused = {"description": "Refused; the body says why."}
        rest["responses"] = {"4XX": refused, 200: {"content": {"text/event-stream": {}}}}
        app.post("/v1/chat/completions", response_model=ChatCompletion, **rest)(self.chat)
        app.post("/v1/completions", response_model=Completion, **rest)(self.complete)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(self._batch.run())
        yield
        task.cancel()

    async def _check_key(self, key: Key) -> None:
        wanted = (self.config.api_key or "").encode()
        given = key.credentials.encode() if key else b""
        if wanted and not secrets.compare_digest(given, wanted):
            raise HTTPException(401, "API key: missing or wrong", {"WWW-Authenticate": "Bearer"})

    async def models(self) -> dict[str, Any]:
        """List the model that is served."""
        own = {"id": self.decoder.model.name, "created": 0, "object": "model", "owned_by": "sdsat"}
        return {"object": "list", "data": [own]}

    async def chat(self, asked: ChatAsked) -> Response:
        """Answer a conversation.

        Raises InputError for settings that don't fit together or leave the context no room, and
        HTTPException for another model, and where the queue is full.
        """
        both = asked.max_completion_tokens and asked.max_tokens
        require(not both, "max_tokens: beside max_completion_tokens; expected one of them")
        asked.max_tokens = asked.max_completion_tokens or asked.max_tokens
        return await self._respond(
            asked, [asked.turns], lambda turns: encode_turns(self.tokenizer, turns, self.options)
        )

    async def complete(self, asked: TextAsked) -> Response:
        """Continue texts. Raises as `chat`."""
        given: Any = asked.prompt
        prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        return await self._respond(
            asked,
            prompts,
            lambda said: encode(self.tokenizer, said, "raw") if isinstance(said, str) else said,
        )

    def _requests(
        self, asked: Asked, prompts: list[Any], ids_of: Callable[[Any], list[int]]
    ) -> Iterator[sequence.Request]:
        """Make a checked request of every output; output i has a seed of its own."""
        most, context, outputs = self.config.queue, self.config.context, len(prompts) * asked.n
        require(outputs <= most, f"n: {outputs} outputs are asked for; expected at most {most}")
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        every = [ids_of(prompt) for prompt in prompts]
        for i in range(outputs):
            ids = every[i // asked.n]
            room = context - len(ids)
            said = f"a prompt of {len(ids)} tokens; with the answer, {context} are served"
            require(room > 0, f"{'messages' if isinstance(asked, ChatAsked) else 'prompt'}: {said}")
            require((asked.max_tokens or 1) <= room, f"max_tokens={asked.max_tokens}: {said}")
            length = asked.max_tokens or min(room, self.decode.max_new_tokens)
            drawn = (asked.temperature, asked.top_k, asked.top_p, seed + i * 2**32)
            sampled: Any = {"sampling": SamplingConfig(*drawn), "stop_strings": asked.stops}
            config = replace(self.decode, max_new_tokens=length, **sampled)
            yield self.decoder.request(next(self._numbers), ids, config)

    async def _respond(
        self, asked: Asked, prompts: list[Any], ids_of: Callable[[Any], list[int]]
    ) -> Response:
        """Answer with all choices, or with a stream of events. ids_of: makes a prompt's tokens."""
        name = self.decoder.model.name
        if asked.model != name:
            raise HTTPException(404, f"model={asked.model}: expected {name}, which is served here")
        options = asked.stream_options
        require(asked.stream or options is None, "stream_options: expected only with stream=true")
        requests = await run_in_threadpool(lambda: list(self._requests(asked, prompts, ids_of)))
        try:
            pieces = self._batch.enter(requests)
        except Full:
            raise HTTPException(429, "the queue is full; come back", {"Retry-After": "1"}) from None
        is_chat = isinstance(asked, ChatAsked)
        kind = f"chat.completion{'.chunk' * asked.stream}" if is_chat else "text_completion"
        head = {"id": secrets.token_hex(12), "object": kind, "created": int(time.time())}
        numbers = [request.number for request in requests]
        outs = dict[int, Generation]()

        def choice(index: int, text: str, **role: str) -> dict[str, Any]:
            said: Any = {"text": text}
            if is_chat:
                said = {"delta" if asked.stream else "message": {**role, "content": text}}
            why = outs[index].finish if index in outs else None
            finish = why and ("length" if why == "length" else "stop")
            return {"index": index, **said, "logprobs": None, "finish_reason": finish}

        def answer(choices: list[Any], usage: bool = False) -> str:
            read = sum(len(request.prompt_ids) for request in requests[:: asked.n])
            new = sum(out.num_new_tokens for out in outs.values())
            sums = {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
            more = {"usage": sums} if usage else {}
            return json.dumps({**head, "model": name, "choices": choices, **more})

        async def parts() -> AsyncIterator[str]:
            ends = [(request.prompt_ids[-1], asked.stops) for request in requests]
            streams = [TokenStream(self.tokenizer, *each) for each in ends]
            if is_chat and asked.stream:
                begun = [choice(index, "", role="assistant") for index in range(len(requests))]
                yield f"data: {answer(begun)}\n\n"
            while len(outs) < len(requests):
                number, piece = await pieces.get()
                if isinstance(piece, Exception):
                    failed = HTTPException(500, "decoding failed")
                    if not asked.stream:
                        raise failed
                    yield f"data: {str((await _failed(None, failed)).body, 'utf-8')}\n\n"
                    return
                index = numbers.index(number)
                if isinstance(piece, Generation):
                    outs[index] = piece
                if asked.stream:
                    said = streams[index]
                    new = said.rest() if index in outs else said.add(piece, [False] * len(piece))
                    yield f"data: {answer([choice(index, plain(new))])}\n\n"
            if not asked.stream:
                texts = [outs[index].text for index in range(len(outs))]
                yield answer([choice(*each, role="assistant") for each in enumerate(texts)], True)
                return
            if options and options.include_usage:
                yield f"data: {answer([], True)}\n\n"
            yield "data: [DONE]\n\n"

        left = BackgroundTask(self._batch.leave, numbers)
        if asked.stream:
            return StreamingResponse(parts(), media_type="text/event-stream", background=left)
        return _Whole(parts(), background=left)

    @property
    def front(self) -> uvicorn.Server:
        """What speaks HTTP."""
        most = self.config.queue + self.config.batch_size + 64
        settings: Any = {"http": _Connection, "ws": "none", "limit_concurrency": most}
        return uvicorn.Server(uvicorn.Config(self.app, log_level="warning", **settings))

    def serve(self, listener: socket.socket) -> None:
        """Serve until SIGTERM or an interrupt; answers that have begun end first."""
        self.decoder.planner(self.decode)  # what it measures must not keep the first client waiting
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # for clients that do not read
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * PATIENCE)
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again at its end
            signal.signal(number, lambda *_: None)
        self.front.run([listener])


async def _health() -> dict[str, str]:
    """Say that the server lives."""
    return {"status": "ok"}


async def _metrics() -> Response:
    """Give counters in Prometheus' text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def _failed(_: Any, error: Any) -> Response:
    """Say what is wrong, in OpenAI's form."""
    status = getattr(error, "status_code", 400 if isinstance(error, InputError) else 500)
    message = getattr(error, "detail", str(error) if status == 400 else "internal error")
    if isinstance(error, RequestValidationError):
        status, (first, *more) = 400, error.errors()
        of_forms = first["loc"][1:2] in (("prompt",), ("stop",))  # one error for each form
        errors = [first, *(each for each in more if of_forms and each["loc"][1] == first["loc"][1])]
        place = [] if first["type"] == "json_invalid" else first["loc"][1 : 2 if of_forms else 99]
        why = "; or ".join(dict.fromkeys(each["msg"] for each in errors))
        if first["type"] == "extra_forbidden":
            why = "not served; leave it out"
        if first["type"] == "model_attributes_type" and not place:
            why = "expected a JSON object, with the header Content-Type: application/json"
        message = f"{'.'.join(map(str, place)) or 'body'}: {why}"
    message = message.encode(errors="backslashreplace").decode()  # JSON may have half characters
    named = re.match(r"(\w+)[=:.]", message)
    kind = "invalid_request_error" if status < 500 else "server_error"
    said = {"message": message, "type": kind, "param": named and named[1], "code": None}
    return JSONResponse({"error": said}, status, getattr(error, "headers", None))


class _Whole(StreamingResponse):
    """An answer in one piece, whose client may leave before it is there, as that of a stream."""

    async def stream_response(self, send: Any) -> None:
        body = [str(part) async for part in self.body_iterator]
        await Response("".join(body), media_type="application/json")({"type": "http"}, send, send)


class _Connection(H11Protocol):
    """A connection whose requests must be whole in time: uvicorn's own waits for ever."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late = self.loop.call_later(PATIENCE, self._give_up)

    def handle_events(self) -> None:
        super().handle_events()
        begun = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if begun and self._late is None and self.timeout_keep_alive_task is None:
            self._late = self.loop.call_later(PATIENCE, self._give_up)
        elif not begun and self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            self.send_400_response("the request did not come in time")
        self.transport.close()
