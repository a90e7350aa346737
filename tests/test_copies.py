"""Which candidates a text has after the same tokens, against a search of lists by hand."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sdsat.method.copies import LONGEST, NONE, copied, last_tokens

TOKENS = st.integers(0, 3)  # so few that they come again


def search(text, before, candidate):
    """Whether the candidate follows the last 1, 2, ... tokens of `before` anywhere in the text."""
    found = []
    for size in range(1, LONGEST + 1):
        tail = [*before[len(before) - size :], candidate]
        found.append(any(text[i : i + size + 1] == tail for i in range(len(text) - size)))
    return found


@given(
    st.lists(
        st.tuples(
            st.lists(TOKENS, min_size=40, max_size=40),
            st.integers(1, 40),
            st.lists(st.integers(NONE, 3), min_size=LONGEST, max_size=LONGEST),
        ),
        min_size=1,
        max_size=90,
    )
)
def test_it_is_what_a_search_finds(rows):
    ids = torch.arange(4).repeat(len(rows), 1)
    text, known, before = (torch.tensor(part) for part in zip(*rows, strict=True))
    found = copied(text, known, before, ids)
    want = [[search(t[:n], b, candidate) for candidate in range(4)] for t, n, b in rows]
    assert found.tolist() == want
    shared = copied(text[:1], known[:1], before, ids[:1])  # one text for all, as drafting has it
    want = [[search(rows[0][0][: rows[0][1]], b, c) for c in range(4)] for _, _, b in rows]
    assert shared.tolist() == want


@given(st.lists(TOKENS, min_size=1, max_size=6))
def test_a_text_of_few_tokens(text):
    path = last_tokens(torch.tensor(text))
    assert path.tolist() == [*[NONE] * LONGEST, *text][-LONGEST:]
    ids = torch.arange(4)[None]
    found = copied(torch.tensor([text]), torch.tensor([len(text)]), path[None], ids)
    assert found[0].tolist() == [search(text, path.tolist(), candidate) for candidate in range(4)]
