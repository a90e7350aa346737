"""A checkpoint of the paper's form with random weights: CodeLlama's shape, tokens and half
precision, for trying commands out.

    python dev/random_checkpoint.py FOLDER --shape 7b | 13b | tiny [--device GPU]

Speed per pass, memory and exactness are those of the shape; texts and acceptance mean nothing. The
tokenizer is trained here on HumanEval, with CodeLlama's special tokens in their places. 7b takes 13
GB of disk, 13b 26 GB.
"""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Annotated

import sentencepiece
import typer
from projection import SAT_ID, SHAPES, VOCABULARY, make_decoder

from sdsat.cli.options import Device
from sdsat.cli.program import run
from sdsat.config import require
from sdsat.models.devices import pick_devices
from sdsat.tasks.datasets import humaneval_problems

SPECIAL = {32007: "▁<PRE>", 32008: "▁<SUF>", 32009: "▁<MID>", 32010: "▁<EOT>"}
TRAINED = 600  # pieces; fillers follow
K = {"7b": 5, "13b": 7, "tiny": 5}


def _field(key: int, content: bytes) -> bytes:
    """A length-delimited protobuf field of fewer than 128 bytes."""
    return bytes([key << 3 | 2, len(content)]) + content


def _piece(text: str) -> bytes:
    # the score: too low to be merged
    return _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", -1e6))


def make_pieces() -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model with CodeLlama's settings and special tokens: trained pieces first,
    then fillers up to 32016.
    """
    texts = [problem["prompt"] + problem["canonical_solution"] for problem in humaneval_problems()]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=trained,
        vocab_size=TRAINED,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    more = b"".join(_piece(SPECIAL.get(i, f"filler{i}")) for i in range(TRAINED, VOCABULARY))
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue() + more)


def save_tokenizer(
    pieces: sentencepiece.SentencePieceProcessor, folder: Path, kind: str = "CodeLlamaTokenizer"
) -> None:
    (folder / "tokenizer.model").write_bytes(pieces.serialized_model_proto())
    facts = {
        "tokenizer_class": kind,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))


def main(
    folder: Annotated[Path, typer.Argument(help="To be made; nothing may be there.")],
    shape: Annotated[str, typer.Option(help="7b, 13b or tiny.")],
    device: Device = "",
) -> None:
    """Make FOLDER, whole or not at all."""
    require(shape in SHAPES, f"--shape={shape}: expected one of {', '.join(SHAPES)}")
    require(not folder.exists(), f"folder={folder}: there already; delete it or choose another")
    lm = make_decoder(shape, pick_devices(device)[0]).model.lm
    lm.config.sdsat = {"sat_token_id": SAT_ID, "k": K[shape]}
    part = folder.with_name(folder.name + ".part")
    lm.save_pretrained(part)
    save_tokenizer(make_pieces(), part)
    part.rename(folder)


if __name__ == "__main__":
    run(main)
