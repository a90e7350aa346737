"""Draft-then-verify decoding (SDSAT, arXiv 2403.18647, section 3.2): AR, greedy and nucleus,
two-step and one-pass by one loop.

State: a cache over all emitted tokens but the last one, x, and the tree of drafts below x, if the
pass before had SATs where its walk ended. One pass:

    x, drafts kept by the plan, SATs where the plan wants them   (planner.py)

gives the model's own next token at x and at every draft. Walk from x while a draft is that token;
the token at which the walk stops is the next x, and the SATs at that place draft what comes after
it. A pass emits 1 + accepted tokens. The paper's two-step loop is the plan that alternates between
[x, SATs] and [x, drafts]; AR is the plan without SATs. Where the plan wants it, a pass in 8 bits
over [x, SATs] drafts first (draft.py). Every token is the model's own choice given true tokens
only, so the output equals AR's: at temperature 0 and, because the noise belongs to the emitted
position (sampling.py), for any seed; to the last bit of a logit in half precision too where the
engine keeps its promise (engine.py).
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor

from sdsat.config import (
    LOOKUP,
    MAX_ROWS,
    MAX_TRAINED_K,
    NUM_LOOKUP,
    DecodeConfig,
    InputError,
    SamplingConfig,
    require,
)
from sdsat.decoding.auto_planner import Planner, make_planner
from sdsat.decoding.sequence import Chooser, Generation, OnBatchTokens, OnTokens, _Sequence
from sdsat.decoding.stopping import _cut, _text
from sdsat.engines.base import Part
from sdsat.engines.drafting import draft_tokens
from sdsat.engines.transformers import (
    Room,
    check_finite,
    forward,
    forward_batch,
    new_cache,
    prefill,
    probe_rows,
    top,
)
from sdsat.method.drafts import Drafts
from sdsat.method.lookup import Lookup
from sdsat.method.sampling import as_seed, choose
from sdsat.method.tree import DraftTree, make_tree
from sdsat.models.loading import SatModel


@lru_cache(maxsize=256)
def _truncated(spec: str | tuple[int, ...], k: int, depth: int) -> DraftTree:
    return make_tree(spec, k).truncated(depth)


def num_slots(prompt_length: int, max_new_tokens: int) -> int:
    """The cache length of a generation: the same for AR and every k and tree, because attention
    rounds by length.
    """
    return -(-(prompt_length + max_new_tokens + MAX_ROWS + 16) // 64) * 64


@torch.inference_mode()
def next_logits(
    model: SatModel, token_ids: list[int], prompt_length: int, config: DecodeConfig
) -> Tensor:
    """[V] logits that AR sees after `token_ids`, whose first `prompt_length` are the prompt:
    teacher forcing, bit for bit.
    """
    model.renew()
    cache = new_cache(model, num_slots(prompt_length, config.max_new_tokens))
    tokens = torch.tensor(token_ids, device=model.device)
    prefill(model, cache, tokens[: prompt_length - 1])
    for token in tokens[prompt_length - 1 :].split(1):
        _, logits = forward(model, cache, token, make_tree("chain", 0))
        cache.commit((0,))
    return logits[0]


def resolved(model: SatModel, config: DecodeConfig) -> DecodeConfig:
    """The settings with all that they leave open chosen for this model: the one place where that is
    done.

    k None: what the SATs were trained for. lookup None: NUM_LOOKUP for 'lookup' and, with SATs,
    'auto'; else none, so that AR has nothing but the model's own tokens. tree 'auto': 2,2,1 for
    strategy 'auto' on the native engine, where trees have AR's bits (engine.py) and it verifies of
    them what pays; else a chain. Settings that are resolved stay as they are. Raises InputError
    where SATs are wanted of a model that has none.
    """
    k = config.k
    lookup = config.lookup
    tree = config.tree
    if k is None and config.strategy == LOOKUP:
        k = 0
    if k is None or k > 0:
        wanted = f"strategy={config.strategy}" if k is None else f"k={k}"
        instead = f"an adapter (`sdsat train` makes one), strategy={LOOKUP}, or k=0, plain decoding"
        require(
            model.sat is not None,
            f"{wanted}: model {model.name} has no SATs to draft with; expected {instead}",
        )
        assert model.sat is not None
        k = model.sat.k if k is None else k
    if lookup is None:
        lookup = NUM_LOOKUP if config.strategy == LOOKUP or (config.strategy == "auto" and k) else 0
    if tree == "auto":
        wide = config.strategy == "auto" and model.native is not None and 0 < k <= MAX_TRAINED_K
        tree = (2, 2, 1) if wide else "chain"
    return replace(config, k=k, lookup=lookup, tree=tree)


def check_context(model: SatModel, prompt_length: int, config: DecodeConfig) -> None:
    """Raise InputError where the model lacks positions for the prompt and what may follow."""
    needed = prompt_length + config.max_new_tokens
    require(
        needed <= model.max_context,
        f"max_new_tokens={config.max_new_tokens}: with a prompt of {prompt_length} tokens "
        f"the context would reach {needed}, "
        f"but model {model.name} takes {model.max_context}",
    )


def _checked(model: SatModel, prompt_ids: list[int], config: DecodeConfig) -> DecodeConfig:
    """The settings, resolved, if they fit the prompt and the model."""
    require(len(prompt_ids) > 0, "prompt: no tokens; expected at least one")
    check_context(model, len(prompt_ids), config)
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    strange = next((token for token in prompt_ids if not 0 <= token < vocabulary), None)
    require(
        strange is None,
        f"prompt: token id {strange} is not in the model's vocabulary of {vocabulary}",
    )
    require(
        model.tokenizer is not None or not config.stop_strings,
        "stop_strings: the model came without a tokenizer",
    )
    config = resolved(model, config)
    if config.num_sats:
        if model.sat and config.num_sats > model.sat.k:
            warnings.warn(
                (
                    f"k={config.k} is beyond the depth k={model.sat.k} that {model.name} was "
                    "trained for"
                ),
                stacklevel=3,
            )
        require(
            config.strategy in model.strategies,
            (
                f"strategy=rounded: {model.name} runs through transformers' modules here, "
                "which have no 8 bits; expected another"
            ),
        )
        width = make_tree(config.tree, config.num_sats).width
        require(
            width < vocabulary,
            f"tree={config.tree}: {width} candidates, but the vocabulary has {vocabulary} tokens",
        )
    return config


def next_tokens(
    model: SatModel,
    logits: Tensor,
    index: Tensor,
    sampling: SamplingConfig,
    seeds: Tensor | None = None,
) -> Tensor:
    """[N] the model's own next token for logits [N, V] at emitted indices [N].

    seeds: [N] in place of the sampling's one.
    """
    if sampling.greedy:
        return top(model, logits, 1)[1][:, 0]
    if model.native:
        return model.native.choose(logits, index, sampling, seeds)
    return choose(logits, index, sampling, seeds=seeds)[:, 0]


def choose_along(
    chooser: Chooser, tree: DraftTree, tokens: list[int], logits: Tensor, stop_ids: tuple[int, ...]
) -> tuple[Tensor, bool]:
    """What `chooser` says at the nodes that the walk visits: ([N] its tokens, -1 at the others;
    whether it ended the output).

    It is asked once for each emitted position, in order, as in AR: so it may keep state, and
    nothing is asked behind the end. Where a draft is the last token, the walk ends at that draft,
    and nothing follows it: -1. logits [N, V]: of the tree's nodes, which hold `tokens`; the tree is
    no deeper than what is still to come.
    """
    children = tree.children()
    node = 0
    targets = torch.full((len(tree),), -1, dtype=torch.long)
    while True:
        token, ended = chooser(logits[node])
        targets[node] = token
        follows = [child for child in children[node] if tokens[child] == token]
        if ended or token in stop_ids or not follows:
            return targets.to(logits.device), ended
        node = follows[0]


def generate(
    model: SatModel,
    prompt_ids: list[int],
    config: DecodeConfig,
    on_tokens: OnTokens | None = None,
    chooser: Chooser | None = None,
) -> Generation:
    """Continue `prompt_ids`. The output is the same for every strategy, k and tree.

    on_tokens: called after each pass with the new tokens and, for each, whether it was an accepted
    draft.
    chooser: (logits [V] after all tokens so far) -> (the next token, whether the output ends with
    it), see `choose_along`. It then chooses instead of config.sampling, which only drafts go by.
    Raises InputError where the prompt, the settings and the model do not fit together.
    """
    model.renew()
    config = _checked(model, prompt_ids, config)
    report = None if on_tokens is None else lambda _, tokens, drafted: on_tokens(tokens, drafted)
    return next(_decode(model, [prompt_ids], [config], 1, report, [chooser]))[1]


def generate_batch(
    model: SatModel,
    prompts: Sequence[list[int]],
    configs: DecodeConfig | Sequence[DecodeConfig],
    on_tokens: OnBatchTokens | None = None,
    batch_size: int = 32,
    choosers: Sequence[Chooser | None] | None = None,
) -> list[Generation]:
    """Continue every prompt, up to `batch_size` of them in each pass; results in the order of the
    prompts.

    A prompt that waits enters when another one's output ends. Each output is the one that
    `generate` gives for that prompt alone: bit for bit on the native engine, in float32 anywhere.
    configs: one for all or one a prompt; all settings may differ.
    on_tokens: as of `generate`, with the prompt's index before; choosers: as of `generate`, one a
    prompt. Seconds in the results are those of all live sequences at once. Raises InputError,
    naming the index, where a prompt, its settings and the model do not fit together.
    """
    outs = iterate_batch(model, prompts, configs, on_tokens, batch_size, choosers)
    return [out for _, out in sorted(outs, key=lambda item: item[0])]


def iterate_batch(
    model: SatModel,
    prompts: Sequence[list[int]],
    configs: DecodeConfig | Sequence[DecodeConfig],
    on_tokens: OnBatchTokens | None = None,
    batch_size: int = 32,
    choosers: Sequence[Chooser | None] | None = None,
) -> Iterator[tuple[int, Generation]]:
    """The same as (index of the prompt, its result) in the order in which outputs end; bad input is
    refused at once.
    """
    model.renew()
    require(batch_size >= 1, f"batch_size={batch_size}: expected 1 or more")
    configs = [configs] * len(prompts) if isinstance(configs, DecodeConfig) else list(configs)
    require(
        len(configs) == len(prompts),
        f"configs: {len(configs)} for {len(prompts)} prompts; expected one, or one a prompt",
    )
    for number, (prompt_ids, config) in enumerate(zip(prompts, configs, strict=True)):
        try:
            configs[number] = _checked(model, prompt_ids, config)
        except InputError as error:
            raise InputError(f"prompts[{number}]: {error}") from None
    return _decode(
        model, prompts, configs, batch_size, on_tokens, choosers or [None] * len(prompts)
    )


@torch.inference_mode()
def _decode(
    model: SatModel,
    prompts: Sequence[list[int]],
    configs: Sequence[DecodeConfig],
    size: int,
    on_tokens: OnBatchTokens | None,
    choosers: Sequence[Chooser | None],
) -> Iterator[tuple[int, Generation]]:
    """The loop.

    Up to `size` sequences are live; each pass carries what their plans want of all of them.

    Other threads' passes of the model come between these, never beside them; while the caller has
    what a pass made, the model is free.
    """
    with model.lock.held():
        probe_rows(model)
        planners = [make_planner(model, config) for config in configs]
        if any(config.may_round for config in configs):
            _ = model.rounded  # is made now, before seconds count
    slots = [
        num_slots(len(ids), config.max_new_tokens)
        for ids, config in zip(prompts, configs, strict=True)
    ]
    size = max(1, min(size, len(prompts)))
    room = Room(model, size, max(slots, default=0))
    waiting = deque(range(len(prompts)))
    live = list[_Sequence]()
    while waiting or live:
        free = size - len(live)
        with model.lock.held():
            # several prompts are read in one pass where that can be
            if waiting and 16 * free >= size:
                numbers = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                live += _enter(model, room, numbers, prompts, configs, planners, slots, choosers)
            _draft_first(model, live)
            emitted = _step(model, live)
        if on_tokens is not None:
            for event in emitted:
                on_tokens(*event)
        for sequence in [sequence for sequence in live if sequence.out.finish]:
            live.remove(sequence)
            room.leave(sequence.cache)
            yield sequence.number, sequence.out


def _enter(
    model: SatModel,
    room: Room,
    numbers: list[int],
    prompts: Sequence[list[int]],
    configs: Sequence[DecodeConfig],
    planners: list[Planner],
    slots: list[int],
    choosers: Sequence[Chooser | None],
) -> list[_Sequence]:
    """Sequences of these prompts, prefilled."""
    began = time.perf_counter()
    device = model.device
    caches = room.enter([prompts[n] for n in numbers], [slots[n] for n in numbers])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    prefilled = time.perf_counter()
    entered = []
    for n, cache in zip(numbers, caches, strict=True):
        config = configs[n]
        ids = prompts[n]
        out = Generation(
            finish="", proposed_by_depth=[0] * config.depth, accepted_by_depth=[0] * config.depth
        )
        out.prefill_seconds = prefilled - began
        lookup = Lookup(ids, config.num_lookup) if config.num_lookup else None
        drafts = Drafts.none(ids[-1])
        chooser = choosers[n]
        entered.append(
            _Sequence(
                n, ids, config, planners[n], cache, out, prefilled, lookup, ids[-1], drafts, chooser
            )
        )
    return entered


def _draft_first(model: SatModel, live: list[_Sequence]) -> None:
    """What the sequences' drafts are before the coming pass: those they have, looked-up ones, and,
    for sequences that want them before this pass, those of one pass in 8 bits over x and SATs of
    each. That leaves nothing in the caches.
    """
    began = time.perf_counter()
    wanting = list[tuple[_Sequence, Part]]()
    for sequence in live:
        sequence.planner.share(len(live), sequence.context)
        sequence.drafts = sequence.with_lookup(sequence.drafts)
        if count := sequence.planner.draft_first(sequence.drafts, sequence.left, sequence.context):
            wanting.append(
                (sequence, Part(sequence.cache, [sequence.x], make_tree("chain", 0), ((0, count),)))
            )
    if not wanting:
        return
    drafted = [sequence for sequence, _ in wanting]
    *_, values = _run(model, drafted, [part for _, part in wanting], rounded=True)
    for sequence, below in zip(drafted, values, strict=True):
        sequence.drafts = sequence.with_lookup(Drafts.of_rounded(sequence.x, *below[0]))
        sequence.out.num_passes += 1
        sequence.out.num_rounded_passes += 1
    sats = sum(1 + part.sats for _, part in wanting) - 1
    for planner in {id(sequence.planner): sequence.planner for sequence in drafted}.values():
        planner.observe_drafting(sats, _mean_context(drafted), time.perf_counter() - began)


def _mean_context(sequences: list[_Sequence]) -> int:
    return sum(sequence.context for sequence in sequences) // len(sequences)


def _step(model: SatModel, live: list[_Sequence]) -> list[tuple[int, list[int], list[bool]]]:
    """One pass: verify the drafts that the plans keep, draft where they want SATs, and emit.

    Returns what `on_tokens` is told.
    """
    began = time.perf_counter()
    context = _mean_context(live)
    parts = list[Part]()
    for sequence in live:
        plan = sequence.plan = sequence.planner.plan(
            sequence.drafts, sequence.left, sequence.context
        )
        drafts = sequence.drafts = sequence.drafts.kept(plan.nodes)
        parts.append(Part(sequence.cache, drafts.tokens, drafts.tree, plan.groups))
    targets, paths, drafted = _run(model, live, parts)
    for sequence, path in zip(live, paths, strict=True):
        sequence.cache.commit(tuple(path))
        sequence.planner.observe(sequence.drafts, sequence.plan, path)
    rows = sum(len(p.tokens) + p.sats for p in parts)
    sats = sum(p.sats for p in parts)
    seconds = time.perf_counter() - began
    for planner in {id(sequence.planner): sequence.planner for sequence in live}.values():
        planner.observe_pass(rows, sats, context, seconds)
    every = zip(live, paths, targets, drafted, strict=True)
    return [
        (sequence.number, *_emit(model, sequence, path, own, below))
        for sequence, path, own, below in every
    ]


def _emit(
    model: SatModel,
    sequence: _Sequence,
    path: list[int],
    targets: list[int],
    below: dict[int, tuple[DraftTree, list[float]]],
) -> tuple[list[int], list[bool]]:
    """Enter a pass into the output: the walked path's drafts and the token after them, as far as
    the output goes on.

    Returns them, and for each whether it was an accepted draft.
    """
    out = sequence.out
    config = sequence.config
    drafts = sequence.drafts
    end = path[-1]
    x = sequence.x = targets[end]
    out.num_passes += 1
    out.num_plain_passes += len(drafts.tokens) == 1 and not sequence.plan.groups
    block = [drafts.tokens[node] for node in path[1:]] + [x] * (x >= 0)
    kept, out.finish = _cut(model, sequence.prompt_ids[-1], out.token_ids, block, config)
    if sequence.ended and out.finish != "stop_id":
        out.finish = "chooser"
    if len(drafts.tokens) > 1:
        out.count(max(drafts.tree.depths), len(path) - 1, kept if out.finish else None)
    block = block[:kept]
    out.token_ids += block
    sequence.drafts = (
        Drafts.of_sats(*below[end], sequence.plan.kind(end)) if end in below else Drafts.none(x)
    )
    if sequence.lookup:
        sequence.lookup.add(block)
    if out.finish:
        out.decode_seconds = time.perf_counter() - sequence.prefilled
        out.text = _text(model, sequence.prompt_ids[-1], out, config)
    return block, [i < len(path) - 1 for i in range(len(block))]


def _run(
    model: SatModel, sequences: list[_Sequence], parts: list[Part], rounded: bool = False
) -> tuple[list[list[int]], list[list[int]], list[dict[int, tuple[DraftTree, list[float]]]]]:
    """A pass.

    For each sequence: the model's own next token at every node, the walk's path, and what SATs
    draft after the token that follows at their node, {node: (tree, `draft_tokens`, flat)}.
    """
    states, logits = forward_batch(model, parts, rounded)
    free = _reads_freely(logits)
    chooses = not rounded and sequences[0].chooser is not None
    largest = logits.max()
    if free or chooses:  # a chooser reads logits anyway
        check_finite(model, float(largest))
    nodes = sum(len(part.tokens) for part in parts)
    index = torch.tensor(
        [
            s.emitted + depth
            for s, part in zip(sequences, parts, strict=True)
            for depth in part.tree.depths
        ]
    )
    if chooses:
        targets = torch.cat(_ask(sequences, parts, logits[:nodes]))
    else:
        targets = _targets(model, sequences, parts, logits[:nodes], index.to(logits.device))
    own, paths = _walked(iter(targets.tolist()), parts) if free else ([], [])
    ends = [path[-1] for path in paths] if free else [None] * len(parts)
    first = nodes
    node = 0
    below = []
    for sequence, part, end in zip(sequences, parts, ends, strict=True):
        groups: dict[int, tuple[DraftTree, Tensor]] = {}
        if part.groups:
            rows = slice(first, first + part.sats)
            # off the walk SATs draft for nobody
            after = targets[node : node + len(part.tokens)].clamp_min(0)
            groups = _drafts_below(
                model,
                sequence.config,
                part,
                after,
                states[rows],
                logits[rows],
                sequence.emitted,
                end,
            )
        below.append(groups)
        first = first + part.sats
        node = node + len(part.tokens)
    every = [] if free else [largest.double()[None], targets.double()]
    every += [found.flatten() for groups in below for _, found in groups.values()]
    read = iter(torch.cat(every).tolist() if every else [])  # the one host read, but for a free one
    if not free:
        check_finite(model, next(read))
        own, paths = _walked(read, parts)
    drafted = [
        {at: (shape, list(islice(read, found.numel()))) for at, (shape, found) in groups.items()}
        for groups in below
    ]
    return own, paths, drafted


def _reads_freely(tensor: Tensor) -> bool:
    """Whether the host may read it without waiting for anything."""
    return tensor.device.type == "cpu"


def _walked(values: Iterator[float], parts: list[Part]) -> tuple[list[list[int]], list[list[int]]]:
    """The next values as the model's own tokens, one for every node of every part; and the path
    that each part's walk takes.
    """
    own = [[int(value) for value in islice(values, len(part.tokens))] for part in parts]
    return own, [
        part.tree.walk(part.tokens, targets) for part, targets in zip(parts, own, strict=True)
    ]


def _targets(
    model: SatModel, sequences: list[_Sequence], parts: list[Part], logits: Tensor, index: Tensor
) -> Tensor:
    """[N] `next_tokens` of all nodes, each by its own sequence's sampling: one call for those that
    differ in the seed alone.
    """
    first = sequences[0].config.sampling
    if all(sequence.config.sampling == first for sequence in sequences):
        return next_tokens(model, logits, index, first)
    kinds: dict[SamplingConfig, tuple[list[int], list[int]]] = {}
    row = 0
    for sequence, part in zip(sequences, parts, strict=True):
        sampling = sequence.config.sampling
        count = len(part.tokens)
        rows, seeds = kinds.setdefault(replace(sampling, seed=0), ([], []))
        rows += range(row, row + count)
        seeds += [as_seed(sampling.seed)] * count
        row += count
    out = torch.empty_like(index)
    for sampling, (rows, seeds) in kinds.items():
        some = torch.tensor(rows, device=index.device)
        out[some] = next_tokens(
            model, logits[some], index[some], sampling, torch.tensor(seeds, device=index.device)
        )
    return out


def _ask(sequences: list[_Sequence], parts: list[Part], logits: Tensor) -> list[Tensor]:
    """The same, [N_i] a sequence, by the sequences' choosers: all have one, or none."""
    targets = []
    row = 0
    for sequence, part in zip(sequences, parts, strict=True):
        rows = logits[row : row + len(part.tokens)]
        assert sequence.chooser is not None
        chosen, sequence.ended = choose_along(
            sequence.chooser, part.tree, part.tokens, rows, sequence.config.stop_ids
        )
        targets.append(chosen)
        row += len(part.tokens)
    return targets


def _drafts_below(
    model: SatModel,
    config: DecodeConfig,
    part: Part,
    targets: Tensor,
    states: Tensor,
    logits: Tensor,
    emitted: int,
    end: int | None,
) -> dict[int, tuple[DraftTree, Tensor]]:
    """{node: (tree, `draft_tokens`)}: what the SATs at a node draft after the token that follows
    there.

    targets [N]: the model's own next token at every node; states [M, D], logits [M, V]: of the
    part's SATs, group by group.
    end: the node where the walk ends, whose group alone is wanted; None: it isn't known, and every
    group drafts.
    """
    below = {}
    first = 0
    for node, size in part.groups:
        if end in (None, node):
            shape = _truncated(config.tree, config.num_sats, size)
            rows = slice(first, first + size)
            index = emitted + part.tree.depths[node] + 1
            x = targets[node : node + 1]
            below[node] = (
                shape,
                draft_tokens(model, x, states[rows], logits[rows], index, shape, config.sampling),
            )
        first += size
    return below
