"""Tokenizers in GGUF files: the ids are those of the tokenizer that was written there."""

import pytest
import random_checkpoint
from common import one_line_error
from gguf_files import BYTES, MERGES, TOKENS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer

from sdsat.models.gguf_tokenizer import read_tokenizer

TYPES = {**dict.fromkeys(TOKENS[-4:-1], 3), "<think>": 4}
TEXTS = st.text(alphabet="adefrt( )\n\t'12345é_ß中e\u0301", max_size=40)
FIRST, END = TOKENS.index("<|im_start|>"), TOKENS.index("<|im_end|>")


def read(**changes):
    """The tokenizer of a file that holds the tiny byte-level one, with changes."""
    values = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": TOKENS,
        "merges": MERGES,
        "token_type": [TYPES.get(token, 1) for token in TOKENS],
        "bos_token_id": FIRST,
        "eos_token_id": END,
        **changes,
    }
    keys = {f"ggml.{key}": value for key, value in values.items()}
    return read_tokenizer({**keys, "chat_template": "{{ messages }}"}.get, "m")


VOCABULARY = {token: number for number, token in enumerate(TOKENS)}
PAIRS = [tuple(merge.split(" ")) for merge in MERGES]
QWEN = (read(), Qwen2Tokenizer(vocab=dict(VOCABULARY), merges=list(PAIRS)))
GPT2 = (read(pre="gpt-2"), GPT2Tokenizer(vocab=dict(VOCABULARY), merges=list(PAIRS)))


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_byte_level_ids_are_those_of_the_tokenizers_own_class(text):
    for ours, theirs in (QWEN, GPT2):
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids)


def test_digits_are_cut_as_the_file_says():
    pieces = {
        pre: [
            TOKENS[number] for number in read(pre=pre, add_bos_token=False)("123456")["input_ids"]
        ]
        for pre in ("gpt-2", "qwen2", "smollm", "llama-bpe")
    }
    one_by_one = list("123456")
    assert pieces == {
        "gpt-2": ["1234", "56"],
        "qwen2": one_by_one,
        "smollm": one_by_one,
        "llama-bpe": ["12", "3", "4", "56"],  # of 123 and 456
    }


def test_special_tokens_are_single_and_text_begins_as_the_file_says():
    tokenizer = read()
    text = "a<|im_end|><think>"
    assert tokenizer(text)["input_ids"] == [TOKENS.index("a"), END, TOKENS.index("<think>")]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "a<think>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (FIRST, END)
    assert tokenizer.chat_template
    for tokenizer, begins in (
        (read(pre="llama-bpe"), True),
        (read(pre="llama-bpe", add_bos_token=False), False),
        (read(add_bos_token=True), True),
        (read(), False),
    ):
        assert (tokenizer("a")["input_ids"][0] == FIRST) == begins
        assert tokenizer("a", add_special_tokens=False)["input_ids"] == [BYTES.index("a")]


@pytest.mark.parametrize("begins", [True, False])
def test_a_sentencepiece_model_is_itself_again(begins, tmp_path):
    pieces = random_checkpoint.make_pieces()
    random_checkpoint.save_tokenizer(pieces, tmp_path, "LlamaTokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=begins)
    numbers = range(pieces.get_piece_size())
    kinds = (("is_unknown", 2), ("is_control", 3), ("is_byte", 6))
    ours = read(
        model="llama",
        pre=None,
        tokens=[pieces.id_to_piece(number) for number in numbers],
        scores=[pieces.get_score(number) for number in numbers],
        token_type=[
            next((of for kind, of in kinds if getattr(pieces, kind)(number)), 1)
            for number in numbers
        ],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        **({} if begins else {"add_bos_token": False}),
    )
    ours.save_pretrained(tmp_path / "kept")
    for tokenizer in (ours, AutoTokenizer.from_pretrained(tmp_path / "kept")):
        for text in ("def f(x):\n    return 12", " a  b\té", "", "</s>x<s> y", "\n\n x"):
            ids = theirs(text)["input_ids"]
            assert tokenizer(text)["input_ids"] == ids
            assert tokenizer.decode(ids) == theirs.decode(ids)
        assert tokenizer.eos_token_id == 2 and tokenizer.bos_token_id == 1


def test_another_kind_is_refused():
    with one_line_error("model m: tokenizer 'bert' is not known; expected llama"):
        read(model="bert")
    with one_line_error("model m: tokenizer.ggml.pre='poro-chat' is not known", "llama-bpe"):
        read(pre="poro-chat")
