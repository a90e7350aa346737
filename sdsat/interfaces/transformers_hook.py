"""Draft-then-verify inside transformers' own `generate`.

    model.generate(**inputs, custom_generate=sdsat.generate)

transformers prepares everything (prompts, generation config, logits processors, stopping criteria)
and hands it over; here each sequence becomes a generation of a `Decoder`. What a Decoder does
itself (temperature, top-k, top-p, ends at token ids or at a length) goes into its `DecodeConfig`.
Everything else acts through a `Chooser`, which the Decoder asks once for each emitted position, in
order, with the model's logits after true tokens only. So processors and criteria get, each sequence
by itself, the very calls that plain `generate` makes: the output equals its output when greedy, and
AR's with the same seed when sampling. A row of a batch is shown to them with its padding, as there,
so that the output is plain `generate`'s for that batch: it is what the row has alone, too, unless
one of them reads the padding. What can't be honoured is refused, by name.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from sdsat.config import SatIds, require, whole
from sdsat.decoding.decoder import Decoder
from sdsat.engines.choose import check_engine
from sdsat.interfaces.generate_arguments import (
    check_kinds,
    check_tokenizer,
    prompts_of,
    refuse_arguments,
    refuse_inputs,
    refuse_settings,
    refuse_without_room,
    seed_of,
)
from sdsat.interfaces.generate_sequences import SdsatOutput, Sequences, refuse_in_batch
from sdsat.models import embedded, loading
from sdsat.models.hub import at_revision

ATTRIBUTE = "sdsat"  # the attribute of a model that holds its Decoder


def load(
    name: str = embedded.NAME,
    dtype: str = "bfloat16",
    device: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a transformers model that is ready for `custom_generate=sdsat.generate`.

    Everything else works on it as before: `model(**inputs)`, plain `model.generate(**inputs)`.

    Args:
        name: a hub id, a directory, a GGUF file, an adapter directory or an embedded name.
        dtype: 'float32', 'bfloat16', 'float16', 'int8', 'gguf', or 'auto'; see
            `models.loading.load`.
        device: 'cpu', a GPU number, or several joined by +; None for the first GPU, else the CPU.
        revision: of a hub id: a branch, a tag or a commit; None for what is there now.
        options: further ones of `sdsat.decoding.decoder.Decoder.load`.

    Returns:
        The model and its tokenizer.

    Raises:
        InputError: in one line, for anything that can't be loaded.
    """
    further = list(inspect.signature(Decoder.load).parameters)[3:]
    for option, value in options.items():
        expected = f"one of {', '.join(further)}"
        require(option in further, f"{option}={value!r}: sdsat.load has no such option; {expected}")
    decoder = Decoder.load(at_revision(name, revision), dtype, device, **options)
    return _ready(decoder), decoder.model.tokenizer


def attach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | None = None,
    sat_token_id: SatIds | None = None,
    engine: str = "auto",
    graphs: bool = True,
    trained_k: int | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Make a loaded model ready for `custom_generate=sdsat.generate`, and return it.

    Weights and modules may change: before each generation what is made of them is made anew if they
    have (of changes through `.data`, which torch does not count, only those of most of a weight are
    seen). A model with modules, hooks or parametrizations of other origin goes through these, or is
    refused by the name of the first one. The native engine's copy of the weights stands beside the
    model's own, which stay as they are.

    Args:
        model: loaded by `AutoModelForCausalLM`.
        tokenizer: for stop strings.
        adapter: directory or hub id of an adapter made for it, or its embedded name; None for a
            checkpoint that has SATs itself, or an adapter beside it (`sdsat export --hub`).
        sat_token_id: as of `sdsat.decoding.decoder.Decoder.load`.
        engine: as there.
        graphs: as there.
        trained_k: as there.
        revision: of the adapter, or where none is given of the model, if that is a hub id.

    Raises:
        InputError: in one line, for a model or options that can't be used.
    """
    require(
        isinstance(model, PreTrainedModel),
        f"model: a {type(model).__module__}.{type(model).__qualname__}; expected the "
        "transformers model in it "
        "(PEFT's: model.get_base_model())",
    )
    name = str(getattr(model, "name_or_path", "")) or type(model).__name__
    require(getattr(model, ATTRIBUTE, None) is None, f"model {name}: already attached")
    bringing = at_revision(str(adapter or name), revision)
    require(
        adapter is None or loading.is_adapter(bringing),
        f"adapter={adapter}: not an adapter directory or hub id",
    )
    check_tokenizer(tokenizer)
    check_engine(engine, graphs)
    loading.check_options(bringing, sat_token_id, trained_k)
    loading.check_model(model, name)
    equipped = loading.equip(model, tokenizer, bringing, sat_token_id, trained_k)
    return _ready(Decoder(equipped, engine, graphs))


def _ready(decoder: Decoder) -> PreTrainedModel:
    """Prepare transformers' model for `generate`, and return it."""
    model: Any = decoder.model.lm
    setattr(model, ATTRIBUTE, decoder)
    # transformers gives a callable no streamer and no assistant, and its criteria no tokenizer
    # then: all lost in silence.
    model._extract_generation_mode_kwargs = partial(_mode_arguments, model)
    model._validate_generation_mode = partial(_check_mode, model)
    return model


def _mode_arguments(
    model: Any,
    custom_generate: Any,
    kwargs: dict[str, Any],
    synced_gpus: Any,
    assistant_model: Any,
    streamer: Any,
) -> dict[str, Any]:
    """Collect what transformers hands to a way of decoding, with nothing left out.

    That is what it has prepared, and what the caller gave. Raises InputError for arguments of the
    wrong kind, before transformers meets them.

    Args:
        model: whose method this stands for.
        custom_generate: the way of decoding.
        kwargs: of the call.
        synced_gpus: whether several GPUs keep step.
        assistant_model: the caller's, if any.
        streamer: the caller's, if any.
    """
    ours = getattr(custom_generate, "func", custom_generate) is generate
    if ours:
        refuse_arguments(kwargs, assistant_model, streamer)
    tokenizer = kwargs.get("tokenizer") or getattr(model, ATTRIBUTE).model.tokenizer
    given = type(model)._extract_generation_mode_kwargs(
        model, custom_generate, kwargs, synced_gpus, assistant_model, streamer
    )
    if ours:
        own = {"streamer": streamer, "tokenizer": tokenizer, "synced_gpus": synced_gpus}
        given |= {name: value for name, value in own.items() if value is not None}
        return _Arguments(given)
    return given


class _Arguments(dict[str, Any]):
    """Arguments of `generate`, by which `_check_mode` knows whose they are."""


def _check_mode(model: Any, mode: Any, generation_config: Any, arguments: dict[str, Any]) -> None:
    """Check a way of decoding as transformers does; before it, what only this one can't do.

    That is all that can be said before inputs are copied for so many sequences, and caches of so
    many positions made. Raises InputError, and what transformers raises.

    Args:
        model: whose method this stands for.
        mode: of transformers.
        generation_config: of the call.
        arguments: of the way of decoding.
    """
    if isinstance(arguments, _Arguments):
        sat = getattr(model, ATTRIBUTE).model
        check_kinds(vars(generation_config))
        refuse_settings(generation_config)
        num = whole(
            "num_return_sequences",
            generation_config.num_return_sequences,
            "1 or more, a whole number",
            1,
        )
        name = "max_length" if generation_config.max_new_tokens is None else "max_new_tokens"
        expected = (
            f"1 to {sat.max_context} tokens, prompt included: so many positions model "
            f"{sat.name} takes"
        )
        most = whole(name, getattr(generation_config, name), expected, 1, sat.max_context)
        refuse_without_room(sat, num, num, most if name == "max_new_tokens" else 1)
    type(model)._validate_generation_mode(model, mode, generation_config, arguments)


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    streamer: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    strategy: str = "auto",
    k: int | None = None,
    tree: str | tuple[int, ...] = "auto",
    budget: int | None = None,
    lookup: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> Tensor | SdsatOutput:
    """Generate for `model.generate(**inputs, custom_generate=sdsat.generate, strategy=..)`.

    It is called by transformers, not directly. Strategy, k, tree, budget and lookup don't change
    the output.

    Args:
        model: from `load` or `attach`.
        input_ids: [B, L].
        logits_processor: as transformers has prepared them.
        stopping_criteria: as transformers has prepared them.
        generation_config: as transformers has prepared it.
        streamer: the caller's; for a single sequence.
        tokenizer: the caller's, of which transformers has made criteria for stop strings.
        strategy: as in `DecodeConfig`.
        k: as in `DecodeConfig`; None: what the SATs were trained for.
        tree: as in `DecodeConfig`.
        budget: as in `DecodeConfig`.
        lookup: as in `DecodeConfig`.
        seed: of sampling; sequence i of a batch takes seed + i * 2**32. Without one it is drawn
            from `generator`, or from torch's global generator, so that `torch.manual_seed` makes it
            reproducible.
        generator: in place of a seed.
        model_kwargs: what transformers has prepared beside: attention mask and positions.

    Returns:
        Token ids [B, S] as transformers would, or an `SdsatOutput` [B, S] where
        return_dict_in_generate is true.

    Raises:
        InputError: in one line, for what can't be honoured.
    """
    decoder = getattr(model, ATTRIBUTE, None)
    require(
        isinstance(decoder, Decoder),
        f"model {getattr(model, 'name_or_path', '')}: not prepared for sdsat.generate; "
        "expected one from sdsat.load(NAME), or "
        "sdsat.attach(model, tokenizer, ADAPTER) before it",
    )
    assert isinstance(decoder, Decoder)
    refuse_inputs(model_kwargs, stopping_criteria)
    prompts = prompts_of(decoder.model, input_ids, model_kwargs)
    if len(prompts) > 1:
        refuse_in_batch([*logits_processor, *stopping_criteria], streamer)
    sequences = Sequences(
        decoder,
        input_ids,
        list(logits_processor),
        stopping_criteria,
        generation_config,
        seed_of(seed, generator, generation_config.do_sample),
    )
    settings = (k, tree, strategy, budget, lookup)
    generations = sequences.decode(prompts, settings, streamer)
    if streamer is not None:
        streamer.end()
    return sequences.output(generations)
