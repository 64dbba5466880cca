"""What is around a drain breaks in the middle of it: the next tries go on, and nothing is lost or doubled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer
from tests.integration.rig import OrchestratedRig

from dlq.conservation import prove
from dlq.drain import dry
from dlq_demo import account, breakage, loopback
from dlq_demo.breakage import Breakage
from dlq_demo.broker import Broker, by_a_link
from dlq_demo.link import Link
from dlq_demo.stream import behind, wait_until_none
from dlq_orchestrator.traffic import send, workflows

pytestmark = pytest.mark.slow

AWAY_S = 2.0
STEPS = ("take", "categorize", "canary", "batches", "remaining", "release")
MIX = {"healthy": 1.0, "transient": 1.0, "rate_limit": 1.0}


class Breakable(OrchestratedRig):
    """A queue whose broker, orchestrator, network, ledger, archive and disk can be broken."""

    def __init__(self, broker: Broker, link: Link, folder: Path, no_disk: str | None) -> None:
        super().__init__(broker, folder)
        self.broker = broker
        self.links = (link, Link(self.service.port))
        self.disk, self.no_disk = folder / "disk", no_disk
        self.sent: set[str] = set()
        self.data |= {
            "orchestrator": {"connection": "orchestrator"},
            "ledger": f"sqlite:///{folder}/ledger/ledger.db",
            "archive": str(self.disk / "archive"),
        }
        (folder / "ledger").mkdir()
        self.connection_data = {
            "kafka": {
                "conn_type": "kafka",
                "extra": {"bootstrap.servers": f"{loopback.HOST}:{link.port}"},
            },
            "orchestrator": {
                "conn_type": "http",
                "host": loopback.HOST,
                "port": self.links[1].port,
                "password": self.service.token,
            },
        }
        self._begin()

    def fail(self, count: int, seed: int) -> int:
        """Let ``count`` workflows run; returns how many of them were dead-lettered."""
        quiet = {"bootstrap.servers": self.bootstrap, "log_level": 0}
        records = list(workflows(count, seed, MIX))
        self.sent |= {dict(record.headers)["correlation-id"].decode() for record in records}
        before = self.queued()
        send(Producer(quiet), self.origin, records)
        watch = Consumer({**quiet, "group.id": self.group})
        wait_until_none(lambda: behind(watch, self.origin), self.origin)
        watch.close()
        return self.queued() - before

    def queued(self) -> int:
        with dry(self.config, run_id="look", connections=self.connections) as look:
            return look.depth().entries

    def account(self) -> account.Account:
        return account.read(self.config, self.bootstrap, self.service, self.sent, self.queued())


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Breakable]:
    folder = tmp_path_factory.mktemp("breakage")
    [inside] = loopback.free_ports(1)
    with (
        Link(inside) as kafka,
        Broker(folder / "kafka", properties=by_a_link(inside, kafka.port)) as broker,
        breakage.small_disk(folder / "disk") as no_disk,
    ):
        made = Breakable(broker, kafka, folder, no_disk)
        with made.links[1], made.service:
            made.begin()
            yield made
        made.close()


BREAKAGES: dict[str, tuple[str, Callable[[Breakable], Breakage]]] = {
    "broker": ("produced:1", lambda rig: breakage.broker_restart(rig.broker)),
    "orchestrator": ("committed:1", lambda rig: breakage.orchestrator_restart(rig.service)),
    "network": ("read:1", lambda rig: breakage.slow_network(rig.links)),
    "ledger": ("produced:1", lambda rig: breakage.ledger_away(rig.folder.parent / "ledger")),
    "archive": ("read:1", lambda rig: breakage.archive_away(rig.disk / "archive")),
    "disk": ("read:1", lambda rig: breakage.full_disk(rig.disk)),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_it_breaks_in_the_middle_and_every_workflow_is_recovered(rig: Breakable, name: str) -> None:
    if name == "disk" and rig.no_disk:
        pytest.skip(rig.no_disk)
    point, make = BREAKAGES[name]
    broken = make(rig)
    failed = rig.fail(60, seed=list(BREAKAGES).index(name))
    assert failed > 20
    before = rig.account()
    process = rig.worker(f"open:{name}", *STEPS, stop=point)
    process.wait_stopped()
    broken.begin()
    try:
        process.wake()
        time.sleep(AWAY_S)
    finally:
        broken.end()
    errors = []
    while code := process.wait(120):  # as its task would be, it is tried again
        said = process.said("error")
        assert code in (1, 3), process.words()
        assert said is None or not said["fenced"], process.words()
        errors.append(process.words().splitlines()[-1] if said is None else f"{said['at']}: {said['text']}")
        assert len(errors) <= 3, errors
        process = rig.worker(f"attach:{name}", *STEPS)
    print(errors or "it waited")
    with rig.open(f"proof-{name}") as drain:
        assert prove(drain).broken == []
        rig.release(drain)
    after = rig.account()
    assert (after.lost, after.doubled, after.waiting, after.queued) == ((), (), 0, 0), after
    assert after.recovered - before.recovered == failed
