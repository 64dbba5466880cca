"""JSON Patch on payloads: RFC 6902, one patch for many documents, and a diff that shows no value unasked."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlq.codecs import CodecError, json_text
from dlq.errors import ConfigError
from dlq.patch import Patch, changes

SECRET = "4111-1111-secret"


def patch(*operations: dict[str, Any]) -> Patch:
    return Patch(json.dumps(operations).encode())


def op(name: str, path: str, **more: Any) -> dict[str, Any]:
    return {"op": name, "path": path, **more}


@pytest.mark.parametrize(
    ("operations", "before", "after"),
    [
        ([op("add", "/b", value=2)], {"a": 1}, {"a": 1, "b": 2}),
        ([op("add", "/a/-", value=3)], {"a": [1]}, {"a": [1, 3]}),
        ([op("add", "/a/0", value=3)], {"a": [1]}, {"a": [3, 1]}),
        ([op("remove", "/a~1b")], {"a/b": 1, "c": 2}, {"c": 2}),
        ([op("replace", "/a", value="x")], {"a": 1}, {"a": "x"}),
        ([op("replace", "", value=[1])], {"a": 1}, [1]),
        ([op("replace", "", value="new")], "old", "new"),
        ([{"op": "move", "from": "/a", "path": "/b"}], {"a": 1}, {"b": 1}),
        ([{"op": "copy", "from": "/a", "path": "/b"}], {"a": [1]}, {"a": [1], "b": [1]}),
        ([op("test", "/a", value=1), op("remove", "/a")], {"a": 1}, {}),
        ([op("add", "/a", value={}), op("add", "/a/b", value=1)], {}, {"a": {"b": 1}}),
        ([op("replace", "/#a", value=2)], {"#a": 1}, {"#a": 2}),
        ([op("replace", "/\\u0041", value=2)], {"\\u0041": 1}, {"\\u0041": 2}),
    ],
)
def test_operations_do_what_rfc_6902_says(operations: list[dict[str, Any]], before: Any, after: Any) -> None:
    made, kept = patch(*operations), copy.deepcopy(before)
    for _ in range(2):
        assert made.apply(before) == after
    assert before == kept, "the document given is not touched"


@pytest.mark.parametrize(
    ("operations", "document", "why"),
    [
        ([op("test", "/a", value=1)], {"a": True}, r"operation 1 .test /a.: another value"),
        (
            [op("test", "", value=[{"b": 0}])],
            [{"b": False}],
            r"operation 1 .test the document.: another value",
        ),
        ([op("remove", "/b")], {"a": 1}, r"operation 1 .remove /b.: there is no such place"),
        ([op("replace", "/a/b", value=1)], {"a": SECRET}, "operation 1"),
        ([op("add", "/a/5", value=1)], {"a": []}, "operation 1"),
        ([op("add", "/a/x", value=1)], {"a": [SECRET]}, "operation 1"),
        ([op("add", "/a", value=1), op("test", "/a", value=2)], {}, r"operation 2 .test /a.: another value"),
        ([op("test", "/a", value=SECRET)], {"a": SECRET + "!"}, "another value is there"),
        ([op("test", "/a", value=None)], {}, "another value"),
        ([{"op": "move", "from": "/a", "path": "/a/b"}], {"a": {}}, "operation 1"),
        ([{"op": "copy", "from": "/x", "path": "/a"}], {}, r"operation 1 .copy /x to /a."),
        ([op("replace", "/a", value=1)], SECRET, "operation 1"),
        ([op("replace", "/a", value=1)], None, "operation 1"),
        ([op("remove", "")], {"a": 1}, "removes the whole document"),
    ],
)
def test_what_can_not_be_done_names_the_operation_and_no_payload(
    operations: list[dict[str, Any]], document: Any, why: str
) -> None:
    with pytest.raises(CodecError, match=why) as error:
        patch(*operations).apply(document)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"[", "not JSON"),
        (b'[{"op": "add", "op": "remove", "path": "/a"}]', "names a member twice"),
        (b"{}", "list of operations"),
        (b"[]", "list of operations"),
        (b"[1]", "operation 1: op must be one of"),
        (b'[{"op": "addap", "path": "/a", "value": 1}]', "op must be one of"),
        (b'[{"op": "remove"}]', "path must be a JSON Pointer"),
        (b'[{"op": "remove", "path": "a"}]', "operation 1: path must be"),
        (b'[{"op": "move", "path": "/a"}]', "from must be"),
        (b'[{"op": "remove", "path": "/a"}, {"op": "add", "path": "/a"}]', "operation 2: add needs a value"),
    ],
)
def test_a_wrong_patch_names_its_operation(text: bytes, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Patch(text)


def test_a_diff_shows_kinds_and_the_patch_s_own_words_or_the_values_when_asked() -> None:
    before = {"name": SECRET, "lines": [{"n": 1}], "gone": True, SECRET: 1}
    after = {"name": 5, "lines": [{"n": 2}, {"n": 3}], SECRET: None}
    made = patch(op("replace", "/lines/0/n", value=2), op("remove", "/gone"))
    redacted = [change.redacted(made.named) for change in changes(before, after)]
    assert redacted == [
        ("/*", f"text of {len(SECRET)}", "a number"),
        ("/lines/0/n", "a number", "a number"),
        ("/lines/*", "nothing", "an object of 1"),
        ("/gone", "true or false", "nothing"),
        ("/*", "a number", "null"),
    ]
    assert SECRET not in str(redacted)
    assert [change.plain() for change in changes(before, after)][:2] == [
        ("/name", f'"{SECRET}"', "5"),
        ("/lines/0/n", "1", "2"),
    ]
    assert [c.plain() for c in changes("a", "b")] == [("the document", '"a"', '"b"')]
    assert list(changes(json_text.loads(b"1.0"), json_text.loads(b"1.0"))) == []
    assert [c.plain() for c in changes({"a": True}, {"a": 1})] == [("/a", "true", "1")]


_DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)
_POINTERS = st.lists(st.text(max_size=2) | st.sampled_from(["-", "0", "1"]), max_size=3).map(
    lambda parts: "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)
)


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "op": st.sampled_from(["add", "remove", "replace", "move", "copy", "test"]),
                "path": _POINTERS,
                "from": _POINTERS,
                "value": _DOCUMENTS,
            }
        ),
        min_size=1,
        max_size=3,
    ),
    _DOCUMENTS,
)
def test_any_patch_of_any_document_is_done_or_refused(
    operations: list[dict[str, Any]], document: Any
) -> None:
    try:
        text = json.dumps(operations).encode()
        made = Patch(text)
    except ConfigError:  # half a surrogate pair
        return
    kept = copy.deepcopy(document)
    try:
        after = made.apply(document)
    except CodecError:
        after = document
    assert document == kept
    json.dumps(after)


@pytest.mark.parametrize("depth", [600, 900])
def test_a_document_nested_too_deep_is_refused_and_ends_nothing(depth: int) -> None:
    """JSON of that depth can be read: one such payload must not end the repair of its group."""
    document = json_text.loads(b'{"a":' * depth + b"1" + b"}" * depth)
    with pytest.raises(CodecError, match="nested too deep"):
        patch(op("add", "/b", value=1)).apply(document)
