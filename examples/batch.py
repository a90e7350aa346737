"""Many prompts at once: `python examples/batch.py [MODEL] [--batch-size N] [PROMPT ..]`.

MODEL is whatever `sdsat.load` takes; the default is the small embedded one.
"""

import argparse

import sdsat
from sdsat.config import DecodeConfig, SamplingConfig

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="smollm2-135m-sdsat")
parser.add_argument(
    "prompts",
    nargs="*",
    default=["def add(a, b):", "def is_even(number: int) -> bool:", "class Stack:"],
)
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--max-new-tokens", type=int, default=32)
arguments = parser.parse_args()
model, tokenizer = sdsat.load(arguments.model)

# The transformers way: one call, prompts padded on the left. Every pass carries the rows of all
# sequences that go on, and each accepts as many of its own drafts as hold.
tokenizer.padding_side = "left"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)
inputs = tokenizer(arguments.prompts, return_tensors="pt", padding=True).to(model.device)
out = model.generate(
    **inputs,
    max_new_tokens=arguments.max_new_tokens,
    do_sample=False,
    pad_token_id=tokenizer.pad_token_id,
    return_dict_in_generate=True,
    custom_generate=sdsat.generate,
)
for prompt, ids, generation in zip(arguments.prompts, out.sequences, out.generations, strict=True):
    print(f"--- {prompt}: {generation.num_new_tokens} tokens in {generation.num_passes} passes")
    print(tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True))

# A queue: at most so many at once, and the next prompt enters when an output ends. Every prompt may
# have settings of its own.
prompts = [tokenizer(prompt)["input_ids"] for prompt in arguments.prompts]
settings = dict(
    k=model.sdsat.model.sat.k,
    strategy="auto",
    max_new_tokens=arguments.max_new_tokens,
    stop_ids=model.sdsat.model.stop_ids,
)
configs = [
    DecodeConfig(**settings, sampling=SamplingConfig(temperature=0.8, seed=seed))
    for seed in range(len(prompts))
]
queued = model.sdsat.generate_batch(prompts, configs, batch_size=arguments.batch_size)

# A batch changes no output: each one is that of its prompt alone.
(alone,) = model.sdsat.generate_batch(prompts[-1:], configs[-1:])
same = "the same" if alone.token_ids == queued[-1].token_ids else "another"
print(f"--- the last prompt alone: {same} output")
