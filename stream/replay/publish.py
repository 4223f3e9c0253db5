"""Send a recording to the input topics, as the shop's producers would.

An event goes to the topic of its type (see `SOURCE_OF_TYPE`). Its key is the user's id, its partition is the one that
the configured partitioner chooses (`none`: murmur2), and its timestamp is the event's time. A row that is not an event
goes unchanged to the clicks topic, so that the worker makes it a dead letter. Recorded records go back to their topic
with their own key, timestamp and headers.

The timeline can be shifted so that the newest event happens at the start of publishing. All event times and timestamps
then move by the same number of milliseconds.
"""
import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from json import loads
from typing import Any

import msgspec
import orjson
from aiokafka import AIOKafkaProducer

from stream.config import Settings
from stream.core.events import SOURCE_OF_TYPE, Decoder, Event
from stream.core.layout import DAY_MS, HOUR_MS
from stream.core.partitioners import MISROUTED, Known, partition
from stream.errors import KafkaError
from stream.kafka.clients import kafka_errors, open_admin, open_producer
from stream.kafka.topics import BROKER_RECORD_BYTES_MAX, Found, read_topics
from stream.replay.recording import Chunk, Recording
from stream.replay.topic_records import decode_record, decoder

GROUP_ROWS = 8_000              # sent together if no rate is set
GROUPS_PER_SECOND = 20          # if a rate is set
GROUPS_IN_FLIGHT = 3
BATCH_BYTES_MAX = 512 << 10
CATCH_UP_S = 1.0                # at most this much of a delay is made up for
_RECORD_MORE_BYTES = 256        # of a record, in addition to its key, value and headers
_TS = re.compile(rb'"ts"\s*:\s*(-?[0-9]+|"[^"\\]*")(?=\s*[,}])')


class PublishOptions(msgspec.Struct, frozen=True):
    """How to send a recording.

    rate           rows per second; 0: as fast as the brokers accept them
    shift_to_now   shift the timeline so that the newest event happens now
    rows_max       stop after this number of rows; None: send all
    """

    rate: float = 0.0
    shift_to_now: bool = False
    rows_max: int | None = None


class Published(msgspec.Struct):
    """Counts of what was sent: rows = clicks + carts + no_events + too_large.

    clicks, carts      events, by topic
    no_events          rows that will become dead letters
    too_large          rows that no broker would accept; not sent
    ahead              rows sent whose time is so far in the future that brokers refuse it as a timestamp. Their record
                       gets the current time instead, and becomes a dead letter
    first_ms, last_ms  earliest and latest event time of the recording, after the shift; Unix ms
    warnings           sentences for the operator
    """

    rows: int = 0
    clicks: int = 0
    carts: int = 0
    no_events: int = 0
    too_large: int = 0
    ahead: int = 0
    first_ms: int = 0
    last_ms: int = 0
    shift_ms: int = 0
    seconds: float = 0.0
    warnings: list[str] = []


class Outgoing(msgspec.Struct, gc=False):
    """One record to send. `partition` None: that of its key, or any without a key."""

    topic: str
    key: bytes | None
    value: bytes | None
    timestamp_ms: int
    headers: list[tuple[str, bytes | None]] | None = None
    partition: int | None = None


async def publish(
    recording: Recording, settings: Settings, options: PublishOptions, progress: Callable[[int], None] | None = None,
) -> Published:
    """Send a scanned recording. When this returns, every record is acknowledged.

    progress   is called with the number of rows sent since the last call
    Errors     InputError; KafkaError if a topic is missing, or the brokers do not answer for `send_timeout_ms`. Records
               sent before an error stay in the topics.
    """
    names = [settings.clicks_topic, settings.carts_topic]
    async with open_admin(settings) as admin:
        topics = await read_topics(admin, names)
    for name in names:
        if name not in topics:
            raise KafkaError(f'There is no topic {name}.', 'create it: `stream topics`.')
    started_ms = time.time_ns() // 1_000_000
    shift_ms = started_ms - recording.last_ms if options.shift_to_now and recording.rows else 0
    account = Published(first_ms=recording.first_ms + shift_ms, last_ms=recording.last_ms + shift_ms, shift_ms=shift_ms)
    account.warnings = _retention_warnings(settings, topics, account, started_ms)
    outgoing = _Sorter(settings, recording, topics, account, started_ms)
    started = time.monotonic()
    bytes_max = min([_bytes_max(topic) for topic in topics.values()])
    async with open_producer(
            settings, 'publish', max_batch_size=min(BATCH_BYTES_MAX, bytes_max),
            request_timeout_ms=settings.send_timeout_ms) as producer:
        waiting: deque[list[asyncio.Future[Any]]] = deque()
        try:
            async for group, rows in _paced(outgoing.groups(options), options.rate):
                # Carts first. A worker that is reading must not see clicks of much later times before them.
                carts = {place: records for place, records in group.items() if place[0] == settings.carts_topic}
                clicks = {place: records for place, records in group.items() if place not in carts}
                await _acknowledged(await _send(producer, carts))
                waiting.append(await _send(producer, clicks))
                if len(waiting) > GROUPS_IN_FLIGHT:
                    await _acknowledged(waiting.popleft())
                if progress is not None:
                    progress(rows)
            while waiting:
                await _acknowledged(waiting.popleft())
        finally:        # after an error nothing else awaits the other results
            await asyncio.gather(*[result for results in waiting for result in results], return_exceptions=True)
    account.seconds = time.monotonic() - started
    return account


Group = dict[tuple[str, int], list[Outgoing]]        # by topic and partition


class _Sorter:
    """Turns rows into records, sorted by topic and partition."""

    def __init__(self, settings: Settings, recording: Recording, topics: Mapping[str, Found], account: Published,
                 started_ms: int) -> None:
        self._recording = recording
        self._topics = (settings.clicks_topic, settings.carts_topic)
        self._partitions = {name: topic.partitions for name, topic in topics.items()}
        self._bytes_max = {name: _bytes_max(topic) for name, topic in topics.items()}
        # Brokers refuse a whole batch because of one timestamp beyond this (KIP-937).
        self._latest_ms = started_ms + min(_ahead_ms_max(topic) for topic in topics.values())
        self._started_ms = started_ms
        self._partitioner: Known = 'murmur2' if settings.partitioner == 'none' else settings.partitioner
        self._shift_ms = account.shift_ms
        self._account = account
        self._row_ms = recording.first_ms       # time of the newest event so far, for rows without a time
        rules = settings.event_rules()
        self._decode = Decoder(rules) if recording.records is None else decoder(rules, recording.records)

    def groups(self, options: PublishOptions) -> Iterator[tuple[Group, int]]:
        """The records in time order, in groups, each with its number of rows."""
        size = GROUP_ROWS if not options.rate else max(1, min(GROUP_ROWS, int(options.rate / GROUPS_PER_SECOND)))
        left = self._recording.rows if options.rows_max is None else options.rows_max
        for chunk in self._recording.chunks(GROUP_ROWS, 1 << 62):
            for start in range(0, len(chunk.values), size):
                if left <= 0:
                    return
                places = range(start, min(start + size, len(chunk.values), start + left))
                left -= len(places)
                yield self._group(chunk, places), len(places)

    def _group(self, chunk: Chunk, places: range) -> Group:
        group: Group = {}
        account, partitions, partitioner = self._account, self._partitions, self._partitioner
        make = self._from_row if self._recording.records is None else self._from_record
        for place in places:
            row = chunk.values[place]
            outcome = chunk.bad.get(place) or self._decode(row)
            record = make(row, outcome)
            topic, key = record.topic, record.key
            size = len(record.value or b'') + len(key or b'') + _RECORD_MORE_BYTES
            if record.headers:
                size += sum(len(name) + len(value or b'') for name, value in record.headers)
            if size > self._bytes_max[topic]:
                account.too_large += 1
                continue
            if isinstance(outcome, Event):
                if topic == self._topics[0]:
                    account.clicks += 1
                else:
                    account.carts += 1
            else:
                account.no_events += 1
            if record.timestamp_ms > self._latest_ms:
                account.ahead += 1
                record.timestamp_ms = self._started_ms
            if record.partition is not None:
                number = record.partition % partitions[topic]
            elif key is None:
                number = (account.rows + place) % partitions[topic]
            else:
                number = partition(partitioner, key, partitions[topic])
            records = group.get((topic, number))
            if records is None:
                group[topic, number] = [record]
            else:
                records.append(record)
        account.rows += len(places)
        return group

    def _from_row(self, row: bytes, outcome: Any) -> Outgoing:
        if isinstance(outcome, Event):
            self._row_ms = outcome.ts_ms
            ts_ms = outcome.ts_ms + self._shift_ms
            value = with_ts(row, ts_ms) if self._shift_ms else row
            return Outgoing(self._topics[SOURCE_OF_TYPE[outcome.type]], outcome.user_id.encode(), value, ts_ms)
        return Outgoing(self._topics[0], _user_key(row), row, self._row_ms + self._shift_ms)

    def _from_record(self, row: bytes, outcome: Any) -> Outgoing:
        record = decode_record(row)
        if record is None:
            return Outgoing(self._topics[0], None, row, self._row_ms + self._shift_ms)
        stamp_ms = record.timestamp_ms if record.timestamp_ms >= 0 else self._row_ms
        value, place = record.value, None
        if isinstance(outcome, Event):
            self._row_ms = outcome.ts_ms
            if self._shift_ms:
                value = with_ts(value or b'', outcome.ts_ms + self._shift_ms)
        elif outcome.reason == MISROUTED:
            place = record.partition
        return Outgoing(record.topic, record.key, value, stamp_ms + self._shift_ms, list(record.headers),
                        place)


def with_ts(value: bytes, ts_ms: int) -> bytes:
    """The event's JSON with another `ts`. All other bytes stay the same, if `ts` occurs once and unescaped."""
    if value.count(b'"ts"') == 1 and b'\\u' not in value:
        match = _TS.search(value)
        if match is not None:
            return b'%b%d%b' % (value[:match.start(1)], ts_ms, value[match.end(1):])
    return orjson.dumps(loads(value) | {'ts': ts_ms}, option=orjson.OPT_NON_STR_KEYS)


class _User(msgspec.Struct):
    user_id: str


_decode_user = msgspec.json.Decoder(_User).decode


def _user_key(row: bytes) -> bytes | None:
    try:
        return _decode_user(row).user_id.encode() or None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def _bytes_max(topic: Found) -> int:
    return int(topic.config.get('max.message.bytes', BROKER_RECORD_BYTES_MAX))


def _ahead_ms_max(topic: Found) -> int:
    return int(topic.config.get('message.timestamp.after.max.ms', HOUR_MS))


def _retention_warnings(
    settings: Settings, topics: Mapping[str, Found], account: Published, now_ms: int,
) -> list[str]:
    warnings = []
    for name, topic in topics.items():
        keep_ms = int(topic.config.get('retention.ms', -1))
        if 'delete' in topic.config.get('cleanup.policy', '') and 0 <= keep_ms < now_ms - account.first_ms:
            warnings.append(
                f'the recording begins {(now_ms - account.first_ms) / DAY_MS:.0f} days ago, but {name} keeps records '
                f'for {keep_ms / DAY_MS:g} days: Kafka may delete them before they are read. Do: run `kafka-configs.sh '
                f'--bootstrap-server {settings.brokers} --alter --topic {name} --add-config retention.ms=-1`.')
    return warnings


async def _paced(groups: Iterator[tuple[Group, int]], rate: float) -> AsyncIterator[tuple[Group, int]]:
    """The groups, each when its first row is due."""
    start, rows = time.monotonic(), 0
    for group in groups:
        if rate:
            late = time.monotonic() - (start + rows / rate)
            if late < 0:
                await asyncio.sleep(-late)
            elif late > CATCH_UP_S:
                start += late - CATCH_UP_S
        rows += group[1]
        yield group


async def _send(producer: AIOKafkaProducer, group: Group) -> list[asyncio.Future[Any]]:
    """Pass the records of each partition to the producer in as few batches as possible. Returns their futures."""
    results = []
    with kafka_errors('Publishing'):
        for (topic, number), records in group.items():
            batch = producer.create_batch()
            for record in records:
                while batch.append(timestamp=record.timestamp_ms, key=record.key, value=record.value,
                                   headers=record.headers or []) is None:
                    results.append(await producer.send_batch(batch, topic, partition=number))
                    batch = producer.create_batch()
            results.append(await producer.send_batch(batch, topic, partition=number))
    return results


async def _acknowledged(results: list[asyncio.Future[Any]]) -> None:
    done = await asyncio.gather(*results, return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            with kafka_errors('Publishing'):
                raise result
