"""A compacted target on a real broker: what a newer record of its key has overtaken is held; when entries expire."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.integration.rig import Rig, failure

from dlq.intake import take_custody
from dlq.replay import replay_canary
from dlq.status import status
from dlq.triage import categorize

DAY_MS = 86_400_000


def test_a_stale_entry_is_held_and_the_plan_says_up_to_where_that_was_checked(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(
        parts=1,
        target={"allow_compacted": True},
        origin_config={"cleanup.policy": "compact"},
        dlq_config={"retention.ms": str(DAY_MS)},
    )
    rig.begin()
    rig.consumer()
    first = rig.produce(rig.origin, [(b"k", b"1", []), (b"other", b"1", []), (b"k", b"2", [])])
    letters = [
        (key, value, failure(n, "TransientNetwork", topic=rig.origin, part=part, offset=offset))
        for n, ((key, value), (part, offset)) in enumerate(
            zip([(b"k", b"1"), (b"other", b"1"), (b"k", b"2")], first, strict=True)
        )
    ]
    rig.produce(rig.dlq, letters)
    before = time.time()
    waiting = status(rig.config, rig.connections)["first_to_expire"]
    assert waiting["in_custody"] is None
    assert waiting["in_queue"] > time.strftime("%Y-%m-%dT%H:%M", time.gmtime(before + 86_400 - 120))
    drain = rig.open()

    take_custody(drain, 60)
    categorize(drain)
    said = replay_canary(drain, "retry_transient", 60)
    assert said["passed"]
    reasons = rig.sql("SELECT reason, COUNT(*) AS n FROM entry WHERE state = 'open' GROUP BY reason")
    assert [(r.reason, r.n) for r in reasons] == [("newer_of_its_key", 1)]
    (saw,) = rig.sql("SELECT saw FROM decision WHERE kind = 'replay'")
    assert "1 of 3 entries held" in saw.saw
    assert f"checked to {first[0][0]}/" in saw.saw
    sent = [s for s in rig.log(rig.origin) if s.header("dlq-entry")]
    assert sorted((s.key, s.value) for s in sent) == [(b"k", b"2"), (b"other", b"1")]
    (expiry,) = rig.sql("SELECT MIN(expires_at) AS at FROM entry")
    assert expiry.at == waiting["in_queue"]


def test_a_pointer_is_completed_from_a_topic_that_may_be_read(make_rig: Callable[..., Rig]) -> None:
    """Share groups write no payload (KIP-1191); what is gone, or not allowed, stays a pointer."""
    rig = make_rig(parts=1)
    rig.begin()
    values = [b"v%d" % n for n in range(300)]
    places = rig.produce(rig.origin, [(b"k%d" % n, value, []) for n, value in enumerate(values)])
    rig.delete_records(rig.origin, {0: 100})

    def letter(topic: str, part: int, offset: int) -> tuple[None, None, list[tuple[str, bytes | None]]]:
        said = {"topic": topic, "partition": str(part), "offset": str(offset), "group": "share"}
        return None, None, [(f"__dlq.errors.{name}", value.encode()) for name, value in said.items()]

    wanted = [3, 100, 101, 299, 300]
    there = [letter(rig.origin, 0, n) for n in wanted]
    rig.produce(rig.dlq, [*there, letter(rig.origin, 7, 1), letter(rig.dlq, 0, 0)])
    drain = rig.open()
    take_custody(drain, 60)
    assert places[100] == (0, 100)
    rows = rig.sql("SELECT place, reason, row_no FROM entry ORDER BY pos")
    assert [row.reason == "pointer" for row in rows] == [True, False, False, False, True, True, True]
    (segment,) = rig.sql("SELECT uri FROM segment")
    stored = drain.archive.read(segment.uri, ["value"])["value"].to_pylist()
    assert [stored[row.row_no] for row in rows[1:4]] == [values[100], values[101], values[299]]
