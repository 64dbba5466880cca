"""A Schema Registry by its REST interface (Confluent's, Karapace, Apicurio's ccompat), reached by a Connection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from confluent_kafka.schema_registry.error import SchemaRegistryError

from dlq.codecs import frame
from dlq.codecs.avro import Avro
from dlq.codecs.codec import Codec
from dlq.codecs.errors import CodecError, RegistryError
from dlq.codecs.frame import SchemaId
from dlq.codecs.json_schema import JsonSchema
from dlq.codecs.protobuf import ProtobufFile
from dlq.errors import ConfigError
from dlq.memo import Memo
from dlq.ports import Connection

_TIMEOUT_S, _TRIES = 10, 3
_SCHEMAS = 1_000
"""Schemas, and ids without one, that are remembered: any dead letter may name any."""


class SchemaRegistry:
    """The schemas of one registry, each fetched once.

    :param name: of the registry, for messages.
    """

    def __init__(self, client: SchemaRegistryClient, name: str) -> None:
        self._client = client
        self._name = name
        self._known: Memo[SchemaId, Avro | JsonSchema | ProtobufFile | CodecError] = Memo(
            self._looked_up, _SCHEMAS
        )

    @classmethod
    def connect(cls, connection: Connection) -> SchemaRegistry:
        """From a Connection: host (with or without scheme and path), port, login and password; what else the client of
        confluent-kafka takes (``ssl.ca.location``, ``bearer.auth.…``) in its extra, under that client's names.

        :raises ConfigError: when something of it is missing or wrong.
        """
        if not connection.host:
            raise ConfigError(f"Connection {connection.id}: host is not set; it needs the registry's address")
        scheme, _, address = connection.host.rpartition("://")
        host, slash, path = address.partition("/")
        port = f":{connection.port}" if connection.port else ""
        settings: dict[str, Any] = {
            "timeout": _TIMEOUT_S,
            "max.retries": _TRIES - 1,
            "retries.wait.ms": 200,
            **connection.extra,
            "url": f"{scheme or connection.schema or 'http'}://{host}{port}{slash}{path}",
        }
        if connection.login:
            settings["basic.auth.user.info"] = f"{connection.login}:{connection.password or ''}"
        try:
            client = SchemaRegistryClient(settings)
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(f"Connection {connection.id}: {error}") from None
        return cls(client, f"the schema registry (Connection {connection.id})")

    def close(self) -> None:
        self._client.close()

    def codec(self, found: frame.Frame) -> tuple[Codec, int]:
        """The codec of what is framed so, and how many bytes of ``found.after`` still belong to the frame.

        :raises CodecError: when the registry has no such schema, or it can't be used.
        :raises RegistryError: when the registry did not answer.
        """
        known = self._known[found.schema]
        if isinstance(known, CodecError):
            raise known
        if isinstance(known, ProtobufFile):
            path, size = frame.message_path(found.after)
            return known.message(path), size
        return known, 0

    def _looked_up(self, name: SchemaId) -> Avro | JsonSchema | ProtobufFile | CodecError:
        try:
            if name.guid is not None:
                return self._usable(self._ask(str(name), "get_schema_by_guid", name.guid))
            return self._usable(self._ask(str(name), "get_schema", name.id))
        except CodecError as error:
            return CodecError(f"{name}: {error}")

    def _usable(self, schema: Schema) -> Avro | JsonSchema | ProtobufFile:
        text = schema.schema_str or ""
        references = dict(self._references(schema))
        if schema.schema_type == "PROTOBUF":
            return ProtobufFile(text, references)
        try:
            parsed = json.loads(text)
            others = {name: json.loads(each) for name, each in references.items()}
        except (ValueError, RecursionError):
            raise CodecError(f"its text is no {schema.schema_type} schema") from None
        if schema.schema_type == "JSON":
            return JsonSchema(parsed, others)
        if schema.schema_type == "AVRO":
            return Avro(parsed, others.values())
        raise CodecError(f"{schema.schema_type} is no kind of schema that is known here")

    def _references(self, schema: Schema) -> Iterator[tuple[str, str]]:
        """Name and text of all schemas it names, each after those it names itself."""
        for each in schema.references or ():
            found = self._ask(
                f"reference {each.name}", "get_version", each.subject, each.version, True
            ).schema
            yield from self._references(found)
            yield str(each.name), found.schema_str or ""

    def _ask(self, what: str, how: str, *arguments: Any) -> Any:
        try:
            return getattr(self._client, how)(*arguments)
        except SchemaRegistryError as error:
            if error.http_status_code == 404:
                raise CodecError(f"{self._name} does not have {what}") from None
            raise RegistryError(
                f"{self._name} answered {error.http_status_code} when asked for {what}; see that it is up and that "
                "the Connection may read it"
            ) from None
        except Exception as error:
            raise RegistryError(
                f"{self._name} did not answer when asked for {what}: {type(error).__name__}; is it up, and the "
                "Connection right?"
            ) from error
