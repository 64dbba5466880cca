"""From one transport to the other: a job doesn't care where its letters lay, nor where they go."""

from __future__ import annotations

from collections.abc import Callable

from tests.integration.rig import TRANSIENT
from tests.integration.sqs_rig import SqsRig

from dlq.intake import take_custody
from dlq.replay import drain_remaining
from dlq_demo.broker import Broker

Make = Callable[..., SqsRig]


def test_an_sqs_queue_is_drained_into_a_topic(make_sqs_rig: Make, broker: Broker) -> None:
    rig = make_sqs_rig(bootstrap=broker.bootstrap, kafka_origin=True)
    rig.begin()
    consumer = rig.consumer()
    rig.letters(120)
    drain = rig.open()
    take_custody(drain, 60)
    rig.check_custody()
    rig.replay(drain)
    drain_remaining(drain, 60)
    consumer.stop()
    assert rig.states() == {"confirmed": 120}
    seen = rig.effects()
    assert sorted((s.value or b"").decode() for s in seen) == sorted(
        body for body, _ in rig.lettered.values()
    )
    for one in seen:
        body, attributes = rig.lettered[(one.header("dlq-entry") or "").rpartition("/")[2]]
        assert (one.value or b"").decode() == body
        blob = dict(one.headers or ())["blob"]
        assert blob == attributes["blob"]["BinaryValue"]
        assert one.header("size") == attributes["size"]["StringValue"]
    assert set(consumer.effects.values()) == {1}
    proof, _ = rig.check_same_figures(drain)
    assert "120 replays found" in proof.witnesses["target"]
    assert "not witnessed" in proof.witnesses["log"]


def test_a_topic_is_drained_into_an_sqs_queue(make_sqs_rig: Make, broker: Broker) -> None:
    rig = make_sqs_rig(bootstrap=broker.bootstrap, kafka_dlq=True)
    rig.begin()
    receiver = rig.receiver()
    super(SqsRig, rig).letters(120, kinds=TRANSIENT)
    odd = [(b"k", b"\x00\xff no text", [("wf-error-type", b"TransientNetwork")])]
    binary = [(b"k", b"text", [("wf-error-type", b"TransientNetwork"), ("raw", b"\xff\x00")])]
    rig.produce(rig.dlq, [*odd, *binary])
    drain = rig.open()
    take_custody(drain, 60)
    rig.replay(drain)
    drain_remaining(drain, 60)
    receiver.settle()
    assert rig.states() == {"confirmed": 121, "open:body_is_no_text": 1}
    dead = {f"{s.part}/{s.offset}": s for s in rig.log(rig.dlq)}
    for one in receiver.arrived:
        assert one.mark is not None
        letter = dead["/".join(one.mark["entry"].split("/")[-2:])]
        assert one.body.encode() == letter.value
        ours = {k: a.get("StringValue", "").encode() or a["BinaryValue"] for k, a in one.attributes.items()}
        del ours["dlq"]
        theirs = {k: v for k, v in letter.headers or () if not k.startswith("wf-")}
        assert ours == theirs
    assert len(receiver.arrived) == len(receiver.effects) == 121
    proof, _ = rig.check_same_figures(drain)
    assert "122 records recounted" in proof.witnesses["log"]
