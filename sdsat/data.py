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
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .cache import SlotCache
from .config import InputError, SamplingConfig, require
from .decode import prefill
from .model import SatModel
from .prompts import Decontaminator, collect_prompts, licences
from .records import read_json
from .sampling import choose

_TEXT = (".py", ".md", ".txt")


@dataclass
class _Row:
    """One sequence of the running batch."""

    prompt: int
    prompt_length: int
    ids: list[int]
    temperature: float


@torch.inference_mode()
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

    Prompt i is answered at temperatures[i], with the paper's top-p 0.95 and top-k 10 where that is not 0. A batch of
    `batch_size` rows over one slot cache; the places of finished rows go to the next prompts as soon as a sixteenth of all
    is free, so that large batches read several prompts in one pass.
    """
    if not todo:
        return
    slots = max(len(prompts[i]) for i in todo) + max_new_tokens
    layers = model.model.config.num_hidden_layers
    cache = SlotCache(layers, slots)
    rows: list[_Row | None] = [None] * min(batch_size, len(todo))
    waiting = iter(todo)
    columns = torch.arange(slots, device=model.device)
    while True:
        free = [place for place, row in enumerate(rows) if row is None]
        if 16 * len(free) >= len(rows) and (arriving := list(islice(waiting, len(free)))):
            parts = [torch.tensor(prompts[prompt], device=model.device) for prompt in arriving]
            scratch = SlotCache(layers, max(map(len, parts)))
            prefill(model, scratch, pad_sequence(parts, batch_first=True))  # what it pads, and the last token, are overwritten
            cache.copy_sequences(scratch, free[: len(parts)], len(rows))
            for place, prompt in zip(free, arriving, strict=False):
                ids = prompts[prompt]
                rows[place] = _Row(prompt, len(ids), list(ids), temperatures[prompt])
        if not any(rows):
            return
        last = torch.tensor([row.ids[-1] if row else 0 for row in rows], device=model.device)[:, None]
        length = torch.tensor([len(row.ids) - 1 if row else 0 for row in rows], device=model.device)[:, None]
        cache.row_slots, cache.visible = length, int(length.max()) + 1
        seen = columns[: cache.visible]
        mask = model.mask((seen <= length)[:, None, None], length, seen[None])
        logits = model.model(input_ids=last, attention_mask=mask, position_ids=length, past_key_values=cache).logits[:, -1]
        for place, token in enumerate(_choose_rows(model.legal(logits), rows, seed)):
            row = rows[place]
            if row is None:
                continue
            row.ids.append(token)
            answer = len(row.ids) - row.prompt_length
            if token in model.stop_ids or answer == max_new_tokens:
                yield row.prompt, row.ids[-answer:]
                rows[place] = None


def _choose_rows(logits: Tensor, rows: list[_Row | None], seed: int) -> list[int]:
    """Next token of each row at its own temperature; its noise depends on its prompt and place, not on the batch."""
    chosen = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
    for temperature in sorted({row.temperature for row in rows if row}):
        places = [i for i, row in enumerate(rows) if row and row.temperature == temperature]
        sampling = SamplingConfig(temperature, top_k=10 if temperature else 0, top_p=0.95 if temperature else 1.0, seed=seed)
        live = [rows[i] for i in places]
        index = [(row.prompt << 20) + len(row.ids) - row.prompt_length for row in live if row]
        chosen[places] = choose(logits[places], torch.tensor(index, device=logits.device), sampling)[:, 0]
    return chosen.tolist()


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
    out.mkdir(parents=True, exist_ok=True)
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
    part = file.with_suffix(f".part{PartialState().process_index}")
    part.write_text(json.dumps(manifest, indent=1) + "\n")
    part.replace(file)


def _write_shard(path: Path, prompts: list[list[int]], answers: list[list[int]]) -> None:
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    tensors = {
        "tokens": torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int32),
        "lengths": torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32),
    }
    save_file(tensors, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


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
