"""What the cluster doesn't let us do is said when a drain is opened, before anything is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)
from tests.integration.rig import Rig, rigs

from dlq.errors import ConfigError
from dlq_demo.broker import Broker

AUTHORIZER = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker") / "kafka", properties=AUTHORIZER) as running:
        yield running


@pytest.fixture
def make_rig(guarded: Broker, tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    yield from rigs(guarded.bootstrap, tmp_path)


def withhold(rig: Rig, kind: ResourceType, name: str, right: AclOperation) -> None:
    """All rights on it but one."""
    pattern = (
        ResourcePatternType.PREFIXED if kind is ResourceType.TRANSACTIONAL_ID else ResourcePatternType.LITERAL
    )
    acls = [
        AclBinding(kind, name, pattern, "User:ANONYMOUS", "*", operation, permission)
        for operation, permission in (
            (AclOperation.ALL, AclPermissionType.ALLOW),
            (right, AclPermissionType.DENY),
        )
    ]
    for done in rig.admin().create_acls(acls).values():
        done.result(10)


@pytest.mark.parametrize(
    ("right", "said"),
    [(AclOperation.WRITE, "orders': grant WRITE on it"), (AclOperation.READ, "orders': grant READ on it")],
)
def test_a_target_without_the_right(make_rig: Callable[..., Rig], right: AclOperation, said: str) -> None:
    rig = make_rig(parts=1)
    withhold(rig, ResourceType.TOPIC, rig.origin, right)
    with pytest.raises(ConfigError, match=said):
        rig.open("r1")


def test_a_queue_that_may_not_be_read(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(parts=1)
    withhold(rig, ResourceType.TOPIC, rig.dlq, AclOperation.READ)
    with pytest.raises(ConfigError, match=r"source\.topic: .* grant READ on it"):
        rig.open("r1")


def test_no_right_to_transactions(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(parts=1)
    withhold(rig, ResourceType.TRANSACTIONAL_ID, "dlq-drain.", AclOperation.WRITE)
    with pytest.raises(ConfigError, match="grant WRITE on transactional ids"):
        rig.open("r1")


def test_a_broker_that_refuses_our_transactions_is_noticed_before_anything_is_taken(tmp_path: Path) -> None:
    with Broker(tmp_path / "kafka", properties={"transaction.max.timeout.ms": "10000"}) as strict:
        for rig in rigs(strict.bootstrap, tmp_path / "rig"):
            with pytest.raises(
                ConfigError, match=r"no transaction can be made.*transaction\.max\.timeout\.ms"
            ):
                rig().open("r1")
