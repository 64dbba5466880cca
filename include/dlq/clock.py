"""The time as the ledger writes it: UTC, ISO 8601, milliseconds, one fixed width, so that text order is time order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from dlq.memo import Memo


def iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")


def now() -> str:
    return iso(datetime.now(UTC))


def after(seconds: float) -> str:
    """The moment ``seconds`` from now."""
    return iso(datetime.now(UTC) + timedelta(seconds=seconds))


def from_ms(epoch_ms: int | None) -> str | None:
    """An epoch in milliseconds as the ledger writes it; None where it is no date."""
    if epoch_ms is None:
        return None
    try:
        return iso(datetime.fromtimestamp(epoch_ms / 1000, UTC))
    except (OverflowError, ValueError, OSError):
        return None


_minutes: Memo[int, str | None] = Memo(lambda minute: from_ms(minute * 60_000), 10_000)


def minute_of(epoch_ms: int) -> str | None:
    """The minute an epoch in milliseconds lies in, as :func:`from_ms` writes one: for many that share few."""
    return _minutes[epoch_ms // 60_000]
