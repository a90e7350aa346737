"""A pass of a model on two GPUs that don't exist: torch's fake tensors have a device and a shape
but no numbers, and an operation on tensors of two devices fails. Run by test_devices.py in a
process of its own, since torch gets a made-up kind of device.
"""

import numpy
import torch
from accelerate import dispatch_model, hooks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from transformers import LlamaConfig, LlamaForCausalLM

from sdsat.config import SamplingConfig, SatConfig
from sdsat.engines.base import PassInput, RowPolicy
from sdsat.engines.cache import SlotCache, SlotPlace
from sdsat.engines.drafting import Guesses
from sdsat.engines.transformers import TransformersEngine
from sdsat.method.layout import SatGroup
from sdsat.method.tree import make_tree
from sdsat.models import attention, devices
from sdsat.models.adapter import AdapterConfig, SatAdapter
from sdsat.models.sat_model import SatModel

LAYERS = 5
SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def on_devices(lm, device_map):
    """Put fake weights where the map says, and accelerate's hooks around them (it would put real
    ones there itself).
    """
    for name, module in lm.named_modules():
        where = next(
            (device for part, device in device_map.items() if f"{name}.".startswith(f"{part}.")),
            None,
        )
        for kind in (module._parameters, module._buffers):
            for key, held in [(key, held) for key, held in kind.items() if held is not None]:
                moved = torch.empty(held.shape, dtype=held.dtype, device=where)
                kind[key] = (
                    torch.nn.Parameter(moved, requires_grad=False)
                    if kind is module._parameters
                    else moved
                )
    hooks.set_module_tensor_to_device = lambda *args, **kwargs: None
    dispatch_model(lm, device_map, skip_keys=lm._skip_keys_device_placement)


def main():
    backend_registration._setup_privateuseone_for_python_backend("gpu")
    torch.tensor = lambda data, device=None: torch.empty(
        numpy.shape(data), dtype=torch.long, device=device
    )
    devices.pick_devices = lambda *_: (torch.device("gpu:0"), torch.device("gpu:1"))
    devices.SPARE["gpu"] = 0
    devices.free_bytes = lambda device: 2**20
    config = LlamaConfig(num_hidden_layers=LAYERS, tie_word_embeddings=True, **SHAPE)
    device_map = devices.place(devices.model_size("tiny", config, torch.float32), "0+1", 64)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        lm = LlamaForCausalLM(config).eval().requires_grad_(False)
        lm.set_attn_implementation(attention.NAME)
        on_devices(lm, device_map)
        adapter = (
            SatAdapter(lm, AdapterConfig("tiny", SatConfig(64, 3), 4, head=8)).fuse().attach(lm)
        )
        model = SatModel(lm, None, "tiny", adapter.config.sat, adapter)
        engine = TransformersEngine(model)
        engine.row_policy = RowPolicy(2, 1)
        cache = engine.new_cache(64)
        engine.prefill(cache, torch.arange(5, device=model.device))
        tree = make_tree((2, 1), 2).kept((0, 1, 2, 3))
        groups = (SatGroup(1, 3),)
        out = engine.forward([PassInput(cache, [0] * 4, tree, groups)])
        for sampling in (SamplingConfig(), SamplingConfig(1.0, 10, 0.95)):
            x = engine.next_tokens(out.logits, torch.arange(4, device=model.device), sampling)
            chain = make_tree("chain", 3)
            guesses = Guesses(x[:1], out.states[4:], out.sat_logits, 1, sampling)
            assert engine.draft(guesses, chain).device == model.device
            assert engine.grow(guesses, 16).device == model.device
        cache.commit((0, 2))
        cache.row_slots = torch.arange(7, device=model.device)  # as graphs name their slots
        engine.forward([PassInput(cache, [0] * 4, tree, groups)])
        shared = SlotCache(LAYERS, 64)
        for layer, other in zip(shared.layers, cache.layers, strict=True):
            layer.lazy_initialization(
                other.keys.expand(2, -1, -1, -1), other.values.expand(2, -1, -1, -1)
            )
        places = [SlotPlace(shared, number, length) for number, length in enumerate((5, 3))]
        out = engine.forward([PassInput(place, [0] * 4, tree, groups) for place in places])
        places[0].commit((0, 2))
        places[1].move(0)
        assert list(map(str, model.devices)) == ["gpu:0", "gpu:1"]
        print(
            out.states.device,
            out.logits.device,
            *(layer.keys.device.index for layer in cache.layers),
        )
