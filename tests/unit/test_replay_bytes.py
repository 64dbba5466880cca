"""Take, archive, plan, replay: of any dead letter every byte arrives that is the record's own, in its order."""

from __future__ import annotations

from itertools import count

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.memory_rig import MemoryRig, failure

from dlq.entry import Headers
from dlq.envelopes import survives
from dlq.replay import drain_remaining

maybe = (
    st.none()
    | st.binary(max_size=40)
    | st.sampled_from([b"", b"\x00", b"\xff\xfe", b"\x00\x00\x00\x00\x07x"])
)
names = st.text(max_size=12) | st.sampled_from(
    ["x-tenant", "X-Tenant", "", "content-type", "tracestate", "é"]
)
own = st.lists(st.tuples(names.filter(survives), maybe), max_size=6).map(tuple)
letters = st.lists(st.tuples(maybe, maybe, own, own), min_size=1, max_size=12)
runs = count()
places = count()


@settings(
    max_examples=10,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # an example is a whole drain: too dear to be made smaller
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(letters)
def test_any_dead_letter_arrives_byte_for_byte(
    queue: MemoryRig, some: list[tuple[bytes | None, bytes | None, Headers, Headers]]
) -> None:
    queue.consumer()
    wanted: dict[str, tuple[object, ...]] = {}
    for key, value, first, then in some:
        failed = failure(next(places))
        headers = (*first, *failed, *then)  # one hop's headers between the record's own
        part = len(wanted) % queue.log.partitions
        at = queue.log.append(part, key, value, headers)
        kept = tuple(header for header in headers if survives(header[0]))
        wanted[f"{part}/{at}"] = (key, value, kept, queue.log.read(part, at, at + 1)[0].timestamp_ms)
    drain = queue.taken(run=f"run {next(runs)}")
    drain_remaining(drain, 60)
    queue.release(drain)
    found = {}
    for record in queue.delivered():
        entry = (dict(record.headers)["dlq-entry"] or b"").decode()
        theirs = tuple(header for header in record.headers if not header[0].startswith("dlq-"))
        place = "/".join(entry.rsplit("/", 2)[1:])
        if place in wanted:  # and of no earlier example
            found[place] = (record.key, record.value, theirs, record.timestamp_ms)
    assert found == wanted
