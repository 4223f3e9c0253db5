"""A user's own items, or categories, before a time: the input of the ranking.

A window's slot names one item, and the lines of a basket share a slot. Here each of the user's newest EVENTS_MAX events
counts, whatever the window holds.

    own       int32   [rows, m]               buckets of the items in these events; 0 is padding, at the end
    numbers   float32 [rows, m, OWN_NUMBERS]  log(1 + decayed count), by group of event types (the last: all) and by
                                              decay

There are more buckets of items than in the scores' features, since each bucket stands for one item by name. Two items
of one bucket still have a place each. Training and serving both use this module. Needs no torch.
"""
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stream.core.events import EventType
from stream.core.features import CATEGORY_BUCKETS, buckets
from stream.core.layout import DAY_MS, TYPES
from stream.learn.dataset import Examples, History, SnapshotKind

BUCKETS = {'item': 32_768, 'category': CATEGORY_BUCKETS}    # by the attribute of an event
EVENTS_MAX = 2_000
DECAY_DAYS = (1.0, 3.0, 10.0, 30.0, 90.0, math.inf)         # an event's weight falls to 1/e in so many days
_BOUGHT, _CHOSEN, _UNDONE, _VIEWED = range(4)               # groups of event types
_GROUPS = 4
_ANY = _VIEWED          # in the numbers, all groups together take the place of the views
_HASH_BITS = 32
OWN_NUMBERS = _GROUPS * len(DECAY_DAYS)
UNDONE_NUMBERS = slice(_UNDONE * len(DECAY_DAYS), (_UNDONE + 1) * len(DECAY_DAYS))
_GROUP_OF_TYPE = np.full(TYPES + 1, _VIEWED)
_GROUP_OF_TYPE[EventType.PURCHASE] = _BOUGHT
_GROUP_OF_TYPE[[EventType.ADD_TO_CART, EventType.FAVORITE, EventType.FOLLOW]] = _CHOSEN
_GROUP_OF_TYPE[[EventType.REMOVE_FROM_CART, EventType.REFUND]] = _UNDONE


@dataclass(frozen=True)
class Named:
    """The events of a user that name an item (or a category), by time: int64 [n] each. `hashes` as events have them."""

    ts_ms: np.ndarray
    hashes: np.ndarray
    types: np.ndarray

    @staticmethod
    def of(history: History, user: int, column: str) -> 'Named':
        """The events of one user; a repeat counts once."""
        found = sorted({event.key: (event.ts_ms, getattr(event, column), int(event.type))
                        for event in history.events[user] if getattr(event, column)}.values())
        return Named(*np.array(found, np.int64).reshape(-1, 3).T)

    def until(self, as_of_ms: int, kind: SnapshotKind) -> 'Named':
        """The events known at a time. An event at the time of a cut-off is not known."""
        end = int(np.searchsorted(self.ts_ms, as_of_ms, side='left' if kind == SnapshotKind.CUTOFF else 'right'))
        known = slice(max(0, end - EVENTS_MAX), end)
        return Named(self.ts_ms[known], self.hashes[known], self.types[known])


@dataclass(frozen=True)
class Past:
    """The own items of N rows, ragged: `starts[i]:starts[i + 1]` are the items of row i, ascending by hash. The last
    entry is all 0 and belongs to no row: it is the padding."""

    hashes: np.ndarray      # int64 [pairs + 1]
    own: np.ndarray         # int32 [pairs + 1]
    numbers: np.ndarray     # float32 [pairs + 1, OWN_NUMBERS]
    starts: np.ndarray      # int64 [N + 1]

    def padded(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`own` and `numbers` of some rows, padded to the longest of them, at least 1."""
        ends = self.starts[rows + 1]
        length = max(1, int((ends - self.starts[rows]).max(initial=0)))
        places = self.starts[rows][:, None] + np.arange(length)
        places[places >= ends[:, None]] = len(self.own) - 1
        return self.own[places], self.numbers[places]


def past(history: History, examples: Examples, rows: np.ndarray, column: str) -> Past:
    """The own items of some rows of the examples, in order; `column` is 'item' or 'category'."""
    named = {user: Named.of(history, user, column) for user in np.unique(examples.user[rows]).tolist()}
    parts = [named[int(examples.user[row])].until(int(examples.as_of_ms[row]), SnapshotKind(examples.kind[row]))
             for row in rows]
    owner = np.repeat(np.arange(len(rows)), [len(part.ts_ms) for part in parts])
    empty = np.zeros(0, np.int64)
    ts_ms, hashes, types = (np.concatenate([empty, *(getattr(part, name) for part in parts)])
                            for name in ('ts_ms', 'hashes', 'types'))
    age_days = (examples.as_of_ms[rows][owner] - ts_ms) / DAY_MS
    pairs, pair_of = np.unique(owner << _HASH_BITS | hashes, return_inverse=True)
    cell = pair_of * _GROUPS + _GROUP_OF_TYPE[types]
    numbers = np.zeros((len(pairs) + 1, _GROUPS, len(DECAY_DAYS)), np.float32)
    for place, days in enumerate(DECAY_DAYS):
        often = np.bincount(cell, np.exp(-age_days / days), minlength=len(pairs) * _GROUPS)
        counts = often.reshape(-1, _GROUPS)
        counts[:, _ANY] = counts.sum(1)
        numbers[:-1, :, place] = np.log1p(counts)
    own = np.append(pairs & (1 << _HASH_BITS) - 1, 0)
    return Past(own, buckets(own, BUCKETS[column]).astype(np.int32), numbers.reshape(len(numbers), OWN_NUMBERS),
                np.searchsorted(pairs, np.arange(len(rows) + 1) << _HASH_BITS))


def popular(history: History, users: Iterable[int], column: str, times_ms: np.ndarray, days: float) -> np.ndarray:
    """float32 [times, buckets]: log(1 + users who bought of a bucket within so many days before each time)."""
    count = BUCKETS[column]
    bought = [(event.ts_ms, user, getattr(event, column)) for user in users for event in history.events[user]
              if event.type == EventType.PURCHASE and getattr(event, column)]
    found = np.zeros((len(times_ms), count), np.float32)
    if bought:
        ts_ms, user, hashes = np.array(bought, np.int64).T
        key = user * count + buckets(hashes, count)
        for row, time_ms in zip(found, times_ms.tolist(), strict=True):
            within = (ts_ms < time_ms) & (ts_ms >= time_ms - days * DAY_MS)
            row[:] = np.log1p(np.bincount(np.unique(key[within]) % count, minlength=count))
    return found
