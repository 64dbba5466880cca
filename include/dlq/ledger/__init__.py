from __future__ import annotations

from dlq.ledger.store import Ledger, LedgerError, insert_rows

__all__ = ["Ledger", "LedgerError", "insert_rows"]
