"""Token shards: how training data is stored, and read."""

from __future__ import annotations

import gzip
import hashlib
import shlex
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdsat.config import InputError, require
from sdsat.files import replacing, write_json
from sdsat.tasks.prompts import Decontaminator

_UNCOMPRESSED = "shard_*.safetensors"
_SHARDS = f"{_UNCOMPRESSED}.gz"
_TEXT = (".py", ".md", ".txt")
_USUAL_SIZE = 16  # sequences of a text file
# What reading a damaged shard raises.
_DAMAGED = (OSError, EOFError, zlib.error, SafetensorError, KeyError, ValueError, RuntimeError)


def shard_name(number: int) -> str:
    """Name the file of shard `number`: safetensors, compressed by gzip to a fifth."""
    return f"shard_{number:05d}.safetensors.gz"


def shard_files(folder: Path) -> list[Path]:
    """List the shards in a folder, in order.

    Raises InputError, one line, where some are of an older version, which did not compress them.
    """
    require(
        not list(folder.glob(_UNCOMPRESSED)),
        f"{folder}: holds shards of an older version, not compressed; run "
        f"`gzip -f -- {shlex.quote(str(folder))}/{_UNCOMPRESSED}`",
    )
    return sorted(folder.glob(_SHARDS))


def write_manifest(file: Path, manifest: dict[str, Any], shards: list[Path]) -> None:
    """List the shards that are there, with their sizes; those listed are not read again."""
    listed = {entry["file"]: entry for entry in manifest["shards"]}
    manifest["shards"] = [
        listed.get(shard.name) or _sizes(shard) for shard in filter(Path.exists, shards)
    ]
    write_json(file, manifest)


def _sizes(shard: Path) -> dict[str, Any]:
    """Say what a manifest says of a shard."""
    tensors = _read_shard(shard)
    return {
        "file": shard.name,
        "num_sequences": len(tensors["lengths"]),
        "num_answer_tokens": int((tensors["lengths"] - tensors["prompt_lengths"]).sum()),
    }


def write_shard(path: Path, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """Write a shard of prompts and their answers, in token ids, whole or not at all."""
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    tensors = {
        "tokens": torch.tensor(
            [token for sequence in sequences for token in sequence], dtype=torch.int32
        ),
        "lengths": torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32),
    }
    with replacing(path) as part:
        part.write_bytes(gzip.compress(save(tensors), mtime=0))


def _read_shard(path: Path) -> dict[str, Tensor]:
    """Read a shard's tensors.

    Raises InputError, one line, for a damaged one.
    """
    try:
        shard = load(gzip.decompress(path.read_bytes()))
        parts = shard["tokens"], shard["lengths"], shard["prompt_lengths"]
        if parts[1].sum() != len(parts[0]) or len(parts[1]) != len(parts[2]) or parts[1].min() < 1:
            raise ValueError("its lengths do not add up")
        return shard
    except _DAMAGED as error:
        raise InputError(
            f"{path}: a damaged shard ({error}); delete it and run `sdsat distill` again"
        ) from None


@dataclass(frozen=True)
class TrainingExample:
    """One training sequence: token ids, and how many of them are the prompt.

    Attributes:
        ids: [N] token ids.
        prompt_length: tokens of the prompt.
        source: names the text that it was cut from, where others may be of the same; None where
            only the prompt says what is alike.
    """

    ids: Tensor
    prompt_length: int
    source: str | None = None


def sequences_sha256(sequences: list[TrainingExample]) -> str:
    """Compute the hash of training data.

    It is of all tokens, of where each sequence and its prompt end, and of what belongs together.
    """
    digest = hashlib.sha256()
    for s in sequences:
        digest.update(
            f"{len(s.ids)} {s.prompt_length} {s.source}\n".encode() + s.ids.numpy().tobytes()
        )
    return digest.hexdigest()


def hold_out(
    sequences: list[TrainingExample], count: int
) -> tuple[list[TrainingExample], list[TrainingExample]]:
    """Split off the first `count` sequences, to evaluate on, from those to train on.

    The latter are of other texts, and answers to other prompts.

    Raises InputError where none are left.
    """
    require(
        len(sequences) > count,
        f"data: {len(sequences)} sequences, expected more than held_out={count}",
    )

    def origin(s: TrainingExample) -> Any:
        return s.source or tuple(s.ids[: s.prompt_length].tolist())

    held = sequences[:count]
    taken = {origin(s) for s in held} - {()}
    rest = [s for s in sequences[count:] if origin(s) not in taken]
    require(
        len(rest) > 0,
        (
            f"held_out={count}: no sequences with other prompts, or from other files, are left "
            "to train on"
        ),
    )
    return held, rest


def read_sequences(
    path: Path, tokenizer: PreTrainedTokenizerBase | None, length: int = 512
) -> list[TrainingExample]:
    """Read training data: a folder of shards, or plain text or code.

    That is a file, or all .py, .md and .txt files of a folder. Text is cut into sequences of
    `length` tokens; files that overlap HumanEval are left out, with a warning that counts them. A
    file's sequences stay together, so that the first ones, which are held out, are of few files,
    and these cost training little.

    Raises InputError, one line, where there are none or one can't be read.
    """
    if path.is_dir() and shard_files(path):
        return read_shards(path)
    require(path.exists(), f"data={path}: no such file or folder")
    require(
        path.is_dir() or path.suffix in _TEXT,
        f"data={path}: expected a .py, .md or .txt file, or a folder",
    )
    files = (
        [path]
        if path.is_file()
        else [f for f in sorted(path.rglob("*")) if f.suffix in _TEXT and f.is_file()]
    )
    require(
        len(files) > 0,
        f"data={path}: no {_SHARDS} and no .py, .md or .txt file there; run `sdsat distill`",
    )
    require(tokenizer is not None, f"data={path}: text needs a tokenizer, and the model has none")
    assert tokenizer is not None
    decontaminator = Decontaminator()
    by_text = dict[str, list[TrainingExample]]()
    dropped = 0
    for file in files:
        try:
            text = file.read_text(encoding="utf-8", errors="ignore")
        except OSError as error:
            raise InputError(f"data={file}: cannot be read ({error.strerror})") from None
        if decontaminator.overlaps("", text):
            dropped += 1
            continue
        source = hashlib.sha256(text.encode()).hexdigest()  # a copy of a file is the same text
        parts = torch.tensor(tokenizer(text)["input_ids"]).split(length)
        by_text[source] = [TrainingExample(ids, 0, source) for ids in parts if len(ids) >= 8]
    if dropped:
        warnings.warn(
            f"data={path}: {dropped} of {len(files)} files overlap HumanEval and are left out",
            stacklevel=2,
        )
    return _in_held_out_order([sequences for sequences in by_text.values() if sequences])


def _in_held_out_order(texts: list[list[TrainingExample]]) -> list[TrainingExample]:
    """Put texts into an order whose beginning can be held out.

    Any of usual size come first, as they come in a shuffle, then the rest by size. A single text
    has no other to be told from: its beginning is held out, and the rest of it is trained on.
    """
    if len(texts) == 1:
        return [replace(s, source=None) for s in texts[0]]
    shuffled = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        s for i in sorted(shuffled, key=lambda i: max(len(texts[i]), _USUAL_SIZE)) for s in texts[i]
    ]


def read_shards(folder: Path) -> list[TrainingExample]:
    """Read all sequences of a folder written by `distill`, in order.

    Raises InputError, one line, where there are none or a shard is damaged.
    """
    files = shard_files(folder)
    require(
        len(files) > 0,
        f"data={folder}: no {_SHARDS} there; run `sdsat distill --out {folder}` first",
    )
    sequences = []
    for file in files:
        shard = _read_shard(file)
        parts = shard["tokens"].long().split(shard["lengths"].tolist())
        sequences += [
            TrainingExample(ids, int(n))
            for ids, n in zip(parts, shard["prompt_lengths"].tolist(), strict=True)
        ]
    return sequences
