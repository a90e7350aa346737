"""A model that is not what it was when it was made ready, or not what its weights say: decoded as
it is, or refused by name.

The oracle is plain `generate` of a model that transformers alone has loaded, and that went through
the same changes.
"""

import copy
import os
import pickle
import warnings
from functools import cache

import peft
import pytest
import torch
from common import adapted, forward, one_line_error, tiny_tokenizer
from test_families import COSTS, FAMILIES, PROMPT, VOCAB, alone, checkpoint
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama as llama

import sdsat
from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.engines.base import RowPolicy
from sdsat.engines.native.compiler import Unavailable
from sdsat.engines.native.engine import NativeEngine
from sdsat.engines.native.weights import NativeWeights
from sdsat.engines.transformers import TransformersEngine
from sdsat.method.tree import make_tree
from sdsat.models.adapter import AdapterConfig
from sdsat.models.sat_model import SatModel

NUM = 10
HOW = [
    dict(strategy="two-step"),
    dict(strategy="one-pass", budget=9),
    dict(strategy="auto"),
    dict(k=0),
]
ROUNDED = dict(strategy="rounded")  # the native engine has it alone
each_engine = pytest.mark.parametrize("engine", ["auto", "transformers"])


@pytest.fixture(autouse=True)
def _no_probe(monkeypatch):
    """Rows are padded without trying which padding is the cheapest: most of the time that a new
    engine takes here.
    """
    monkeypatch.setattr(TransformersEngine, "policies", ())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """tied or not -> (a base model's directory, an adapter's for it)."""
    made = {}
    for tied in (False, True):
        folder = tmp_path_factory.mktemp("weights")
        config = copy.deepcopy(FAMILIES["llama 3, tied" if tied else "llama 3"])
        config.num_hidden_layers = 3
        base = checkpoint(folder / "base", config, sat=False)
        model = adapted(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), strength=0.3, head=32
        )
        model.adapter.config = AdapterConfig(
            base, model.sat, 4, head=32, base_sample=model.adapter.config.base_sample
        )
        model.adapter.save(folder / "adapter")
        made[tied] = base, str(folder / "adapter")
    return made


@cache
def loaded(folder, dtype):
    """As transformers loads it: loaded once, for copies of it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


loaded_alone = cache(alone)


def prepared(folders, engine="auto", before=None, tied=False, dtype=torch.float32):
    """A model with an adapter; `before`: what is done to it before it is made ready."""
    base, adapter = folders[tied]
    lm = copy.deepcopy(loaded(base, dtype))
    if before:
        before(lm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        sdsat.attach(lm, tiny_tokenizer([f"<{i}>" for i in range(VOCAB)]), adapter, engine=engine)
    lm.sdsat.costs = COSTS
    return lm


def oracle(folders, *changes, tied=False):
    lm = copy.deepcopy(loaded_alone(folders[tied][0]))
    for change in changes:
        change(lm)
    return lm


def plainly(lm, prompt=PROMPT, **settings):
    return lm.generate(
        torch.tensor([prompt]), max_new_tokens=NUM, do_sample=False, pad_token_id=0, **settings
    )[0].tolist()


def unchanged(folders):
    return _unchanged(folders[False][0])


@cache
def _unchanged(base):
    return plainly(loaded_alone(base))


def drafting(lm, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plainly(lm, custom_generate=sdsat.generate, **settings)


def assert_decodes_as(lm, want, engine):
    """Every way of drafting gives plain `generate`'s output of `want`, and so does plain `generate`
    of the model itself.
    """
    expected = plainly(want)
    for how in [*HOW, ROUNDED] if engine == "native" else HOW[::2]:
        assert drafting(lm, **how) == expected, how
    assert plainly(lm) == expected
    assert lm.sdsat.engine.name == engine


def loads(lm):
    torch.manual_seed(3)
    state = lm.state_dict()
    noise = {name: 0.1 * torch.randn_like(tensor) for name, tensor in lm.named_parameters()}
    lm.load_state_dict({name: tensor + noise.get(name, 0) for name, tensor in state.items()})


def edits(lm):
    with torch.no_grad():
        lm.model.layers[1].mlp.down_proj.weight.mul_(-1)


def edits_a_row(lm):
    with torch.no_grad():
        lm.lm_head.weight[4:9] *= 3


def trains(lm):
    lm.train().requires_grad_(True)
    ids = torch.tensor([PROMPT])
    optimizer = torch.optim.SGD(lm.parameters(), 0.3)
    lm(ids, labels=ids).loss.backward()
    optimizer.step()
    lm.eval().requires_grad_(False)


def merges(lm):
    torch.manual_seed(4)
    weight = lm.model.layers[0].self_attn.v_proj.weight
    weight.data += 0.4 * torch.randn_like(weight)  # torch counts no version of this


def puts_another_parameter(lm):
    torch.manual_seed(5)
    lm.model.layers[2].self_attn.o_proj.weight = nn.Parameter(0.3 * torch.randn(64, 128))


def puts_another_layer(lm):
    lm.model.layers[0].mlp, lm.model.layers[1].mlp = lm.model.layers[1].mlp, lm.model.layers[0].mlp


def takes_other_norms(lm):
    with torch.no_grad():
        lm.model.norm.weight.copy_(torch.linspace(-1, 2, 64))


CHANGES = [
    loads,
    edits,
    edits_a_row,
    trains,
    merges,
    puts_another_parameter,
    puts_another_layer,
    takes_other_norms,
]
named = dict(ids=lambda change: change.__name__)


@pytest.mark.parametrize(
    ("change", "engine"),
    [
        *((change, "auto") for change in CHANGES),
        *((change, "transformers") for change in (loads, merges, puts_another_layer)),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_weights_that_changed_are_seen(folders, change, engine):
    lm = prepared(folders, engine)
    drafting(lm)
    drafting(lm, strategy="rounded") if engine == "auto" else None
    want = oracle(folders, change)
    assert plainly(want) != unchanged(folders)
    change(lm)
    assert_decodes_as(lm, want, "native" if engine == "auto" else engine)


@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_the_adapters_own_weights_are_seen(folders, engine):
    """Other updates draft otherwise: as those of a model that was made ready with them."""
    lm = prepared(folders, engine)

    def count(lm):
        settings = dict(strategy="two-step", max_new_tokens=40, do_sample=False)
        out = lm.generate(
            torch.tensor([PROMPT]),
            custom_generate=sdsat.generate,
            return_dict_in_generate=True,
            **settings,
        )
        return out.generations[0].accepted_by_depth

    first = count(lm)
    with torch.no_grad():
        for parameter in lm.sdsat.model.adapter.parameters():
            parameter.zero_()
    fresh = prepared(folders, engine)
    with torch.no_grad():
        for parameter in fresh.sdsat.model.adapter.parameters():
            parameter.zero_()
    assert count(lm) == count(fresh) != first


def test_nothing_is_made_anew_where_nothing_changed(folders):
    lm = prepared(folders)
    # transformers puts hooks in for it, and leaves them there
    lm(torch.tensor([PROMPT]), output_hidden_states=True)
    drafting(lm)
    engine = lm.sdsat.engine
    assert engine is not None
    plainly(lm)
    lm(torch.tensor([PROMPT]), output_hidden_states=True)
    drafting(lm)
    assert lm.sdsat.engine is engine


@each_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_another_dtype(folders, engine, dtype):
    """As a model that was loaded in that dtype; and back in float32 as plain generate with the
    rounded weights.
    """
    lm = prepared(folders, engine)
    drafting(lm)
    lm.to(dtype)
    fresh = prepared(folders, engine, dtype=dtype)
    assert [drafting(lm, **how) for how in HOW] == [drafting(fresh, k=0)] * len(HOW)
    assert lm.sdsat.model.dtype == lm.sdsat.model.adapter.sat_embedding.dtype == dtype
    assert lm.sdsat.engine.name == fresh.sdsat.engine.name
    lm.float()
    assert_decodes_as(
        lm,
        oracle(folders, lambda lm: lm.to(dtype).float()),
        "native" if engine == "auto" else engine,
    )


def test_a_dtype_that_no_engine_has_is_refused(folders):
    lm = prepared(folders).double()
    with one_line_error("its weights are torch.float64", "float32"):
        drafting(lm)
    native = prepared(folders, "native").half()
    with one_line_error("engine=native", "torch.float16"):
        drafting(native)


def test_weights_of_two_dtypes_are_no_job_for_the_native_engine(folders):
    lm = prepared(folders)
    lm.model.layers[0].mlp.up_proj.bfloat16()
    with pytest.raises(Unavailable, match=r"layers/0/mlp/up_proj is torch\.bfloat16"):
        NativeEngine(SatModel(lm, None, "tiny"))


# What a model computes beside its weights.


class Wrapped(nn.Module):
    """A linear layer and something beside it, in the form of PEFT's LoraLayer."""

    def __init__(self, base_layer):
        super().__init__()
        torch.manual_seed(6)
        self.base_layer = base_layer
        self.beside = nn.Linear(base_layer.in_features, base_layer.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.beside(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Turned(nn.Module):
    def forward(self, weight):
        return weight.roll(1, 0)


class Lifted(nn.Module):
    """A norm of one's own."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x) + 0.7


def lora(lm, targets=("q_proj", "v_proj", "down_proj")):
    torch.manual_seed(7)
    config = peft.LoraConfig(
        r=4, target_modules=list(targets), init_lora_weights=False, lora_alpha=16
    )
    return peft.get_peft_model(lm, config).eval()


def lora_on_some(lm):
    lora(lm, ["o_proj"])


def wraps(lm):
    lm.model.layers[1].mlp.up_proj = Wrapped(lm.model.layers[1].mlp.up_proj)


def wraps_the_head(lm):
    lm.lm_head = Wrapped(lm.lm_head)


def doubles(lm):
    layer = lm.model.layers[0].self_attn.o_proj
    layer.__class__ = Doubled


def lifts(lm):
    lm.model.norm = Lifted(lm.model.norm)


def steers(lm):
    torch.manual_seed(8)
    vector = 9 * torch.randn(64)
    lm.model.layers[1].register_forward_hook(
        lambda module, inputs, output: output + vector.to(output)
    )


def steers_inputs(lm):
    lm.model.layers[2].mlp.register_forward_pre_hook(lambda module, inputs: (inputs[0] * -2,))


def parametrizes(lm):
    parametrize.register_parametrization(lm.model.layers[2].mlp.down_proj, "weight", Turned())


def patches(lm):
    layer = lm.model.layers[1].self_attn.v_proj
    layer.forward = lambda x: -type(layer).forward(layer, x)


def scales_attention(lm):
    for layer in lm.model.layers:
        layer.self_attn.scaling *= 3


STRANGE = {
    lora: "peft.tuners.lora",
    lora_on_some: "o_proj is a peft.tuners.lora",
    wraps: ("up_proj is a test_weights.Wrapped"),
    wraps_the_head: "lm_head is a test_weights.Wrapped",
    doubles: ("o_proj is a test_weights.Doubled"),
    lifts: "norm is a test_weights.Lifted",
    steers: "layers.1 has a forward hook",
    steers_inputs: "mlp has a forward hook",
    parametrizes: "ParametrizedLinear",
    patches: "v_proj has a forward of its own",
    scales_attention: "scaling=",
}


@pytest.mark.parametrize("strange", STRANGE, **named)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_is_not_the_weights_is_honoured(folders, strange, when):
    want = oracle(folders, strange)
    assert plainly(want) != unchanged(folders)
    lm = prepared(folders, before=strange if when == "before" else None)
    if when == "after":
        drafting(lm)
        strange(lm)
    assert_decodes_as(lm, want, "transformers")
    if when == "before":
        with one_line_error("engine=native", STRANGE[strange]):
            prepared(folders, "native", before=strange)
    with pytest.raises(Unavailable, match=STRANGE[strange].replace("(", r"\(")):
        NativeWeights(SatModel(lm, None, "tiny"))


def patch_a_class(monkeypatch):
    plain = llama.LlamaMLP.forward
    monkeypatch.setattr(llama.LlamaMLP, "forward", lambda self, x: plain(self, x) * 0.3)
    return "mlp has the forward test_weights."


def patch_a_function(monkeypatch):
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: (q, k))
    return "self_attn calls test_weights."


@pytest.mark.parametrize("patch", [patch_a_class, patch_a_function], **named)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_is_patched_for_all_models_is_honoured(folders, monkeypatch, patch, when):
    """As Liger's kernels are put in place."""
    before = unchanged(folders)
    lm = None
    if when == "after":
        lm = prepared(folders)
        drafting(lm)
    message = patch(monkeypatch)
    lm = lm or prepared(folders)
    want = oracle(folders)
    assert plainly(want) != before
    assert_decodes_as(lm, want, "transformers")
    with one_line_error("engine=native", message):
        prepared(folders, "native")
    monkeypatch.undo()
    assert plainly(lm) == drafting(lm) == before


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize("renewed", [False, True])
def test_weights_that_change_while_a_batch_is_decoded_end_it(folders, engine, renewed):
    """Its other outputs would be of neither model."""
    lm = prepared(folders, engine)
    outs = lm.sdsat.iterate_batch([PROMPT] * 3, DecodeConfig(2, 6), batch_size=2)
    next(outs)
    with torch.no_grad():
        lm.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    if renewed:
        lm.sdsat.generate(PROMPT, DecodeConfig(2, 6))
    next(outs)  # ended in the same pass as the first
    with one_line_error("its weights or modules changed while outputs of a batch"):
        next(outs)


def test_a_model_with_fewer_layers_than_its_config_says(folders):
    def drop(lm):
        lm.model.layers = lm.model.layers[:2]

    want = plainly(oracle(folders, drop))
    lm = alone(folders[False][0])
    sdsat.attach(lm)
    drafting(lm, k=0)
    drop(lm)
    assert drafting(lm, k=0) == want != unchanged(folders)
    with pytest.raises(Unavailable, match=r"no module model\.layers\.2"):
        NativeEngine(SatModel(lm, None, "tiny"))
    adapted = prepared(folders)
    drop(adapted)
    with one_line_error("no linear layer model.layers.2", "any more"):
        drafting(adapted)


def test_peft_at_work(folders):
    """Switched off and on, merged, and asked through PEFT's own model."""
    lm = prepared(folders)
    lora_model = lora(lm)
    want = lora(alone(folders[False][0]))
    with one_line_error("model: a peft.peft_model.PeftModel", "get_base_model()"):
        sdsat.attach(lora_model)
    ask = lambda: plainly(lora_model, custom_generate=sdsat.generate)  # noqa: E731
    with pytest.warns(UserWarning, match="slower: .* is a peft"):
        assert ask() == plainly(want) != unchanged(folders)
    with lora_model.disable_adapter():
        assert ask() == unchanged(folders)
    assert ask() == plainly(want)
    merged = lora_model.merge_and_unload()
    assert merged is lm
    assert_decodes_as(lm, want.merge_and_unload(), "native")


def on_the_last_row(lm):
    def hook(module, inputs, output):
        output = output.clone()
        output[:, -1] += 9
        return output

    return lm.model.layers[1].register_forward_hook(hook)


def on_single_rows(lm):
    return lm.model.layers[1].register_forward_hook(
        lambda module, inputs, output: output + 9 * (output.shape[1] == 1)
    )


def around_the_model(lm):
    def hook(module, inputs, output):
        output.logits = -output.logits
        return output

    return lm.register_forward_hook(hook)


def on_all_modules(lm):
    def hook(module, inputs, output):
        return output.flip(1) if isinstance(module, nn.Linear) else None

    return nn.modules.module.register_module_forward_hook(hook)


REFUSED = {
    on_the_last_row: "layers.1 has a forward hook",
    on_single_rows: "layers.1 has a forward hook",
    around_the_model: "the model has a forward hook",
    on_all_modules: ("a forward hook for all modules"),
}


@each_engine
@pytest.mark.parametrize("strange", REFUSED, **named)
def test_what_passes_cannot_honour_is_refused_by_name(folders, engine, strange):
    lm = prepared(folders, engine)
    want = drafting(lm)
    handle = strange(lm)
    try:
        for how in HOW:
            with one_line_error(REFUSED[strange], "treat every row"):
                drafting(lm, **how)
        with one_line_error(REFUSED[strange], "treat every row"):
            prepared(folders, engine, strange if strange is not on_all_modules else None)
    finally:
        handle.remove()
    assert drafting(lm) == want


# NaN and infinite weights.


def spoils(name, value):
    def spoil(lm):
        with torch.no_grad():
            lm.get_parameter(name)[3] = value

    return spoil


BROKEN = {
    "lm_head.weight": float("nan"),
    "model.layers.1.mlp.up_proj.weight": float("inf"),
    "model.norm.weight": float("nan"),
}


@each_engine
@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_are_no_numbers_are_one_error(folders, engine, name):
    spoil = spoils(name, BROKEN[name])
    before = prepared(folders, engine, spoil)
    after = prepared(folders, engine)
    drafting(after)
    spoil(after)
    for lm in (before, after):
        for how in [
            *HOW,
            *[ROUNDED] * (engine == "auto"),
            dict(repetition_penalty=1.2),
            dict(output_scores=True),
        ]:
            with one_line_error(
                f"the weight {name} holds NaN or infinite numbers", lm.sdsat.model.name
            ):
                drafting(lm, **how)
        lm.sdsat.costs = None  # measured anew
        for k, strategy in ((0, "two-step"), (3, "two-step"), (3, "auto")):
            config = DecodeConfig(
                k, 8, sampling=SamplingConfig(1.0, top_k=5, top_p=0.9, seed=1), strategy=strategy
            )
            with one_line_error(f"the weight {name} holds NaN or infinite numbers"):
                lm.sdsat.generate(PROMPT, config)


def test_numbers_that_overflow_are_one_error(folders):
    def grow(lm):
        with torch.no_grad():
            lm.lm_head.weight.mul_(60000 / lm.lm_head.weight.abs().max())

    lm = prepared(folders, "transformers", dtype=torch.float16)
    grow(lm)
    assert all(bool(parameter.isfinite().all()) for parameter in lm.parameters())
    with one_line_error("all weights are finite", "don't fit in float16", "bfloat16 or float32"):
        drafting(lm)


def test_an_adapter_of_no_numbers_is_refused(folders):
    lm = prepared(folders)
    with torch.no_grad():
        lm.sdsat.model.adapter.sat_embedding[3] = float("nan")
    with one_line_error("adapter: sat_embedding holds NaN or infinite numbers"):
        drafting(lm)


# Copies, other processes.


@each_engine
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda lm: pickle.loads(pickle.dumps(lm))], ids=["deepcopy", "pickle"]
)
def test_copies_are_ready_and_on_their_own(folders, engine, copied):
    lm = prepared(folders, engine)
    want = drafting(lm)
    sats = sat_logits(lm)
    other = copied(lm)
    assert other.sdsat.model.lm is other and other.sdsat.model.adapter is not lm.sdsat.model.adapter
    native = "native" if engine == "auto" else engine
    assert_decodes_as(other, oracle(folders), native)
    assert torch.equal(sat_logits(other), sats)
    with torch.no_grad():
        lm.sdsat.model.adapter.sat_embedding.zero_()
    assert not torch.equal(sat_logits(lm), sats)
    assert torch.equal(sat_logits(other), sats)
    loads(other)  # changes the copy alone
    assert_decodes_as(other, oracle(folders, loads), native)
    assert drafting(lm) == want


@torch.inference_mode()
def sat_logits(lm):
    """[3, V] logits of SATs after a prompt."""
    lm.sdsat.renew()
    cache = lm.sdsat.engine.new_cache(64)
    lm.sdsat.engine.prefill(cache, torch.tensor(PROMPT))
    tokens = torch.tensor([3] + [lm.sdsat.model.sat.token_id] * 3)
    return forward(
        lm.sdsat, cache, tokens, make_tree("chain", 0), ((0, 3),), policy=RowPolicy(1, 1)
    )[1][1:]


def generate_in_forks(folder):
    """Print, of a process that was forked from one with threads, what it says with 2 and with 1."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    model, _ = sdsat.load(folder, "float32", "cpu")
    how = dict(max_new_tokens=4, custom_generate=sdsat.generate, k=2, strategy="two-step")

    def ask():
        return model.generate(torch.tensor([[1, 5, 9]]), **how).tolist()

    want = ask()
    for threads in (2, 1):
        if not os.fork():
            torch.set_num_threads(threads)
            try:
                print(threads, ask() == want, flush=True)
            except sdsat.InputError as error:
                print(threads, error, flush=True)
            os._exit(0)
        os.wait()


def test_a_forked_process_is_told_so(own_process, folders):
    done = own_process(generate_in_forks, folders[False][1]).end()
    assert done.code == 0, done.errors
    first, second = done.out.splitlines()
    assert (
        first.startswith("2 model ")
        and "was forked from" in first
        and "'spawn'" in first
        and "set_num_threads(1)" in first
    )
    assert second == "1 True"


# More tokens.


def grows(lm, count=3):
    """As after `tokenizer.add_tokens`: new rows, whose embeddings make them likely."""
    lm.resize_token_embeddings(VOCAB + count, mean_resizing=False)
    torch.manual_seed(9)
    with torch.no_grad():
        for weight in (lm.get_input_embeddings().weight, lm.get_output_embeddings().weight):
            weight[VOCAB:] = 0.6 * torch.randn(count, weight.shape[1])


@each_engine
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_tokens_that_were_added_are_no_sats(folders, engine, tied, when):
    lm = prepared(folders, engine, grows if when == "before" else None, tied)
    if when == "after":
        drafting(lm)
        grows(lm)
    want = oracle(folders, grows, tied=tied)
    prompts = [[*PROMPT[:3], VOCAB + new, *PROMPT[3:]] for new in range(3)]
    outputs = [plainly(want, prompt) for prompt in prompts]
    # the adapter's own number is a token here
    assert any(VOCAB in output[len(PROMPT) + 1 :] for output in outputs)
    for prompt, output in zip(prompts, outputs, strict=True):
        for how in HOW if prompt is prompts[0] else HOW[:1]:
            assert plainly(lm, prompt, custom_generate=sdsat.generate, **how) == output
    with one_line_error(f"token id {VOCAB + 3}", f"vocabulary of {VOCAB + 3}"):
        lm.sdsat.generate([VOCAB + 3], DecodeConfig(2, 4))


def test_a_sat_of_the_checkpoint_that_was_cut_off(folders):
    lm = alone(folders[False][0])
    sdsat.attach(lm, sat_token_id=VOCAB - 1)
    lm.resize_token_embeddings(VOCAB - 2)
    with one_line_error(f"sat_token_id={VOCAB - 1}", f"ends at {VOCAB - 3}"):
        drafting(lm, k=2)
