"""What people decided of groups, as classification honours it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import msgspec

from dlq.entry import Group


@dataclass(frozen=True)
class Regrouping:
    """By fingerprint: the group that another goes into, and the patterns that one is split by."""

    merges: Mapping[str, Group] = field(default_factory=dict)
    splits: Mapping[str, Sequence[re.Pattern[str]]] = field(default_factory=dict)

    def regrouped(self, group: Group, message: str | None) -> Group:
        """The group that a failure of ``group`` with ``message`` belongs to after all."""
        for pattern in self.splits.get(group.fingerprint, ()) if message else ():
            if pattern.search(message or ""):
                group = split_off(group, pattern.pattern)
                break
        return self.merged(group.fingerprint) or group

    def merged(self, fingerprint: str) -> Group | None:
        """The group that one goes into in the end; None where it stays."""
        into, seen = None, set()
        while fingerprint in self.merges and fingerprint not in seen:
            seen.add(fingerprint)
            into = self.merges[fingerprint]
            fingerprint = into.fingerprint
        return into


def split_off(group: Group, pattern: str) -> Group:
    """The part of ``group`` whose messages have ``pattern``; its fingerprint is the group's and the pattern's."""
    mark = sha256(pattern.encode("utf-8", "replace")).hexdigest()[:8]
    return msgspec.structs.replace(
        group, fingerprint=f"{group.fingerprint}/{mark}", signature=f"{group.signature} ~ {pattern}"
    )


NONE = Regrouping()
