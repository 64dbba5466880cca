"""How fast a replay may go: by outcome, not by hope."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

CANARY = (1, 5, 20)
"""A canary's steps, in entries."""

BURST = 0.5
"""Below this success of a step there is nothing to learn from a smaller one: the job stops."""

TELLING = 20
"""Fewer outcomes than these make no burst in the middle of a step."""

LOOK = (500, 10_000)
"""Entries between two looks within a step: the first so many, twice as many each time, these at most."""


@dataclass
class Pacer:
    """Sizes of the steps between two gates.

    A canary goes 1, 5, 20 and stops at the first gate it misses. Other jobs begin at ``batch`` and double while success
    stays at ``gate``; below it the next step is half as long, and the second such step in a row, or a burst,
    stops the job.
    """

    batch: int
    gate: float
    canary: bool = False
    _size: int = field(init=False)
    _missed: int = field(init=False, default=0)
    _steps: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        self._steps = iter(CANARY)
        self._size = next(self._steps) if self.canary else self.batch

    @property
    def size(self) -> int:
        """How many entries the next step sends."""
        return self._size

    @property
    def looks(self) -> Iterator[int]:
        """After how many entries each a step is looked at before it is over."""
        size, most = LOOK
        while True:
            yield min(size, most)
            size *= 2

    def bursts(self, confirmed: int, returned: int) -> bool:
        """Whether so much of a step has come back already that no more of it may go."""
        known = confirmed + returned
        return known >= TELLING and confirmed < BURST * known

    def judge(self, success: float | None) -> str | None:
        """Take a step's success (None: nothing known); returns why the job must stop, or None to go on."""
        if success is None:
            return "no_outcome"
        if success >= self.gate:
            self._missed = 0
            self._size = next(self._steps, self._size) if self.canary else self._size * 2
            return None
        self._missed += 1
        if self.canary or self._missed > 1 or success < BURST:
            return "gate_failed"
        self._size = max(1, self._size // 2)
        return None


class Rate:
    """A ceiling in entries/s; waits before a transaction rather than after, so that none is held open."""

    def __init__(self, per_second: float | None) -> None:
        self._per_second = per_second
        self._free_at = time.monotonic()

    def wait(self, entries: int) -> None:
        if self._per_second is None:
            return
        now = time.monotonic()
        if self._free_at > now:
            time.sleep(self._free_at - now)
        self._free_at = max(now, self._free_at) + entries / self._per_second

    def room(self, most: int) -> int:
        """How many entries one transaction may carry: at most a second's worth."""
        return most if self._per_second is None else max(1, min(most, int(self._per_second)))
