"""Finding entries by what they carry, whatever the value is encoded with."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.memory_rig import MemoryRig, failure

from dlq.cli.main import commands
from dlq.envelopes import JsonPath
from dlq.errors import ArchiveError
from dlq.ports import Connection
from dlq.search import Search, search
from dlq.selection import Selection

ORDER = {"order": {"id": 17, "lines": [{"sku": "lamp-3"}]}}
EVERYTHING = Selection(everything=True)


@pytest.fixture
def taken(queue: MemoryRig) -> MemoryRig:
    """Entries 0 to 5 in custody: JSON, the same in gzip, another order, a number only in a header, only in the key, and
    bytes that are no gzip although they begin so."""
    values: list[tuple[bytes, bytes]] = [
        (b"k", json.dumps(ORDER).encode()),
        (b"k", gzip.compress(json.dumps(ORDER).encode(), mtime=0)),
        (b"k", b'{"order": {"id": 18}}'),
        (b"k", b'{"order": {"id": 19}}'),
        (b"customer-17", b"{}"),
        (b"k", b"\x1f\x8b\x08 order 17"),
    ]
    for n, (key, value) in enumerate(values):
        more = [("tenant", b"t-17")] if n == 3 else []
        queue.log.append(0, key, value, [*failure(0), *more])
    queue.release(queue.taken())
    return queue


def look(rig: MemoryRig, text: str, path: str | None = None, most: int = 50, **chosen: Any) -> Search:
    selection = Selection(**chosen) if chosen else EVERYTHING
    at = JsonPath(path) if path else None
    return search(rig.config, selection, text, at, Connection, most, lambda _done, _of: None)


def places(found: Search) -> dict[str, str]:
    return {one.place: one.matched for one in found.found}


def test_it_is_found_in_key_header_and_value_however_encoded(taken: MemoryRig) -> None:
    found = look(taken, "17")
    assert places(found) == {
        "0/0": "value",
        "0/1": "value",
        "0/3": "header tenant",
        "0/4": "key",
        "0/5": "value",
    }
    assert (found.more, found.unread) == (False, 1)
    assert {one.state for one in found.found} == {"open"}


def test_at_a_path_only_the_whole_value_there_counts(taken: MemoryRig) -> None:
    assert places(look(taken, "17", "$.order.id")) == {"0/0": "value", "0/1": "value"}
    assert places(look(taken, "1", "$.order.id")) == {}
    assert places(look(taken, "lamp-3", "$.order.lines[0].sku")) == {"0/0": "value", "0/1": "value"}


def test_names_inside_the_value_are_found_too(taken: MemoryRig) -> None:
    assert places(look(taken, "sku")) == {"0/0": "value", "0/1": "value"}


def test_the_first_are_shown_and_that_there_are_more_is_said(taken: MemoryRig) -> None:
    found = look(taken, "17", most=2)
    assert (list(places(found)), found.more) == (["0/0", "0/1"], True)
    assert not look(taken, "17", most=5).more


def test_a_selection_narrows_it(taken: MemoryRig) -> None:
    assert places(look(taken, "17", entries=("0/1", "0/2"))) == {"0/1": "value"}


def test_bytes_that_changed_in_the_archive_are_not_searched(taken: MemoryRig) -> None:
    uri = taken.one("SELECT uri FROM segment")
    segment = Path(taken.config.archive) / taken.config.name / uri
    segment.write_bytes(segment.read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(ArchiveError):
        look(taken, "17")


def test_the_command_shows_no_payload(taken: MemoryRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlq.cli.options.load_queue", lambda _: taken.config)
    done = CliRunner().invoke(commands, ["find", taken.config.name, "lamp-3", "--json"])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["place"], line["matched"]) for line in lines] == [("0/0", "value"), ("0/1", "value")]
    assert "lamp-3" not in done.stdout
    none = CliRunner().invoke(commands, ["find", taken.config.name, "nowhere"])
    assert "nothing in custody carries it" in none.stdout
    wrong = CliRunner().invoke(commands, ["find", taken.config.name, "x", "--at", "order"])
    assert (wrong.exit_code, "names no single value" in wrong.output) == (2, True)
