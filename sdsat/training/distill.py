"""Self-distillation: the model's own answers to prompts, as token shards with a manifest, and
reading them for training.

    sdsat distill --out runs/data --source path/to/python/packages

The model's own answers, because acceptance is measured against the model's own output. A shard is a
few MB of tokens.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from sdsat.config import DecodeConfig, SamplingConfig, require
from sdsat.decoding.loop import Decoder
from sdsat.environment import check_environment
from sdsat.files import locked, read_json
from sdsat.models.identity import identity
from sdsat.tasks.prompts import COMPLETE, collect_prompts, licences
from sdsat.training.shards import _write_manifest, _write_shard

GREEDY = SamplingConfig()
_SINCE = ("base_sha256", "dtype", "stop_ids")  # what the first manifests do not have
# what they were made with
_BEFORE: dict[str, Any] = {"answers": 1, "kinds": COMPLETE, "avoid": [], "template_options": []}


def answer_batch(
    decoder: Decoder,
    prompts: list[list[int]],
    todo: list[int],
    temperatures: list[float],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> Iterator[tuple[int, list[int]]]:
    """The answers to prompts[i] for i in todo: (i, answer ids with the stop id), in the order in
    which they end.

    Prompt i is answered by AR at temperatures[i], with the paper's top-p 0.95 and top-k 10 where
    that is not 0, and a seed of its own: the answer doesn't depend on what is answered beside it.
    """
    configs = []
    stop_ids = decoder.model.stop_ids
    for i in todo:
        sampling = (
            SamplingConfig(temperatures[i], top_k=10, top_p=0.95, seed=(seed << 32) + i)
            if temperatures[i]
            else GREEDY
        )
        configs.append(DecodeConfig(0, max_new_tokens, sampling=sampling, stop_ids=stop_ids))
    asked = [prompts[i] for i in todo]
    for place, out in decoder.iterate_batch(asked, configs, batch_size=batch_size):
        yield todo[place], out.token_ids


def distill(
    decoder: Decoder,
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
    """Write the model's own answers to prompts from `sources` (prompts.py) as token shards; resumes
    at the first missing shard.

    kinds, avoid: see `prompts.collect_prompts`. The prompts take the temperatures in turn; each
    prompt's next answer, of `answers`, the temperature after its last; the answers to a prompt
    follow each other and share its pass. Under `accelerate launch` every process writes its own
    part of the shards. Returns the manifest, also written to `out`.
    """
    model = decoder.model
    positive = dict(
        max_new_tokens=max_new_tokens, batch_size=batch_size, shard_size=shard_size, answers=answers
    )
    for name, value in {**positive, "max_prompt_tokens": max_prompt_tokens}.items():
        require(value >= 1, f"{name}={value}: expected 1 or more")
    require(limit is None or limit >= 1, f"limit={limit}: expected 1 or more")
    room = model.max_context - max_prompt_tokens
    require(
        max_new_tokens <= room,
        (
            f"max_new_tokens={max_new_tokens}: beside max_prompt_tokens the context has room "
            f"for {room}"
        ),
    )
    for temperature in temperatures:
        SamplingConfig(temperature)  # refuses what cannot be sampled at
    state = PartialState(cpu=model.device.type == "cpu")
    distinct, counts = collect_prompts(
        sources, model.tokenizer, limit, max_prompt_tokens, template_options, kinds, avoid
    )
    prompts = [ids for ids in distinct for _ in range(answers)]
    turns = [
        temperatures[(i + again) % len(temperatures)]
        for i in range(len(distinct))
        for again in range(answers)
    ]
    settings = {
        "model": model.name,
        "base_sha256": identity(model.name, model)["base"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "stop_ids": list(model.stop_ids),
        "seed": seed,
        "answers": answers,
        "temperatures": list(temperatures),
        "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "shard_size": shard_size,
        "kinds": dict(kinds),
        "avoid": [file.name for file in avoid],
        "template_options": list(template_options),
        "num_prompts": len(distinct),
        "prompts": counts,
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }
    manifest: dict[str, Any] = {
        "format": "sdsat-shards",
        "format_version": 1,
        "settings": settings,
        "shards": [],
    }
    manifest["licences"] = licences(sources)
    shards = [
        range(n, min(n + shard_size, len(prompts))) for n in range(0, len(prompts), shard_size)
    ]
    files = [out / f"shard_{number:05d}.safetensors" for number in range(len(shards))]
    manifest_file = out / "manifest.json"
    with locked(out / ".lock", f"out={out}") if state.is_main_process else nullcontext():
        state.wait_for_everyone()  # none reads what is there before the first holds the lock
        _check_shards(out, settings)
        own = range(state.process_index, len(shards), state.num_processes)
        missing = [shards[number] for number in own if not files[number].exists()]
        # Like lengths together keep attention short; one run over all shards keeps the batch full.
        todo = [i for shard in missing for i in sorted(shard, key=lambda i: len(prompts[i]))]
        bar = tqdm(
            total=len(todo), desc="distill", unit="answer", disable=not state.is_local_main_process
        )
        made: dict[int, list[int]] = {}
        _write_manifest(manifest_file, manifest, files)
        for i, answer in answer_batch(
            decoder, prompts, todo, turns, max_new_tokens, batch_size, seed
        ):
            made[i] = answer
            bar.update()
            shard = shards[i // shard_size]
            if all(j in made for j in shard):
                _write_shard(
                    files[i // shard_size],
                    [prompts[j] for j in shard],
                    [made.pop(j) for j in shard],
                )
                _write_manifest(manifest_file, manifest, files)
        state.wait_for_everyone()
        _write_manifest(manifest_file, manifest, files)
    return manifest


def _check_shards(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on in a folder whose shards were made with other settings."""
    file = out / "manifest.json"
    if not file.exists():
        require(
            not list(out.glob("shard_*")),
            f"out={out}: holds shards without a manifest; choose another folder or delete it",
        )
        return
    manifest = read_json(file)
    held: Any = manifest.get("settings") if isinstance(manifest, dict) else None
    require(
        isinstance(held, dict),
        f"out={out}: its manifest.json is not one of this program; delete it or choose another",
    )
    unknown = [key for key in _SINCE if key not in held]
    if unknown:
        warnings.warn(
            f"out={out}: begun by a version that did not keep {', '.join(unknown)}: not compared",
            stacklevel=3,
        )
    check_environment(
        {**_BEFORE, **{key: settings[key] for key in unknown}, **held}, settings, f"out={out}"
    )
