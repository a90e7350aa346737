"""Records what planners answer in a made-up world, to be asked again: tests/data/plans.json.gz.

The record was made by the planners as they were before commit 48e09c6's `AutoPlanner` was taken
apart, but for when SATs are tried in vain: more rarely since, and beside looked-up drafts too; and
for what rounded passes are taken to cost before one was seen.
test_planner.py asks today's planners the same. Run `python tests/record_plans.py` to replace the
record where plans are meant to change.

A record is a list of cases: the planner's settings; `drafts`, as `DRAFTS` names their parts; and
`calls` in order, each with its arguments and, last, the answer. Drafts are given by number.
"""

import gzip
import json
import random
from pathlib import Path

from sdsat.config import LOOKUP, DecodeConfig
from sdsat.decoding.auto_planner import AutoPlanner
from sdsat.decoding.fixed_planner import FixedPlanner
from sdsat.decoding.strategies import PLANNERS
from sdsat.method.costs import COUNTS, CostCurve
from sdsat.method.drafts import Drafts
from sdsat.method.tree import DraftTree, make_tree

FILE = Path(__file__).parent / "data" / "plans.json.gz"
DRAFTS = ("parents", "ranks", "tokens", "likely", "looked_up", "kind", "rounded")
X = 1  # every last true token
LOOKED_UP = 0.8  # how likely a looked-up draft is said to be


def curve(seconds, rounded=None, context=1.0, drafting=0.01, measured=False):
    """Seconds of passes of n rows near the start; after a long context `context` times as many."""
    near = [seconds(n) for n in COUNTS]
    both = [near, [round(context * time, 4) for time in near]]
    draft = [[round(1.04 * time, 4) for time in row] for row in both]
    fast = [[round(rounded(n), 4) for n in COUNTS]] * 2 if rounded else []
    return CostCurve(both, draft, drafting, fast, measured)


MILD = curve(lambda n: round(1 + 0.05 * n, 4), lambda n: 0.5 + 0.05 * n, 1.3)
KNEE = curve(
    lambda n: round(1 + 0.02 * n + 0.1 * max(0, n - 8), 4),
    lambda n: 0.6 + 0.02 * n + 0.08 * max(0, n - 8),
    1.2,
)
EXACT = curve(lambda n: round(1 + 0.03 * n, 4), context=1.5)
STEEP = curve(lambda n: round(0.3 + 0.7 * n, 4), lambda n: 0.2 + 0.6 * n)
FREE = curve(lambda n: round(1 + 0.004 * n, 4), context=1.1)  # as on a GPU
BUSY = curve(lambda n: round(2 + 0.05 * n, 4), lambda n: 1.2 + 0.05 * n, measured=True)
GOOD = (0.5, 1.0)
MIXED = (0.0, 1.0)
POOR = (0.0, 0.3)


def case(name, passes, config, costs, claims=MIXED, batch=1, truth=None, length=60):
    """passes: how many; claims: what SATs say of their drafts; truth: factor on the curve's
    seconds, by number of pass; length: tokens of an answer, at most.
    """
    return dict(
        name=name,
        passes=passes,
        config=config,
        costs=costs,
        claims=claims,
        batch=batch,
        truth=truth or (lambda number: 1.0),
        length=length,
    )


def auto(k, tree="chain", lookup=0, budget=None, strategy="auto"):
    return DecodeConfig(k, 60, tree, strategy=strategy, lookup=lookup, budget=budget)


CASES = [
    case("rounded, lookup, tree", 260, auto(5, (2, 2, 1), 12), MILD),
    case("rounded, chain", 200, auto(7), MILD, GOOD),
    case("rounded, budget", 160, auto(5, lookup=8, budget=10), KNEE, GOOD),
    case("exact, tree", 200, auto(4, (2, 2, 1)), EXACT),
    case("exact, lookup", 160, auto(3, lookup=12), EXACT, POOR),
    case("one-pass", 200, auto(5, (2, 2), 6, strategy="one-pass"), EXACT, GOOD),
    case("nothing pays", 300, auto(3), STEEP, POOR),
    case("rounded fades", 200, auto(5), STEEP, MIXED, 1, lambda number: 0.8 + 0.9 * (number > 89)),
    case("a busy machine's curve", 160, auto(5), BUSY, GOOD, 1, lambda number: 0.4),
    case("batch of 4", 130, auto(5, (2, 1), 12), KNEE, MIXED, 4),
    case("batch of 4, exact", 110, auto(5, lookup=12), EXACT, GOOD, 4),
    case("batch of 4, nothing pays", 160, auto(4), STEEP, POOR, 4),
    case("rows nearly free", 150, auto(5, (2, 2, 1), 6), FREE),
    case("rows nearly free, budget", 100, auto(4, (2, 2), budget=20), FREE),
    case("drafts pay all along", 230, auto(2), FREE, (0.9, 1.0), length=2000),
    case("two-step", 60, DecodeConfig(5, 60, (2, 2, 1), lookup=4), EXACT),
    case("rounded", 60, DecodeConfig(5, 60, "chain", strategy="rounded", lookup=4), MILD),
    case("one-pass, fixed", 60, auto(5, (2, 2, 1), 8, 24, "one-pass"), EXACT),
    case("lookup", 60, DecodeConfig(0, 60, strategy=LOOKUP, lookup=12), EXACT),
    case("AR", 20, DecodeConfig(0, 60), EXACT),
]


def build(config, costs):
    """The planner of a case."""
    kind = PLANNERS[config.strategy](config) if config.k else FixedPlanner
    learns = issubclass(kind, AutoPlanner)
    return kind(config, costs, config.k, [0.7, 0.6]) if learns else kind(config)


def halves(values):
    """(tokens, how likely each is) of what an engine's `draft` gives, flat."""
    count = len(values) // 2
    return [int(value) for value in values[:count]], values[count:]


class Recorder:
    """A planner whose calls are written down."""

    def __init__(self, planner):
        self.planner = planner
        self.drafts = []
        self.calls = []

    def number(self, drafts):
        """Where the drafts stand in the record."""
        for number in range(len(self.drafts) - 1, -1, -1):
            if self.drafts[number] is drafts:
                return number
        self.drafts.append(drafts)
        return len(self.drafts) - 1

    def share(self, batch, context):
        self.planner.share(batch, context)
        self.calls.append(["share", batch, context, None])

    def draft_first(self, drafts, left, context):
        count = self.planner.draft_first(drafts, left, context)
        self.calls.append(["draft_first", self.number(drafts), left, context, count])
        return count

    def plan(self, drafts, left, context):
        plan = self.planner.plan(drafts, left, context)
        answer = [plan.nodes, plan.groups, plan.kinds]
        self.calls.append(["plan", self.number(drafts), left, context, answer])
        return plan

    def observe(self, drafts, plan, path):
        """drafts: as they were planned, all of them."""
        self.planner.observe(drafts.kept(plan.nodes), plan, path)
        self.calls.append(["observe", self.number(drafts), path, None])

    def observe_drafting(self, sats, context, seconds):
        self.planner.observe_drafting(sats, context, seconds)
        self.calls.append(["observe_drafting", sats, context, seconds, None])

    def observe_pass(self, rows, sats, context, seconds):
        self.planner.observe_pass(rows, sats, context, seconds)
        known = [getattr(self.planner, "size", 0), float(f"{getattr(self.planner, 'rate', 0):.9g}")]
        self.calls.append(["observe_pass", rows, sats, context, seconds, known])

    def take(self, costs):
        self.planner.take(costs)
        self.calls.append(["take", None])


class Text:
    """A sequence with true tokens by chance; drafts are right where they say the same."""

    def __init__(self, chance, config, length):
        self.chance = chance
        self.config = config
        self.left = chance.randint(length // 3, length)
        self.context = chance.choice([40, 300, 1200])
        self.future = [chance.randint(2, 99) for _ in range(self.left + 100)]
        self.drafts = Drafts.none(X)

    def below(self, size, claims, root):
        """[tree, values] as SATs draft them; root: which of `future` the token at the root is."""
        tree = make_tree(self.config.tree, self.config.num_sats).truncated(size)
        believed = self.chance.choice([1.0, 1.0, 0.3])  # how far claims are true just now
        tokens = {(0, 0): self.future[root] if root >= 0 else X}
        likely = {(0, 0): 1.0}
        for depth in range(1, size + 1):
            first = round(self.chance.uniform(*claims), 2)
            second = round(0.6 * (1 - first), 2)
            draw = self.chance.random()
            right = 0 if draw < believed * first else 1 if draw < believed * (first + second) else 2
            for rank, share in enumerate([first, second]):
                wrong = 100 * (1 + rank) * (rank != right)
                tokens[depth, rank] = self.future[root + depth] + wrong
                likely[depth, rank] = share
        places = list(zip(tree.depths, tree.ranks, strict=True))
        return tree, [
            *(float(tokens[place]) for place in places),
            *(likely[place] for place in places),
        ]

    def look_up(self):
        """Now and then a looked-up chain joins the drafts."""
        if not self.config.num_lookup or self.chance.random() > 0.3:
            return
        count = self.chance.randint(1, self.config.num_lookup)
        right = self.chance.choice([0, 1, 3, count, count])
        chain = [*self.future[:right], *[7] * count][:count]
        self.drafts = self.drafts.with_chain(chain, LOOKED_UP)

    def step(self, planner, plan, claims):
        """Walk, tell the planner, and take the drafts below the place where the walk ends."""
        kept = self.drafts.kept(plan.nodes)
        path = kept.tree.walk(kept.tokens, [self.future[depth] for depth in kept.tree.depths])
        planner.observe(self.drafts, plan, path)
        self.future = self.future[len(path) :]
        self.left -= len(path)
        self.context += len(path)
        self.drafts = Drafts.none(X)
        for size in [size for node, size in plan.groups if node == path[-1]]:
            tree, values = self.below(size, claims, -1)
            tokens, likely = halves(values)
            self.drafts = Drafts.of_sats(tree, tokens, likely, plan.kind(path[-1]))


def record(case, seed):
    """One case, played."""
    chance = random.Random(seed)
    config = case["config"]
    costs = case["costs"]
    planner = Recorder(build(config, costs))
    length = case["length"]
    texts = [Text(chance, config, length) for _ in range(case["batch"])]

    def timed(seconds, number):
        return float(f"{seconds * case['truth'](number) * chance.uniform(0.85, 1.2):.5g}")

    for number in range(case["passes"]):
        live = texts if number % 40 < 30 else texts[: (1 + len(texts)) // 2]
        claims = POOR if 60 <= number % 150 < 90 else case["claims"]
        wanting = []
        for text in live:
            planner.share(len(live), text.context)
            text.look_up()
            if count := planner.draft_first(text.drafts, text.left, text.context):
                wanting.append((text, count))
        for text, count in wanting:
            tree, values = text.below(count, claims, 0)
            values[0] += 500 * (chance.random() < 0.06)  # the rounded pass erred itself
            text.drafts = Drafts.of_rounded(X, tree, *halves(values))
            text.look_up()
        context = sum(text.context for text in live) // len(live)
        if wanting:
            sats = sum(1 + count for _, count in wanting) - 1
            seconds = timed(costs.rounded_seconds(sats, context), number)
            planner.observe_drafting(sats, context, seconds)
        plans = [planner.plan(text.drafts, text.left, text.context) for text in live]
        for text, plan in zip(live, plans, strict=True):
            text.step(planner, plan, claims)
        sats = sum(size for plan in plans for _, size in plan.groups)
        rows = sats + sum(len(plan.nodes) for plan in plans)
        seconds = timed(costs.seconds(rows, sats, context, len(live)), number)
        planner.observe_pass(rows, sats, context, seconds)
        texts = [text if text.left > 0 else Text(chance, config, length) for text in texts]
        if isinstance(planner.planner, AutoPlanner) and planner.planner.costs.outpaced:
            planner.take(costs)
    return {
        "name": case["name"],
        "config": {
            name: getattr(config, name) for name in ("k", "tree", "strategy", "budget", "lookup")
        },
        "costs": [costs.verify, costs.draft, costs.drafting, costs.rounded, costs.measured],
        "drafts": [
            [drafts.tree.parents, drafts.tree.ranks]
            + [getattr(drafts, name) for name in DRAFTS[2:]]
            for drafts in planner.drafts
        ],
        "calls": planner.calls,
    }


def read():
    """The recorded cases, with settings, costs and drafts as they are passed."""
    cases = json.loads(gzip.decompress(FILE.read_bytes()))
    for case in cases:
        config = case["config"]
        tree = config["tree"] if isinstance(config["tree"], str) else tuple(config["tree"])
        case["config"] = DecodeConfig(**{**config, "tree": tree})
        case["costs"] = CostCurve(*case["costs"])
        case["drafts"] = [
            Drafts(DraftTree(tuple(parents), tuple(ranks)), *parts)
            for parents, ranks, *parts in case["drafts"]
        ]
    return cases


def main():
    """Play every case and write the file."""
    cases = [record(case, seed) for seed, case in enumerate(CASES)]
    FILE.parent.mkdir(exist_ok=True)
    text = json.dumps(cases, separators=(",", ":"))
    FILE.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
