"""Turns users' records into tensors. Training and serving share this code, so their features cannot differ.
`stream.core.windows`, which is compiled, does the arithmetic.

A window of up to 128 events becomes up to SLOTS_MAX slots, oldest first. The lines of one basket share a slot. So do
events of one type at the same time, which are common in recordings with a resolution of one day.
Windows are grouped by slot count into length buckets. Most windows are short, and attention costs time for every slot.

    categories  int32   [rows, length, 3]            type, item bucket, category bucket; padding is all 0, at the end
    numbers     float32 [rows, length, SLOT_NUMBERS] see SLOT_NUMBER_NAMES
    counters    float32 [rows, COUNTERS]             see COUNTER_GROUPS
    row_id      int64   [rows, 1]                    the model passes it through, so mixed-up rows are detected
                                                 -1: a row of zeros that only fills up the batch

Amounts and time spans are encoded as log(1 + x), spans in days. Each row has an as-of time, and every feature is
computed as of that time, never as of "now".
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stream.core import windows
from stream.core.events import TYPE_NAMES, EventType
from stream.core.layout import DAY_DTYPE, HEADER_DTYPE, ROW_DTYPE, TYPES

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
# A batch has a multiple of so many rows. For other numbers, onnxruntime calculates the last elements of an array with
# other instructions, which round differently. So a window's scores do not depend on the windows that share its batch.
ROWS_MULTIPLE = 4
PADDING_ROW = -1        # the `row_id` of rows that only fill up a batch

if windows.CONSTANTS != (SLOTS_MAX, ITEM_BUCKETS, CATEGORY_BUCKETS, SLOT_NUMBERS, COUNTERS, ROWS_MULTIPLE, PADDING_ROW,
                         ROLLING_DAYS, LENGTHS):
    raise AssertionError('stream.core.windows was compiled for another feature layout: install the package again')


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

    def take(self, rows: Sequence[int]) -> 'Snapshots':
        """The snapshots of some users, in this order."""
        return Snapshots(self.headers[rows], self.days[_spans(self.headers['days'], rows)],
                         self.rows[_spans(self.headers['events'], rows)], self.as_of_ms[rows])

    def __len__(self) -> int:
        return len(self.headers)


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
    """One request to the model: rows of about the same length. `row_id` holds indices into the features' rows.

    At the end there may be padding rows: their row_id is PADDING_ROW, everything else in them is 0, and nobody needs
    their scores. `len` counts them.
    """

    categories: np.ndarray      # int32 [rows, length, 3]
    numbers: np.ndarray         # float32 [rows, length, SLOT_NUMBERS]
    counters: np.ndarray        # float32 [rows, COUNTERS]
    row_id: np.ndarray          # int64 [rows, 1]

    def __len__(self) -> int:
        return len(self.row_id)

    @property
    def windows(self) -> int:
        """The number of rows that are no padding."""
        return int(np.count_nonzero(self.row_id != PADDING_ROW))


def features(snapshots: Snapshots) -> Features:
    """Slots and counters of each user as of the user's time. The module's docstring gives the shapes.

    Errors   TypeError or ValueError if the arrays of the snapshots do not belong together.
    """
    categories, numbers, starts, counters, slot_of_row = windows.slots_and_counters(
        snapshots.headers, snapshots.days, snapshots.rows, snapshots.as_of_ms)
    return Features(categories, numbers, starts, counters, slot_of_row)


def batches(inputs: Features, rows_max: int, padding_slots_max: int = 0) -> Iterator[Batch]:
    """Cut the features into padded batches of at most `rows_max` rows, one length bucket each, shortest bucket first.

    A batch is filled up with padding rows to a multiple of ROWS_MULTIPLE. They count for `rows_max`, so a limit of 10
    means batches of up to 8 rows. If `rows_max` is below ROWS_MULTIPLE, batches are not filled up, and the last bits of
    a score may depend on the other rows.

    padding_slots_max   the rows of a bucket move to the next longer one if a longer one has rows, and if the move adds
                        at most this many padding slots
    """
    multiple = ROWS_MULTIPLE if rows_max >= ROWS_MULTIPLE else 1
    order, parts = windows.cut(inputs.starts, rows_max, padding_slots_max)
    for first, last, length in parts:
        height = -((first - last) // multiple) * multiple        # rounded up
        yield _batch(inputs, order[first:last], length, height)


def padded(inputs: Features, rows: np.ndarray, length: int) -> Batch:
    """One batch of these rows alone, each padded to `length` slots.

    Errors   ValueError if a row has more slots; IndexError if there is no such row.
    """
    return _batch(inputs, np.asarray(rows, np.int64), length, len(rows))


def _batch(inputs: Features, rows: np.ndarray, length: int, height: int) -> Batch:
    categories, numbers, counters, row_id = windows.fill(inputs.categories, inputs.numbers, inputs.starts,
                                                         inputs.counters, rows, length, height)
    return Batch(categories, numbers, counters, row_id)


def buckets(hashes: np.ndarray | int, count: int) -> np.ndarray:
    """The bucket, of `count`, for each hash of an item or category; 0 if the event has none."""
    return np.where(hashes > 0, hashes % (count - 1) + 1, 0)


def _spans(counts: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """Where the parts of some users lie in an array that holds `counts[i]` parts of user i, user after user."""
    counts = counts.astype(np.int64)
    taken = counts[rows]
    return np.repeat((np.cumsum(counts) - counts)[rows] - (np.cumsum(taken) - taken), taken) + np.arange(taken.sum())
