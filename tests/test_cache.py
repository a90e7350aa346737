"""The slot cache: whatever was in flight, what is committed equals a fresh prefill of the same
tokens.
"""

import pytest
import torch
from common import VOCAB, decoder_of, tiny_llama
from torch.nn.utils.rnn import pad_sequence

from sdsat.engines.cache import SlotCache, SlotPlace, pass_mask, slot_positions

SLOTS = 40


def run(lm, cache, tokens, within=None, offsets=None):
    """One pass of `tokens` ([S] ids); causal unless `within` and `offsets` say otherwise.

    Returns logits [S, V].
    """
    rows = torch.arange(len(tokens))
    within = rows <= rows[:, None] if within is None else within
    positions = cache.length + (rows if offsets is None else offsets)
    mask = pass_mask(cache, within)
    return lm(
        tokens[None], attention_mask=mask, position_ids=positions[None], past_key_values=cache
    ).logits[0]


def fresh(lm, tokens, slots=SLOTS):
    """(cache, last logits) after a single pass over all tokens."""
    cache = SlotCache(lm.config.num_hidden_layers, slots)
    logits = run(lm, cache, tokens)[-1]
    cache.commit(tuple(range(len(tokens))))
    return cache, logits


def assert_same_content(cache, other):
    assert cache.length == other.length
    for layer, wanted in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(
            layer.keys[:, :, : cache.length], wanted.keys[:, :, : cache.length]
        )
        torch.testing.assert_close(
            layer.values[:, :, : cache.length], wanted.values[:, :, : cache.length]
        )


def noisy_pass(lm, cache, tokens, path, rows, generator):
    """A pass of `rows` rows in which `path` holds `tokens` as a chain and every other row is
    garbage.
    """
    ids = torch.randint(VOCAB, (rows,), generator=generator)
    within = torch.rand(rows, rows, generator=generator) < 0.5
    offsets = torch.randint(9, (rows,), generator=generator)
    for depth, row in enumerate(path):
        ids[row], offsets[row] = tokens[depth], depth
        within[row] = False
        within[row, list(path[: depth + 1])] = True
    within.fill_diagonal_(True)
    return run(lm, cache, ids, within, offsets)


@pytest.mark.parametrize(
    "path", [(), (0,), (0, 1, 2), (0, 2), (0, 1, 4), (0, 3, 5), (0, 1, 2, 3, 4, 5), (2, 1)]
)
def test_commit_keeps_a_path_and_forgets_the_rest(path):
    lm = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (20,), generator=generator)
    cache, _ = fresh(lm, tokens[:7])
    noisy_pass(lm, cache, tokens[7:], path, 6, generator)
    cache.commit(path)
    end = 7 + len(path)
    assert_same_content(cache, fresh(lm, tokens[:end])[0])
    torch.testing.assert_close(run(lm, cache, tokens[end:])[-1], fresh(lm, tokens)[1])


@pytest.mark.parametrize("seed", range(5))
def test_a_long_run_of_commits_equals_a_fresh_prefill(seed):
    lm = tiny_llama()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (25,), generator=generator)
    cache, _ = fresh(lm, tokens[:1])
    storage = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    while cache.length < 20:
        num_kept = int(torch.randint(6, (), generator=generator))
        path = tuple(torch.randperm(7, generator=generator)[:num_kept].sort().values.tolist())
        noisy_pass(lm, cache, tokens[cache.length :], path, 7, generator)
        cache.commit(path)
        for layer in cache.layers:
            assert layer.keys.shape == layer.values.shape == (1, 2, SLOTS, 8)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == storage
    assert_same_content(cache, fresh(lm, tokens[: cache.length])[0])
    torch.testing.assert_close(run(lm, cache, tokens[cache.length :])[-1], fresh(lm, tokens)[1])


def test_rollback_is_doing_nothing():
    lm = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (9,), generator=generator)
    cache, _ = fresh(lm, tokens[:5])
    want = run(lm, cache, tokens[5:])
    for _ in range(3):
        noisy_pass(lm, cache, tokens, (), 30, generator)
    assert torch.equal(run(lm, cache, tokens[5:]), want)


def test_pass_mask_is_the_documented_one():
    cache = SlotCache(1, 8)
    cache.length = 3
    within = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    assert pass_mask(cache, within).dtype == torch.bool
    assert pass_mask(cache, within).int().tolist() == [
        [[[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 1, 0, 0]]]
    ]
    cache.length = 0
    assert pass_mask(cache, within)[0, 0, 2].int().tolist() == [1, 0, 1, 0, 0, 0, 0, 0]


def test_slot_positions_are_those_of_what_the_slots_hold():
    cache = SlotCache(1, 8)
    cache.length = 3
    offsets = torch.tensor([0, 1, 1])
    assert slot_positions(cache, offsets)[:6].tolist() == [0, 1, 2, 3, 4, 4]
    assert torch.equal(
        slot_positions(cache, offsets, torch.tensor([3])), slot_positions(cache, offsets)
    )


@pytest.mark.parametrize(
    "slots", [[[0], [5], [3]], [[4, 0], [1], [], [7, 6, 2]]], ids=["one row", "many rows"]
)
def test_rows_are_written_where_their_sequences_are(slots):
    live = len(slots)
    cache = SlotCache(2, 8)
    before = torch.randn(live + 1, 2, 8, 4)
    for layer in range(2):
        cache.update(before, -before, layer)  # slots 0..7
    rows = [(b, slot) for b, places in enumerate(slots) for slot in places]
    cache.row_sequences, cache.row_slots = torch.tensor(rows).T
    cache.num_live = live
    cache.visible = 7
    keys, values = torch.randn(2, 1, 2, len(rows), 4)
    seen = cache.update(keys, values, 1)
    want_keys = before.clone()
    want_values = -before
    for row, (b, slot) in enumerate(rows):
        want_keys[b, :, slot], want_values[b, :, slot] = keys[0, :, row], values[0, :, row]
    assert torch.equal(cache.layers[1].keys, want_keys)
    assert torch.equal(cache.layers[1].values, want_values)
    assert torch.equal(cache.layers[0].keys, before)
    assert torch.equal(seen[0], want_keys[:live, :, :7]) and torch.equal(
        seen[1], want_values[:live, :, :7]
    )


def test_places_of_a_cache_commit_and_move_by_themselves():
    cache = SlotCache(1, 8)
    before = torch.randn(3, 2, 8, 4)
    cache.update(before, -before, 0)
    place = SlotPlace(cache, 2, 3)
    other = SlotPlace(cache, 0, 5)
    place.commit((0, 2, 3))
    other.commit((0, 1))
    assert (place.length, other.length) == (6, 7)
    want = before.clone()
    want[2, :, 4:6] = before[2, :, 5:7]
    assert torch.equal(cache.layers[0].keys, want) and torch.equal(cache.layers[0].values, -want)
    place.move(1)
    want[1, :, :6] = want[2, :, :6]
    assert (
        place.number == 1
        and torch.equal(cache.layers[0].keys, want)
        and torch.equal(cache.layers[0].values, -want)
    )


def test_visible_limits_what_attention_reads():
    cache = SlotCache(1, 8)
    cache.visible = 5
    keys, values = cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    assert keys.shape == values.shape == (1, 2, 5, 4)
    assert cache.layers[0].keys.shape == (1, 2, 8, 4)


def test_a_batch_of_unequal_sequences_equals_each_alone():
    lm = tiny_llama()
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(VOCAB, (n,), generator=generator) for n in (3, 9, 6)]
    batch = SlotCache(lm.config.num_hidden_layers, SLOTS)
    two = SlotCache(lm.config.num_hidden_layers, 9)
    # padded; the last slot is used again
    decoder_of(lm).engine.prefill(two, pad_sequence(sequences[:2], batch_first=True))
    batch.copy_sequences(two, [0, 1], [2, 0], len(sequences))
    batch.copy_sequences(fresh(lm, sequences[2][:-1])[0], [0], [1], len(sequences))
    sequences = [sequences[1], sequences[2], sequences[0]]
    length = torch.tensor([len(sequence) - 1 for sequence in sequences])
    rows = torch.arange(3)
    batch.row_sequences = rows
    batch.row_slots = length
    batch.num_live = 3
    mask = (torch.arange(SLOTS) <= length[:, None])[:, None, None]
    last = torch.stack([sequence[-1] for sequence in sequences])[None]
    places = dict(row_numbers=rows[:, None], row_places=rows)
    logits = lm(
        last, attention_mask=mask, position_ids=length[None], past_key_values=batch, **places
    ).logits[0]
    for sequence, row in zip(sequences, logits, strict=True):
        torch.testing.assert_close(row, fresh(lm, sequence)[1])
