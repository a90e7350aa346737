"""The tokenizer in a GGUF file, made again as it was before llama.cpp's conversion.

Transformers' own reading takes minutes for sentencepiece vocabularies and loses where digits are
cut, which text begins with which token, and most special tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece.sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sdsat.config import require

_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LATER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By llama.cpp's name of it, the patterns that cut a text before its bytes are merged.
_PATTERNS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "llama-bpe": (_LATER.replace("DIGITS", "{1,3}"),),
    "qwen2": (_LATER.replace("DIGITS", ""),),
    "deepseek-r1-qwen": (_LATER.replace("DIGITS", ""),),
}


def read_tokenizer(read: Callable[[str], Any], name: str) -> PreTrainedTokenizerBase:
    """Make the tokenizer of a GGUF file.

    Args:
        read: returns a value of the file by its key after 'tokenizer.', None for one that it lacks.
        name: of the model, for messages.

    Raises:
        InputError: in one line, for a kind of tokenizer that is not known.
    """
    kind = read("ggml.model")
    cut = read("ggml.pre")
    require(
        kind in ("llama", "gpt2"),
        f"model {name}: tokenizer {kind!r} is not known; expected llama (sentencepiece) or gpt2",
    )
    require(
        kind == "llama" or cut in _PATTERNS,
        f"model {name}: tokenizer.ggml.pre={cut!r} is not known; expected one of "
        f"{', '.join(_PATTERNS)}",
    )
    tokens = read("ggml.tokens")
    special = {
        role: tokens[read(f"ggml.{key}")]
        for role, key in _NAMES.items()
        if read(f"ggml.{key}") is not None
    }
    tokenizer = (
        _sentencepiece(read, tokens, special)
        if kind == "llama"
        else _byte_level(read, tokens, special, cut)
    )
    tokenizer.chat_template = read("chat_template")
    return tokenizer


def _sentencepiece(
    read: Callable[[str], Any], tokens: list[str], special: dict[str, str]
) -> PreTrainedTokenizerBase:
    """Write the sentencepiece model that the file's lists were read from, and load that."""
    prefixed = read("ggml.add_space_prefix") is not False
    messages: Any = sentencepiece_model  # its classes are made when it is imported
    model = messages.ModelProto()
    model.trainer_spec.model_type = messages.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefixed
    model.normalizer_spec.remove_extra_whitespaces = False
    for piece, score, of in zip(tokens, read("ggml.scores"), read("ggml.token_type"), strict=True):
        model.pieces.add(piece=piece, score=score, type=of)
    facts = {"add_bos_token": read("ggml.add_bos_token") is not False, **special}
    facts |= {"add_prefix_space": prefixed, "tokenizer_class": "LlamaTokenizer"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model.SerializeToString())
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(facts))
        tokenizer: PreTrainedTokenizerBase = LlamaTokenizer.from_pretrained(folder)
    return tokenizer


def _byte_level(
    read: Callable[[str], Any], tokens: list[str], special: dict[str, str], cut: str
) -> PreTrainedTokenizerBase:
    """Make a tokenizer that merges pairs of bytes. cut: key of `_PATTERNS`."""
    llama = cut == "llama-bpe"
    merges = [tuple(merge.split(" ")) for merge in read("ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=llama))
    if "qwen" in cut:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS[cut]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = read("ggml.token_type")
    for of, add in (
        (_CONTROL, tokenizer.add_special_tokens),
        (_USER_DEFINED, tokenizer.add_tokens),
    ):
        add(
            [
                AddedToken(token, normalized=False, special=of == _CONTROL)
                for token, found in zip(tokens, types, strict=True)
                if found == of
            ]
        )
    begin = read("ggml.add_bos_token")
    if llama if begin is None else begin:
        first = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A",
            pair=f"{first} $A {first} $B",
            special_tokens=[(first, vocabulary[first])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )
