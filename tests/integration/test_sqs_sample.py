"""A look at an SQS queue is a touch: few are received, held together and given back, and that is said before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.integration.sqs_rig import SqsRig
from tests.sqs_faults import SqsFaults

from dlq.cli import look
from dlq.errors import Refused
from dlq.sample import looking, sample
from dlq_demo.elasticmq import arn

Make = Callable[..., SqsRig]


def test_a_sample_holds_few_and_gives_them_back(make_sqs_rig: Make, sqs_faults: SqsFaults) -> None:
    rig = make_sqs_rig(endpoint=sqs_faults.endpoint, source={"visibility": 120})
    rig.letters(80)
    with looking(rig.config, rig.connections) as (source, positions):
        found = sample(source, rig.config, positions, 50)
    assert len({one.record.place for one in found}) == 50
    calls = sqs_faults.of("ReceiveMessage")
    assert {call["VisibilityTimeout"] for call in calls} == {60}
    assert sum(call["MaxNumberOfMessages"] for call in calls) <= 60
    back = sqs_faults.of("ChangeMessageVisibilityBatch")
    assert [entry["VisibilityTimeout"] for call in back for entry in call["Entries"]] == [0] * 50
    counts = rig.client.get_queue_attributes(QueueUrl=rig.dlq_url, AttributeNames=["All"])["Attributes"]
    assert (counts["ApproximateNumberOfMessages"], counts["ApproximateNumberOfMessagesNotVisible"]) == (
        "80",
        "0",
    )
    assert not sqs_faults.of("DeleteMessageBatch")


def test_the_command_says_so_before_it_looks(
    make_sqs_rig: Make, sqs_faults: SqsFaults, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_sqs_rig(endpoint=sqs_faults.endpoint)
    rig.letters(5)
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(look, "from_environment", rig.connections)
    monkeypatch.setattr(
        look.terminal, "warn", lambda text: said.append((text, len(sqs_faults.of("ReceiveMessage"))))
    )
    assert look.sample.callback is not None
    look.sample.callback(rig.config, 5, False, False)
    ((text, received),) = said
    assert "A look is a touch: up to 5 entries" in text
    assert received == 0
    assert sqs_faults.of("ReceiveMessage")


def test_a_queue_that_could_push_its_entries_on_is_not_looked_at(make_sqs_rig: Make) -> None:
    rig = make_sqs_rig()
    rig.server.create_queue(f"{rig.queue}-next")
    policy = f'{{"deadLetterTargetArn": "{arn(f"{rig.queue}-next")}", "maxReceiveCount": 1}}'
    rig.client.set_queue_attributes(QueueUrl=rig.dlq_url, Attributes={"RedrivePolicy": policy})
    with looking(rig.config, rig.connections) as (source, positions):
        with pytest.raises(Refused, match="redrive policy of its own"):
            sample(source, rig.config, positions, 5)
    with pytest.raises(Refused, match="redrive policy of its own"):
        rig.open()
