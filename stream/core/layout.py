"""The layout of a user's record: the window of newest events, and counters that remember what has left the window.

The record is little-endian, without padding:

    header      HEADER          fixed width; `_HEADER_FIELDS` below is the only list of its fields
    days        DAY x days      day buckets for the last 90 days, oldest first; days without activity have none
    outbox      outbox_bytes    the messages of the user's newest step: see `stream.core.outbox`
    ids         u64 x events    XXH3 of the event ids, in the order of the rows
    rows        ROW x events    the events, ordered by (ts_ms, id)

The joined rows of many users become the model's input with one `numpy.frombuffer(..., ROW_DTYPE)`. The ids are kept
apart from the rows, so the search for a repeated event reads only 8 bytes per event.

All times are event times. The window holds the newest `events_max` events. None of them is more than `span_ms` older
than the newest one. An event that is older than a full window, or older than the span, is late. A late event is counted
as late and changes nothing else, so the window does not depend on the order in which events arrive. The counters do:
they are updated in arrival order.
"""
import enum
import struct

import msgspec
import numpy as np

from stream.core.events import EventType

FORMAT = 2
FORMATS_READ = (1, 2)     # format 1 has whole messages in the outbox; this version reads those too
MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
DAYS_KEPT = 90
NO_TIMER_MS = 0
NO_TIER = -1
CLAIMS_BYTES = 32
TYPES = len(EventType)

# (name, struct code, count): one list for both `struct` and numpy, so the two cannot disagree.
_HEADER_FIELDS = (
    ('format', 'H', 1),             # number of the layout; a record with an unknown number is refused
    ('events', 'H', 1),             # events in the window
    ('days', 'H', 1),               # day buckets
    ('alerting', 'B', 1),           # bit 0: intent alert raised; bit 1: churn alert raised
    ('tier', 'b', 1),               # current tier of purchase power; -1: none yet
    ('outbox_bytes', 'I', 1),
    ('generation', 'I', 1),         # generation of the lane's owner that wrote the record
    ('step', 'q', 1),               # number of the lane's step that wrote the record
    ('next_offset', 'q', 2),        # first offset not yet folded, per source (clicks, carts)
    ('applied', 'I', 1),
    ('duplicate', 'I', 1),
    ('late', 'I', 1),
    ('first_seen_ms', 'q', 1),
    ('last_seen_ms', 'q', 1),
    ('counts', 'I', TYPES),         # applied events by type, index = type - 1
    ('spend', 'd', 1),              # sum of all purchases, refunds not subtracted
    ('refunds', 'd', 1),
    ('orders', 'I', 1),             # purchases of one basket, or of one time if they have no basket, are one order
    ('last_basket', 'I', 1),
    ('last_order_ms', 'q', 1),
    ('gaps', 'I', 1),               # gaps between successive orders: their count, sum and sum of squares, in days
    ('gap_days', 'd', 1),
    ('gap_days_squared', 'd', 1),
    ('due_ms', 'q', 1),             # due time of the next silence timer; 0: none
    ('silence', 'B', 1),            # timers fired since the last event
    ('power_grid', 'i', 1),         # purchase power at the last tier change, in units of 1e-4; -1: none
    ('power_at_ms', 'q', 1),        # these three: as-of time of the last message of each kind; 0: never
    ('intent_at_ms', 'q', 1),
    ('churn_at_ms', 'q', 1),
    ('decisions', 'I', 1),          # decisions published so far
    ('decision_id', '16s', 1),      # id of the last published decision
    ('model', '8s', 1),             # first bytes of the SHA-256 of the model that set the tier
    ('claims', f'{CLAIMS_BYTES}s', 1),   # reserved for open claims
)
_NUMPY_CODES = {'B': 'u1', 'b': 'i1', 'H': '<u2', 'I': '<u4', 'i': '<i4', 'q': '<i8', 'd': '<f8'}

HEADER = struct.Struct('<' + ''.join(code if count == 1 else f'{count}{code}' for _, code, count in _HEADER_FIELDS))
HEADER_DTYPE = np.dtype([
    (name, _NUMPY_CODES.get(code, f'V{code[:-1]}')) + (() if count == 1 else (count,))
    for name, code, count in _HEADER_FIELDS])
ROW = struct.Struct('<qIIfHBB')
ROW_DTYPE = np.dtype([('ts_ms', '<i8'), ('item', '<u4'), ('basket', '<u4'), ('amount', '<f4'), ('category', '<u2'),
                      ('type', 'u1'), ('rating', 'u1')])
DAY = struct.Struct('<HHHHf')       # days since 1970-01-01, browse events, carts, orders, spend minus refunds
DAY_DTYPE = np.dtype([('day', '<u2'), ('browses', '<u2'), ('carts', '<u2'), ('orders', '<u2'), ('spend', '<f4')])

INTENT_RAISED, CHURN_RAISED = 1, 2


class WindowLimits(msgspec.Struct, frozen=True):
    """Bounds of a window, and the silences after which a user is scored again.

    events_max   events kept, at most 65,535
    span_ms      no kept event is more than this older than the newest one
    silence_ms   delays after the last event at which a timer fires, ascending
    """

    events_max: int = 128
    span_ms: int = 400 * DAY_MS
    silence_ms: tuple[int, ...] = tuple(days * DAY_MS for days in (3, 7, 14, 30, 60, 90))


class Fold(enum.IntEnum):
    """The outcome of folding an event."""

    APPLIED = 0
    DUPLICATE = 1       # its id is already in the window
    LATE = 2            # older than a full window, or older than the span
    SEEN = 3            # below the stored offset: a redelivery, which has been counted before
