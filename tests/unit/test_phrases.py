from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dlq.grouping.phrases import Phrases

_SHORT = st.text(alphabet="ab .(", min_size=1, max_size=4)


def test_phrases_are_found_where_they_overlap_and_begin_alike():
    phrases = Phrases(["connection reset", "connection", "reset by peer", "on re", "time"])
    assert phrases.found("a connection reset by peer") == {
        "connection reset",
        "connection",
        "reset by peer",
        "on re",
    }
    assert phrases.found("") == frozenset()
    assert Phrases([]).found("anything") == frozenset()


@given(st.lists(_SHORT, max_size=8), st.text(alphabet="ab .(c", max_size=40))
def test_it_finds_what_a_search_for_each_finds(phrases: list[str], text: str):
    assert Phrases(phrases).found(text) == {phrase for phrase in phrases if phrase in text}
