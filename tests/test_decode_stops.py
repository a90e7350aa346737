"""Where a generation ends and what it counts, with drafts that are accepted exactly as a script
says.

The script replaces the logits of SAT rows by what it wants drafted, found by their positions;
nothing of the decoder is patched.
"""

import itertools
import warnings
from contextlib import contextmanager

import pytest
import torch
from common import VOCAB, decoder_of, one_line_error, tiny_llama, tiny_tokenizer, with_adapter
from tokenizers import decoders

from sdsat.config import DecodeConfig, SamplingConfig, SatConfig
from sdsat.decoding.sequence import Generation
from sdsat.decoding.stopping import cut
from sdsat.engines.base import RowPolicy
from sdsat.engines.transformers import TransformersEngine

PROMPT = [1, 5, 9, 2, 7]
GREEDY = SamplingConfig()
SAMPLED = SamplingConfig(1.0, seed=6)
SAT = VOCAB
ROWS = RowPolicy(4, 4)  # given, so that no model here needs probing
# two letters a token
PIECES = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=2)]


class ScriptedSats:
    """Stands in for the adapter.

    drafts(loop, depth, t): candidates of a SAT for the token of emitted index t, best first.
    """

    def __init__(self, lm, drafts):
        self.sat_embedding = torch.zeros(lm.config.hidden_size)
        self.head = None
        self.draft_ids = None
        self.drafts = drafts
        self.rows = range(0)
        self.loop = 0
        lm.base_model.register_forward_hook(self._keep_positions, with_kwargs=True)
        lm.lm_head.register_forward_hook(self._replace_logits)

    @contextmanager
    def on_rows(self, start, end):
        self.rows = range(start, end)
        yield

    def _keep_positions(self, module, args, kwargs, output):
        self.positions = kwargs["position_ids"][0]

    def _replace_logits(self, module, args, logits):
        for depth, row in enumerate(self.rows, 1):
            t = int(self.positions[row]) - len(PROMPT) + 1
            logits[row] = -1e4
            for rank, token in enumerate(self.drafts(self.loop, depth, t)):
                logits[row, token] = 1e4 - 100 * rank
        self.loop += bool(self.rows)
        self.rows = range(0)


@pytest.fixture(scope="module")
def truths():
    """The first tokens of AR, which test_decode.py checks. The sampled ones are distinct."""
    plain = decoder_of(tiny_llama(), rows=ROWS)
    truths = {
        s: plain.generate(PROMPT, DecodeConfig(0, 40, sampling=s)).token_ids
        for s in (GREEDY, SAMPLED)
    }
    assert len(set(truths[SAMPLED][:16])) == 16
    return truths


def scripted(truth, accept, tokenizer=None):
    """A model whose drafts in loop n are right down to depth accept(n), wrong at the next depth,
    and right again below.
    """

    def drafts(loop, depth, t):
        return [(truth[t] + 1) % VOCAB if depth == accept(loop) + 1 else truth[t]]

    return with_drafts(drafts, tokenizer)


def with_drafts(drafts, tokenizer=None):
    lm = tiny_llama()
    return decoder_of(lm, tokenizer, "scripted", SatConfig(SAT, 9), ScriptedSats(lm, drafts), ROWS)


def from_the_start(decoder):
    """A scripted decoder whose script begins anew."""
    decoder.model.adapter.loop = 0
    return decoder


def always(loop):
    return 99


def never(loop):
    return 0


def sometimes(loop):
    return (2, 0, 3, 1)[loop % 4]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    (
        "accept",
        "k",
        "num_tokens",
        "accepted",
        "num_passes",
        "proposed_by_depth",
        "accepted_by_depth",
    ),
    [
        (always, 3, 20, [3, 3, 3, 3], 8, [4, 4, 4], [4, 4, 4]),
        # the last loop needs 2 drafts, the last two tokens none
        (
            never,
            3,
            20,
            [0] * 9,
            20,
            [9, 9, 8],
            [0, 0, 0],
        ),
        (sometimes, 3, 20, [2, 0, 3, 1, 2], 12, [5, 5, 5], [4, 3, 1]),
        (sometimes, 5, 20, [2, 0, 3, 1, 2], 12, [5, 5, 5, 5, 4], [4, 3, 1, 0, 0]),
        (always, 1, 7, [1, 1], 5, [2], [2]),
        (always, 5, 4, [2], 2, [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]),
        (always, 5, 3, [1], 2, [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]),
        (always, 5, 2, [], 2, [0] * 5, [0] * 5),
        (always, 5, 1, [], 1, [0] * 5, [0] * 5),
        (always, 0, 6, [], 6, [], []),
    ],
)
def test_counts_are_those_of_the_script(
    truths,
    sampling,
    accept,
    k,
    num_tokens,
    accepted,
    num_passes,
    proposed_by_depth,
    accepted_by_depth,
):
    calls = []
    decoder = scripted(truths[sampling], accept)
    out = decoder.generate(
        PROMPT,
        DecodeConfig(k, num_tokens, "chain", sampling),
        lambda *call: calls.append(call),
    )
    assert out.token_ids == truths[sampling][:num_tokens]
    assert (out.accepted_lengths, out.num_passes) == (accepted, num_passes)
    assert (out.proposed_by_depth, out.accepted_by_depth) == (proposed_by_depth, accepted_by_depth)
    assert out.acceptance_rate == sum(accepted_by_depth) / max(1, sum(proposed_by_depth))
    assert out.tokens_per_pass == num_tokens / num_passes
    assert [token for tokens, _ in calls for token in tokens] == out.token_ids
    # a draft pass, a verify pass
    loops = [flags for n in accepted for flags in ([False], [*[True] * n, False])]
    assert [flags for _, flags in calls] == loops + [[False]] * (num_passes - len(loops))


@pytest.mark.parametrize("k", range(7))
@pytest.mark.parametrize("accept", [always, never, sometimes])
def test_every_small_length_is_exact(truths, k, accept):
    decoder = scripted(truths[GREEDY], accept)
    for num_tokens in range(1, 13):
        out = from_the_start(decoder).generate(PROMPT, DecodeConfig(k, num_tokens))
        assert out.token_ids == truths[GREEDY][:num_tokens]
        assert out.finish == "length"
        num_plain = out.num_passes - 2 * len(out.accepted_lengths)
        assert num_tokens == num_plain + sum(2 + accepted for accepted in out.accepted_lengths)
        assert num_plain <= 2 if k else num_plain == num_tokens


@pytest.mark.parametrize(
    ("tree", "rank_of_truth", "accepted"),
    [
        ((2, 1, 1), (1, 0, 0), 3),  # the second candidate of depth 1, then a chain below it
        ((2, 1, 1), (1, 1, 0), 1),  # depth 2 has no second candidate
        ((1, 2, 1), (0, 1, 0), 3),
        ((1, 2, 1), (1, 0, 0), 0),
        ((3, 1, 2), (2, 0, 1), 3),
        ((2, 2, 2), (1, 1, 1), 3),
        ((2, 2, 2), (0, 2, 0), 1),
    ],
    ids=str,
)
def test_trees_accept_any_candidate_that_they_hold(truths, tree, rank_of_truth, accepted):
    truth = truths[GREEDY]

    def drafts(loop, depth, t):
        ids = [(truth[t] + n) % VOCAB for n in (1, 2, 3)]
        ids[rank_of_truth[depth - 1]] = truth[t]
        return ids

    decoder = with_drafts(drafts)
    out = decoder.generate(PROMPT, DecodeConfig(3, 3 * (accepted + 2) + 3, tree))
    assert out.token_ids == truth[: 3 * (accepted + 2) + 3]
    assert out.accepted_lengths[:3] == [accepted] * 3


@pytest.mark.parametrize("offset", range(14))
def test_stop_id_at_every_place_of_a_block(truths, offset):
    """Two loops of 7 tokens; what lies behind the stop is neither emitted nor counted."""
    truth = truths[SAMPLED]
    calls = []
    config = DecodeConfig(5, 40, "chain", SAMPLED, stop_ids=(truth[15], truth[offset]))
    out = scripted(truth, always).generate(PROMPT, config, lambda *call: calls.append(call))
    assert (out.token_ids, out.finish) == (truth[: offset + 1], "stop_id")
    # a stop in a draft pass leaves nothing to verify
    accepted = [5] * (offset // 7) + [min(5, offset % 7)] * (offset % 7 > 0)
    assert out.accepted_lengths == accepted
    assert (
        out.proposed_by_depth
        == out.accepted_by_depth
        == [sum(n > depth for n in accepted) for depth in range(5)]
    )
    assert out.num_passes == 2 * len(accepted) + (offset % 7 == 0)
    assert [token for tokens, _ in calls for token in tokens] == out.token_ids
    assert sum(sum(flags) for _, flags in calls) == sum(accepted)
    for other in (never, sometimes):
        assert scripted(truth, other).generate(PROMPT, config).token_ids == out.token_ids


def test_the_first_stop_id_counts_whatever_its_place_in_the_list(truths):
    truth = truths[SAMPLED]
    for stop_ids in ((truth[2], truth[4]), (truth[4], truth[2])):
        out = scripted(truth, always).generate(
            PROMPT, DecodeConfig(5, 40, "chain", SAMPLED, stop_ids)
        )
        assert out.token_ids == truth[:3]


def test_a_rejected_draft_does_not_stop(truths):
    truth = truths[SAMPLED]
    stop = next(token for token in range(VOCAB) if token not in truth)
    decoder = with_drafts(lambda *_: [stop])
    out = decoder.generate(PROMPT, DecodeConfig(3, 20, "chain", SAMPLED, stop_ids=(stop,)))
    assert (out.token_ids, out.finish) == (truth[:20], "length")


@pytest.mark.parametrize("accept", [always, never, sometimes])
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_stop_string_at_every_place(truths, accept, length):
    """Tokens are two letters: odd places begin or end inside a token."""
    truth = truths[SAMPLED][:12]
    text = "".join(PIECES[token] for token in truth)
    decoder = scripted(truths[SAMPLED], accept, tiny_tokenizer(PIECES))
    for start in range(len(text) - length + 1):
        stop = text[start : start + length]
        config = DecodeConfig(5, 12, "chain", SAMPLED, stop_strings=("xyz", stop))
        out = from_the_start(decoder).generate(PROMPT, config)
        num_kept = (text.find(stop) + length + 1) // 2
        assert (out.token_ids, out.finish) == (truth[:num_kept], "stop_string")
        assert out.text == text[: text.find(stop)]


@pytest.mark.parametrize("order", [1, -1])
def test_the_stop_string_completed_first_counts(truths, order):
    truth = truths[SAMPLED]
    text = "".join(PIECES[token] for token in truth[:7])
    early = text[5:7]
    late = text[4:12]  # the late one begins first
    config = DecodeConfig(5, 20, "chain", SAMPLED, stop_strings=(early, late)[::order])
    out = scripted(truth, always, tiny_tokenizer(PIECES)).generate(PROMPT, config)
    assert (out.token_ids, out.text) == (truth[:4], text[: text.find(early)])


def test_absent_stop_string_changes_nothing(truths):
    truth = truths[SAMPLED][:9]
    decoder = scripted(truths[SAMPLED], sometimes, tiny_tokenizer(PIECES))
    out = decoder.generate(PROMPT, DecodeConfig(3, 9, "chain", SAMPLED, stop_strings=("xyz",)))
    assert (out.token_ids, out.finish) == (truth, "length")
    assert out.text == "".join(PIECES[token] for token in truth)


@pytest.mark.parametrize("offset", [1, 3])
def test_of_stop_id_and_stop_string_the_earlier_counts(truths, offset):
    truth = truths[SAMPLED]
    decoder = scripted(truth, always, tiny_tokenizer(PIECES))
    config = DecodeConfig(
        5, 20, "chain", SAMPLED, stop_ids=(truth[offset],), stop_strings=(PIECES[truth[2]],)
    )
    out = decoder.generate(PROMPT, config)
    assert len(out.token_ids) == min(offset, 2) + 1
    assert out.finish == ("stop_id" if offset < 2 else "stop_string")


def test_stop_string_whose_character_spans_two_tokens(truths):
    truth = truths[SAMPLED]
    pieces = list(PIECES)
    pieces[truth[3]], pieces[truth[4]] = "Ã", "©"  # byte-level names of the two bytes of é
    decoder = scripted(truth, always, tiny_tokenizer(pieces, decoders.ByteLevel()))
    out = decoder.generate(PROMPT, DecodeConfig(5, 20, "chain", SAMPLED, stop_strings=("é",)))
    assert (out.token_ids, out.finish) == (truth[:5], "stop_string")
    assert out.text == "".join(pieces[token] for token in truth[:3])


def test_special_token_as_stop_string_is_seen_and_not_shown(truths):
    truth = truths[SAMPLED]
    pieces = list(PIECES)
    pieces[truth[1]], pieces[truth[4]] = "<|think|>", "<|end|>"
    tokenizer = tiny_tokenizer(pieces)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|think|>", "<|end|>"]})
    out = scripted(truth, always, tokenizer).generate(
        PROMPT,
        DecodeConfig(5, 20, "chain", SAMPLED, stop_strings=("<|end|>",)),
    )
    assert (out.token_ids, out.finish) == (truth[:5], "stop_string")
    assert out.text == pieces[truth[0]] + pieces[truth[2]] + pieces[truth[3]]


@pytest.mark.parametrize(
    "sampling", [GREEDY, SAMPLED, SamplingConfig(1.0, top_k=5, top_p=0.9)], ids=str
)
@pytest.mark.parametrize("k", [0, 1, 4])
def test_sat_inside_the_vocabulary_is_never_emitted(sampling, k):
    """Full mode, the SAT being by far the likeliest token: the output is that of a model which
    cannot say it.
    """

    def shifted(shift, sat):
        lm = tiny_llama()
        lm.lm_head.register_forward_hook(
            lambda module, inputs, logits: logits + shift * (torch.arange(VOCAB) == 11)
        )
        return decoder_of(lm, name="full", sat=sat)

    out = shifted(1e3, SatConfig(11, 4)).generate(PROMPT, DecodeConfig(k, 20, (3, 2), sampling))
    want = shifted(-1e9, None).generate(PROMPT, DecodeConfig(0, 20, sampling=sampling))
    assert out.token_ids == want.token_ids
    assert 11 not in out.token_ids


def test_k_beyond_the_trained_depth_warns_and_changes_nothing():
    decoder = with_adapter(tiny_llama(), k=3)
    want = with_adapter(tiny_llama()).generate(PROMPT, DecodeConfig(0, 20))
    with pytest.warns(UserWarning, match=r"k=4.*k=3.*tiny"):
        assert decoder.generate(PROMPT, DecodeConfig(4, 20)).token_ids == want.token_ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.generate(PROMPT, DecodeConfig(3, 5))


def test_refusals():
    plain = decoder_of(tiny_llama(max_position_embeddings=20), name="plain")
    with one_line_error("prompt", "at least one"):
        plain.generate([], DecodeConfig(0, 5))
    with one_line_error("max_new_tokens=16", "21", "plain", "20"):
        plain.generate(PROMPT, DecodeConfig(0, 16))
    assert len(plain.generate(PROMPT, DecodeConfig(0, 15)).token_ids) == 15
    with one_line_error("k=2", "plain", "no SAT"):
        plain.generate(PROMPT, DecodeConfig(2, 5))
    with one_line_error("stop_strings", "tokenizer"):
        plain.generate(PROMPT, DecodeConfig(0, 5, stop_strings=("a",)))
    with one_line_error("tree=paper", "k=4"):
        with_adapter(tiny_llama(), k=5).generate(PROMPT, DecodeConfig(4, 5, "paper"))


def test_one_token_prompt(truths):
    lm = tiny_llama()
    want = decoder_of(lm).generate([7], DecodeConfig(0, 12)).token_ids
    assert with_adapter(lm).generate([7], DecodeConfig(3, 12, (2,))).token_ids == want


@pytest.mark.parametrize("strategy", ["two-step", "one-pass"])
@pytest.mark.parametrize(("k", "tree"), [(0, "chain"), (3, "chain"), (3, (2, 2))], ids=str)
def test_one_host_synchronisation_a_pass(monkeypatch, k, tree, strategy):
    """As on a GPU; on a CPU the host reads the walk first, and only one group drafts."""
    monkeypatch.setattr(TransformersEngine, "reads_freely", False)
    decoder = with_adapter(tiny_llama())
    config = DecodeConfig(k, 20, tree, strategy=strategy)
    decoder.generate(PROMPT, config)  # probing and laying out the tree are done once
    reads = []
    for name in ("tolist", "item", "__int__", "__float__", "__bool__", "__index__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *args, real=real, name=name: (reads.append(name), real(self, *args))[1],
        )
    passes = []
    decoder.generate(PROMPT, config, lambda *call: passes.append(call))
    assert len(reads) == len(passes), reads


@pytest.mark.parametrize("size", [1, 3])
def test_on_a_cpu_only_sats_where_a_walk_ends_draft(monkeypatch, size):
    decoder = with_adapter(tiny_llama())
    # room for a group at every node
    config = DecodeConfig(3, 30, "chain", strategy="one-pass", budget=24)
    want = decoder.generate(PROMPT, config).token_ids
    calls = []
    passes = []
    engine = decoder.engine
    draft = engine.draft
    run = engine.forward
    monkeypatch.setattr(engine, "draft", lambda *args: calls.append(args) or draft(*args))
    monkeypatch.setattr(engine, "forward", lambda inputs: passes.append(inputs) or run(inputs))
    outs = decoder.generate_batch([PROMPT] * size, config, batch_size=size)
    assert [out.token_ids for out in outs] == [want] * size
    assert (
        len(calls)
        <= sum(len(parts) for parts in passes)
        < sum(len(part.groups) for parts in passes for part in parts)
    )


def test_text_keeps_the_space_it_begins_with(truths):
    """Decoders of the SentencePiece kind drop one space from whatever they decode first."""
    pieces = [" " + piece for piece in PIECES]
    tokenizer = tiny_tokenizer(
        pieces, decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    )
    out = decoder_of(tiny_llama(), tokenizer, rows=ROWS).generate(PROMPT, DecodeConfig(0, 4))
    assert out.text == "".join(pieces[token] for token in truths[GREEDY][:4])
    stop = pieces[out.token_ids[0]]
    stopped = decoder_of(tiny_llama(), tokenizer, rows=ROWS).generate(
        PROMPT,
        DecodeConfig(0, 4, stop_strings=(stop,)),
    )
    assert (stopped.finish, stopped.text) == ("stop_string", "")


def test_an_output_that_goes_on_has_no_reason_to_end():
    config = DecodeConfig(0, 4, stop_ids=(7,))
    assert cut(None, 1, [], [5, 6], config) == (2, None)
    assert cut(None, 1, [], [5, 7, 6], config) == (2, "stop_id")
    assert cut(None, 1, [5, 6], [5, 6], config) == (2, "length")
    assert Generation().finish is None
