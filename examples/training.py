"""An adapter for a model of your own: `python examples/training.py MODEL SOURCE --out FOLDER
[--prompts N] [--steps N]`.

MODEL: a hub id or a directory of a plain model. SOURCE: a folder of Python code, a .jsonl (key
prompt) or a .txt file of prompts. The same as `sdsat distill`, `sdsat train`, `sdsat inspect` and
`sdsat generate` on the command line; every step resumes. The defaults are a first try of some
minutes: a good adapter takes thousands of answers and steps (docs/training.md).
"""

import argparse
import json
from pathlib import Path

from sdsat.config import DecodeConfig, DistillConfig, TrainConfig
from sdsat.decoding.decoder import Decoder
from sdsat.models.loading import load
from sdsat.training.distill import distill
from sdsat.training.loop import train
from sdsat.training.shards import read_sequences

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("source")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--prompts", type=int, default=256)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--max-new-tokens", type=int, default=128)
parser.add_argument("--held-out", type=int, default=16)
parser.add_argument("--rank", type=int, default=32)
arguments = parser.parse_args()

# Acceptance is measured against the model's own output, so its own answers are what SATs learn
# from.
base = Decoder.load(arguments.model)
how = DistillConfig(limit=arguments.prompts, max_new_tokens=arguments.max_new_tokens)
distill(base, [arguments.source], arguments.out / "data", how)

# The base stays as it is, to the bit: what trains is the SAT's embedding, updates that act on SATs
# alone, and the draft head.
base = load(arguments.model)
sequences = read_sequences(arguments.out / "data", base.tokenizer)
config = TrainConfig(
    steps=arguments.steps,
    k=5,
    rank=arguments.rank,
    anchors=48,
    eval_every=max(1, arguments.steps // 4),
    held_out=arguments.held_out,
)
train(base, sequences, arguments.out / "adapter", config)
log = [
    json.loads(line)
    for line in (arguments.out / "adapter/train_log.jsonl").read_text().splitlines()
]
print("accepted drafts per loop, held out:", [entry["accepted_per_loop"] for entry in log])

# The adapter's directory is a model like any other.
decoder = Decoder.load(str(arguments.out / "adapter"))
prompt = sequences[0].ids[: sequences[0].prompt_length].tolist()
settings = dict(max_new_tokens=arguments.max_new_tokens, stop_ids=decoder.model.stop_ids)
plain = decoder.generate(prompt, DecodeConfig(**settings))
drafted = decoder.generate(prompt, DecodeConfig(k=5, strategy="auto", **settings))
print("the same" if plain.token_ids == drafted.token_ids else "another", "output as without drafts")
print(
    f"{drafted.tokens_per_pass:.2f} tokens a pass, {drafted.acceptance_rate:.0%} of the "
    "drafts "
    "accepted"
)
