"""Records of Kafka topics as lines of a file: what `stream record` writes and `--format kafka` reads.

One JSON object a line, one line a record, each partition's records in order of their offsets:

    topic, partition, offset    where it was
    partitions                  how many the topic had; 0 or absent: not known, and no record is misrouted
    timestamp_ms                the record's own timestamp, Unix ms; -1: it has none
    key, value                  bytes: text where they are UTF-8, else {"base64": "..."}; null where there are none
    headers                     pairs of a name and bytes, written in the same way; absent where there are none

A replay keeps the offsets, and within a partition the order of the log, because the counters of a user are a fold in
arrival order and an offset below the newest is taken for a redelivery. Partitions are merged by the newest event time
that each has come to. What the worker makes a dead letter becomes one here: no key or another one, an event ahead of
its record's timestamp, a key on a partition where the partitioner would not put it.
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


class _Line(msgspec.Struct):
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


_decode_line = msgspec.json.Decoder(_Line).decode
_decode_topic = msgspec.json.Decoder(_Topic).decode


def encode_record(record: TopicRecord) -> bytes:
    """The record as a line, without the line end; `decode_record` is its inverse."""
    line: dict[str, Any] = {
        'topic': record.topic, 'partition': record.partition, 'offset': record.offset,
        'partitions': record.partitions, 'timestamp_ms': record.timestamp_ms,
        'key': _text(record.key), 'value': _text(record.value)}
    if record.headers:
        line['headers'] = [(name, _text(value)) for name, value in record.headers]
    return orjson.dumps(line)


def decode_record(line: bytes) -> TopicRecord | None:
    """The record of a line; None where the line is none."""
    try:
        given = _decode_line(line)
        return TopicRecord(
            given.topic, given.partition, given.offset, given.timestamp_ms, _bytes(given.key), _bytes(given.value),
            [(name, _bytes(value)) for name, value in given.headers], given.partitions)
    except (msgspec.DecodeError, UnicodeError, Base64Error, KeyError, RecursionError):
        return None


class Inputs(msgspec.Struct, frozen=True):
    """What tells the events among recorded records.

    topics        of the two sources, in the order of `Source`; records of other topics are passed over
    partitioner   of the producers
    """

    topics: tuple[str, str] = ('clicks', 'carts')
    partitioner: PartitionerName = 'none'

    def holds(self, line: bytes) -> bool:
        """Whether this is a row of the recording: a record of an input topic, or a damaged line."""
        try:
            return _decode_topic(line).topic in self.topics
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return True


class RecordTimes:
    """The time at which each row stands in the stream: in its partition, the newest event time so far.

    Errors   InputError where a partition's offsets do not ascend: files that overlap, or are named in another order.
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
                'name each recording once, and recordings of one topic in the order in which they were made.')
        ts_ms = peek_ts_ms(record.value) if record.value else None
        if ts_ms is not None and 0 <= record.timestamp_ms < ts_ms - self._ahead_ms:
            ts_ms = None        # it will be a dead letter: it must not move the clock
        if ts_ms is not None and (time_ms is None or ts_ms > time_ms):
            time_ms = ts_ms
        self._newest[place] = record.offset, time_ms
        return time_ms


def decoder(rules: EventRules, inputs: Inputs) -> Callable[[bytes], Event | Refusal]:
    """Lines to events that know their source and offset, or refusals, by the rules of the worker."""
    decode = Decoder(rules)

    def decode_line(line: bytes) -> Event | Refusal:
        record = decode_record(line)
        if record is None:
            return Refusal(BAD_RECORD, 'the line is no record as `stream record` writes it')
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
    """The event JSON in a line; empty where there is none."""
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
