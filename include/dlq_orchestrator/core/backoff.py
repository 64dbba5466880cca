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

    def wait_s(self, tries: int, random: Random, retry_after_s: float | None = None) -> float | None:
        """Seconds to wait after so many failed tries (1 or more); None: no further try.

        :param retry_after_s: what the one that refused asked for: waited at least, and if it is more than a wait
            may be, there is no further try now.
        """
        if tries >= self.max_tries or (retry_after_s or 0.0) > self.cap_s:
            return None
        jitter = random.uniform(0, min(self.cap_s, self.base_s * 2.0 ** min(tries - 1, 32)))
        return (retry_after_s or 0.0) + jitter


class RetryBudget:
    """Retries are a share of the calls that went well: where nearly all fail, trying again only adds to the load.

    :param share: what one success adds, in retries.
    :param reserve: how many retries may be saved up, and are there at the start.
    """

    def __init__(self, share: float = 0.2, reserve: int = 2000) -> None:
        self._share = share
        self._reserve = reserve
        self._left = float(reserve)

    def take(self) -> bool:
        """Whether there may be one more retry."""
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def earn(self) -> None:
        """A call went well."""
        self._left = min(self._reserve, self._left + self._share)
