from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from sqlalchemy import Connection, insert, update

from dlq import clock
from dlq.config import QueueConfig
from dlq.drain import Drain
from dlq.errors import DlqError
from dlq.ledger import Ledger, insert_rows, lease, schema
from dlq.ports import Connection as SystemConnection
from dlq.report.write import build_report, duration, render, summarise, write_report

BEGAN = datetime(2026, 11, 24, 3, 2, 11, tzinfo=UTC)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'&{{ 7*7 }} password=hunter2"
ENTRY = (
    "queue",
    "source",
    "part",
    "place",
    "pos",
    "taken_drain",
    "segment",
    "row_no",
    "payload_sha",
    "size",
    "state",
    "reason",
    "grp",
    "owner",
    "work",
    "job",
    "settled_drain",
    "correlation_id",
    "failed_at",
    "expires_at",
)


def at(seconds: float) -> str:
    return clock.iso(BEGAN + timedelta(seconds=seconds))


def nowhere(connection: str) -> SystemConnection:
    raise AssertionError(f"a report asks nobody, not even {connection}")


class World:
    """A queue's ledger with one drain of it, to which a test adds what it needs."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        url = url or f"sqlite:///{folder}/ledger.db"
        self.ledger = Ledger.create(url)
        self.config = QueueConfig.model_validate(
            {
                "name": "orders",
                "source": {"kind": "memory"},
                "target": {"kind": "memory"},
                "ledger": url,
                "archive": str(folder / "archive"),
                "report": str(folder / "reports"),
            }
        )
        self.places = 0
        earlier = self._open("orders-earlier")
        self.put(schema.source, id=1, queue="orders", uri="memory:orders", seen_at=at(-9000))
        self.put(schema.segment, id=1, queue="orders", uri="s", sha256="0", rows=0, kind="intake")
        lease.release(self.ledger, "orders", "orders-earlier", earlier, "green")

    def _open(self, identity: str) -> int:
        return lease.acquire(
            self.ledger,
            "orders",
            identity,
            run_id=f"run of {identity}",
            kind="drain",
            seconds=60,
            config=self.config.model_dump_json(),
        )

    def drain(self) -> Drain:
        epoch = self._open("orders-now")
        with self.ledger.write("orders", None) as tx:
            tx.execute(update(schema.drain).where(schema.drain.c.id == "orders-now").values(opened_at=at(0)))
        return Drain("orders-now", self.config, self.ledger, nowhere, epoch=epoch)

    def put(self, table: Any, **values: Any) -> None:
        with self.ledger.write("orders", None) as tx:
            tx.execute(insert(table).values(**values))

    def group(self, number: int, signature: str = "RateLimit: HTTP 429 @ crm.sync", **changed: Any) -> None:
        values = {
            "id": number,
            "queue": "orders",
            "fingerprint": f"v1:{number:016x}",
            "signature": signature,
            "component": "crm.sync",
            "error_type": "RateLimit",
            "category": "transient",
            "remedy": "retry",
            "rule": "rate limit",
            "format": "orchestrator",
            "owner": "on-call",
            **changed,
        }
        self.put(schema.grp, **values)

    def job(self, number: int, size: int, **changed: Any) -> str:
        plan = f"orders-now.p{number}"
        self.put(
            schema.plan,
            id=plan,
            queue="orders",
            drain="orders-now",
            stage="retry_transient",
            hash=f"hash{number}" * 8,
            proposed_at=at(number),
            expires_at=at(900),
        )
        values = {
            "id": f"orders-now.{number}",
            "queue": "orders",
            "plan": plan,
            "drain": "orders-now",
            "kind": "replay",
            "target": "orders",
            "size": size,
            "cursor": size,
            "state": "closed",
            "ended": "done",
            **changed,
        }
        self.put(schema.job, **values)
        return str(values["id"])

    def entries(self, count: int, **given: Any) -> None:
        """``count`` entries: by default taken by this drain, open, of group 1."""
        values = {
            "taken": "orders-now",
            "state": "open",
            "reason": "waiting_for_person",
            "grp": 1,
            "owner": None,
            "work": None,
            "job": None,
            "settled": None,
            "failed_at": at(-60),
            "expires_at": None,
            **given,
        }
        first, self.places = self.places, self.places + count
        rows = (
            (
                "orders",
                1,
                0,
                str(n),
                n,
                values["taken"],
                1,
                n,
                "sum",
                100,
                values["state"],
                values["reason"],
                values["grp"],
                values["owner"],
                values["work"],
                values["job"],
                values["settled"],
                f"wf-{n}",
                values["failed_at"],
                values["expires_at"],
            )
            for n in range(first, self.places)
        )
        with self.ledger.write("orders", None) as tx:
            insert_rows(tx, schema.entry, ENTRY, rows)

    def note(self, when: float, stage: str, text: str, level: str = "info", **data: Any) -> None:
        self.put(
            schema.event,
            drain="orders-now",
            at=at(when),
            stage=stage,
            level=level,
            text=text,
            data=json.dumps(data),
        )

    def close(self, verdict: str, seconds: float = 300) -> None:
        closed = {"closed_at": at(seconds), "verdict": verdict, "phase": "closed"}
        with self.ledger.write("orders", None) as tx:
            tx.execute(update(schema.drain).where(schema.drain.c.id == "orders-now").values(**closed))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.ledger.close()


def incident(world: World, signature: str = "RateLimit: HTTP 429 @ crm.sync") -> Drain:
    """5 open before; 100 taken: 80 confirmed, 6 without outcome, 4 returned, 3 discarded, 7 open."""
    world.group(1, signature)
    world.group(
        2,
        "DataCorruption: bad <value> @ orders.parse",
        component="orders.parse",
        error_type="DataCorruption",
        category="manual",
        remedy="edit",
        rule="corrupt data",
        owner="data-team",
    )
    world.entries(5, taken="orders-earlier", grp=2)
    drain = world.drain()
    job = world.job(1, 90)
    sent = {"job": job, "settled": drain.id, "reason": "sent"}
    world.entries(80, state="confirmed", **sent)
    world.entries(6, state="replayed", **sent)
    world.entries(4, state="returned", **sent)
    world.entries(3, state="discarded", settled=drain.id, grp=2)
    world.put(
        schema.work, id=8, queue="orders", grp=2, reason="waiting_for_person", owner="desk", opened_at=at(200)
    )
    world.entries(6, grp=2, work=8, expires_at=at(5000))
    world.entries(1, grp=1, reason="returns_limit", owner="crm-team", expires_at=at(4000))
    with world.ledger.write("orders", None) as tx:
        for ordinal in range(90):
            tx.execute(insert(schema.delivery).values(job=job, ordinal=ordinal, sent_at=at(60 + ordinal)))
    world.note(20, "take_custody", "100 taken into custody", taken=100, seconds=12.5)
    world.note(
        25,
        "find_root_cause",
        "crm.sync",
        suspects=[{"component": "crm.sync", "said": "crm.sync: 95 % of all"}],
    )
    world.note(150, "replay_batches", "90 replayed", job=job, confirmed=80, returned=4)
    world.note(200, "drain_remaining", "1 round", taken=0, confirmed=80, returned=4, depth=2)
    world.put(
        schema.decision,
        id=1,
        queue="orders",
        at=at(50),
        who="policy:orders.yaml@abc",
        kind="plan",
        subject="orders-now.p1",
        saw="hash1 90 entries",
        choice="approve",
        drain=drain.id,
    )
    for part, again, vanished in ((0, 0, 0), (1, 3, 2)):
        for number in (1, 2):
            world.put(
                schema.intake,
                source=1,
                part=part,
                round=number,
                drain=drain.id,
                from_pos=100 * number,
                cutoff=100 * number + 100,
                to_pos=100 * number + 100,
                again=again,
                vanished_max=vanished,
            )
    return drain


def proven(world: World) -> None:
    world.note(
        260,
        "verify_conservation",
        "no law is broken",
        proven=True,
        broken=[],
        witnesses={"log": "400 records recounted", "archive": "1 segment", "target": "not witnessed"},
        expectations=[
            {"frame": "open", "expectation": "every open entry says why", "success": True, "found": ""}
        ],
    )


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_account_adds_up_and_is_told_apart_by_state(world: World):
    n = build_report(incident(world)).numbers
    assert (n.open_before, n.taken, n.settled, n.unsettled) == (5, 100, 93, 12)
    assert n.balanced
    assert (n.confirmed, n.unconfirmed, n.returned, n.replayed) == (80, 6, 4, 90)
    assert (n.duplicate, n.discarded, n.handed_back) == (0, 3, 0)
    assert n.success == pytest.approx(80 / 84)
    assert n.depth == 2


def test_an_account_that_does_not_add_up_says_so(world: World):
    drain = incident(world)
    world.entries(
        1, taken="orders-earlier", grp=2
    )  # a row nobody took, in none of the drain's numbers before
    data = build_report(drain)
    assert not data.numbers.balanced
    assert "≠" in summarise(data)
    assert "does not add up" in render(data)


def test_groups_are_counted_by_what_became_of_them(world: World):
    first, second = build_report(incident(world)).groups
    assert (first.id, first.total, first.taken) == (1, 91, 91)
    assert (first.confirmed, first.unconfirmed, first.returned, first.aside, first.open) == (80, 6, 4, 0, 1)
    assert (second.id, second.total, second.taken, second.aside, second.open) == (2, 14, 9, 3, 11)
    assert first.example is not None
    assert first.example.startswith("wf-")


def test_what_is_open_has_its_reason_owner_and_work(world: World):
    data = build_report(incident(world))
    assert [(o.count, o.owner, o.reason, o.work) for o in data.open] == [
        (6, "desk", "waiting_for_person", 8),
        (5, "data-team", "waiting_for_person", None),
        (1, "crm-team", "returns_limit", None),
    ]
    assert data.open_by_owner == {"desk": 6, "data-team": 5, "crm-team": 1}
    assert data.dies_first == at(4000)
    assert data.open[0].first_expiry == at(5000)


def test_jobs_decisions_stages_and_ranges_are_there(world: World):
    data = build_report(incident(world))
    (job,) = data.jobs
    assert (job.size, job.cursor, job.confirmed, job.unconfirmed, job.returned, job.ended) == (
        90,
        90,
        80,
        6,
        4,
        "done",
    )
    (decided,) = data.decisions
    assert (decided.who, decided.choice) == ("policy:orders.yaml@abc", "approve")
    assert [(s.name, s.seconds) for s in data.stages] == [
        ("take_custody", 12.5),
        ("find_root_cause", 5.0),
        ("replay_batches", 125.0),
        ("drain_remaining", 50.0),
    ]
    assert [(i.part, i.rounds, i.from_pos, i.to_pos, i.again, i.vanished_max) for i in data.intake] == [
        (0, 2, 100, 300, 0, 0),
        (1, 2, 100, 300, 6, 4),
    ]
    assert data.vanished_max == 4


def test_the_timeline_never_shows_more_than_the_ledger_has(world: World):
    drain = incident(world)
    world.note(210, "take_custody", "the same, said again by a second try", taken=100)
    world.close("green")
    points = build_report(drain).timeline
    last = points[-1]
    assert (last.at, last.taken, last.replayed, last.confirmed, last.returned) == (at(300), 100, 90, 80, 4)
    for before, after in pairwise(points):
        assert before.at <= after.at
        assert before.taken <= after.taken <= 100
        assert before.replayed <= after.replayed <= 90
    halfway = next(p for p in points if p.at >= at(105))
    assert 40 <= halfway.replayed <= 55
    assert halfway.confirmed == 0


def test_a_green_drain_leads_with_it(world: World):
    drain = incident(world)
    proven(world)
    world.close("green")
    html = render(build_report(drain))
    assert "<h1>Green: done, and proven</h1>" in html
    lead = "100 dead letters were taken into custody, 90 replayed "
    lead += "(80 did well, 4 came back, 6 have no outcome yet), "
    assert (
        lead + "3 settled without a replay and 12 open, with desk (6), data-team (5) and crm-team (1)."
        in html
    )
    assert (
        html.index("What broke")
        < html.index("What was done")
        < html.index("What is still open")
        < html.index("The proof")
    )
    assert "crm.sync: 95 % of all" in html
    assert "#8" in html
    assert "At most 4 entries vanished" in html
    assert "400 records recounted" in html


def test_a_red_drain_names_the_broken_laws_and_the_reasons(world: World):
    drain = incident(world)
    broken = [
        {"law": "range gap or overlap", "what": "1/0", "n": 7},
        {"law": "range gap or overlap", "what": "1/1", "n": 9},
    ]
    world.note(
        260,
        "verify_conservation",
        "NOT PROVEN",
        "error",
        proven=False,
        broken=broken,
        witnesses={},
        expectations=[],
    )
    world.note(270, "close_drain", "red", "error", reasons=["conservation is not proven"])
    world.close("red")
    data = build_report(drain)
    html = render(data)
    assert "<h1>Red: 1 law of conservation broken</h1>" in html
    assert "<li>conservation is not proven</li>" in html
    assert "BROKEN (range gap or overlap)" in summarise(data)
    assert "because: conservation is not proven" in summarise(data)


def test_a_drain_without_a_proof_is_never_called_proven(world: World):
    drain = incident(world)
    world.close("red")
    data = build_report(drain)
    html = render(data)
    assert data.proof.proven is None
    assert "Red: nothing is proven" in html
    assert "the check did not run" in html
    assert "UNPROVEN" in summarise(data)


def test_a_drain_that_still_runs_says_where_it_is(world: World):
    assert "Not closed: in opened" in render(build_report(incident(world)))


def test_an_empty_drain_reads_well_too(world: World):
    drain = world.drain()
    data = build_report(drain)
    assert data.numbers.success is None
    html = render(data)
    assert "0 dead letters were taken into custody and none open." in html
    assert "No entry was taken" in html
    assert "<svg" not in html


def test_what_a_dead_letter_says_is_text_and_nothing_else(world: World):
    drain = incident(world, HOSTILE)
    world.note(30, "categorize", HOSTILE, "warning", suspects=[])
    world.note(31, "find_root_cause", "?", suspects=[{"component": HOSTILE, "said": HOSTILE}])
    html = render(build_report(drain))
    tags = Tags(html).tags
    assert "&lt;script&gt;alert(1)" in html
    assert "{{ 7*7 }}" in html
    assert "hunter2" not in html
    assert not {tag for tag, _ in tags} & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "link",
        "form",
        "a",
        "base",
    }
    for _, attributes in tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in {"href", "src", "style", "srcdoc"}
        ]


def test_a_hostile_group_name_stays_text_in_the_plot(world: World):
    world.group(1, error_type="</text><script>", component="]]>&<svg onload=x>")
    drain = world.drain()
    world.entries(1)
    bars = re.search(r"<svg.*?</svg>", render(build_report(drain)), re.DOTALL)
    assert bars is not None
    root = ElementTree.fromstring(bars[0])
    assert {element.tag.rpartition("}")[2] for element in root.iter()} <= {
        "svg",
        "g",
        "path",
        "line",
        "rect",
        "text",
        "title",
    }


def test_the_page_is_self_contained_and_allows_no_script(world: World):
    html = render(build_report(incident(world)))
    tags = Tags(html).tags
    policy = next(
        a["content"] for tag, a in tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.findall(r"(?:src|href|url\()\s*=?\s*[\"']?(?:https?:)?//", html)
    assert html.count("<svg") == 2


def test_no_address_or_secret_of_the_configuration_is_shown(world: World, tmp_path: Path):
    drain = incident(world)
    text = render(build_report(drain)) + json.dumps(build_report(drain).policy)
    assert str(tmp_path) not in text
    assert "sqlite" not in text


def test_the_files_are_written_side_by_side_and_again(world: World, tmp_path: Path):
    drain = incident(world)
    proven(world)
    world.close("green")
    first = write_report(drain)
    again = write_report(drain)
    assert first["html"] == again["html"] == str(tmp_path / "reports" / "orders-now.html")
    assert sorted(p.name for p in (tmp_path / "reports").iterdir()) == ["orders-now.html", "orders-now.json"]
    said = json.loads((tmp_path / "reports" / "orders-now.json").read_text())
    assert said["schema"] == "dlq-report/1"
    assert said["numbers"]["confirmed"] == 80
    assert said["proof"]["witnesses"]["target"] == "not witnessed"
    assert Path(first["html"]).read_text().startswith("<!doctype html>")
    assert [note.stage for note in build_report(drain).notes].count("write_report") == 2


def test_an_object_store_will_do(world: World):
    world.config = world.config.model_copy(update={"report": "memory://reports"})
    drain = incident(world)
    written = write_report(drain)
    assert written["json"].startswith("memory://")
    from upath import UPath

    assert json.loads(UPath(written["json"]).read_text())["drain"] == "orders-now"


def test_the_summary_is_a_dozen_plain_lines_at_most(world: World):
    drain = incident(world)
    proven(world)
    for number in range(10, 40):
        world.group(number, f"Odd\x1b[31m\nError {HOSTILE} @ c{number}")
        world.entries(1, grp=number)
    world.note(270, "close_drain", "red", reasons=["one", "two", "three"])
    world.close("red")
    lines = summarise(build_report(drain)).split("\n")
    assert len(lines) == 12
    assert lines[0] == "drain of orders: RED after 5 min 00 s (orders-now)"
    assert lines[1] == "taken 130, replayed 90: confirmed 80, returned 4, no outcome 6"
    assert lines[2] == "drain success 95.24 % (asked 99 %)"
    assert lines[3] == "conservation proven: open before 5 + taken 130 = settled 93 + unsettled 42"
    assert lines[-1].strip() == "30  more, in the report"
    assert all(line.isprintable() for line in lines)


def test_a_dry_run_writes_nothing(world: World, tmp_path: Path):
    drain = Drain("orders-dry", world.config, world.ledger, nowhere, epoch=-1, dry_run=True)
    assert write_report(drain)["html"] is None
    assert not (tmp_path / "reports").exists()


def test_a_drain_the_ledger_does_not_know_is_said(world: World):
    drain = Drain("orders-other", world.config, world.ledger, nowhere, epoch=1)
    with pytest.raises(DlqError, match="no drain orders-other"):
        build_report(drain)


def test_many_notes_and_groups_are_cut_and_said_to_be(world: World):
    drain = incident(world)
    with world.ledger.write("orders", None) as tx:
        _many(tx)
    data = build_report(drain)
    html = render(data)
    assert data.note_count > 3000
    assert len(data.notes) < 2000
    assert any(note.level == "error" for note in data.notes)
    assert "the needle" in html
    assert data.group_count == 302
    assert len(data.groups) == 100
    assert "277 smaller groups are not shown" in html
    assert len(html) < 600_000


def _many(tx: Connection) -> None:
    notes = [(f"step {n}", "info") for n in range(3000)]
    notes[1500] = ("the needle", "error")
    tx.execute(
        insert(schema.event),
        [
            {"drain": "orders-now", "at": at(40), "stage": "s", "level": lv, "text": t, "data": "{}"}
            for t, lv in notes
        ],
    )
    groups = [
        {
            "id": n,
            "queue": "orders",
            "fingerprint": f"v1:{n}",
            "signature": f"E{n}",
            "component": "c",
            "error_type": "E",
            "category": "unknown",
            "remedy": "manual",
            "rule": "no rule",
            "format": "unknown",
            "owner": "o",
        }
        for n in range(10, 310)
    ]
    tx.execute(insert(schema.grp), groups)
    rows = [
        (
            "orders",
            1,
            1,
            str(n),
            n,
            "orders-now",
            1,
            n,
            "sum",
            1,
            "open",
            "new",
            n,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
        )
        for n in range(10, 310)
    ]
    insert_rows(tx, schema.entry, ENTRY, rows)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "–"),
        (0.04, "< 0.1 s"),
        (0.06, "0.1 s"),
        (9.94, "9.9 s"),
        (59.6, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3720, "1 h 02 min"),
    ],
)
def test_durations(seconds: float | None, said: str):
    assert duration(seconds) == said


def test_postgres_counts_as_sqlite_does(world: World, tmp_path: Path, postgres_url: str):
    other = World(tmp_path, postgres_url)
    for each in (world, other):
        incident(each)
        proven(each)
        each.close("green")
    one, two = (
        build_report(Drain("orders-now", w.config, w.ledger, nowhere, epoch=2)) for w in (world, other)
    )
    other.ledger.close()
    for field in one.__struct_fields__:
        if field not in {
            "made_at",
            "incident",
            "policy",
        }:  # times of now, and the configurations name their ledgers
            assert getattr(one, field) == getattr(two, field), field


@pytest.mark.slow
def test_a_million_entries_are_counted_in_the_ledger(world: World, capsys: pytest.CaptureFixture[str]):
    world.group(1)
    drain = world.drain()
    job = world.job(1, 900_000)
    world.entries(900_000, state="confirmed", job=job, settled=drain.id)
    world.entries(100_000)
    began = time.monotonic()
    data = build_report(drain)
    took = time.monotonic() - began
    with capsys.disabled():
        print(f"\nreport of 1,000,000 entries: counted in {took:.1f} s")
    assert (data.numbers.confirmed, data.numbers.unsettled) == (900_000, 100_000)
    assert took < 60
