"""Self-distillation: the model's own answers to prompts, as token shards with a manifest, and reading them for training.

    sdsat distill --out runs/data --source path/to/python/packages

The model's own answers, because acceptance is measured against the model's own output. A shard is a few MB of tokens.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from .files import locked, read_json, replacing, write_json
from .model import SatModel
from .prompts import COMPLETE, Decontaminator, collect_prompts, licences
from .records import check_environment, identity

_TEXT, GREEDY = (".py", ".md", ".txt"), SamplingConfig()
_SINCE = ("base_sha256", "dtype", "stop_ids")  # what the first manifests do not have
_BEFORE: dict[str, Any] = {"answers": 1, "kinds": COMPLETE, "avoid": [], "template_options": []}  # what they were made with
_USUAL_SIZE = 16  # sequences of a text file


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
    template_options: tuple[str, ...] = (),
    kinds: Mapping[str, float] = COMPLETE,
    avoid: tuple[Path, ...] = (),
) -> dict[str, Any]:
    """Write the model's own answers to prompts from `sources` (prompts.py) as token shards; resumes at the first missing shard.

    kinds, avoid: see `prompts.collect_prompts`. The prompts take the temperatures in turn; each prompt's next answer, of
    `answers`, the temperature after its last; the answers to a prompt follow each other and share its pass. Under `accelerate
    launch` every process writes its own part of the shards. Returns the manifest, also written to `out`.
    """
    positive = dict(max_new_tokens=max_new_tokens, batch_size=batch_size, shard_size=shard_size, answers=answers)
    for name, value in {**positive, "max_prompt_tokens": max_prompt_tokens}.items():
        require(value >= 1, f"{name}={value}: expected 1 or more")
    require(limit is None or limit >= 1, f"limit={limit}: expected 1 or more")
    room = model.max_context - max_prompt_tokens
    require(max_new_tokens <= room, f"max_new_tokens={max_new_tokens}: beside max_prompt_tokens the context has room for {room}")
    for temperature in temperatures:
        SamplingConfig(temperature)  # refuses what cannot be sampled at
    state = PartialState(cpu=model.device.type == "cpu")
    distinct, counts = collect_prompts(sources, model.tokenizer, limit, max_prompt_tokens, template_options, kinds, avoid)
    prompts = [ids for ids in distinct for _ in range(answers)]
    turns = [temperatures[(i + again) % len(temperatures)] for i in range(len(distinct)) for again in range(answers)]
    settings = {
        "model": model.name, "base_sha256": identity(model.name, model)["base"],
        "dtype": str(model.dtype).removeprefix("torch."), "stop_ids": list(model.stop_ids),
        "seed": seed, "answers": answers, "temperatures": list(temperatures),
        "max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens, "shard_size": shard_size,
        "kinds": dict(kinds), "avoid": [file.name for file in avoid], "template_options": list(template_options),
        "num_prompts": len(distinct), "prompts": counts,
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }  # fmt: skip
    manifest: dict[str, Any] = {"format": "sdsat-shards", "format_version": 1, "settings": settings, "shards": []}
    manifest["licences"] = licences(sources)
    shards = [range(n, min(n + shard_size, len(prompts))) for n in range(0, len(prompts), shard_size)]
    files = [out / f"shard_{number:05d}.safetensors" for number in range(len(shards))]
    manifest_file = out / "manifest.json"
    with locked(out / ".lock", f"out={out}") if state.is_main_process else nullcontext():
        state.wait_for_everyone()  # none reads what is there before the first holds the lock
        _check_shards(out, settings)
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


def _check_shards(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on in a folder whose shards were made with other settings."""
    file = out / "manifest.json"
    if not file.exists():
        require(not list(out.glob("shard_*")), f"out={out}: holds shards without a manifest; choose another folder or delete it")
        return
    manifest = read_json(file)
    held: Any = manifest.get("settings") if isinstance(manifest, dict) else None
    require(isinstance(held, dict), f"out={out}: its manifest.json is not one of this program; delete it or choose another")
    unknown = [key for key in _SINCE if key not in held]
    if unknown:
        warnings.warn(f"out={out}: begun by a version that did not keep {', '.join(unknown)}: not compared", stacklevel=3)
    check_environment({**_BEFORE, **{key: settings[key] for key in unknown}, **held}, settings, f"out={out}")


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
    """One training sequence: token ids, and how many of them are the prompt.

    source: names the text that it was cut from, where others may be of the same; None where only the prompt says what is alike.
    """

    ids: Tensor
    prompt_length: int
    source: str | None = None


def sequences_sha256(sequences: list[Sequence]) -> str:
    """The hash of training data: of all tokens, of where each sequence and its prompt end, and of what belongs together."""
    digest = hashlib.sha256()
    for s in sequences:
        digest.update(f"{len(s.ids)} {s.prompt_length} {s.source}\n".encode() + s.ids.numpy().tobytes())
    return digest.hexdigest()


def hold_out(sequences: list[Sequence], count: int) -> tuple[list[Sequence], list[Sequence]]:
    """The first `count` sequences, to evaluate on, and those to train on: of other texts, and answers to other prompts.

    Raises InputError where none are left.
    """
    require(len(sequences) > count, f"data: {len(sequences)} sequences, expected more than held_out={count}")

    def origin(s: Sequence) -> Any:
        return s.source or tuple(s.ids[: s.prompt_length].tolist())

    held = sequences[:count]
    taken = {origin(s) for s in held} - {()}
    rest = [s for s in sequences[count:] if origin(s) not in taken]
    require(len(rest) > 0, f"held_out={count}: no sequences with other prompts, or from other files, are left to train on")
    return held, rest


def read_sequences(path: Path, tokenizer: PreTrainedTokenizerBase | None, length: int = 512) -> list[Sequence]:
    """Training data: a folder of shards, or plain text or code, a file or all .py, .md and .txt files of a folder.

    Text is cut into sequences of `length` tokens; files that overlap HumanEval are left out, with a warning that counts them. A
    file's sequences stay together, so that the first ones, which are held out, are of few files, and these cost training little.
    """
    if path.is_dir() and list(path.glob("shard_*.safetensors")):
        return read_shards(path)
    require(path.exists(), f"data={path}: no such file or folder")
    require(path.is_dir() or path.suffix in _TEXT, f"data={path}: expected a .py, .md or .txt file, or a folder")
    files = [path] if path.is_file() else [f for f in sorted(path.rglob("*")) if f.suffix in _TEXT and f.is_file()]
    require(len(files) > 0, f"data={path}: no shard_*.safetensors and no .py, .md or .txt file there; run `sdsat distill`")
    require(tokenizer is not None, f"data={path}: text needs a tokenizer, and the model has none")
    assert tokenizer is not None
    decontaminator, by_text, dropped = Decontaminator(), dict[str, list[Sequence]](), 0
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
        by_text[source] = [Sequence(ids, 0, source) for ids in parts if len(ids) >= 8]
    if dropped:
        warnings.warn(f"data={path}: {dropped} of {len(files)} files overlap HumanEval and are left out", stacklevel=2)
    return _in_held_out_order([sequences for sequences in by_text.values() if sequences])


def _in_held_out_order(texts: list[list[Sequence]]) -> list[Sequence]:
    """Texts in an order whose beginning can be held out: any of usual size first, as they come in a shuffle, then by size.

    A single text has no other to be told from: its beginning is held out, and the rest of it is trained on.
    """
    if len(texts) == 1:
        return [replace(s, source=None) for s in texts[0]]
    shuffled = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [s for i in sorted(shuffled, key=lambda i: max(len(texts[i]), _USUAL_SIZE)) for s in texts[i]]


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
