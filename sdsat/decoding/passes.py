"""The result of a pass: the model's own next token at every node, and what SATs draft.

A GPU makes the host wait for every read. So there all groups of SATs draft before the walk is
known, and the host reads once a pass; on a CPU only the group at which a walk has ended drafts.
`PassResult` hides which of the two it is.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor

from sdsat.config import SamplingConfig, require
from sdsat.decoding.sequence import Chooser, Drafted, Sequence
from sdsat.engines.base import Engine, PassInput, PassOutput
from sdsat.engines.drafting import Guesses
from sdsat.method.sampling import as_seed
from sdsat.method.tree import GROWN_NODES, DraftTree, given_tree, laid_out

_NOT_ASKED = -1  # among next tokens in a tensor: the chooser was not asked here


@lru_cache(maxsize=256)
def _truncated(spec: str | tuple[int, ...], k: int, depth: int) -> DraftTree | None:
    """Make a tree as `given_tree`, without the nodes below `depth`."""
    tree = given_tree(spec, k)
    return None if tree is None else tree.truncated(depth)


class PassResult:
    """What a pass says of each of its sequences.

    own: for each sequence, the model's own next token at every node of its tree (list of [N]); None
    where its chooser was not asked.
    """

    own: list[list[int | None]]

    def __init__(
        self,
        engine: Engine,
        sequences: abc.Sequence[Sequence],
        inputs: abc.Sequence[PassInput],
        output: PassOutput,
        drafts_only: bool = False,
    ):
        """Choose the next tokens of a pass.

        Args:
            engine: it ran the pass.
            sequences: their settings and choosers.
            inputs: of the pass, one a sequence.
            output: of the pass.
            drafts_only: it is a rounded pass, and its tokens are drafts: choosers are not asked.

        Raises:
            InputError: for logits that are NaN or infinite.
        """
        self._engine = engine
        self._sequences = sequences
        self._inputs = inputs
        self._output = output
        logits = output.logits
        if drafts_only:
            self._add_others(logits)
        largest = logits.max()
        asks = not drafts_only and sequences[0].chooser is not None
        if asks or engine.reads_freely:  # a chooser reads them anyway
            engine.model.check_finite(float(largest))
        chosen = self._ask if asks else self._choose
        self._targets = chosen(logits)
        self._places = list(_places_of(inputs))
        self._paths = self._drafts_before()
        self._read: dict[tuple[int, int], Drafted] | None = None
        if engine.reads_freely:
            self.own = self._split(iter(self._targets.tolist()))
        else:
            self._read_once(largest)

    def drafted(self, number: int, node: int) -> Drafted | None:
        """Return what the SATs at a node of a sequence draft below the token that follows there.

        number: the sequence's place in the pass. None where there are no SATs.
        """
        if self._read is not None:
            return self._read.get((number, node))
        if node not in self._places[number]:
            return None
        tree, found = self._draft(number, node)
        return drafts_of(tree, found.tolist())

    def _read_once(self, largest: Tensor) -> None:
        """Draft at every group, and read everything in one go."""
        keys = [(number, node) for number, held in enumerate(self._places) for node in held]
        found = {key: self._draft(*key) for key in keys}
        flat = [largest.double()[None], self._targets.double()]
        read = iter(torch.cat([*flat, *(part.flatten() for _, part in found.values())]).tolist())
        self._engine.model.check_finite(next(read))
        self.own = self._split(read)
        self._read = {}
        for key, (tree, part) in found.items():
            rows = [list(islice(read, part.shape[1])) for _ in part]
            self._read[key] = drafts_of(tree, rows)

    def _split(self, tokens: Iterator[float]) -> list[list[int | None]]:
        """Take the next tokens of an iterator, node by node, sequence by sequence."""
        counts = [len(part.tokens) for part in self._inputs]
        return [
            [None if token == _NOT_ASKED else int(token) for token in islice(tokens, count)]
            for count in counts
        ]

    def _drafts_before(self) -> dict[tuple[int, int], Tensor]:
        """Collect the drafts on the way to each node with SATs, in one copy to the device."""
        found = {
            (number, node): [part.tokens[draft] for draft in part.tree.path(node)[1:]]
            for number, part in enumerate(self._inputs)
            for node in self._places[number]
        }
        flat = [token for drafts in found.values() for token in drafts]
        tokens = torch.tensor(flat, dtype=torch.long, device=self._output.logits.device)
        parts = tokens.split([len(drafts) for drafts in found.values()])
        return dict(zip(found, parts, strict=True))

    def _draft(self, number: int, node: int) -> tuple[DraftTree | None, Tensor]:
        """Draft with the SATs at a node of a sequence.

        Returns the tree and what `Engine.draft` finds, or None and what `Engine.grow` does.
        """
        sequence = self._sequences[number]
        row, sats = self._places[number][node]
        config = sequence.config
        drafts = self._paths[number, node]
        index = sequence.emitted + len(drafts) + 1
        # Any token does where the chooser was not asked: those drafts are never read.
        x = self._targets[row : row + 1].clamp_min(0)
        text = torch.cat([sequence.text[: sequence.context], drafts, x])
        states, logits, ids = self._of_sats(sequence, sats)
        guesses = Guesses(text, states, logits, index, config.sampling, ids)
        tree = _truncated(config.tree, config.num_sats, len(guesses.states))
        if tree is None:
            return None, self._engine.grow(guesses, GROWN_NODES)
        return tree, self._engine.draft(guesses, tree)

    def _of_sats(self, sequence: Sequence, sats: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take what a pass gives of SATs.

        Args:
            sequence: theirs.
            sats: which of the pass's SATs.

        Returns:
            Their states [k, D] and logits [k, C], and the token [C] of each logit: those of the
            draft vocabulary, and the text's others; None where there is no draft vocabulary.
        """
        output = self._output
        states = output.states[len(output.logits) :][sats]
        logits = output.sat_logits[sats]
        ids = self._engine.model.draft_ids
        if ids is None or sequence.others is None:
            return states, logits, ids
        others = sequence.others.ids
        more = self._engine.model.logits_of(states, others)
        return states, torch.cat([logits, more], 1), torch.cat([ids, others])

    def _add_others(self, logits: Tensor) -> None:
        """Complete logits [N, V] of a rounded pass, with those of each text's other tokens."""
        row = 0
        for sequence, part in zip(self._sequences, self._inputs, strict=True):
            rows = slice(row, row + len(part.tokens))
            if sequence.others is not None:
                others = sequence.others.ids
                states = self._output.states[rows]
                logits[rows, others] = self._engine.model.logits_of(states, others)
            row = rows.stop

    def _choose(self, logits: Tensor) -> Tensor:
        """Choose [N] next tokens at all nodes, by the engine.

        Sequences that differ in nothing but the seed take one call.
        """
        both = list(zip(self._sequences, self._inputs, strict=True))
        at = [sequence.emitted + d for sequence, part in both for d in part.tree.depths]
        index = torch.tensor(at, device=logits.device)
        first = self._sequences[0].config.sampling
        if all(sequence.config.sampling == first for sequence in self._sequences):
            return self._engine.next_tokens(logits, index, first)
        rows: dict[SamplingConfig, list[int]] = {}
        seeds: dict[SamplingConfig, list[int]] = {}
        row = 0
        for sequence, part in both:
            sampling = replace(sequence.config.sampling, seed=0)
            count = len(part.tokens)
            rows.setdefault(sampling, []).extend(range(row, row + count))
            seeds.setdefault(sampling, []).extend([as_seed(sequence.config.sampling.seed)] * count)
            row += count
        chosen = torch.empty_like(index)
        for sampling, some in rows.items():
            part_of = torch.tensor(some, device=index.device)
            own_seeds = torch.tensor(seeds[sampling], device=index.device)
            chosen[part_of] = self._engine.next_tokens(
                logits[part_of], index[part_of], sampling, own_seeds
            )
        return chosen

    def _ask(self, logits: Tensor) -> Tensor:
        """Ask the choosers for [N] next tokens at the nodes of their walks.

        All sequences have a chooser.
        """
        targets = []
        row = 0
        for sequence, part in zip(self._sequences, self._inputs, strict=True):
            own = logits[row : row + len(part.tokens)]
            assert sequence.chooser is not None
            stop_ids = sequence.config.stop_ids
            chosen, ended = choose_along(sequence.chooser, part.tree, part.tokens, own, stop_ids)
            sequence.ended = ended
            targets.append(chosen)
            row += len(part.tokens)
        return torch.cat(targets)


def drafts_of(tree: DraftTree | None, found: list[list[float]]) -> Drafted:
    """Make drafts of what `Engine.draft` finds for a tree, or without one `Engine.grow`."""
    *shape, tokens, likely = found
    if tree is None:
        count = sum(chance > 0 for chance in likely)
        parents, ranks = ([int(number) for number in part[:count]] for part in shape)
        tree, order = laid_out(parents, ranks)
        tokens = [tokens[node] for node in order]
        likely = [likely[node] for node in order]
    return Drafted(tree, [int(token) for token in tokens], likely)


def _places_of(inputs: abc.Sequence[PassInput]) -> list[dict[int, tuple[int, slice]]]:
    """Find the rows of a pass's SATs.

    For each sequence, {node with SATs: (the node's row in the pass, which SATs are its own)}.
    """
    places = []
    row = 0
    first = 0
    for part in inputs:
        held = {}
        for node, size in part.groups:
            held[node] = (row + node, slice(first, first + size))
            first += size
        places.append(held)
        row += len(part.tokens)
    return places


def choose_along(
    chooser: Chooser,
    tree: DraftTree,
    tokens: list[int],
    logits: Tensor,
    stop_ids: tuple[int, ...],
) -> tuple[Tensor, bool]:
    """Ask a chooser at the nodes that the walk visits.

    It is asked once for each emitted position, in order, as in AR: so it may keep state, and
    nothing is asked behind the end. Where a draft is the last token, the walk ends at that draft,
    and nothing follows it.

    Args:
        chooser: see `Decoder.generate`.
        tree: no deeper than what is still to come.
        tokens: [N] at its nodes.
        logits: [N, V] of its nodes.
        stop_ids: tokens that end the output.

    Returns:
        [N] its tokens, _NOT_ASKED at the other nodes; and whether it ended the output.

    Raises:
        InputError: for a token that is not in the vocabulary.
    """
    children = tree.children()
    node = 0
    targets = torch.full((len(tree),), _NOT_ASKED, dtype=torch.long)
    while True:
        token, ended = chooser(logits[node])
        most = logits.shape[-1] - 1
        require(0 <= token <= most, f"chooser: it chose token {token}; expected 0 to {most}")
        targets[node] = token
        follows = [child for child in children[node] if tokens[child] == token]
        if ended or token in stop_ids or not follows:
            return targets.to(logits.device), ended
        node = follows[0]
