"""The one place where 'auto', None and defaults become settings, and where they are checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace

from sdsat.config import LOOKUP, STRATEGY, DecodeConfig, is_whole, require, several
from sdsat.engines.base import Engine
from sdsat.method.tree import GROWN, given_tree
from sdsat.models.sat_model import SatModel


def strategies_of(engine: Engine) -> tuple[str, ...]:
    """List the strategies that a model has SATs and an engine for.

    Looking tokens up takes nothing, so it is always among them.
    """
    has_sats = engine.model.sat is not None
    return tuple(
        name
        for name, kind in STRATEGY.items()
        if (has_sats or not kind.sats) and (engine.has_rounded or not kind.only_rounded)
    )


def resolved(engine: Engine, config: DecodeConfig) -> DecodeConfig:
    """Choose all that the settings leave open, for this model and engine.

    k None: what the SATs were trained for. lookup None: NUM_LOOKUP for 'lookup' and, with SATs,
    'auto'; else none, so that AR has nothing but the model's own tokens. tree 'auto': 'grown'
    for strategy 'auto' on an engine whose trees have AR's bits, and it verifies of them what pays;
    else a chain. Settings that are resolved stay as they are.

    Raises InputError where SATs are wanted of a model that has none.
    """
    model = engine.model
    k = config.k
    lookup = config.lookup
    tree = config.tree
    if k is None and not config.kind.sats:
        k = 0
    if k is None or k > 0:
        wanted = f"strategy={config.strategy}" if k is None else f"k={k}"
        instead = f"an adapter (`sdsat train` makes one), strategy={LOOKUP}, or k=0, plain decoding"
        missing = f"{wanted}: model {model.name} has no SATs to draft with; expected {instead}"
        require(model.sat is not None, missing)
        assert model.sat is not None
        k = model.sat.k if k is None else k
    if lookup is None:
        lookup = config.kind.lookup if k > 0 or not config.kind.sats else 0
    if tree == "auto":
        wide = config.kind.wide and engine.exact_trees and k > 0
        tree = GROWN if wide else "chain"
    return replace(config, k=k, lookup=lookup, tree=tree)


def check_context(model: SatModel, prompt_length: int, config: DecodeConfig) -> None:
    """Refuse a prompt for which, with what may follow, the model lacks positions.

    prompt_length: tokens of the prompt. Raises InputError.
    """
    needed = prompt_length + config.max_new_tokens
    require(
        needed <= model.max_context,
        f"max_new_tokens={config.max_new_tokens}: with a prompt of {prompt_length} tokens the "
        f"context would reach {needed}, but model {model.name} takes {model.max_context}",
    )


def check_tokens(name: str, tokens: Iterable[int], model: SatModel) -> None:
    """Refuse what is no token of the model's vocabulary.

    name: of the argument. Raises InputError.
    """
    size = model.vocabulary
    odd = (token for token in tokens if not (is_whole(token) and 0 <= token < size))
    strange = next(map(repr, odd), None)
    outside = f"{name}: token id {strange} is not in the model's vocabulary of {size}"
    require(strange is None, outside)


def checked(engine: Engine, prompt_ids: list[int], config: DecodeConfig) -> DecodeConfig:
    """Resolve the settings, and check that they fit the prompt and the model.

    Raises InputError unless they do. More SATs than the model was trained for give a warning.
    """
    model = engine.model
    require(isinstance(config, DecodeConfig), f"config={config!r}: expected a DecodeConfig")
    several("prompt", prompt_ids, "a list of token ids")
    require(len(prompt_ids) > 0, "prompt: no tokens; expected at least one")
    check_context(model, len(prompt_ids), config)
    check_tokens("prompt", prompt_ids, model)
    readable = model.tokenizer is not None or not config.stop_strings
    require(readable, "stop_strings: the model came without a tokenizer")
    config = resolved(engine, config)
    if not config.num_sats:
        return config
    if model.sat and config.num_sats > model.sat.k:
        beyond = f"k={config.k} is beyond the depth k={model.sat.k} that {model.name}"
        warnings.warn(f"{beyond} was trained for", stacklevel=3)
    require(
        config.strategy in strategies_of(engine),
        f"strategy={config.strategy}: {model.name} runs through transformers' modules here, which "
        "have no rounded weights; expected another",
    )
    tree = given_tree(config.tree, config.num_sats)
    if tree is not None:
        size = model.vocabulary - 1 if model.draft_ids is None else len(model.draft_ids)
        candidates = f"{tree.width} candidates, but SATs guess among {size} tokens"
        require(tree.width <= size, f"tree={config.tree}: {candidates}")
    return config
