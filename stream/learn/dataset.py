"""Turn recorded events into training examples: what the worker would have known at a time, and what happened next.

    events -> History, user by user -> folded as the worker folds, packed as of a time -> snapshots and labels

A snapshot is taken at a cut-off (a time that is the same for all users; only earlier events are known), or at a time at
which the worker scores a user: right after an event, or when a silence timer is due. Snapshots are packed while the
events are folded, so they hold nothing later. Labels count events from a cut-off on, or after any other time.

    bought    float32 [N, len(HORIZON_DAYS)]  1: a purchase within so many days
    refunded  float32 [N]                     1: a refund within REFUND_DAYS
    spent     float32 [N, len(HORIZON_DAYS)]  purchases less refunds within so many days, never below 0; the number of
                                              purchases if the recording has no prices

A label is NaN while its days are not over (`known_until_ms`). Such a horizon is not settled and teaches nothing, not
even the purchases seen so far. `bought_next` gives the labels of the ranking: what is bought next.
"""
import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from xxhash import xxh3_64_intdigest

from stream.core.events import Decoder, Event, EventRules, EventType, Refusal
from stream.core.features import Features, Snapshots, features
from stream.core.layout import DAY_MS, Fold, WindowLimits
from stream.core.user import User, clock_ms, fire_timer, fold, pack_header
from stream.errors import UsageError
from stream.learn.options import Count, NotNegative

HORIZON_DAYS = (1, 7, 30, 90, 273)
INTENT, CHURN = HORIZON_DAYS.index(7), HORIZON_DAYS.index(30)     # the horizons that the worker publishes
ACTIVE_DAYS = 90        # who bought within so many days is active
REFUND_DAYS = 30
SPEND_DAYS = 90         # the spend that the worker publishes is of so many days
SPEND = HORIZON_DAYS.index(SPEND_DAYS)
NEXT_DAYS = 30          # what is bought within so many days is next
SESSION_GAP_MS = 30 * 60_000        # a longer pause ends a session

Parts = tuple[bytes, bytes, bytes]      # header, days, rows: what `Snapshots.join` joins


class SnapshotKind(enum.IntEnum):
    """Why a snapshot was taken at its time."""

    CUTOFF = 0          # a time that is the same for all users
    EVENT = 1           # an event, and the session goes on
    SESSION_END = 2     # the last event of a session
    TIMER = 3           # a silence timer is due


@dataclass(frozen=True)
class History:
    """All events of a recording.

    user_ids   of U users
    events     of each user, in the order in which the worker would read them
    refused    records that are no valid events
    priced     whether any purchase has an amount; without, spend cannot be predicted
    """

    user_ids: list[str]
    events: list[list[Event]]
    refused: int
    start_ms: int
    end_ms: int
    priced: bool

    def __len__(self) -> int:
        return sum(map(len, self.events))

    def before(self, ts_ms: int) -> 'History':
        """The events before a time. Errors: UsageError if there are none."""
        return history_of({user_id: kept for user_id, events in zip(self.user_ids, self.events, strict=True)
                           if (kept := [event for event in events if event.ts_ms < ts_ms])}, self.refused)


@dataclass(frozen=True)
class ExampleOptions:
    """Which snapshots to take.

    cutoffs_per_user  at most so many daily cut-offs per user, drawn from those after the user's first event
    moments_per_user  mean number of scoring times per user. Each is kept with the same probability. A fixed number
                      per user would look ahead: it would keep a larger share of a short life, and so leak the label
    """

    cutoffs_per_user: Count = 100
    moments_per_user: NotNegative = 6.0


@dataclass(frozen=True)
class Labels:
    """The labels of N snapshots; see the module's docstring."""

    bought: np.ndarray
    refunded: np.ndarray
    spent: np.ndarray

    @property
    def spend(self) -> np.ndarray:
        """float32 [N]: of the SPEND_DAYS."""
        return self.spent[:, SPEND]


@dataclass(frozen=True)
class Examples:
    """N snapshots with features and labels.

    snapshots  what was known; `inputs` are their features
    kind       int8 [N], see SnapshotKind
    user       int64 [N], indices into the history's `user_ids`
    """

    snapshots: Snapshots
    inputs: Features
    labels: Labels
    kind: np.ndarray
    user: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    @property
    def as_of_ms(self) -> np.ndarray:
        """int64 [N]"""
        return self.snapshots.as_of_ms

    @property
    def active(self) -> np.ndarray:
        """bool [N]: bought within the ACTIVE_DAYS before the snapshot."""
        header = self.snapshots.headers
        return (header['orders'] > 0) & (self.as_of_ms - header['last_order_ms'] <= ACTIVE_DAYS * DAY_MS)


def read(values: Iterable[bytes], rules: EventRules) -> History:
    """A history from event JSON in the order in which the worker would read it.

    Errors   UsageError where there is no valid event.
    """
    decode = Decoder(rules)
    by_user: dict[str, list[Event]] = {}
    refused = 0
    for value in values:
        event = decode(value)
        if isinstance(event, Refusal):
            refused += 1
        else:
            event.event_id = ''     # its key is what counts; millions of ids would fill the memory
            by_user.setdefault(event.user_id, []).append(event)
    if not by_user and refused:
        raise UsageError(f'There is not one valid event: {refused:,} records were refused.',
                         do='check --format; `stream replay` writes why each one is refused.')
    return history_of(by_user, refused)


def history_of(by_user: dict[str, list[Event]], refused: int = 0) -> History:
    """A history of decoded events. Errors: UsageError where there is none."""
    if not by_user:
        raise UsageError('There is not one valid event, or none before that time.',
                         do='check the files, their format, and times.')
    times = [event.ts_ms for events in by_user.values() for event in events]
    priced = any(event.amount > 0 for events in by_user.values() for event in events
                 if event.type == EventType.PURCHASE)
    return History(list(by_user), list(by_user.values()), refused, min(times), max(times), priced)


def tier_of(spend: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Tier of each spend, int64: 0 for no spend, else 1 + the number of edges at or below it; -1 for NaN."""
    tiers = np.where(spend > 0, 1 + np.searchsorted(edges, spend, side='right'), 0)
    return np.where(np.isnan(spend), -1, tiers).astype(np.int64)


def part_of(user_id: str, shares: Sequence[float], seed: int) -> int:
    """The split that a user belongs to. `shares` are the parts' sizes; the last part is the rest. A hash of
    the id decides, so it does not depend on the other users."""
    place = xxh3_64_intdigest(user_id.encode(), seed=seed) / 2**64
    return int(np.searchsorted(np.cumsum(shares), place, side='right'))


def at_time(history: History, users: Iterable[int], at_ms: int, limits: WindowLimits, known_until_ms: int) -> Examples:
    """A snapshot as of a time of each of `users` who was seen before it."""
    return _examples(history, [(user, SnapshotKind.CUTOFF, at_ms, parts) for user in users
                               for _, parts in at_cutoffs(history.events[user], [at_ms], limits)], known_until_ms)


def sample(history: History, users: Iterable[int], first_ms: int, known_until_ms: int, options: ExampleOptions,
           limits: WindowLimits, seed: int, told: History | None = None) -> Examples:
    """A seeded sample of snapshots, user by user, from `first_ms` to the last time that settles the shortest horizon.

    told     the same users with the events that make the labels; None: `history` itself
    Promise  whether a snapshot is taken does not depend on anything later.
    Errors   UsageError if there is no snapshot.
    """
    chosen = list(users)
    last_ms = known_until_ms - HORIZON_DAYS[0] * DAY_MS
    grid = np.arange(last_ms, max(first_ms - 1, history.start_ms), -DAY_MS)[::-1]
    before = sum(event.ts_ms < known_until_ms for user in chosen for event in history.events[user])
    chance = options.moments_per_user * len(chosen) / max(before, 1)
    found, own = [], []
    for user in chosen:
        events = history.events[user]
        rng = np.random.default_rng([seed, xxh3_64_intdigest(history.user_ids[user].encode())])
        later = grid[grid > events[0].ts_ms]
        drawn = later if len(later) <= options.cutoffs_per_user else np.sort(
            rng.choice(later, options.cutoffs_per_user, replace=False))
        found += [(user, SnapshotKind.CUTOFF, at_ms, parts)
                  for at_ms, parts in at_cutoffs(events, drawn.tolist(), limits)]
        if chance > 0:
            own += [(user, kind, as_of_ms, _packed(state))
                    for kind, as_of_ms, state in scoring_times(events, limits, last_ms)
                    if first_ms <= as_of_ms <= last_ms and rng.random() < chance]
    most = round(options.moments_per_user * len(chosen))
    if len(own) > most:       # where users have few events, there are more timers than events
        kept = np.random.default_rng(seed).choice(len(own), most, replace=False)
        own = [own[place] for place in np.sort(kept)]
    found = sorted(found + own, key=lambda moment: moment[0])       # user by user
    if not found:
        raise UsageError('No user has events followed by a settled day.', do='use a longer recording, or more users.')
    return _examples(told or history, found, known_until_ms)


def at_cutoffs(events: list[Event], cutoffs_ms: list[int], limits: WindowLimits) -> Iterator[tuple[int, Parts]]:
    """The user as of each cut-off (ascending) after the first event: the events before it, folded.

    Timers do not fire here: the model does not see them, and events can be folded in runs.
    """
    timeless = WindowLimits(limits.events_max, limits.span_ms, ())
    user, place = User(events[0].user_id), 0
    for cutoff_ms in cutoffs_ms:
        run = place
        while place < len(events) and events[place].ts_ms < cutoff_ms:
            events[place].offset = place
            place += 1
        fold(user, events[run:place], timeless)
        if place:
            yield cutoff_ms, _packed(user)


def scoring_times(events: list[Event], limits: WindowLimits, until_ms: int) -> Iterator[tuple[SnapshotKind, int, User]]:
    """Every time at which the worker could score this user: the kind, the time in ms, and the user as of then.

    The same user object changes from one time to the next: pack it before asking for the next one.
    """
    user = User(events[0].user_id)
    for place, event in enumerate(events):
        while user.due_ms and user.due_ms <= event.ts_ms:
            yield SnapshotKind.TIMER, fire_timer(user, limits), user
        event.offset = place
        if fold(user, [event], limits) == [Fold.APPLIED]:
            last = place + 1 == len(events) or events[place + 1].ts_ms - event.ts_ms > SESSION_GAP_MS
            yield SnapshotKind.SESSION_END if last else SnapshotKind.EVENT, clock_ms(user, limits), user
    while user.due_ms and user.due_ms <= until_ms:
        yield SnapshotKind.TIMER, fire_timer(user, limits), user


def _packed(user: User) -> Parts:
    return pack_header(user), bytes(user.days), bytes(user.rows)


def outcomes(events: list[Event], asked: Sequence[tuple[SnapshotKind, int]], known_until_ms: int,
             priced: bool = True) -> np.ndarray:
    """float64 [snapshots, 2 * horizons + 1]: bought within each horizon, refunded, spent within each; NaN: not settled.

    asked   kind and time in ms of each snapshot; an event at the time of a cut-off comes after it
    """
    money = list({event.key: event for event in reversed(events)      # reversed: of a repeat the first one counts
                  if event.type in (EventType.PURCHASE, EventType.REFUND)}.values())
    ts_ms = np.array([event.ts_ms for event in money], np.int64)
    bought = np.array([event.type == EventType.PURCHASE for event in money], bool)
    signed = np.array([event.amount if priced else 1.0 for event in money]) * np.where(bought, 1, -1)
    days = np.array([*HORIZON_DAYS, REFUND_DAYS, *HORIZON_DAYS]) * DAY_MS
    refund = len(HORIZON_DAYS)          # its column
    rows = np.empty((len(asked), len(days)))
    for row, (kind, as_of_ms) in zip(rows, asked, strict=True):
        # An event at the time of a cut-off comes after it, as if the cut-off were 1 ms earlier.
        ahead_ms = ts_ms - (as_of_ms - 1 if kind == SnapshotKind.CUTOFF else as_of_ms)
        after = ahead_ms > 0
        next_ms = np.min(ahead_ms[after & bought], initial=np.iinfo(np.int64).max)
        refund_ms = np.min(ahead_ms[after & ~bought], initial=np.iinfo(np.int64).max)
        row[:refund] = next_ms <= days[:refund]
        row[refund] = refund_ms <= days[refund]
        row[refund + 1:] = [max(0.0, signed[after & (ahead_ms <= within)].sum()) for within in days[refund + 1:]]
        row[days > known_until_ms - as_of_ms] = np.nan
    return rows


def bought_next(history: History, examples: Examples, column: str, known_until_ms: int) -> list[np.ndarray | None]:
    """For each snapshot the hashes of what is bought within NEXT_DAYS, ascending, each once; None: not settled.

    column   'item' or 'category': the attribute of events that holds the hash
    """
    bought: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for user in np.unique(examples.user).tolist():
        named = [(event.ts_ms, getattr(event, column)) for event in history.events[user]
                 if event.type == EventType.PURCHASE and getattr(event, column)]
        ts_ms, hashes = zip(*sorted(named), strict=True) if named else ((), ())
        bought[user] = np.array(ts_ms, np.int64), np.array(hashes, np.int64)
    rows: list[np.ndarray | None] = []
    for user, kind, as_of_ms in zip(examples.user.tolist(), examples.kind.tolist(), examples.as_of_ms.tolist(),
                                    strict=True):
        until_ms = as_of_ms + NEXT_DAYS * DAY_MS
        if until_ms > known_until_ms:
            rows.append(None)
            continue
        ts_ms, hashes = bought[user]
        # An event at the time of a cut-off comes after it; see `outcomes`.
        first, last = np.searchsorted(ts_ms, [as_of_ms, until_ms] if kind == SnapshotKind.CUTOFF
                                      else [as_of_ms + 1, until_ms + 1])
        rows.append(np.unique(hashes[first:last]))
    return rows


def _examples(told: History, found: list[tuple[int, SnapshotKind, int, Parts]], known_until_ms: int) -> Examples:
    if not found:
        raise UsageError('No user was seen before that time.', do='name a later time.')
    users, kinds, as_of_ms, parts = zip(*found, strict=True)
    headers, days, window_rows = zip(*parts, strict=True)
    snapshots = Snapshots.join(headers, days, window_rows, as_of_ms)
    starts = [0, *(np.flatnonzero(np.diff(users)) + 1).tolist(), len(users)]
    rows = np.concatenate([
        outcomes(told.events[users[start]], list(zip(kinds[start:end], as_of_ms[start:end], strict=True)),
                 known_until_ms, told.priced) for start, end in pairwise(starts)])
    bought, refunded, spent = np.split(rows, [len(HORIZON_DAYS), len(HORIZON_DAYS) + 1], axis=1)
    labels = Labels(*(np.ascontiguousarray(part, np.float32) for part in (bought, refunded[:, 0], spent)))
    return Examples(snapshots, features(snapshots), labels, np.array(kinds, np.int8), np.array(users, np.int64))
