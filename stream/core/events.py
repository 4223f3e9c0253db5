"""Decodes a record's bytes into an event, or into a refusal with a reason.

`EventRecord` is the contract with producers of events. The JSON Schema is generated from it. `Decoder` turns the bytes
of one record into an `Event`, the fixed-width form that the window keeps, or into a `Refusal`, which becomes a dead
letter. It never raises because of a record's content. `stream.core.parse` reads ordinary records, which are most of
them. This module reads the rest.

A producer may rely on these rules:

    text       Strict JSON in UTF-8. NaN, Infinity, 1e999, lone surrogates, a byte order mark, anything after the
               object, and nesting that is too deep for the decoder are refused. If a key occurs twice, the last value
               counts, but every value must be valid for its field.
    numbers    A number that is invalid for its field is refused. Unknown fields are not checked.
    time       `ts` is Unix milliseconds, or RFC 3339 with an offset. Times in seconds, zero, negative times, and times
               after 2100 are refused. So are times more than `clock_ahead_ms_max` ahead of the record's own timestamp.
    identity   `user_id` and `event_id` are compared code point by code point: two Unicode forms of one name are two
               users. If a Kafka record has a key, the key must be the user's id in UTF-8.
    money      `price` is the price of one unit; `quantity` defaults to 1. Amounts are never negative: the type `refund`
               says that an amount reduces the spend. A currency other than the configured one needs a rate.
    type       An unknown type is kept as `other`. Any type may come on either topic.
"""
import enum
import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta
from xxhash import xxh3_64_intdigest

from stream.core.parse import Event, EventParser

RECORD_BYTES_MAX = 1 << 20
ID_CHARS_MAX = 256
TS_MS_MIN = 100_000_000_000         # 1973-03-03; a smaller number is most likely a time in seconds
TS_MS_MAX = 4_102_444_800_000       # 2100-01-01
RATING_MAX = 10.0
PRICE_MAX = 1e9
QUANTITY_MAX = 1e6

Id = Annotated[str, Meta(min_length=1, max_length=ID_CHARS_MAX)]
Name = Annotated[str, Meta(max_length=ID_CHARS_MAX)]


class EventType(enum.IntEnum):
    """What the shopper did. Records store these numbers and the model is trained on them, so only append."""

    VIEW = 1
    CLICK = 2
    SEARCH = 3
    FAVORITE = 4
    FOLLOW = 5
    SHARE = 6
    LOGIN = 7
    RATING = 8
    REVIEW = 9
    ADD_TO_CART = 10
    REMOVE_FROM_CART = 11
    PURCHASE = 12
    REFUND = 13
    OTHER = 14


CART_TYPES = frozenset({EventType.ADD_TO_CART, EventType.REMOVE_FROM_CART, EventType.PURCHASE, EventType.REFUND})
TYPE_CODES: dict[str, int] = {kind.name.lower(): int(kind) for kind in EventType}
_OTHER = int(EventType.OTHER)
TYPE_NAMES: dict[int, str] = {code: name for name, code in TYPE_CODES.items()}


class Source(enum.IntEnum):
    """The two input topics. The number is the index of a topic's offset in a user's record."""

    CLICKS = 0
    CARTS = 1


# The topic where an event belongs, by type code. No type has code 0.
SOURCE_OF_TYPE = [Source.CLICKS] + [Source.CARTS if kind in CART_TYPES else Source.CLICKS for kind in EventType]


class EventRecord(msgspec.Struct, gc=False):
    """One shopping event as it is sent. Unknown fields are ignored."""

    event_id: Annotated[Id, Meta(description='Unique per event. A repeat within the window is dropped.')]
    user_id: Annotated[Id, Meta(description="The shopper; also the Kafka record's key.")]
    ts: Annotated[int | str, Meta(description='When it happened: Unix milliseconds, or RFC 3339 with an offset.')]
    type: Annotated[Id, Meta(description=f'One of {", ".join(TYPE_CODES)}; any other type is kept as other.')]
    item_id: Annotated[Name, Meta(description='The item.')] | None = None
    category: Annotated[Name, Meta(description="The item's category.")] | None = None
    price: Annotated[float, Meta(ge=0, le=PRICE_MAX, description='Price of one unit.')] | None = None
    quantity: Annotated[float, Meta(gt=0, le=QUANTITY_MAX, description='Number of units. Default: 1.')] | None = None
    currency: Annotated[str, Meta(
        min_length=3, max_length=3, description='ISO 4217 code. Default: the setting `currency`.')] | None = None
    order_id: Annotated[Name, Meta(description='Lines that share it are one basket.')] | None = None
    session_id: Annotated[Name, Meta(description='Accepted, but not used.')] | None = None
    rating: Annotated[float, Meta(ge=0, le=RATING_MAX, description='Stars or points.')] | None = None
    query: Annotated[str, Meta(description='Text of a search. Accepted, but not used.')] | None = None
    text: Annotated[str, Meta(description='Text of a review. Accepted, but not used.')] | None = None


class Reason(enum.StrEnum):
    """Why a record became a dead letter."""

    NULL_VALUE = 'null_value'
    EMPTY_VALUE = 'empty_value'
    TOO_LARGE = 'too_large'
    INVALID_UTF8 = 'invalid_utf8'
    INVALID_JSON = 'invalid_json'
    TOO_DEEP = 'too_deep'
    MISSING_FIELD = 'missing_field'
    INVALID_FIELD = 'invalid_field'
    TS_UNREADABLE = 'ts_unreadable'
    TS_NOT_POSITIVE = 'ts_not_positive'
    TS_IN_SECONDS = 'ts_in_seconds'
    TS_OUT_OF_RANGE = 'ts_out_of_range'
    TS_AHEAD_OF_CLOCK = 'ts_ahead_of_clock'
    UNKNOWN_CURRENCY = 'unknown_currency'
    NULL_KEY = 'null_key'
    KEY_MISMATCH = 'key_mismatch'


class Refusal(msgspec.Struct, gc=False):
    """Why a record is not a valid event: a machine-readable reason, and a detail for people."""

    reason: str
    detail: str


class EventRules(msgspec.Struct, frozen=True):
    """The shop's settings about its events.

    currency            ISO 4217 code of all amounts
    rates               units of `currency` per unit of another currency, e.g. {'USD': 0.92}
    clock_ahead_ms_max  how far an event's time may be ahead of its Kafka record's timestamp, in ms
    record_bytes_max    larger records are dead letters
    """

    currency: str = 'EUR'
    rates: dict[str, float] = {}
    clock_ahead_ms_max: int = 10 * 60_000
    record_bytes_max: int = RECORD_BYTES_MAX


class KafkaRecord(Protocol):
    """The part of a Kafka record that the decoder reads. A negative `timestamp` means that there is none."""

    @property
    def key(self) -> bytes | None: ...

    @property
    def value(self) -> bytes | None: ...

    @property
    def timestamp(self) -> int: ...

    @property
    def offset(self) -> int: ...


class _Keyless:
    """Stands for the key of a record that was read from a file, where records have no keys."""


KEYLESS = _Keyless()


class _Time(msgspec.Struct, gc=False):
    ts: int | str


class _Place(msgspec.Struct, gc=False):
    ts: int | str
    type: str = ''


_RFC3339 = re.compile(r'\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)', re.ASCII)
_decode_record = msgspec.json.Decoder(EventRecord).decode
_decode_time = msgspec.json.Decoder(_Time).decode
_decode_place = msgspec.json.Decoder(_Place).decode
_MALFORMED = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


class Decoder:
    """Decodes record bytes into an `Event` or a `Refusal`, by one shop's rules."""

    def __init__(self, rules: EventRules) -> None:
        self._parser = EventParser(rules.currency, rules.clock_ahead_ms_max, rules.record_bytes_max, TS_MS_MIN,
                                   TS_MS_MAX, PRICE_MAX, QUANTITY_MAX, RATING_MAX, TYPE_CODES, _OTHER)
        self._bytes_max = rules.record_bytes_max
        self._ahead_ms = rules.clock_ahead_ms_max
        self._rates = {**rules.rates, rules.currency: 1.0}

    def __call__(
        self, value: bytes | None, key: bytes | _Keyless | None = KEYLESS, record_ts_ms: int | None = None,
    ) -> Event | Refusal:
        """Decode one record.

        value         the record's value; None is a tombstone
        key           the Kafka key; KEYLESS for a line of a file
        record_ts_ms  the Kafka record's own timestamp; None if it has none to compare with
        Errors        none: a record that is wrong gives a `Refusal`.
        """
        return self._parser.parse(value, key, record_ts_ms) or self.judge(value, key, record_ts_ms)

    def decode_records(self, records: Sequence[KafkaRecord], source: int) -> list[Event | Refusal]:
        """Decode the records of one topic, in order. Events keep their source and offset."""
        outcomes: list[Any] = self._parser.parse_records(records, source)
        for index, event in enumerate(outcomes):
            if event is None:
                record = records[index]
                outcome = outcomes[index] = self.judge(record.value, record.key,
                                                       record.timestamp if record.timestamp >= 0 else None)
                if isinstance(outcome, Event):
                    outcome.source, outcome.offset = source, record.offset
        return outcomes

    def judge(self, value: bytes | None, key: bytes | _Keyless | None, record_ts_ms: int | None) -> Event | Refusal:
        """Decode one record with the complete JSON decoder: the parser of ordinary events could not read it."""
        if not value:
            if value is None:
                return Refusal(Reason.NULL_VALUE, 'the record has no value')
            return Refusal(Reason.EMPTY_VALUE, 'the value has no bytes')
        if len(value) > self._bytes_max:
            return Refusal(Reason.TOO_LARGE, f'{len(value)} bytes, the maximum is {self._bytes_max}')
        try:
            if not value.isascii():
                value.decode()      # the JSON decoder does not check unknown fields for valid UTF-8
            record = _decode_record(value)
        except _MALFORMED as error:
            return _malformed(error)

        ts_ms = parse_rfc3339_ms(record.ts) if isinstance(record.ts, str) else record.ts
        if ts_ms is None or not TS_MS_MIN <= ts_ms <= TS_MS_MAX:
            return _bad_time(record.ts, ts_ms)
        if record_ts_ms is not None and ts_ms > record_ts_ms + self._ahead_ms:
            return Refusal(Reason.TS_AHEAD_OF_CLOCK, f'{ts_ms - record_ts_ms} ms ahead of the record, '
                                                     f'the maximum is {self._ahead_ms}')
        if key is not KEYLESS:
            if key is None:
                return Refusal(Reason.NULL_KEY, 'the record has no key, so its partition does not follow the user')
            if key != record.user_id.encode():
                return Refusal(Reason.KEY_MISMATCH, "the record's key is not its user_id")

        price = record.price
        amount = 0.0 if price is None else price if record.quantity is None else price * record.quantity
        if record.currency is not None:
            rate = self._rates.get(record.currency)
            if rate is None:
                return Refusal(Reason.UNKNOWN_CURRENCY, f'no rate for {record.currency!r}, known: '
                                                        f'{", ".join(sorted(self._rates))}')
            amount *= rate
        return Event(
            record.user_id,
            record.event_id,
            xxh3_64_intdigest(record.event_id.encode()),
            ts_ms,
            TYPE_CODES.get(record.type, _OTHER),
            hash32(record.item_id) if record.item_id else 0,
            hash16(record.category) if record.category else 0,
            hash32(record.order_id) if record.order_id else 0,
            amount,
            0 if record.rating is None else int(record.rating * 10 + 0.5) + 1,
        )


def peek_ts_ms(value: bytes) -> int | None:
    """The event time of a record in Unix ms, read without checking other fields; None if it cannot be read."""
    try:
        ts = _decode_time(value).ts
    except _MALFORMED:
        return None
    ts_ms = parse_rfc3339_ms(ts) if isinstance(ts, str) else ts
    return ts_ms if ts_ms is not None and TS_MS_MIN <= ts_ms <= TS_MS_MAX else None


def peek_order(value: bytes) -> int | None:
    """A sort key that merges the records of both topics: twice the event time in Unix ms, plus the source.

    At equal times, clicks come first, as in a lane that reads both topics. None if the time cannot be read.
    """
    try:
        place = _decode_place(value)
    except _MALFORMED:
        return None
    ts_ms = parse_rfc3339_ms(place.ts) if isinstance(place.ts, str) else place.ts
    if ts_ms is None or not TS_MS_MIN <= ts_ms <= TS_MS_MAX:
        return None
    return 2 * ts_ms + SOURCE_OF_TYPE[TYPE_CODES.get(place.type, _OTHER)]


def time_order(clicks_ms: Sequence[int], carts_ms: Sequence[int]) -> list[int]:
    """The order in which the records of both topics are folded: by record time; at equal times, clicks first.

    Shapes   a permutation of the indices into the clicks' records followed by the carts' records.
    Promise  records of one topic keep their order, whatever their times: a record counts as no earlier than the ones
             before it.
    """
    times = [*accumulate(clicks_ms, max), *accumulate(carts_ms, max)]
    return sorted(range(len(times)), key=times.__getitem__)


def parse_rfc3339_ms(text: str) -> int | None:
    """Unix ms of an RFC 3339 time with an offset, truncated to the millisecond; None for any other text."""
    if not _RFC3339.fullmatch(text):
        return None
    try:
        moment = datetime.fromisoformat(text.upper())
    except ValueError:      # the 31st of February, hour 25
        return None
    delta = moment - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1000 + delta.microseconds // 1000


_EPOCH = datetime.fromisoformat('1970-01-01T00:00:00+00:00')


@lru_cache(maxsize=1 << 16)
def hash32(text: str) -> int:
    """The low 32 bits of XXH3; never 0, which stands for absent."""
    return xxh3_64_intdigest(text.encode()) & 0xFFFF_FFFF or 1


@lru_cache(maxsize=1 << 14)
def hash16(text: str) -> int:
    """The low 16 bits of XXH3; never 0, which stands for absent."""
    return xxh3_64_intdigest(text.encode()) & 0xFFFF or 1


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of one event, generated from `EventRecord`."""
    return {'$schema': 'https://json-schema.org/draft/2020-12/schema', **msgspec.json.schema(EventRecord)}


def _malformed(error: Exception) -> Refusal:
    text = str(error)
    if isinstance(error, msgspec.ValidationError):
        missing = text.startswith('Object missing required field')
        return Refusal(Reason.MISSING_FIELD if missing else Reason.INVALID_FIELD, text)
    if isinstance(error, RecursionError):
        return Refusal(Reason.TOO_DEEP, 'nested too deeply')
    if isinstance(error, UnicodeDecodeError):
        return Refusal(Reason.INVALID_UTF8, text)
    return Refusal(Reason.INVALID_JSON, text)


def _bad_time(given: int | str, ts_ms: int | None) -> Refusal:
    if ts_ms is None:
        return Refusal(Reason.TS_UNREADABLE, f'{given!r:.80} is not RFC 3339 with an offset')
    if ts_ms <= 0:
        return Refusal(Reason.TS_NOT_POSITIVE, f'{ts_ms} is not a time in milliseconds')
    if ts_ms < TS_MS_MIN:
        return Refusal(Reason.TS_IN_SECONDS, f'{ts_ms} looks like seconds; send milliseconds')
    return Refusal(Reason.TS_OUT_OF_RANGE, f'{ts_ms} is after 2100-01-01')
