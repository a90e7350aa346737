"""Which draft head chooses best among a SAT's candidates: heads trained on the same cached states.

    python dev/head_study.py cache DATA CACHE           # held out; DATA: shards of `sdsat distill`
    python dev/head_study.py cache DATA CACHE --first 96 --last 608 --anchors 48     # to learn from
    python dev/head_study.py train CACHE OUT [VARIANT ...]
    python dev/head_study.py compare OUT FILE.json
    python dev/head_study.py copies CACHE FILE.json [--adapter FOLDER --held-out DATA]

`copies` leaves the shipped head as it is, and fits what the text adds to its scores: a number for
each further token (sdsat/method/copies.py), and one factor of all else. With `--adapter` the
shipped adapter is saved with them, and with its figures on the first 48 answers of DATA.

The SATs stay as they are, so what a head sees is computed once: a try takes minutes. Every variant
starts as the shipped head, does what that does at first (what is new is added as zero), and takes
the same steps on the same groups, all in one run, which share the candidates' rows. The first 96
answers are held out.

A greedy chain is accepted up to its first wrong token, and all tokens before that are true: what a
head accepts alone is what it accepts when it is given the true tokens, which is how it is measured.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, pad, rms_norm, silu

from sdsat.cli.program import run_app
from sdsat.config import require
from sdsat.environment import commit
from sdsat.files import replacing, write_json
from sdsat.method.copies import LONGEST, NONE, copied
from sdsat.method.lookup import Lookup
from sdsat.models.head import SHORTLIST
from sdsat.models.loading import load
from sdsat.models.packed import PackedLinears
from sdsat.models.sat_model import SatModel
from sdsat.training.evaluate import evaluate
from sdsat.training.loss import IGNORED, predict, sat_batch, sat_states
from sdsat.training.shards import TrainingExample, read_shards

MODEL = "smollm2-135m-sdsat"
K = 7
MIDDLE = (1 / 3, 2 / 3)  # how deep the layers are whose states at x are kept, beside the last
NODES = 16  # of a tree, without its root
HELD_OUT = 96  # answers, the first ones
CHUNK = 16  # answers a file of the cache
BATCH = 64  # groups a step
FEATURES = 5  # of `features_of`

# What each variant adds to today's head, and how it is trained.
VARIANTS: dict[str, dict[str, Any]] = {
    "shipped": {"untrained": True},
    "today": {},
    "today, from scratch": {"scratch": True},
    "x": {"x": True, "depth": True},
    "x and middle": {"x": True, "middle": True, "depth": True},
    "first token": {"first": True, "depth": True},
    "neighbours": {"neighbours": True, "depth": True},
    "gru": {"gru": 256, "depth": True},
    "attention": {"attention": 256, "depth": True},
    "pair": {"pair": 128, "depth": True},
    "table": {"table": 64},
    "copied": {"copied": True, "depth": True},
    "copied and scale": {"copied": True, "scale": True, "depth": True},
    "size 2048": {"size": 2048},
    "guess": {"guess": 0.4},
    "pace": {"loss": "pace"},
    "tv": {"loss": "tv"},
    "soft": {"loss": "soft"},
    "all": {
        "x": True,
        "middle": True,
        "neighbours": True,
        "gru": 256,
        "pair": 128,
        "copied": True,
        "depth": True,
    },
}


class Head(nn.Module):
    """Today's head with what `options` adds. D: hidden size, S: inner size.

    before the silu:  inner . [state, token before] + what is the same for all nodes of a depth
                      (`fixed`) + what the tokens on the path say (`step`)
    """

    def __init__(self, inner: Tensor, outer: Tensor, vocabulary: int, options: dict[str, Any]):
        super().__init__()
        self.options = options
        hidden = outer.shape[0]
        extra = options.get("size", 0) - len(inner)
        if options.get("scratch"):
            inner = torch.randn_like(inner) / inner.shape[1] ** 0.5
            outer = torch.zeros_like(outer)
        if extra > 0:
            inner = torch.cat([inner, torch.randn(extra, 2 * hidden) / (2 * hidden) ** 0.5])
            outer = pad(outer, (0, extra))
        self.inner, self.outer = nn.Parameter(inner.clone()), nn.Parameter(outer.clone())
        size = len(inner)

        def zero(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape))

        def random(out: int, into: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(out, into) / into**0.5)

        if options.get("depth"):
            self.depth = zero(K, size)
        if options.get("x"):
            self.x = zero(size, hidden)
        if options.get("middle"):
            self.middle = zero(size, len(MIDDLE) * hidden)
        if options.get("first"):
            self.first = zero(size, hidden)
        if options.get("neighbours"):
            self.neighbours = zero(size, 2 * hidden)
        if width := options.get("gru"):
            self.gru = nn.GRUCell(2 * hidden, width)
            self.begin = random(width, hidden)
            self.read = zero(size, width)
        if width := options.get("attention"):
            self.begin = random(width, hidden)
            self.enter = random(width, 2 * hidden)
            self.attend = random(3 * width, width)
            self.read = zero(size, width)
        if rank := options.get("pair"):
            self.pair_token, self.pair_state = random(rank, hidden), random(rank, hidden)
            self.pair_out = zero(hidden, rank)
        if rank := options.get("table"):
            self.table, self.look = zero(vocabulary, rank), random(rank, size)
        if options.get("copied"):
            self.copied = zero(K, FEATURES)
        if options.get("scale"):
            self.scale = zero(K)

    def fixed(self, states: Tensor, x_states: Tensor, first: Tensor) -> Tensor:
        """[N, K, S], once a group: what does not depend on drafted tokens.

        states: [N, K, D], normed. x_states: [N, 1 + middle, D], normed. first: [N, D], normed.
        """
        out = linear(states, self.inner[:, : states.shape[-1]])
        if self.options.get("depth"):
            out = out + self.depth
        if self.options.get("x"):
            out = out + linear(x_states[:, 0], self.x)[:, None]
        if self.options.get("middle"):
            out = out + linear(x_states[:, 1:].flatten(1), self.middle)[:, None]
        if self.options.get("first"):
            out = out + linear(first, self.first)[:, None]
        if self.options.get("neighbours"):
            before = pad(states, (0, 0, 1, 0))[:, :-1]
            after = pad(states, (0, 0, 0, 1))[:, 1:]
            out = out + linear(torch.cat([before, after], -1), self.neighbours)
        return out

    def start(self, x_state: Tensor) -> Tensor:
        """Memory at x, [N, ...]."""
        if self.options.get("gru"):
            return torch.tanh(linear(x_state, self.begin))
        if width := self.options.get("attention"):
            entry = linear(linear(x_state, self.begin), self.attend[width:])
            return pad(entry[:, None], (0, 0, 0, K))
        return x_state.new_zeros(len(x_state), 0)

    def step(self, memory: Tensor, i: int | Tensor, state: Tensor, token: Tensor) -> Tensor:
        """Memory after a token at a place: of depth i, with the SAT's state there."""
        both = torch.cat([state, token], -1)
        if self.options.get("gru"):
            return self.gru(both, memory)
        if width := self.options.get("attention"):
            entry = linear(linear(both, self.enter), self.attend[width:])
            place = torch.as_tensor(i).expand(len(memory))[:, None, None] + 1
            return memory.scatter(1, place.expand(-1, 1, 2 * width), entry[:, None])
        return memory

    def recall(self, memory: Tensor, i: int | Tensor, state: Tensor, token: Tensor) -> Tensor:
        """[N, S]: what the memory says before the silu."""
        if self.options.get("gru"):
            return linear(memory, self.read)
        if width := self.options.get("attention"):
            heads = (width // 64, 64)
            query = linear(linear(torch.cat([state, token], -1), self.enter), self.attend[:width])
            keys, values = memory.unflatten(-1, (2, *heads)).unbind(2)
            scores = torch.einsum("nhd,nmhd->nhm", query.unflatten(-1, heads), keys) / 8
            there = torch.arange(K + 1) <= torch.as_tensor(i).expand(len(memory))[:, None] + 1
            weights = scores.masked_fill(~there[:, None], -torch.inf).softmax(-1)
            return linear(torch.einsum("nhm,nmhd->nhd", weights, values).flatten(1), self.read)
        return memory.new_zeros(len(memory), 1)

    def forward(self, inner: Tensor, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """[N, S] after the silu and [N, D] moves; `inner` [N, S] is all but the token's before."""
        middle = silu(inner + linear(token, self.inner[:, token.shape[-1] :]))
        moves = linear(middle, self.outer)
        if self.options.get("pair"):
            both = linear(token, self.pair_token) * linear(state, self.pair_state)
            moves = moves + linear(both, self.pair_out)
        return middle, moves

    def looked_up(self, middle: Tensor, ids: Tensor) -> Tensor:
        """[N, C] of a low-rank table of the vocabulary: its own row of each candidate."""
        return (self.table[ids] @ linear(middle, self.look)[:, :, None])[:, :, 0]

    def scaled(self, i: int | Tensor, scores: Tensor) -> Tensor:
        """Scores [N, C] at a temperature of the depth."""
        if not self.options.get("scale"):
            return scores
        return scores * (1 + self.scale[torch.as_tensor(i).expand(len(scores))])[:, None]

    def added(self, i: int | Tensor, features: Tensor) -> Tensor:
        """What copies add to the scores: features [N, C, F]."""
        weight = self.copied[torch.as_tensor(i).expand(len(features))]
        return (features @ weight[:, :, None])[:, :, 0]

    def cost(self) -> dict[str, float]:
        """Megaflops of a node, and of a group beside its nodes; megabytes in bfloat16."""
        hidden = self.outer.shape[0]
        parts = {name: p.numel() for name, p in self.named_parameters()}
        group = sum(parts.get(name, 0) for name in ("x", "middle", "first", "begin"))
        # Of what takes a SAT's state and a token, one half belongs to the depth.
        halves = sum(parts.get(name, 0) for name in ("inner", "gru.weight_ih", "enter")) // 2
        depth = sum(parts.get(name, 0) for name in ("neighbours", "pair_state")) + halves
        looked_up = parts.get("table", 0) + parts.get("depth", 0)
        node = sum(parts.values()) - group - depth - looked_up + SHORTLIST * hidden
        return {
            "mflop_node": round(2e-6 * node, 2),
            "mflop_group": round(2e-6 * (group + K * depth), 2),
            "megabytes": round(2e-6 * sum(parts.values()), 2),
        }


def norm(x: Tensor) -> Tensor:
    return rms_norm(x.float(), x.shape[-1:])


def features_of(context: Tensor, path: Tensor, ids: Tensor) -> Tensor:
    """[N, C, F] of candidates: did they follow the token before, or the two before, in the text?

    context: [N, L], of -1 where there is none. path: [N, 2] the two tokens before the candidate.
    ids: [N, C]. Features: after the token before, after its last occurrence; the same for the two
    tokens before; anywhere.
    """
    after = context[:, 2:]
    once = (context[:, 1:-1] == path[:, 1:]) & (after >= 0)
    twice = once & (context[:, :-2] == path[:, :1])
    same = after[:, None] == ids[:, :, None]
    out = []
    for matches in (once, twice):
        out.append((same & matches[:, None]).any(-1))
        last = (matches * torch.arange(1, after.shape[1] + 1)).argmax(-1, keepdim=True)
        token = after.gather(1, last).masked_fill(~matches.any(-1, keepdim=True), -1)
        out.append(token == ids)
    return torch.stack([*out, same.any(-1)], -1)


class Groups:
    """Cached groups: N of them, each K SATs after one place of an answer.

    Raises InputError for a folder without any.
    """

    def __init__(self, folder: Path, model: SatModel):
        files = sorted(folder.glob("answers_*.pt"))
        require(len(files) > 0, f"cache={folder}: no answers_*.pt there; run `cache` first")
        parts = [part for file in files for part in torch.load(file)]
        width = max(len(part["text"]) for part in parts)
        texts = [part.pop("text") for part in parts]
        self.texts = torch.stack([pad(t, (0, width - len(t)), value=-1) for t in texts])
        prompts = [
            tuple(t[: part.pop("prompt")].tolist()) for t, part in zip(texts, parts, strict=True)
        ]
        self.data = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        counts = torch.tensor([len(part["anchor"]) for part in parts])
        self.row = torch.arange(len(parts)).repeat_interleave(counts)
        self.embedding = norm(model.lm.get_input_embeddings().weight.detach())  # [V, D]
        self.rows = model.lm.get_output_embeddings().weight.detach().float()  # [V, D]
        held = self.data["answer"] < HELD_OUT
        asked = {prompts[i] for i in self.row[held].unique().tolist()}
        again = torch.tensor([prompt in asked for prompt in prompts])[self.row]
        self.held = held.nonzero()[:, 0]
        self.rest = (~again).nonzero()[:, 0]

    def __getitem__(self, at: Tensor) -> dict[str, Tensor]:
        """What a head sees of groups `at`, in float32."""
        data = self.data
        tokens = data["tokens"][at].long()
        text = self.texts[self.row[at]]
        place = torch.arange(text.shape[1])
        context = text.masked_fill(place > data["anchor"][at][:, None] + 1, -1)
        return {
            "states": norm(data["states"][at]),
            "x": norm(data["x"][at]),
            "tokens": tokens,
            "ids": data["ids"][at].long(),
            "logits": data["logits"][at],
            "base": data["base"][at].float(),
            "context": context,
        }


def score(
    heads: list[Head], groups: Groups, batch: dict[str, Tensor], befores: list[Tensor]
) -> list[Tensor]:
    """[N, K, C] new scores by each head, given the tokens before [N, K]: the true ones, mostly."""
    states = batch["states"]
    first = groups.embedding[batch["tokens"][:, 1]]
    middles, moves = [], []
    for head, before in zip(heads, befores, strict=True):
        tokens = groups.embedding[before]
        inner = head.fixed(states, batch["x"], first)
        memory = head.start(batch["x"][:, 0])
        if memory.numel():
            said = []
            for i in range(K):
                memory = head.step(memory, i, states[:, i], tokens[:, i])
                said.append(head.recall(memory, i, states[:, i], tokens[:, i]))
            inner = inner + torch.stack(said, 1)
        middle, move = head(inner.flatten(0, 1), states.flatten(0, 1), tokens.flatten(0, 1))
        middles.append(middle)
        moves.append(move)
    ids = batch["ids"].flatten(0, 1)
    every = groups.rows[ids] @ torch.stack(moves, -1) + batch["logits"].flatten(0, 1)[..., None]
    out = []
    for head, before, middle, own in zip(heads, befores, middles, every.unbind(-1), strict=True):
        scores = own
        if head.options.get("table"):
            scores = scores + head.looked_up(middle, ids)
        scores = head.scaled(torch.arange(K).repeat(len(states)), scores).unflatten(0, (-1, K))
        if head.options.get("copied"):
            copied_by_depth = [copies(batch, before, i) for i in range(K)]
            added = [head.added(i, features) for i, features in enumerate(copied_by_depth)]
            scores = scores + torch.stack(added, 1)
        out.append(scores)
    return out


def copies(batch: dict[str, Tensor], before: Tensor, i: int) -> Tensor:
    """[N, C, F] of the candidates of depth i + 1, given the tokens before [N, K]."""
    path = torch.cat([batch["tokens"][:, :1], before], 1)[:, i : i + 2]
    return features_of(batch["context"], path, batch["ids"][:, i]).float()


def true_before(batch: dict[str, Tensor]) -> Tensor:
    return batch["tokens"][:, 1 : K + 1]


@torch.no_grad()
def befores_of(heads: list[Head], groups: Groups, batch: dict[str, Tensor]) -> list[Tensor]:
    """[N, K] tokens before that each head is trained on: true ones, and its own guesses."""
    out = []
    for head in heads:
        before = true_before(batch)
        if chance := head.options.get("guess"):
            best = score([head], groups, batch, [before])[0].argmax(-1, keepdim=True)
            own = pad(batch["ids"].gather(-1, best)[:, :-1, 0], (1, 0))
            swap = pad(torch.rand(before[:, 1:].shape) < chance, (1, 0))
            before = torch.where(swap, own, before)
        out.append(before)
    return out


def loss_of(kind: str, scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of a batch's SATs: over candidates, where the token that followed is one."""
    found, place = (batch["ids"] == batch["tokens"][:, 2:, None]).max(-1)
    hard = cross_entropy(scores.flatten(0, 1), place.flatten(), reduction="none")
    hard = hard.view_as(place) * found
    if kind == "pace":  # the gradient of the expected accepted length
        right = torch.exp(-hard.detach()) * found
        reach = right.cumprod(-1)
        hard = reach.flip(-1).cumsum(-1).flip(-1) * hard
    elif kind in ("tv", "soft"):
        p = batch["base"].exp()
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-6)
        q = scores.log_softmax(-1)
        if kind == "tv":
            hard = 0.1 * hard + 0.9 * (1 - torch.minimum(p, q.exp()).sum(-1)) * found
        else:
            hard = 0.5 * hard - 0.5 * (p * q).sum(-1) * found
    return hard.sum() / found.sum()


def optimizer_of(head: Head, lr: float) -> torch.optim.Optimizer:
    """AdamW; what is new learns at five times the rate, weights of single scores at 0.05."""
    parts: dict[float, list[nn.Parameter]] = {}
    for name, parameter in head.named_parameters():
        old = name in ("inner", "outer") and not head.options.get("scratch")
        own = 0.05 if name in ("copied", "scale") else lr if old else 5 * lr
        parts.setdefault(own, []).append(parameter)
    groups = [{"params": part, "own": own} for own, part in parts.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)


def train(heads: list[Head], groups: Groups, steps: int, lr: float) -> list[list[float]]:
    """Take `steps` steps with each head, on the same groups.

    Returns the cross-entropy of each head by step: of groups that it has not learned yet, while
    `steps` are once through them.
    """
    optimizers = [optimizer_of(head, lr) for head in heads]
    generator = torch.Generator().manual_seed(0)
    rounds = 1 + steps * BATCH // len(groups.rest)
    order = torch.cat(
        [groups.rest[torch.randperm(len(groups.rest), generator=generator)] for _ in range(rounds)]
    )
    began = time.perf_counter()
    plain: list[list[float]] = [[] for _ in heads]
    for step in range(steps):
        rate = min(1.0, (step + 1) / 20) * 0.5 * (1 + np.cos(np.pi * step / steps))
        batch = groups[order[step * BATCH : (step + 1) * BATCH]]
        every = score(heads, groups, batch, befores_of(heads, groups, batch))
        losses = [
            loss_of(head.options.get("loss", "ce"), scores, batch)
            for head, scores in zip(heads, every, strict=True)
        ]
        for scores, own in zip(every, plain, strict=True):
            own.append(loss_of("ce", scores.detach(), batch).item())
        torch.stack(losses).sum().backward()
        for head, optimizer in zip(heads, optimizers, strict=True):
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            for part in optimizer.param_groups:
                part["lr"] = part["own"] * rate
            optimizer.step()
            optimizer.zero_grad()
        if step % 25 == 24:
            late = " ".join(f"{np.mean(own[-25:]):.3f}" for own in plain)
            print(f"  {step + 1}: {late}, {time.perf_counter() - began:.0f} s", flush=True)
    return plain


@torch.no_grad()
def grow(head: Head, groups: Groups, batch: dict[str, Tensor], nodes: int) -> Tensor:
    """[N] accepted drafts of trees of `nodes` drafts, each grown where its path seems likeliest."""
    size = len(batch["tokens"])
    every = torch.arange(size)
    width = 8  # children of a node that may be taken
    states = batch["states"]
    fixed = head.fixed(states, batch["x"], groups.embedding[batch["tokens"][:, 1]])
    start = head.start(batch["x"][:, 0])
    # Of the nodes that were taken, 0 is the root, whose token is true.
    memory = start.new_zeros(size, nodes + 1, *start.shape[1:])
    pair = torch.zeros(size, nodes + 1, 2, dtype=torch.long)
    depth = torch.zeros(size, nodes + 1, dtype=torch.long)
    right = torch.zeros(size, nodes + 1, dtype=torch.bool)
    pair[:, 0] = batch["tokens"][:, :2]
    right[:, 0] = True
    memory[:, 0] = start
    chance = torch.full((size, nodes + 1, width), -torch.inf)  # log, of each child
    token = torch.zeros(size, nodes + 1, width, dtype=torch.long)
    reached = torch.zeros(size)
    for node in range(nodes + 1):
        if node:
            best = chance.flatten(1).argmax(-1)
            parent, child = best // width, best % width
            so_far = chance[every, parent, child]
            chance[every, parent, child] = -torch.inf
            new = token[every, parent, child]
            pair[:, node] = torch.stack([pair[every, parent, 1], new], -1)
            depth[:, node] = depth[every, parent] + 1
            here = batch["tokens"][every, 1 + depth[:, node]]
            right[:, node] = right[every, parent] & (new == here)
            reached = torch.maximum(reached, right[:, node] * depth[:, node])
            memory[:, node] = memory[every, parent]
        else:
            so_far = torch.zeros(size)
        i = depth[:, node].clamp(max=K - 1)
        own = groups.embedding[pair[:, node, 1]]
        state = states[every, i]
        memory[:, node] = head.step(memory[:, node], i, state, own)
        inner = fixed[every, i] + head.recall(memory[:, node], i, state, own)
        ids = batch["ids"][every, i]
        middle, moves = head(inner, state, own)
        scores = batch["logits"][every, i] + (groups.rows[ids] @ moves[:, :, None])[:, :, 0]
        if head.options.get("table"):
            scores = scores + head.looked_up(middle, ids)
        scores = head.scaled(i, scores)
        if head.options.get("copied"):
            scores = scores + head.added(
                i, features_of(batch["context"], pair[:, node], ids).float()
            )
        values, columns = scores.log_softmax(-1).topk(width)
        deeper = (depth[:, node] < K)[:, None]
        chance[:, node] = torch.where(deeper, so_far[:, None] + values, -torch.inf)
        token[:, node] = ids.gather(1, columns)
    return reached


@torch.no_grad()
def measure(heads: list[Head], groups: Groups, trees: bool) -> list[dict[str, Tensor]]:
    """Of every held-out group: right tokens and confidences by depth, and accepted in a tree."""
    found: list[dict[str, list[Tensor]]] = [{} for _ in heads]
    for at in groups.held.split(128):
        batch = groups[at]
        every = score(heads, groups, batch, [true_before(batch)] * len(heads))
        for head, scores, own in zip(heads, every, found, strict=True):
            confidence, best = scores.softmax(-1).max(-1)
            token = batch["ids"].gather(-1, best[..., None])[..., 0]
            own.setdefault("hit", []).append(token == batch["tokens"][:, 2:])
            own.setdefault("confidence", []).append(confidence)
            if trees:
                own.setdefault("tree", []).append(grow(head, groups, batch, NODES))
    return [{name: torch.cat(parts) for name, parts in own.items()} for own in found]


def lookup(groups: Groups) -> Tensor:
    """[N] what prompt lookup, which `auto` has beside the SATs, accepts in held-out groups."""
    out = []
    for at in groups.held.tolist():
        text, root = groups.texts[groups.row[at]].tolist(), int(groups.data["anchor"][at]) + 1
        drafts = Lookup(text[: root + 1], K).drafts()
        same = [a == b for a, b in zip(drafts, text[root + 1 :], strict=False)]
        out.append([*same, False].index(False))
    return torch.tensor(out)


def calibration_error(hit: Tensor, confidence: Tensor) -> float:
    tenth = (confidence * 10).long().clamp(max=9)
    gap = torch.zeros(10).scatter_add(0, tenth, confidence - hit.float())
    return round((gap.abs().sum() / len(hit)).item(), 4)


def interval(values: np.ndarray, answers: np.ndarray) -> list[float]:
    """Mean with its 95 % interval: bootstrap over answers."""
    _, own = np.unique(answers, return_inverse=True)
    sums, counts = np.bincount(own, values), np.bincount(own)
    drawn = np.random.default_rng(0).integers(0, len(sums), (4000, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return [round(float(v), 3) for v in (values.mean(), low, high)]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("cache")
@torch.no_grad()
def cache_command(
    data: Path,
    cache: Path,
    first: int = 0,
    last: int = HELD_OUT,
    anchors: int = 24,
    model_name: str = MODEL,
) -> None:
    """Compute what heads see at places of answers first .. last - 1, where CACHE lacks it."""
    model = load(model_name, "float32")
    assert model.adapter is not None
    model.adapter.fuse().attach(model.lm)
    PackedLinears(model.lm).attach()
    layers = model.lm.base_model.layers
    middle = [round(deep * len(layers)) for deep in MIDDLE]
    seen: list[Tensor] = []
    for layer in middle:
        layers[layer].register_forward_hook(
            lambda module, inputs, output: seen.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    cache.mkdir(parents=True, exist_ok=True)
    sequences = read_shards(data)
    for start in range(first, min(last, len(sequences)), CHUNK):
        file = cache / f"answers_{start:06}.pt"
        if file.exists():
            continue
        began = time.perf_counter()
        parts = []
        for answer in range(start, min(start + CHUNK, last, len(sequences))):
            seen.clear()
            parts += groups_of(model, sequences[answer], answer, anchors, seen)
        with replacing(file) as part:
            torch.save(parts, part)
        count = sum(len(group["anchor"]) for group in parts)
        print(f"{file.name}: {count} groups, {time.perf_counter() - began:.0f} s", flush=True)


def groups_of(
    model: SatModel, sequence: TrainingExample, answer: int, anchors: int, seen: list[Tensor]
) -> list[dict[str, Tensor]]:
    """What heads see at `anchors` places of an answer: one dictionary, none for a short answer.

    seen: the middle states of a pass, which hooks put there.
    """
    batch = sat_batch([sequence], K, anchors, 1.0, [torch.Generator().manual_seed(answer)])
    whole = batch.anchor[0][batch.depth[0] == K]
    if not len(whole):
        return []
    states, base = sat_states(model, batch)
    states = states[torch.isin(batch.anchor[batch.label != IGNORED], whole)].unflatten(0, (-1, K))
    logits, ids = model.logits(states).topk(SHORTLIST)
    places, at = (whole[:, None] + torch.arange(1, K + 1)).unique(return_inverse=True)
    teacher = model.logits(base[0, places]).log_softmax(-1)
    x = torch.stack([base[0], *(state[0] for state in seen[: len(MIDDLE)])], 1)[whole]
    return [
        {
            "states": states.bfloat16(),  # [N, K, D]
            "ids": ids.int(),  # [N, K, C]
            "logits": logits,  # [N, K, C]
            "base": teacher[at].gather(-1, ids).half(),  # [N, K, C], log
            "x": x.bfloat16(),  # [N, 1 + middle, D]
            "tokens": sequence.ids[whole[:, None] + torch.arange(K + 2)].int(),  # from x on
            "anchor": whole,
            "answer": torch.full_like(whole, answer),
            "text": sequence.ids.int(),  # [L], once
            "prompt": torch.tensor(sequence.prompt_length),
        }
    ]


def file_of(out: Path, name: str) -> Path:
    return out / f"{name.replace(' ', '_').replace(',', '')}.pt"


@app.command("train")
def train_command(
    cache: Path,
    out: Path,
    variants: Annotated[list[str] | None, typer.Argument(help="Default: all.")] = None,
    steps: int = 345,  # once through 22,000 groups: a second time is learned by heart
    lr: float = 2e-4,
    model_name: str = MODEL,
) -> None:
    """Train the variants that OUT lacks, together, and measure the chains that they draft."""
    model = load(model_name, "float32")
    require(model.head is not None, f"model {model_name}: it has no draft head")
    assert model.head is not None
    assert model.tokenizer is not None
    groups = Groups(cache, model)
    fence = model.tokenizer.encode("```", add_special_tokens=False)[0]
    has_fence = (groups.texts == fence).any(-1)[groups.row[groups.held]]
    copies_of_text = lookup(groups)
    print(f"{len(groups.rest)} groups, {len(groups.held)} held out", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    names = list(variants or VARIANTS)
    for name in names:
        require(name in VARIANTS, f"variant {name}: expected one of {', '.join(VARIANTS)}")
    names = [name for name in names if not file_of(out, name).exists()]
    inner, outer = model.head.inner.detach().float(), model.head.outer.detach().float()
    heads = []
    for name in names:
        torch.manual_seed(0)
        heads.append(Head(inner, outer, len(groups.rows), VARIANTS[name]))
    learning = [head for head in heads if not head.options.get("untrained")]
    losses = iter(train(learning, groups, steps, lr))
    for name, head, figures in zip(names, heads, measure(heads, groups, False), strict=True):
        trained = head in learning
        result = {
            "name": name,
            "options": head.options,
            "settings": {"steps": steps if trained else 0, "lr": lr, "batch": BATCH}
            | {"groups": len(groups.rest)},
            "losses": next(losses) if trained else [],
            "cost": head.cost(),
            "weights": head.state_dict(),
            "answer": groups.data["answer"][groups.held],
            "code": has_fence,
            "lookup": copies_of_text,
            **figures,
        }
        with replacing(file_of(out, name)) as part:
            torch.save(result, part)
        chain = figures["hit"].cumprod(-1).float()
        print(f"{name}: {chain[:, :5].sum(-1).mean():.3f} {chain.sum(-1).mean():.3f}", flush=True)


@app.command("trees")
def trees_command(cache: Path, out: Path, variants: list[str], model_name: str = MODEL) -> None:
    """Measure what trees of the given variants accept, beside their chains."""
    model = load(model_name, "float32")
    groups = Groups(cache, model)
    for name in variants:
        result = torch.load(file_of(out, name))
        if "tree" in result:
            continue
        weights = result["weights"]
        head = Head(weights["inner"], weights["outer"], len(groups.rows), result["options"])
        head.load_state_dict(weights)
        result.update(measure([head], groups, True)[0])
        with replacing(file_of(out, name)) as part:
            torch.save(result, part)
        print(f"{name}: {result['tree'].mean():.3f}", flush=True)


@torch.no_grad()
def scored(head: Head, groups: Groups, some: Tensor) -> dict[str, Tensor]:
    """What a head and the text say of candidates in groups, and which one was right."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("scores", "copied", "right", "known")}
    for at in some.split(BATCH):
        batch = groups[at]
        ids, tokens = batch["ids"], batch["tokens"]
        texts = groups.texts[groups.row[at]]
        ends = groups.data["anchor"][at] + 2  # the first draft's place
        padded = pad(texts, (LONGEST, K), value=NONE)
        by_depth = []
        for i in range(K):
            places = ends[:, None] + i + torch.arange(LONGEST)
            by_depth.append(copied(texts, ends, padded.gather(1, places), ids[:, i]))
        known, right = (ids == tokens[:, 2:, None]).max(-1)
        scores = score([head], groups, batch, [true_before(batch)])[0]
        for name, part in zip(found, (scores, torch.stack(by_depth, 1), right, known), strict=True):
            found[name].append(part)
    return {name: torch.cat(parts) for name, parts in found.items()}


def fitted(said: dict[str, Tensor], longest: int, lr: float = 0.05) -> tuple[Tensor, Tensor]:
    """Numbers for up to `longest` tokens, and the factor: three times through, cross-entropy."""
    gains = torch.zeros(longest, requires_grad=True)
    sharpness = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.Adam([gains, sharpness], lr=lr)
    torch.manual_seed(0)
    batches = [at for _ in range(3) for at in torch.randperm(len(said["scores"])).split(BATCH)]
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for at in batches:
        new = sharpness * said["scores"][at] + said["copied"][at][..., :longest].float() @ gains
        known = said["known"][at]
        optimizer.zero_grad()
        cross_entropy(new[known], said["right"][at][known]).backward()
        optimizer.step()
        decay.step()
    return gains.detach(), sharpness.detach()


@app.command("copies")
def copies_command(
    cache: Path,
    file: Path,
    groups_read: int = 6400,
    adapter: Path | None = None,
    held_out: Path | None = None,
    model_name: str = MODEL,
) -> None:
    """Fit what the text adds to the shipped head's scores, and write what chains then accept."""
    model = load(model_name, "float32")
    assert model.head is not None
    groups = Groups(cache, model)
    inner, outer = model.head.inner.detach().float(), model.head.outer.detach().float()
    head = Head(inner, outer, len(groups.rows), {})
    some = groups.rest[torch.randperm(len(groups.rest), generator=torch.Generator().manual_seed(1))]
    learned = scored(head, groups, some[:groups_read])
    held = scored(head, groups, groups.held)
    answers = groups.data["answer"][groups.held].numpy()
    entries = []
    base = None
    for longest in range(LONGEST + 1):
        gains, sharpness = fitted(learned, longest)
        new = sharpness * held["scores"] + held["copied"][..., :longest].float() @ gains
        confidence, best = new.softmax(-1).max(-1)
        hit = (best == held["right"]) & held["known"]
        chain = hit.cumprod(-1).double()
        accepted = {f"chain_{k}": chain[:, :k].sum(-1).numpy() for k in (3, 5, 7)}
        base = base or accepted
        errors = [calibration_error(hit[:, i], confidence[:, i]) for i in range(K)]
        entry = {
            "tokens": longest,
            "copies": [round(v, 3) for v in gains.tolist()],
            "sharpness": round(float(sharpness), 3),
            "accepted": {key: interval(v, answers) for key, v in accepted.items()},
            "difference": {key: interval(v - base[key], answers) for key, v in accepted.items()},
            "calibration_error_by_depth": errors,
        }
        print(longest, entry["copies"], entry["sharpness"], entry["accepted"], flush=True)
        entries.append(entry)
    about = {"model": model_name, "groups": groups_read, "places": len(groups.held)}
    write_json(file, about | {"commit": commit(), "by_tokens": entries})
    if adapter is not None and held_out is not None:
        model.head.copies.data.copy_(gains)
        model.head.sharpness.data.copy_(sharpness)
        save_with_figures(model, adapter, read_shards(held_out)[:48])


def save_with_figures(model: SatModel, folder: Path, answers: list[TrainingExample]) -> None:
    """Save a model's adapter, with its figures on answers that it was not trained on."""
    adapter = model.adapter
    assert adapter is not None
    model.follow()
    figures = evaluate(partial(predict, model), answers, adapter.config.sat.k, model.device)
    training = {**adapter.config.training, **figures, "copies": "fitted last, all else frozen"}
    adapter.config = replace(adapter.config, training=training)
    adapter.save(folder)
    print(figures)


@app.command("compare")
def compare_command(out: Path, file: Path, baseline: str = "today") -> None:
    """Write what every variant accepts, and by how much it differs from the baseline."""
    found = {r["name"]: r for r in map(torch.load, sorted(out.glob("*.pt")))}
    require(baseline in found, f"baseline={baseline}: expected one of {', '.join(found)}")

    def figures(result: dict[str, Any]) -> dict[str, np.ndarray]:
        right = result["hit"].cumprod(-1).double()
        out = {"chain_5": right[:, :5].sum(-1).numpy(), "chain_7": right.sum(-1).numpy()}
        if "tree" in result:
            out["tree_16"] = result["tree"].double().numpy()
        # The better of both: what is accepted where a tree holds the drafts of both.
        beside = result["lookup"].double().numpy()
        return out | {f"{key}_or_lookup": np.maximum(v, beside) for key, v in out.items()}

    base = figures(found[baseline])
    variants = {}
    for name, result in found.items():
        answers = result["answer"].numpy()
        code = result["code"].numpy()
        own = figures(result)
        entry: dict[str, Any] = {"options": result["options"], "settings": result["settings"]}
        entry["accepted"] = {key: interval(v, answers) for key, v in own.items()}
        own_base = {key: base[key] for key in own if key in base}
        entry["difference"] = {key: interval(own[key] - v, answers) for key, v in own_base.items()}
        for kind, rows in (("code", code), ("other", ~code)):
            entry[f"difference_{kind}"] = {
                key: interval((own[key] - v)[rows], answers[rows]) for key, v in own_base.items()
            }
            entry[f"accepted_{kind}"] = {
                key: round(float(v[rows].mean()), 3) for key, v in own.items()
            }
        hit = result["hit"]
        entry["accuracy_by_depth"] = [round(v, 4) for v in hit.float().mean(0).tolist()]
        entry["calibration_error_by_depth"] = [
            calibration_error(hit[:, i], result["confidence"][:, i]) for i in range(K)
        ]
        entry["cost"] = result["cost"]
        late = result.get("losses", [])[-100:]
        entry["loss_last_100_steps"] = round(float(np.mean(late)), 4) if late else None
        variants[name] = entry
    first = found[baseline]
    head = {
        "schema_version": 1,
        "commit": commit(),
        "baseline": baseline,
        "held_out": {
            "places": len(first["answer"]),
            "answers": len(first["answer"].unique()),
            "places_code": int(first["code"].sum()),
        },
    }
    write_json(file, {**head, "variants": variants})


if __name__ == "__main__":
    run_app(app)
