"""What is the same of each target with transactions: replays go by a writer, and consumers have positions in a log."""

from __future__ import annotations

from abc import ABC, abstractmethod

from dlq.ports import Sender


class Transacted(ABC):
    """The part of `dlq.ports.Target` that follows from its log, or that such a target can only decline."""

    transactional = True

    @abstractmethod
    def ends(self, topic: str) -> dict[int, int]: ...

    @abstractmethod
    def progress(self, topic: str) -> dict[int, int] | None: ...

    def lag(self, topic: str) -> int | None:
        if (progress := self.progress(topic)) is None:
            return None
        return sum(max(0, end - progress[part]) for part, end in self.ends(topic).items() if part in progress)

    def sender(self, topic: str) -> Sender:
        raise NotImplementedError("replays go by a transactional writer")

    def digested(self, _topic: str, _source: str) -> float | None:
        return None
