"""Packed linear layers: the plain layer's values, one row's bits whatever the rows beside it, and a
traceless switch.
"""

import pytest
import torch
from common import tiny_llama
from torch import nn

from sdsat.models.packed import PackedLinears, best_linear, can_pack, in_use, pack, packed_linear

CPU = torch.device("cpu")
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(CPU, dtype)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def layer_of(inputs, outputs, dtype, bias=True):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


def test_float32_is_always_packed_and_what_has_no_kernel_never():
    assert can_pack(CPU, torch.float32)
    assert not can_pack(CPU, torch.float64)
    assert not can_pack(torch.device("meta"), torch.float32)


@each_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 33)])
def test_equals_the_plain_layer(dtype, bias, shape):
    layer = layer_of(33, 70, dtype, bias)
    x = torch.randn(shape).to(dtype)
    got = packed_linear(x, pack(layer.weight), layer.bias)
    torch.testing.assert_close(
        got,
        layer(x),
        rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
        atol=1e-2 * x.element_size() / 4,
    )
    torch.testing.assert_close(
        best_linear(layer.weight)(x), nn.functional.linear(x, layer.weight), rtol=2e-2, atol=1e-2
    )


@each_dtype
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (576, 1536), (1536, 576)])
def test_a_row_has_the_same_bits_beside_any_number_of_others(dtype, inputs, outputs):
    weight = pack(layer_of(inputs, outputs, dtype).weight)
    x = torch.randn(64, inputs).to(dtype)
    whole = packed_linear(x, weight)
    for first in (0, 7, 30):
        for count in range(2, 34):
            assert torch.equal(
                packed_linear(x[first : first + count], weight), whole[first : first + count]
            )


@each_dtype
def test_a_model_is_plain_again_after_detach(dtype):
    lm = tiny_llama(dtype)
    ids = torch.arange(1, 12)[None]
    mask = torch.ones(1, 1, 11, 11, dtype=torch.bool).tril()
    plain = lm(ids, attention_mask=mask).logits
    packed = PackedLinears(lm).attach()
    assert torch.equal(lm(ids, attention_mask=mask).logits, plain)  # but in passes
    with in_use():
        near = lm(ids, attention_mask=mask).logits
        torch.testing.assert_close(near, plain, rtol=5e-2, atol=5e-2)
        weight = lm.lm_head.weight.clone()
        lm.lm_head.weight.zero_()  # the packed one is read
        assert torch.equal(lm(ids, attention_mask=mask).logits, near)
        lm.lm_head.weight.copy_(weight)
    packed.detach()
    assert not any("forward" in vars(module) for module in lm.modules())
    assert torch.equal(lm(ids, attention_mask=mask).logits, plain)


def test_layers_with_a_forward_of_their_own_are_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    patched = layer_of(8, 4, torch.float32)
    patched.forward = own = lambda x: -nn.Linear.forward(patched, x)
    layers = nn.ModuleList([Doubled(8, 4), patched])
    x = torch.randn(3, 8)
    want = [layer(x) for layer in layers]
    packed = PackedLinears(layers).attach()
    with in_use():
        assert all(
            torch.equal(layer(x), before) for layer, before in zip(layers, want, strict=True)
        )
    packed.detach()
    assert patched.forward is own


def test_gradients_go_through_the_plain_weight():
    layer = layer_of(8, 4, torch.float32)
    PackedLinears(nn.Sequential(layer)).attach()
    x = torch.randn(3, 8, requires_grad=True)
    with in_use():
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)
        torch.testing.assert_close(gradient, layer.weight.sum(0).expand(3, 8))
        layer.requires_grad_(True)
        (gradient,) = torch.autograd.grad(layer(x.detach()).sum(), layer.weight)
    torch.testing.assert_close(gradient, x.detach().sum(0).expand(4, 8))
