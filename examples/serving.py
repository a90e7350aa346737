"""A client of `sdsat serve`, or of `vllm serve` with an SDSAT draft: the plain `openai` client,
which need not know of it (docs/serving.md).

sdsat export ADAPTER --out runs/draft  prints the server's command; add --served-model-name sdsat
.venv-vllm/bin/python examples/serving.py [QUESTION]

OPENAI_BASE_URL: where the server is, if not here on port 8000. OPENAI_MODEL: the model's name
there, if not sdsat.
"""

import os
import sys

import openai

client = openai.OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none"
)
question = (
    " ".join(sys.argv[1:]) or "Write a Python function that reverses the words of a sentence."
)
stream = client.chat.completions.create(
    model=os.environ.get("OPENAI_MODEL", "sdsat"),
    messages=[{"role": "user", "content": question}],
    max_tokens=200,
    temperature=0,
    stream=True,
)
for event in stream:
    if event.choices:
        print(event.choices[0].delta.content or "", end="", flush=True)
print()
