"""Payload codecs: a value as a document, chosen by what it carries, and back with the same schema. Never on the hot
path: intake and replay send bytes, and decode only where a queue's dedupe key lies in what is encoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dlq.codecs.errors import CodecError, RegistryError
from dlq.codecs.payload import Decoded, Encoding, decode

if TYPE_CHECKING:
    from dlq.codecs.registry import SchemaRegistry
    from dlq.config import QueueConfig
    from dlq.ports import Connections

__all__ = ["CodecError", "Decoded", "Encoding", "RegistryError", "decode", "registry_of"]


@contextmanager
def registry_of(config: QueueConfig, connections: Connections) -> Iterator[SchemaRegistry | None]:
    """The schema registry a queue's file names, None where it names none.

    :raises ConfigError: when its Connection is wrong.
    """
    if config.schema_registry is None:
        yield None
        return
    from dlq.codecs.registry import SchemaRegistry  # its client takes a second to import

    registry = SchemaRegistry.connect(connections(config.schema_registry.connection))
    try:
        yield registry
    finally:
        registry.close()
