"""Exit statuses of the command line, for scripts."""

from __future__ import annotations

from dlq.errors import ArchiveError, ConfigError, DlqError, GateFailed

OK, BROKEN, WRONG, REFUSED = 0, 1, 2, 3

IN_WORDS = """\b
Exit status:
  0  done
  1  a law of conservation is broken, a gate failed, or the archive's bytes are not those taken
  2  wrong use, or wrong configuration: the message names the file, field or variable
  3  refused, busy, or something did not answer: nothing was guessed; the message says what to do
"""


def exit_code(error: DlqError) -> int:
    """The exit status an error of the core has."""
    if isinstance(error, ConfigError):
        return WRONG
    return BROKEN if isinstance(error, (GateFailed, ArchiveError)) else REFUSED
