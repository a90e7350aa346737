"""`sdsat serve`, asked by the real `openai` client over real sockets: texts are `generate`'s,
whoever else asks and leaves; what can't be served is refused by its name.
"""

import asyncio
import importlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import openai
import processes
import pytest
import torch
from common import CHARACTERS, decoder_of, tiny_llama, tiny_tokenizer
from pydantic import ValidationError

from sdsat.cli import main as cli
from sdsat.config import DecodeConfig, InputError, SamplingConfig, ServeConfig
from sdsat.interfaces import server as serving
from sdsat.interfaces.openai_requests import TextAsked
from sdsat.interfaces.server import Server
from sdsat.interfaces.terminal import encode

TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user is first') }}{% endif %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
GOOD = {"model": "tiny", "prompt": "def f", "max_tokens": 2}
TURN = {"role": "user", "content": "def f"}
EOS = 5


def tokenizer(characters=CHARACTERS):
    made = tiny_tokenizer(characters)
    made.chat_template = TEMPLATE
    return made


def decoder(eos=EOS, characters=CHARACTERS):
    lm = tiny_llama(torch.float32, vocab=len(characters), eos_token_id=eos)
    made = decoder_of(lm, tokenizer(characters))
    _ = made.engine.row_policy
    return made


@contextmanager
def running(made, **settings):
    """A server in a thread of this process; yields it and its address."""
    made_server = Server(made, DecodeConfig(0, 24), ServeConfig(**{"context": 256, **settings}), ())
    front = made_server.front
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=front.run, args=([listener],))
        thread.start()
        try:
            yield made_server, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            front.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def shared():
    with running(decoder()) as both:
        yield both


def wanted(made, prompt, style, index=0, stop=(), length=24, **sampling):
    drawn = {"temperature": 1.0, "seed": 0, **sampling}
    drawn["seed"] += index * 2**32
    config = DecodeConfig(0, length, sampling=SamplingConfig(**drawn), stop_strings=stop)
    config = replace(config, stop_ids=made.model.stop_ids)
    return made.generate(encode(made.model.tokenizer, prompt, style), config)


def test_texts_are_those_of_generate_whoever_else_asks(shared):
    made, url = shared[0].decoder, shared[1]
    stops = [wanted(made, "ab", "raw", seed=5, length=60).text[6:8], "xy"]

    async def ask_all():
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        chats, texts = client.chat.completions, client.completions

        async def streamed(api, index, **asked):
            parts = {}
            finish = {}
            async for event in await api.create(stream=True, **asked):
                for choice in event.choices:
                    text = choice.delta.content if api is chats else choice.text
                    parts[choice.index] = parts.get(choice.index, "") + (text or "")
                    finish[choice.index] = choice.finish_reason
            return parts, finish, event.usage

        usage = {"stream_options": {"include_usage": True}}
        base = {"model": "tiny"}
        chat = {**base, "messages": [TURN]}
        return await asyncio.gather(
            streamed(chats, 0, **chat, seed=3, n=2, **usage),
            streamed(texts, 0, **base, prompt="ab", seed=4, temperature=0.7, top_p=0.8),
            streamed(texts, 0, **base, prompt="ab", seed=5, stop=stops, max_tokens=60),
            chats.create(**chat, temperature=0),
            chats.create(**chat, seed=9, max_completion_tokens=7),
            texts.create(**base, prompt=["ab", "c"], seed=1, n=2, extra_body={"top_k": 5}),
            texts.create(**base, prompt=[3, 4, 5], seed=-2),
            texts.create(**base, prompt="ab", temperature=1),
            chats.create(**chat, temperature=1),
        )

    several, nucleus, stopped, greedy, short, lists, ids, *unseeded = asyncio.run(ask_all())
    outs = [wanted(made, "def f", "chat", i, seed=3) for i in range(2)]
    assert several[0] == {i: out.text for i, out in enumerate(outs)}
    prompt = len(encode(made.model.tokenizer, "def f", "chat"))
    new = sum(out.num_new_tokens for out in outs)
    assert (several[2].prompt_tokens, several[2].completion_tokens) == (prompt, new)
    assert nucleus[0] == {0: wanted(made, "ab", "raw", seed=4, temperature=0.7, top_p=0.8).text}
    out = wanted(made, "ab", "raw", seed=5, stop=tuple(stops), length=60)
    assert stopped[0] == {0: out.text} and out.finish == "stop_string"
    assert stopped[1] == {0: "stop"} and stopped[2] is None
    assert greedy.choices[0].message.content == wanted(made, "def f", "chat", temperature=0).text
    assert short.choices[0].message.content == wanted(made, "def f", "chat", seed=9, length=7).text
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 7
    assert [choice.text for choice in lists.choices] == [
        wanted(made, text, "raw", i, seed=1, top_k=5).text
        for i, text in enumerate(["ab", "ab", "c", "c"])
    ]
    assert lists.usage.prompt_tokens == 3
    config = DecodeConfig(0, 24, sampling=SamplingConfig(1.0, seed=-2), stop_ids=(EOS,))
    assert ids.choices[0].text == made.generate([3, 4, 5], config).text
    texts = [unseeded[0].choices[0].text, unseeded[1].choices[0].message.content]
    assert texts[0] != texts[1] and unseeded[0].id != unseeded[1].id


def test_a_stream_has_every_character():
    """Also those that a terminal would act on."""
    controls = [*map(chr, (7, 8, 11, 12, 13, 27, 155))]
    made = decoder(None, ["<unk>", "a", "\ufffd", *controls])
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 48}
    with running(made) as (_, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        events = client.completions.create(**asked, seed=1, stream=True)
        text = "".join(event.choices[0].text for event in events)
    assert text == wanted(made, "a", "raw", seed=1, length=48).text
    assert len(set(controls) & set(text)) > 4


def test_a_conversation_has_all_its_turns(shared):
    made, url = shared
    turns = [
        {"role": "system", "content": "a b"},
        TURN,
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "y"}, {"type": "text", "text": "z"}]},
    ]
    body = {"model": "tiny", "messages": turns, "temperature": 0}
    got = httpx.post(f"{url}/v1/chat/completions", json=body).json()
    text = "system: a b\nuser: def f\nassistant: x\nuser: yz\nassistant: "
    out = wanted(made.decoder, text, "raw", temperature=0)
    assert got["choices"][0]["message"] == {"role": "assistant", "content": out.text}
    assert got["usage"]["prompt_tokens"] == len(text)


REFUSED = {
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools"),
    "logprobs": ({"logprobs": 3}, 400, "logprobs"),
    "logprobs of no others": ({"logprobs": 0}, 400, "logprobs"),
    "a number for no": ({"echo": 0}, 400, "echo"),
    "a penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    "a bias": ({"logit_bias": {"5": 10}}, 400, "logit_bias"),
    "an unknown field": ({"colour": 1}, 400, "colour"),
    "no prompt": ({"prompt": None}, 400, "prompt"),
    "an empty prompt": ({"prompt": ""}, 400, "prompt"),
    "a long prompt": ({"prompt": "a" * 255}, 400, "max_tokens"),
    "a longer prompt": ({"prompt": "a" * 256}, 400, "prompt"),
    "a strange token": ({"prompt": [99]}, 400, "prompt"),
    "a negative token": (
        {"prompt": [-1]},
        400,
        "prompt: Input should be a valid string; or Input should be greater",
    ),
    "no text": ({"prompt": ["a", 1]}, 400, "prompt: Input should be a valid string; or "),
    "a stop of another kind": (
        {"stop": 3},
        400,
        "stop: Input should be a valid string; or Input should be a valid list",
    ),
    "a long answer": ({"max_tokens": 252}, 400, "max_tokens"),
    "negative numbers": ({"max_tokens": -1}, 400, "max_tokens"),
    "a long stop string": ({"stop": "x" * 129}, 400, "stop"),
    "many prompts": ({"prompt": ["x"] * 33}, 400, "n"),
    "many choices": ({"n": 33}, 400, "n"),
    "a number as text": ({"temperature": "1"}, 400, "temperature"),
    "a tiny temperature": ({"temperature": 1e-9}, 400, "temperature"),
    "options of no stream": ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    "another model": ({"model": "gpt-4"}, 404, "model"),
    "half a character": ({"model": "\ud800"}, 404, "model=\\ud800"),
}


@pytest.mark.parametrize(("change", "status", "named"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_served_is_refused_by_its_name(shared, change, status, named):
    headers = {"Content-Type": "application/json"}
    body = json.dumps({**GOOD, **change})
    answer = httpx.post(f"{shared[1]}/v1/completions", content=body, headers=headers)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == re.match(r"\w+", named)[0] and error["message"].startswith(named)
    assert error["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_taken(shared):
    neutral = {"presence_penalty": 0, "logit_bias": {}, "logprobs": None, "best_of": 1, "n": None}
    answers = [
        httpx.post(f"{shared[1]}/v1/completions", json={**GOOD, "seed": 1, **more}).json()
        for more in ({}, neutral)
    ]
    assert answers[0]["choices"] == answers[1]["choices"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("[" * 100_000, 400),
        ('{"seed": ' + "9" * 9999 + "}", 400),
        ('{"temperature": NaN}', 400),
        ('{"\\ud800": 1}', 400),
        ("{", 400),
        (b'{"model": "\xff"}', 400),
        ('"' + "x" * 2**20 + '"', 413),
    ],
    ids=["deep", "long number", "NaN", "surrogate", "cut", "no UTF-8", "large"],
)
def test_bodies_that_can_not_be_read(shared, body, status):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{shared[1]}/v1/completions", content=body, headers=headers)
    assert answer.status_code == status
    assert httpx.get(f"{shared[1]}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("wrong", [[-1], [[-1]], [[1], -1], {"text": "x"}], ids=str)
def test_a_large_body_is_refused_at_once(wrong):
    """Whatever is wrong, and however often, few errors are written down."""
    sent = {**GOOD, "prompt": wrong * 100_000 if isinstance(wrong, list) else wrong}
    with pytest.raises(ValidationError) as refused:
        TextAsked.model_validate(sent)
    assert refused.value.error_count() < 6


def test_without_its_content_type_a_body_is_not_read(shared):
    """A page of the web can send such bodies to this machine, but no others."""
    answer = httpx.post(f"{shared[1]}/v1/completions", content=json.dumps(GOOD))
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.text


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (TEMPLATE, "the user is first"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content.nope() }}", "no attribute"),
        ("{% if %}", "Expected an expression"),
        (None, "it has no chat template"),
    ],
)
def test_turns_that_the_template_refuses(monkeypatch, shared, template, why):
    monkeypatch.setattr(shared[0].tokenizer, "chat_template", template)
    body = {"model": "tiny", "messages": [{"role": "assistant", "content": "x"}]}
    answer = httpx.post(f"{shared[1]}/v1/chat/completions", json=body)
    assert answer.status_code == 400 and why in answer.json()["error"]["message"]


def test_half_a_request_is_refused_in_time(monkeypatch, shared):
    monkeypatch.setattr(serving, "PATIENCE", 0.3)
    host, port = shared[1].removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    body = head + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    for sent in (b"", head, body, whole + body):
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(sent)
            got = b"".join(iter(lambda client=client: client.recv(999), b""))
            assert got.count(b"HTTP/1.1 200") == sent.count(b"GET") and b"HTTP/1.1 400" in got
    # A whole one may take longer than that to answer.
    asked = {**GOOD, "max_tokens": 200, "temperature": 0}
    assert httpx.post(f"{shared[1]}/v1/completions", json=asked, timeout=60).status_code == 200


@pytest.fixture
def slow(monkeypatch):
    """A decoder of slow passes, which are counted, and of long answers."""
    made = decoder(eos=None)
    plain = made.engine.forward
    made.passes = 0

    def forward(inputs, **named):
        time.sleep(0.02)
        made.passes += 1
        return plain(inputs, **named)

    monkeypatch.setattr(made.engine, "forward", forward)
    return made


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(slow, stream):
    with running(slow, batch_size=1, queue=2) as (_, url):
        long = {**GOOD, "max_tokens": 200, "temperature": 0, "stream": stream}
        leaving = [httpx.Client() for _ in range(3)]

        def ask(client):
            try:
                with client.stream("POST", f"{url}/v1/completions", json=long) as answer:
                    answer.read()
            except httpx.HTTPError:
                pass

        threads = [threading.Thread(target=ask, args=(client,)) for client in leaving]
        for thread in threads:
            thread.start()
            time.sleep(0.15)
        # One is decoded, two wait: there is no room.
        full = httpx.post(f"{url}/v1/completions", json=GOOD)
        assert full.status_code == 429 and full.headers["Retry-After"] == "1"
        metrics = httpx.get(f"{url}/metrics").text
        assert "sdsat_waiting_sequences 2.0" in metrics and "sdsat_running_sequences 1.0" in metrics
        for thread, client in zip(threads, leaving, strict=True):
            shut(client)
            thread.join(10)
        assert httpx.post(f"{url}/v1/completions", json=GOOD, timeout=10).status_code == 200
        metrics = httpx.get(f"{url}/metrics").text
        assert "sdsat_waiting_sequences 0.0" in metrics and "sdsat_running_sequences 0.0" in metrics
    assert slow.passes < 150  # of 600


def shut(client):
    """Close a client's connections from another thread."""
    for connection in client._transport._pool.connections:
        connection._connection._network_stream._sock.shutdown(socket.SHUT_RDWR)


def test_a_pass_that_fails_ends_its_answers_alone(monkeypatch, shared):
    made = shared[0].decoder
    plain = made.engine.forward
    broken = [True]

    def forward(inputs, **named):
        if broken:
            broken.clear()
            raise RuntimeError("no memory")
        return plain(inputs, **named)

    monkeypatch.setattr(made.engine, "forward", forward)
    with running(made) as (_, url):
        answers = [httpx.post(f"{url}/v1/completions", json=GOOD) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [500, 200]
    assert answers[0].json()["error"]["message"] == "decoding failed"


def test_a_stream_says_that_decoding_failed(monkeypatch, shared):
    """The client has its status by then: it must not take what came for the whole answer."""
    made = shared[0].decoder
    plain = made.engine.forward
    passes = []

    def forward(inputs, **named):
        passes.append(inputs)
        if len(passes) == 4:
            raise RuntimeError("no memory")
        return plain(inputs, **named)

    monkeypatch.setattr(made.engine, "forward", forward)
    with running(made) as (_, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        asked = {"model": "tiny", "prompt": "ab", "temperature": 0}
        got = ""
        with pytest.raises(openai.APIError, match="decoding failed"):
            for event in client.completions.create(**asked, stream=True):
                got += event.choices[0].text
        whole = client.completions.create(**asked).choices[0].text
    assert len(got) == 3 and whole.startswith(got)


def test_a_key_is_asked_for_where_there_is_one(shared):
    with running(shared[0].decoder, api_key="secret") as (_, url):
        for key, status in ((None, 401), ("other", 401), ("s\u00e9cret", 401), ("secret", 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
            answer = httpx.post(f"{url}/v1/completions", json=GOOD, headers=headers)
            assert answer.status_code == status
        assert httpx.get(f"{url}/health").status_code == 200


def command(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sdsat", "serve", *map(str, words)])
        patch.setenv("OMP_NUM_THREADS", "1")
        cli.main()


def test_the_command_serves_until_it_is_ended(tmp_path):
    """SIGTERM: the running answer ends whole, new ones are refused, the exit code is 0."""
    lm = tiny_llama(torch.float32, vocab=len(CHARACTERS), max_position_embeddings=2048)
    lm.save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    words = (
        tmp_path / "tiny",
        "--port",
        0,
        "--k",
        0,
        "--device",
        "cpu",
        "--engine",
        "transformers",
    )
    server = processes.OwnProcess(tmp_path, command, words, {})
    try:
        end = time.monotonic() + 60
        while not (line := (tmp_path / "out").read_text() if (tmp_path / "out").exists() else ""):
            assert time.monotonic() < end, (tmp_path / "errors").read_text()
            time.sleep(0.05)
        url = line.split()[-1]
        asked = {**GOOD, "model": str(tmp_path / "tiny"), "max_tokens": 200, "temperature": 0}
        with httpx.stream(
            "POST", f"{url}/completions", json={**asked, "stream": True}, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            os.kill(server.pid, signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/models")
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert server.end(20).code == 0
    finally:
        server.kill()


def test_without_its_packages_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "sdsat.interfaces.server")
    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "fastapi" in line and "pip install 'sdsat[serve]'" in line


def test_a_host_that_is_not_here(capsys):
    importlib.import_module("sdsat.interfaces.server")
    with pytest.raises(SystemExit) as end:
        command("--host", "256.0.0.1")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: host=256.0.0.1: ")


def test_a_port_that_is_taken(capsys):
    importlib.import_module("sdsat.interfaces.server")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as end:
        command("--port", taken.getsockname()[1])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: port=")


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"host": ""},
        {"queue": 0},
        {"context": 0},
        {"batch_size": 1.5},
        {"api_key": ""},
        {"api_key": "a key"},
        {"api_key": "key\n"},
        {"api_key": "s\u00e9cret"},
    ],
)
def test_settings_that_can_not_be(wrong):
    with pytest.raises(InputError, match=rf"^{next(iter(wrong))}[=:]"):
        ServeConfig(**wrong)
