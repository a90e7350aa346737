"""The attention function against one softmax per head, row by row."""

import pytest
import torch
from common import tiny_llama

from sdsat.models.attention import grouped_attention


def naive_attention(query, key, value, mask, scaling, softcap=None):
    """[B, S, H, D]: head h uses key/value head h // groups, a row the columns its mask names."""
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    out = torch.zeros(batch, rows, heads, dim, dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for s in range(rows):
                seen = mask[b if len(mask) > 1 else 0, 0, s].nonzero()[:, 0]
                scores = key[b, h // groups, seen] @ query[b, h, s] * scaling
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                out[b, s, h] = scores.softmax(0) @ value[b, h // groups, seen]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("batch", "masks"), [(1, 1), (3, 3), (3, 1)])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_equals_naive_attention(kv_heads, batch, masks, rows, scaling, softcap):
    generator = torch.Generator().manual_seed(kv_heads)
    # Laid out [B, S, H, D] and transposed, as transformers hands them over.
    query, key, value = (
        torch.randn(batch, n, heads, 8, dtype=torch.double, generator=generator).transpose(1, 2)
        for n, heads in ((rows, 6), (11, kv_heads), (11, kv_heads))
    )
    mask = torch.rand(masks, 1, rows, 11, generator=generator) < 0.5
    mask[..., 2] = True
    got, weights = grouped_attention(torch.nn.Module(), query, key, value, mask, scaling, softcap)
    assert weights is None
    # a softmax in float32, as Gemma 2's own
    tolerance = dict(rtol=1e-5, atol=1e-6) if softcap else {}
    torch.testing.assert_close(
        got, naive_attention(query, key, value, mask, scaling or 8**-0.5, softcap), **tolerance
    )


def test_masked_slots_cannot_leak():
    query, key, value = (torch.randn(1, heads, n, 8) for heads, n in ((4, 3), (2, 9), (2, 9)))
    mask = torch.zeros(1, 1, 3, 9, dtype=torch.bool)
    mask[..., :4] = True
    clean = grouped_attention(torch.nn.Module(), query, key, value, mask)[0]
    key[:, :, 4:], value[:, :, 4:] = 1e4, -1e4
    assert torch.equal(grouped_attention(torch.nn.Module(), query, key, value, mask)[0], clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_at_the_end_of_a_long_cache(dtype):
    """Whole blocks of keys that a row may not see, before and behind what it may, count for
    nothing.
    """
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, n, 32) for heads, n in ((4, 3), (2, 2600), (2, 2600))
    )
    mask = torch.zeros(1, 1, 3, 2600, dtype=torch.bool)
    for row in range(3):
        mask[..., row, 2000 + row : 2016 + row] = True
    got = grouped_attention(
        torch.nn.Module(), *(part.to(dtype) for part in (query, key, value)), mask
    )[0]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        got.float(),
        naive_attention(query, key, value, mask, 32**-0.5),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_beside_any_number_of_others(dtype):
    """Three query heads a key/value head, as in the default model: 11 rows fold into 33, one beyond
    a block of 32.
    """
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, n, 64).to(dtype) for heads, n in ((9, 45), (3, 320), (3, 320))
    )
    mask = (torch.arange(320) < 200).expand(1, 1, 45, 320)
    whole = grouped_attention(torch.nn.Module(), query, key, value, mask)[0]
    for rows in range(1, 46):
        part = grouped_attention(
            torch.nn.Module(), query[:, :, :rows], key, value, mask[:, :, :rows]
        )[0]
        assert torch.equal(part, whole[:, :rows]), rows


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_llama_with_it_equals_transformers_eager_attention(kv_heads):
    ids = torch.arange(1, 12)[None]
    mask = torch.ones(1, 1, 11, 11, dtype=torch.bool).tril()
    ours, eager = (tiny_llama(num_key_value_heads=kv_heads) for _ in range(2))
    eager.set_attn_implementation("eager")
    torch.testing.assert_close(
        ours(ids, attention_mask=mask).logits, eager(ids).logits, rtol=0, atol=1e-5
    )
