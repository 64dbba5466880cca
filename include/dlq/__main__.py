"""``python -m dlq`` is ``dlq``."""

from __future__ import annotations

from dlq.cli.main import main

main()
