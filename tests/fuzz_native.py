"""Generations at random through the native engine built with sanitizers: `python fuzz_native.py
TIMES`, libasan preloaded.

A read or write outside of what a call was given ends the process (test_native.py). Every output is
compared with plain decoding.
"""

import random
import sys

import torch
from test_native import FLOAT, GGUF, HALF, INT8, VOCAB, decoder_with, strange_rows

from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.engines.base import RowPolicy
from sdsat.engines.drafting import Guesses
from sdsat.engines.native import bindings, compiler
from sdsat.method.costs import COUNTS, CostCurve
from sdsat.method.tree import make_tree

TARGETS = (
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ("v_proj", "down_proj"),
)
TREES = ("chain", "grown", (2, 2, 1), (5, 3), (3, 1, 4), (1, 2, 2, 2))
WIDE = ((65,), (74,))  # wider than the shortlist of a SAT
ROWS = [[1 + n / 100 for n in COUNTS]] * 2  # seconds: drafts cost little, and `auto` drafts a lot
COSTS = CostCurve(ROWS, ROWS, 0.0, [[0.5 + n / 100 for n in COUNTS]] * 2)


def some_config(rng: random.Random) -> DecodeConfig:
    """Any settings, of any strategy."""
    top_k = rng.choice([0, 1, 7, 400])
    top_p = rng.choice([0.5, 0.95, 1.0])
    sampling = rng.choice(
        [
            SamplingConfig(),
            SamplingConfig(rng.choice([0.2, 1.5]), top_k, top_p, rng.randrange(2**64)),
        ]
    )
    strategy = rng.choice(["two-step", "rounded", "one-pass", "auto", "lookup"])
    k = 0 if strategy == "lookup" else rng.randint(1, 4)
    tree = rng.choice(WIDE if k == 1 else TREES) if k else "auto"
    budget = rng.choice([None, rng.randint(2, 96)]) if strategy in ("one-pass", "auto") else None
    lookup = rng.choice([None, rng.randint(1, 32)])
    return DecodeConfig(
        k, rng.randint(1, 10), tree, sampling, strategy=strategy, budget=budget, lookup=lookup
    )


def generation(rng: random.Random) -> None:
    """A batch of any model, on any number of threads: each row is what plain decoding of it is."""
    name = rng.choice(["biases", "groups of 4", "groups of 5", "head dim 96", "qwen3"])
    kind = rng.choice([FLOAT, HALF, INT8, GGUF])
    guessed = rng.choice([(), tuple(range(1, VOCAB))])
    decoder = decoder_with(name, kind, rng.choice(TARGETS), rng.choice([0, 7]), guessed)
    # neither measured nor probed: that takes seconds here
    decoder.costs = COSTS
    decoder.engine.row_policy = RowPolicy(1, 1)
    decoder.planners.clear()
    torch.set_num_threads(rng.randint(1, 3))
    lengths = [rng.choice([1, 2, rng.randint(1, 70), 64]) for _ in range(rng.randint(1, 4))]
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]
    configs = [some_config(rng) for _ in prompts]
    outs = decoder.generate_batch(prompts, configs, batch_size=rng.randint(1, 4))
    plain = decoder.generate_batch(prompts, [config.plain for config in configs])
    assert [out.token_ids for out in outs] == [out.token_ids for out in plain], (
        name,
        kind,
        prompts,
        configs,
    )


def choices(rng: random.Random) -> None:
    """Rows of any size, and such as hold no numbers."""
    dtype = rng.choice([FLOAT, HALF])
    size = rng.randint(1, 300)
    engine = decoder_with("biases", dtype).engine
    rows = rng.randint(1, 5)
    sampling = SamplingConfig(
        rng.choice([1e-6, 0.3, 2.0]), rng.choice([0, 1, 9, size]), rng.choice([1e-9, 0.7, 1.0])
    )
    for logits in (
        (torch.randn(rows, size) * rng.choice([0.1, 1, 50])).to(dtype),
        strange_rows(dtype),
    ):
        engine.draw(logits, torch.arange(len(logits)), sampling)
        engine.largest(logits, rng.randint(1, logits.shape[-1]))
    sats = strange_rows(dtype)[:2, :VOCAB]
    tree = make_tree((5, 2), 2)
    states = torch.zeros(2, engine.exact.struct.hidden, dtype=dtype)
    ids = torch.randint(VOCAB, (sats.shape[1],)) if rng.random() < 0.5 else None
    guesses = Guesses(torch.tensor([1]), states, sats, 0, sampling, ids)
    engine.draft(guesses, tree, shortlist=64)
    engine.grow(guesses, rng.choice([1, 2, 16, 90]))


if __name__ == "__main__":
    compiler.FLAGS[:1] = [
        "-O0",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    bindings.library()
    rng = random.Random(0)
    with torch.inference_mode():
        for _ in range(int(sys.argv[1])):
            generation(rng)
            choices(rng)
