"""A value that is nothing else: text where it is UTF-8, else bytes as base64."""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from typing import Any

from dlq.codecs.errors import CodecError


class Text:
    """UTF-8 text; its document is a string."""

    name = "text"

    def read(self, body: bytes) -> Any:
        return body.decode()

    def write(self, document: Any, _was: bytes) -> bytes:
        if not isinstance(document, str):
            raise CodecError("the value is text: its document must stay a string")
        try:
            return document.encode()
        except UnicodeError:
            raise CodecError("the document holds half a surrogate pair, which is no text") from None


class Bytes:
    """Any bytes; their document is a string in base64."""

    name = "bytes"

    def read(self, body: bytes) -> Any:
        return b64encode(body).decode()

    def write(self, document: Any, _was: bytes) -> bytes:
        try:
            return b64decode(document, validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise CodecError("the value is bytes: its document must stay a string in base64") from None
