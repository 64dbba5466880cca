"""JSON with a JSON Schema: what is written is checked against it, what is read is not, for it may be why it failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import Draft7Validator, validator_for
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from dlq.codecs import json_text
from dlq.codecs.errors import CodecError


class JsonSchema:
    """:param schema: parsed JSON of the schema; ``references`` those it names, by name. None is fetched from elsewhere.

    :raises CodecError: when it is no schema.
    """

    name = "json-schema"

    def __init__(self, schema: Any, references: Mapping[str, Any]) -> None:
        draft = validator_for(schema, default=Draft7Validator)
        try:
            draft.check_schema(schema)
            known: Registry[Any] = Registry().with_resources(
                (name, Resource.from_contents(each, default_specification=DRAFT7))
                for name, each in references.items()
            )
        except SchemaError as error:
            where = "/".join(map(str, error.absolute_path))
            raise CodecError(f"its JSON Schema can't be used: {error.validator} at /{where}") from None
        except Exception as error:  # noqa: BLE001 (a schema of anybody's: references that are no schemas)
            raise CodecError(f"its JSON Schema can't be used: {type(error).__name__}") from None
        self._validator: Validator = draft(schema, registry=known)

    def read(self, body: bytes) -> Any:
        try:
            return json_text.loads(body)
        except ValueError as error:
            raise CodecError(f"the value is no JSON: {error}") from None

    def write(self, document: Any, was: bytes) -> bytes:
        body = json_text.write(document, was)
        try:
            self._validator.validate(document)
        except ValidationError as error:
            # The path in the schema: the one in the document, and the error's own text, are the payload's words.
            where = "/".join(map(str, error.absolute_schema_path))
            raise CodecError(f"the JSON Schema refuses the document: /{where}") from None
        except Exception as error:  # noqa: BLE001 (anybody's schema: an unresolved reference, a number too large)
            raise CodecError(f"its JSON Schema can't be applied: {type(error).__name__}") from None
        return body
