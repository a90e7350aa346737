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
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import logits_process as processors
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from sdsat.config import DecodeConfig, SamplingConfig, is_real, is_whole, require, whole
from sdsat.decoding.loop import Decoder
from sdsat.decoding.resolve import check_context, check_tokens
from sdsat.decoding.sequence import Generation, num_slots
from sdsat.engines.choose import check_engine
from sdsat.method.sampling import choose, filtered
from sdsat.method.tree import parse_tree
from sdsat.models import embedded, loading
from sdsat.models.attention import sliding_window
from sdsat.models.devices import GIB, free_bytes
from sdsat.models.sat_model import SatModel

ATTRIBUTE = "sdsat"  # the attribute of a model that holds its Decoder
# Settings that plain decoding leaves at these values; others ask for another kind of decoding, or
# for what isn't kept.
_ONLY = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "use_mtp": False,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "is_assistant": False,
    "use_cache": True,
    "prefill_chunk_size": None,
    "low_memory": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
_ELSEWHERE = ("offloaded", "quantized")  # caches that are kept elsewhere or otherwise than here
# What transformers hands over with every call, beside what the caller gave.
_PREPARED = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
# In the order in which transformers applies them, which is that of SamplingConfig.
_NATIVE = (
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
)
# Functions of (tokens so far, logits) alone: sequences of a batch may come one by one.
_STATELESS = (
    *_NATIVE,
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.ExponentialDecayLengthPenalty,
    processors.ForcedBOSTokenLogitsProcessor,
    processors.ForcedEOSTokenLogitsProcessor,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.MinPLogitsWarper,
    processors.NoBadWordsLogitsProcessor,
    processors.NoRepeatNGramLogitsProcessor,
    processors.RepetitionPenaltyLogitsProcessor,
    processors.SequenceBiasLogitsProcessor,
    processors.SuppressTokensAtBeginLogitsProcessor,
    processors.SuppressTokensLogitsProcessor,
    processors.TopHLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.WatermarkLogitsProcessor,
    StopStringCriteria,
)


@dataclass
class SdsatOutput(GenerateDecoderOnlyOutput):
    """The output of transformers, and how each sequence came about. No cache is given back.

    scores, logits: of a sequence that has ended, the padding token's score is 0 and all others are
    -inf.
    """

    generations: list[Generation] | None = None


def load(
    name: str = embedded.NAME, dtype: str = "bfloat16", device: str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a transformers model that is ready for `custom_generate=sdsat.generate`.

    Everything else works on it as before: `model(**inputs)`, plain `model.generate(**inputs)`.

    Args:
        name: a hub id, a directory, a GGUF file, an adapter directory or an embedded name.
        dtype: 'float32', 'bfloat16', 'float16', or 'auto' for the checkpoint's own.
        device: 'cpu', a GPU number, or several joined by +; None for the first GPU, else the CPU.
        options: further ones of `sdsat.decoding.loop.Decoder.load`.

    Returns:
        The model and its tokenizer.

    Raises:
        InputError: in one line, for anything that can't be loaded.
    """
    further = list(inspect.signature(Decoder.load).parameters)[3:]
    for option, value in options.items():
        expected = f"one of {', '.join(further)}"
        require(option in further, f"{option}={value!r}: sdsat.load has no such option; {expected}")
    decoder = Decoder.load(name, dtype, device, **options)
    return _ready(decoder), decoder.model.tokenizer


def attach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | None = None,
    sat_token_id: int | None = None,
    engine: str = "auto",
    graphs: bool = True,
    trained_k: int | None = None,
) -> PreTrainedModel:
    """Make a loaded model ready for `custom_generate=sdsat.generate`, and return it.

    Weights and modules may change: before each generation what is made of them is made anew if they
    have (of changes through `.data`, which torch does not count, only those of most of a weight are
    seen). A model with modules, hooks or parametrizations of other origin goes through these, or is
    refused by the name of the first one.

    Args:
        model: loaded by `AutoModelForCausalLM`.
        tokenizer: for stop strings.
        adapter: directory of an adapter made for it, or its embedded name; None for a checkpoint
            that has SATs itself.
        sat_token_id: as of `sdsat.decoding.loop.Decoder.load`.
        engine: as there.
        graphs: as there.
        trained_k: as there.

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
    require(
        adapter is None or loading.is_adapter(str(adapter)),
        f"adapter={adapter}: not an adapter directory",
    )
    _check_tokenizer(tokenizer)
    check_engine(engine, graphs)
    loading.check_options(str(adapter or name), sat_token_id, trained_k)
    loading.check_model(model, name)
    equipped = loading.equip(model, tokenizer, str(adapter or name), sat_token_id, trained_k)
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
        _refuse_arguments(kwargs, assistant_model, streamer)
    tokenizer = kwargs.get("tokenizer") or getattr(model, ATTRIBUTE).model.tokenizer
    given = type(model)._extract_generation_mode_kwargs(
        model, custom_generate, kwargs, synced_gpus, assistant_model, streamer
    )
    if ours:
        own = {"streamer": streamer, "tokenizer": tokenizer, "synced_gpus": synced_gpus}
        given |= {name: value for name, value in own.items() if value is not None}
        return _Arguments(given)
    return given


def _refuse_arguments(kwargs: dict[str, Any], assistant_model: Any, streamer: Any) -> None:
    """Refuse what transformers would stumble over before it comes to `generate`.

    Raises InputError.

    Args:
        kwargs: of the call.
        assistant_model: the caller's, if any.
        streamer: the caller's, if any.
    """
    cache = kwargs.get("past_key_values")
    require(
        cache is None,
        f"past_key_values={type(cache).__name__}: sdsat.generate starts with a cache of its own; "
        "leave it out",
    )
    require(
        assistant_model is None,
        f"assistant_model={type(assistant_model).__name__}: sdsat.generate drafts by itself; "
        "leave it out",
    )
    streams = all(callable(getattr(streamer, name, None)) for name in ("put", "end"))
    require(
        streamer is None or streams,
        f"streamer={streamer!r}: expected an object with put and end, such as "
        "transformers' TextStreamer",
    )
    _check_tokenizer(kwargs.get("tokenizer"))
    _check_kinds(kwargs)


def _check_tokenizer(tokenizer: Any) -> None:
    good = tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase)
    require(good, f"tokenizer={tokenizer!r}: expected a tokenizer of transformers")


def _check_kinds(settings: dict[str, Any]) -> None:
    """Refuse settings of the wrong kind, with an InputError; those that are None are left out."""
    for name, (fits, expected) in _KINDS.items():
        value = settings.get(name)
        require(value is None or fits(value), f"{name}={_in_line(value)}: expected {expected}")


def _in_line(value: Any) -> str:
    """Write a value in one line, which may leave out its end."""
    line = " ".join(repr(value).split())
    return line if len(line) <= 80 else f"{line[:80]}.."


def _is_positive(value: Any) -> bool:
    return is_whole(value) and bool(value >= 1)


def _is_flag(value: Any) -> bool:
    return isinstance(value, (int, np.bool_))  # plain generate takes 0 and 1, too


def _are_ids(value: Any) -> bool:
    some = value if isinstance(value, (list, tuple)) else [value]
    return isinstance(value, Tensor) or (len(some) > 0 and all(map(is_whole, some)))


def _are_texts(value: Any) -> bool:
    some = value if isinstance(value, (list, tuple)) else [value]
    return len(some) > 0 and all(isinstance(text, str) and text != "" for text in some)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_table(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


# {setting: (what fits, what is expected)}, for those of which a wrong kind would be one of Python's
# own errors somewhere in transformers.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("max_new_tokens", "max_length", "num_return_sequences"),
        (_is_positive, "1 or more, a whole number"),
    ),
    **dict.fromkeys(
        (
            "min_new_tokens",
            "min_length",
            "no_repeat_ngram_size",
            "top_k",
            "pad_token_id",
            "bos_token_id",
        ),
        (is_whole, "a whole number"),
    ),
    **dict.fromkeys(
        (
            "temperature",
            "top_p",
            "min_p",
            "top_h",
            "typical_p",
            "epsilon_cutoff",
            "eta_cutoff",
            "repetition_penalty",
            "guidance_scale",
            "max_time",
        ),
        (is_real, "a number"),
    ),
    **dict.fromkeys(
        ("do_sample", "return_dict_in_generate", "output_scores", "output_logits"),
        (_is_flag, "True or False"),
    ),
    "input_ids": (_is_table, "token ids [B, L]"),
    **dict.fromkeys(("attention_mask", "position_ids", "inputs_embeds"), (_is_tensor, "a tensor")),
    "eos_token_id": (_are_ids, "a token id, or a list of them"),
    "stop_strings": (_are_texts, "a text, or a list of them, none empty"),
}


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
        _check_kinds(vars(generation_config))
        _refuse_settings(generation_config)
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
        _refuse_without_room(sat, num, num, most if name == "max_new_tokens" else 1)
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
    for step in stopping_criteria:
        require(callable(step), f"stopping_criteria: {step!r} in it; expected functions")
    _refuse_inputs(model_kwargs)
    prompts = _prompts(decoder.model, input_ids, model_kwargs)
    for prompt in prompts:
        check_tokens("input_ids", prompt, decoder.model)
    if len(prompts) > 1:
        _refuse_in_batch([*logits_processor, *stopping_criteria], streamer)
    sequences = _Sequences(
        decoder,
        input_ids,
        list(logits_processor),
        stopping_criteria,
        generation_config,
        _seed(seed, generator, generation_config.do_sample),
    )
    settings = (k, tree, strategy, budget, lookup)
    generations = sequences.decode(prompts, settings, streamer)
    if streamer is not None:
        streamer.end()
    return sequences.output(generations)


def _refuse_settings(generation_config: Any) -> None:
    """Refuse settings that are not honoured, with an InputError."""
    for name, only in _ONLY.items():
        value = getattr(generation_config, name, None)
        require(
            value is None or value == only,
            f"{name}={value}: sdsat.generate does not support it; expected {only}",
        )
    cache = generation_config.cache_implementation
    require(
        not str(cache).startswith(_ELSEWHERE),
        f"cache_implementation={cache}: sdsat.generate has a cache of its own; leave it out",
    )


def _refuse_inputs(model_kwargs: dict[str, Any]) -> None:
    for name, value in model_kwargs.items():
        known = name in _PREPARED or value is None or value is False
        require(
            known, f"{name}: sdsat.generate can't take it; expected input_ids and attention_mask"
        )


def _refuse_without_room(
    sat: SatModel, num_return_sequences: int, rows: int, max_new_tokens: int, longest: int = 1
) -> None:
    """Refuse sequences whose caches are larger than the free memory, with an InputError.

    Args:
        sat: the model.
        num_return_sequences: for the message.
        rows: how many sequences.
        max_new_tokens: of each.
        longest: tokens of the longest prompt, at most.
    """
    config = sat.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    position = 2 * config.num_hidden_layers * heads * dim * sat.dtype.itemsize
    needed = rows * num_slots(longest, max_new_tokens) * position
    free = sum(free_bytes(device) for device in sat.devices)
    argument = (
        f"num_return_sequences={num_return_sequences}" if num_return_sequences > 1 else "input_ids"
    )
    require(
        needed <= free,
        f"{argument}: {rows} sequences of up to {longest + max_new_tokens} tokens need "
        f"{needed / GIB:.1f} GiB of cache, and "
        f"{free / GIB:.1f} are free; expected fewer sequences, or a smaller max_new_tokens",
    )


def _refuse_in_batch(steps: list[Any], streamer: Any) -> None:
    require(
        streamer is None,
        (
            f"streamer={type(streamer).__name__}: each sequence of a batch goes on by itself; "
            "expected a single one"
        ),
    )
    for step in steps:
        require(
            type(step) in (*_STATELESS, EosTokenCriteria, MaxLengthCriteria),
            (
                f"{type(step).__name__}: it may keep state, and each sequence of a batch goes "
                "on by itself; expected a single one"
            ),
        )


def _prompts(sat: SatModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> list[list[int]]:
    """Strip from the prompts [B, L] what the attention mask leaves out.

    That is padding on the left and, where transformers has made the mask, padding tokens anywhere.
    Positions count what is left, so the model never knows of the rest. Raises InputError for ids, a
    mask or positions that are not of that form.
    """
    whole_ids = (
        input_ids.dim() == 2 and not input_ids.is_floating_point() and input_ids.dtype != torch.bool
    )
    require(
        whole_ids,
        (
            f"input_ids: {input_ids.dtype} {list(input_ids.shape)}; expected token ids [B, L], "
            "whole numbers"
        ),
    )
    require(
        len(input_ids) > 0,
        f"input_ids: of shape {list(input_ids.shape)}; expected one prompt or more",
    )
    require(input_ids.shape[1] > 0, "input_ids: no tokens; expected at least one in every prompt")
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device).long()
    good = mask.shape == input_ids.shape and bool(((mask == 0) | (mask == 1)).all())
    require(
        good,
        (
            f"attention_mask: {list(mask.shape)}; expected 0 or 1 for each of "
            f"{list(input_ids.shape)} tokens"
        ),
    )
    empty = [row for row, seen in enumerate(mask.tolist()) if not any(seen)]
    require(
        not empty,
        (
            f"attention_mask: prompt {empty and empty[0]} (from 0) has no tokens; expected at "
            "least one"
        ),
    )
    require(
        bool(mask[:, -1].all()),
        "attention_mask: it leaves out a prompt's last token; expected padding_side='left'",
    )
    left = bool((mask.diff(dim=-1) >= 0).all())
    require(
        left or sliding_window(sat.config) is None,
        "attention_mask: it leaves out tokens inside a prompt, which the sliding window "
        f"of {sat.name} counts; expected padding "
        "on the left alone, and a mask where a prompt holds pad_token_id",
    )
    positions = model_kwargs.get("position_ids")
    counted = mask.cumsum(-1) - 1
    require(
        positions is None or bool(((positions.to(mask.device) == counted) | (mask == 0)).all()),
        "position_ids: expected every prompt to count from 0; leave them out",
    )
    return [ids[seen == 1].tolist() for ids, seen in zip(input_ids, mask, strict=True)]


def _seed(seed: int | None, generator: torch.Generator | None, sample: bool) -> int:
    seed = None if seed is None else whole("seed", seed, "a whole number")
    good = generator is None or isinstance(generator, torch.Generator)
    require(good, f"generator={generator!r}: expected a torch.Generator")
    require(seed is None or generator is None, f"seed={seed}: expected it or a generator, not both")
    if seed is not None or not sample:
        return seed or 0
    return int(
        torch.randint(
            2**63 - 1, (), generator=generator, device=generator.device if generator else "cpu"
        )
    )


def _native(step: Any) -> bool:
    """Tell whether SamplingConfig does exactly what this warper does."""
    if (
        getattr(step, "min_tokens_to_keep", 1) != 1
        or getattr(step, "filter_value", -math.inf) != -math.inf
    ):
        return False
    if type(step) is processors.TemperatureLogitsWarper:
        return 1e-6 <= step.temperature < math.inf
    return type(step) is processors.TopKLogitsWarper or (
        type(step) is processors.TopPLogitsWarper and step.top_p > 0
    )


def _first_native(steps: list[Any]) -> int:
    """Find from where on `steps` are nothing but warpers that SamplingConfig does, in its order."""
    first = len(steps)
    place = len(_NATIVE)
    while first and _native(steps[first - 1]) and _NATIVE.index(type(steps[first - 1])) < place:
        first -= 1
        place = _NATIVE.index(type(steps[first]))
    return first


def _sampling(steps: list[Any], seed: int) -> SamplingConfig:
    """Make the SamplingConfig of those warpers among `steps` that it knows."""
    names = ("temperature", "top_k", "top_p")
    found = {
        name: getattr(step, name)
        for step in steps
        if _native(step)
        for name in names
        if hasattr(step, name)
    }
    return SamplingConfig(**{"temperature": 1.0, **found}, seed=seed)


class _Sequences:
    """The sequences of one call, [B, L] with their padding, and what is done at their tokens.

    Attributes:
        decoder: that generates.
        input_ids: [B, L].
        settings: transformers' generation config.
        seed: of the first sequence.
        own: processors that only a chooser can apply.
        native: processors after them, which SamplingConfig does.
        stop_ids: tokens that end a sequence.
        max_new_tokens: of each sequence.
        criteria: stopping criteria that only a chooser can apply.
        keep_scores: whether the output has scores.
        keep_logits: whether the output has logits.
        pad: the id behind a sequence's end.
        choosers: one a sequence, from `decode` on.
    """

    def __init__(
        self,
        decoder: Decoder,
        input_ids: Tensor,
        steps: list[Any],
        criteria: StoppingCriteriaList,
        settings: Any,
        seed: int,
    ):
        self.decoder = decoder
        self.input_ids = input_ids
        self.settings = settings
        self.seed = seed
        first = _first_native(steps) if settings.do_sample else len(steps)
        self.own = LogitsProcessorList(steps[:first])
        self.native = LogitsProcessorList(steps[first:])
        ends = [
            whole("eos_token_id", token, "token ids, 0 or more", 0)
            for c in criteria
            if type(c) is EosTokenCriteria
            for token in c.eos_token_id.tolist()
        ]
        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        require(
            bool(lengths), "max_new_tokens: nothing ends the output; expected a number of tokens"
        )
        self.stop_ids = tuple(ends)
        self.max_new_tokens = max(1, min(lengths) - input_ids.shape[1])
        self.criteria = StoppingCriteriaList(
            c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)
        )
        in_dict = bool(settings.return_dict_in_generate)
        self.keep_scores = in_dict and bool(settings.output_scores)
        self.keep_logits = in_dict and bool(settings.output_logits)
        pad = settings._pad_token_tensor
        several = len(input_ids) > 1
        require(
            pad is not None or not self.criteria or not several,
            (
                "pad_token_id=None: the sequences may end at different lengths; expected a "
                "token id to pad them with"
            ),
        )
        require(
            bool(ends) or not self.criteria or not several,
            f"{', '.join(type(each).__name__ for each in self.criteria)}: without an "
            "eos_token_id, plain generate goes on with "
            "sequences of a batch that it has ended; expected an eos_token_id too, or a "
            "single sequence",
        )
        self.pad = 0 if pad is None else int(pad)
        self.choosers: list[_Chooser] = []

    def decode(
        self, prompts: list[list[int]], settings: tuple[Any, ...], streamer: Any
    ) -> list[Generation]:
        """Generate for each prompt.

        settings: k, tree, strategy, budget and lookup of a DecodeConfig. Raises InputError where
        these, the prompts and the model do not fit together.
        """
        k, tree, strategy, budget, lookup = settings
        tree = parse_tree(tree) if isinstance(tree, str) else tree
        plain = not (self.own or self.criteria or self.keep_scores or self.keep_logits)
        asked = DecodeConfig(
            k,
            self.max_new_tokens,
            tree,
            SamplingConfig(),
            self.stop_ids,
            (),
            strategy,
            budget,
            lookup,
        )
        config = self.decoder.resolved(asked)
        longest = max(map(len, prompts))
        num = self.settings.num_return_sequences
        check_context(self.decoder.model, longest, config)
        rows = len(prompts)
        _refuse_without_room(self.decoder.model, num, rows, self.max_new_tokens, longest)
        self.choosers = [_Chooser(self, row) for row in range(len(prompts))]
        configs = [replace(config, sampling=chooser.drafting) for chooser in self.choosers]
        on_tokens = None if streamer is None else partial(_stream, streamer)
        choosers = None if plain else self.choosers
        return self.decoder.generate_batch(prompts, configs, on_tokens, rows, choosers)

    def output(self, generations: list[Generation]) -> Tensor | SdsatOutput:
        """Put generations into the form that transformers returns."""
        longest = max(generation.num_new_tokens for generation in generations)
        new = torch.full((len(generations), longest), self.pad, dtype=torch.long)
        for row, generation in enumerate(generations):
            new[row, : generation.num_new_tokens] = torch.tensor(generation.token_ids)
        sequences = torch.cat([self.input_ids, new.to(self.input_ids.device)], dim=1)
        if not self.settings.return_dict_in_generate:
            return sequences
        scores, logits = (
            [getattr(chooser, name) for chooser in self.choosers] for name in ("scores", "logits")
        )
        return SdsatOutput(
            sequences=sequences,
            scores=self._stacked(scores) if self.keep_scores else None,
            logits=self._stacked(logits) if self.keep_logits else None,
            generations=generations,
        )

    def _stacked(self, kept: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """Stack what the sequences kept: for each position, [B, V]."""
        over = torch.full_like(kept[0][0], -math.inf)
        over[:, self.pad] = 0
        count = max(map(len, kept))
        return tuple(
            torch.cat([rows[i] if i < len(rows) else over for rows in kept]) for i in range(count)
        )


class _Chooser:
    """A `decoding.sequence.Chooser` of one sequence.

    It does what transformers' own loop does, in this order: processors, the choice, criteria.
    """

    def __init__(self, all_: _Sequences, row: int):
        self.all = all_
        seed = all_.seed + (row << 32)
        sample = bool(all_.settings.do_sample)
        self.sampling = _sampling(all_.native, seed) if sample else SamplingConfig()
        self.drafting = _sampling([*all_.own, *all_.native], seed) if sample else SamplingConfig()
        prompt = all_.input_ids[row : row + 1]
        self.ids = torch.nn.functional.pad(prompt, (0, all_.max_new_tokens)).to(
            all_.decoder.model.device
        )
        self.length = prompt.shape[1]
        self.num_new = 0
        # The caller's mode, in which processors have made what they keep.
        self.inference = torch.is_inference_mode_enabled()
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor) -> tuple[int, bool]:
        own = self.all.own
        native = self.all.native
        so_far = self.ids[:, : self.length]
        index = torch.full((1,), self.num_new, device=logits.device)
        # Modes are as in plain generate, so that processors may use what they have kept.
        with torch.inference_mode(self.inference), torch.no_grad():
            scores = logits.to(torch.float32, copy=True)[None]
            if self.all.keep_logits:
                self.logits.append(scores.clone())
            if own:
                # Some processors make a number of a SAT's -inf, so it is masked again.
                scores = self.all.decoder.model.legal(own(so_far, scores))
                chosen = (
                    scores.argmax(-1)
                    if self.sampling.greedy
                    else choose(self._drawable(scores), index, self.sampling)[:, 0]
                )
            else:
                engine = self.all.decoder.engine
                chosen = engine.next_tokens(logits[None], index, self.sampling)
            if self.all.keep_scores:
                self.scores.append(filtered(scores, self.sampling) if native else scores)
            self.ids[:, self.length] = chosen
            self.length = self.length + 1
            self.num_new = self.num_new + 1
            scores_so_far = tuple(self.scores) if self.all.keep_scores else None
            ended = bool(self.all.criteria) and bool(
                self.all.criteria(self.ids[:, : self.length], scores_so_far).all()
            )
        return int(chosen), ended

    def _drawable(self, scores: Tensor) -> Tensor:
        """Return the scores [1, V], if a token can be drawn by them.

        Raises InputError otherwise, where plain generate fails, too.
        """
        require(
            bool(scores.max().isfinite()),
            "do_sample=True: after "
            f"{', '.join(type(step).__name__ for step in self.all.own)} no token is left "
            "to draw, or a "
            "score is NaN or infinite; expected other settings, or remove_invalid_values=True",
        )
        return scores


def _stream(streamer: Any, number: int, tokens: list[int], drafted: list[bool]) -> None:
    for token in tokens:
        streamer.put(torch.tensor([token]))
