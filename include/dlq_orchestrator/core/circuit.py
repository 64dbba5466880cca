"""Circuit breakers: a plugin that only fails is left alone, and asked again by one call at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True)
class CircuitPolicy:
    """When a circuit opens, and for how long.

    :param failures: so many in a row open it.
    :param open_s: how long it stays open before a probe, in seconds; doubled for each probe that fails.
    :param open_max_s: what that never exceeds.
    """

    failures: int = 50
    open_s: float = 1.0
    open_max_s: float = 60.0


class Circuit:
    """One plugin's circuit breaker. Used by one thread; read by any.

    Closed: calls pass. Open: none does, until its time is over. Half-open: one call passes, the probe: its success
    closes the circuit, its failure opens it for twice as long.
    """

    def __init__(self, policy: CircuitPolicy, now: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._now = now
        self._in_a_row = 0
        self._probes_failed = 0
        self._open_until: float | None = None
        self._probing = False

    @property
    def state(self) -> State:
        if self._open_until is None:
            return "closed"
        return "open" if self._now() < self._open_until else "half_open"

    def remaining_s(self) -> float:
        """Seconds until it lets a probe through."""
        return max(0.0, self._open_until - self._now()) if self._open_until is not None else 0.0

    def admit(self) -> float | None:
        """None: the call may pass, and :meth:`passed` or :meth:`failed` must be told of it, or :meth:`gave_up`.
        Else seconds to wait before asking again.
        """
        if self._open_until is None:
            return None
        if self._now() < self._open_until:
            return self.remaining_s()
        if self._probing:
            return self._policy.open_s
        self._probing = True
        return None

    def passed(self) -> None:
        self._in_a_row = self._probes_failed = 0
        self._open_until, self._probing = None, False

    def failed(self) -> None:
        """A call failed by the plugin's fault."""
        self._in_a_row += 1
        if self._probing:
            self._probes_failed += 1
        elif self._open_until is not None or self._in_a_row < self._policy.failures:
            return  # a call from before it opened
        self._probing = False
        wait = min(self._policy.open_max_s, self._policy.open_s * 2.0 ** min(self._probes_failed, 32))
        self._open_until = self._now() + wait

    def gave_up(self) -> None:
        """A call that was let through never came to the plugin: it says nothing about it."""
        self._probing = False
