"""The fallback envelope: no convention recognised, so nothing is said about the failure."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from dlq.entry import Understood

name = "unknown"


def recognises(_names: AbstractSet[str]) -> bool:
    """Always: it is asked last."""
    return True


def read(_headers: Mapping[str, bytes | None]) -> Understood:
    """Nothing but the format's name."""
    return Understood(name)
