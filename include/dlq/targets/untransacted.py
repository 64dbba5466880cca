"""What is the same of each target without transactions: replays go by a sender, and nothing of it is a log."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

from dlq.ports import Writer


class Untransacted:
    """The part of `dlq.ports.Target` that such a target can only decline."""

    transactional = False

    def ends(self, _topic: str) -> dict[int, int]:
        return {}

    def writer(self, job: str, topic: str, metadata: str) -> Writer:
        raise NotImplementedError("this target has no transactions; replays go by a sender")

    def delivered(self, _topic: str, _start: Mapping[int, int]) -> Iterator[list[tuple[str, int, int, int]]]:
        return iter(())

    def progress(self, _topic: str) -> dict[int, int] | None:
        return None

    def lag(self, _topic: str) -> int | None:
        return None

    def compacted(self, _topic: str) -> bool:
        return False

    def newest(
        self, topic: str, since: Mapping[int, int], keys: Container[bytes]
    ) -> tuple[dict[tuple[int, bytes], int], dict[int, int]]:
        raise NotImplementedError("asked only of a compacted topic")

    def grown(self, _seconds: float) -> int:
        """Not known: it does not count what went through it."""
        return 0
