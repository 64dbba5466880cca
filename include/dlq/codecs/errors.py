"""What can go wrong with a payload, and with the registry that knows its schema."""

from __future__ import annotations

from dlq.errors import DlqError


class CodecError(DlqError):
    """A value can't be read as what it says it is, or a document not be written as the value was.

    It concerns that one entry. The message names what failed and where, in the schema's words, never the payload.
    """


class RegistryError(DlqError):
    """The schema registry did not answer: nothing is known of any entry. A later try may get its word."""
