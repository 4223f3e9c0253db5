"""A user's record: the window of newest events, the counters that keep what the window forgets, and its codec.

The record, little-endian, no padding:

    header      HEADER, fixed width: see `_HEADER_FIELDS` below, the only place that lists it
    days        DAY x days      day buckets of the last 90 days with activity, oldest first
    outbox      outbox_bytes    the messages of the user's newest step: see `stream.core.outbox`
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

import msgspec
import numpy as np

from stream.core.events import EventType

FORMAT = 2
FORMATS_READ = (1, 2)     # 1 had whole messages in its outbox, which this version reads as well
MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
DAYS_KEPT = 90
NO_TIMER_MS = 0
NO_TIER = -1
CLAIMS_BYTES = 32
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
    ('claims', f'{CLAIMS_BYTES}s', 1),   # room for open claims
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

INTENT_RAISED, CHURN_RAISED = 1, 2


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
