"""Dead letters that are no copy of the original but say where it lies (or that it is cut): ``Understood.pointer``.

Each pointer is a URI, so that one field serves every kind, and whoever can fetch a kind knows it by its scheme:

- ``kafka://<topic>/<partition>/<offset>``: a record, there as long as its topic retains it
- ``s3://<bucket>/<key>``: a body that the extended client put into a bucket
- ``kinesis://<stream ARN>/<shard>?from=<sequence number>&to=<sequence number>``: a batch of a stream's records
- ``dynamodb://<stream ARN>/<shard>?from=<sequence number>&to=<sequence number>``
- ``eventbridge://<bus ARN>?events=<count>``: many events that a custom bus could not deliver; their archive has them
- ``truncated:<schedule ARN>``: a payload that was cut; nothing has the whole

The scheme alone (``s3:``) is a pointer that does not say where to.
"""

from __future__ import annotations

from urllib.parse import quote

S3 = "s3:"


def kafka(topic: str | None, partition: int | None, offset: int | None) -> str | None:
    """Where the original record lies, or None where the dead letter does not say it whole."""
    if topic is None or partition is None or offset is None:
        return None
    return f"kafka://{topic}/{partition}/{offset}"


def place(uri: str) -> tuple[str, int, int] | None:
    """Topic, partition and offset of a ``kafka:`` pointer; None of every other."""
    scheme, _, rest = uri.partition("://")
    topic, _, where = rest.partition("/")
    part, _, offset = where.partition("/")
    return (
        (topic, int(part), int(offset)) if scheme == "kafka" and part.isdigit() and offset.isdigit() else None
    )


def s3(bucket: str, key: str) -> str:
    """An object, its key as S3 has it (not percent-encoded)."""
    return f"s3://{bucket}/{key}"


def batch(scheme: str, stream: str, shard: str, first: str, last: str) -> str:
    """A range of a stream's shard, both ends included."""
    return (
        f"{scheme}://{stream}/{quote(shard, safe='')}?from={quote(first, safe='')}&to={quote(last, safe='')}"
    )
