"""Compression around a value, known by its magic bytes: gzip (RFC 1952) and Zstandard (RFC 8878)."""

from __future__ import annotations

import pyarrow as pa

from dlq.codecs.errors import CodecError

MAX_BYTES = 64 << 20
"""The most a value may unpack to: a kilobyte of zeroes can claim a gigabyte."""

_MAGIC = {"gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f\xfd"}


def recognised(value: bytes) -> str | None:
    """The compression ``value`` begins like, None where it is none."""
    return next((name for name, magic in _MAGIC.items() if value.startswith(magic)), None)


def unpack(name: str, value: bytes) -> bytes:
    """
    :raises CodecError: when it is broken, or unpacks to more than :data:`MAX_BYTES`.
    """
    try:
        with pa.CompressedInputStream(pa.BufferReader(value), name) as stream:
            found: bytes = stream.read(MAX_BYTES + 1)
    except (OSError, pa.ArrowException):
        raise CodecError(f"the value begins like {name} and is broken") from None
    if len(found) > MAX_BYTES:
        raise CodecError(f"the {name} value unpacks to more than {MAX_BYTES >> 20} MiB")
    return found


def pack(name: str, body: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, name) as stream:
        stream.write(body)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed
