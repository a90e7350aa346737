"""What a terminal is shown: the text where it ends, as soon as it is sure; and the figures of AR
beside it.
"""

import re

import pytest
from common import VOCAB, decoder_of, one_line_error, tiny_llama, tiny_tokenizer, with_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import CIRCLE
from test_race import Picture
from tokenizers import decoders

from sdsat.config import DecodeConfig
from sdsat.decoding.decoder import Decoder
from sdsat.interfaces import terminal as show

# the last two are bytes, together one character
PIECES = [
    "?",
    "a",
    "b",
    "c",
    "ab",
    "bc",
    "<0xC3>",
    "<0xA4>",
]
TOKENIZER = tiny_tokenizer(PIECES, decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]))


def text_of(tokens):
    bytes_ = b"".join(
        bytes([int(p[3:5], 16)]) if p.startswith("<0x") else p.encode()
        for p in (PIECES[t] for t in tokens)
    )
    return bytes_.decode(errors="replace")


def plain(pieces):
    return "".join(text for text, _ in pieces)


def cut(text, stops):
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


TOKENS = st.lists(st.sampled_from([1, 2, 3, 4, 5]), max_size=14)


@settings(max_examples=300, deadline=None)
@given(
    TOKENS,
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), min_size=14),
)
def test_what_is_shown_ends_where_the_text_does(tokens, stops, sizes):
    """In every order of passes, and of what is shown nothing is taken back; what can be no stop
    string is shown at once.
    """
    stream = show.TokenStream(TOKENIZER, 1, stops)
    shown = ""
    at = 0
    for size in sizes:
        shown += plain(stream.add(tokens[at : at + size], [False] * len(tokens[at : at + size])))
        so_far = text_of(tokens[: at + size])
        at = at + size
        open_ = [n for stop in stops for n in range(1, len(stop)) if so_far.endswith(stop[:n])]
        sure = so_far[: len(so_far) - max(open_, default=0)]
        assert (
            shown
            == (cut(so_far, stops) if any(stop in so_far for stop in stops) else sure)[: len(shown)]
        )
        if not any(stop in so_far for stop in stops):
            assert shown == sure
    assert shown + plain(stream.rest()) == cut(text_of(tokens), stops)


def test_half_a_character_waits_for_the_other_half():
    stream = show.TokenStream(TOKENIZER, 1)
    assert [plain(stream.add([token], [False])) for token in (1, 6, 7)] == ["a", "", "\u00e4"]
    assert not stream.rest()
    alone = show.TokenStream(TOKENIZER, 1)
    assert [plain(alone.add([token], [False])) for token in (1, 6)] == ["a", ""]
    assert plain(alone.rest()) == "\ufffd"


def test_a_character_keeps_its_colour_while_it_is_held_back():
    stream = show.TokenStream(TOKENIZER, 1, ["abb"])
    assert not stream.add([1, 2], [True, False])
    assert stream.add([3], [True]) == [("a", True), ("b", False), ("c", True)]


@pytest.fixture
def terminal(monkeypatch, capsys):
    """`sdsat generate` on a model that goes round in a circle, with or without SATs: (what it
    prints, its generations).
    """

    def run(sats=True, svg=None, first="0", **settings):
        pieces = [chr(ord(first) + i) for i in range(VOCAB)]
        lm = tiny_llama(**CIRCLE)
        decoder = with_adapter(lm, k=3) if sats else decoder_of(lm, name="plain")
        decoder.model.tokenizer = tiny_tokenizer(pieces)
        generate = Decoder.generate
        made = []

        def kept(*arguments, **named):
            made.append(generate(*arguments, **named))
            return made[-1]

        monkeypatch.setattr(Decoder, "generate", kept)
        decode = DecodeConfig(**{"k": None, "max_new_tokens": 40, **settings})
        prompt = "".join(pieces[i] for i in (1, 5, 9))
        show.generate_in_terminal(decoder, prompt, decode, "raw", compare=True, svg=svg)
        return capsys.readouterr().out, made[1:]  # the first warms up

    return run


@pytest.mark.parametrize(
    "settings", [dict(strategy="two-step", lookup=8), dict(sats=False, strategy="lookup")], ids=str
)
def test_compare_measures_plain_decoding(terminal, settings):
    """AR is one token a pass, where there is much to look up too."""
    out, (drafted, ar) = terminal(**settings)
    assert drafted.num_passes < 30
    assert (ar.num_passes, ar.num_plain_passes) == (40, 40)
    assert "the same text" in out


def test_piped_text_is_that_of_the_output(terminal):
    """Whatever its characters: a terminal would act on some, or write tabs as spaces."""
    out, (drafted, _) = terminal(strategy="two-step", first="\x01")
    assert out.startswith(drafted.text + "\n") and "\x0c" in drafted.text


def test_without_sats_nothing_is_done_in_their_name(terminal):
    with one_line_error("strategy=auto: model plain has no SATs", "strategy=lookup", "k=0"):
        terminal(sats=False, strategy="auto")


def test_a_stop_string_is_not_shown(terminal):
    _, (whole, _) = terminal(strategy="two-step", lookup=0)
    stop = whole.text[6:9]
    assert stop not in whole.text[:8]
    out, (drafted, _) = terminal(strategy="two-step", lookup=0, stop_strings=(stop,))
    assert drafted.text == whole.text[:6] and drafted.finish == "stop_string"
    assert (
        out.splitlines()[0].startswith(drafted.text)
        and stop not in out.splitlines()[0].split(" tokens")[0]
    )


def test_the_race_of_two_generations(terminal, tmp_path):
    """Both texts as they were printed, the accepted drafts green, and the times of the two runs."""
    path = tmp_path / "race.svg"
    out, (drafted, ar) = terminal(svg=path, strategy="two-step", lookup=8)
    picture = Picture(path.read_text())
    assert picture.lines(0) == picture.lines(1) == [drafted.text] == [ar.text]
    assert out.startswith(drafted.text)
    green = [text for text, accepted, _ in picture.spans(1) if accepted]
    assert len("".join(green)) == sum(drafted.accepted_lengths) > 10
    assert not any(accepted for _, accepted, _ in picture.spans(0))
    for lane, made in enumerate((ar, drafted)):
        assert len(picture.seconds(lane)) == made.num_passes
        (total,) = re.findall(r"40 tokens in ([\d.]+) s", picture.figures(lane))
        assert picture.seconds(lane)[-1] == pytest.approx(float(total), abs=0.01)
    assert "SDSAT: two-step, k = 3, lookup 8" in picture.texts
    assert picture.figures(1).endswith(" times as fast")
    assert any(
        text.startswith("tiny, ") and text.endswith(": the same text") for text in picture.texts
    )
