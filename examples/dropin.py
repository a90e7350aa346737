"""SDSAT in a program that calls `model.generate`: `python examples/dropin.py [MODEL] [--prompt
TEXT] [--stop TEXT]`.

MODEL is whatever `sdsat.load` takes; the default is the small embedded one.
"""

import argparse
import time

import torch
from transformers import TextStreamer

import sdsat

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="smollm2-135m-sdsat")
parser.add_argument("--prompt", default="def is_palindrome(text: str) -> bool:\n")
parser.add_argument("--stop", default="\n\n")
arguments = parser.parse_args()

# A transformers model and its tokenizer, as AutoModelForCausalLM and AutoTokenizer would give them,
# and ready to draft. For a model that you have loaded yourself: sdsat.attach(model, tokenizer,
# "runs/adapter").
model, tokenizer = sdsat.load(arguments.model, dtype="float32")
inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
settings = dict(max_new_tokens=64, do_sample=False)

# As always ..
began = time.perf_counter()
plain = model.generate(**inputs, **settings)
plain_seconds = time.perf_counter() - began

# .. and with drafts: one argument more. The first call measures once what passes cost on this
# machine.
model.generate(**inputs, **settings, custom_generate=sdsat.generate)
began = time.perf_counter()
drafted = model.generate(**inputs, **settings, custom_generate=sdsat.generate)
seconds = time.perf_counter() - began
same = "the same" if torch.equal(plain, drafted) else "another"
print(
    tokenizer.decode(drafted[0]),
    f"\n\n{same} output: plain {plain_seconds:.2f} s, with SATs {seconds:.2f} s",
)

# What transformers lets you set stays as it is: processors, stop strings (the tokenizer is known),
# streamers, batches, scores.
model.generate(
    **inputs,
    max_new_tokens=32,
    repetition_penalty=1.1,
    stop_strings=[arguments.stop],
    streamer=TextStreamer(tokenizer),
    custom_generate=sdsat.generate,
)

# Sampling is reproducible with a seed, whatever drafts; `generations` says how each output came
# about.
out = model.generate(
    **inputs,
    max_new_tokens=32,
    do_sample=True,
    temperature=0.8,
    top_p=0.95,
    num_return_sequences=2,
    seed=1,
    strategy="two-step",
    return_dict_in_generate=True,
    custom_generate=sdsat.generate,
)
for ids, generation in zip(out.sequences, out.generations, strict=True):
    print(
        f"--- {generation.tokens_per_pass:.2f} tokens a pass, "
        f"{generation.acceptance_rate:.0%} of drafts "
        "accepted"
    )
    print(tokenizer.decode(ids))

# What can't be honoured is refused, never ignored.
try:
    model.generate(**inputs, max_new_tokens=8, num_beams=4, custom_generate=sdsat.generate)
except sdsat.InputError as error:
    print(f"--- refused: {error}")
