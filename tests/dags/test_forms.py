"""What a dead letter says is shown as text: no link, image or heading of its own, wherever it ends up."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from dlq_runbook import forms

SHA = "ab" * 32


def tokens(markdown: str) -> list[Token]:
    parsed = MarkdownIt("commonmark").parse(markdown)
    return [inner for token in parsed for inner in (token, *(token.children or ()))]


@given(
    st.text(
        alphabet=st.one_of(st.sampled_from("`~\n\r\t #[]()!<>-\u202e\x00\x1b"), st.characters()), max_size=200
    )
)
@example("```\n![x](http://elsewhere/x.png)\n```")
@example("`" * 40 + "\n<img src=x onerror=alert(1)>")
@example("a\r```\r[click](http://elsewhere)")
@example("\u2028```\u2028# heading")
@example("\x0b```\x0c")
@example("")
def test_nothing_gets_out_of_the_fence(said: str) -> None:
    parsed = tokens(forms.body(["ours"], said))
    fences = [token for token in parsed if token.type == "fence"]
    assert len(fences) == (1 if said else 0)
    assert not {"image", "link_open", "html_block", "html_inline", "heading_open"} & {t.type for t in parsed}
    # After our facts comes the fence, and nothing after it.
    if said:
        assert parsed[-1].type == "fence"
        assert all(c == "\n" or c.isprintable() for c in fences[0].content)


def test_a_readable_text_stays_as_it_is() -> None:
    said = "geo.find: calls 10 -> 20 (peak need 18)\n\ttenth of `them`"
    [fence] = [t for t in tokens(forms.body(["ours"], said)) if t.type == "fence"]
    assert fence.content == said.expandtabs(4) + "\n"


def test_what_is_long_is_cut_and_says_so() -> None:
    [fence] = [t for t in tokens(forms.fenced("x" * 10_000, cap=100)) if t.type == "fence"]
    assert fence.content == "x" * 100 + "\n… 9,900 more characters\n"


def test_our_facts_come_first() -> None:
    parsed = tokens(forms.body(["one fact", "another"], "```\n- theirs"))
    kinds = [token.type for token in parsed]
    assert kinds.index("bullet_list_open") < kinds.index("fence")
    assert [t.content for t in parsed if t.type == "inline"][:2] == ["one fact", "another"]


def test_an_option_names_its_plan() -> None:
    option = forms.label("Approve", SHA)
    assert option == "Approve #abababababab"
    assert forms.is_for(option, SHA)
    assert not forms.is_for(option, "cd" * 32)
    assert not forms.is_for("Approve", SHA)
    assert forms.unlabelled("replay draft #abababababab") == ("replay draft", "abababababab")


@pytest.mark.parametrize(
    ("user", "who"),
    [
        ({"id": "admin", "name": "admin"}, "admin"),
        ({"id": "7", "name": "Ada"}, "Ada (7)"),
        ({"id": "7", "name": ""}, "7"),
    ],
)
def test_who_answered_by_any_auth_manager(user: dict[str, str], who: str) -> None:
    assert forms.person(user, timed_out=False) == who


def test_nobody_answered() -> None:
    assert forms.person(None, timed_out=True) == "nobody"
    assert forms.person(None, timed_out=False) == "unknown"
