"""The planner that learns: of all plans the one that promises most tokens per second (`auto`)."""

from __future__ import annotations

from collections.abc import Sequence

from sdsat.config import MAX_ROWS, DecodeConfig
from sdsat.decoding.beliefs import CONTEXT_STEP, Acceptance, PassCosts, Worth, loop_rate
from sdsat.decoding.plan import PLACES, PLAIN, Plan
from sdsat.decoding.search import Terms, search
from sdsat.method.costs import CostCurve
from sdsat.method.drafts import Drafts
from sdsat.method.layout import SatGroup

# Passes without SATs in a row, of each sequence, before these are tried again: at first, and at
# most, as every try in vain doubles the wait. One costs some two passes: so rare, tries cost `auto`
# a twentieth of AR's speed at first, and a hundredth where text stays hard.
TRY_AGAIN = 48
TRY_AGAIN_AT_MOST = 192
# Passes with drafts in a row, of each sequence, before a plain one is timed again: what drafts are
# compared with may have changed. Rarer than tries, for where drafts pay a plain pass gives up more:
# at 48 that was half a percent of the speed.
TIME_AGAIN = 192
# What is known of rounded passes still counts after one was declined. Without one nothing is
# learned of them: so a bad start is forgotten, within a few dozen passes, and they are tried again.
UNTRIED = 0.95


class AutoPlanner:
    """Maximises expected tokens - rate * expected seconds (a planner; see `plan.Planner`).

    `rate` is the tokens per second of the best fixed loop, or of AR. A place in the text is worth
    more, in tokens, the better the drafts that are there. At each place it compares: drafting in
    a rounded pass, which is cheap and gives no token; every number of the likeliest drafts, each
    worth the probability of reaching it; SATs at the nodes where the walk most likely ends, which
    make the next place worth more; and a plain pass. All pay for their rows. When nothing pays,
    passes are plain, and now and then drafting is tried again.

    one-pass is the same without rounded passes: with a curve that has none.

    All sequences of a batch learn together. Between calls it remembers

    - what it believes: `acceptance`, `costs`, `worth` (decoding/beliefs.py);
    - `size`, SATs a group at most, and `rate`, as that best loop has them. They follow from what is
      believed, and are set anew after each pass;
    - how many passes in a row had no SATs, how many such to wait for, and how many in a row were
      not plain: when to try, or to time, again;
    - until the pass is over, what was found for it. `draft_first` asks the same as `plan` does, and
      so do sequences that stand alike. The first answer stands, while decisions for one sequence
      after the other change what places are worth.
    """

    def __init__(self, config: DecodeConfig, curve: CostCurve, k: int, accuracy: Sequence[float]):
        """Start at the priors.

        Args:
            config: for its budget.
            curve: what passes take.
            k: SATs a group at most.
            accuracy: acceptance by depth, as it was measured in training; it may say less than k.
        """
        self.k = k
        self.budget = config.budget or MAX_ROWS
        self.acceptance = Acceptance(k, accuracy)
        self.costs = PassCosts(curve)
        self.worth = Worth()
        self._num_without = 0
        self._num_drafting = 0
        self._patience = TRY_AGAIN
        self._found: dict[object, tuple[float, Plan]] = {}
        self._settle(0)

    @property
    def rounds(self) -> bool:
        """See Planner.rounds."""
        return self.costs.has_rounded

    def share(self, batch: int, context: int) -> None:
        """See Planner.share."""
        if batch != self.costs.batch:
            self.costs.batch = batch
            self._settle(context)

    def draft_first(self, drafts: Drafts, left: int, context: int) -> int:
        """See Planner.draft_first."""
        size = min(self.size, left - 2)
        if drafts.by_sats or not self.costs.has_rounded or size < 1 or self._time_again():
            return 0
        value = self._worth("rounded") - self.rate * self.costs.rounded_seconds(size, context)
        exact, _ = self._best(drafts, left, context)
        if value > exact:
            self._patience = TRY_AGAIN
            self._num_without = 0  # before other sequences of a batch try, too
        elif self._may_try():
            self._try()
        else:
            # Each sequence of a batch declines, but a try is one pass for all.
            self.worth.fade("rounded", UNTRIED ** (1 / self.costs.batch))
            return 0
        self.worth.observe("none", value)
        return size

    def plan(self, drafts: Drafts, left: int, context: int) -> Plan:
        """See Planner.plan."""
        size = min(self.size, left - 2, self.budget - 1)
        alone = len(drafts.tokens) == 1
        if alone and self._time_again():
            return PLAIN
        if alone and self._may_try() and size > 0:
            self._try()
            return Plan([0], (SatGroup(0, size),))
        value, plan = self._best(drafts, left, context)
        self.worth.observe(drafts.kind, value)
        if plan.groups:
            self._patience = TRY_AGAIN
        return plan

    def observe(self, drafts: Drafts, plan: Plan, path: list[int]) -> None:
        """See Planner.observe."""
        self.acceptance.observe(drafts, path)
        by_sats = bool(plan.groups) or drafts.by_sats
        self._num_without = 0 if by_sats else self._num_without + 1
        plain = len(drafts.tokens) == 1 and not by_sats
        self._num_drafting = 0 if plain else self._num_drafting + 1

    def observe_pass(self, rows: int, sats: int, context: int, seconds: float) -> None:
        """See Planner.observe_pass."""
        self.costs.observe_pass(rows, sats, context, seconds)
        self._settle(context)

    def observe_drafting(self, sats: int, context: int, seconds: float) -> None:
        """See Planner.observe_drafting."""
        self.costs.observe_drafting(sats, context, seconds)

    def take(self, curve: CostCurve) -> None:
        """Go on with another cost curve; what is known of drafts stays."""
        self.costs.take(curve)
        self._settle(0)

    def _settle(self, context: int) -> None:
        """Set the group size, and the rate, by what is believed now; plans are searched anew."""

        def loop(size: int) -> float:
            return loop_rate(self.acceptance, self.costs, size, context)

        self.size = max(range(1, self.k + 1), key=loop)
        self.rate = max(loop(self.size), 1 / self.costs.seconds(1, 0, context))
        self._found.clear()

    def _may_try(self) -> bool:
        """Tell whether SATs have drafted nothing for long."""
        return self._num_without >= self._patience * self.costs.batch

    def _try(self) -> None:
        """Let one sequence draft, though it seems not to pay, and the next such try wait longer."""
        self._num_without = 0
        self._patience = min(2 * self._patience, TRY_AGAIN_AT_MOST)

    def _time_again(self) -> bool:
        """Tell whether no pass has been plain for long."""
        return self._num_drafting >= TIME_AGAIN * self.costs.batch

    def _worth(self, kind: str) -> float:
        """Say what a place with such drafts is worth; at first, what it costs to draft them."""
        prior = 0.0
        if kind == "rounded":
            prior = self.rate * self.costs.rounded_seconds(self.size, 0)
        elif kind != "none":
            prior = self.rate * self.costs.seconds(1 + self.size, self.size, 0) - 1
        return self.worth.of(kind, prior)

    def _best(self, drafts: Drafts, left: int, context: int) -> tuple[float, Plan]:
        """Find what the coming pass promises, in tokens, and its plan, searched once a pass."""
        chances = self.acceptance.chances(drafts)
        # All that the search depends on; with more left than drafts can reach it's the same.
        usable = min(left, max(drafts.tree.depths) + self.size + 2)
        key = (drafts.tree, tuple(chances), usable, context // CONTEXT_STEP)
        if key not in self._found:
            self._found[key] = search(drafts.tree, chances, left, self._terms(context))
        return self._found[key]

    def _terms(self, context: int) -> Terms:
        """Collect what a search takes for true, after so many tokens."""
        reached = self.acceptance.reached(self.size)
        loss = [sum(reached[size:]) for size in range(self.size + 1)]  # of a smaller group
        none = self._worth("none")
        full = {place: self._worth(place) - none for place in PLACES}
        return Terms(
            rate=self.rate,
            size=self.size,
            budget=self.budget,
            worth={place: [value - less for less in loss] for place, value in full.items()},
            seconds=lambda rows, sats: self.costs.seconds(rows, sats, context),
        )
