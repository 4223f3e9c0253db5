"""Records of Kafka topics as lines of a file: what `stream record` writes and `--format kafka` reads.

Each line is a JSON object with one record. The records of a partition are in the order of their offsets.

    topic, partition, offset    the place of the record
    partitions                  of the topic; 0 or absent: not known, and no record counts as misrouted
    timestamp_ms                of the record, Unix ms; -1: it has none
    key, value                  bytes: as text if they are UTF-8, else {"base64": "..."}; null if there are none
    headers                     pairs of a name and bytes, which are written in the same way; absent if there are none

A replay keeps the offsets, and the order of the log within a partition. The counters of a user depend on the order of
arrival, and an offset below the newest counts as a redelivery. Partitions are merged by the newest event time that each
has reached. A record becomes a dead letter here if the worker would make it one: it has no key or a wrong key, its
event is ahead of its timestamp, or it is on a partition that the partitioner would not choose.
"""
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import orjson

from stream.core.events import Decoder, Event, EventRules, Refusal, peek_ts_ms
from stream.core.partitioners import PartitionerName, misrouted
from stream.errors import InputError

Bytes = str | dict[str, str] | None
BAD_RECORD = 'bad_record'


class TopicRecord(msgspec.Struct):
    """One record of a topic."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]] = ()
    partitions: int = 0


class _RecordLine(msgspec.Struct):
    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: Bytes
    value: Bytes
    headers: list[tuple[str, Bytes]] = []
    partitions: int = 0


class _Topic(msgspec.Struct):
    topic: str


_decode_line = msgspec.json.Decoder(_RecordLine).decode
_decode_topic = msgspec.json.Decoder(_Topic).decode


def encode_record(record: TopicRecord) -> bytes:
    """The record as a line, without the line end. `decode_record` is the inverse."""
    line: dict[str, Any] = {
        'topic': record.topic, 'partition': record.partition, 'offset': record.offset,
        'partitions': record.partitions, 'timestamp_ms': record.timestamp_ms,
        'key': _text(record.key), 'value': _text(record.value)}
    if record.headers:
        line['headers'] = [(name, _text(value)) for name, value in record.headers]
    return orjson.dumps(line)


def decode_record(line: bytes) -> TopicRecord | None:
    """The record of a line. None if the line is not a record."""
    try:
        given = _decode_line(line)
        return TopicRecord(
            given.topic, given.partition, given.offset, given.timestamp_ms, _bytes(given.key), _bytes(given.value),
            [(name, _bytes(value)) for name, value in given.headers], given.partitions)
    except (msgspec.DecodeError, UnicodeError, Base64Error, KeyError, RecursionError):
        return None


class Inputs(msgspec.Struct, frozen=True):
    """The input topics among recorded topics, and the partitioner of their producers.

    topics   in the order of `Source`; records of other topics are skipped
    """

    topics: tuple[str, str] = ('clicks', 'carts')
    partitioner: PartitionerName = 'none'

    def holds(self, line: bytes) -> bool:
        """Whether the line is a row of the recording: a record of an input topic, or a damaged line."""
        try:
            return _decode_topic(line).topic in self.topics
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return True


class RecordTimes:
    """Gives each row its time in the stream: the newest event time so far in its partition.

    Errors   InputError if the offsets of a partition do not ascend: files overlap, or are named in the wrong order.
    """

    def __init__(self, clock_ahead_ms_max: int = EventRules().clock_ahead_ms_max) -> None:
        self._ahead_ms = clock_ahead_ms_max
        self._newest: dict[tuple[str, int], tuple[int, int | None]] = {}     # (offset, time)

    def __call__(self, line: bytes) -> int | None:
        record = decode_record(line)
        if record is None:
            return None
        place = record.topic, record.partition
        last, time_ms = self._newest.get(place, (-1, None))
        if record.offset <= last:
            raise InputError(
                f'{record.topic}-{record.partition} has offset {record.offset} after offset {last}.',
                'name each recording once, and the recordings of a topic in the order in which they were made.')
        ts_ms = peek_ts_ms(record.value) if record.value else None
        if ts_ms is not None and 0 <= record.timestamp_ms < ts_ms - self._ahead_ms:
            ts_ms = None        # it becomes a dead letter, so it must not move the clock
        if ts_ms is not None and (time_ms is None or ts_ms > time_ms):
            time_ms = ts_ms
        self._newest[place] = record.offset, time_ms
        return time_ms


def decoder(rules: EventRules, inputs: Inputs) -> Callable[[bytes], Event | Refusal]:
    """A function from a line to an event with its source and offset, or to a refusal, by the rules of the worker."""
    decode = Decoder(rules)

    def decode_line(line: bytes) -> Event | Refusal:
        record = decode_record(line)
        if record is None:
            return Refusal(BAD_RECORD, 'the line is not a record as written by `stream record`')
        outcome = decode(record.value, record.key, record.timestamp_ms if record.timestamp_ms >= 0 else None)
        if isinstance(outcome, Event):
            assert record.key is not None       # the decoder refuses an event without its key
            if record.partitions > 0:
                refusal = misrouted(inputs.partitioner, record.key, record.partition, record.partitions)
                if refusal is not None:
                    return refusal
            outcome.source = inputs.topics.index(record.topic)
            outcome.offset = record.offset
        return outcome

    return decode_line


def event_bytes(line: bytes) -> bytes:
    """The event JSON in a line; empty if there is none."""
    record = decode_record(line)
    return (record.value if record else None) or b''


def _text(value: bytes | None) -> Bytes:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {'base64': b64encode(value).decode()}


def _bytes(value: Bytes) -> bytes | None:
    if value is None:
        return None
    return value.encode() if isinstance(value, str) else b64decode(value['base64'], validate=True)
