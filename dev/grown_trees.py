"""Do drafts of a tree that grows where it is likeliest beat those of the fixed tree 2,2,1?

    python dev/grown_trees.py collect FOLDER.. --out PLACES.pt [--answers N]
    python dev/grown_trees.py compare PLACES.pt --out FILE.json
    python dev/grown_trees.py replay --out FILE.json [--problems N] [--passes FILE.json]
    python dev/grown_trees.py drafting --out FILE.json [--turns N]

`collect` has the default model answer requests about functions of the folders' Python code, which
its adapter must not have been trained on, and keeps what SATs say at places of the answers.
`compare` drafts there in all ways. As `auto`, it takes of each tree the n likeliest drafts, by
beliefs that learn from one place to the next, and counts those that the answer goes on with.
`replay` has `auto` answer HumanEval with each tree, and takes every pass for as long as the cost
curve says: so it tells trees apart by less than a clock can, and what else runs does no harm. The
curve is this machine's, or that of results of `scripts/pass_cost.py`, which may be another's. What
more drafting takes in a tree that grows is not in it: `drafting` measures that, in turns.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from sdsat.cli.program import run_app
from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.decoding import passes, strategies
from sdsat.decoding.auto_planner import AutoPlanner
from sdsat.decoding.beliefs import Acceptance
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.plan import reach
from sdsat.decoding.sequence import num_slots
from sdsat.engines.base import PassInput
from sdsat.engines.drafting import Guesses
from sdsat.evaluation.records import environment
from sdsat.evaluation.summary import interval
from sdsat.files import read_json, write_json
from sdsat.method.copies import copied, last_tokens
from sdsat.method.costs import COUNTS, CostCurve
from sdsat.method.drafts import Drafts
from sdsat.method.layout import SatGroup
from sdsat.method.tree import GROWN, DraftTree, make_tree
from sdsat.models.head import SHORTLIST
from sdsat.tasks.prompts import collect_prompts, humaneval

SAMPLINGS = {"greedy": SamplingConfig(), "nucleus, temperature 1.0": SamplingConfig(1.0, 10, 0.95)}
NEW_TOKENS = 160
EVERY = 6  # tokens from one place to the next
FIXED = "2,2,1"
PLAIN = "2,2,1, likely without noise"  # as it was before trees grew
NODES = (8, 12, 16, 24)
WAYS: dict[str, tuple[Any, int]] = {  # trees, and the nodes of those that grow
    FIXED: ((2, 2, 1), 0),
    **{f"grown, {nodes} nodes": (GROWN, nodes) for nodes in NODES},
}
VERIFIED = (1, 3, 5, 7, 11, 15)
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
        out = engine.forward([PassInput(cache, tokens, tree, (group,))])
        cache.commit(tuple(range(len(tokens))))
        places.append(
            {
                "text": torch.tensor(whole[: len(prompt) + emitted + 1]),
                "states": out.states[-k:].clone(),
                "best": tuple(out.sat_logits.topk(KEPT)),
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


def fixed(decoder: Decoder, place: dict[str, Any], tree: DraftTree, sampling: Any) -> Drafts:
    """Drafts of a tree that is given."""
    tokens, likely = decoder.engine.draft(_given(decoder, place, sampling), tree).tolist()
    return Drafts.of_sats(tree, [int(token) for token in tokens], likely, "root")


def without_noise(decoder: Decoder, place: dict[str, Any], drafts: Drafts) -> Drafts:
    """The same drafts, as likely as the SATs say: the noise of their places is not looked at."""
    model = decoder.model
    assert model.head is not None
    values, ids = (part[:, :SHORTLIST] for part in place["best"])
    likely = [1.0]
    for node in range(1, len(drafts.tokens)):
        parent = drafts.tree.parents[node]
        sat = drafts.tree.depths[parent]
        path = [drafts.tokens[above] for above in drafts.tree.path(parent)[1:]]
        text = place["text"]
        path = last_tokens(torch.cat([text, torch.tensor(path, dtype=torch.long)]))[None]
        known = torch.tensor([len(text)])
        found = copied(text[None], known, path, ids[sat : sat + 1])
        before = model.embed_standard(path[:, -1])
        rows = model.output_rows(ids[sat : sat + 1]).to(before.dtype)
        given = (values[sat : sat + 1].float(), place["states"][sat : sat + 1], before, rows, found)
        shares = model.head.rerank(*given).double().softmax(-1)[0]
        # of equals at the end of a shortlist another one may have been taken
        likely.append(float(shares[ids[sat] == drafts.tokens[node]].sum()))
    return replace(drafts, likely=likely)


def grown(decoder: Decoder, place: dict[str, Any], nodes: int, sampling: Any) -> Drafts:
    """Drafts of a tree that grows."""
    drafted = passes.drafts_of(
        None, decoder.engine.grow(_given(decoder, place, sampling), nodes).tolist()
    )
    return Drafts.of_sats(drafted.tree, drafted.tokens, drafted.likely, "root")


def _given(decoder: Decoder, place: dict[str, Any], sampling: Any) -> Guesses:
    """What a drafter is given; logits are of the largest that were kept."""
    values, ids = place["best"]
    least = torch.full((len(ids), decoder.model.vocabulary), -torch.inf, dtype=values.dtype)
    logits = least.scatter(1, ids, values)
    return Guesses(place["text"], place["states"], logits, place["index"], sampling)


def accepted(
    places: list[list[dict[str, Any]]], ways: list[list[Drafts]], k: int, known: Any
) -> Any:
    """[answers, len(VERIFIED)] drafts that the answers go on with, of the n likeliest each.

    ways: the drafts of every place. k, known: the planner's, of SATs.
    """
    found = np.zeros((len(places), len(VERIFIED)))
    for column, count in enumerate(VERIFIED):
        beliefs = Acceptance(k, known)
        for answer, (some, drafted) in enumerate(zip(places, ways, strict=True)):
            for place, drafts in zip(some, drafted, strict=True):
                through = reach(drafts.tree, beliefs.chances(drafts))
                likeliest = sorted(range(1, len(through)), key=lambda node: -through[node])
                kept = drafts.kept(sorted([0, *likeliest[:count]]))
                own = [*place["follows"], -1]  # nothing is known of what follows the last draft
                path = kept.tree.walk(kept.tokens, [own[depth] for depth in kept.tree.depths])
                found[answer, column] += len(path) - 1
                beliefs.observe(kept, path)
    return found


def difference(sums: Any) -> Any:
    """Accepted drafts a place, of the first way more than of the second."""
    return (sums[..., 0] - sums[..., 1]) / sums[..., 2]


@app.command()
def compare(places: Path, out: Annotated[Path, typer.Option()]) -> None:
    """Count what is accepted of the n likeliest drafts of each tree."""
    decoder = Decoder.load("smollm2-135m-sdsat", "bfloat16", "cpu")
    adapter = decoder.model.adapter
    assert adapter is not None
    k = adapter.config.sat.k
    rows = []
    for name, answers in torch.load(places).items():
        answers = [some for some in answers if some]
        sampling = SAMPLINGS[name]
        with torch.inference_mode():
            tree = make_tree((2, 2, 1), k)
            ways = {
                FIXED: [[fixed(decoder, at, tree, sampling) for at in some] for some in answers]
            }
            if not sampling.greedy:
                ways[PLAIN] = [
                    [without_noise(decoder, *each) for each in zip(*both, strict=True)]
                    for both in zip(answers, ways[FIXED], strict=True)
                ]
            for nodes in NODES:
                ways[f"grown, {nodes} nodes"] = [
                    [grown(decoder, at, nodes, sampling) for at in some] for some in answers
                ]
        known = adapter.config.training.get("accuracy_by_depth", [])
        counts = {way: accepted(answers, drafts, k, known) for way, drafts in ways.items()}
        base = counts[PLAIN if PLAIN in counts else FIXED]
        number = np.array([len(some) for some in answers])
        for way, found in counts.items():
            each = [np.stack([*pair, number], 1) for pair in zip(found.T, base.T, strict=True)]
            rows.append(
                {
                    "sampling": name,
                    "drafts": way,
                    "answers": len(answers),
                    "places": int(number.sum()),
                    "accepted": [round(float(v), 4) for v in found.sum(0) / number.sum()],
                    "more_than_before": [round(float(difference(one.sum(0))), 4) for one in each],
                    "interval_95": [interval(one, difference) for one in each],
                }
            )
            print(json.dumps(rows[-1]))
    write_json(
        out,
        {
            "what": "accepted drafts a place, of the n likeliest drafts of each tree; "
            "differences from the first tree by probability alone, BCa over answers",
            "verified": VERIFIED,
            "environment": environment(decoder),
            "rows": rows,
        },
    )


class Replayed(AutoPlanner):
    """`auto` in a world where passes take what the cost curve says.

    Attributes:
        spent: seconds of all passes.
    """

    spent = 0.0

    def observe_pass(self, rows: int, sats: int, context: int, seconds: float) -> None:
        """See Planner.observe_pass; of one sequence."""
        seconds = self.costs.curve.seconds(rows, sats, context, 1)
        Replayed.spent += seconds
        super().observe_pass(rows, sats, context, seconds)

    def observe_drafting(self, sats: int, context: int, seconds: float) -> None:
        """See Planner.observe_drafting."""
        seconds = self.costs.curve.rounded_seconds(sats, context)
        Replayed.spent += seconds
        super().observe_drafting(sats, context, seconds)


def curve_of(file: Path) -> CostCurve:
    """Make a cost curve of the times of passes that were measured on some machine."""
    by_context = {part["context"]: part["milliseconds"] for part in read_json(file)["contexts"]}

    def seconds(kind: str) -> list[list[float]]:
        rows = []
        for context in (256, 1024):
            times = {int(count): time for count, time in by_context[context][kind].items()}
            near = {int(count): time for count, time in by_context[256][kind].items()}
            # Large passes were measured after few tokens alone.
            more = times[max(times)] - near[max(times)]
            full = {count: times.get(count, time + more) for count, time in near.items()}
            rows.append(np.interp(COUNTS, list(full), list(full.values())) / 1e3)
        return [row.tolist() for row in rows]

    kinds = ("verify, native", "draft, native", "draft in 8 bits, native")
    verify, draft, rounded = map(seconds, kinds)
    return CostCurve(verify, draft, 5e-5, rounded)


@app.command()
def drafting(out: Annotated[Path, typer.Option()], turns: int = 200) -> None:
    """Time drafting with the SATs of one pass, each tree in turn."""
    decoder = Decoder.load("smollm2-135m-sdsat", "bfloat16", "cpu")
    engine = decoder.engine
    assert decoder.model.sat is not None
    k = decoder.model.sat.k
    prompt = list(humaneval(decoder.model.tokenizer, 1)[0].prompt_ids)
    rows = []
    with torch.inference_mode():
        cache = engine.new_cache(num_slots(len(prompt), k))
        engine.prefill(cache, torch.tensor(prompt[:-1]))
        passed = PassInput(cache, prompt[-1:], make_tree("chain", 0), (SatGroup(0, k),))
        out = engine.forward([passed])
        for name, sampling in SAMPLINGS.items():
            x = out.logits.argmax(-1)
            guesses = Guesses(x, out.states[1:], out.sat_logits, 1, sampling)
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(turns):
                for way, (tree, nodes) in WAYS.items():
                    began = time.perf_counter()
                    if tree == GROWN:
                        found = engine.grow(guesses, nodes)
                    else:
                        tree = make_tree(tree, k)
                        found = engine.draft(guesses, tree)
                    passes.drafts_of(None if nodes else tree, found.tolist())
                    times[way].append(1e3 * (time.perf_counter() - began))
            for way, taken in times.items():
                # Whatever else runs only adds to what drafting takes.
                least = round(min(taken), 3)
                rows.append({"sampling": name, "drafts": way, "least_ms": least})
                print(json.dumps(rows[-1]))
    write_json(
        out,
        {
            "what": "drafting with the SATs of one pass, the tree's layout included, in turns",
            "k": k,
            "turns": turns,
            "environment": environment(decoder),
            "rows": rows,
        },
    )


@app.command()
def replay(
    out: Annotated[Path, typer.Option()],
    problems: int = 12,
    new_tokens: int = 128,
    passes_of: Annotated[Path | None, typer.Option("--passes")] = None,
) -> None:
    """Have `auto` answer problems with each tree, by the cost curve's time."""
    decoder = Decoder.load("smollm2-135m-sdsat", "bfloat16", "cpu")
    prompts = [list(task.prompt_ids) for task in humaneval(decoder.model.tokenizer, problems)]
    strategies.PLANNERS["auto"] = lambda config: Replayed
    if passes_of is not None:
        decoder.costs = curve_of(passes_of)
    curve = decoder.cost_curve()
    rows = []
    for name, sampling in SAMPLINGS.items():
        found = {way: np.zeros((len(prompts), 3)) for way in WAYS}  # seconds, passes, tokens
        outputs = []
        for way, (tree, nodes) in WAYS.items():
            decoder.planners.clear()
            passes.GROWN_NODES = nodes
            config = DecodeConfig(
                None,
                new_tokens,
                tree,
                sampling,
                stop_ids=decoder.model.stop_ids,
                strategy="auto",
            )
            answers = []
            for number, prompt in enumerate(prompts):
                Replayed.spent = 0.0
                answer = decoder.generate(prompt, config)
                answers.append(answer.token_ids)
                found[way][number] = (
                    Replayed.spent,
                    answer.num_passes - answer.num_rounded_passes,
                    answer.num_new_tokens,
                )
            outputs.append(answers)
            seconds, num_passes, tokens = found[way].sum(0)
            pair = np.stack([found[FIXED][:, 0], found[way][:, 0]], 1)
            rows.append(
                {
                    "sampling": name,
                    "drafts": way,
                    "outputs_equal": answers == outputs[0],
                    "tokens_a_second": round(tokens / seconds, 2),
                    "tokens_a_pass": round(tokens / num_passes, 3),
                    "over_fixed": round(float(pair[:, 0].sum() / pair[:, 1].sum()), 4),
                    "interval_95": interval(pair, lambda sums: sums[..., 0] / sums[..., 1]),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    write_json(
        out,
        {
            "what": "auto with each tree, seconds by the cost curve; ratios of tokens a second to "
            "the fixed tree's, BCa over problems; rounded passes count in seconds alone",
            "problems": len(prompts),
            "new_tokens": new_tokens,
            "costs": asdict(curve),
            "costs_of": passes_of.name if passes_of else None,
            "environment": environment(decoder),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    run_app(app)
