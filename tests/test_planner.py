"""Plans against brute force, the rules that they keep, what `auto` makes of a known world, and the
cost curve.
"""

import itertools
import json
import random
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from common import tiny_llama, with_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from record_plans import build, read

from sdsat.config import ALL_STRATEGIES, MAX_ROWS, STRATEGIES, DecodeConfig, SamplingConfig
from sdsat.decoding import auto_planner
from sdsat.decoding.auto_planner import AutoPlanner
from sdsat.decoding.beliefs import loop_rate
from sdsat.decoding.decoder import Decoder
from sdsat.decoding.fixed_planner import (
    FixedPlanner,
    OnePassPlanner,
    RoundedPlanner,
    TwoStepPlanner,
)
from sdsat.decoding.plan import KINDS, PLACES, PLAIN, Plan, ends, reach
from sdsat.decoding.search import MARGIN, MAX_GROUPS, Terms, search
from sdsat.decoding.strategies import PLANNERS
from sdsat.engines import calibrate
from sdsat.method.costs import CONTEXTS, COUNTS, CostCurve
from sdsat.method.drafts import Drafts
from sdsat.method.tree import DraftTree, make_tree


def curve(seconds, drafting=0.0, rounded=None):
    """A cost curve whose passes of n rows take seconds(n), SATs or not, at every context; in 8 bits
    rounded(n).
    """
    times = [[seconds(n) for n in COUNTS]] * 2
    return CostCurve(times, times, drafting, [[rounded(n) for n in COUNTS]] * 2 if rounded else [])


FLAT = curve(lambda n: 1.0)
LINEAR = curve(lambda n: 1 + 0.15 * n)
STEEP = curve(lambda n: 1.0 * n)
ROUNDED = curve(lambda n: 1 + 0.06 * n, rounded=lambda n: 0.55 + 0.06 * n)
DEAR = curve(lambda n: 1.0 * n, rounded=lambda n: 0.9 * n)
CURVES = {
    "rounded": ROUNDED,
    "dear": DEAR,
    "flat": FLAT,
    "mild": curve(lambda n: 1 + 0.05 * n),
    "linear": LINEAR,
    "steep": STEEP,
}
FIXED = {"two-step": TwoStepPlanner, "rounded": RoundedPlanner, "one-pass": OnePassPlanner}


@st.composite
def trees(draw, most):
    count = draw(st.integers(1, most))
    parents = (-1, *(draw(st.integers(0, node - 1)) for node in range(1, count)))
    return DraftTree(parents, (0,) * count)


def outcomes(tree, likely):
    """(probability, node where the walk ends) of every way in which each node's true child, or none
    of them, can turn out.
    """
    choices = [[(likely[child], child) for child in children] for children in tree.children()]
    for options in choices:
        options.append((1 - sum(p for p, _ in options), None))
    for turned_out in itertools.product(*choices):
        node = 0
        probability = 1.0
        for p, _ in turned_out:
            probability *= p
        while turned_out[node][1] is not None:
            node = turned_out[node][1]
        yield probability, node


@settings(max_examples=40, deadline=None)
@given(trees(7), st.randoms(use_true_random=False))
def test_reach_and_ends_are_those_of_all_outcomes(tree, chance):
    likely = [1.0] * len(tree)
    for children in tree.children():
        # the last one's is that of no child at all
        shares = [0.01 + chance.random() for _ in range(len(children) + 1)]
        for child, share in zip(children, shares, strict=False):
            likely[child] = share / sum(shares)
    through = [0.0] * len(tree)
    ending = [0.0] * len(tree)
    for probability, node in outcomes(tree, likely):
        ending[node] += probability
        while node >= 0:
            through[node] += probability
            node = tree.parents[node]
    assert reach(tree, likely) == pytest.approx(through)
    assert ends(tree, through) == pytest.approx(ending)


def test_ends_are_never_negative():
    """Two guesses from different sources may be likely at once, more than one in all."""
    tree = DraftTree((-1, 0, 0), (0, 0, 0))
    assert ends(tree, reach(tree, [1.0, 0.9, 0.6])) == [0.0, 0.9, 0.6]


@st.composite
def some_drafts(draw, depth=20):
    """A tree that SATs drafted, with looked-up drafts in it; or a chain of looked-up drafts; or x
    alone.
    """
    chance = draw(st.randoms(use_true_random=False))
    by_sats = draw(st.booleans())
    tree = draw(trees(24)) if by_sats else make_tree("chain", draw(st.integers(0, depth)))
    looked_up = [False, *(not by_sats or chance.random() < 0.3 for _ in range(len(tree) - 1))]
    likely = [1.0, *(chance.random() for _ in range(len(tree) - 1))]
    return Drafts(
        tree,
        list(range(len(tree))),
        likely,
        looked_up,
        "root" if by_sats and len(tree) > 1 else "none",
    )


def assert_sound(plan, drafts, left, k):
    tree = drafts.tree
    nodes = plan.nodes
    assert nodes == sorted(set(nodes)) and nodes[0] == 0 and nodes[-1] < len(tree)
    assert all(tree.parents[node] in nodes for node in nodes[1:])
    depths = [tree.depths[node] for node in nodes]
    assert max(depths) + 1 <= left  # an accepted draft of depth d makes d + 1 tokens
    assert len({node for node, _ in plan.groups}) == len(plan.groups)
    for node, size in plan.groups:
        assert 0 <= node < len(nodes) and 1 <= size <= k
        # of which the pass that verifies the group's drafts makes one of its own
        still = left - (depths[node] + 1)
        assert size <= still - 1


def rows_of(plan):
    return len(plan.nodes) + sum(size for _, size in plan.groups)


CASES = dict(
    drafts=some_drafts(),
    left=st.integers(1, 9),
    k=st.integers(1, 6),
    budget=st.integers(2, 60),
    strategy=st.sampled_from(["two-step", "one-pass"]),
)


@settings(max_examples=40, deadline=None)
@given(**{**CASES, "strategy": st.just("rounded")})
def test_rounded_drafts_before_every_pass_that_can_use_drafts(drafts, left, k, budget, strategy):
    planner = FIXED[strategy](DecodeConfig(k, budget=budget, strategy=strategy))
    assert planner.draft_first(drafts, left, 100) == max(0, min(k, left - 2))
    plan = planner.plan(drafts, left, 100)
    assert plan == Plan([node for node, depth in enumerate(drafts.tree.depths) if depth < left])


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_fixed_plans_are_sound(drafts, left, k, budget, strategy):
    plan = FIXED[strategy](DecodeConfig(k, budget=budget, strategy=strategy)).plan(
        drafts, left, 100
    )
    assert_sound(plan, drafts, left, k)
    rows = budget if strategy == "one-pass" else len(drafts.tokens) + k
    if not drafts.by_sats and left > 2:
        assert plan == Plan([0], ((0, min(k, left - 2, rows - 1)),))  # time to draft
    elif strategy == "two-step":
        assert plan.groups == ()
    if drafts.by_sats:
        assert (
            plan.nodes
            == [node for node, depth in enumerate(drafts.tree.depths) if depth < left][:rows]
        )


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_one_pass_drafts_on_where_the_walk_most_likely_ends(drafts, left, k, budget, strategy):
    plan = FIXED["one-pass"](DecodeConfig(k, budget=budget, strategy="one-pass")).plan(
        drafts, left, 100
    )
    if not drafts.by_sats:
        return
    kept = drafts.kept(plan.nodes)
    ending = ends(kept.tree, reach(kept.tree, kept.likely))
    chosen = {node for node, _ in plan.groups}
    too_late = {node for node, depth in enumerate(kept.tree.depths) if depth > left - 3}
    assert all(
        ending[node] >= ending[other]
        for node in chosen
        for other in range(len(ending))
        if other not in chosen | too_late
    )
    room = (budget - len(plan.nodes)) // k
    if too_late == set():
        assert len(chosen) == max(0, min(room, len(plan.nodes)))


@settings(max_examples=40, deadline=None)
@given(**{**CASES, "strategy": st.just("one-pass")})
def test_one_pass_keeps_to_its_budget(drafts, left, k, budget, strategy):
    plan = FIXED[strategy](DecodeConfig(k, budget=budget, strategy=strategy)).plan(
        drafts, left, 100
    )
    assert rows_of(plan) <= budget


def random_path(tree, chance):
    path = [0]
    while (children := tree.children()[path[-1]]) and chance.random() < 0.7:
        path.append(chance.choice(children))
    return path


def auto(k, costs=FLAT, budget=16, accuracy=(), **settings):
    return AutoPlanner(
        DecodeConfig(k, strategy="auto", budget=budget, **settings), costs, k, accuracy
    )


@settings(max_examples=40, deadline=None)
@given(
    rounds=st.lists(some_drafts(), min_size=1, max_size=12),
    left=st.integers(1, 9),
    k=st.integers(1, 6),
    budget=st.integers(2, 24),
    costs=st.sampled_from(list(CURVES.values())),
    accuracy=st.sampled_from([0.2, 0.9]),
    chance=st.randoms(use_true_random=False),
)
@pytest.mark.parametrize("rule", ["sound", "budget"])
def test_auto_plans_are_sound_whatever_has_been_seen(
    rule, rounds, left, k, budget, costs, accuracy, chance
):
    planner = auto(k, costs, budget, [accuracy] * k)
    for drafts in rounds:
        size = planner.draft_first(drafts, left, 100)
        assert 0 <= size <= k and (
            not size or (size + 2 <= left and bool(costs.rounded) and not drafts.by_sats)
        )
        if size:
            drafts = Drafts.of_rounded(
                0, make_tree("chain", size), [0] * (size + 1), [0.5] * (size + 1)
            )
            planner.observe_drafting(size, 100, costs.rounded_seconds(size, 100))
        plan = planner.plan(drafts, left, 100)
        if rule == "budget":
            assert rows_of(plan) <= budget
        else:
            assert_sound(plan, drafts, left, k)
        kept = drafts.kept(plan.nodes)
        seconds = costs.seconds(rows_of(plan), 0, 100) * (0.5 + chance.random())
        planner.observe(kept, plan, random_path(kept.tree, chance))
        planner.observe_pass(rows_of(plan), 0, 100, seconds)


class World:
    """Decoding without a model: SATs draft a chain, each draft right as often as it claims, and
    passes take what a curve says.
    """

    def __init__(self, costs, claims, seed=0):
        self.costs = costs
        self.claims = claims
        self.chance = random.Random(seed)
        self.tokens = self.passes = self.plain = self.rounded = 0
        self.seconds = 0.0

    def run(self, planner, tokens):
        drafts = Drafts.none(0)
        right = [True]
        while self.tokens < tokens:
            if size := planner.draft_first(drafts, 10**6, 100):
                drafts, right = self.drafts(size, "rounded")
                drafts = Drafts.of_rounded(0, drafts.tree, drafts.tokens, drafts.likely)
                right = [True, self.chance.random() < 0.95, *right[1:]]
                seconds = self.costs.rounded_seconds(size, 100)
                self.seconds = self.seconds + seconds
                self.rounded = self.rounded + 1
                planner.observe_drafting(size, 100, seconds)
            plan = planner.plan(drafts, 10**6, 100)
            kept = drafts.kept(plan.nodes)
            right = [right[node] for node in plan.nodes]
            path = [0]
            while found := [child for child in kept.tree.children()[path[-1]] if right[child]]:
                path.append(found[0])
            sats = sum(size for _, size in plan.groups)
            seconds = self.costs.seconds(len(plan.nodes) + sats, sats, 100)
            planner.observe(kept, plan, path)
            planner.observe_pass(len(plan.nodes) + sats, sats, 100, seconds)
            self.tokens = self.tokens + len(path)
            self.seconds = self.seconds + seconds
            self.passes = self.passes + 1
            self.plain += rows_of(plan) == 1
            drafts = Drafts.none(0)
            right = [True]
            for size in [size for node, size in plan.groups if node == path[-1]]:
                drafts, right = self.drafts(size, plan.kind(path[-1]))
        return self

    def drafts(self, size, kind):
        likely = [1.0, *(self.chance.uniform(*self.claims) for _ in range(size))]
        drafts = Drafts(
            make_tree("chain", size), [0] * (size + 1), likely, [False] * (size + 1), kind
        )
        return drafts, [self.chance.random() < p for p in likely]

    @property
    def rate(self):
        return self.tokens / self.seconds


CLAIMS = {
    "never": (0.0, 0.0),
    "seldom": (0.0, 0.2),
    "mixed": (0.0, 1.0),
    "often": (0.8, 1.0),
    "always": (1.0, 1.0),
}


def test_auto_gives_up_drafts_that_never_pay_and_tries_again():
    world = World(STEEP, CLAIMS["seldom"]).run(auto(5), 2000)
    assert 0.8 * world.passes < world.plain < world.passes
    world = World(FLAT, CLAIMS["often"]).run(auto(5), 2000)
    assert world.plain < 0.1 * world.passes


def times(factor, costs):
    """The curve of a machine on which every pass takes `factor` times as long."""
    parts = (np.array(part) * factor for part in (costs.verify, costs.draft, costs.rounded))
    verify, draft, rounded = (part.tolist() for part in parts)
    return replace(costs, verify=verify, draft=draft, rounded=rounded)


@pytest.mark.parametrize("factor", [0.7, 1.5])
@pytest.mark.parametrize("claims", ["mixed", "often"])
def test_a_curve_of_a_busy_machine_rules_no_kind_of_pass_out(claims, factor):
    """Exact passes tell that it says too much; what was not tried yet must not look dear for it."""
    right, wrong = (
        World(ROUNDED, CLAIMS[claims]).run(auto(5, costs), 1000)
        for costs in (ROUNDED, times(factor, ROUNDED))
    )
    assert wrong.rounded > right.rounded > 0.2 * right.passes
    assert wrong.rate > 0.93 * right.rate


@lru_cache
def best_of_fixed(name, costs, claims):
    """The best rate of a strategy that does not plan, over several k."""
    planners = [FIXED[name](DecodeConfig(k, strategy=name)) for k in (1, 2, 3, 5)]
    world = CURVES[costs], CLAIMS[claims]
    return max(World(*world).run(planner, 1000).rate for planner in planners)


def best_exact(costs, claims):
    return max(best_of_fixed(name, costs, claims) for name in ("two-step", "one-pass"))


@pytest.mark.parametrize("claims", CLAIMS)
@pytest.mark.parametrize("costs", CURVES)
def test_auto_is_never_much_slower_than_plain_decoding_and_finds_what_pays(costs, claims):
    best = best_exact(costs, claims)
    if CURVES[costs].rounded:
        best = max(best, best_of_fixed("rounded", costs, claims))
    costs = CURVES[costs]
    claims = CLAIMS[claims]
    ar = 1 / costs.seconds(1, 0, 100)
    rate = World(costs, claims).run(auto(5, costs), 2000).rate
    assert rate >= 0.98 * ar
    assert rate >= 0.9 * best


def test_tries_in_vain_get_rare_and_text_that_gets_easy_is_found():
    world = World(CURVES["mild"], CLAIMS["never"])
    planner = auto(5, world.costs)
    tries = []
    for tokens in (1000, 2000, 3000):
        before = world.passes - world.plain
        tries.append(world.run(planner, tokens).passes - world.plain - before)
    assert max(tries[1:]) <= 1000 / auto_planner.TRY_AGAIN_AT_MOST + 1 < tries[0]
    world.claims = CLAIMS["often"]
    planned = world.run(planner, 3000 + 2 * auto_planner.TRY_AGAIN_AT_MOST).plain
    assert world.run(planner, 5000).plain - planned < 100


def test_sats_are_tried_again_however_often_drafts_are_looked_up():
    planner = auto(5, STEEP)
    drafts = Drafts.none(0)
    looked_up = drafts.with_chain([1], 0.6)
    tries = 0
    for number in range(4000):
        found = looked_up if number % 20 == 0 else drafts
        plan = Plan([0, 1]) if found is looked_up else planner.plan(found, 10**6, 100)
        tries += bool(plan.groups)
        planner.observe(found, plan, [0])
        rows = rows_of(plan)
        planner.observe_pass(rows, 0, 100, STEEP.seconds(rows, 0, 100))
    assert tries >= 4000 / auto_planner.TRY_AGAIN_AT_MOST - 1


@pytest.mark.parametrize("claims", CLAIMS)
@pytest.mark.parametrize("costs", CURVES)
def test_one_pass_places_as_many_groups_as_pay(costs, claims):
    """Without a budget, and without rounded passes."""
    decoder = with_adapter(tiny_llama(), k=5)
    decoder.costs = CURVES[costs]
    best = best_exact(costs, claims)
    claims = CLAIMS[claims]
    world = World(decoder.costs, claims).run(
        decoder.planner(DecodeConfig(5, strategy="one-pass")), 2000
    )
    assert world.rounded == 0
    assert world.rate >= 0.9 * best


@settings(max_examples=60, deadline=None)
@given(some_drafts(), st.integers(1, 9), st.sampled_from([FLAT, LINEAR]))
def test_kinds_say_where_groups_are_in_the_whole_tree(drafts, left, costs):
    plan = auto(4, costs, 40, [0.9] * 4).plan(drafts, left, 100)
    for node, _ in plan.groups:
        children = drafts.tree.children()[plan.nodes[node]]
        kept = any(child in plan.nodes for child in children)
        want = (
            "root" if len(plan.nodes) == 1 else "inner" if kept else "cut" if children else "leaf"
        )
        assert plan.kind(node) == want


def test_rounded_passes_are_tried_again_after_a_bad_start():
    planner = auto(5, ROUNDED)
    planner.worth.scores["rounded"] = (-100.0, 50.0)
    assert World(ROUNDED, CLAIMS["mixed"]).run(planner, 3000).rounded > 200


@pytest.mark.parametrize("batch", [1, 16])
def test_declined_rounded_passes_are_forgotten_once_a_pass_however_many_decline(batch):
    planner = auto(5, ROUNDED)
    planner.share(batch, 100)
    planner.worth.scores["rounded"] = (-1000.0, 10.0)
    assert [planner.draft_first(Drafts.none(0), 100, 100) for _ in range(batch)] == [0] * batch
    assert planner.worth.scores["rounded"] == pytest.approx((-950.0, 9.5))


@pytest.mark.parametrize(("costs", "pays"), [(FLAT, True), (STEEP, False)], ids=["flat", "steep"])
def test_auto_drafts_in_a_generation_where_it_pays(costs, pays, monkeypatch):
    def observe_pass(self, rows, sats, context, seconds):
        plain(self, rows, sats, context, costs.seconds(rows, sats, context, self.costs.batch))

    plain = AutoPlanner.observe_pass
    monkeypatch.setattr(AutoPlanner, "observe_pass", observe_pass)
    decoder = with_adapter(tiny_llama(), k=4)
    decoder.costs = costs
    want = decoder.generate([1, 5, 9], DecodeConfig(0, 150)).token_ids
    out = decoder.generate([1, 5, 9], DecodeConfig(4, 150, "chain", strategy="auto", lookup=0))
    assert out.token_ids == want
    assert (sum(out.proposed_by_depth) > 0) == pays
    assert (out.num_plain_passes > 60) == (not pays) and out.num_plain_passes < out.num_passes
    assert not pays or out.num_plain_passes < 20


def seen(planner, drafts, hits, kept=None):
    """Let the planner see drafts of depth 1 accepted and rejected, as `hits` says."""
    for hit in hits:
        planner.observe(drafts, Plan(list(range(len(drafts.tokens)))), [0, 1] if hit else [0])


def one_draft(likely, looked_up=False):
    return Drafts(make_tree("chain", 1), [0, 0], [1.0, likely], [False, looked_up], "root")


@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.parametrize(
    ("likely", "share"), [(0.1, 0.9), (0.9, 0.1), (0.5, 0.5), (0.95, 1.0), (0.05, 0.0)]
)
def test_chances_go_to_what_is_observed(likely, share, looked_up):
    planner = auto(3)
    drafts = one_draft(likely, looked_up)
    other = one_draft(0.3, False)
    before = planner.acceptance.chance(drafts, 1)
    untouched = planner.acceptance.chance(other, 1)
    hits = [i % 20 < 20 * share for i in range(200)]
    seen(planner, drafts, hits[:20])
    between = planner.acceptance.chance(drafts, 1)
    seen(planner, drafts, hits[20:])
    assert abs(planner.acceptance.chance(drafts, 1) - share) < 0.1
    assert abs(planner.acceptance.chance(drafts, 1) - share) <= abs(before - share) + 0.02
    assert min(before, share) - 0.02 <= between <= max(before, share) + 0.02
    assert planner.acceptance.chance(other, 1) == untouched
    after = planner.acceptance.chance(one_draft(likely, not looked_up), 1)
    # the two are counted apart
    assert after == auto(3).acceptance.chance(one_draft(likely, not looked_up), 1)


def test_first_choices_and_others_are_counted_apart():
    """A tree of two drafts that seem equally likely, of which the first is always right."""
    planner = auto(3)
    drafts = Drafts(DraftTree((-1, 0, 0), (0, 0, 1)), [0] * 3, [1.0, 0.4, 0.4], [False] * 3, "root")
    before = planner.acceptance.chance(drafts, 1)
    assert planner.acceptance.chance(drafts, 2) == before
    for _ in range(100):
        planner.observe(drafts, Plan([0, 1, 2]), [0, 1])
    assert (
        planner.acceptance.chance(drafts, 1) > 0.95 and planner.acceptance.chance(drafts, 2) < 0.05
    )


def test_drafts_below_a_rejected_one_say_nothing():
    planner = auto(3)
    drafts = Drafts(make_tree("chain", 3), [0] * 4, [1.0, 0.9, 0.6, 0.3], [False] * 4, "root")
    before = [planner.acceptance.chance(drafts, node) for node in (1, 2, 3)]
    planner.observe(drafts, Plan([0, 1, 2, 3]), [0, 1])
    after = [planner.acceptance.chance(drafts, node) for node in (1, 2, 3)]
    assert after[0] > before[0] and after[1] < before[1] and after[2] == before[2]


@pytest.mark.parametrize(("factor", "sign"), [(1.5, 1), (0.5, -1), (1.0, 0)])
def test_costs_go_to_what_is_observed(factor, sign):
    planner = auto(3, LINEAR)
    before = planner.costs.seconds(4, 0, 100)
    far = planner.costs.seconds(32, 0, 100)
    for _ in range(200):
        planner.observe_pass(4, 0, 100, factor * before)
    assert planner.costs.seconds(4, 0, 100) == pytest.approx(factor * before, rel=0.02)
    assert planner.costs.seconds(32, 0, 100) == far


def test_planners_are_made_for_the_settings_and_auto_is_kept():
    assert set(PLANNERS) == set(ALL_STRATEGIES)
    decoder = with_adapter(tiny_llama(), k=4)
    decoder.costs = FLAT
    for strategy, k in itertools.product(STRATEGIES, (0, 3)):
        planner = decoder.planner(DecodeConfig(k, strategy=strategy))
        assert isinstance(planner, AutoPlanner) == (strategy in ("auto", "one-pass") and k > 0)
        again = decoder.planner(DecodeConfig(k, strategy=strategy, max_new_tokens=9))
        assert (again is planner) == isinstance(planner, AutoPlanner)
    assert decoder.planner(DecodeConfig(2, strategy="auto")) is not decoder.planner(
        DecodeConfig(3, strategy="auto")
    )
    assert isinstance(
        decoder.planner(DecodeConfig(3, strategy="one-pass", budget=30)), FixedPlanner
    )


@settings(max_examples=20, deadline=None)
@given(some_drafts(), st.sampled_from(list(CURVES)), st.integers(0, 2**16))
def test_asking_what_is_believed_changes_nothing(drafts, costs, seed):
    """Of two planners in the same world, one is asked all there is to ask before every plan."""
    plans = []
    for asked in (False, True):
        planner = auto(4, CURVES[costs])
        decide = planner.plan
        made = []

        def plan(*arguments, asked=asked, planner=planner, decide=decide, made=made):
            if asked:
                planner.acceptance.chances(drafts)
                planner.acceptance.reached(4)
                planner.costs.seconds(3, 1, 700)
                loop_rate(planner.acceptance, planner.costs, 2, 100)
                assert not planner.costs.outpaced
                for kind in KINDS:
                    planner.worth.of(kind, 1.0)
            made.append(decide(*arguments))
            return made[-1]

        planner.plan = plan
        World(CURVES[costs], CLAIMS["mixed"], seed).run(planner, 60)
        plans.append(made)
    assert plans[0] == plans[1]


def test_a_place_is_searched_once_a_pass_whichever_object_stands_for_it(monkeypatch):
    searched = []

    def counted(*arguments):
        searched.append(arguments)
        return search(*arguments)

    monkeypatch.setattr(auto_planner, "search", counted)
    planner = auto(4, DEAR)
    for passes in (1, 2):
        assert planner.draft_first(Drafts.none(0), 100, 100) == 0
        plans = [planner.plan(Drafts.none(x), 100 - x, 100 + x) for x in (0, 3)]
        assert len(searched) == passes and plans[0] == plans[1]
        planner.observe_pass(2, 0, 100, 2.0)


# ---- the search ----


@st.composite
def beliefs(draw, costs):
    """A small tree, how likely its nodes are, and terms; costs: seconds by number of rows."""
    chance = draw(st.randoms(use_true_random=False))
    tree = draw(trees(5))
    chances = [1.0] * len(tree)
    for children in tree.children():
        shares = [0.01 + chance.random() for _ in range(len(children) + 1)]
        for child, share in zip(children, shares, strict=False):
            chances[child] = share / sum(shares)
    size = draw(st.integers(1, 2))
    worth = {
        place: list(itertools.accumulate([chance.uniform(-0.5, 1), *[chance.random()] * size]))
        for place in PLACES
    }
    seconds = draw(costs)
    terms = Terms(
        rate=draw(st.floats(0.1, 3)),
        size=size,
        budget=draw(st.integers(2, 12)),
        worth=worth,
        seconds=lambda rows, sats: seconds[rows] + 0.01 * sats,
    )
    return tree, chances, terms


def rising(steps):
    """Seconds of 0, 1, .. rows."""
    return st.lists(steps, min_size=20, max_size=20).map(lambda s: list(itertools.accumulate(s)))


ANY_COSTS = rising(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
EVEN_COSTS = st.floats(0.0, 0.5).map(lambda each: [1 + each * rows for rows in range(20)])


def promised(tree, chances, terms, nodes, sizes):
    """What a pass is worth by definition: sizes, {node: SATs}, by all outcomes of the walk."""
    kept = tree.kept(nodes)
    value = 0.0
    for probability, end in outcomes(kept, [chances[node] for node in nodes]):
        value += probability * (1 + kept.depths[end])
        if size := sizes.get(nodes[end], 0):
            inner = end in kept.parents
            place = "inner" if inner else "cut" if nodes[end] in tree.parents else "leaf"
            value += probability * terms.worth["root" if len(nodes) == 1 else place][size]
    sats = sum(sizes.values())
    return value - terms.rate * terms.seconds(len(nodes) + sats, sats)


def subsets(tree, left):
    """Every set of nodes with their parents that a pass may verify."""
    for chosen in itertools.product([False, True], repeat=len(tree) - 1):
        nodes = [0, *(node for node, kept in enumerate(chosen, 1) if kept)]
        if all(tree.parents[node] in nodes and tree.depths[node] < left for node in nodes[1:]):
            yield nodes


def passes(tree, left, terms, every=None):
    """(nodes, sizes) of every pass there is, or of every one of these nodes."""
    for nodes in every or subsets(tree, left):
        for sizes in itertools.product(range(terms.size + 1), repeat=len(nodes)):
            fits = len(nodes) + sum(sizes) <= terms.budget
            if fits and all(
                not size or tree.depths[node] + 2 + size <= left
                for node, size in zip(nodes, sizes, strict=True)
            ):
                yield nodes, {n: size for n, size in zip(nodes, sizes, strict=True) if size}


def likeliest_first(tree, chances):
    """x; x and the likeliest draft; and so on to the whole tree."""
    through = reach(tree, chances)
    order = sorted(range(1, len(tree)), key=lambda node: -through[node])
    return [sorted([0, *order[:count]]) for count in range(len(tree))]


@settings(max_examples=80, deadline=None)
@given(beliefs(ANY_COSTS), st.integers(1, 9))
def test_the_search_promises_what_its_pass_is_worth_and_no_pass_is_worth_more_than_the_best(
    found, left
):
    tree, chances, terms = found
    value, plan = search(tree, chances, left, terms)
    sizes = {plan.nodes[node]: size for node, size in plan.groups}
    every = list(passes(tree, left, terms))
    assert (plan.nodes, sizes) in every and len(sizes) == len(plan.groups) <= MAX_GROUPS
    assert value == pytest.approx(promised(tree, chances, terms, plan.nodes, sizes))
    worth = [promised(tree, chances, terms, *one) for one in every]
    assert value <= max(worth) + 1e-9
    # SATs are added where that pays, to the best that there is without them
    alone = [nodes for nodes in likeliest_first(tree, chances) if (nodes, {}) in every]
    assert value >= max(promised(tree, chances, terms, nodes, {}) for nodes in alone) - 1e-9


@settings(max_examples=80, deadline=None)
@given(beliefs(EVEN_COSTS), st.integers(1, 9))
def test_without_sats_the_search_finds_the_best_of_all_sets_of_drafts(found, left):
    """Where each row costs the same; no place is worth a SAT."""
    tree, chances, terms = found
    terms = replace(terms, worth={place: [-1.0] * (terms.size + 1) for place in PLACES}, budget=9)
    value, plan = search(tree, chances, left, terms)
    every = [promised(tree, chances, terms, nodes, {}) for nodes in subsets(tree, left)]
    assert plan.groups == () and value == pytest.approx(max(every))


@settings(max_examples=80, deadline=None)
@given(beliefs(EVEN_COSTS))
def test_with_sats_the_search_finds_the_best_pass_of_the_likeliest_drafts(found):
    """But for the margin that each group must bring; where each row costs the same, and SATs are
    worth the same wherever they stand.
    """
    tree, chances, terms = found
    terms = replace(terms, worth=dict.fromkeys(PLACES, terms.worth["leaf"]), budget=MAX_ROWS)
    value, _ = search(tree, chances, 99, terms)
    for nodes, sizes in passes(tree, 99, terms, likeliest_first(tree, chances)):
        assert value >= promised(tree, chances, terms, nodes, sizes) - MARGIN * len(sizes) - 1e-9


def test_the_search_takes_plain_passes_where_nothing_pays_and_all_where_all_is_free():
    tree = make_tree("chain", 4)
    nothing = dict.fromkeys(PLACES, (0.0,) * 4)
    dear = Terms(1.0, 3, 9, nothing, lambda rows, sats: float(rows))
    assert search(tree, [1.0, *[0.5] * 4], 99, dear) == (0.0, PLAIN)
    much = dict.fromkeys(PLACES, (0.0, 1.0, 2.0, 3.0))
    free = Terms(1.0, 3, 99, much, lambda rows, sats: 0.0)
    value, plan = search(tree, [1.0, *[0.5] * 4], 99, free)
    assert plan == Plan([0, 1, 2, 3, 4], plan.groups, plan.kinds)
    assert sorted(plan.groups) == [(node, 3) for node in range(5)]
    assert value == pytest.approx(1 + 0.5 + 0.25 + 0.125 + 0.0625 + 3)


# ---- plans as they were ----


@pytest.mark.parametrize("case", read(), ids=lambda case: case["name"])
def test_plans_are_those_that_were_recorded(case):
    """record_plans.py says by what, and how to record anew."""
    planner = build(case["config"], case["costs"])
    plans = {}
    for name, *arguments, answer in case["calls"]:
        if name in ("draft_first", "plan"):
            number, *rest = arguments
            found = getattr(planner, name)(case["drafts"][number], *rest)
            if name == "plan":
                plans[number] = found
                answer = Plan(answer[0], tuple(map(tuple, answer[1])), tuple(answer[2]))
            assert found == answer
        elif name == "observe":
            number, path = arguments
            plan = plans[number]
            planner.observe(case["drafts"][number].kept(plan.nodes), plan, path)
        elif name == "take":
            assert planner.costs.outpaced
            planner.take(case["costs"])
        else:
            getattr(planner, name)(*arguments)
        if name == "observe_pass" and isinstance(planner, AutoPlanner):
            assert [planner.size, planner.rate] == pytest.approx(answer)


# ---- the cost curve ----


@st.composite
def measured(draw):
    """Times that grow with the rows, SATs' no less than others', and with the context."""
    steps = st.lists(st.floats(0, 1), min_size=len(COUNTS), max_size=len(COUNTS))
    near, sats, context = (list(itertools.accumulate(draw(steps))) for _ in range(3))
    verify = [[1 + t for t in near], [1 + t + more for t, more in zip(near, context, strict=True)]]
    return (
        verify,
        [[t + more for t, more in zip(times, sats, strict=True)] for times in verify],
        draw(st.floats(0, 0.1)),
    )


@settings(max_examples=30, deadline=None)
@given(measured())
def test_the_curve_goes_through_what_was_measured(times):
    verify, draft, drafting = times
    costs = CostCurve(*times)
    for c, context in enumerate(CONTEXTS):
        for i, count in enumerate(COUNTS):
            assert costs.seconds(count, 0, context) == pytest.approx(verify[c][i])
            if count > 1:
                assert costs.seconds(count, count - 1, context) == pytest.approx(
                    draft[c][i] + drafting * min(count - 1, 16)
                )
    middle = sum(CONTEXTS) // 2
    assert costs.seconds(8, 0, middle) == pytest.approx(
        sum(costs.seconds(8, 0, context) for context in CONTEXTS) / 2
    )


@settings(max_examples=30, deadline=None)
@given(measured(), st.integers(*CONTEXTS))
def test_more_rows_never_take_less(times, context):
    costs = CostCurve(*times)
    plain = [costs.seconds(rows, 0, context) for rows in range(1, MAX_ROWS + 1)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(plain))
    assert plain[63] > 1.5 * plain[31]  # beyond what was measured it goes on growing
    for sats in (1, 5, 16):
        with_sats = [costs.seconds(rows, sats, context) for rows in range(sats + 1, MAX_ROWS + 1)]
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(with_sats))
        assert all(a <= b + 1e-9 for a, b in zip(plain[sats:], with_sats, strict=True))


def test_a_slip_of_the_clock_is_no_dip():
    """A larger pass that was measured faster than a smaller one counts as no faster."""
    times = [[1, 2, 1.5, 3, 3, 3, 3, 3, 3]] * 2
    assert [CostCurve(times, times, 0.0).seconds(rows, 0, 128) for rows in (1, 2, 4, 5, 6)] == [
        1,
        1.75,
        1.75,
        2.375,
        3,
    ]


def noisy():
    """Times in no order at all, as a busy machine may give them."""
    return st.lists(
        st.lists(st.floats(0.001, 10), min_size=len(COUNTS), max_size=len(COUNTS)),
        min_size=2,
        max_size=2,
    )


@settings(max_examples=30, deadline=None)
@given(noisy(), noisy(), noisy())
def test_whatever_was_measured_costs_are_positive_and_rise_with_rows_sats_and_context(
    verify, draft, rounded
):
    costs = CostCurve(verify, draft, 0.01, rounded)
    contexts = (1, 128, 500, 1024, 4000, 32000)
    surface = np.array(
        [
            [[costs.seconds(rows, sats, c) for sats in range(40)] for rows in range(40, 300, 20)]
            for c in contexts
        ]
    )
    rounded = np.array([[costs.rounded_seconds(sats, c) for sats in range(60)] for c in contexts])
    for found in (surface, rounded):
        assert found.min() > 0
        for axis in range(found.ndim):
            assert np.diff(found, axis=axis).min() >= -1e-9


def test_short_contexts_cost_what_the_shortest_measured_does():
    """However steeply the cost grows with context, a line through both points is not followed below
    the first.
    """
    near = [1.0] * len(COUNTS)
    far = [20.0] * len(COUNTS)
    costs = CostCurve([near, far], [near, far], 0.0)
    assert costs.seconds(1, 0, 1) == costs.seconds(1, 0, CONTEXTS[0]) == 1


def refuse(decoder):
    raise AssertionError("measured again")


def test_costs_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path))
    first = with_adapter(tiny_llama(torch.float32), k=3).cost_curve()
    times = [time for part in (*first.verify, *first.draft) for time in part]
    assert all(len(part) == len(COUNTS) for part in (*first.verify, *first.draft)) and len(
        first.verify
    ) == len(CONTEXTS)
    assert min(times) > 0 and first.drafting > 0
    (file,) = (tmp_path / "costs").iterdir()
    assert [name.name for name in tmp_path.iterdir() if name.suffix != ".lock"] == ["costs"]
    assert json.loads(file.read_text())["curve"]["verify"] == first.verify
    monkeypatch.setattr(calibrate, "measure_costs", refuse)
    again = with_adapter(tiny_llama(torch.float32, seed=9), k=3)
    assert again.cost_curve() == first  # other weights, the same shape
    assert again.cost_curve() is again.costs
    assert len(list((tmp_path / "costs").iterdir())) == 1


def test_one_file_for_each_dtype_and_shape(tmp_path, monkeypatch):
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path))
    counter = itertools.count(1)
    monkeypatch.setattr(
        calibrate, "measure_costs", lambda decoder: curve(lambda n: 1.0, drafting=next(counter))
    )
    shapes = [
        (tiny_llama(torch.float32), dict(k=3)),
        (tiny_llama(torch.bfloat16), dict(k=3)),
        (tiny_llama(torch.float32), dict(k=3, rank=5)),
        (tiny_llama(torch.float32), dict(k=3, head=6)),
        (tiny_llama(torch.float32), dict(k=2)),
        (tiny_llama(torch.float32, intermediate_size=64), dict(k=3)),
    ]
    for turn in (1, 2):  # the second reads what the first wrote
        for i, (lm, adapter) in enumerate(shapes, 1):
            decoder = with_adapter(lm, **adapter)
            assert decoder.cost_curve().drafting == i
            assert len(list((tmp_path / "costs").iterdir())) == (i if turn == 1 else len(shapes))
            decoder.model.adapter.detach()
    assert decoder.cost_curve(anew=True).drafting == len(shapes) + 1
    assert len(list((tmp_path / "costs").iterdir())) == len(shapes)


BROKEN = [
    "",
    "{",
    "[]",
    "{}",
    '{"curve": 1}',
    '{"curve": {"verify": []}}',
    '{"curve": {"verify": 1, "draft": 1, "drafting": "x"}}',
]


@pytest.mark.parametrize(
    "content", [*BROKEN, "zeros", "flags", "ages", "huge", "cut short", "a folder"]
)
def test_a_file_that_is_not_whole_is_measured_again(tmp_path, monkeypatch, content):
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path))
    fresh = curve(lambda n: 2.0 + n)
    monkeypatch.setattr(calibrate, "measure_costs", lambda decoder: fresh)
    with_adapter(tiny_llama(torch.float32), k=3).cost_curve()
    (file,) = (tmp_path / "costs").iterdir()
    whole = file.read_text()
    if content == "a folder":
        file.unlink()
        file.mkdir()
        with pytest.warns(UserWarning, match="cannot be kept"):
            assert with_adapter(tiny_llama(torch.float32), k=3).cost_curve() == fresh
        return
    nothing = [[0.0] * len(COUNTS)] * 2
    damaged = {
        "zeros": {"verify": nothing, "draft": nothing},
        "flags": {"verify": [[True] * len(COUNTS)] * 2},
        "ages": {"draft": [[1e308] * len(COUNTS)] * 2},
        "huge": {"drafting": 10**400},
    }
    held = json.loads(whole)
    texts = {
        name: json.dumps({**held, "curve": {**held["curve"], **part}})
        for name, part in damaged.items()
    }
    file.write_text({**texts, "cut short": whole[: len(whole) // 2]}.get(content, content))
    assert with_adapter(tiny_llama(torch.float32), k=3).cost_curve() == fresh
    assert json.loads(file.read_text()) == json.loads(whole)


@pytest.mark.parametrize("obstacle", ["a file", "no home", "not mine"])
def test_where_a_curve_cannot_be_kept_that_is_a_warning(
    tmp_path, monkeypatch, unprivileged, obstacle
):
    decoder = with_adapter(tiny_llama(torch.float32), k=3)
    fresh = curve(lambda n: 2.0 + n)
    monkeypatch.setattr(calibrate, "measure_costs", lambda decoder: fresh)
    folder = unprivileged / "cache"
    if obstacle == "a file":
        folder.write_text("")
    elif obstacle == "not mine":
        folder.mkdir(mode=0o500)
    monkeypatch.setenv("SDSAT_CACHE", str(folder))
    if obstacle == "no home":
        monkeypatch.setenv("SDSAT_CACHE", "~nobody-of-that-name/cache")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert decoder.cost_curve() == fresh
    assert decoder.cost_curve() is decoder.costs


def test_a_complete_cache_that_is_read_only_is_used(monkeypatch, unprivileged):
    monkeypatch.setenv("SDSAT_CACHE", str(unprivileged))
    monkeypatch.setattr(calibrate, "measure_costs", lambda decoder: curve(lambda n: 2.0 + n))
    first = with_adapter(tiny_llama(torch.float32), k=3).cost_curve()
    (unprivileged / "costs.lock").unlink()
    unprivileged.chmod(0o500)
    monkeypatch.setattr(calibrate, "measure_costs", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_adapter(tiny_llama(torch.float32), k=3).cost_curve() == first
    unprivileged.chmod(0o700)


def test_of_many_that_start_together_one_measures(tmp_path, monkeypatch):
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path))
    calls = []

    def measure(decoder):
        calls.append(decoder)
        time.sleep(0.2)
        return curve(lambda n: 2.0 + n)

    monkeypatch.setattr(calibrate, "measure_costs", measure)
    decoders = [with_adapter(tiny_llama(torch.float32), k=3) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(Decoder.cost_curve, decoders))
    assert len(calls) == 1 and all(costs == found[0] for costs in found)


@pytest.mark.parametrize(("factor", "again"), [(3.0, True), (1.2, False), (0.5, False)])
def test_a_curve_of_a_busy_machine_is_measured_again(tmp_path, monkeypatch, factor, again):
    """It says `factor` times what passes then take.

    One that says too little is left: then it is now that the machine is busy.
    """
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path))
    true = curve(lambda n: 1.0 + n / 50)
    curves = iter([curve(lambda n: factor * (1.0 + n / 50)), true])
    monkeypatch.setattr(calibrate, "measure_costs", lambda decoder: next(curves))
    decoder = with_adapter(tiny_llama(torch.float32), k=3)
    greedy = DecodeConfig(3, strategy="auto")
    nucleus = DecodeConfig(3, strategy="auto", sampling=SamplingConfig(1.0))
    planners = [decoder.planner(greedy), decoder.planner(nucleus)]
    for rows in [1, 4] * 40:
        assert decoder.planner(greedy) is planners[0] and decoder.costs != true
        for planner in planners:
            planner.observe_pass(rows, 0, 200, true.seconds(rows, 0, 200))
        if planners[0].costs.outpaced:
            break
    assert [decoder.planner(config) for config in (greedy, nucleus)] == planners
    (file,) = (tmp_path / "costs").iterdir()
    assert (
        (decoder.costs == true)
        == (json.loads(file.read_text())["curve"]["verify"] == true.verify)
        == again
    )
    for planner in planners:
        assert planner.costs.curve == decoder.costs  # measured once for both
        if again:
            assert planner.costs.seconds(4, 0, 200) == pytest.approx(true.seconds(4, 0, 200))


def test_every_planner_takes_the_curve_that_another_had_measured_again():
    """Also one that has seen too few passes, or too small a difference, to ask for it itself."""
    decoder = with_adapter(tiny_llama(torch.float32), k=3)
    decoder.costs = times(1.5, ROUNDED)
    configs = [DecodeConfig(3, strategy=strategy) for strategy in ("auto", "one-pass")]
    planners = [decoder.planner(config) for config in configs]
    decoder.costs = ROUNDED
    assert [decoder.planner(config) for config in configs] == planners
    assert [planner.costs.curve.verify for planner in planners] == [ROUNDED.verify] * 2
    assert [planner.costs.has_rounded for planner in planners] == [True, False]
    planners[0].observe_pass(4, 0, 100, 9.0)
    assert decoder.planner(configs[0]).costs.num_timed == 1  # what was learned since is kept


def test_generate_measures_only_where_a_plan_depends_on_it(monkeypatch, tmp_path):
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "measure_costs", refuse)
    decoder = with_adapter(tiny_llama(), k=3)
    for strategy, k, budget in (
        ("two-step", 3, None),
        ("one-pass", 3, 16),
        ("one-pass", 0, None),
        ("auto", 0, None),
    ):
        decoder.generate([1, 5], DecodeConfig(k, 4, strategy=strategy, budget=budget))
    for strategy in ("one-pass", "auto"):
        with pytest.raises(AssertionError, match="measured again"):
            decoder.generate([1, 5], DecodeConfig(3, 4, strategy=strategy))
