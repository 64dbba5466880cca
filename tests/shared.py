"""One broker and one SQS server for all processes of a test run: pytest-xdist's workers share them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

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
    record, lock = folder / f"{kind.__name__}.json", folder / f"{kind.__name__}.lock"
    with _locked(lock):
        first = not record.exists()
        if first:
            service = kind().__enter__()
            record.write_text(json.dumps({"folder": str(service.folder), "port": service.port}))
        else:
            at = json.loads(record.read_text())
            service = kind(Path(at["folder"]), port=at["port"])
        users = folder / f"{kind.__name__}-{service.port}.users"
        if not first:  # one of its users, until this process ends in whatever way
            using = ExitStack()
            using.enter_context(_locked(users, fcntl.LOCK_SH))
            request.config.add_cleanup(using.close)
            return service

    def stop() -> None:
        with _locked(lock):
            record.unlink()  # who comes now starts another
        with _locked(users):
            service.stop()

    request.config.add_cleanup(stop)
    return service


@contextmanager
def _locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, how)
        yield
