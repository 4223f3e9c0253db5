"""Turns users' records into tensors. Training and serving share this code, so their features cannot differ.

A window of up to 128 events becomes up to SLOTS_MAX slots, oldest first. The lines of one basket share a slot. So do
events of one type at the same time, which are common in recordings with a resolution of one day.
Windows are grouped by slot count into length buckets. Most windows are short, and attention costs time for every slot.

    categories  int32   [rows, length, 3]            type, item bucket, category bucket; padding is all 0, at the end
    numbers     float32 [rows, length, SLOT_NUMBERS] see SLOT_NUMBER_NAMES
    counters    float32 [rows, COUNTERS]             see COUNTER_GROUPS
    row_id      int64   [rows, 1]                    the model passes it through, so mixed-up rows are detected

Amounts and time spans are encoded as log(1 + x), spans in days. Each row has an as-of time, and every feature is
computed as of that time, never as of "now".
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stream.core.events import TYPE_NAMES, EventType
from stream.core.layout import DAY_DTYPE, DAY_MS, HEADER_DTYPE, MINUTE_MS, ROW_DTYPE, TYPES

SLOTS_MAX = 64
LENGTHS = (8, 16, 32, 64)
TYPE_VOCABULARY = TYPES + 1         # 0 is padding
ITEM_BUCKETS = 4096                 # 0 is absent
CATEGORY_BUCKETS = 1024             # 0 is absent
SLOT_NUMBER_NAMES = ('amount', 'gap_days', 'age_days', 'lines', 'rating', 'hour_sin', 'hour_cos')
SLOT_NUMBERS = len(SLOT_NUMBER_NAMES)
ROLLING_DAYS = (7, 30, 90)

# The names of the counter columns, in the groups that reasons refer to.
COUNTER_GROUPS: dict[str, tuple[str, ...]] = {
    'history': (*(f'count_{TYPE_NAMES[kind]}' for kind in EventType), 'days_since_first_seen'),
    'silence': ('days_since_last_seen',),
    'orders': ('spend', 'refunds', 'spend_per_order', 'orders', 'has_ordered', 'days_since_last_order',
               'gap_days_mean', 'gap_days_deviation', 'overdue'),
    'activity': tuple(f'{name}_{days}d' for days in ROLLING_DAYS
                      for name in ('browses', 'carts', 'orders', 'spend', 'active_days')),
    'calendar': ('hour_sin', 'hour_cos', 'weekday_sin', 'weekday_cos', 'year_sin', 'year_cos'),
}
COUNTER_NAMES = tuple(name for names in COUNTER_GROUPS.values() for name in names)
COUNTERS = len(COUNTER_NAMES)
_YEAR_MS = 365.2425 * DAY_MS
# A slot's hour has a resolution of one minute: a table lookup takes a tenth of the time of a sine.
_MINUTE_ANGLE = np.arange(DAY_MS // MINUTE_MS) * (2 * np.pi * MINUTE_MS / DAY_MS)
_MINUTE_SIN, _MINUTE_COS = np.sin(_MINUTE_ANGLE).astype(np.float32), np.cos(_MINUTE_ANGLE).astype(np.float32)


@dataclass(slots=True)
class Snapshots:
    """What the model may know about N users, each as of its own time.

    headers   HEADER_DTYPE [N]
    days      DAY_DTYPE [sum of headers['days']], user after user
    rows      ROW_DTYPE [sum of headers['events']], user after user, ordered by time within a user
    as_of_ms  int64 [N], never earlier than a user's newest event
    """

    headers: np.ndarray
    days: np.ndarray
    rows: np.ndarray
    as_of_ms: np.ndarray

    @staticmethod
    def join(headers: Sequence[bytes], days: Sequence[bytes | bytearray], rows: Sequence[bytes | bytearray],
             as_of_ms: Sequence[int]) -> 'Snapshots':
        """Build snapshots from the packed parts of N records."""
        return Snapshots(np.frombuffer(b''.join(headers), HEADER_DTYPE), np.frombuffer(b''.join(days), DAY_DTYPE),
                         np.frombuffer(b''.join(rows), ROW_DTYPE), np.array(as_of_ms, np.int64))

    def __len__(self) -> int:
        return len(self.headers)

    def take(self, rows: Sequence[int]) -> 'Snapshots':
        """The snapshots of some users, in this order."""
        return Snapshots(self.headers[rows], self.days[_spans(self.headers['days'], rows)],
                         self.rows[_spans(self.headers['events'], rows)], self.as_of_ms[rows])


@dataclass(slots=True)
class Features:
    """The slots of N windows, as ragged arrays, and their counters. Row i has the slots `starts[i]:starts[i + 1]`.

    The last slot belongs to no row. It is all 0, and padding refers to it.
    slot_of_row  for each event of the snapshots, its slot; -1 if the slot is older than the newest SLOTS_MAX
    """

    categories: np.ndarray      # int32 [slots + 1, 3]
    numbers: np.ndarray         # float32 [slots + 1, SLOT_NUMBERS]
    starts: np.ndarray          # int64 [N + 1]
    counters: np.ndarray        # float32 [N, COUNTERS]
    slot_of_row: np.ndarray     # int64 [events]


@dataclass(slots=True)
class Batch:
    """One request to the model: rows of about the same length. `row_id` holds indices into the features' rows."""

    categories: np.ndarray      # int32 [rows, length, 3]
    numbers: np.ndarray         # float32 [rows, length, SLOT_NUMBERS]
    counters: np.ndarray        # float32 [rows, COUNTERS]
    row_id: np.ndarray          # int64 [rows, 1]

    def __len__(self) -> int:
        return len(self.row_id)


def features(snapshots: Snapshots) -> Features:
    """Slots and counters of each user as of the user's time. The module's docstring gives the shapes."""
    categories, numbers, starts, slot_of_row = _slots(snapshots)
    return Features(categories, numbers, starts, _counters(snapshots), slot_of_row)


def batches(inputs: Features, rows_max: int, padding_slots_max: int = 0) -> Iterator[Batch]:
    """Cut the features into padded batches of at most `rows_max` rows, one length bucket each, shortest bucket first.

    padding_slots_max   the rows of a bucket move to the next longer one if a longer one has rows, and if the move adds
                        at most this many padding slots
    """
    bucket = np.searchsorted(LENGTHS, np.diff(inputs.starts))
    rows_of = np.bincount(bucket, minlength=len(LENGTHS)).tolist()
    for index, (length, longer) in enumerate(pairwise(LENGTHS)):
        if 0 < rows_of[index] * (longer - length) <= padding_slots_max and any(rows_of[index + 1:]):
            bucket[bucket == index] = index + 1
            rows_of[index + 1] += rows_of[index]
    for index, length in enumerate(LENGTHS):
        members = np.flatnonzero(bucket == index)
        for at in range(0, len(members), rows_max):
            yield padded(inputs, members[at:at + rows_max], length)


def padded(inputs: Features, rows: np.ndarray, length: int) -> Batch:
    """One batch of these rows, each padded to `length` slots. No row may have more slots."""
    slots = inputs.starts[rows][:, None] + np.arange(length)            # [rows, length]
    slots[slots >= inputs.starts[rows + 1][:, None]] = len(inputs.categories) - 1
    return Batch(inputs.categories.take(slots, axis=0), inputs.numbers.take(slots, axis=0),
                 inputs.counters[rows], rows.astype(np.int64)[:, None])


def buckets(hashes: np.ndarray | int, count: int) -> np.ndarray:
    """The bucket, of `count`, for each hash of an item or category; 0 if the event has none."""
    return np.where(hashes > 0, hashes % (count - 1) + 1, 0)


def _spans(counts: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """Where the parts of some users lie in an array that holds `counts[i]` parts of user i, user after user."""
    counts = counts.astype(np.int64)
    taken = counts[rows]
    return np.repeat((np.cumsum(counts) - counts)[rows] - (np.cumsum(taken) - taken), taken) + np.arange(taken.sum())


def _slots(snapshots: Snapshots) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    events = snapshots.headers['events'].astype(np.int64)
    users = len(events)
    owner = np.repeat(np.arange(users), events)
    order, rows = _by_moment(snapshots.rows, owner)
    opens = np.ones(len(rows), bool)        # whether an event opens a slot
    moment_ms, basket, kind = rows['ts_ms'], rows['basket'], rows['type']
    opens[1:] = ((owner[1:] != owner[:-1]) | (kind[1:] != kind[:-1]) | (basket[1:] != basket[:-1])
                 | ((basket[1:] == 0) & (moment_ms[1:] != moment_ms[:-1])))

    # Keep the newest SLOTS_MAX slots of each user: count slots back from the newest one.
    slot = np.cumsum(opens) - 1
    slots_of = np.bincount(owner[opens], minlength=users)
    ends = np.cumsum(slots_of)
    keep = ends[owner] - slot <= SLOTS_MAX
    kept_of = np.minimum(slots_of, SLOTS_MAX)
    starts = np.concatenate(([0], np.cumsum(kept_of)))
    slot_of_row = np.where(keep, slot - (ends - starts[1:])[owner], -1)

    first = np.flatnonzero(opens & keep)
    kept_slot = slot_of_row[keep]
    head, head_owner = _take_rows(rows, first), owner[first]
    slots = len(first)
    lines = np.bincount(kept_slot, minlength=slots)
    amount = np.bincount(kept_slot, rows['amount'][keep], minlength=slots)

    ts_ms = np.ascontiguousarray(head['ts_ms'])
    gap_days = np.zeros(slots)
    gap_days[1:] = (ts_ms[1:] - ts_ms[:-1]) / DAY_MS
    gap_days[starts[:-1][kept_of > 0]] = 0.0
    categories = np.zeros((slots + 1, 3), np.int32)
    categories[:-1, 0] = head['type']
    categories[:-1, 1] = buckets(head['item'], ITEM_BUCKETS)
    categories[:-1, 2] = buckets(head['category'], CATEGORY_BUCKETS)
    minute = ts_ms % DAY_MS // MINUTE_MS
    numbers = np.zeros((slots + 1, SLOT_NUMBERS), np.float32)
    numbers[:-1, 0] = np.log1p(amount)
    numbers[:-1, 1] = np.log1p(gap_days)
    numbers[:-1, 2] = np.log1p((snapshots.as_of_ms[head_owner] - ts_ms) / DAY_MS)
    numbers[:-1, 3] = np.log1p(lines - 1)
    numbers[:-1, 4] = head['rating'] / 10.0
    numbers[:-1, 5] = _MINUTE_SIN[minute]
    numbers[:-1, 6] = _MINUTE_COS[minute]
    if order is not None:
        slot_of_row[order] = slot_of_row.copy()
    return categories, numbers, starts, slot_of_row


def _by_moment(rows: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Sort a user's events at the same time by type. Returns the order, None if nothing moved, and the sorted events.

    A window orders events at the same time by id hash, which scatters the types. Recordings with a resolution of one
    day consist of such ties.
    """
    ts_ms, kind = rows['ts_ms'], rows['type']
    if not np.any((ts_ms[1:] == ts_ms[:-1]) & (kind[1:] < kind[:-1]) & (owner[1:] == owner[:-1])):
        return None, rows
    order = np.lexsort((kind, ts_ms, owner))
    return order, _take_rows(rows, order)


def _take_rows(rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
    # View each row as three integers: numpy copies those several times faster than structured fields.
    return rows.view('<i8').reshape(-1, 3).take(indices, axis=0).reshape(-1).view(ROW_DTYPE)


def _counters(snapshots: Snapshots) -> np.ndarray:
    header, as_of_ms = snapshots.headers, snapshots.as_of_ms
    ordered = header['orders'] > 0
    gaps = np.maximum(header['gaps'], 1)
    gap_mean = header['gap_days'] / gaps
    gap_deviation = np.sqrt(np.maximum(header['gap_days_squared'] / gaps - gap_mean**2, 0.0))
    order_age = np.where(ordered, (as_of_ms - header['last_order_ms']) / DAY_MS, 0.0)
    columns = [
        *np.log1p(header['counts'].T),
        np.log1p((as_of_ms - header['first_seen_ms']) / DAY_MS),
        np.log1p((as_of_ms - header['last_seen_ms']) / DAY_MS),
        np.log1p(header['spend']),
        np.log1p(header['refunds']),
        np.log1p(header['spend'] / np.maximum(header['orders'], 1)),
        np.log1p(header['orders']),
        ordered,
        np.log1p(order_age),
        np.log1p(gap_mean),
        np.log1p(gap_deviation),
        np.where(header['gaps'] > 0, np.log1p(order_age / np.maximum(gap_mean, 1.0)), 0.0),
        *_rolling(snapshots),
        *_calendar(as_of_ms),
    ]
    counters = np.empty((len(header), COUNTERS), np.float32)
    for index, column in enumerate(columns):
        counters[:, index] = column
    return counters


def _rolling(snapshots: Snapshots) -> list[np.ndarray]:
    days, users = snapshots.days, len(snapshots)
    owner = np.repeat(np.arange(users), snapshots.headers['days'])
    age = (snapshots.as_of_ms // DAY_MS)[owner] - days['day']
    sums = [days[name].astype(np.float64) for name in ('browses', 'carts', 'orders', 'spend')]
    columns = []
    for horizon in ROLLING_DAYS:
        recent = age < horizon
        who = owner[recent]
        for values in sums:
            total = np.bincount(who, values[recent], minlength=users)
            columns.append(np.log1p(np.maximum(total, 0.0)))    # refunds may outweigh the spend of a short horizon
        columns.append(np.log1p(np.bincount(who, minlength=users)))
    return columns


def _calendar(as_of_ms: np.ndarray) -> list[np.ndarray]:
    columns = []
    for period_ms in (DAY_MS, 7 * DAY_MS, _YEAR_MS):
        angle = as_of_ms % period_ms * (2 * np.pi / period_ms)
        columns += [np.sin(angle), np.cos(angle)]
    return columns
