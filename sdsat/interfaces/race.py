"""The race: plain decoding and SDSAT answer the same prompt side by side, as an animated SVG.

Browsers and GitHub play the picture by themselves: it is CSS inside one file, without a script.
What cannot animate, or is asked not to (`prefers-reduced-motion`), shows the end: both whole texts.

    sdsat generate PROMPT --compare --svg race.svg
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby

from rich.cells import cell_len, set_cell_size

COLUMNS = 60  # columns of a line before it wraps
COLUMN = 7.83  # px; the widest of the fonts below
LINE = 18  # px from line to line
MARGIN = 16  # px
HEADER = 76  # px from the top of a panel to its text
SHORTEST = 6.0  # seconds that the slower side runs at least: shorter runs are in slow motion
PAUSE = 3.0  # seconds that the end stays before the picture begins again
NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
STYLE = """
text{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;
fill:#c9d1d9;white-space:pre}
.title{font-weight:600;fill:#f0f6fc}.note{fill:#9198a1}.accepted{fill:#3fb950;font-weight:600}
.page{fill:#010409}.panel{fill:#0d1117;stroke:#30363d}
.track{fill:#21262d}.bar{fill:#58a6ff}.bar.accepted{fill:#3fb950}
@media (prefers-reduced-motion:reduce){*{animation:none!important}}
"""


@dataclass(frozen=True)
class LanePass:
    """What one forward pass brought.

    Attributes:
        seconds: since the beginning, when it was there.
        num_tokens: that it emitted.
        pieces: of the text, each with whether it is an accepted draft.
    """

    seconds: float
    num_tokens: int
    pieces: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class Lane:
    """One side of the race: a title, a line of figures for the end, and its passes, one or more."""

    title: str
    figures: str
    passes: Sequence[LanePass]

    @property
    def seconds(self) -> float:
        """Seconds from the beginning to the last pass."""
        return self.passes[-1].seconds


@dataclass(frozen=True)
class _Piece:
    """A part of a line. number: of the pass that brought it."""

    text: str
    accepted: bool
    number: int


def race_svg(lanes: Sequence[Lane], title: str) -> str:
    """Draw the lanes side by side.

    Returns the text of an SVG file. It plays for ever at the recorded pace, or in a slow motion
    that it names.
    """
    slowest = max(lane.seconds for lane in lanes)
    slow_motion = max(1, math.ceil(SHORTEST / max(slowest, 1e-3)))
    length = slowest * slow_motion + PAUSE
    texts = [_lines(lane) for lane in lanes]
    panel_width = COLUMNS * COLUMN + 2 * MARGIN
    panel_height = HEADER + LINE * max(map(len, texts)) + MARGIN
    width = len(lanes) * (panel_width + MARGIN) + MARGIN
    height = panel_height + 3 * MARGIN + 2 * LINE
    pace = "as fast as it ran" if slow_motion == 1 else f"{slow_motion} times slower than it ran"
    room = len(lanes) * COLUMNS
    notes = (title, f"Recorded, shown {pace}. Green: accepted drafts.")
    rules = list[str]()
    drawn = list[str]()
    for number, (lane, lines) in enumerate(zip(lanes, texts, strict=True)):
        left = MARGIN + number * (panel_width + MARGIN)
        rules += _rules(lane, number, slow_motion, length)
        drawn += _panel(lane, number, lines, left, panel_width, panel_height)
    for row, note in enumerate(notes):
        y = panel_height + 2.4 * MARGIN + row * LINE
        drawn.append(f'<text class="note" x="{2 * MARGIN}" y="{y:.1f}">{_shown(note, room)}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role="img" aria-label="{escape(_readable(title))}">'
    )
    style = f"<style>{STYLE}{''.join(rules)}</style>"
    page = f'<rect class="page" width="{width:.0f}" height="{height:.0f}" rx="8"/>'
    return "\n".join([head, style, page, *drawn, "</svg>", ""])


def _rules(lane: Lane, number: int, slow_motion: int, length: float) -> Iterator[str]:
    """Write the CSS of a lane.

    A pass's text appears when it was there, and its bar grows with the tokens.

    Args:
        lane: of the race.
        number: of the lane, from 0.
        slow_motion: how many times slower it plays.
        length: of the whole animation, seconds.
    """
    total = sum(one.num_tokens for one in lane.passes)
    bar = ["0%{transform:scaleX(0)}"]
    done = 0
    for place, one in enumerate(lane.passes):
        moment = f"{100 * one.seconds * slow_motion / length:.2f}%"
        name = f"lane{number}pass{place}"
        yield f"@keyframes {name}{{0%{{visibility:hidden}}{moment}{{visibility:visible}}}}\n"
        yield f".{name}{{animation:{name} {length:.2f}s step-end infinite}}\n"
        done += one.num_tokens
        bar.append(f"{moment}{{transform:scaleX({done / max(1, total):.3f})}}")
    name = f"bar{number}"
    yield f"@keyframes {name}{{{''.join(bar)}}}\n"
    yield (
        f".{name}{{transform-origin:left;transform-box:fill-box;"
        f"animation:{name} {length:.2f}s step-end infinite}}\n"
    )


def _panel(
    lane: Lane, number: int, lines: list[list[_Piece]], left: float, width: float, height: float
) -> Iterator[str]:
    """Write the elements of a lane.

    Args:
        lane: of the race.
        number: of the lane, from 0.
        lines: of its text.
        left: of its panel, px.
        width: of its panel, px.
        height: of its panel, px.
    """
    x = f'x="{left + MARGIN:.1f}"'
    size = f'x="{left:.1f}" y="{MARGIN}" width="{width:.1f}" height="{height:.1f}" rx="6"'
    yield f'<rect class="panel" {size}/>'
    yield f'<text class="title" {x} y="{MARGIN + 24}">{_shown(lane.title, COLUMNS)}</text>'
    last = f"lane{number}pass{len(lane.passes) - 1}"
    yield f'<text class="note {last}" {x} y="{MARGIN + 43}">{_shown(lane.figures, COLUMNS)}</text>'
    drafts = any(accepted for one in lane.passes for _, accepted in one.pieces)
    size = f'{x} y="{MARGIN + 52}" width="{width - 2 * MARGIN:.1f}" height="5" rx="2.5"'
    yield f'<rect class="track" {size}/>'
    yield f'<rect class="bar{" accepted" * drafts} bar{number}" {size}/>'
    for row, pieces in enumerate(lines):
        spans = "".join(
            f'<tspan class="lane{number}pass{piece.number}{" accepted" * piece.accepted}">'
            f"{escape(piece.text)}</tspan>"
            for piece in pieces
        )
        y = MARGIN + HEADER + row * LINE
        yield f'<text {x} y="{y}" xml:space="preserve">{spans}</text>'


def _lines(lane: Lane) -> list[list[_Piece]]:
    """Break the lane's text into lines of at most COLUMNS columns, after words if possible."""
    marks = [
        _Piece(character, accepted, number)
        for number, one in enumerate(lane.passes)
        for text, accepted in one.pieces
        for character in _readable(text.replace("\r", "").replace("\t", "    "))
    ]
    lines: list[list[_Piece]] = [[]]
    for mark in marks:
        line = lines[-1]
        if mark.text == "\n":
            lines.append([])
            continue
        width = sum(cell_len(one.text) for one in line) + cell_len(mark.text)
        if width > COLUMNS and mark.text != " ":  # a space may hang over
            ends = [place for place, one in enumerate(line, 1) if one.text == " "]
            end = ends[-1] if ends else len(line)
            lines[-1] = line[:end]
            lines.append(line[end:])
        lines[-1].append(mark)
    return [[_joined(list(group)) for _, group in groupby(line, _origin)] for line in lines]


def _origin(piece: _Piece) -> tuple[bool, int]:
    return piece.accepted, piece.number


def _joined(pieces: list[_Piece]) -> _Piece:
    """Join pieces of one origin."""
    return replace(pieces[0], text="".join(piece.text for piece in pieces))


def _shown(text: str, columns: int) -> str:
    """Write `text` in XML: whole where it fits, else its beginning and an ellipsis."""
    text = _readable(text)
    fits = cell_len(text) <= columns
    return escape(text if fits else f"{set_cell_size(text, columns - 1)}\u2026")


def _readable(text: str) -> str:
    """Replace what XML cannot hold, whatever a model writes."""
    return NOT_IN_XML.sub("\ufffd", text)
