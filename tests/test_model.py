"""Loading small local models and adapters, each refusal in one line, and row policies against the
bits they promise.
"""

import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from common import VOCAB, one_line_error, tiny_llama, tiny_tokenizer, with_adapter
from transformers import GPT2Config

from sdsat.config import DecodeConfig, SatConfig
from sdsat.decoding.decoder import Decoder
from sdsat.engines.base import RowPolicy, probe_rows
from sdsat.engines.cache import SlotCache, pass_mask
from sdsat.files import read_json
from sdsat.models import adapter as adapters
from sdsat.models.adapter import AdapterConfig, SatAdapter, sample_weights
from sdsat.models.loading import load
from sdsat.models.sat_model import SatModel

PIECES = ["<unk>", *(f"t{n} " for n in range(1, VOCAB))]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_llama(torch.float32, eos_token_id=3).save_pretrained(folder)
    tiny_tokenizer(PIECES).save_pretrained(folder)
    return folder


@pytest.fixture
def local(template, tmp_path):
    """A model directory that a test may damage."""
    return shutil.copytree(template, tmp_path / "tiny")


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("dtype", "loaded"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float32)],
)
def test_a_local_directory(local, dtype, loaded):
    model = load(str(local), dtype, "cpu")
    assert (model.name, model.sat, model.adapter, model.dtype) == (str(local), None, None, loaded)
    assert model.device == torch.device("cpu")
    assert (model.stop_ids, model.max_context) == ((3,), 512)
    want = tiny_llama(torch.float32).to(loaded).state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.lm.state_dict().items())
    assert not model.lm.training
    assert not any(parameter.requires_grad for parameter in model.lm.parameters())
    assert model.tokenizer.decode([5, 7]) == "t5 t7 "
    out = Decoder(model).generate([1, 5, 9], DecodeConfig(0, 8))
    # special tokens aren't shown
    assert out.text == "".join(PIECES[token] for token in out.token_ids if token)


@pytest.fixture
def adapter_dir(local, tmp_path):
    lm = tiny_llama(torch.float32)
    config = AdapterConfig(str(local), SatConfig(VOCAB, 3), 4, base_sample=sample_weights(lm))
    adapter = SatAdapter(lm, config)
    for parameter in adapter.up.values():
        torch.nn.init.normal_(parameter)
    adapter.save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_an_adapter_directory(local, adapter_dir, dtype):
    model = load(str(adapter_dir), dtype, "cpu")
    base = load(str(local), dtype, "cpu")
    assert (model.name, model.sat) == (str(adapter_dir), SatConfig(VOCAB, 3))
    assert model.adapter.sat_embedding.dtype == model.dtype == base.dtype
    want = Decoder(base).generate([1, 5, 9], DecodeConfig(0, 24))
    out = Decoder(model).generate([1, 5, 9], DecodeConfig(3, 24))
    assert out.token_ids == want.token_ids
    assert out.text == want.text
    sats = dict(
        inputs_embeds=model.embed(torch.tensor([[VOCAB]])),
        attention_mask=torch.ones(1, 1, 1, 1).bool(),
    )
    with model.sat_rows(0, 1):
        updated = model.lm(**sats).logits
    assert not torch.equal(updated, model.lm(**sats).logits)  # it is attached


def test_an_adapter_of_another_base_or_of_another_format(local, adapter_dir):
    tiny_llama(torch.float32, seed=4).save_pretrained(local)
    with one_line_error(adapter_dir, "made for base", local):
        load(str(adapter_dir), "float32", "cpu")
    (adapter_dir / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with one_line_error(adapter_dir, adapters.FORMAT):
        load(str(adapter_dir), "float32", "cpu")


def test_an_unknown_name(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with one_line_error(
        "model nobody/nothing-of-this-name: not found",
        "a hub id, a local model or adapter directory",
    ):
        load("nobody/nothing-of-this-name", device="cpu")


def test_an_unsupported_architecture(tmp_path):
    GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=5).save_pretrained(tmp_path)
    with one_line_error(f"model {tmp_path}", "'gpt2' is not supported", "llama"):
        load(str(tmp_path), device="cpu")


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


@pytest.mark.parametrize(
    "damage",
    [
        truncate("model.safetensors"),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").unlink(),
        truncate("config.json"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: set_config(folder, intermediate_size=32),
    ],
    ids=[
        "cut weights",
        "empty weights",
        "no weights",
        "cut config",
        "no config",
        "tokenizer",
        "other shape",
    ],
)
def test_a_damaged_directory(local, damage):
    damage(local)
    with one_line_error(f"model {local}", "cannot be loaded"):
        load(str(local), "float32", "cpu")


@pytest.mark.parametrize("dtype", ["float8", "", "fp16", "torch.float32"])
def test_bad_dtype(local, dtype):
    with one_line_error(f"dtype={dtype}: expected auto, float32, bfloat16, float16, int8"):
        load(str(local), dtype, "cpu")


def test_sat_of_config_json_and_its_override(local):
    assert load(str(local), "float32", "cpu", sat_token_id=7).sat.token_id == 7
    set_config(local, sdsat={"sat_token_id": 63, "k": 4})
    assert load(str(local), "float32", "cpu").sat == SatConfig(63, 4)
    assert load(str(local), "float32", "cpu", sat_token_id=0).sat == SatConfig(0, 4)
    for token_id in (64, -1):
        with one_line_error(f"sat_token_id={token_id}"):
            load(str(local), "float32", "cpu", sat_token_id=token_id)
        with one_line_error(f"sat_token_id={token_id}"):
            load(str(local), "float32", "cpu", sat_token_id=(3, token_id))
    assert load(str(local), "float32", "cpu", sat_token_id=(9, 7)).sat == SatConfig(9, 4, (7,))
    set_config(local, sdsat={"sat_token_id": [9, 7, 8], "k": 3})
    assert load(str(local), "float32", "cpu").sat == SatConfig(9, 3, (7, 8))


@pytest.mark.parametrize(
    "value",
    [
        {"sat_token_id": 7},
        {"k": 3},
        7,
        "7",
        {"sat_token_id": "a", "k": 3},
        {"sat_token_id": [], "k": 3},
    ],
    ids=str,
)
def test_sat_of_config_json_damaged(local, value):
    set_config(local, sdsat=value)
    with one_line_error(f"model {local}", "'sdsat'", "sat_token_id and k"):
        load(str(local), "float32", "cpu")


@pytest.mark.parametrize(
    ("name", "k"), [("CodeLlama-SDSAT_L5_7B", 5), ("CodeLlama-SDSAT_L7_13B", 7)]
)
def test_published_checkpoints_are_known_by_name(tmp_path, name, k):
    sizes = dict(
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    folder = tmp_path / "ainergy" / name
    tiny_tokenizer(PIECES).save_pretrained(folder)
    tiny_llama(torch.float32, vocab=32016, **sizes).save_pretrained(folder)
    assert load(str(folder), "float32", "cpu").sat == SatConfig(32011, k)
    assert load(str(folder), "float32", "cpu", sat_token_id=9).sat == SatConfig(9, k)
    tiny_llama(torch.float32, **sizes).save_pretrained(folder)
    with one_line_error("sat_token_id=32011", "ends at 63"):
        load(str(folder), "float32", "cpu")


@pytest.mark.parametrize(("eos", "stop_ids"), [(None, ()), (0, (0,)), ([2, 9], (2, 9))], ids=str)
def test_stop_ids(eos, stop_ids):
    assert SatModel(tiny_llama(eos_token_id=eos), None, "tiny").stop_ids == stop_ids


@pytest.mark.parametrize(
    ("policy", "rows"),
    [
        ((1, 1), [1, 2, 3, 5, 8, 9]),
        ((4, 1), [4, 4, 4, 5, 8, 9]),
        ((4, 4), [4, 4, 4, 8, 8, 12]),
        ((8, 8), [8] * 5 + [16]),
    ],
    ids=str,
)
def test_padded_rows(policy, rows):
    assert [RowPolicy(*policy).rows(count) for count in (1, 2, 3, 5, 8, 9)] == rows


def logits_in_passes_of(model, tokens, rows, policy):
    """[S, V] logits of the tokens fed `rows` at a time, each pass padded as the policy says by rows
    that see themselves.
    """
    cache = SlotCache(model.num_layers, 192)
    parts = []
    for part in tokens.split(rows):
        count = policy.rows(len(part))
        within = torch.eye(count, dtype=torch.bool)
        within[: len(part), : len(part)] = torch.ones(len(part), len(part)).tril().bool()
        ids = torch.zeros(count, dtype=torch.long)
        ids[: len(part)] = part
        positions = (cache.length + torch.arange(count))[None]
        mask = pass_mask(cache, within)
        logits = model.lm(
            ids[None], attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits
        parts.append(logits[0, : len(part)])
        cache.commit(tuple(range(len(part))))
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probed_policy_keeps_its_promise(dtype):
    """On other tokens, and further into the context, than it was probed with."""
    decoder = with_adapter(tiny_llama(dtype))
    model = decoder.model
    policy = decoder.engine.row_policy
    assert decoder.engine.row_policy is policy
    tokens = torch.randint(VOCAB, (30,), generator=torch.Generator().manual_seed(1))
    want = logits_in_passes_of(model, tokens, 1, policy)
    for rows in (*range(2, 17), 20, 24, 29):
        assert not policy.stable or torch.equal(
            logits_in_passes_of(model, tokens, rows, policy), want
        )


@pytest.mark.parametrize(
    ("smallest_stable", "minimum"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (16, 16)]
)
def test_probe_finds_the_cheapest_padding(smallest_stable, minimum):
    """A model whose logits change when a pass has fewer rows than some number."""
    decoder = with_adapter(tiny_llama())
    decoder.model.lm.lm_head.register_forward_hook(
        lambda module, inputs, logits: torch.full_like(
            logits, max(0, smallest_stable - logits.shape[-2])
        )
    )
    policy = probe_rows(decoder.engine)
    assert (policy.minimum, policy.stable) == (minimum, True)


def test_probe_says_when_nothing_is_stable():
    decoder = with_adapter(tiny_llama())
    calls = iter(range(10**6))
    decoder.model.lm.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits + next(calls)
    )
    assert not probe_rows(decoder.engine).stable


def test_read_json(tmp_path):
    (tmp_path / "good.json").write_text('{"a": 1}')
    (tmp_path / "bad.json").write_text('{"a": ')
    assert read_json(tmp_path / "good.json") == {"a": 1}
    for name in ("bad.json", "none.json"):
        with one_line_error(tmp_path / name, "cannot be read"):
            read_json(tmp_path / name)
