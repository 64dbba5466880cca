"""What can go wrong around a drain, on embedded parts: each begins, lasts a while, and ends."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dlq_demo.broker import Broker
from dlq_demo.link import Link
from dlq_demo.orchestrator import OrchestratorProcess

SLOW_S = 0.15
_DISK_MB = 64
_INTAKE, _REPLAY = "take_custody", "replay_canary"


@dataclass(frozen=True)
class Breakage:
    """One thing that goes wrong, as a drain comes to the phase ``during``; ``broke`` says it in words."""

    name: str
    broke: str
    during: str
    begin: Callable[[], object]
    end: Callable[[], object]


def broker_restart(broker: Broker) -> Breakage:
    said = "the broker is killed (SIGKILL), and started again"
    return Breakage("broker_restart", said, _REPLAY, broker.kill, broker.start)


def orchestrator_restart(orchestrator: OrchestratorProcess) -> Breakage:
    said = "the orchestrator is killed (SIGKILL), and started again"
    return Breakage("orchestrator_restart", said, _REPLAY, orchestrator.kill, orchestrator.start)


def slow_network(links: Sequence[Link]) -> Breakage:
    def delay(seconds: float) -> None:
        for link in links:
            link.delay_s = seconds

    return Breakage(
        "slow_network",
        f"each piece to or from broker and orchestrator waits {SLOW_S * 1000:.0f} ms",
        _INTAKE,
        lambda: delay(SLOW_S),
        lambda: delay(0),
    )


def ledger_away(folder: Path) -> Breakage:
    return _away("ledger", folder, _REPLAY)


def archive_away(folder: Path) -> Breakage:
    return _away("archive", folder, _INTAKE)


def _away(name: str, folder: Path, during: str) -> Breakage:
    """A folder can't be reached; a file in its place, so that nobody makes a new one."""
    hidden = folder.with_name(f"{folder.name}.away")

    def begin() -> None:
        folder.rename(hidden)
        folder.touch()

    def end() -> None:
        folder.unlink()
        hidden.rename(folder)

    return Breakage(f"{name}_away", f"the {name} can't be reached", during, begin, end)


def full_disk(disk: Path) -> Breakage:
    """No byte more can be written below ``disk``, a file system of its own (see :func:`small_disk`)."""
    filler = disk / "filler"

    def begin() -> None:
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    return Breakage("full_disk", "the archive's disk is full", _INTAKE, begin, filler.unlink)


@contextmanager
def small_disk(folder: Path) -> Iterator[str | None]:
    """A small file system at ``folder`` while it lasts; says why there is none, where none can be made."""
    if folder.is_mount():  # left by a run that was killed
        _unmount(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "dlq-chaos", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        why = done.stderr.strip() or None if done.returncode else None
    except OSError as error:
        why = str(error)
    if why is not None:
        yield f"a small disk can't be mounted here ({why}); run it as root"
        return
    try:
        yield None
    finally:
        _unmount(folder)


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
