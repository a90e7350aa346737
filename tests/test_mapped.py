"""Weights that stay in their files, against what transformers reads of them."""

import copy
import json
import pickle

import pytest
import torch
from common import one_line_error, tiny_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from sdsat.config import DecodeConfig
from sdsat.decoding.decoder import Decoder
from sdsat.models.loading import load
from sdsat.models.mapped import MappedWeights

PIECES = ["<unk>", *(f"t{n} " for n in range(1, 64))]
NATIVE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}  # the engine's sizes
PROMPT = [1, 5, 9]


def saved(folder, kind):
    lm = tiny_llama(torch.bfloat16, tie_word_embeddings=kind == "tied", **NATIVE)
    lm.save_pretrained(folder, max_shard_size="20KB" if kind == "shards" else "5GB")
    GenerationConfig(eos_token_id=[3, 7], temperature=0.5, do_sample=True).save_pretrained(folder)
    tiny_tokenizer(PIECES).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1 or kind != "shards"
    return folder


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path, "shards")


def files_of(lm):
    """Addresses of the memory that parameters are in."""
    return {p.untyped_storage().data_ptr() for p in lm.parameters()}


def is_mapped(model):
    files = [(file.whole.data_ptr(), len(file.whole)) for file in model.mapped.files]
    return all(
        any(0 <= p.data_ptr() - begin < size for begin, size in files)
        for p in model.lm.parameters()
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "auto"])
@pytest.mark.parametrize("kind", ["one file", "shards", "tied"])
def test_a_model_is_what_transformers_reads(tmp_path, kind, dtype):
    folder = saved(tmp_path, kind)
    named = {"int8": "bfloat16"}.get(dtype, dtype)
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=named)
    model = load(str(folder), dtype, "cpu")
    lm = model.lm
    parameters = dict(want.named_parameters())
    assert [name for name, _ in lm.named_parameters()] == [*parameters]
    for name, tensor in lm.named_parameters():
        assert tensor.dtype == parameters[name].dtype and torch.equal(tensor, parameters[name])
    for name, tensor in want.named_buffers():
        assert torch.equal(lm.get_buffer(name), tensor)
    assert lm.generation_config.to_dict() == want.generation_config.to_dict()
    assert (lm.name_or_path, lm.config.name_or_path) == (str(folder), str(folder))
    assert lm.config.dtype == want.config.dtype and not lm.training
    assert is_mapped(model) == (dtype != "float32")


def test_a_change_is_kept_and_never_reaches_the_file(folder):
    before = {file: file.read_bytes() for file in folder.glob("*.safetensors")}
    decoder = Decoder.load(str(folder), "bfloat16", "cpu")
    config = DecodeConfig(0, 12)
    first = decoder.generate(PROMPT, config).token_ids
    layer = decoder.model.lm.model.layers[0].mlp.down_proj
    layer.weight.mul_(-3)
    changed = layer.weight.clone()
    second = decoder.generate(PROMPT, config).token_ids  # packed anew, and paged out
    assert second != first
    assert torch.equal(layer.weight, changed)
    assert {file: file.read_bytes() for file in before} == before
    assert Decoder.load(str(folder), "bfloat16", "cpu").generate(PROMPT, config).token_ids == first


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_in_memory(folder, again):
    model = load(str(folder), "bfloat16", "cpu")
    other = again(model)
    assert not files_of(other.lm) & files_of(model.lm)
    assert len(pickle.dumps(other.mapped)) < 500
    assert len(pickle.dumps(model)) < len(pickle.dumps(other)) + 1000  # no whole files in it
    want = Decoder(model).generate(PROMPT, DecodeConfig(0, 12)).token_ids
    assert Decoder(other).generate(PROMPT, DecodeConfig(0, 12)).token_ids == want


def test_transformers_own_generation_reads_the_file_again(folder):
    decoder = Decoder.load(str(folder), "bfloat16", "cpu")
    out = decoder.generate(PROMPT, DecodeConfig(0, 12)).token_ids
    with decoder.engine.detached():
        plain = decoder.model.lm.generate(
            torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=-1
        )
    assert plain[0, len(PROMPT) :].tolist()[:4] == out[:4]


@pytest.mark.parametrize("keep", [4, 30, -3])
def test_a_file_that_was_cut(folder, keep):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:keep])
    with one_line_error(f"model {folder}: this directory cannot be loaded"):
        load(str(folder), "bfloat16", "cpu")


def test_numbers_of_another_kind(tmp_path):
    """A file that has some is read as transformers reads it."""
    lm = tiny_llama(torch.bfloat16, **NATIVE)
    lm.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "count": torch.arange(3)}, file, {"format": "pt"})
    tiny_tokenizer(PIECES).save_pretrained(tmp_path)
    found = load(str(tmp_path), "bfloat16", "cpu").lm
    for name, tensor in lm.named_parameters():
        assert torch.equal(found.get_parameter(name), tensor)


def test_numbers_at_odd_bytes(tmp_path):
    """As the format allows; a file that has some is read as transformers reads it, too."""
    lm = tiny_llama(torch.bfloat16, **NATIVE)
    lm.save_pretrained(tmp_path)
    tiny_tokenizer(PIECES).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].rstrip()
    header += b" " * (len(header) % 2 == 0)
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    found = load(str(tmp_path), "bfloat16", "cpu").lm
    for name, tensor in lm.named_parameters():
        assert torch.equal(found.get_parameter(name), tensor)


@pytest.mark.parametrize("names", [None, [], ["LlamaForCausalLM", "Another"], ["Another"]])
def test_a_checkpoint_that_does_not_say_what_it_is(folder, names):
    """Transformers goes by the model type then."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": names}))
    model = load(str(folder), "bfloat16", "cpu")
    want = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    for name, tensor in want.named_parameters():
        assert torch.equal(model.lm.get_parameter(name), tensor)


def test_a_folder_of_no_such_files(tmp_path):
    assert MappedWeights(str(tmp_path)).tensors == {}
