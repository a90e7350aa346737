"""The race as a picture: it parses whatever a model writes, shows both texts, marks what was
drafted, and plays at the recorded times.
"""

import re
from html import escape
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from sdsat.interfaces import terminal as show
from sdsat.interfaces.race import COLUMNS, Lane, LanePass, race_svg

SVG = "{http://www.w3.org/2000/svg}"


class Picture:
    """What a browser reads in the file."""

    def __init__(self, svg):
        self.root = ElementTree.fromstring(svg)
        self.css = self.root.find(f"{SVG}style").text
        self.texts = ["".join(text.itertext()) for text in self.root.iter(f"{SVG}text")]
        self.length = float(re.search(r"animation:\w+ ([\d.]+)s", self.css)[1])
        slower = re.search(r"(\d+) times slower", " ".join(self.texts))
        self.slower = int(slower[1]) if slower else 1

    def lines(self, lane):
        """The text of a lane, line by line."""
        rows = [text.findall(f"{SVG}tspan") for text in self.root.iter(f"{SVG}text")]
        mine = [[span for span in row if f"lane{lane}pass" in span.get("class")] for row in rows]
        return ["".join(span.text for span in row) for row in mine if row]

    def spans(self, lane):
        """(text, whether it is green, number of its pass) of a lane."""
        for span in self.root.iter(f"{SVG}tspan"):
            found = re.match(rf"lane{lane}pass(\d+)( accepted)?$", span.get("class"))
            if found:
                yield span.text, bool(found[2]), int(found[1])

    def figures(self, lane):
        """The line that a lane shows at its end."""
        (line,) = (
            text.text
            for text in self.root.iter(f"{SVG}text")
            if re.match(rf"note lane{lane}pass", text.get("class", ""))
        )
        return line

    def seconds(self, lane):
        """When a lane's passes appear, in seconds of the run that was recorded."""
        pattern = rf"@keyframes lane{lane}pass\d+{{0%{{visibility:hidden}}([\d.]+)%"
        shares = map(float, re.findall(pattern, self.css))
        return [share / 100 * self.length / self.slower for share in shares]


def lane(*passes, title="AR", figures="5 tokens"):
    return Lane(title, figures, [LanePass(seconds, len(new), new) for seconds, new in passes])


SLOW = lane((0.5, [("def", False)]), (1.0, [(" f", False)]), (1.5, [("(x)", False)]))
FAST = lane(
    (0.25, [("def", False), (" f", True), ("(x", True)]), (0.75, [(")", False)]), title="SDSAT"
)


def test_both_sides_are_there():
    picture = Picture(race_svg([SLOW, FAST], "tiny, 2 threads"))
    assert [picture.lines(0), picture.lines(1)] == [["def f(x)"], ["def f(x)"]]
    assert {"AR", "SDSAT", "5 tokens", "tiny, 2 threads"} <= set(picture.texts)


def test_green_is_what_was_drafted():
    picture = Picture(race_svg([SLOW, FAST], "tiny"))
    assert not any(green for _, green, _ in picture.spans(0))
    assert list(picture.spans(1)) == [
        ("def", False, 0),
        (" f(x", True, 0),
        (")", False, 1),
    ]


@pytest.mark.parametrize(("scale", "slower"), [(1, 4), (0.01, 400), (10, 1)])
def test_passes_appear_when_they_were_recorded(scale, slower):
    """In slow motion where the run was short, which the picture says; the end stays for a while."""
    sides = [
        lane(*((one.seconds * scale, one.pieces) for one in side.passes)) for side in (SLOW, FAST)
    ]
    picture = Picture(race_svg(sides, "tiny"))
    assert picture.slower == slower
    assert picture.seconds(0) == pytest.approx([0.5 * scale, scale, 1.5 * scale], rel=1e-2)
    assert picture.seconds(1) == pytest.approx([0.25 * scale, 0.75 * scale], rel=1e-2)
    assert picture.length - picture.slower * picture.seconds(0)[-1] > 2


def test_bars_grow_with_the_tokens():
    css = Picture(race_svg([SLOW, FAST], "tiny")).css
    grown = [
        [float(scale) for scale in re.findall(r"scaleX\(([\d.]+)\)", rule)]
        for rule in re.findall(r"@keyframes bar\d(.*)", css)
    ]
    assert grown == [[0, 0.333, 0.667, 1], [0, 0.75, 1]]


def test_what_may_not_move_shows_the_end():
    """Nothing is hidden but by an animation, and those can be switched off."""
    css = Picture(race_svg([SLOW, FAST], "tiny")).css
    assert "@media (prefers-reduced-motion:reduce){*{animation:none!important}}" in css
    assert "visibility:hidden" not in re.sub(r"@keyframes .*", "", css)


def parses(character):
    try:
        ElementTree.fromstring(f"<a>{escape(character)}</a>")
    except ElementTree.ParseError:
        return False
    return True


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=90), st.booleans()), max_size=6))
@example([("a\x00b<&\"'\x1b[31m\r\n\tc\uffff", True)])
@example([("\N{CJK UNIFIED IDEOGRAPH-4E00}" * 61, False)])
def test_any_text_makes_a_picture(pieces):
    """What XML cannot hold is marked, all else is there, and lines fit a panel."""
    text = "".join(part for part, _ in pieces)
    picture = Picture(race_svg([lane((1.0, pieces))], text))
    want = text.replace("\r", "").replace("\n", "").replace("\t", "    ")
    want = "".join(character if parses(character) else "\ufffd" for character in want)
    assert "".join(picture.lines(0)) == want
    assert all(cell_len(line.rstrip(" ")) <= COLUMNS for line in picture.lines(0))


def test_lines_end_between_words():
    words = "the quick brown fox jumps over the lazy dog " * 4
    lines = Picture(race_svg([lane((1.0, [(words, False)]))], "tiny")).lines(0)
    assert "".join(lines) == words
    assert all(line.endswith(" ") for line in lines)
    assert all(len(line) + len("quick ") > COLUMNS for line in lines[:-1])


def test_what_is_too_long_for_its_place_is_cut():
    picture = Picture(
        race_svg([lane((1.0, [("a", False)]), title="t" * 61, figures="f" * 60)], "tiny")
    )
    assert "t" * 59 + "\u2026" in picture.texts and "f" * 60 in picture.texts


def test_the_clock_stands_still_while_text_is_shown(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(show, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def generate(prompt_ids, decode, on_tokens, on_read):
        for number in range(3):
            clock.now += 1.0
            on_tokens([number, 7], [True, False])
        return SimpleNamespace(num_new_tokens=6)

    def slow(tokens, drafted):
        clock.now += 10.0

    run = show.timed(SimpleNamespace(generate=generate), [1], None, slow)
    assert [step.seconds for step in run.steps] == [1.0, 2.0, 3.0]
    assert [step.tokens for step in run.steps] == [[0, 7], [1, 7], [2, 7]]
    assert (run.seconds, run.tokens_per_second) == (3.0, 2.0)
