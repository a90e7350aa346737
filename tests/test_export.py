"""The serving export: what a server computes from it is what was trained, and what can't be
exported is refused.
"""

import json
import shlex

import pytest
import torch
from common import VOCAB, one_line_error, tiny_llama, tiny_tokenizer
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM

from sdsat.config import SatConfig
from sdsat.interfaces.export import Export, export
from sdsat.models import adapter as adapters
from sdsat.models import embedded, loading
from sdsat.models.adapter import AdapterConfig, SatAdapter, sample_weights

SPARE = VOCAB - 2


def base_directory(folder, tied, special=("<reserved>", "<other>"), vocab=VOCAB):
    """A tiny base with a tokenizer of VOCAB tokens, of which the last two are special."""
    lm = tiny_llama(torch.float32, vocab, tie_word_embeddings=tied)
    lm.save_pretrained(folder)
    tokenizer = tiny_tokenizer([chr(33 + i) for i in range(VOCAB - len(special))])
    tokenizer.add_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.save_pretrained(folder)
    return lm


def everywhere_adapter(folder, base, lm, everywhere=True, scale=0.5):
    torch.manual_seed(1)
    config = AdapterConfig(
        str(base),
        SatConfig(lm.config.vocab_size, 3),
        4,
        scale,
        everywhere=everywhere,
        base_sample=sample_weights(lm),
    )
    adapter = SatAdapter(lm, config).requires_grad_(False)
    for parameter in adapter.up.values():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(adapter.sat_embedding)
    adapter.save(folder)
    return adapters.load(lm, folder)


@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_draft_equals_the_adapter_on_every_row(tmp_path, tied):
    """The server's draft pass, tokens and then masks under a causal mask, against hooks on the
    base: no merged weights there.
    """
    lm = base_directory(tmp_path / "base", tied)
    adapter = everywhere_adapter(tmp_path / "adapter", tmp_path / "base", lm)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    done = export(str(tmp_path / "adapter"), tmp_path / "draft", k=3)
    tokens = torch.randint(2, 60, (1, 9))
    embeddings = lm.get_input_embeddings()(tokens)
    inputs = torch.cat([embeddings, adapter.sat_embedding.expand(1, 2, -1)], dim=1)
    lm.set_attn_implementation("eager")
    adapter.attach(lm)
    with adapter.on_rows(0, 11):
        expected = lm(inputs_embeds=inputs).logits
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft", attn_implementation="eager")
    masked = torch.cat([tokens, torch.full((1, 2), done.mask_token_id)], dim=1)
    torch.testing.assert_close(draft(masked).logits, expected, rtol=1e-4, atol=1e-4)
    assert done.target == str(tmp_path / "base"), "the target is the base itself"
    kept = AutoModelForCausalLM.from_pretrained(done.target).state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in kept.items()), "and untouched"


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_server_reads(tmp_path, tied):
    lm = base_directory(tmp_path / "base", tied)
    everywhere_adapter(tmp_path / "adapter", tmp_path / "base", lm)
    export(str(tmp_path / "adapter"), tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["pard_token"] == SPARE, "the special token named reserved, not the one after it"
    assert config["vocab_size"] == VOCAB == AutoConfig.from_pretrained(tmp_path / "base").vocab_size
    assert "mask_token_id" not in config and config["tie_word_embeddings"] is False
    assert (tmp_path / "draft" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_a_padding_row_is_taken_first_and_used_tokens_never(tmp_path):
    lm = base_directory(tmp_path / "padded", True, vocab=VOCAB + 4)
    everywhere_adapter(tmp_path / "adapter", tmp_path / "padded", lm)
    assert export(str(tmp_path / "adapter"), tmp_path / "draft").mask_token_id == VOCAB + 3
    lm = base_directory(tmp_path / "full", True, special=())
    everywhere_adapter(tmp_path / "other", tmp_path / "full", lm)
    with one_line_error("mask_token_id", "no special token that nothing uses"):
        export(str(tmp_path / "other"), tmp_path / "no")
    assert export(str(tmp_path / "other"), tmp_path / "named", mask_token_id=7).mask_token_id == 7
    with one_line_error("mask_token_id=0", "begins, ends or pads"):
        export(str(tmp_path / "other"), tmp_path / "no", mask_token_id=0)
    with one_line_error("mask_token_id=64", "0 to 63"):
        export(str(tmp_path / "other"), tmp_path / "no", mask_token_id=64)
    assert not (tmp_path / "no").exists()


def test_a_sat_for_each_depth_is_not_for_servers(tmp_path):
    lm = tiny_llama(torch.float32)
    lm.config.sdsat = {"sat_token_id": [5, 6], "k": 3}
    lm.save_pretrained(tmp_path / "full")
    tiny_tokenizer([chr(33 + i) for i in range(VOCAB)]).save_pretrained(tmp_path / "full")
    with one_line_error("has a SAT for each depth; servers draft with one"):
        export(str(tmp_path / "full"), tmp_path / "served")


@pytest.mark.parametrize("tied", [True, False])
def test_a_full_checkpoint_is_target_and_draft(tmp_path, tied):
    lm = tiny_llama(torch.float32, tie_word_embeddings=tied)
    lm.config.sdsat = {"sat_token_id": 5, "k": 3}
    lm.save_pretrained(tmp_path / "full")
    tiny_tokenizer([chr(33 + i) for i in range(VOCAB)]).save_pretrained(tmp_path / "full")
    done = export(str(tmp_path / "full"), tmp_path / "served")
    assert (done.target, done.draft, done.mask_token_id, done.k) == (
        str(tmp_path / "served"),
        tmp_path / "served",
        5,
        4,
    )
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    assert served.config.pard_token == 5
    tokens = torch.tensor([[3, 9, 5, 5]])
    lm.set_attn_implementation("sdpa")
    expected = lm(tokens).logits
    logits = served(tokens).logits
    others = torch.arange(VOCAB) != 5
    torch.testing.assert_close(logits[..., others], expected[..., others])
    torch.testing.assert_close(logits[..., 5], expected[..., others].mean(-1), rtol=1e-4, atol=1e-4)
    again = loading.load(str(tmp_path / "served"), "float32", "cpu")
    assert again.sat == SatConfig(5, 3), "and this program's own checkpoint still"


def test_what_cannot_be_exported_is_refused_with_the_reason(tmp_path):
    lm = base_directory(tmp_path / "base", True)
    everywhere_adapter(tmp_path / "gated", tmp_path / "base", lm, everywhere=False)
    everywhere_adapter(tmp_path / "adapter", tmp_path / "base", lm)
    for model in (str(tmp_path / "gated"), embedded.NAME):
        with one_line_error(f"model={model}", "acts on SATs alone", "--mode everywhere"):
            export(model, tmp_path / "no")
    with one_line_error("has no SAT", "--mode everywhere"):
        export(str(tmp_path / "base"), tmp_path / "no")
    for k in (1, 5):
        with one_line_error(f"num_speculative_tokens={k}", "2 to 4"):
            export(str(tmp_path / "adapter"), tmp_path / "no", k=k)
    for name in ("Eagle-draft", "my-eagle3", "DFlash"):
        with one_line_error("out=", "another method"):
            export(str(tmp_path / "adapter"), tmp_path / name)
    with one_line_error("out=", "exists already"):
        export(str(tmp_path / "adapter"), tmp_path / "base")
    with one_line_error("acts on every row", "sdsat export"):
        loading.load(str(tmp_path / "adapter"), "float32", "cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "gated"]


def test_the_commands_are_what_a_shell_reads(tmp_path):
    done = Export("some/base", tmp_path / "a draft", 62, 4)
    one = shlex.split(done.vllm_command())
    assert one[:4] == ["vllm", "serve", "some/base", "--speculative-config"]
    expected = {
        "model": str(tmp_path / "a draft"),
        "method": "draft_model",
        "parallel_drafting": True,
        "num_speculative_tokens": 4,
    }
    assert json.loads(one[4]) == expected
    many = shlex.split(done.vllm_command(16, "--distributed-executor-backend", "ray"))
    assert many[3:7] == ["--tensor-parallel-size", "16", "--distributed-executor-backend", "ray"]
    assert json.loads(many[-1]) == {**expected, "draft_tensor_parallel_size": 16}
    text = done.commands(gpus=8, nodes=2)
    assert done.vllm_command(8) in text and "ray start --head" in text
    assert (
        f"PARDDecodingConfig(speculative_model={str(tmp_path / 'a draft')!r}, "
        "max_draft_len=4, "
        "mask_token_id=62)"
    ) in text
