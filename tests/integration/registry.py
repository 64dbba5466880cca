"""A real schema registry on loopback: Apicurio Registry, whose ccompat interface speaks Confluent's REST.

It comes whole from Maven Central (158 MB, kept in the jar cache), and runs on the Java that the broker runs on.
(Karapace is not on PyPI, and Confluent's own registry is not on Maven Central.)
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

from dlq_demo import jars, loopback
from dlq_demo.java import java
from dlq_demo.process import Process, Unavailable

_GROUP, _ARTIFACT, _VERSION = "io.apicurio", "apicurio-registry-app", "3.3.3"
_SHA256 = "8bc6751c76d963734224b01d5e7f84ccb3cb61c87d3bd77c36c35f10a5cbed63"


class Registry:
    """One registry with an empty store in memory; a context manager that starts and stops it.

    :raises Unavailable: when it can't be had.
    """

    def __init__(self) -> None:
        self._port, self._management = loopback.free_ports(2)
        self._folder = Path(tempfile.mkdtemp(prefix="dlq-registry-"))
        self._process: Process | None = None

    @property
    def url(self) -> str:
        return f"http://{loopback.HOST}:{self._port}/apis/ccompat/v7"

    @property
    def connection(self) -> dict[str, Any]:
        """An Airflow Connection to it, as JSON has it."""
        return {"conn_type": "http", "host": f"http://{loopback.HOST}/apis/ccompat/v7", "port": self._port}

    def __enter__(self) -> Self:
        options = {
            "quarkus.http.host": loopback.HOST,
            "quarkus.http.port": self._port,
            "quarkus.management.host": loopback.HOST,
            "quarkus.management.port": self._management,
        }
        self._process = Process(
            "the schema registry",
            [
                *java("the schema registry"),
                "-Xmx400m",
                *(f"-D{name}={value}" for name, value in options.items()),
                *("-jar", _installed() / "quarkus-run.jar"),
            ],
            log=self._folder / "registry.log",
            cwd=self._folder,
        )
        try:
            self._process.wait_until(self._answers, seconds=90)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/subjects", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def _installed() -> Path:
    """The folder it is unpacked in, fetched first where it is not there."""
    folder = jars.cache() / f"{_ARTIFACT}-{_VERSION}"
    with jars._only_one(jars.cache()):
        if not folder.exists():
            _unpack(_fetched(), folder)
    return folder


def _fetched() -> Path:
    from jgo.maven import MavenContext

    try:
        maven = MavenContext(repo_cache=jars.cache() / "maven", timeout=120)
        component = maven.project(_GROUP, _ARTIFACT).at_version(_VERSION)
        path = Path(component.artifact("all", "tar.gz").resolve())
    except Exception as error:
        raise Unavailable(
            f"{_ARTIFACT} {_VERSION} could not be downloaded from Maven Central: {error}"
        ) from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        path.unlink()
        raise Unavailable(
            f"{_ARTIFACT} {_VERSION} as downloaded is not the file whose SHA-256 is known: run it again"
        )
    return path


def _unpack(archive: Path, folder: Path) -> None:
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(part, filter="data")
    part.rename(folder)
    archive.unlink()  # unpacked it is as large again
