"""What must hold of SQS without a server: calls nobody may make, what a call may hold, what came damaged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.parsers import ResponseParserError
from botocore.stub import Stubber

from dlq import aws, expiry, mark, sqs
from dlq.config import SqsSource, SqsTarget
from dlq.errors import ConfigError, Refused, SourceError
from dlq.ports import Connection, Output
from dlq.sources.sqs import SqsDlq, SqsPass, recorded
from dlq.targets.sqs import SqsReplay, SqsSender, _packed

ROOT = Path(__file__).resolve().parents[2]
ARN = "arn:aws:sqs:eu-north-1:000000000000:orders"
HERE = Connection("aws", "aws", login="any", password="any", extra={"region_name": "eu-north-1"})
FORBIDDEN = ("SqsSensor", "MessageQueueTrigger", "purge_queue", "PurgeQueue", "delete_queue", "DeleteQueue")
DEMO = ROOT / "include" / "dlq_demo"  # sets up and takes down queues of its own


def _sources() -> list[Path]:
    found = [path for folder in ("dags", "plugins", "include") for path in (ROOT / folder).rglob("*.py")]
    return [path for path in found if DEMO not in path.parents]


def test_there_is_something_to_look_at() -> None:
    assert len(_sources()) > 100


@pytest.mark.parametrize("name", FORBIDDEN)
def test_nothing_consumes_empties_or_deletes_a_queue(name: str) -> None:
    """SqsSensor and MessageQueueTrigger delete on reception and put bodies into events (RULES, SQS 16)."""
    guilty = [str(p.relative_to(ROOT)) for p in _sources() if re.search(rf"\b{name}\b", p.read_text())]
    assert guilty == []


def output(ordinal: int, value: bytes, headers: tuple[tuple[str, bytes], ...] = (), **more: Any) -> Output:
    ours = {
        "drain": b"d",
        "job": b"d.1",
        "ordinal": b"%d" % ordinal,
        "entry": b"e",
        "key": b"k%d" % ordinal,
        "retry-count": b"1",
        "original-timestamp": b"5",
    }
    return Output(ordinal, None, value, (*headers, *((f"dlq-{n}", v) for n, v in ours.items())), 5, **more)


def entry(one: Output, *, arn: str = ARN, **attributes: str) -> dict[str, Any]:
    reason, found = SqsSender(None, sqs.Queue("https://sqs/q", arn, attributes))._entry(one)
    assert reason is None
    return found


def refusal(one: Output, **attributes: str) -> str | None:
    return SqsSender(None, sqs.Queue("https://sqs/q", ARN, attributes))._entry(one)[0]


def test_a_call_is_packed_by_bytes_then_by_ten() -> None:
    def sizes(lengths: list[int], letter: bytes = b"x") -> list[int]:
        outputs = [output(n, letter * size) for n, size in enumerate(lengths)]
        return [len(some) for some in _packed([(one, entry(one)) for one in outputs])]

    assert sizes([10] * 25) == [10, 10, 5]
    assert sizes([400_000] * 5) == [2, 2, 1]
    assert sizes([1_000_000, 10, 1_000_000]) == [2, 1]
    # a call's messages together are bound as one is: characters beyond ASCII are more than one byte
    assert sizes([150_000] * 4, "é".encode()) == [3, 1]


def test_what_no_queue_takes_is_refused_before_it_is_sent() -> None:
    assert refusal(output(1, b"")) == "body_is_empty"
    assert refusal(output(1, b"\xff")) == "body_is_no_text"
    assert refusal(output(1, b"a\x00b")) == "body_is_no_text"
    assert refusal(output(1, b"x" * (1 << 20) + b"y")) == "too_large_for_the_target"
    assert refusal(output(1, b"x" * 300_000), MaximumMessageSize="262144") == "too_large_for_the_target"
    assert refusal(output(1, b"x", tuple((f"h{n}", b"v") for n in range(11)))) == "too_many_attributes"
    assert refusal(output(1, b"x", (("h", b""),))) == "attribute_is_empty"
    assert refusal(output(1, b"x", (("h", b"1"), ("h", b"2")))) == "attribute_repeated"
    assert refusal(output(1, b"x", (("h", b"\xff"),), types=("String",))) == "attribute_is_no_text"


def test_our_attribute_gives_way_to_the_producers() -> None:
    with_room = entry(output(1, b"x", tuple((f"h{n}", b"v") for n in range(9))))
    assert mark.read(with_room["MessageAttributes"]["dlq"]["StringValue"].encode()) == mark.Mark(
        "d", "d.1", 1, "e", "k1", 1, 5
    )
    assert "dlq" not in entry(output(1, b"x", tuple((f"h{n}", b"v") for n in range(10))))["MessageAttributes"]
    assert "dlq" not in entry(output(1, b"x" * ((1 << 20) - 10)))["MessageAttributes"]


def test_trace_header_group_and_data_types_are_sent_along() -> None:
    system = (("AWSTraceHeader", "Root=1-5759e988-bd862e3fe1be46a994272793"), ("MessageGroupId", "tenant-1"))
    sent = entry(
        output(1, b"x", (("n", b"1"), ("b", b"\xff")), types=("Number.int", "Binary.gif"), system=system)
    )
    assert sent["MessageSystemAttributes"]["AWSTraceHeader"]["StringValue"] == system[0][1]
    assert sent["MessageGroupId"] == "tenant-1"  # a fair queue's
    assert "MessageDeduplicationId" not in sent
    assert sent["MessageAttributes"]["n"] == {"DataType": "Number.int", "StringValue": "1"}
    assert sent["MessageAttributes"]["b"] == {"DataType": "Binary.gif", "BinaryValue": b"\xff"}
    fifo = entry(output(1, b"x", system=(*system, ("MessageDeduplicationId", "found"))), arn=f"{ARN}.fifo")
    assert fifo["MessageDeduplicationId"] == "k1"  # the entry's for life, never the found one


def test_a_group_has_one_entry_in_a_call() -> None:
    sender = SqsSender(None, sqs.Queue("https://sqs/q", f"{ARN}.fifo", {}))
    groups = "abacab"
    outputs = [output(n, b"x", system=(("MessageGroupId", group),)) for n, group in enumerate(groups)]
    waves = [[o.ordinal for o in wave] for wave in sender.waves(outputs)]
    assert waves == [[0, 1, 3], [2, 5], [4]]


def test_what_came_damaged_says_so() -> None:
    attributes = {"n": {"DataType": "Number", "StringValue": "1"}}
    message = {"MessageId": "m", "Body": "b", "MessageAttributes": attributes}
    good = {"MD5OfBody": sqs.md5_of_body("b"), "MD5OfMessageAttributes": sqs.md5_of_attributes(attributes)}
    assert recorded({**message, **good}).flaw is None
    assert recorded({**message, **good, "MD5OfBody": "0" * 32}).flaw == "damaged_in_transit"
    assert recorded({**message, **good, "MD5OfMessageAttributes": "0" * 32}).flaw == "damaged_in_transit"


def described(**attributes: str) -> SqsReplay:
    target = SqsReplay(SqsTarget(kind="sqs", connection="aws", allow=("orders",)), lambda _: HERE)
    target._queues["orders"] = sqs.Queue("https://sqs/orders", ARN, attributes)
    return target


def test_how_long_a_return_takes_is_said_before_a_replay() -> None:
    policy = f'{{"deadLetterTargetArn": "{ARN}-dlq", "maxReceiveCount": 10}}'
    slow = described(RedrivePolicy=policy, VisibilityTimeout="3600", DelaySeconds="60")
    (finding,) = slow.findings(f"{ARN}-dlq")
    assert "after up to 601 minutes" in finding
    assert described(RedrivePolicy=policy, VisibilityTimeout="30").findings(f"{ARN}-dlq") == []
    (finding,) = described(RedrivePolicy=policy, VisibilityTimeout="30").findings("kafka:c/t")
    assert "nobody learns the outcome" in finding


def stubbed(service: str) -> tuple[Any, Stubber]:
    client = boto3.client(
        service, region_name="eu-north-1", aws_access_key_id="any", aws_secret_access_key="any"
    )
    stub = Stubber(client)
    stub.activate()
    return client, stub


def source(
    monkeypatch: pytest.MonkeyPatch, mappings: dict[str, Any] | None = None, **attributes: str
) -> tuple[SqsDlq, Stubber]:
    """The adapter, and what its queue answers; its functions may not be looked at unless ``mappings`` says them."""
    client, stub = stubbed("sqs")
    functions, of_functions = stubbed("lambda")
    if mappings is None:
        for _ in range(3):
            of_functions.add_client_error("list_event_source_mappings", "AccessDeniedException")
    else:
        wanted = {"EventSourceArn": f"{ARN}-dlq"}
        of_functions.add_response("list_event_source_mappings", mappings, wanted)
    clients = {"sqs": client, "lambda": functions}
    connection = Connection("aws", "aws", aws=lambda service, _config: clients[service])
    found = sqs.Queue("https://sqs/dlq", f"{ARN}-dlq", attributes)
    monkeypatch.setattr(sqs, "find", lambda *_: found)
    config = SqsSource(kind="sqs", connection="aws", queue="dlq", start="earliest")
    return SqsDlq(config, lambda _: connection), stub


def test_a_running_move_task_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    dlq, stub = source(monkeypatch)
    stub.add_response("list_message_move_tasks", {"Results": [{"Status": "RUNNING"}]})
    with pytest.raises(Refused, match="message move task is RUNNING"):
        dlq.check({}, "ledger", 1)
    stub.add_response("list_message_move_tasks", {"Results": [{"Status": "COMPLETED"}]})
    assert dlq.check({}, "ledger", 1) == []
    stub.add_client_error("list_message_move_tasks", "AccessDenied")
    assert dlq.check({}, "ledger", 1) == []


@pytest.mark.parametrize(("state", "refused"), [("Enabled", True), ("Enabling", True), ("Disabled", False)])
def test_a_function_that_is_fed_from_the_queue_is_to_be_stopped_first(
    monkeypatch: pytest.MonkeyPatch, state: str, refused: bool
) -> None:
    mapping = {"FunctionArn": "arn:aws:lambda:eu-north-1:000000000000:function:retry", "State": state}
    dlq, stub = source(monkeypatch, {"EventSourceMappings": [mapping]})
    stub.add_response("list_message_move_tasks", {"Results": []})
    if not refused:
        assert dlq.check({}, "ledger", 1) == []
        return
    with pytest.raises(Refused, match="function:retry, whose mapping is on"):
        dlq.check({}, "ledger", 1)


def test_an_entry_expires_with_its_first_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    """A redrive into a standard queue renews nothing: age counts from the first SentTimestamp."""
    dlq, _ = source(monkeypatch, MessageRetentionPeriod="345600")
    assert dlq.retention_ms() == 345_600_000
    letter = recorded({"MessageId": "m", "Body": "b", "Attributes": {"SentTimestamp": "1764000000000"}})
    assert expiry.of(letter, dlq.retention_ms()) == "2025-11-28T16:00:00.000+00:00"


def test_whatever_ends_the_receivers_is_told() -> None:
    """An answer that no parser takes is neither of boto3's kinds of error; reading on would never end."""

    class Broken:
        def receive_message(self, **_: Any) -> dict[str, Any]:
            raise ResponseParserError("Unable to parse response")

    config = SqsSource(kind="sqs", connection="aws", queue="dlq", start="earliest")
    reading = SqsPass(Broken(), sqs.Queue("https://sqs/dlq", f"{ARN}-dlq", {}), config, 0, glance=False)
    try:
        with pytest.raises(SourceError, match="ResponseParserError: Unable to parse response"):
            reading.read(10, 1_000_000, 20)
    finally:
        reading.close()


def test_no_client_can_be_made_of_a_wrong_connection() -> None:
    with pytest.raises(ConfigError, match="region_name"):
        aws.client(Connection("aws", "aws", extra={"endpoint_url": "nonsense", "region_name": "x"}), "sqs")
