"""What the text says of candidates, against lists searched by hand."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sdsat.method.copies import NONE, copy_facts

TOKENS = st.integers(0, 3)  # so few that they come again


def followed(text, tail):
    """The tokens that stand in the text after a tail of one or two tokens, in order."""
    size = len(tail)
    return [text[i] for i in range(size, len(text)) if text[i - size : i] == tail]


def facts_of(text, before, candidate):
    found = []
    for tail in (before[1:], before):
        after = followed(text, tail)
        found += [candidate in after, bool(after) and after[-1] == candidate]
    return found


@given(
    st.lists(
        st.tuples(
            st.lists(TOKENS, min_size=12, max_size=12),
            st.integers(1, 12),
            st.lists(st.integers(NONE, 3), min_size=2, max_size=2),
        ),
        min_size=1,
        max_size=90,
    )
)
def test_facts_are_those_of_a_search(rows):
    ids = torch.arange(4).repeat(len(rows), 1)
    text, known, before = (torch.tensor(part) for part in zip(*rows, strict=True))
    found = copy_facts(text, known, before, ids)
    want = [[facts_of(t[:n], b, c) for c in range(4)] for t, n, b in rows]
    assert found.int().tolist() == torch.tensor(want).int().tolist()


@given(st.lists(TOKENS, min_size=1, max_size=3))
def test_a_text_of_few_tokens(text):
    path = [*[NONE] * 2, *text][-2:]
    found = copy_facts(
        torch.tensor([text]), torch.tensor([len(text)]), torch.tensor([path]), torch.arange(4)[None]
    )
    want = [facts_of(text, path, candidate) for candidate in range(4)]
    assert found[0].int().tolist() == torch.tensor(want).int().tolist()
