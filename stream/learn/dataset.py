"""Recorded events become examples: what the worker would have known at a moment, and what came after it.

    events -> fold, user by user, as the worker folds -> moments -> a seeded sample of them -> snapshots and labels

A moment is a time at which the worker scores a user: right after one of the user's events (as of that event), or when a
silence timer is due (as of its due time). The snapshot is packed while the events are folded, so nothing later than the
moment can be in it; the labels look only at events later than the moment.

    intent   float32 [N]  1: a purchase in the 7 days after the moment
    churn    float32 [N]  1: no purchase in the 30 days after it
    spend    float32 [N]  purchases less refunds of the 90 days after it, never below 0, in the configured currency
    tier     int64 [N]    0: spend is 0; 1..4: quarter of positive spend, by edges fitted on the training users

Only moments whose 90 days lie inside the recording are taken. Users are split by a hash of their id, so no user is in
two splits, and the test split's moments are also later than all others: the test asks about other people at a later
time.
"""
import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from xxhash import xxh3_64_intdigest

from stream.core.events import Decoder, Event, EventRules, EventType, Refusal
from stream.core.features import COUNTER_NAMES, Features, Snapshots, features
from stream.core.user import User, clock_ms, fire_timer, fold, pack_header
from stream.core.window import DAY_MS, Fold, WindowLimits
from stream.errors import UsageError

INTENT_DAYS = 7
CHURN_DAYS = 30
SPEND_DAYS = 90
TIERS = 5
TIER_NAMES = ('nothing', 'low', 'middle', 'high', 'top')
SESSION_GAP_MS = 30 * 60_000        # a longer pause ends a session

Parts = tuple[bytes, bytes, bytes]      # header, days, rows: what `Snapshots.join` joins


class Kind(enum.IntEnum):
    """Where in a user's life a moment lies."""

    EVENT = 0           # after an event, with the session going on
    SESSION_END = 1     # after the last event of a session
    TIMER = 2           # a silence timer is due


class Split(enum.IntEnum):
    """Which users a moment is for."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2


@dataclass(frozen=True)
class ExampleOptions:
    """How many moments are taken, and from whom.

    moments_per_user  at most so many of each Kind: within sessions, at session ends, at silence timers
    shares            of the users in the train and the validation split; the rest are test users
    later_share       share of the labelled time, from its end, that only the test split uses
    """

    moments_per_user: tuple[int, int, int] = (3, 3, 3)
    shares: tuple[float, float] = (0.6, 0.15)
    later_share: float = 0.25


@dataclass(frozen=True)
class Labels:
    """What came after each of N moments; see the module's docstring."""

    intent: np.ndarray
    churn: np.ndarray
    spend: np.ndarray
    tier: np.ndarray


@dataclass(frozen=True)
class Examples:
    """N moments of one split, in a seeded random order.

    snapshots  what was known; `inputs` are its features
    kind       int8 [N], see Kind
    user       int64 [N], the same number for the moments of one user
    """

    snapshots: Snapshots
    inputs: Features
    labels: Labels
    kind: np.ndarray
    user: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def counter(self, name: str) -> np.ndarray:
        """One named counter column, float32 [N], as the model sees it."""
        return self.inputs.counters[:, COUNTER_NAMES.index(name)]


@dataclass(frozen=True)
class Dataset:
    """The three splits and where they come from.

    tier_edges   float64 [3], the quartiles of positive spend of the train split's moments
    start_ms, cut_ms, labelled_until_ms, end_ms
                 first event; first moment of the test split; last moment that has 90 days of future; last event
    """

    train: Examples
    validation: Examples
    test: Examples
    tier_edges: np.ndarray
    users: int
    events: int
    refused: int
    start_ms: int
    cut_ms: int
    labelled_until_ms: int
    end_ms: int


def build(
    values: Iterable[bytes], rules: EventRules, limits: WindowLimits, options: ExampleOptions, seed: int,
) -> Dataset:
    """Examples from event JSON in the order in which the worker would read it.

    Promise  the sample of a user's moments and its split depend on the seed, the user and the recording's first and
             last time, not on who else is there.
    Errors   UsageError if a split has no moment, or nobody of the train split buys: there is nothing to learn from.
    """
    by_user, refused = _decode(values, rules)
    if not by_user:
        raise UsageError('There is not one valid event to learn from.', do='check the files and their format.')
    users, number_of_events = len(by_user), sum(map(len, by_user.values()))
    start_ms = min(event.ts_ms for events in by_user.values() for event in events)
    end_ms = max(event.ts_ms for events in by_user.values() for event in events)
    labelled_until_ms = end_ms - SPEND_DAYS * DAY_MS
    cut_ms = start_ms + int((labelled_until_ms - start_ms) * (1 - options.later_share))
    span_ms = {Split.TRAIN: (start_ms, cut_ms - 1), Split.VALIDATION: (start_ms, cut_ms - 1),
               Split.TEST: (cut_ms, labelled_until_ms)}

    found: dict[Split, list[tuple]] = {split: [] for split in Split}
    for number, user_id in enumerate(tuple(by_user)):
        events = by_user.pop(user_id)       # a user's events are not needed again: let the memory go
        split = split_of(user_id, options.shares, seed)
        rng = np.random.default_rng([seed, xxh3_64_intdigest(user_id.encode())])
        chosen = _sample(events, limits, span_ms[split], options.moments_per_user, rng)
        after = outcomes(events, [as_of_ms for _, as_of_ms, _ in chosen])
        found[split] += [(kind, as_of_ms, parts, number, bought_days, spend)
                         for (kind, as_of_ms, parts), (bought_days, spend) in zip(chosen, after, strict=True)]
    for split, rows in found.items():
        if not rows:
            raise UsageError(
                f'No user of the {split.name.lower()} split has a moment with {SPEND_DAYS} days of future.',
                do=f'use a longer recording (this one spans {(end_ms - start_ms) / DAY_MS:.0f} days), or more users.')
    spend = np.array([row[-1] for row in found[Split.TRAIN]])
    if not (spend > 0).any():
        raise UsageError('Nobody buys anything after any of the moments.', do='use a recording with purchases.')
    tier_edges = np.quantile(spend[spend > 0], (0.25, 0.5, 0.75))
    splits = [_examples(found[split], tier_edges, seed) for split in Split]
    return Dataset(*splits, tier_edges, users, number_of_events, refused, start_ms, cut_ms, labelled_until_ms, end_ms)


def split_of(user_id: str, shares: tuple[float, float], seed: int) -> Split:
    """The split of a user, by a hash of the id: it does not depend on who else is there."""
    place = xxh3_64_intdigest(user_id.encode(), seed=seed) / 2**64
    if place < shares[0]:
        return Split.TRAIN
    return Split.VALIDATION if place < shares[0] + shares[1] else Split.TEST


def moments(events: list[Event], limits: WindowLimits, until_ms: int) -> Iterator[tuple[Kind, int, User]]:
    """Every moment at which the worker could score this user: its kind, its as-of time in ms, and the user as of then.

    The user goes on changing: whoever wants to keep it packs it before asking for the next moment.
    """
    user = User(events[0].user_id)
    for place, event in enumerate(events):
        while user.due_ms and user.due_ms <= event.ts_ms:
            yield Kind.TIMER, fire_timer(user, limits), user
        event.offset = place
        if fold(user, [event], limits) == [Fold.APPLIED]:
            last = place + 1 == len(events) or events[place + 1].ts_ms - event.ts_ms > SESSION_GAP_MS
            yield Kind.SESSION_END if last else Kind.EVENT, clock_ms(user, limits), user
    while user.due_ms and user.due_ms <= until_ms:
        yield Kind.TIMER, fire_timer(user, limits), user


def tier_of(spend: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Tier of each spend, int64: 0 for nothing, else 1 + the number of edges at or below it."""
    return np.where(spend > 0, 1 + np.searchsorted(edges, spend, side='right'), 0).astype(np.int64)


def _decode(values: Iterable[bytes], rules: EventRules) -> tuple[dict[str, list[Event]], int]:
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
    return by_user, refused


def _sample(
    events: list[Event], limits: WindowLimits, span_ms: tuple[int, int], at_most: tuple[int, int, int],
    rng: np.random.Generator,
) -> list[tuple[Kind, int, Parts]]:
    """A few of the user's moments inside the span (both ends included), packed. The events are folded twice: once to
    see which moments there are, once to pack the chosen ones."""
    first_ms, last_ms = span_ms
    there: list[list[int]] = [[] for _ in Kind]
    for place, (kind, as_of_ms, _) in enumerate(moments(events, limits, last_ms)):
        if first_ms <= as_of_ms <= last_ms:
            there[kind].append(place)
    chosen = {int(place) for places, count in zip(there, at_most, strict=True)
              for place in rng.permutation(places)[:count]}
    taken = []
    for place, (kind, as_of_ms, user) in enumerate(moments(events, limits, last_ms)):
        if len(taken) == len(chosen):
            break
        if place in chosen:
            taken.append((kind, as_of_ms, (pack_header(user), bytes(user.days), bytes(user.rows))))
    return taken


def outcomes(events: list[Event], as_of_ms: list[int]) -> list[tuple[float, float]]:
    """For each moment: days until the next purchase (infinite: none), and the spend of the next 90 days."""
    money = {event.key: event for event in reversed(events)      # reversed: of a repeated event the first one counts
             if event.type in (EventType.PURCHASE, EventType.REFUND)}.values()
    ts_ms = np.array([event.ts_ms for event in money], np.int64)
    bought = np.array([event.type == EventType.PURCHASE for event in money], bool)
    signed = np.array([event.amount for event in money]) * np.where(bought, 1, -1)
    outcomes = []
    for moment_ms in as_of_ms:
        ahead_days = (ts_ms - moment_ms) / DAY_MS
        after = ahead_days > 0
        outcomes.append((float(np.min(ahead_days[after & bought], initial=np.inf)),
                         max(0.0, float(signed[after & (ahead_days <= SPEND_DAYS)].sum()))))
    return outcomes


def _examples(rows: list[tuple], tier_edges: np.ndarray, seed: int) -> Examples:
    # Batches are cut from neighbours: moments of one user must not be neighbours.
    order = np.random.default_rng(seed).permutation(len(rows))
    kinds, as_of_ms, parts, users, bought_days, spend = zip(*(rows[place] for place in order), strict=True)
    headers, days, window_rows = zip(*parts, strict=True)
    snapshots = Snapshots.join(headers, days, window_rows, as_of_ms)
    next_days, spend = np.array(bought_days), np.array(spend)
    labels = Labels((next_days <= INTENT_DAYS).astype(np.float32), (next_days > CHURN_DAYS).astype(np.float32),
                    spend.astype(np.float32), tier_of(spend, tier_edges))
    return Examples(snapshots, features(snapshots), labels, np.array(kinds, np.int8),
                    np.array(users, np.int64))
