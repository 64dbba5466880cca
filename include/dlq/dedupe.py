"""A queue's own dedupe key where the value is no plain JSON: compressed, or written with a schema of a registry.

Plain JSON is looked into where the letter is decoded (:mod:`dlq.envelopes.path`). This costs a decoding of the payload,
so it is done only for a queue whose file has a ``dedupe_key``, and only for values that were not looked into.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING

from dlq.codecs import CodecError, RegistryError, decode, registry_of
from dlq.codecs.frame import HEADER
from dlq.config import QueueConfig
from dlq.entry import Record, Understood
from dlq.envelopes import JsonPath
from dlq.ports import Connections

if TYPE_CHECKING:  # its client takes a second to import, and few queues have one
    from dlq.codecs.registry import SchemaRegistry

log = logging.getLogger("dlq.dedupe")


class DedupeKeys:
    """Fills in dedupe keys; close it to let go of the registry.

    A registry that doesn't answer costs the keys, once and said, never the entries: nothing asks it again.

    :raises ConfigError: from :meth:`fill`, when the registry's Connection is wrong.
    """

    def __init__(self, config: QueueConfig, connections: Connections) -> None:
        self._config, self._connections = config, connections
        self._path = JsonPath(config.dedupe_key) if config.dedupe_key else None
        self._open = ExitStack()
        self._registry: SchemaRegistry | None = None
        self._asked = False

    def fill(self, record: Record, what: Understood) -> None:
        """Give ``what`` the key that ``record``'s value has at the path, if it has none yet."""
        if self._path is None or what.dedupe_key is not None or not record.value or _plain(record):
            return
        if not self._asked:
            self._asked = True
            self._registry = self._open.enter_context(registry_of(self._config, self._connections))
        try:
            found = decode(record.value, record.headers, self._registry)
        except CodecError:
            return
        except RegistryError as error:
            log.warning("queue %s: dedupe keys can't be read: %s", self._config.name, error)
            self._path = None
            return
        what.dedupe_key = self._path.among(found.document)

    def close(self) -> None:
        self._open.close()
        self._asked = False


def _plain(record: Record) -> bool:
    """Whether the value begins as JSON does, and no header says that it is something else."""
    value = record.value or b""
    return value[:1] in (b"{", b"[") and all(name != HEADER["value"] for name, _ in record.headers)
