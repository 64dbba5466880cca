"""One broker and one SQS server for all processes of a test run: pytest-xdist's workers share them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import pytest

from dlq_demo.broker import Broker
from dlq_demo.elasticmq import ElasticMq

Service = TypeVar("Service", Broker, ElasticMq)


def shared(kind: type[Service], request: pytest.FixtureRequest) -> Service:
    """The run's service of this kind: who asks first starts it, and stops it once every process is done with it.

    It waits for the others at the process's end, not at a test's, whose time-out would count that.
    """
    folder: Path = request.getfixturevalue("tmp_path_factory").getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    record, config = folder / f"{kind.__name__}.json", request.config
    with _locked(folder / f"{kind.__name__}.lock"):
        if record.exists():
            where = json.loads(record.read_text())
            _hold(Path(where["users"]), config)
            return kind(Path(where["folder"]), port=where["port"])
        service = kind().__enter__()
        users = folder / f"{kind.__name__}-{service.port}.users"
        record.write_text(
            json.dumps({"users": str(users), "folder": str(service.folder), "port": service.port})
        )

    def stop() -> None:
        with _locked(folder / f"{kind.__name__}.lock"):
            record.unlink()  # who comes now starts another
        with _locked(users):
            service.stop()

    config.add_cleanup(stop)
    return service


def _hold(users: Path, config: pytest.Config) -> None:
    """Be one of the users, until this process ends in whatever way."""
    held = users.open("a")
    fcntl.flock(held, fcntl.LOCK_SH)
    config.add_cleanup(held.close)


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
