"""Waiting between tries: exponential, with full jitter: who failed together doesn't come back together."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often a step is tried and how long it waits between.

    "Full jitter" is the variant with the least work and the least time in Marc Brooker's comparison
    (AWS Architecture Blog, "Exponential Backoff And Jitter", 2015).

    :param base_s: the most the first wait can be, in seconds; each later one can be twice the one before.
    :param cap_s: what no wait exceeds.
    :param max_tries: tries of one step in one run, the first counted.
    """

    base_s: float = 0.05
    cap_s: float = 2.0
    max_tries: int = 3

    def wait_s(self, tries: int, random: Random) -> float:
        """Seconds to wait after so many failed tries (1 or more)."""
        return random.uniform(0, min(self.cap_s, self.base_s * 2.0 ** min(tries - 1, 32)))
