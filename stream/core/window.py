"""A user's record: the window of newest events, the counters that keep what the window forgets, and its codec.

The record, little-endian, no padding:

    header      HEADER, fixed width: see `_HEADER_FIELDS` below, the only place that lists it
    days        DAY x days      day buckets of the last 90 days with activity, oldest first
    outbox      outbox_bytes    the messages of the user's newest step, each as u32 length + bytes
    ids         u64 x events    XXH3 of the event ids, in the order of the rows
    rows        ROW x events    the events, ordered by (ts_ms, id)

Rows of many users, joined, are one `numpy.frombuffer(..., ROW_DTYPE)` away from the model's input; ids stay out of it,
and a repeat is found by one search through 8 bytes per event.

Time is event time throughout. The window is the newest `events_max` events not older than `span_ms` before the newest
one. An event older than a full window, or than the span, is late: counted as late and nothing else, so that the window
is the same in whatever order its events arrive. The counters are a fold in arrival order.
"""
import enum
import struct
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from stream.core.events import Event, EventType
from stream.errors import StateError

FORMAT = 1
MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
DAYS_KEPT = 90
NO_TIMER_MS = 0
NO_TIER = -1
TYPES = len(EventType)

# (name, struct code, count): one list for `struct` and numpy, so that the two cannot disagree.
_HEADER_FIELDS = (
    ('format', 'H', 1),             # number of this layout; another one is refused, never guessed
    ('events', 'H', 1),             # events in the window
    ('days', 'H', 1),               # day buckets
    ('alerting', 'B', 1),           # bit 0: intent alert raised; bit 1: churn alert raised
    ('tier', 'b', 1),               # last published tier of purchase power, -1: none yet
    ('outbox_bytes', 'I', 1),
    ('generation', 'I', 1),         # of the lane's owner that wrote the record
    ('step', 'q', 1),               # of the lane, that wrote the record
    ('next_offset', 'q', 2),        # first offset not yet folded, per source (clicks, carts)
    ('applied', 'I', 1),
    ('duplicate', 'I', 1),
    ('late', 'I', 1),
    ('first_seen_ms', 'q', 1),
    ('last_seen_ms', 'q', 1),
    ('counts', 'I', TYPES),         # applied events by type, index = type - 1
    ('spend', 'd', 1),              # purchases, lifetime
    ('refunds', 'd', 1),
    ('orders', 'I', 1),             # purchases told apart by basket, or by time where there is none
    ('last_basket', 'I', 1),
    ('last_order_ms', 'q', 1),
    ('gaps', 'I', 1),               # gaps between successive orders, count, sum and sum of squares in days
    ('gap_days', 'd', 1),
    ('gap_days_squared', 'd', 1),
    ('due_ms', 'q', 1),             # next silence timer, 0: none
    ('silence', 'B', 1),            # timers fired since the last event
    ('power_grid', 'i', 1),         # purchase power at the last tier change, in units of 1e-4; -1: none
    ('power_at_ms', 'q', 1),        # as-of time of the last message of each kind, 0: never
    ('intent_at_ms', 'q', 1),
    ('churn_at_ms', 'q', 1),
    ('decisions', 'I', 1),          # decisions published so far
    ('decision_id', '16s', 1),      # of the last one
    ('model', '8s', 1),             # first bytes of the SHA-256 of the model that set the tier
    ('claims', '32s', 1),           # room for open claims
)
_NUMPY_CODES = {'B': 'u1', 'b': 'i1', 'H': '<u2', 'I': '<u4', 'i': '<i4', 'q': '<i8', 'd': '<f8'}

HEADER = struct.Struct('<' + ''.join(code if count == 1 else f'{count}{code}' for _, code, count in _HEADER_FIELDS))
HEADER_DTYPE = np.dtype([
    (name, _NUMPY_CODES.get(code, f'V{code[:-1]}')) + (() if count == 1 else (count,))
    for name, code, count in _HEADER_FIELDS])
ROW = struct.Struct('<qIIfHBB')
ROW_DTYPE = np.dtype([('ts_ms', '<i8'), ('item', '<u4'), ('basket', '<u4'), ('amount', '<f4'), ('category', '<u2'),
                      ('type', 'u1'), ('rating', 'u1')])
DAY = struct.Struct('<HHHHf')       # day since 1970, other events, carts, orders, spend less refunds
DAY_DTYPE = np.dtype([('day', '<u2'), ('browses', '<u2'), ('carts', '<u2'), ('orders', '<u2'), ('spend', '<f4')])
_ID_BYTES = 8
_U64 = struct.Struct('<Q')
_pack_u64, _pack_row = _U64.pack, ROW.pack
_I64 = struct.Struct('<q')
_U32 = struct.Struct('<I')
_F32 = struct.Struct('<f')
_BROWSES_AT, _CARTS_AT, _ORDERS_AT, _SPEND_AT = 2, 4, 6, 8        # in a DAY

INTENT_RAISED, CHURN_RAISED = 1, 2

_ADD_TO_CART, _PURCHASE, _REFUND = int(EventType.ADD_TO_CART), int(EventType.PURCHASE), int(EventType.REFUND)


class WindowLimits(msgspec.Struct, frozen=True):
    """Bounds of a window and the silence after which a user is looked at again.

    events_max   events kept, at most 65,535
    span_ms      no event older than this before the newest one is kept
    silence_ms   ascending delays after the last event at which a timer fires
    """

    events_max: int = 128
    span_ms: int = 400 * DAY_MS
    silence_ms: tuple[int, ...] = tuple(days * DAY_MS for days in (3, 7, 14, 30, 60, 90))


class Fold(enum.IntEnum):
    """What became of an event."""

    APPLIED = 0
    DUPLICATE = 1       # its id is in the window
    LATE = 2            # older than a full window, or than the span
    SEEN = 3            # below the stored offset: a redelivery, already accounted for


_APPLIED, _DUPLICATE, _LATE, _SEEN = Fold


class User:
    """One user's record, decoded and mutable. `rows`, `ids` and `days` stay packed; the rest are plain numbers.

    `stored_due_ms` is no part of the record: it is the timer that the index of due times holds for it.
    """

    __slots__ = (
        'user_id', 'generation', 'step', 'next_offset', 'applied', 'duplicate', 'late', 'first_seen_ms', 'last_seen_ms',
        'counts', 'spend', 'refunds', 'orders', 'last_basket', 'last_order_ms', 'gaps', 'gap_days', 'gap_days_squared',
        'due_ms', 'silence', 'alerting', 'tier', 'power_grid', 'power_at_ms', 'intent_at_ms', 'churn_at_ms',
        'decisions', 'decision_id', 'model', 'claims', 'days', 'outbox', 'ids', 'rows', 'stored_due_ms')

    def __init__(self, user_id: str) -> None:
        self.user_id = user_id
        self.generation = self.step = 0
        self.next_offset = [0, 0]
        self.applied = self.duplicate = self.late = 0
        self.first_seen_ms = self.last_seen_ms = 0
        self.counts = [0] * TYPES
        self.spend = self.refunds = 0.0
        self.orders = self.last_basket = self.last_order_ms = 0
        self.gaps = 0
        self.gap_days = self.gap_days_squared = 0.0
        self.due_ms = self.stored_due_ms = NO_TIMER_MS
        self.silence = self.alerting = 0
        self.tier = NO_TIER
        self.power_grid = -1
        self.power_at_ms = self.intent_at_ms = self.churn_at_ms = 0
        self.decisions = 0
        self.decision_id = bytes(16)
        self.model = bytes(8)
        self.claims = bytes(32)
        self.days = bytearray()
        self.outbox = b''
        self.ids = bytearray()
        self.rows = bytearray()


def fold(user: User, events: Sequence[Event], limits: WindowLimits) -> list[Fold]:
    """Put a run of events of one user, in the order in which they were read, into `user`; say what happened to each.

    Ends before an event at or after the timer as an earlier event of the run has left it: then fewer outcomes than
    events come back, and the timer has to fire before the rest.

    Shapes   user.rows: 0..events_max rows in, the same bound out.
    Units    milliseconds of event time; wall time never enters.
    Errors   none: a repeat or a late event is an answer, not an exception.
    Promise  any order of events with distinct ids gives the same window (test_arrival_order_does_not_matter); of two
             events with one id, the one that arrives first is kept.
    """
    # A run at once, with what changes in local names: this is the loop that everything waits for.
    ids, rows, next_offset, last_seen_ms = user.ids, user.rows, user.next_offset, user.last_seen_ms
    counts, days = user.counts, user.days
    ids_bytes_max, span_ms = limits.events_max * _ID_BYTES, limits.span_ms
    outcomes: list[Fold] = []
    for event in events:
        ts_ms = event.ts_ms
        if outcomes and 0 < user.due_ms <= ts_ms:
            break
        if event.offset < next_offset[event.source]:
            outcomes.append(_SEEN)
            continue
        next_offset[event.source] = event.offset + 1
        if ts_ms < last_seen_ms - span_ms:
            user.late += 1
            outcomes.append(_LATE)
            continue
        key = _pack_u64(event.key)
        if key in ids and _contains(ids, key):
            user.duplicate += 1
            outcomes.append(_DUPLICATE)
            continue
        row = _pack_row(ts_ms, event.item, event.basket, event.amount, event.category, event.type, event.rating)
        if ts_ms > last_seen_ms:
            ids += key
            rows += row
            user.last_seen_ms = last_seen_ms = ts_ms
            user.silence = 0
            user.due_ms = ts_ms + limits.silence_ms[0] if limits.silence_ms else NO_TIMER_MS
            if _I64.unpack_from(rows)[0] < ts_ms - span_ms:
                _drop_older(ids, rows, ts_ms - span_ms)
        else:
            place = _place(ids, rows, ts_ms, event.key)
            if not place and len(ids) == ids_bytes_max:
                user.late += 1
                outcomes.append(_LATE)
                continue
            ids[place * _ID_BYTES:place * _ID_BYTES] = key
            rows[place * ROW.size:place * ROW.size] = row
        if len(ids) > ids_bytes_max:
            del ids[:_ID_BYTES], rows[:ROW.size]
        kind = event.type
        counts[kind - 1] += 1
        if ts_ms < user.first_seen_ms or not user.first_seen_ms:
            user.first_seen_ms = ts_ms
        if kind < _ADD_TO_CART:
            _count_day(days, ts_ms // DAY_MS, _BROWSES_AT, 0.0)
        else:
            _count_cart(user, event)
        outcomes.append(_APPLIED)
    user.applied += outcomes.count(_APPLIED)
    return outcomes


def clock_ms(user: User, limits: WindowLimits) -> int:
    """How far the user's time has come: the newest event, or the timer that has fired since."""
    return user.last_seen_ms + (limits.silence_ms[user.silence - 1] if user.silence else 0)


def fire_timer(user: User, limits: WindowLimits) -> int:
    """Take the silence timer that is due and set the next one; return when it was due, in ms of event time."""
    due_ms = user.due_ms
    user.silence += 1
    user.due_ms = (user.last_seen_ms + limits.silence_ms[user.silence]
                   if user.silence < len(limits.silence_ms) else NO_TIMER_MS)
    return due_ms


def pack_header(user: User) -> bytes:
    """The record's fixed part, HEADER.size bytes."""
    u = user
    return HEADER.pack(
        FORMAT, len(u.ids) // _ID_BYTES, len(u.days) // DAY.size, u.alerting, u.tier, len(u.outbox), u.generation,
        u.step, *u.next_offset, u.applied, u.duplicate, u.late, u.first_seen_ms, u.last_seen_ms, *u.counts, u.spend,
        u.refunds, u.orders, u.last_basket, u.last_order_ms, u.gaps, u.gap_days, u.gap_days_squared, u.due_ms,
        u.silence, u.power_grid, u.power_at_ms, u.intent_at_ms, u.churn_at_ms, u.decisions, u.decision_id, u.model,
        u.claims)


def encode(user: User) -> bytes:
    """The user's record as bytes; `decode` is its inverse."""
    return b''.join((pack_header(user), user.days, user.outbox, user.ids, user.rows))


def decode(user_id: str, record: bytes) -> User:
    """A stored record as a `User`.

    Errors   StateError where the layout's number is unknown or the length does not fit the header's counts.
    """
    if len(record) < HEADER.size:
        raise _damaged(user_id, f'{len(record)} bytes, a header has {HEADER.size}')
    user = User.__new__(User)
    user.user_id = user_id
    (number, events, days, user.alerting, user.tier, outbox_bytes, user.generation,
     user.step, clicks, carts, user.applied, user.duplicate, user.late, user.first_seen_ms, user.last_seen_ms,
     *counts, user.spend,
     user.refunds, user.orders, user.last_basket, user.last_order_ms, user.gaps, user.gap_days, user.gap_days_squared,
     user.due_ms, user.silence, user.power_grid, user.power_at_ms, user.intent_at_ms, user.churn_at_ms,
     user.decisions, user.decision_id, user.model, user.claims) = HEADER.unpack_from(record)
    if number != FORMAT:
        raise StateError(f'The record of user {user_id!r} has layout {number}, this version reads layout {FORMAT}.',
                         'run the version that wrote it, or move the state directory away and rebuild it.')
    outbox_at = HEADER.size + days * DAY.size
    ids_at = outbox_at + outbox_bytes
    rows_at = ids_at + events * _ID_BYTES
    if len(record) != rows_at + events * ROW.size:
        raise _damaged(user_id, f'{len(record)} bytes, its header says {rows_at + events * ROW.size}')
    user.stored_due_ms = user.due_ms
    user.next_offset = [clicks, carts]
    user.counts = counts
    user.days = bytearray(record[HEADER.size:outbox_at])
    user.outbox = record[outbox_at:ids_at]
    user.ids = bytearray(record[ids_at:rows_at])
    user.rows = bytearray(record[rows_at:])
    return user


def pack_outbox(messages: Iterable[bytes]) -> bytes:
    """Messages of one step, in order, as the record keeps them."""
    return b''.join(_U32.pack(len(message)) + message for message in messages)


def unpack_outbox(outbox: bytes) -> list[bytes]:
    """The messages that `pack_outbox` packed."""
    messages, at = [], 0
    while at < len(outbox):
        end = at + _U32.size + _U32.unpack_from(outbox, at)[0]
        messages.append(outbox[at + _U32.size:end])
        at = end
    return messages


def _damaged(user_id: str, what: str) -> StateError:
    return StateError(f'The record of user {user_id!r} is damaged: {what}.',
                      'move the state directory away and rebuild it.')


def _contains(ids: bytearray, key: bytes) -> bool:
    at = ids.find(key)
    while at >= 0:
        if at % _ID_BYTES == 0:
            return True
        at = ids.find(key, at + 1)      # found across two ids: look on
    return False


def _place(ids: bytearray, rows: bytearray, ts_ms: int, key: int) -> int:
    """Where (ts_ms, key) belongs; searched from the newest side, since most late events are a little late."""
    place = len(ids) // _ID_BYTES
    while place:
        before_ms = _I64.unpack_from(rows, (place - 1) * ROW.size)[0]
        if before_ms < ts_ms or (before_ms == ts_ms and _U64.unpack_from(ids, (place - 1) * _ID_BYTES)[0] < key):
            break
        place -= 1
    return place


def _drop_older(ids: bytearray, rows: bytearray, horizon_ms: int) -> None:
    drop = 0        # the newest row is never older than the horizon, so the search ends before the last row
    while _I64.unpack_from(rows, drop * ROW.size)[0] < horizon_ms:
        drop += 1
    if drop:
        del ids[:drop * _ID_BYTES], rows[:drop * ROW.size]


def _count_cart(user: User, event: Event) -> None:
    """Day bucket and money of an event of the cart topic, or of an unknown type."""
    days, day, kind = user.days, event.ts_ms // DAY_MS, event.type
    if kind == _PURCHASE:
        user.spend += event.amount
        opens = _opens_order(user, event.ts_ms, event.basket)
        _count_day(days, day, _ORDERS_AT if opens else None, event.amount)
    elif kind == _REFUND:
        user.refunds += event.amount
        _count_day(days, day, None, -event.amount)
    else:
        _count_day(days, day, _CARTS_AT if kind == _ADD_TO_CART else _BROWSES_AT, 0.0)


def _opens_order(user: User, ts_ms: int, basket: int) -> bool:
    """Whether this purchase opens a new order; else it is one more line of the newest one.

    Lines of several baskets that arrive interleaved count as an order each time the basket changes.
    """
    if user.orders and (basket == user.last_basket if basket else ts_ms == user.last_order_ms):
        return False
    if ts_ms >= user.last_order_ms:
        user.last_basket = basket
    if user.orders:
        gap_days = abs(ts_ms - user.last_order_ms) / DAY_MS
        user.gaps += 1
        user.gap_days += gap_days
        user.gap_days_squared += gap_days * gap_days
    user.orders += 1
    user.last_order_ms = max(user.last_order_ms, ts_ms)
    return True


def _count_day(days: bytearray, day: int, count_at: int | None, spend: float) -> None:
    """Add to the day's bucket: 1 to the u16 counter at `count_at` of the bucket, and `spend`.

    Buckets `DAYS_KEPT` days or more behind the newest one are dropped.
    """
    at = len(days) - DAY.size
    if at < 0 or days[at] | days[at + 1] << 8 != day:
        at = _bucket(days, day)
        if at < 0:
            return
    if count_at is not None:
        low = at + count_at
        if days[low] != 0xFF:
            days[low] += 1
        elif days[low + 1] != 0xFF:     # at 65,535 the counter stays
            days[low] = 0
            days[low + 1] += 1
    if spend:
        _F32.pack_into(days, at + _SPEND_AT, _F32.unpack_from(days, at + _SPEND_AT)[0] + spend)


def _bucket(days: bytearray, day: int) -> int:
    """Where the day's bucket is, made if there was none; -1 for a day that is no longer kept."""
    at = len(days)
    newest = day
    while at:
        here = int.from_bytes(days[at - DAY.size:at - DAY.size + 2], 'little')
        if here == day:
            return at - DAY.size
        if here < day:
            break
        newest = max(newest, here)
        at -= DAY.size
    if day <= newest - DAYS_KEPT:
        return -1
    days[at:at] = DAY.pack(day, 0, 0, 0, 0.0)
    dropped = 0
    while int.from_bytes(days[:2], 'little') <= newest - DAYS_KEPT:
        del days[:DAY.size]
        dropped += DAY.size
    return at - dropped
