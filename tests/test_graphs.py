"""Recorded passes, by stand-ins for CUDA's recording that run on a CPU: the same tokens as without,
whatever the caches held.
"""

import gc
import warnings

import pytest
import torch
from common import CHARACTERS, forward, tiny_llama, tiny_tokenizer, with_adapter
from torch.utils._python_dispatch import TorchDispatchMode

from sdsat.config import DecodeConfig, SamplingConfig, SatConfig
from sdsat.decoding.decoder import Decoder
from sdsat.engines import graphs as recording
from sdsat.engines.cache import SlotCache
from sdsat.engines.graphs import MAX_CACHES, SLOTS, Graphs, eager, padded
from sdsat.method.costs import CONTEXTS, COUNTS, CostCurve
from sdsat.method.tree import make_tree

PROMPTS = ([1, 5, 9, 2, 7], [3], [8, 4, 4, 11, 60, 2, 9, 33, 17, 5, 6])
NUCLEUS = SamplingConfig(temperature=1.0, top_k=10, top_p=0.95, seed=3)
CONFIGS = (
    *(
        dict(k=k, tree=tree)
        for k, tree in ((0, "chain"), (1, "chain"), (5, "chain"), (3, (2, 2, 1)), (5, "paper"))
    ),
    *(
        dict(k=k, strategy="one-pass", budget=24, tree=tree)
        for k, tree in ((3, "chain"), (5, "grown"), (3, (2, 1, 1)))
    ),
    dict(k=4, strategy="auto"),
    dict(k=3, lookup=6),
)


class Tape(TorchDispatchMode):
    """Keeps every tensor operation, and refuses those after which Python would know a value."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        assert not reads.intersection(function.tags), function
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out


def each(value):
    """The tensors of what an operation returns."""
    return value if isinstance(value, (list, tuple)) else [value]


def traced(step):
    """As strict as CUDA's recording: the tensor operations of one run, with every Python number as
    it was then.
    """
    with Tape() as tape:
        results = step()

    def replay():
        made = {}  # {id of a tensor of that run: what stands for it now}

        def now(value):
            if isinstance(value, (list, tuple)):
                return [now(part) for part in value]
            return made.get(id(value), value)

        for function, args, kwargs, out in tape.operations:
            new = function(*map(now, args), **{name: now(of) for name, of in kwargs.items()})
            for then, held in zip(each(out), each(new), strict=True):
                made[id(then)] = held
        return [made[id(result)] for result in results]

    return replay


class Counting:
    def __init__(self, capture):
        self.capture = capture
        self.count = 0

    def __call__(self, step):
        self.count += 1
        return self.capture(step)


def recorded_model(capture=eager, **settings):
    decoder = with_adapter(tiny_llama(), k=5, **settings)
    decoder.engine.graphs = Graphs(Counting(capture))
    return decoder


@pytest.fixture
def decoder():
    return recorded_model(head=6)


def config(num_tokens=24, **settings):
    return DecodeConfig(**settings, max_new_tokens=num_tokens)


def storage(decoder):
    (kept,) = decoder.engine.graphs.free
    return kept


@pytest.mark.parametrize(("head", "turn"), [(0, 0), (6, 2)])
def test_many_generations_on_one_cache_equal_those_without_graphs(head, turn):
    """Over four turns, with a head or without, greedy or not, CONFIGS meet every prompt."""
    plain = with_adapter(tiny_llama(), k=5, head=head)
    decoder = recorded_model(traced, head=head)
    decoder.costs = CostCurve(
        *([[1 + n / 8 for n in COUNTS] for _ in CONTEXTS] for _ in range(2)), 0.01
    )
    for sampling in (SamplingConfig(), NUCLEUS):
        plainly = config(16, sampling=sampling)
        want = [plain.generate(prompt, plainly).token_ids for prompt in PROMPTS]
        for number, settings in enumerate(CONFIGS, turn):
            prompt = number % len(PROMPTS)
            out = decoder.generate(PROMPTS[prompt], config(16, sampling=sampling, **settings))
            assert out.token_ids == want[prompt], (prompt, settings)
        turn += 1
    kept = storage(decoder)
    assert kept.num_slots == kept.layers[0].keys.shape[2] == SLOTS
    assert len(kept.graphs) == decoder.engine.graphs.capture.count < 60


def test_a_full_model_without_adapter():
    settings = dict(k=3, strategy="one-pass", budget=16)
    plain = with_adapter(tiny_llama(), k=5)
    decoder = recorded_model()
    for each in (plain, decoder):
        each.model.adapter.detach()
        each.model.adapter = None
        each.model.sat = SatConfig(40, 5)
    for prompt in PROMPTS:
        assert (
            decoder.generate(prompt, config(**settings)).token_ids
            == plain.generate(prompt, config()).token_ids
        )


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e9])
def test_what_a_cache_held_before_does_not_leak(decoder, poison):
    settings = config(k=3, strategy="one-pass", budget=16)
    want = [decoder.generate(prompt, settings).token_ids for prompt in PROMPTS]
    for prompt, tokens in zip(PROMPTS, want, strict=True):
        for layer in storage(decoder).layers:
            layer.keys.fill_(poison)
            layer.values.fill_(poison)
        assert decoder.generate(prompt, settings).token_ids == tokens


def test_logits_have_the_same_bits_on_a_new_cache_and_on_a_used_one(decoder):
    ids = [1, 5, 9, 2, 7, 3]
    settings = config()
    first = decoder.next_logits(ids, 3, settings)
    kept = first.clone()
    decoder.generate(PROMPTS[2], config(k=5, tree="paper"))
    again = decoder.next_logits(ids, 3, settings)
    assert torch.equal(first, kept)  # a result is not overwritten by later passes
    assert torch.equal(first, again)


def test_a_generation_inside_another_has_a_cache_of_its_own(decoder):
    want = decoder.generate(PROMPTS[0], config()).token_ids
    inner = []

    def on_tokens(tokens, accepted):
        inner.append(decoder.generate(PROMPTS[2], config(8, k=3)).token_ids)

    assert decoder.generate(PROMPTS[0], config(k=3), on_tokens).token_ids == want
    assert all(tokens == inner[0] for tokens in inner)
    assert len(decoder.engine.graphs.free) == 2


def test_caches_are_bounded_and_reused(decoder):
    gc.disable()  # giving back must not wait for it
    try:
        for length in range(1, 7):
            decoder.engine.new_cache(length * SLOTS - 32)
        assert [kept.num_slots for kept in decoder.engine.graphs.free] == [
            n * SLOTS for n in range(3, 7)
        ]
        assert len(decoder.engine.graphs.free) == MAX_CACHES
        cache = decoder.engine.new_cache(4 * SLOTS - 100)
        assert [kept.num_slots // SLOTS for kept in decoder.engine.graphs.free] == [3, 5, 6]
        assert cache.num_slots == 4 * SLOTS
    finally:
        gc.enable()


def test_graphs_are_bounded_and_the_one_not_used_for_longest_goes(decoder, monkeypatch):
    want = decoder.generate(PROMPTS[0], config()).token_ids
    storage(decoder).graphs.clear()
    monkeypatch.setattr(recording, "MAX_GRAPHS", 2)
    for settings in CONFIGS[:4]:
        assert decoder.generate(PROMPTS[0], config(**settings)).token_ids == want
        assert len(storage(decoder).graphs) <= 2
    count = decoder.engine.graphs.capture.count
    held = storage(decoder).graphs
    decoder.generate(PROMPTS[0], config())  # one shape
    last = list(held)[-1]
    assert decoder.engine.graphs.capture.count <= count + 1
    decoder.generate(PROMPTS[0], config(2, k=1))  # others
    decoder.generate(PROMPTS[0], config())
    assert list(held)[-1] == last


def test_shapes_are_few():
    assert [n for n in range(1, 129) if padded(n) == n] == [
        1,
        2,
        3,
        4,
        6,
        8,
        12,
        16,
        24,
        32,
        48,
        64,
        96,
        128,
    ]
    assert all(n <= padded(n) <= 2 * n for n in range(1, 129))


@pytest.mark.parametrize("sats", [0, 3])
def test_a_pass_equals_the_one_without_graphs(decoder, sats):
    plain = with_adapter(tiny_llama(), k=5, head=6)
    tree = make_tree((2, 1), 2)
    tokens = torch.tensor([7, 8, 9, 10, 11, *[decoder.model.sat.token_id] * sats])
    groups = ((2, sats),) if sats else ()
    results = []
    with torch.inference_mode():
        for each in (plain, decoder, decoder):
            cache = each.engine.new_cache(100)
            each.engine.prefill(cache, torch.tensor(PROMPTS[2]))
            forward(each, cache, tokens, tree, groups)
            cache.commit((0, 3))
            results.append(forward(each, cache, tokens, tree, groups))
    for states, logits in results[1:]:
        torch.testing.assert_close(states, results[0][0])
        torch.testing.assert_close(logits, results[0][1])
    assert torch.equal(results[1][1], results[2][1])


def test_a_pass_outside_inference_mode(decoder):
    with torch.no_grad():
        want = Decoder.next_logits.__wrapped__(decoder, PROMPTS[0], 2, config())
    assert torch.equal(decoder.next_logits(PROMPTS[0], 2, config()), want)
    with torch.no_grad():
        assert torch.equal(Decoder.next_logits.__wrapped__(decoder, PROMPTS[0], 2, config()), want)


def test_where_recording_fails_passes_run_without(decoder):
    def failing(step):
        step()
        raise RuntimeError(
            "operation not permitted when stream is capturing\nCUDA kernel errors ..."
        )

    want = decoder.generate(PROMPTS[0], config()).token_ids
    assert decoder.engine.name == "cuda graphs"
    decoder.engine.graphs = Graphs(failing)
    with pytest.warns(
        UserWarning,
        match=(
            "CUDA graphs are off, which is slower: operation not permitted when stream is "
            "capturing$"
        ),
    ):
        assert decoder.generate(PROMPTS[0], config(k=3)).token_ids == want
    assert decoder.engine.name == "transformers"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoder.generate(PROMPTS[0], config(k=3)).token_ids == want


def test_off_on_a_cpu(tmp_path):
    tiny_llama(torch.float32).save_pretrained(tmp_path)
    tiny_tokenizer(CHARACTERS).save_pretrained(tmp_path)
    decoder = Decoder.load(str(tmp_path), device="cpu", engine="transformers", graphs=True)
    assert decoder.engine.graphs is None
    cache = decoder.engine.new_cache(100)
    assert isinstance(cache, SlotCache)
    assert cache.num_slots == 100
    assert cache.graphs is None
