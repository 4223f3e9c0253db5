"""Record topics in a file that `replay --format kafka` reads: one record a line, see `topic_records`.

Only committed records are read. By default a recording ends where the topics ended when it began. So the file is a
consistent cut through all topics, and a producer that goes on writing cannot prolong it. With `--follow` it goes on
until it is stopped.
"""
import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import ConsumerRecord

from stream.config import Settings
from stream.core.events import parse_rfc3339_ms
from stream.errors import KafkaError, UsageError
from stream.kafka.clients import open_admin, open_consumer
from stream.kafka.topics import Topics, read_topics
from stream.replay.compression import SUFFIXES
from stream.replay.topic_records import TopicRecord, encode_record

POLL_MS = 250
POLL_RECORDS_MAX = 5_000
FETCH_BYTES_MAX = 4 << 20     # of one partition in one fetch
STALLED_S = 60.0        # without progress and not at the end: the brokers are gone


class Recorded(msgspec.Struct):
    """Counts of what was written.

    records   by topic
    missing   offsets of the range without a committed record: transaction markers, and records that were aborted,
              compacted or deleted by retention
    """

    records: dict[str, int]
    missing: int = 0
    seconds: float = 0.0


def check_target(path: Path) -> None:
    """Errors: UsageError if a recording cannot be written to `path`, or would overwrite a file."""
    name = path.name.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    if not name.endswith('.jsonl') or not path.parent.is_dir():
        raise UsageError(f'A recording cannot be written to {path}.',
                         'name a .jsonl, .jsonl.gz or .jsonl.zst file in an existing folder.')
    if path.exists():
        raise UsageError(f'{path} exists already.', 'name another file. A recording never overwrites one.')


def parse_start(text: str) -> tuple[Literal['offset', 'time'], int]:
    """Parse where to begin: `beginning`, an offset of every partition, or an RFC 3339 time of the records.

    Errors   UsageError if the text is none of these.
    """
    if text == 'beginning':
        return 'offset', 0
    if text.isdigit():
        return 'offset', int(text)
    ts_ms = parse_rfc3339_ms(text)
    if ts_ms is None:
        raise UsageError(f'{text!r} is not a place to begin.',
                         'write `beginning`, an offset, or a time such as 2026-01-31T12:00:00Z.')
    return 'time', ts_ms


async def record(
    settings: Settings, names: list[str], write: Callable[[bytes], Any], start: str = 'beginning',
    stop: asyncio.Event | None = None, progress: Callable[[int, int | None], None] | None = None,
) -> Recorded:
    """Read the topics `names` and pass the line of each record to `write`.

    start      see `parse_start`
    stop       None: stop at the current ends of the topics; otherwise go on until it is set
    progress   is called with the number of records written and the number of offsets (None: not known)
    Errors     KafkaError if a topic is missing, or the brokers are gone; UsageError if `start` is wrong.
    """
    kind, begin_at = parse_start(start)
    async with open_admin(settings) as admin:
        topics = Topics(await read_topics(admin, names), [], [], [])
    names = list(dict.fromkeys(names))
    places = [TopicPartition(name, number) for name in names for number in range(topics.partitions(name))]
    account = Recorded(dict.fromkeys(names, 0))
    started = time.monotonic()
    async with open_consumer(settings, 'record', auto_offset_reset='earliest',
                             max_partition_fetch_bytes=FETCH_BYTES_MAX) as consumer:
        consumer.assign(places)
        ends = await consumer.end_offsets(places)
        begins = await _begins(consumer, places, ends, kind, begin_at)
        for place in places:
            consumer.seek(place, begins[place])
        total = None if stop else sum(ends[place] - begins[place] for place in places)
        written = 0
        async for place, records in _records(consumer, begins, ends, stop):
            for entry in records:
                write(encode_record(TopicRecord(
                    entry.topic, entry.partition, entry.offset, entry.timestamp, entry.key, entry.value, entry.headers,
                    topics.found[entry.topic].partitions)) + b'\n')
            account.records[place.topic] += len(records)
            written += len(records)
            if progress is not None:
                progress(written, total)
        if total is not None:
            account.missing = total - written
    account.seconds = time.monotonic() - started
    return account


async def _begins(
    consumer: AIOKafkaConsumer, places: list[TopicPartition], ends: Mapping[TopicPartition, int],
    kind: Literal['offset', 'time'], begin_at: int,
) -> dict[TopicPartition, int]:
    """The first offset to read of each partition, at most its end."""
    first = await consumer.beginning_offsets(places)
    if kind == 'offset':
        return {place: min(max(first[place], begin_at), ends[place]) for place in places}
    found = await consumer.offsets_for_times(dict.fromkeys(places, begin_at))
    return {place: ends[place] if found[place] is None else min(found[place].offset, ends[place]) for place in places}


async def _records(
    consumer: AIOKafkaConsumer, begins: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int],
    stop: asyncio.Event | None,
) -> AsyncIterator[tuple[TopicPartition, list[ConsumerRecord]]]:
    """Records by partition: those below `ends`, or all until `stop` is set."""
    reading = {place for place in begins if stop or begins[place] < ends[place]}
    consumer.pause(*[place for place in begins if place not in reading])
    positions, moved_at = dict(begins), time.monotonic()
    while reading and not (stop and stop.is_set()):
        found = await consumer.getmany(*reading, timeout_ms=POLL_MS, max_records=POLL_RECORDS_MAX)
        for place, records in found.items():
            below = records if stop else [entry for entry in records if entry.offset < ends[place]]
            if below:
                yield place, below
        for place in list(reading):
            # The position also moves past transaction markers and aborted records, which give no record.
            position = await consumer.position(place)
            if position != positions[place]:
                positions[place], moved_at = position, time.monotonic()
            if not stop and position >= ends[place]:
                reading.remove(place)
                consumer.pause(place)
        if not stop and time.monotonic() - moved_at > STALLED_S:
            raise KafkaError(f'No record came for {STALLED_S:.0f} s; {len(reading)} partitions are not at their end.',
                             'check that the brokers are healthy, then record again.')
