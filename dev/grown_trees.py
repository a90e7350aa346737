"""Do drafts of a tree that grows where it is likeliest beat those of the fixed tree 2,2,1?

    python dev/grown_trees.py collect FOLDER... --out PLACES.pt [--answers N]
    python dev/grown_trees.py compare PLACES.pt --out FILE.json

`collect` has the default model answer requests about functions of the folders' Python code, which
its adapter must not have been trained on, and keeps what SATs say at places of the answers.
`compare` drafts there both ways. As `auto` would, it takes of each tree the n likeliest drafts, by
beliefs that learn from one place to the next, and counts those that the answer goes on with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sdsat.cli.program import run_app
from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.decoding.loop import Decoder, num_slots
from sdsat.engines.base import PassInput
from sdsat.method.layout import SatGroup
from sdsat.method.tree import make_tree
from sdsat.tasks.prompts import collect_prompts

SAMPLINGS = {"greedy": SamplingConfig(), "nucleus, temperature 1.0": SamplingConfig(1.0, 10, 0.95)}
NEW_TOKENS = 160
EVERY = 6  # tokens from one place to the next
KEPT = 128  # logits of a SAT, the largest ones

app = typer.Typer()


def places_of(decoder: Decoder, prompt: list[int], config: DecodeConfig) -> list[dict[str, Any]]:
    """What the SATs say at places of the model's own answer, and how the answer goes on."""
    engine = decoder.engine
    assert decoder.model.sat is not None
    k = decoder.model.sat.k
    answer = decoder.generate(prompt, config).token_ids
    cache = engine.new_cache(num_slots(len(prompt), NEW_TOKENS))
    engine.prefill(cache, torch.tensor(prompt[:-1]))
    whole = prompt + answer
    places = []
    for emitted in range(1, len(answer) - k, EVERY):
        tokens = whole[cache.length : len(prompt) + emitted]
        tree = make_tree("chain", len(tokens) - 1)
        group = SatGroup(len(tokens) - 1, k)
        states, logits = engine.forward([PassInput(cache, tokens, tree, (group,))])
        cache.commit(tuple(range(len(tokens))))
        places.append(
            {
                "x": answer[emitted],
                "states": states[-k:].clone(),
                "best": tuple(logits[-k:].topk(KEPT)),
                "index": emitted + 1,
                "follows": answer[emitted + 1 : emitted + 1 + k],
            }
        )
    return places


@app.command()
def collect(
    folders: list[str],
    out: Annotated[Path, typer.Option()],
    answers: int = 64,
) -> None:
    """Answer requests, and keep what SATs say at places of the answers."""
    decoder = Decoder.load("smollm2-135m-sdsat", "bfloat16", "cpu")
    kinds = {"complete": 2.0, "words": 1.0, "explain": 1.0}
    prompts, _ = collect_prompts(folders, decoder.model.tokenizer, 8 * answers, 256, kinds=kinds)
    found: dict[str, list[list[dict[str, Any]]]] = {}
    with torch.inference_mode():
        for name, sampling in SAMPLINGS.items():
            config = DecodeConfig(
                None,
                NEW_TOKENS,
                sampling=sampling,
                stop_ids=decoder.model.stop_ids,
                strategy="auto",
            )
            found[name] = [places_of(decoder, prompt, config) for prompt in prompts[:answers]]
            print(name, len(prompts), sum(map(len, found[name])), "places")
    torch.save(found, out)


if __name__ == "__main__":
    run_app(app)
