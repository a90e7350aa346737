"""Self-distillation: the model's own answers to prompts, as token shards with a manifest, and reading them for training.

    sdsat distill --out runs/data --source path/to/python/packages

The model's own answers, because acceptance is measured against the model's own output. A shard is a few MB of tokens.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .config import DecodeConfig, InputError, SamplingConfig, require
from .decode import iterate_batch
from .files import make_folder, read_json, replacing, write_json
from .model import SatModel
from .prompts import Decontaminator, collect_prompts, licences

_TEXT, GREEDY = (".py", ".md", ".txt"), SamplingConfig()


def answer_batch(
    model: SatModel,
    prompts: list[list[int]],
    todo: list[int],
    temperatures: list[float],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> Iterator[tuple[int, list[int]]]:
    """The answers to prompts[i] for i in todo: (i, answer ids with the stop id), in the order in which they end.

    Prompt i is answered by AR at temperatures[i], with the paper's top-p 0.95 and top-k 10 where that is not 0, and a seed of its
    own: the answer doesn't depend on what is answered beside it.
    """
    configs = []
    for i in todo:
        sampling = SamplingConfig(temperatures[i], top_k=10, top_p=0.95, seed=(seed << 32) + i) if temperatures[i] else GREEDY
        configs.append(DecodeConfig(0, max_new_tokens, sampling=sampling, stop_ids=model.stop_ids))
    for place, out in iterate_batch(model, [prompts[i] for i in todo], configs, batch_size=batch_size):
        yield todo[place], out.token_ids


def distill(
    model: SatModel,
    sources: list[str],
    out: Path,
    limit: int | None = None,
    temperatures: tuple[float, ...] = (0.0,),
    max_new_tokens: int = 256,
    max_prompt_tokens: int = 256,
    batch_size: int = 64,
    shard_size: int = 1024,
    seed: int = 0,
    answers: int = 1,
) -> dict[str, Any]:
    """Write the model's own answers to prompts from `sources` (prompts.py) as token shards; resumes at the first missing shard.

    The prompts take the temperatures in turn; each prompt's next answer, of `answers`, the temperature after its last. Under
    `accelerate launch` every process writes its own part of the shards. Returns the manifest, also written to `out`.
    """
    for name, value in dict(max_new_tokens=max_new_tokens, batch_size=batch_size, shard_size=shard_size, answers=answers).items():
        require(value >= 1, f"{name}={value}: expected 1 or more")
    require(limit is None or limit >= 1, f"limit={limit}: expected 1 or more")
    room = model.max_context - max_prompt_tokens
    require(max_new_tokens <= room, f"max_new_tokens={max_new_tokens}: beside max_prompt_tokens the context has room for {room}")
    for temperature in temperatures:
        SamplingConfig(temperature)  # refuses what cannot be sampled at
    state = PartialState(cpu=model.device.type == "cpu")
    prompts, counts = collect_prompts(sources, model.tokenizer, limit, max_prompt_tokens)
    turns = [temperatures[(i + again) % len(temperatures)] for again in range(answers) for i in range(len(prompts))]
    settings = {
        "model": model.name, "seed": seed, "answers": answers, "temperatures": list(temperatures),
        "max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens, "shard_size": shard_size,
        "num_prompts": len(prompts), "prompts": counts,
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }  # fmt: skip
    make_folder(out, "out")
    manifest_file = out / "manifest.json"
    if manifest_file.exists():
        held = {"answers": 1, **read_json(manifest_file).get("settings", {})}
        require(held == settings, f"out={out}: holds shards of other settings; choose another folder or delete it")
    else:
        require(not list(out.glob("shard_*")), f"out={out}: holds shards without a manifest; choose another folder or delete it")
    manifest: dict[str, Any] = {"format": "sdsat-shards", "format_version": 1, "settings": settings, "shards": []}
    manifest["licences"] = licences(sources)
    prompts = prompts * answers
    shards = [range(n, min(n + shard_size, len(prompts))) for n in range(0, len(prompts), shard_size)]
    files = [out / f"shard_{number:05d}.safetensors" for number in range(len(shards))]
    own = range(state.process_index, len(shards), state.num_processes)
    missing = [shards[number] for number in own if not files[number].exists()]
    # Like lengths together keep attention short; one run over all shards keeps the batch full.
    todo = [i for shard in missing for i in sorted(shard, key=lambda i: len(prompts[i]))]
    bar = tqdm(total=len(todo), desc="distill", unit="answer", disable=not state.is_local_main_process)
    made: dict[int, list[int]] = {}
    _write_manifest(manifest_file, manifest, files)
    for i, answer in answer_batch(model, prompts, todo, turns, max_new_tokens, batch_size, seed):
        made[i] = answer
        bar.update()
        shard = shards[i // shard_size]
        if all(j in made for j in shard):
            _write_shard(files[i // shard_size], [prompts[j] for j in shard], [made.pop(j) for j in shard])
            _write_manifest(manifest_file, manifest, files)
    state.wait_for_everyone()
    _write_manifest(manifest_file, manifest, files)
    return manifest


def _write_manifest(file: Path, manifest: dict[str, Any], shards: list[Path]) -> None:
    """List the shards that are there, with their sizes."""
    manifest["shards"] = []
    for shard in filter(Path.exists, shards):
        tensors = _read_shard(shard)
        num_answer_tokens = int((tensors["lengths"] - tensors["prompt_lengths"]).sum())
        entry = {"file": shard.name, "num_sequences": len(tensors["lengths"]), "num_answer_tokens": num_answer_tokens}
        manifest["shards"].append(entry)
    write_json(file, manifest)


def _write_shard(path: Path, prompts: list[list[int]], answers: list[list[int]]) -> None:
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    tensors = {
        "tokens": torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int32),
        "lengths": torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32),
    }
    with replacing(path) as part:
        save_file(tensors, part)


def _read_shard(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: a damaged shard ({error}); delete it and run `sdsat distill` again") from None


@dataclass(frozen=True)
class Sequence:
    """One training sequence: token ids, and how many of them are the prompt."""

    ids: Tensor
    prompt_length: int


def read_sequences(path: Path, tokenizer: PreTrainedTokenizerBase | None, length: int = 512) -> list[Sequence]:
    """Training data: a folder of shards, or plain text or code, a file or all .py, .md and .txt files of a folder.

    Text is cut into sequences of `length` tokens; files that overlap HumanEval are left out, with a warning that counts them.
    """
    if path.is_dir() and list(path.glob("shard_*.safetensors")):
        return read_shards(path)
    require(path.exists(), f"data={path}: no such file or folder")
    require(path.is_dir() or path.suffix in _TEXT, f"data={path}: expected a .py, .md or .txt file, or a folder")
    files = [path] if path.is_file() else [f for f in sorted(path.rglob("*")) if f.suffix in _TEXT and f.is_file()]
    require(len(files) > 0, f"data={path}: no shard_*.safetensors and no .py, .md or .txt file there; run `sdsat distill`")
    require(tokenizer is not None, f"data={path}: text needs a tokenizer, and the model has none")
    decontaminator, sequences, dropped = Decontaminator(), [], 0
    for file in files:
        try:
            text = file.read_text(encoding="utf-8", errors="ignore")
        except OSError as error:
            raise InputError(f"data={file}: cannot be read ({error.strerror})") from None
        if decontaminator.overlaps("", text):
            dropped += 1
        elif tokenizer is not None:
            parts = torch.tensor(tokenizer(text)["input_ids"]).split(length)
            sequences += [Sequence(ids, 0) for ids in parts if len(ids) >= 8]
    if dropped:
        warnings.warn(f"data={path}: {dropped} of {len(files)} files overlap HumanEval and are left out", stacklevel=2)
    return [sequences[i] for i in torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0)).tolist()]


def read_shards(folder: Path) -> list[Sequence]:
    """All sequences of a folder written by `distill`, in order."""
    files = sorted(folder.glob("shard_*.safetensors"))
    require(len(files) > 0, f"data={folder}: no shard_*.safetensors there; run `sdsat distill --out {folder}` first")
    sequences = []
    for file in files:
        shard = _read_shard(file)
        parts = shard["tokens"].long().split(shard["lengths"].tolist())
        sequences += [Sequence(ids, int(n)) for ids, n in zip(parts, shard["prompt_lengths"].tolist(), strict=True)]
    return sequences
