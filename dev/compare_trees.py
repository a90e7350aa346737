"""Is one version of the package as fast as another? Both measured in turns, as a ratio.

    python dev/compare_trees.py OLD NEW [--problems N] [--turns N] [--only NAME] [--out FILE.json]

OLD and NEW are folders with a checkout each. Every one has a process of its own, which waits while
the other measures; on each HumanEval problem the two take turns, and who begins alternates.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

WORKER = """
import json, sys, time
from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.tasks.prompts import humaneval
from sdsat.decoding.decoder import Decoder
decoder = Decoder.load("smollm2-135m-sdsat", "bfloat16", "cpu")
generate, model = decoder.generate, decoder.model
"""
# The package before `Decoder`.
OLD_WORKER = """
import json, sys, time
from sdsat import decode, model as models
from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.prompts import humaneval
model = models.load("smollm2-135m-sdsat", "bfloat16", "cpu")
generate = lambda *arguments: decode.generate(model, *arguments)
"""
LOOP = """
problems = humaneval(model.tokenizer, int(sys.argv[1]))
for line in sys.stdin:
    number, settings = json.loads(line)
    settings["sampling"] = SamplingConfig(**settings.get("sampling", {}))
    config = DecodeConfig(**settings, stop_ids=model.stop_ids)
    out = generate(list(problems[number].prompt_ids), config)
    print(json.dumps([out.seconds, out.num_new_tokens, out.num_passes, out.token_ids]), flush=True)
"""
SETTINGS = {
    "ar": dict(k=0),
    "two-step, k = 5": dict(k=5, strategy="two-step"),
    "auto": dict(k=None, strategy="auto"),
    "auto, temperature 1.0": dict(
        k=None, strategy="auto", sampling=dict(temperature=1.0, top_k=10, top_p=0.95)
    ),
}


class Version:
    """A process that generates with the package of one checkout."""

    def __init__(self, folder, problems):
        old = (Path(folder) / "sdsat" / "decode.py").exists()
        program = (OLD_WORKER if old else WORKER) + LOOP
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(problems)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(folder).resolve())},
            cwd="/",
        )

    def ask(self, number, settings):
        """(seconds, new tokens, passes, token ids) of one generation."""
        self.process.stdin.write(json.dumps([number, settings]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--problems", type=int, default=6)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--only", action="append", choices=SETTINGS, help="all, if not given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    versions = {
        name: Version(folder, arguments.problems + 1)
        for name, folder in (("old", arguments.old), ("new", arguments.new))
    }
    rows = []
    for name in arguments.only or SETTINGS:
        settings = SETTINGS[name]
        asked = {**settings, "max_new_tokens": arguments.max_new_tokens}
        for version in versions.values():
            version.ask(arguments.problems, {**asked, "max_new_tokens": 32})  # not measured
        ratios = []
        same = 0
        seconds = {"old": 0.0, "new": 0.0}
        tokens = 0
        for turn in range(arguments.turns):
            for number in range(arguments.problems):
                order = ("old", "new") if (turn + number) % 2 else ("new", "old")
                found = {who: versions[who].ask(number, asked) for who in order}
                for who in order:
                    seconds[who] += found[who][0]
                tokens += found["new"][1]
                ratios.append(found["old"][0] / found["new"][0])
                same += found["old"][3] == found["new"][3]
        logs = [math.log(ratio) for ratio in ratios]
        error = 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
        mean = statistics.mean(logs)
        rows.append(
            {
                "strategy": name,
                "generations": len(ratios),
                "identical_outputs": same,
                "old_tokens_per_second": round(tokens / seconds["old"], 1),
                "new_tokens_per_second": round(tokens / seconds["new"], 1),
                "new_over_old": round(math.exp(mean), 4),
                "interval_95": [round(math.exp(mean - error), 4), round(math.exp(mean + error), 4)],
            }
        )
        print(json.dumps(rows[-1]))
    commits = {
        name: subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        for name, folder in (("old", arguments.old), ("new", arguments.new))
    }
    if arguments.out:
        document = {
            "what": "speed of a new version over an old one, in turns; geometric mean of ratios",
            "commits": commits,
            "cpu": subprocess.run(["lscpu"], capture_output=True, text=True)
            .stdout.split("Model name:")[1]
            .split("\n")[0]
            .strip(),
            "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
            "problems": arguments.problems,
            "turns": arguments.turns,
            "max_new_tokens": arguments.max_new_tokens,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
