"""The plain, slow reference: the state of each user that follows from a log of events by the documented rules.

It is written from the guides and the docstrings of `stream/core` and imports nothing of `stream`. So a defect of the
product's decoder, fold, codec or partitioner shows as a difference. It may be slow, but must be simple.
"""
import functools
import json
import math
import struct
from bisect import insort
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from aiokafka.partitioner import murmur2
from xxhash import xxh3_64_intdigest

DAY_MS = 86_400_000
DAYS_KEPT = 90
CLICKS, CARTS = 0, 1
TYPES = ('view', 'click', 'search', 'favorite', 'follow', 'share', 'login', 'rating', 'review', 'add_to_cart',
         'remove_from_cart', 'purchase', 'refund', 'other')
ADD_TO_CART, PURCHASE, REFUND, OTHER = 10, 12, 13, 14      # places in TYPES, from 1
TS_MS_MIN, TS_MS_MAX = 100_000_000_000, 4_102_444_800_000
_ROW = struct.Struct('<qIIfHBB')
_F32 = struct.Struct('<f')


@dataclass(frozen=True)
class Rules:
    """The settings that the rules depend on. The defaults are the documented ones. Times in ms."""

    group: str = 'stream'
    publish: str = 'changes'
    events_max: int = 128
    span_ms: int = 400 * DAY_MS
    silence_ms: tuple[int, ...] = tuple(days * DAY_MS for days in (3, 7, 14, 30, 60, 90))
    clock_ahead_ms_max: int = 600_000
    record_bytes_max: int = 1 << 20
    currency: str = 'EUR'
    rates: dict[str, float] = field(default_factory=dict)
    tier_events_min: int = 5
    intent_raise: float = 0.7
    churn_raise: float = 0.8
    churn_clear: float = 0.6
    churn_orders_min: int = 1
    cooldown_ms: dict[str, int] = field(default_factory=lambda: {
        'purchase_power.updated': 7 * DAY_MS, 'purchase_intent.alert': DAY_MS, 'churn.alert': 7 * DAY_MS})
    ttl_ms: dict[str, int] = field(default_factory=lambda: {
        'purchase_power.updated': 30 * DAY_MS, 'purchase_intent.alert': DAY_MS // 2, 'churn.alert': 7 * DAY_MS})
    # (occasion, action, lowest tier, highest tier, least spend); the first that fits
    actions: tuple[tuple[str, str, int, int, float], ...] = (
        ('churn_raised', 'service_call', -1, 100, 500.0), ('churn_raised', 'coupon', -1, 100, 0.0),
        ('intent', 'recommendation', 2, 100, 0.0), ('intent', 'coupon', -1, 100, 0.0),
        ('power_up', 'loyalty_invitation', 3, 100, 0.0))


class Event(NamedTuple):
    """A valid event. `key`: the XXH3 of its id; `row`: the 24 bytes that are kept; `record_ms`: its record's."""

    user_id: str
    key: int
    ts_ms: int
    type: int
    basket: int
    amount: float
    row: bytes
    record_ms: int = 0


class InvalidError(Exception):
    """The record is not an event, so it must be a dead letter."""


def parse(value: bytes | None, key: bytes | None, record_ts_ms: int, rules: Rules) -> Event:
    """Parse an input record strictly. Errors: InvalidError."""
    if not value or len(value) > rules.record_bytes_max:
        raise InvalidError('no value, or too many bytes')
    try:
        body = json.loads(value.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidError(f'not strict JSON: {error}') from error
    if not isinstance(body, dict):
        raise InvalidError('no object')
    event_id, user_id, kind = (_text(body, name, 1, 256, required=True) for name in ('event_id', 'user_id', 'type'))
    item, category, order, _ = (_text(body, name, 0, 256) for name in ('item_id', 'category', 'order_id', 'session_id'))
    for name in ('query', 'text'):
        _text(body, name, 0, 1 << 30)
    currency = _text(body, 'currency', 3, 3)
    price = _number(body, 'price', 0, 1e9)
    quantity = _number(body, 'quantity', 0, 1e6)
    rating = _number(body, 'rating', 0, 10)
    if quantity == 0:
        raise InvalidError('quantity 0')
    ts_ms = body.get('ts')
    if isinstance(ts_ms, str):
        ts_ms = _rfc3339_ms(ts_ms)
    if type(ts_ms) is not int or not TS_MS_MIN <= ts_ms <= TS_MS_MAX:
        raise InvalidError('no time in milliseconds')
    if ts_ms > record_ts_ms + rules.clock_ahead_ms_max:
        raise InvalidError('ahead of its record')
    if key != user_id.encode():
        raise InvalidError('the key is not the user')
    amount = 0.0 if price is None else float(price) * (1 if quantity is None else quantity)
    if currency is not None and currency != rules.currency:
        if currency not in rules.rates:
            raise InvalidError('no rate')
        amount *= rules.rates[currency]
    code = TYPES.index(kind) + 1 if kind in TYPES else OTHER
    basket = _hash(order, 0xFFFF_FFFF)
    row = _ROW.pack(ts_ms, _hash(item, 0xFFFF_FFFF), basket, amount, _hash(category, 0xFFFF), code,
                    0 if rating is None else int(rating * 10 + 0.5) + 1)
    return Event(user_id, xxh3_64_intdigest(event_id.encode()), ts_ms, code, basket, amount, row)


def _no_constant(name: str) -> None:
    raise ValueError(f'{name} is no JSON')


def _text(body: dict, name: str, low: int, high: int, required: bool = False) -> Any:
    value = body.get(name)
    if value is None and not required:
        return None
    if not isinstance(value, str) or not low <= len(value) <= high:
        raise InvalidError(name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidError(f'{name}: lone surrogate') from error
    return value


def _number(body: dict, name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not low <= value <= high:
        raise InvalidError(name)
    return value


def _rfc3339_ms(text: str) -> int | None:
    try:
        moment = datetime.fromisoformat(text.upper())
    except ValueError:
        return None
    if moment.tzinfo is None or 'T' not in text.upper().replace(' ', 'T'):
        return None
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def _hash(text: str | None, mask: int) -> int:
    return (xxh3_64_intdigest(text.encode()) & mask or 1) if text else 0


@functools.lru_cache(maxsize=1 << 17)
def partition_of(key: bytes, partitions: int) -> int:
    """The partition that Kafka's Java client chooses for a key: murmur2 without its sign bit, modulo `partitions`."""
    return (murmur2(key) & 0x7FFF_FFFF) % partitions


class User:
    """One user, folded event by event in the order of arrival. Attributes have the names of the record's fields."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.window: list[tuple[int, int, bytes]] = []      # (ts_ms, key, row), ascending
        self.applied = self.duplicate = self.late = 0
        self.first_seen_ms = self.last_seen_ms = 0
        self.counts = [0] * len(TYPES)
        self.spend = self.refunds = 0.0
        self.orders = self.last_basket = self.last_order_ms = 0
        self.gaps, self.gap_days, self.gap_days_squared = 0, 0.0, 0.0
        self.days: dict[int, list] = {}     # day -> [other events, carts, orders, spend as float32]
        self.silence = self.due_ms = 0

    def clone(self) -> 'User':
        """An independent copy."""
        twin = User.__new__(User)
        twin.__dict__.update(self.__dict__)
        twin.window, twin.counts = list(self.window), list(self.counts)
        twin.days = {day: list(bucket) for day, bucket in self.days.items()}
        return twin

    def fold(self, event: Event) -> str:
        """Fold an event. Returns its outcome: applied, duplicate, late, or overslept (a timer was due first)."""
        if event.ts_ms < self.last_seen_ms - self.rules.span_ms:
            self.late += 1
            return 'late'
        if any(key == event.key for _, key, _ in self.window):
            self.duplicate += 1
            return 'duplicate'
        entry = (event.ts_ms, event.key, event.row)
        if len(self.window) == self.rules.events_max and entry < self.window[0]:
            self.late += 1
            return 'late'
        insort(self.window, entry)
        if event.ts_ms > self.last_seen_ms:
            self.last_seen_ms, self.silence = event.ts_ms, 0
            self.due_ms = event.ts_ms + self.rules.silence_ms[0] if self.rules.silence_ms else 0
        while len(self.window) > self.rules.events_max or self.window[0][0] < self.last_seen_ms - self.rules.span_ms:
            del self.window[0]
        self.applied += 1
        self.counts[event.type - 1] += 1
        self.first_seen_ms = min(self.first_seen_ms or event.ts_ms, event.ts_ms)
        self._count(event)
        return 'applied'

    def fire(self) -> int:
        """Fire the silence timer. Returns its due time."""
        due_ms, delays = self.due_ms, self.rules.silence_ms
        self.silence += 1
        self.due_ms = self.last_seen_ms + delays[self.silence] if self.silence < len(delays) else 0
        return due_ms

    def clock_ms(self) -> int:
        """The user's current event time."""
        return self.last_seen_ms + (self.rules.silence_ms[self.silence - 1] if self.silence else 0)

    def _count(self, event: Event) -> None:
        browses = carts = orders = 0
        spend = 0.0
        if event.type == PURCHASE:
            self.spend += event.amount
            spend = event.amount
            orders = self._opens_order(event)
        elif event.type == REFUND:
            self.refunds += event.amount
            spend = -event.amount
        elif event.type == ADD_TO_CART:
            carts = 1
        else:
            browses = 1
        day = event.ts_ms // DAY_MS
        if self.days and day <= max(self.days) - DAYS_KEPT:
            return
        bucket = self.days.setdefault(day, [0, 0, 0, 0.0])
        for place, more in enumerate((browses, carts, orders)):
            bucket[place] = min(bucket[place] + more, 65_535)
        bucket[3] = _F32.unpack(_F32.pack(bucket[3] + spend))[0]
        for old in [old for old in self.days if old <= max(self.days) - DAYS_KEPT]:
            del self.days[old]

    def _opens_order(self, event: Event) -> int:
        if self.orders:
            same = event.basket == self.last_basket if event.basket else event.ts_ms == self.last_order_ms
            if same:
                return 0
            gap_days = abs(event.ts_ms - self.last_order_ms) / DAY_MS
            self.gaps += 1
            self.gap_days += gap_days
            self.gap_days_squared += gap_days * gap_days
        self.orders += 1
        if event.ts_ms >= self.last_order_ms:
            self.last_basket, self.last_order_ms = event.basket, event.ts_ms
        return 1


def window_of(events: list[Event], rules: Rules) -> list[tuple[int, int, bytes]]:
    """The window of a set of events in any order: the newest ones within the span of the newest."""
    if not events:
        return []
    newest_ms = max(event.ts_ms for event in events)
    distinct = {event.key: (event.ts_ms, event.key, event.row) for event in reversed(events)}
    within = sorted(entry for entry in distinct.values() if entry[0] >= newest_ms - rules.span_ms)
    return within[-rules.events_max:]


def median_tier(probabilities: list[float]) -> int:
    """The median tier, with probabilities on the grid of 1e-4."""
    total = 0.0
    for tier, probability in enumerate(probabilities):
        total += probability
        if round(total * 10_000) >= 5_000:
            return tier
    return len(probabilities) - 1


def is_number(value: object, low: float, high: float) -> bool:
    """A finite number in [low, high]."""
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high  # type: ignore[arg-type]
