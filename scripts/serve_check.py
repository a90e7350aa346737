"""`sdsat serve` under load and under attack, by clients of its own.

    python scripts/serve_check.py [MODEL] [--seconds N] [--clients N] [--hostile N] [--out FILE]

For so long, the `openai` client keeps so many requests in flight, all with seeds: chats and plain
completions, streams and whole answers, two choices at once, stop strings, and clients that vanish
in the middle. Every text is compared with `Decoder.generate`'s for that seed. Beside them
schemathesis sends what it makes of the server's own OpenAPI document, right and wrong, and a list
of requests by hand tries the limits. The server's resident memory (MiB) is read after everything
has been asked once, and at the end. Last, SIGTERM comes while an answer is streamed: it must end
whole, new requests must be refused, and the server must end with code 0.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import hypothesis
import openai
import psutil
import requests
import schemathesis
import typer
from rich.console import Console
from rich.table import Table

from sdsat.cli.options import Model
from sdsat.cli.program import run
from sdsat.config import DecodeConfig, SamplingConfig, require
from sdsat.decoding.decoder import Decoder
from sdsat.evaluation.records import environment
from sdsat.files import new_destination, write_json
from sdsat.interfaces.terminal import encode
from sdsat.models import embedded
from sdsat.tasks.datasets import humaneval_problems

OUT = Path("runs/serve.json")
STOPS = ["\n```", "\n\n\n"]
LENGTH = 48
PROMPTS = 4
LEAVES_AFTER = 5  # pieces of text
KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "chat stream", "temperature": 0.0},
    {"kind": "chat", "temperature": 0.8, "top_p": 0.95, "n": 2},
    {"kind": "vanishing", "temperature": 1.0},
    {"kind": "completion stream", "temperature": 1.0, "stop": STOPS},
    {"kind": "completion", "temperature": 0.0},
)


@contextmanager
def served(model: str) -> Iterator[tuple[psutil.Popen, str]]:
    """Run `sdsat serve` on a free port. Yields the process and the address, once it answers.

    Raises InputError where it ends before.
    """
    command = [sys.executable, "-m", "sdsat", "serve", model, "--port", "0", "--device", "cpu"]
    process = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        require(": http" in line, "`sdsat serve` ended before it answered; see above")
        url = line.split()[-1].removesuffix("/v1")
        requests.get(f"{url}/health", timeout=600).raise_for_status()
        yield process, url
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


class Load:
    """Requests by the `openai` client, and what each must be answered."""

    def __init__(self, decoder: Decoder, url: str):
        self.decoder = decoder
        self.client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=20
        )
        self.prompts = [problem["prompt"] for problem in humaneval_problems(PROMPTS)]
        self.known: dict[tuple[int, int], list[str]] = {}
        self.done: Counter[str] = Counter()
        self.different: list[dict[str, Any]] = []

    def wanted(self, prompt: int, kind: int) -> list[str]:
        """The texts of `Decoder.generate`, one a choice."""
        if (prompt, kind) not in self.known:
            how = KINDS[kind]
            tokenizer = self.decoder.model.tokenizer
            assert tokenizer is not None
            style = "raw" if how["kind"].startswith("completion") else "chat"
            config = DecodeConfig(
                k=None,
                strategy="auto",
                max_new_tokens=LENGTH,
                stop_ids=self.decoder.model.stop_ids,
                stop_strings=tuple(how.get("stop", ())),
            )
            ids = encode(tokenizer, self.prompts[prompt], style)
            drawn = [
                SamplingConfig(
                    how["temperature"], top_p=how.get("top_p", 1.0), seed=prompt + i * 2**32
                )
                for i in range(how.get("n", 1))
            ]
            self.known[prompt, kind] = [
                self.decoder.generate(ids, replace(config, sampling=each)).text for each in drawn
            ]
        return self.known[prompt, kind]

    async def ask(self, prompt: int, kind: int) -> None:
        """Ask once, compare and count."""
        how = dict(KINDS[kind])
        name = how.pop("kind")
        how |= {"model": self.decoder.model.name, "seed": prompt, "max_tokens": LENGTH}
        text = self.prompts[prompt]
        wanted = await asyncio.to_thread(self.wanted, prompt, kind)
        if name == "completion":
            answer = await self.client.completions.create(prompt=text, **how)
            got = [choice.text for choice in answer.choices]
        elif name == "completion stream":
            got = [""]
            async for event in await self.client.completions.create(
                prompt=text, stream=True, **how
            ):
                got[0] += event.choices[0].text
        else:
            how["messages"] = [{"role": "user", "content": text}]
            if name == "chat":
                whole = await self.client.chat.completions.create(**how)
                got = [choice.message.content for choice in whole.choices]
            else:
                got = [""]
                count = 0
                stream = await self.client.chat.completions.create(stream=True, **how)
                async with stream:
                    async for event in stream:
                        got[0] += event.choices[0].delta.content or ""
                        count += 1
                        if name == "vanishing" and count == LEAVES_AFTER:
                            wanted = [wanted[0][: len(got[0])]]
                            break
        self.done[name] += 1
        if got != wanted:
            self.different.append({"kind": name, "prompt": prompt, "got": got, "wanted": wanted})

    async def keep_asking(self, clients: int, seconds: float) -> None:
        """Keep so many requests in flight."""
        end = time.monotonic() + seconds
        numbers = iter(range(10**9))

        async def client() -> None:
            while time.monotonic() < end:
                number = next(numbers)
                await self.ask(number // len(KINDS) % PROMPTS, number % len(KINDS))

        await asyncio.gather(*(client() for _ in range(clients)))

    async def once(self) -> None:
        """Ask everything once."""
        for prompt in range(PROMPTS):
            for kind in range(len(KINDS)):
                await self.ask(prompt, kind)


def by_schemathesis(url: str, model: str, number: int) -> dict[str, int]:
    """Send what schemathesis makes of the OpenAPI document; counts by method, path and status.

    What keeps to the document asks for the model that is there, and for two tokens.
    """
    found: Counter[str] = Counter()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    modes = schemathesis.GenerationMode
    operations = [result.ok() for result in schema.get_all_operations()]
    bodies = [operation for operation in operations if operation.method == "post"]
    for operation in operations:
        for mode in (modes.POSITIVE, modes.NEGATIVE) if operation in bodies else (modes.POSITIVE,):
            share = number // (2 * len(bodies)) if operation in bodies else 5

            @hypothesis.settings(
                max_examples=share,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                if mode is modes.POSITIVE and isinstance(case.body, dict):  # noqa: B023
                    case.body |= {"model": model, "max_tokens": 2}
                answer = case.call(timeout=600)
                found[f"{case.method} {case.path} {answer.status_code}"] += 1

            send()
    return dict(found)


def by_hand(url: str, model: str) -> dict[str, str]:
    """Send what tries the limits; the status and the field that is named, by what was sent."""
    good = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    chat = f"{url}/v1/chat/completions"
    bodies: dict[str, Any] = {
        "body of 2 MB": {**good, "user": "x" * 2**21},
        "deep JSON": "[" * 100_000 + "]" * 100_000,
        "deep field": '{"model":' + "[" * 5000 + "]" * 5000 + "}",
        "no JSON": "{",
        "no UTF-8": b'{"model": "\xff"}',
        "lone surrogate": '{"model": "\\ud800"}',
        "lone surrogate as a field": '{"\\ud800": 1}',
        "long number": '{"seed": ' + "9" * 10_000 + "}",
        "NaN": '{"temperature": NaN}',
        "negative max_tokens": {**good, "max_tokens": -1},
        "negative n": {**good, "n": -1},
        "too many choices": {**good, "n": 10_000},
        "negative temperature": {**good, "temperature": -1},
        "tiny temperature": {**good, "temperature": 1e-9},
        "top_p 0": {**good, "top_p": 0},
        "empty stop": {**good, "stop": ""},
        "long answer": {**good, "max_tokens": 10**9},
        "long prompt": {**good, "messages": [{"role": "user", "content": "word " * 100_000}]},
        "tools": {**good, "tools": [{"type": "function"}]},
        "logprobs": {**good, "logprobs": True},
        "penalty": {**good, "presence_penalty": 0.5},
        "unknown field": {**good, "colour": "red"},
        "image": {**good, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "other model": {**good, "model": "gpt-4"},
        "neutral fields": {**good, "presence_penalty": 0, "tools": [], "logprobs": False},
    }
    found = {}
    for name, body in bodies.items():
        data = body if isinstance(body, str | bytes) else json.dumps(body)
        answer = requests.post(
            chat,
            data.encode() if isinstance(data, str) else data,
            headers={"Content-Type": "application/json"},
            timeout=600,
        )
        is_json = answer.headers["Content-Type"] == "application/json"
        error = answer.json().get("error", {}) if is_json else {}
        found[name] = f"{answer.status_code} {error.get('param') or ''}".strip()
    found["outside of the vocabulary"] = str(
        requests.post(
            f"{url}/v1/completions", json={"model": model, "prompt": [10**9]}, timeout=60
        ).status_code
    )
    host, port = url.removeprefix("http://").split(":")

    def raw(sent: bytes) -> str:
        began = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=120) as client:
            client.sendall(sent)
            status = client.recv(100).decode().split(" ")[1]
        return f"{status} after {time.monotonic() - began:.0f} s"

    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    parts = {
        "half a head": head,
        "half a body": head + b"Content-Length: 100\r\n\r\n{",
        "no HTTP": b"\x00\x01\x02\r\n\r\n",
    }
    with ThreadPoolExecutor() as pool:
        return found | dict(zip(parts, pool.map(raw, parts.values()), strict=True))


async def _ended(load: Load, process: psutil.Popen) -> dict[str, Any]:
    """Send SIGTERM while an answer is streamed; how all ended."""
    asked = asyncio.create_task(load.ask(0, 0))
    await asyncio.sleep(0.5)
    before = len(load.different)
    process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.5)
    impatient = load.client.with_options(max_retries=0)
    try:
        await impatient.models.list()
        refused = False
    except openai.APIConnectionError:
        refused = True
    await asked
    code = await asyncio.to_thread(process.wait, 60)
    return {
        "running_answer_whole": len(load.different) == before,
        "new_request_refused": refused,
        "exit_code": code,
    }


async def _check(
    load: Load, process: psutil.Popen, url: str, clients: int, seconds: float, hostile: int
) -> dict[str, Any]:
    await load.once()
    hand = await asyncio.to_thread(by_hand, url, load.decoder.model.name)
    before = process.memory_info().rss
    load.done.clear()
    began = time.monotonic()
    made = asyncio.create_task(
        asyncio.to_thread(by_schemathesis, url, load.decoder.model.name, hostile)
    )
    await load.keep_asking(clients, seconds)
    minutes = (time.monotonic() - began) / 60
    schema = await made
    await load.once()
    counts = {"clients": clients, "minutes": round(minutes, 2), "requests": dict(load.done)}
    after = process.memory_info().rss
    counts["equal_outputs"] = sum(load.done.values()) - len(load.different)
    counts["different"] = load.different
    counts["resident_mib"] = {"before": round(before / 2**20, 1), "after": round(after / 2**20, 1)}
    counts |= {"hostile_by_schemathesis": schema, "hostile_by_hand": hand}
    return {**counts, "sigterm": await _ended(load, process)}


def main(
    model: Model = embedded.NAME,
    seconds: Annotated[float, typer.Option(help="How long clients ask.")] = 60,
    clients: int = 6,
    hostile: Annotated[int, typer.Option(help="Requests that schemathesis makes.")] = 300,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = OUT,
) -> None:
    """Check texts, memory and statuses of a server under load."""
    new_destination(out, "--out")
    decoder = Decoder.load(model, device="cpu")
    with served(model) as (process, url):
        load = Load(decoder, url)
        result = asyncio.run(_check(load, process, url, clients, seconds, hostile))
    result["environment"] = environment(decoder)
    write_json(out, result)
    table = Table("what", "seen")
    for name in ("minutes", "requests", "equal_outputs", "resident_mib", "sigterm"):
        table.add_row(name.replace("_", " "), json.dumps(result[name]))
    for group in ("hostile_by_schemathesis", "hostile_by_hand"):
        for name, seen in result[group].items():
            table.add_row(name, str(seen))
    Console().print(table)
    failed = [key for key in result["hostile_by_schemathesis"] if key.split()[-1] >= "500"]
    require(
        not (result["different"] or failed),
        f"serve: {len(result['different'])} texts differ, {len(failed)} kinds of failures",
    )


if __name__ == "__main__":
    run(main)
