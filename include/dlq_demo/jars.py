"""Jars from Maven Central, each pinned by its SHA-256 in a ``*.lock`` file beside this module.

Resolving poms anew on every machine is slow and lets versions move (asked for Kafka and a logging binding
together, jgo let log4j pull kafka-clients down to 3.9), so the closed list is committed, and jgo is only
asked to fetch. It neither refuses a file whose checksum is wrong nor cleans up after a broken download; this
does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dlq_demo.process import Unavailable


class Jar(NamedTuple):
    group: str
    artifact: str
    version: str
    sha256: str

    def path(self, repository: Path) -> Path:
        """Where it lies in a local Maven repository."""
        return (
            repository.joinpath(*self.group.split("."), self.artifact, self.version)
            / f"{self.artifact}-{self.version}.jar"
        )

    def is_whole(self, repository: Path) -> bool:
        path = self.path(repository)
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == self.sha256


def cache() -> Path:
    """Where downloads are kept between runs: ``DLQ_CACHE``, by default ``~/.cache/dlq-runbook``."""
    return Path(os.environ.get("DLQ_CACHE") or Path.home() / ".cache" / "dlq-runbook")


def locked(service: str) -> list[Jar]:
    """The jars of ``<service>.lock``: one ``group:artifact:version sha256`` a line."""
    lines = Path(__file__).with_name(f"{service}.lock").read_text().splitlines()
    jars = []
    for line in lines:
        name, sha256 = line.split()
        group, artifact, version = name.split(":")
        jars.append(Jar(group, artifact, version, sha256))
    return jars


def classpath(service: str) -> str:
    """The class path of ``service``, fetched first where it is missing or damaged (Kafka: 45 MB).

    :raises Unavailable: when a jar can't be had; names it, and says what to do.
    """
    repository = cache() / "maven"
    jars = locked(service)
    missing = [jar for jar in jars if not jar.is_whole(repository)]
    if missing:
        with _only_one(cache()):  # parallel test workers start at the same moment
            _fetch([jar for jar in missing if not jar.is_whole(repository)], repository)
    return os.pathsep.join(str(jar.path(repository)) for jar in jars)


def _fetch(jars: list[Jar], repository: Path) -> None:
    from jgo.maven import MavenContext  # only here: a warm start needs no jgo

    maven = MavenContext(repo_cache=repository, timeout=60)

    def fetch(jar: Jar) -> None:
        jar.path(repository).unlink(missing_ok=True)
        name = f"{jar.group}:{jar.artifact}:{jar.version}"
        try:
            maven.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve()
        except Exception as error:  # jgo raises RuntimeError, requests and OSError alike
            jar.path(repository).unlink(missing_ok=True)
            raise Unavailable(
                f"{name} could not be downloaded from Maven Central: {error}\n"
                "Is it reachable from here? Behind a proxy set HTTPS_PROXY, behind a company certificate "
                f"REQUESTS_CA_BUNDLE. Or copy the jar to {jar.path(repository)}. Then run it again."
            ) from error
        if not jar.is_whole(repository):
            jar.path(repository).unlink()
            raise Unavailable(
                f"{name} as downloaded is not the file whose SHA-256 is locked ({jar.sha256[:12]}…). "
                "A broken download: run it again. If it stays so, your mirror of Maven Central alters files."
            )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fetch, jars))


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
