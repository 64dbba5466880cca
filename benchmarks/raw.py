"""The raw loops: what any program must do at least, with the same client settings, sizes and durability."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from confluent_kafka import Message, Producer, TopicPartition

from benchmarks.bed import PARTS, Queue
from benchmarks.cost import Cost, measured
from dlq import kafka
from dlq.intake import MAX_ENTRIES
from dlq.ports import Output
from dlq.targets.kafka import SETTINGS

_HEADER = pa.struct([("name", pa.string()), ("value", pa.binary())])


def intake(queue: Queue, folder: Path, count: int) -> Cost:
    """Consume to the end, the whole records to Parquet (zstd), each file flushed to the disk; nothing else."""
    folder.mkdir()
    client = kafka.consumer(queue.connection, f"raw.{queue.config.name}")
    client.assign([TopicPartition(queue.dlq, part, 0) for part in range(PARTS)])
    done, ended, batch = 0, 0, list[Message]()
    with measured(count) as cost:
        while ended < PARTS or batch:
            while ended < PARTS and len(batch) < MAX_ENTRIES:
                for message in client.consume(MAX_ENTRIES - len(batch), timeout=0.1):
                    if message.error():  # the end of a partition
                        ended += 1
                    else:
                        batch.append(message)
            if batch:
                _write(folder / f"{done}.parquet", batch)
                done += len(batch)
                batch.clear()
    client.close()
    assert done == count, f"the raw loop read {done} of {count} records"
    return cost


def _write(path: Path, batch: Sequence[Message]) -> None:
    names: list[str] = []
    values: list[bytes | None] = []
    offsets = [0]
    for message in batch:
        for name, value in message.headers() or ():
            names.append(name)
            values.append(value)  # type: ignore[arg-type]
        offsets.append(len(names))
    headers = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()),
        pa.StructArray.from_arrays(
            [pa.array(names, pa.string()), pa.array(values, pa.binary())], fields=list(_HEADER)
        ),
    )
    table = pa.table(
        {
            "part": pa.array([m.partition() for m in batch], pa.int32()),
            "pos": pa.array([m.offset() for m in batch], pa.int64()),
            "timestamp_ms": pa.array([m.timestamp()[1] for m in batch], pa.int64()),
            "key": pa.array([m.key() for m in batch], pa.binary()),
            "value": pa.array([m.value() for m in batch], pa.binary()),
            "headers": headers,
        }
    )
    with path.open("wb") as file:
        pq.write_table(table, file, compression="zstd", compression_level=1, write_statistics=False)
        file.flush()
        os.fsync(file.fileno())


def replay(queue: Queue, transactions: Sequence[Sequence[Output]], name: str) -> Cost:
    """Produce records that lie in memory, a cursor in each transaction's offsets; nothing else."""
    ready = [[(o.value, o.key, list(o.headers), o.timestamp_ms) for o in some] for some in transactions]
    producer = Producer(
        kafka.producer_config(
            queue.connection,
            **SETTINGS,
            **{"transactional.id": name, "partitioner": "murmur2_random", "message.max.bytes": 64 << 20},
        )
    )
    producer.init_transactions(30)
    member = kafka.consumer(queue.connection, name)
    membership = member.consumer_group_metadata()
    done, topic = 0, queue.origin
    with measured(sum(map(len, ready))) as cost:
        for some in ready:
            producer.begin_transaction()
            for value, key, headers, stamp in some:
                producer.produce(topic, value=value, key=key, headers=headers, timestamp=stamp or 0)
            done += len(some)
            cursor = TopicPartition(topic, 0, done, metadata='{"ledger": "0", "plan": "0"}')
            producer.send_offsets_to_transaction([cursor], membership)
            producer.commit_transaction()
    member.close()
    return cost
