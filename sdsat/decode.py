"""Draft-then-verify decoding (SDSAT, arXiv 2403.18647, section 3.2): AR, greedy and nucleus by one loop.

State: a cache over all emitted tokens but the last one, x. One loop is two passes:

    draft step    [x, SAT, SAT, SAT]       -> y0, a true token, and candidates for the next k tokens
    verify step   [y0, candidates ...]     -> the model's own next token at every tree node; walk while they agree

and emits 2 + accepted tokens. AR is the same loop with k = 0: a draft step without SATs, which emits y0. Every token is
the model's own choice given true tokens only, so the output equals AR's: at temperature 0 and, because the noise
belongs to the emitted position (sampling.py), for any seed.

Passes are shape-stable so that this also holds to the last bit of a logit in half precision: the cache length depends on
the prompt and max_new_tokens alone, and rows are padded as `RowPolicy` says.
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

from .cache import SlotCache, pass_mask
from .config import DecodeConfig, require
from .head import draft_tokens
from .model import RowPolicy, SatModel
from .sampling import choose
from .tree import MAX_NODES, DraftTree, make_tree

OnTokens = Callable[[list[int], list[bool]], None]
_POLICIES = (RowPolicy(1, 1), RowPolicy(2, 1), RowPolicy(4, 1), RowPolicy(4, 4), RowPolicy(8, 8), RowPolicy(16, 16))


@dataclass
class Generation:
    """What one `generate` call produced and what it cost.

    token_ids: emitted tokens, a stop id included. text: decoded without special tokens, cut before a stop string.
    finish: 'stop_id', 'stop_string' or 'length'. num_passes: forward passes after the prefill's one.
    accepted_lengths: accepted drafts of each draft-then-verify loop, 0..k.
    proposed_by_depth, accepted_by_depth: [k] counts; drafts beyond the end of the output are not counted.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "length"
    num_passes: int = 0
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

    def count(self, k: int, accepted: int, kept: int | None) -> None:
        """Enter one loop's drafts; kept: how many of its tokens lie before the end of the output, None for all."""
        proposed = k if kept is None else min(k, kept - 1)
        accepted = min(accepted, proposed)
        self.accepted_lengths.append(accepted)
        for depth in range(proposed):
            self.proposed_by_depth[depth] += 1
            self.accepted_by_depth[depth] += depth < accepted


@lru_cache(maxsize=256)
def _truncated(spec: str | tuple[int, ...], k: int, depth: int) -> DraftTree:
    return make_tree(spec, k).truncated(depth)


@lru_cache(maxsize=256)
def _layout(tree: DraftTree, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(within [rows, rows] bool, position offsets [rows]) of a pass over a tree; padding rows see the context and themselves."""
    within = torch.eye(rows, dtype=torch.bool)
    within[: len(tree), : len(tree)] = tree.ancestors()
    offsets = torch.zeros(rows, dtype=torch.long)
    offsets[: len(tree)] = torch.tensor(tree.depths)
    return within.to(device), offsets.to(device)


def forward(
    model: SatModel, cache: SlotCache, policy: RowPolicy, tokens: Tensor, tree: DraftTree, sats: int = 0
) -> tuple[Tensor, Tensor]:
    """One pass. tokens [N], one a tree node; the last `sats` rows are SATs. Commits nothing.

    Returns (last hidden states [N, D], logits [N, V]).
    """
    count = tokens.shape[0]
    within, offsets = _layout(tree, policy.rows(count), model.device)
    tokens = torch.nn.functional.pad(tokens, (0, len(offsets) - count))
    with model.sat_rows(count - sats, count):
        states = model.model.base_model(
            inputs_embeds=model.embed(tokens[None]),
            attention_mask=model.mask(pass_mask(cache, within)),
            position_ids=(cache.length + offsets)[None],
            past_key_values=cache,
        ).last_hidden_state[0]
    return states[:count], model.legal(model.model.get_output_embeddings()(states)[:count])


def prefill(model: SatModel, cache: SlotCache, tokens: Tensor) -> None:
    """Fill `cache` anew with the key/values of `tokens` [N] or [B, N], in one pass that reads their slots only."""
    cache.length = 0
    count = tokens.shape[-1]
    if not count:
        return
    tokens, rows = tokens.reshape(-1, count), torch.arange(count, device=model.device)
    cache.visible = count
    model.model.base_model(
        inputs_embeds=model.embed(tokens),
        attention_mask=model.mask((rows <= rows[:, None]).expand(len(tokens), 1, count, count)),
        position_ids=rows[None],
        past_key_values=cache,
    )
    cache.visible = cache.num_slots
    cache.commit(tuple(range(count)))


def num_slots(prompt_length: int, max_new_tokens: int) -> int:
    """The cache length of a generation: the same for AR and every k and tree, because attention rounds by length."""
    return -(-(prompt_length + max_new_tokens + MAX_NODES + 16) // 64) * 64


@torch.inference_mode()
def probe_rows(model: SatModel) -> RowPolicy:
    """The cheapest padding under which a row's logits have the same bits whatever the number of rows in its pass.

    After a context of 64 tokens, compares one pass of 96 tokens with the same tokens one at a time and in passes of
    other sizes, padded by each policy in turn. Where none is stable (some GPUs), passes are padded to multiples of 4
    and `stable` is false. The answer is kept in `model.row_policy`.
    """
    if model.row_policy is None:
        vocabulary = model.model.get_input_embeddings().weight.shape[0]
        tokens = (torch.arange(64 + 96, device=model.device) * 7919 + 11) % vocabulary
        cache = SlotCache(model.model.config.num_hidden_layers, num_slots(len(tokens), 256))
        prefill(model, cache, tokens[:64])

        @lru_cache
        def logits_of(first: int, rows: int, padded: int) -> Tensor:
            cache.length = 64 + first
            part = tokens[64 + first : 64 + first + rows]
            return forward(model, cache, RowPolicy(padded, 1), part, make_tree("chain", rows - 1))[1]

        def stable(policy: RowPolicy) -> bool:
            whole = logits_of(0, 96, 96)
            one_by_one = (torch.equal(logits_of(i, 1, policy.rows(1))[0], whole[i]) for i in range(16))
            sizes = sorted({policy.rows(count) for count in (*range(1, 33), 48, 64)})
            return all(one_by_one) and all(torch.equal(logits_of(0, n, n), whole[:n]) for n in sizes)

        model.row_policy = next((policy for policy in _POLICIES if stable(policy)), RowPolicy(4, 4, stable=False))
    return model.row_policy


@torch.inference_mode()
def next_logits(model: SatModel, token_ids: list[int], prompt_length: int, config: DecodeConfig) -> Tensor:
    """[V] logits that AR sees after `token_ids`, whose first `prompt_length` are the prompt: teacher forcing, bit for bit."""
    cache = SlotCache(model.model.config.num_hidden_layers, num_slots(prompt_length, config.max_new_tokens))
    tokens = torch.tensor(token_ids, device=model.device)
    prefill(model, cache, tokens[: prompt_length - 1])
    for token in tokens[prompt_length - 1 :].split(1):
        _, logits = forward(model, cache, probe_rows(model), token, make_tree("chain", 0))
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
        width = make_tree(config.tree, config.k).width
        require(width < vocabulary, f"tree={config.tree}: {width} candidates, but the vocabulary has {vocabulary} tokens")


@torch.inference_mode()
def generate(model: SatModel, prompt_ids: list[int], config: DecodeConfig, on_tokens: OnTokens | None = None) -> Generation:
    """Continue `prompt_ids` (paper, section 3.2). The output is the same for every k and tree.

    on_tokens: called after each loop with the new tokens and, for each, whether it was an accepted draft.
    One host synchronisation a loop. Raises InputError where the prompt, the settings and the model do not fit together.
    """
    _check(model, prompt_ids, config)
    policy, sampling, device = probe_rows(model), config.sampling, model.device
    out = Generation(proposed_by_depth=[0] * config.k, accepted_by_depth=[0] * config.k)
    began = time.perf_counter()
    cache = SlotCache(model.model.config.num_hidden_layers, num_slots(len(prompt_ids), config.max_new_tokens))
    prompt = torch.tensor(prompt_ids, device=device)
    prefill(model, cache, prompt[:-1])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    prefilled = time.perf_counter()
    x, emitted, finish = prompt[-1:], 0, ""
    while not finish:
        # Near the end a shallower draft is enough: a loop emits at most k + 2 tokens.
        k = max(0, min(config.k, config.max_new_tokens - emitted - 2))
        index = torch.arange(emitted, emitted + k + 1, device=device)  # emitted index of y0 and of each draft
        tokens = torch.cat([x, x.new_full((k,), model.sat.token_id)]) if k and model.sat else x
        states, logits = forward(model, cache, policy, tokens, make_tree("chain", k), sats=k)
        cache.commit((0,))
        y0 = choose(logits[:1], index[:1], sampling)[:, 0]
        out.num_passes += 1
        if k:
            tree = _truncated(config.tree, config.k, k)
            tokens = draft_tokens(model, y0, states[1:], logits[1:], index[1:], tree, sampling)
            _, logits = forward(model, cache, policy, tokens, tree)
            targets = choose(logits, index[0] + 1 + _layout(tree, len(tree), device)[1], sampling)[:, 0]
            out.num_passes += 1
            node_tokens, node_targets = torch.stack([tokens, targets]).tolist()
            path = tree.walk(node_tokens, node_targets)
            cache.commit(tuple(path))
            x = targets[path[-1] : path[-1] + 1]
            block = [node_tokens[node] for node in path] + [node_targets[path[-1]]]
        else:
            x, block, path = y0, y0.tolist(), [0]
        kept, finish = _cut(model, prompt_ids[-1], out.token_ids, block, config)
        if k:
            out.count(k, len(path) - 1, kept)
        block = block[:kept]
        out.token_ids += block
        emitted += len(block)
        if on_tokens is not None:
            on_tokens(block, [0 < i < len(path) for i in range(len(block))])
    out.finish = finish
    out.prefill_seconds, out.decode_seconds = prefilled - began, time.perf_counter() - prefilled
    out.text = _text(model, prompt_ids[-1], out, config)
    return out


def text_after(tokenizer: Any, before: int, tokens: list[int], skip_special: bool = True) -> str:
    """The text of `tokens` after the token `before`: alone, many tokenizers would drop a space at its beginning."""
    decode = partial(tokenizer.decode, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
    return decode([before, *tokens])[len(decode([before])) :]


def _cut(model: SatModel, before: int, emitted: list[int], block: list[int], config: DecodeConfig) -> tuple[int | None, str]:
    """Where the output ends inside `block`: (number of its tokens to keep, why), or (None, '') to go on.

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
    return (kept, "length") if len(emitted) + kept == config.max_new_tokens else (None, "")


def _has_stop(model: SatModel, before: int, tokens: list[int], config: DecodeConfig) -> bool:
    text = text_after(model.tokenizer, before, tokens, skip_special=False)
    return any(stop in text for stop in config.stop_strings)


def _text(model: SatModel, before: int, out: Generation, config: DecodeConfig) -> str:
    text = text_after(model.tokenizer, before, out.token_ids) if model.tokenizer else ""
    return text[: min((text.find(stop) for stop in config.stop_strings if stop in text), default=len(text))]
