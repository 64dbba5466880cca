"""Runs one command and answers for every process it leaves behind: ``leash.py GRACE SIGNAL COMMAND...``

Standard input is the leash: when it closes, because the owner let go or died in whatever way, the command
gets ``SIGNAL``, ``GRACE`` seconds to end, and then everything that descends from it is killed. Airflow's
tasks sit in process groups of their own and outlive a killed scheduler, so a process group is not enough: on
Linux this process adopts orphans (PR_SET_CHILD_SUBREAPER), so that a descendant stays one.

SIGTERM asks for the same as closing the leash; SIGUSR1 kills all at once, without a last word. The exit
status is the command's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap(main: int) -> int | None:
    """Collect every child that has ended; the exit status of ``main`` if it was among them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, raw = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == main:
                status = os.waitstatus_to_exitcode(raw)
    return status


def _kill_descendants(main: int) -> int | None:
    """Kill until nobody is left: while one is killed another may still fork."""
    status = None
    while left := psutil.Process().children(recursive=True):
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        time.sleep(0.01)
        ended = _reap(main)
        status = status if ended is None else ended
    return status


def run(grace: float, last_word: signal.Signals, command: list[str]) -> int:
    """Run ``command`` until it ends or the leash closes; returns its exit status (negative: the signal)."""
    _adopt_orphans()
    wake, waker = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # only the wake-up matters
    # Held on to: one that is dropped reaps its child by itself, and the status would be lost.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    main = process.pid

    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(wake, selectors.EVENT_READ)
    deadline: float | None = None
    status = None
    while status is None:
        events = selector.select(None if deadline is None else max(0.0, deadline - time.monotonic()))
        ready = {key.fd for key, _ in events}
        signals = os.read(wake, 512) if wake in ready else b""
        if signal.SIGUSR1 in signals:
            status = _kill_descendants(main)
        status = _reap(main) if status is None else status
        closed = 0 in ready and not os.read(0, 512)
        if closed:
            selector.unregister(0)
        if deadline is None and (closed or signal.SIGTERM in signals or signal.SIGINT in signals):
            deadline = time.monotonic() + grace
            with contextlib.suppress(ProcessLookupError):
                os.kill(main, last_word)
        if status is None and deadline is not None and time.monotonic() >= deadline:
            status = _kill_descendants(main)
    _kill_descendants(main)
    return status


if __name__ == "__main__":
    code = run(float(sys.argv[1]), signal.Signals[sys.argv[2]], sys.argv[3:])
    sys.exit(code if code >= 0 else 128 - code)
