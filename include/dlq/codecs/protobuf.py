"""Protobuf, with the ``.proto`` text it was written with; the document is its JSON mapping.

https://protobuf.dev/programming-guides/json/ (fields under their own names; those at their default are shown, too).
"""

from __future__ import annotations

import subprocess
import sys
from base64 import b64decode
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import google.type
from google.protobuf import json_format
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from dlq.codecs.errors import CodecError

_COMPILES_S = 30.0


class ProtobufFile:
    """A compiled ``.proto`` file: registries keep the text, so it is compiled here.

    :param text: of the file; ``references`` those of the files it imports, by the name it imports them.
    :raises CodecError: when they don't compile.
    """

    def __init__(self, text: str, references: Mapping[str, str]) -> None:
        main = "schema.proto"
        while main in references:
            main = f"_{main}"
        files = _files(main, {**references, main: text})
        self._pool = DescriptorPool()
        try:
            for each in files:
                self._pool.Add(each)
                self._pool.FindFileByName(each.name)
        except (TypeError, KeyError):  # an import is missing, a type unknown
            raise CodecError("its Protobuf schema can't be used: what it imports is not all there") from None
        self._file = next(each for each in files if each.name == main)

    def message(self, path: Sequence[int]) -> Protobuf:
        """The codec of the message that ``path`` leads to.

        :raises CodecError: when it leads nowhere.
        """
        names = [self._file.package] if self._file.package else []
        inside: FileDescriptorProto | DescriptorProto = self._file
        for index in path:
            messages = inside.message_type if isinstance(inside, FileDescriptorProto) else inside.nested_type
            if not 0 <= index < len(messages):
                raise CodecError("its Protobuf schema has no such message")
            inside = messages[index]
            names.append(inside.name)
        return Protobuf(self._pool, ".".join(names))


class Protobuf:
    """One message type."""

    name = "protobuf"

    def __init__(self, pool: DescriptorPool, message: str) -> None:
        self._pool = pool
        self._class = GetMessageClass(pool.FindMessageTypeByName(message))

    def read(self, body: bytes) -> Any:
        message = self._parsed(body)
        try:
            return json_format.MessageToDict(
                message,
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
                descriptor_pool=self._pool,
            )
        except Exception:  # noqa: BLE001 (a time out of range, an Any of an unknown type: its text quotes values)
            raise CodecError("the value has no JSON mapping") from None

    def write(self, document: Any, was: bytes) -> bytes:
        # Fields may come in any order: messages are compared by their one deterministic form.
        if _canonical(self._filled(self.read(was))) != _canonical(self._parsed(was)):
            raise CodecError(
                "the value can't be written back as it was (it has fields its schema does not know)"
            )
        return _canonical(self._filled(document))

    def _parsed(self, body: bytes) -> Message:
        message = self._class()
        try:
            message.ParseFromString(body)
        except Exception:  # noqa: BLE001 (any bytes)
            raise CodecError("the value is no Protobuf of its schema") from None
        return message

    def _filled(self, document: Any) -> Message:
        message = self._class()
        try:
            json_format.ParseDict(document, message, descriptor_pool=self._pool)
        except Exception:  # noqa: BLE001 (any document; the error's text quotes values)
            raise CodecError(
                f"the Protobuf schema refuses the document: it is no {message.DESCRIPTOR.name}"
            ) from None
        return message


def _canonical(message: Message) -> bytes:
    canonical: bytes = message.SerializeToString(deterministic=True)
    return canonical


def _files(main: str, texts: Mapping[str, str]) -> list[FileDescriptorProto]:
    """``main`` and all it imports, each after what it imports itself.

    A registry gives a file as it was registered: as text, or, by confluent-kafka's own client, compiled and in base64.
    """
    ready = {name: found for name, text in texts.items() if (found := _descriptor(name, text)) is not None}
    wanted = [main]
    if main in ready:
        wanted = sorted({each for one in ready.values() for each in one.dependency} - ready.keys())
    files = (
        _compiled(wanted, {name: text for name, text in texts.items() if name not in ready}) if wanted else []
    )
    left = dict(ready)
    while left:
        free = [name for name, one in left.items() if not left.keys() & set(one.dependency)]
        if not free:
            raise CodecError("its Protobuf schemas import each other in a circle")
        files.extend(left.pop(name) for name in free)
    return files


def _descriptor(name: str, text: str) -> FileDescriptorProto | None:
    try:
        found = FileDescriptorProto.FromString(b64decode(text, validate=True))
    except (ValueError, DecodeError):
        return None
    found.name = name
    return found


def _compiled(wanted: Sequence[str], texts: Mapping[str, str]) -> list[FileDescriptorProto]:
    """``wanted`` and all they import, in an order in which each comes after what it imports.

    In a process of its own: the compiler is C++ and writes to standard error.
    """
    with TemporaryDirectory(prefix="dlq-proto-") as folder:
        for name, text in texts.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise CodecError("its Protobuf schema imports a file from outside")
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        out = Path(folder) / ".descriptors"
        included = [Path(folder), *(Path(each).parent.parent for each in google.type.__path__)]
        command = [
            *(sys.executable, "-m", "grpc_tools.protoc", "--include_imports", f"--descriptor_set_out={out}"),
            *(f"--proto_path={each}" for each in included),
            *wanted,
        ]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_COMPILES_S, check=False)
        except subprocess.TimeoutExpired:
            raise CodecError("its Protobuf schema does not compile in time") from None
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").replace(f"{folder}/", "").strip().splitlines()
            raise CodecError(
                f"its Protobuf schema does not compile: {said[-1][:300] if said else 'no word why'}"
            )
        return list(FileDescriptorSet.FromString(out.read_bytes()).file)
