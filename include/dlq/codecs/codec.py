"""What a payload codec is."""

from __future__ import annotations

from typing import Any, Protocol


class Codec(Protocol):
    """One encoding of values, with the schema it needs."""

    @property
    def name(self) -> str: ...

    def read(self, body: bytes, /) -> Any:
        """The document of ``body``: what JSON can hold.

        :raises CodecError: when it is none of this encoding.
        """

    def write(self, document: Any, was: bytes, /) -> bytes:
        """``document`` in place of the one of ``was``, checked against the schema.

        :raises CodecError: when the schema refuses it, or when more of ``was`` would change than was edited.
        """
