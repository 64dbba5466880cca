"""A bounded memory of a pure function, at the speed of a dict on a hit."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Memo(dict[K, V]):
    """``memo[key]`` is ``function(key)``, remembered for at most ``size`` keys.

    When full it forgets everything and starts again, which costs a repeating stream little and a hostile one
    nothing it would not have paid. ``keep`` says which keys are worth their memory (default: all).
    """

    def __init__(
        self, function: Callable[[K], V], size: int, keep: Callable[[K], bool] | None = None
    ) -> None:
        super().__init__()
        self._function = function
        self._size = size
        self._keep = keep

    def __missing__(self, key: K) -> V:
        value = self._function(key)
        if self._keep is None or self._keep(key):
            if len(self) >= self._size:
                self.clear()
            self[key] = value
        return value
