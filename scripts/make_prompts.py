"""Write the prompts of the code model's training data: requests about code and general chat, mixed,
one JSON object a line.

    python scripts/make_prompts.py --model MODEL --out prompts.jsonl
    sdsat distill --model MODEL --source prompts.jsonl --out runs/data

A row has the key prompt, and opening where the model's answer begins with a code fence. The code is
that of the packages of corpus.txt, installed into the folder CORPUS the first time, and of Python's
standard library. Any beginning of the file is as good a mix as the whole. The same command makes
the same file.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import sysconfig
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from chat_prompts import chat_requests, paragraphs_of

from sdsat.cli.program import run
from sdsat.config import require
from sdsat.files import replacing
from sdsat.models.loading import load_tokenizer
from sdsat.tasks.datasets import EVERYDAY_FILE
from sdsat.tasks.kinds import Request
from sdsat.tasks.prompts import Sieve, code_requests, licences, parse_kinds

CORPUS = Path(__file__).with_name("corpus.txt")
# The functions of MBPP's sanitized problems (arXiv 2108.07732, CC BY 4.0), by name. Their texts are
# not stored here.
MBPP = Path(__file__).with_name("mbpp.jsonl")


def installed(folder: Path) -> Path:
    """The folder with the packages of corpus.txt, fetched from the package index unless it is
    there.
    """
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.part")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-compile",
            "--target",
            str(part),
            "-r",
            str(CORPUS),
        ]
        subprocess.run(command, check=True)
        part.replace(folder)
    return folder


def main(
    model: Annotated[
        str, typer.Option(help="Whose tokenizer counts: a hub id, a directory, an embedded name.")
    ],
    out: Annotated[Path, typer.Option(help="The .jsonl file.")],
    corpus: Annotated[Path, typer.Option(help="Folder of the packages.")] = Path("runs/corpus"),
    count: Annotated[int, typer.Option(help="How many prompts.")] = 30_000,
    chat: Annotated[float, typer.Option(help="Share of general chat.")] = 0.2,
    kinds: Annotated[
        str, typer.Option(help="Of the rest, see `sdsat distill`.")
    ] = "complete=40,words=15,fix=10,test=10,explain=5",
    max_prompt_tokens: int = 256,
    avoid: Annotated[
        list[Path] | None,
        typer.Option(
            help="A benchmark to avoid beside HumanEval, our own requests and MBPP's names."
        ),
    ] = None,
    seed: int = 0,
) -> None:
    """Write the prompts of the code model's training data."""
    require(count >= 1, f"count={count}: expected 1 or more")
    require(0 <= chat <= 1, f"chat={chat}: expected a share from 0 to 1")
    weights = parse_kinds(kinds)
    benchmarks = [MBPP, EVERYDAY_FILE, *(avoid or ())]
    sieve = Sieve(load_tokenizer(model), max_prompt_tokens, benchmarks)
    num_chat = round(count * chat)
    folders = [installed(corpus), Path(sysconfig.get_paths()["stdlib"])]
    asked = [
        request for request, _ in islice(code_requests(folders, weights, sieve), count - num_chat)
    ]
    require(
        len(asked) == count - num_chat,
        f"count={count}: {corpus} has code for {len(asked)} prompts of {count - num_chat}",
    )
    of_code = dict(sieve.counts)
    talk = (Request(text) for text in chat_requests(seed, paragraphs_of([corpus])))
    asked += islice((request for request in talk if sieve.ids(request)), num_chat)
    random.Random(seed).shuffle(asked)
    rows = (
        {"prompt": request.text} | ({"opening": request.opening} if request.opening else {})
        for request in asked
    )
    with replacing(out) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{out}: {len(asked)} prompts; about code {of_code}, in all {sieve.counts}")
    print(f"licences: {dict(Counter(licences([str(corpus)]).values()))}")


if __name__ == "__main__":
    run(main)
