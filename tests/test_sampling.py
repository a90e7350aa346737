"""Filters against transformers' own, the noise as a function and as a distribution, choices against
exact probabilities.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sdsat.config import SamplingConfig
from sdsat.method import sampling as sampling_module
from sdsat.method.sampling import choose, gumbel_noise, support

SETTINGS = [
    SamplingConfig(1.0),
    SamplingConfig(0.2),
    SamplingConfig(2.0, top_k=1),
    SamplingConfig(0.7, top_k=3),
    SamplingConfig(1.0, top_k=100),
    SamplingConfig(1.0, top_p=0.5),
    SamplingConfig(1.5, top_p=0.95),
    SamplingConfig(1.0, top_p=1e-6),
    SamplingConfig(1.0, top_k=10, top_p=0.95),
    SamplingConfig(0.2, top_k=10, top_p=0.95),
    SamplingConfig(2.5, top_k=4, top_p=0.8),
]


def warped(logits, sampling):
    """[N, V] scores by transformers' logits processors."""
    scores = TemperatureLogitsWarper(float(sampling.temperature))(None, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    return TopPLogitsWarper(sampling.top_p)(None, scores) if sampling.top_p < 1 else scores


def filtered(logits, sampling):
    """[N, V] exact next-token probabilities by transformers' logits processors."""
    return warped(logits.double(), sampling).softmax(-1)


def spread(logits, sampling, **kwargs):
    """[N, V] probabilities of `support`, at each id's own place."""
    ids, scores = support(logits, sampling, **kwargs)
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    return torch.zeros(logits.shape, dtype=torch.double).scatter(
        -1, ids, scores.double().softmax(-1)
    )


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("at_least", [1, 4, 12])
def test_support_equals_transformers(sampling, at_least):
    logits = torch.randn(50, 17, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 5] = -math.inf  # the SAT
    got = spread(logits, sampling, at_least=at_least)
    want = filtered(logits, sampling)
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strength", [0.1, 1, 5])
@pytest.mark.parametrize("top_p", [0.3, 0.95])
def test_top_p_alone_is_the_same_however_many_tokens_it_sorts(monkeypatch, strength, top_p):
    """Flat distributions need more tokens than it sorts at first, and rows of both kinds stand
    beside each other.
    """
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(1)) * strength
    sampling = SamplingConfig(1.0, top_p=top_p)
    logits[::2] *= 5
    got = spread(logits, sampling)
    torch.testing.assert_close(got, filtered(logits, sampling), rtol=1e-3, atol=1e-7)
    for row in range(6):  # and beside whatever rows
        assert torch.equal(spread(logits[row : row + 1], sampling)[0] > 0, got[row] > 0)
    monkeypatch.setattr(sampling_module, "LIKELY", 2000)
    assert torch.equal(spread(logits, sampling) > 0, got > 0)


def meets_exactly(row, top_p):
    """Whether a sum of a row's probabilities meets 1 - top_p: then transformers' float32 may round
    to either side of it.
    """
    below = row.double().softmax(-1).sort().values.cumsum(-1)
    return bool(((below - (1 - top_p)).abs() < 1e-6).any())


@pytest.fixture
def stable_sort(monkeypatch):
    """torch.sort as TopPLogitsWarper calls it, but with equals in the order of their ids."""
    sort = torch.sort
    monkeypatch.setattr(
        torch, "sort", lambda scores, descending: sort(scores, descending=descending, stable=True)
    )


def tied_rows(seed, vocabulary):
    """Logits as bfloat16 has them, and such as few values are left of: ties everywhere.

    One token is masked, as the SAT is.
    """
    generator = torch.Generator().manual_seed(seed)
    wide, flat = (
        (spread * torch.randn(4, vocabulary, generator=generator)).bfloat16().float()
        for spread in (3, 0.3)
    )
    few = torch.randint(1 + seed % 7, (4, vocabulary), generator=generator) / 2
    logits = torch.cat([wide, flat, few])
    logits[:, seed % vocabulary] = -math.inf
    return logits


FILTERS = [
    SamplingConfig(temperature, top_k, top_p)
    for temperature in (0.2, 0.7, 1.0)
    for top_k, top_p in [
        (1, 1.0),
        (10, 1.0),
        (50, 1.0),
        (600, 1.0),
        (0, 0.95),
        (0, 0.5),
        (10, 0.95),
        (50, 0.8),
        (3, 0.999),
    ]
]


@pytest.mark.parametrize("vocabulary", [5, 40, 700, 3000])
def test_ties_are_kept_as_transformers_keeps_them(vocabulary, stable_sort):
    num = 0
    for seed, sampling in enumerate(FILTERS * (12 if vocabulary < 1000 else 3)):
        logits = tied_rows(seed, vocabulary)
        got = sampling_module.filtered(logits, sampling)
        want = warped(logits, sampling)
        unfiltered = warped(logits, SamplingConfig(sampling.temperature, sampling.top_k))
        for row in range(len(logits)):
            if sampling.top_p == 1 or not meets_exactly(unfiltered[row], sampling.top_p):
                assert torch.equal(got[row], want[row])
                num += 1
    assert num > 800


@pytest.mark.parametrize("vocabulary", [40, 3000])
def test_where_top_p_parts_equals_as_many_are_kept_as_by_transformers(vocabulary):
    """With its own, unstable sort: the same scores are left, and all of them but the lowest at the
    same tokens.
    """
    for seed, sampling in enumerate(FILTERS * 3):
        logits = tied_rows(seed, vocabulary)
        got = sampling_module.filtered(logits, sampling)
        want = warped(logits, sampling)
        unfiltered = warped(logits, SamplingConfig(sampling.temperature, sampling.top_k))
        for row in range(len(logits)):
            if meets_exactly(unfiltered[row], sampling.top_p):
                continue
            assert torch.equal(got[row].sort().values, want[row].sort().values)
            lowest = want[row][want[row] > -math.inf].min()
            assert torch.equal(got[row] > lowest, want[row] > lowest)


def test_a_row_is_filtered_alike_beside_any_others():
    """A row of ties alone needs everything sorted; its neighbour must not change by that."""
    rows = torch.stack(
        [torch.zeros(2000), torch.randn(2000, generator=torch.Generator().manual_seed(4)) * 4]
    )
    for sampling in FILTERS:
        alone = [sampling_module.filtered(rows[i : i + 1], sampling)[0] for i in range(2)]
        assert torch.equal(sampling_module.filtered(rows, sampling), torch.stack(alone))


@settings(deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1),
)
def test_support_is_the_smallest_set_that_reaches_top_p(logits, temperature, top_k, top_p):
    sampling = SamplingConfig(temperature, top_k, top_p)
    logits = [value / 7 for value in logits]
    best = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    weights = [math.exp((logits[i] - max(logits)) / temperature) for i in best]
    reached = [sum(weights[: n + 1]) / sum(weights) for n in range(len(best))]
    if any(abs(value - top_p) < 1e-5 for value in reached):
        return  # float32 may round to either side
    kept = best[: next((n for n, value in enumerate(reached) if value >= top_p), len(best) - 1) + 1]
    want = {i: weights[best.index(i)] / sum(weights[: len(kept)]) for i in kept}
    got = spread(torch.tensor([logits]), sampling)[0]
    for i in range(len(logits)):
        assert got[i] == pytest.approx(want.get(i, 0.0), rel=1e-4, abs=1e-7)


LOGITS = torch.tensor([1.0, 0.2, -math.inf, 2.0, -1.0, 0.9])  # id 2 is the SAT
CHOICES = [
    SamplingConfig(1.0),
    SamplingConfig(1.0, top_k=3),
    SamplingConfig(2.0, top_p=0.8),
    SamplingConfig(0.6, top_k=4, top_p=0.95),
]


def assert_distributed(ids, probabilities):
    """Chi-square of ids against exact probabilities; ids of probability 0 must be absent."""
    counts = torch.bincount(torch.as_tensor(ids).flatten(), minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        assert chisquare(counts[possible], probabilities[possible] * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize("sampling", CHOICES, ids=str)
def test_choices_over_indices_follow_the_filtered_distribution(sampling):
    num = 20_000
    ids = choose(LOGITS.expand(num, -1), torch.arange(num), sampling)
    assert_distributed(ids, filtered(LOGITS[None], sampling)[0])


@pytest.mark.parametrize("sampling", CHOICES, ids=str)
def test_choices_over_seeds_follow_the_filtered_distribution(sampling):
    index = torch.tensor([7])
    seeds = range(3000)
    config = vars(sampling)
    ids = [
        int(choose(LOGITS[None], index, SamplingConfig(**{**config, "seed": seed})))
        for seed in seeds
    ]
    assert_distributed(ids, filtered(LOGITS[None], sampling)[0])


def test_consecutive_choices_are_independent():
    p = LOGITS.double().softmax(-1)
    ids = choose(LOGITS.expand(20_000, -1), torch.arange(20_000), SamplingConfig(1.0, seed=4))[:, 0]
    assert_distributed(ids[:-1:2] * 6 + ids[1::2], torch.outer(p, p).flatten())


def test_wide_choices_are_samples_without_replacement():
    p = LOGITS.double().softmax(-1)
    pairs = choose(
        LOGITS.expand(20_000, -1), torch.arange(20_000), SamplingConfig(1.0, seed=5), width=2
    )
    want = torch.outer(p, p) / (1 - p)[:, None]
    assert_distributed(pairs[:, 0] * 6 + pairs[:, 1], want.fill_diagonal_(0).flatten())


@pytest.mark.parametrize("sampling", [SamplingConfig(), *SETTINGS], ids=str)
@pytest.mark.parametrize("width", [2, 5, 16])
def test_wide_choices_are_distinct_and_start_with_the_choice(sampling, width):
    logits = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)) * 2
    index = torch.arange(200)
    ids = choose(logits, index, sampling, width)
    assert ids.shape == (200, width)
    assert torch.equal(ids[:, :1], choose(logits, index, sampling))
    assert all(len(set(row)) == width for row in ids.tolist())


def test_greedy_is_the_sorted_logits():
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(2))
    order = logits.sort(-1, descending=True).indices
    for width in (1, 2, 9):
        for index in (torch.zeros(20), torch.arange(20)):
            assert torch.equal(
                choose(logits, index.long(), SamplingConfig(seed=8), width), order[:, :width]
            )


def test_low_temperature_is_greedy():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(
        choose(logits, torch.arange(50), SamplingConfig(1e-6)), logits.argmax(-1, keepdim=True)
    )


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63, -(2**63), 2**64 - 1])
def test_noise_is_a_function_of_seed_index_and_token(seed):
    index = torch.tensor([3, 0, 3, 2**40])
    vocabulary = torch.arange(100)
    noise = gumbel_noise(seed, index, vocabulary)
    assert noise.dtype == torch.double
    assert torch.isfinite(noise).all()
    assert torch.equal(noise[0], noise[2])
    for row in range(4):
        alone = gumbel_noise(seed, index[row : row + 1], vocabulary)[0]
        assert torch.equal(alone, noise[row])
        assert (
            gumbel_noise(seed, index[row : row + 1], torch.tensor([[42]]))[0, 0] == noise[row, 42]
        )
    some = torch.tensor([[5, 7], [99, 0], [1, 1], [50, 2]])
    assert torch.equal(gumbel_noise(seed, index, some), noise.gather(1, some))


def test_noise_differs_between_seeds_indices_and_tokens():
    noise = torch.stack(
        [
            gumbel_noise(seed, torch.arange(20), torch.arange(30))
            for seed in (0, 1, 2, -1, 19, 1 << 40)
        ]
    )
    assert noise.unique().numel() == noise.numel()


def test_noise_does_not_depend_on_the_platform():
    """splitmix64 in plain Python: seeds given today must mean the same tomorrow and on a GPU."""
    golden = 0x9E3779B97F4A7C15
    wrap = 2**64 - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
        return z ^ (z >> 31)

    for seed, index, token in [(0, 0, 0), (1, 2, 3), (-5, 1000, 49151), (2**70 + 3, 7, 128_000)]:
        row = mix((mix(seed & wrap) + (index + 1) * golden) & wrap)
        uniform = ((mix((row + (token + 1) * golden) & wrap) >> 12) + 0.5) / 2**52
        got = gumbel_noise(seed, torch.tensor([index]), torch.tensor([token])).item()
        assert got == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12)


@pytest.mark.parametrize("seed", [0, 12345])
def test_noise_is_standard_gumbel(seed):
    noise = gumbel_noise(seed, torch.arange(400), torch.arange(500))
    assert noise.mean().item() == pytest.approx(0.5772157, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    # neighbours in index and in token
    for pairs in (
        (noise[1:], noise[:-1]),
        (noise[:, 1:], noise[:, :-1]),
    ):
        assert (
            abs(torch.corrcoef(torch.stack([side.flatten() for side in pairs]))[0, 1].item()) < 0.01
        )
