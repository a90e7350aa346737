"""Self-distillation: the model's own answers to prompts, as token shards with a manifest.

    sdsat distill --out runs/data --source path/to/python/packages

The model's own answers, because acceptance is measured against the model's own output. A shard is
the tokens of some hundred answers, compressed; shards.py reads them for training.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from sdsat.config import DecodeConfig, DistillConfig, SamplingConfig, require
from sdsat.decoding.decoder import Decoder
from sdsat.models.identity import base_hash
from sdsat.models.sat_model import SatModel
from sdsat.resume import Place
from sdsat.tasks.prompts import COMPLETE, collect_prompts, licences, parse_kinds
from sdsat.training.shards import shard_files, shard_name, write_manifest, write_shard

GREEDY = SamplingConfig()
_SINCE = ("base_sha256", "dtype", "stop_ids")  # what the first manifests do not have
# What they were made with.
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
    """Answer prompts[i] for i in todo.

    Prompt i is answered by AR at temperatures[i], with the paper's top-p 0.95 and top-k 10 where
    that is not 0, and a seed of its own: the answer doesn't depend on what is answered beside it.

    Args:
        decoder: what answers.
        prompts: token ids.
        todo: which of them.
        temperatures: one a prompt.
        max_new_tokens: tokens of an answer at most.
        batch_size: answers at once.
        seed: of which each answer has its own form.

    Yields:
        (i, answer ids with the stop id), in the order in which the answers end.

    Raises:
        InputError: for prompts and settings that don't fit the model.
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
    decoder: Decoder, sources: list[str], out: Path, config: DistillConfig | None = None
) -> dict[str, Any]:
    """Write the model's own answers to prompts from `sources` (tasks/prompts.py) as token shards.

    It resumes at the first missing shard. The answers to a prompt follow each other and share its
    pass. Under `accelerate launch` every process writes its own part of the shards.

    Args:
        decoder: what answers.
        sources: where prompts come from.
        out: folder of the shards.
        config: which prompts, and how they are answered.

    Returns:
        The manifest, also written to `out`.

    Raises:
        InputError: for sources and settings that do not fit together, for a folder that holds other
            shards, and while another run writes to it.
    """
    config = config or DistillConfig()
    model = decoder.model
    room = model.max_context - config.max_prompt_tokens
    require(
        config.max_new_tokens <= room,
        f"max_new_tokens={config.max_new_tokens}: beside max_prompt_tokens the context has room "
        f"for {room}",
    )
    processes = PartialState(cpu=model.device.type == "cpu")
    distinct, counts = collect_prompts(
        sources,
        model.tokenizer,
        config.limit,
        config.max_prompt_tokens,
        config.template_options,
        parse_kinds(config.kinds),
        config.avoid,
    )
    prompts = [ids for ids in distinct for _ in range(config.answers)]
    settings = {
        **_settings(model, config),
        "num_prompts": len(distinct),
        "prompts": counts,
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }
    manifest: dict[str, Any] = {
        "format": "sdsat-shards",
        "format_version": 2,
        "settings": settings,
        "shards": [],
        "licences": licences(sources),
    }
    place = Place.folder(out, f"out={out}")
    with place.held(processes):
        _check_shards(place, settings)
        _write_answers(decoder, prompts, place.path, manifest, config, processes)
    return manifest


def _settings(model: SatModel, config: DistillConfig) -> dict[str, Any]:
    """Collect what the answers depend on beside the prompts."""
    return {
        "model": model.name,
        "base_sha256": base_hash(model.name, model.lm),
        "dtype": model.dtype_name,
        "stop_ids": list(model.stop_ids),
        "seed": config.seed,
        "answers": config.answers,
        "temperatures": list(config.temperatures),
        "max_new_tokens": config.max_new_tokens,
        "max_prompt_tokens": config.max_prompt_tokens,
        "shard_size": config.shard_size,
        "kinds": parse_kinds(config.kinds),
        "avoid": [file.name for file in config.avoid],
        "template_options": list(config.template_options),
    }


def _write_answers(
    decoder: Decoder,
    prompts: list[list[int]],
    out: Path,
    manifest: dict[str, Any],
    config: DistillConfig,
    processes: PartialState,
) -> None:
    """Make this process's part of the shards that are missing, and keep the manifest's list.

    Args:
        decoder: what answers.
        prompts: token ids, one an answer.
        out: folder of the shards.
        manifest: whose list of shards is kept.
        config: how prompts are answered.
        processes: of this run.
    """
    size = config.shard_size
    shards = [range(n, min(n + size, len(prompts))) for n in range(0, len(prompts), size)]
    files = [out / shard_name(number) for number in range(len(shards))]
    manifest_file = out / "manifest.json"
    own = range(processes.process_index, len(shards), processes.num_processes)
    missing = [shards[number] for number in own if not files[number].exists()]
    # Like lengths together keep attention short; one run over all shards keeps the batch full.
    todo = [i for shard in missing for i in sorted(shard, key=lambda i: len(prompts[i]))]
    bar = tqdm(
        total=len(todo), desc="distill", unit="answer", disable=not processes.is_local_main_process
    )
    made: dict[int, list[int]] = {}
    write_manifest(manifest_file, manifest, files)
    answers = answer_batch(
        decoder,
        prompts,
        todo,
        _temperatures(len(prompts), config),
        config.max_new_tokens,
        config.batch_size,
        config.seed,
    )
    for i, answer in answers:
        made[i] = answer
        bar.update()
        shard = shards[i // size]
        if all(j in made for j in shard):
            own_prompts = [prompts[j] for j in shard]
            write_shard(files[i // size], own_prompts, [made.pop(j) for j in shard])
            write_manifest(manifest_file, manifest, files)
    processes.wait_for_everyone()
    write_manifest(manifest_file, manifest, files)


def _temperatures(count: int, config: DistillConfig) -> list[float]:
    """Choose the temperature of each of `count` answers.

    Prompts take the temperatures in turn, and a prompt's next answer the one after its last.
    """
    levels = config.temperatures
    turns = (sum(divmod(i, config.answers)) for i in range(count))
    return [levels[turn % len(levels)] for turn in turns]


def _check_shards(place: Place, settings: dict[str, Any]) -> None:
    """Refuse to go on in a folder whose shards were made with other settings.

    Raises InputError, one line.
    """
    manifest = place.read(
        place.path / "manifest.json",
        ("settings",),
        "its manifest.json is not one of this program; delete it or choose another",
    )
    if manifest is None:
        place.require(
            not list(place.path.glob("shard_*")),
            "holds shards without a manifest; choose another folder or delete it",
        )
        return
    held = manifest["settings"]
    unknown = [key for key in _SINCE if key not in held]
    if unknown:
        warnings.warn(
            f"{place.name}: begun by a version that did not keep {', '.join(unknown)}: not "
            "compared",
            stacklevel=3,
        )
    place.check_same({**_BEFORE, **{key: settings[key] for key in unknown}, **held}, settings)
    shard_files(place.path)  # refuses older ones
