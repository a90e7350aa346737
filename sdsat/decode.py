"""Draft-then-verify decoding (SDSAT, arXiv 2403.18647, section 3.2): AR, greedy and nucleus, two-step and one-pass by one loop.

State: a cache over all emitted tokens but the last one, x, and the tree of drafts below x, if the pass before had SATs where its
walk ended. One pass:

    x, drafts kept by the plan, SATs where the plan wants them   (planner.py)

gives the model's own next token at x and at every draft. Walk from x while a draft is that token; the token at which the walk
stops is the next x, and the SATs at that place draft what comes after it. A pass emits 1 + accepted tokens. The paper's two-step
loop is the plan that alternates between [x, SATs] and [x, drafts]; AR is the plan without SATs. Where the plan wants it, a pass
in 8 bits over [x, SATs] drafts first (draft.py). Every token is the model's own choice given true tokens only, so the output
equals AR's: at temperature 0 and, because the noise belongs to the emitted position (sampling.py), for any seed; to the last bit
of a logit in half precision too where the engine keeps its promise (engine.py).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .cache import SlotCache
from .config import MAX_ROWS, DecodeConfig, SamplingConfig, require
from .draft import Drafts, draft_tokens
from .engine import forward, new_cache, prefill, probe_rows, top
from .lookup import Lookup
from .model import SatModel
from .native import NativeCache
from .planner import make_planner
from .sampling import choose
from .tree import DraftTree, make_tree

OnTokens = Callable[[list[int], list[bool]], None]
LOOKED_UP = 0.6  # how likely a looked-up token is taken to be before anything is known


@dataclass
class Generation:
    """What one `generate` call produced and what it cost.

    token_ids: emitted tokens, a stop id included. text: decoded without special tokens, cut before a stop string.
    finish: 'stop_id', 'stop_string' or 'length'. num_passes: forward passes after the prefill's one; num_plain_passes: those of
    them with neither drafts nor SATs. accepted_lengths: accepted drafts of each pass that verified any, 0..depth.
    proposed_by_depth, accepted_by_depth: [depth] counts; drafts beyond the end of the output are not counted.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "length"
    num_passes: int = 0
    num_plain_passes: int = 0
    num_rounded_passes: int = 0
    accepted_lengths: list[int] = field(default_factory=list)
    proposed_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def num_new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of prefill and decoding together."""
        return self.num_new_tokens / self.seconds

    @property
    def tokens_per_pass(self) -> float:
        return self.num_new_tokens / self.num_passes

    @property
    def acceptance_rate(self) -> float:
        """Accepted / proposed drafts; 0 where nothing was proposed. A depth of a tree counts once, however wide."""
        return sum(self.accepted_by_depth) / max(1, sum(self.proposed_by_depth))

    @property
    def accepted_per_loop(self) -> float:
        return sum(self.accepted_lengths) / max(1, len(self.accepted_lengths))

    def count(self, depth: int, accepted: int, kept: int | None) -> None:
        """Enter one pass's drafts, down to `depth`; kept: how many of its tokens come before the output's end, None for all."""
        proposed = depth if kept is None else min(depth, kept)
        accepted = min(accepted, proposed)
        self.accepted_lengths.append(accepted)
        for i in range(proposed):
            self.proposed_by_depth[i] += 1
            self.accepted_by_depth[i] += i < accepted


@lru_cache(maxsize=256)
def _truncated(spec: str | tuple[int, ...], k: int, depth: int) -> DraftTree:
    return make_tree(spec, k).truncated(depth)


def num_slots(prompt_length: int, max_new_tokens: int) -> int:
    """The cache length of a generation: the same for AR and every k and tree, because attention rounds by length."""
    return -(-(prompt_length + max_new_tokens + MAX_ROWS + 16) // 64) * 64


@torch.inference_mode()
def next_logits(model: SatModel, token_ids: list[int], prompt_length: int, config: DecodeConfig) -> Tensor:
    """[V] logits that AR sees after `token_ids`, whose first `prompt_length` are the prompt: teacher forcing, bit for bit."""
    cache = new_cache(model, num_slots(prompt_length, config.max_new_tokens))
    tokens = torch.tensor(token_ids, device=model.device)
    prefill(model, cache, tokens[: prompt_length - 1])
    for token in tokens[prompt_length - 1 :].split(1):
        _, logits = forward(model, cache, token, make_tree("chain", 0))
        cache.commit((0,))
    return logits[0]


def _check(model: SatModel, prompt_ids: list[int], config: DecodeConfig) -> None:
    require(len(prompt_ids) > 0, "prompt: no tokens; expected at least one")
    needed = len(prompt_ids) + config.max_new_tokens
    require(
        needed <= model.max_context,
        f"max_new_tokens={config.max_new_tokens}: with a prompt of {len(prompt_ids)} tokens the context would reach {needed}, "
        f"but model {model.name} takes {model.max_context}",
    )
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    strange = next((token for token in prompt_ids if not 0 <= token < vocabulary), None)
    require(strange is None, f"prompt: token id {strange} is not in the model's vocabulary of {vocabulary}")
    require(model.tokenizer is not None or not config.stop_strings, "stop_strings: the model came without a tokenizer")
    if config.k:
        require(
            model.sat is not None,
            f"k={config.k}: model {model.name} has no SAT to draft with; expected k=0, or an adapter",
        )
        if model.sat and config.k > model.sat.k:
            warnings.warn(f"k={config.k} is beyond the depth k={model.sat.k} that {model.name} was trained for", stacklevel=3)
        require(
            config.strategy != "rounded" or model.native is not None,
            f"strategy=rounded: {model.name} runs through transformers' modules here, which have no 8 bits; expected another",
        )
        width = make_tree(config.tree, config.k).width
        require(width < vocabulary, f"tree={config.tree}: {width} candidates, but the vocabulary has {vocabulary} tokens")


def next_tokens(model: SatModel, logits: Tensor, index: Tensor, sampling: SamplingConfig) -> Tensor:
    """[N] the model's own next token for logits [N, V] at emitted indices [N]."""
    count = 1 if sampling.greedy else min(sampling.top_k, logits.shape[-1])
    if not count:
        return choose(logits, index, sampling)[:, 0]
    values, ids = top(model, logits, count)
    return ids[:, 0] if sampling.greedy else choose(values, index, sampling, ids=ids)[:, 0]


@torch.inference_mode()
def generate(model: SatModel, prompt_ids: list[int], config: DecodeConfig, on_tokens: OnTokens | None = None) -> Generation:
    """Continue `prompt_ids`. The output is the same for every strategy, k and tree.

    on_tokens: called after each pass with the new tokens and, for each, whether it was an accepted draft.
    Raises InputError where the prompt, the settings and the model do not fit together.
    """
    _check(model, prompt_ids, config)
    probe_rows(model)
    planner, device = make_planner(model, config), model.device
    if config.may_round:
        _ = model.rounded  # is made now, before seconds count
    sat_id = model.sat.token_id if model.sat else 0
    out = Generation(proposed_by_depth=[0] * config.depth, accepted_by_depth=[0] * config.depth)
    began = time.perf_counter()
    cache = new_cache(model, num_slots(len(prompt_ids), config.max_new_tokens))
    prompt = torch.tensor(prompt_ids, device=device)
    prefill(model, cache, prompt[:-1])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    prefilled = time.perf_counter()
    lookup = Lookup(prompt_ids, config.num_lookup) if config.num_lookup else None
    x, drafted, finish = prompt_ids[-1], None, ""
    while not finish:
        emitted, started = len(out.token_ids), time.perf_counter()
        left, context, found = config.max_new_tokens - emitted, len(prompt_ids) + emitted, lookup.drafts() if lookup else []
        drafts = (drafted or Drafts.none(x)).with_chain(found, LOOKED_UP)
        if size := planner.draft_first(drafts, left, context):
            drafts = _rounded_drafts(model, cache, x, size, config, emitted).with_chain(found, LOOKED_UP)
            out.num_passes, out.num_rounded_passes = out.num_passes + 1, out.num_rounded_passes + 1
            planner.observe_drafting(size, context, time.perf_counter() - started)
            started = time.perf_counter()
        plan = planner.plan(drafts, left, context)
        drafts, tree = drafts.kept(plan.nodes), drafts.tree.kept(plan.nodes)
        sats = [sat_id] * sum(size for _, size in plan.groups)
        states, logits = forward(model, cache, torch.tensor(drafts.tokens + sats, device=device), tree, plan.groups)
        nodes, depths = len(tree), tree.depths
        targets = next_tokens(model, logits[:nodes], emitted + torch.tensor(depths, device=device), config.sampling)
        below = _drafts_below(model, config, tree, plan.groups, targets, states[nodes:], logits[nodes:], emitted)
        values = torch.cat([targets.double(), *(found.flatten() for _, found in below.values())]).tolist()  # the one host read
        target_ids = [int(value) for value in values[:nodes]]
        path = tree.walk(drafts.tokens, target_ids)
        cache.commit(tuple(path))
        x, drafted = target_ids[path[-1]], _drafts_at(path[-1], below, values[nodes:])
        planner.observe(drafts, plan, path, context, time.perf_counter() - started)
        out.num_passes += 1
        out.num_plain_passes += nodes == 1 and not sats
        block = [drafts.tokens[node] for node in path[1:]] + [x]
        kept, finish = _cut(model, prompt_ids[-1], out.token_ids, block, config)
        if nodes > 1:
            out.count(max(depths), len(path) - 1, kept if finish else None)
        block = block[:kept]
        out.token_ids += block
        if lookup:
            lookup.add(block)
        if on_tokens is not None:
            on_tokens(block, [i < len(path) - 1 for i in range(len(block))])
    out.finish = finish
    out.prefill_seconds, out.decode_seconds = prefilled - began, time.perf_counter() - prefilled
    out.text = _text(model, prompt_ids[-1], out, config)
    return out


def _rounded_drafts(
    model: SatModel, cache: SlotCache | NativeCache, x: int, size: int, config: DecodeConfig, emitted: int
) -> Drafts:
    """Drafts by a pass in 8 bits over x and `size` SATs; it leaves nothing in the cache."""
    assert model.sat is not None
    tokens, tree, groups = torch.tensor([x, *[model.sat.token_id] * size]), make_tree("chain", 0), ((0, size),)
    states, logits = forward(model, cache, tokens, tree, groups, rounded=True)
    first = next_tokens(model, logits[:1], torch.tensor([emitted]), config.sampling)
    shape, values = _drafts_below(model, config, tree, groups, first, states[1:], logits[1:], emitted)[0]
    return Drafts.of_rounded(x, shape, values.flatten().tolist())


def _drafts_below(
    model: SatModel,
    config: DecodeConfig,
    tree: DraftTree,
    groups: tuple[tuple[int, int], ...],
    targets: Tensor,
    states: Tensor,
    logits: Tensor,
    emitted: int,
) -> dict[int, tuple[DraftTree, Tensor]]:
    """{node: (tree, `draft_tokens`)}: what the SATs at a node draft after the token that follows there, for every group.

    targets [N]: the model's own next token at every node; states [M, D], logits [M, V]: of all SATs of the pass, group by group.
    """
    below, first = {}, 0
    for node, size in groups:
        shape, part = _truncated(config.tree, config.k, size), slice(first, first + size)
        index = emitted + tree.depths[node] + 1
        x = targets[node : node + 1]
        below[node] = shape, draft_tokens(model, x, states[part], logits[part], index, shape, config.sampling)
        first += size
    return below


def _drafts_at(end: int, below: dict[int, tuple[DraftTree, Tensor]], values: list[float]) -> Drafts | None:
    """The drafts below the node where the walk ended, out of the values of all groups; None where it had no SATs."""
    first = 0
    for node, (shape, found) in below.items():
        if node == end:
            return Drafts.of_sats(shape, values[first : first + found.numel()])
        first += found.numel()
    return None


def text_after(tokenizer: Any, before: int, tokens: list[int], skip_special: bool = True) -> str:
    """The text of `tokens` after the token `before`: alone, many tokenizers would drop a space at its beginning."""
    decode = partial(tokenizer.decode, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
    return decode([before, *tokens])[len(decode([before])) :]


def _cut(model: SatModel, before: int, emitted: list[int], block: list[int], config: DecodeConfig) -> tuple[int, str]:
    """Where the output ends inside `block`: (number of its tokens to keep, why), or (all, '') to go on.

    before: the prompt's last token.
    """
    stop_id = next((i for i, token in enumerate(block) if token in config.stop_ids), None)
    kept = len(block) if stop_id is None else stop_id + 1
    if config.stop_strings and _has_stop(model, before, emitted + block[:kept], config):
        first = next(n for n in range(1, kept + 1) if _has_stop(model, before, emitted + block[:n], config))
        if stop_id is None or first < kept:
            return first, "stop_string"
    if stop_id is not None:
        return kept, "stop_id"
    return kept, "length" if len(emitted) + kept == config.max_new_tokens else ""


def _has_stop(model: SatModel, before: int, tokens: list[int], config: DecodeConfig) -> bool:
    text = text_after(model.tokenizer, before, tokens, skip_special=False)
    return any(stop in text for stop in config.stop_strings)


def _text(model: SatModel, before: int, out: Generation, config: DecodeConfig) -> str:
    text = text_after(model.tokenizer, before, out.token_ids) if model.tokenizer else ""
    return text[: min((text.find(stop) for stop in config.stop_strings if stop in text), default=len(text))]
