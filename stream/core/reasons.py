"""Explains a score by occlusion: remove one part of the input, score again, and report the parts that matter most.

Three kinds of parts are removed, one at a time:

    slot      one slot of the window: an event, or the lines of one basket
    silence   the time since the newest event: the user is scored as of that event
    group     one group of counters, set to the values of a shopper without history. The groups are few and large: a
              shopper with half of a history removed would be unlike any real one

An explanation costs tens of scores. So only alerts and tier changes are explained, and only within a budget.
"""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import msgspec
import numpy as np

from stream.core.decide import Kind
from stream.core.events import TYPE_NAMES
from stream.core.features import COUNTER_GROUPS, COUNTER_NAMES, Features, Snapshots, features
from stream.core.layout import DAY_MS
from stream.core.scores import STEPS_PER_UNIT, Scores

SLOTS_EXPLAINED_MAX = 16
REASONS_MAX = 3
ACTIVITY_DAYS = 30      # how far back the words about recent activity look
_EFFECT_MIN = 5 / STEPS_PER_UNIT            # smaller effects may come from rounding to the grid
_GROUPS = tuple(name for name in COUNTER_GROUPS if name not in ('silence', 'calendar'))
_GROUP_COLUMNS = {name: [COUNTER_NAMES.index(column) for column in COUNTER_GROUPS[name]] for name in _GROUPS}

_DEEDS = {
    'view': 'viewed an item', 'click': 'clicked an item', 'search': 'searched', 'favorite': 'marked a favorite',
    'follow': 'followed', 'share': 'shared an item', 'login': 'logged in', 'rating': 'rated an item',
    'review': 'wrote a review', 'add_to_cart': 'put an item in the cart',
    'remove_from_cart': 'took an item out of the cart', 'purchase': 'bought',
    'refund': 'returned an item', 'other': 'did something else',
}


class Claim(msgspec.Struct, frozen=True):
    """One row of a step that asks for reasons.

    urgency   0 is the most urgent
    variants  the most model rows that its explanation may need
    """

    row: int
    urgency: int
    variants: int


@dataclass(slots=True)
class Occlusions:
    """Occluded variants of some rows: what each variant lacks, and the features to score.

    row     int64 [variants] index of the explained row
    group   [variants] the removed group of counters, or 'silence'; '' if a slot was removed
    slot    int64 [variants] the removed slot; -1 if a group or the silence was removed
    """

    snapshots: Snapshots
    base: Features
    row: np.ndarray
    group: list[str]
    slot: np.ndarray
    inputs: Features


def within_budget(claims: Iterable[Claim], rows_max: int) -> list[int]:
    """The rows to explain, in ascending order: the most urgent claims, as long as all of them need `rows_max` at most.

    claims   of one step, one per row
    """
    by_urgency = sorted(claims, key=lambda claim: (claim.urgency, claim.row))
    totals = accumulate(claim.variants for claim in by_urgency)
    return sorted(claim.row for claim, total in zip(by_urgency, totals, strict=True) if total <= rows_max)


def variants(base: Features, rows: np.ndarray) -> np.ndarray:
    """The most model rows that the explanation of each of these rows may need."""
    slots = base.starts[rows + 1] - base.starts[rows]
    return np.minimum(slots, SLOTS_EXPLAINED_MAX) + 1 + len(_GROUPS)


def occlude(snapshots: Snapshots, rows: Sequence[int], base: Features) -> Occlusions:
    """Occluded variants of the given rows. `base` holds the features of `snapshots`."""
    owner: list[int] = []
    group: list[str] = []
    slot: list[int] = []
    kept: list[np.ndarray] = []
    kept_counts: list[int] = []
    days: list[np.ndarray] = []
    event_ends = np.cumsum(snapshots.headers['events'], dtype=np.int64)
    day_ends = np.cumsum(snapshots.headers['days'], dtype=np.int64)
    for row in rows:
        window = _span(snapshots.headers['events'], event_ends, row)
        newest = int(base.starts[row + 1])
        slots = np.arange(newest - 1, max(int(base.starts[row]), newest - SLOTS_EXPLAINED_MAX) - 1, -1)
        keep = base.slot_of_row[window] != slots[:, None]               # [slots, events]
        kept.append(np.broadcast_to(window, keep.shape)[keep])
        kept_counts += keep.sum(axis=1).tolist()
        silent = snapshots.as_of_ms[row] > snapshots.headers['last_seen_ms'][row]
        without = ['silence', *_GROUPS] if silent else _GROUPS
        kept += [window] * len(without)
        kept_counts += [len(window)] * len(without)
        group += ['' for _ in slots] + list(without)
        slot += slots.tolist() + [-1] * len(without)
        days += [_span(snapshots.headers['days'], day_ends, row)] * (len(slots) + len(without))
        owner += [row] * (len(slots) + len(without))

    row_of = np.array(owner)
    headers = snapshots.headers[row_of]
    headers['events'] = kept_counts
    as_of_ms = snapshots.as_of_ms[row_of]
    silenced = np.array([name == 'silence' for name in group])
    as_of_ms[silenced] = headers['last_seen_ms'][silenced]
    inputs = features(Snapshots(headers, snapshots.days[np.concatenate(days)], snapshots.rows[np.concatenate(kept)],
                                as_of_ms))
    for index, name in enumerate(group):
        if name in _GROUP_COLUMNS:
            inputs.counters[index, _GROUP_COLUMNS[name]] = 0.0
    return Occlusions(snapshots, base, row_of, group, np.array(slot), inputs)


def explain(occlusions: Occlusions, occluded: Scores, row: int, kind: Kind, scores: Scores) -> list[dict]:
    """The strongest reasons, at most REASONS_MAX, for the score behind a message of `kind` about `row`.

    `effect` is the score minus the score without the part. A positive effect means that the part raised the score.
    """
    column = {Kind.POWER: 'power', Kind.INTENT: 'intent', Kind.CHURN: 'churn'}[kind]
    mine = np.flatnonzero((occlusions.row == row) & occluded.usable)
    effect = getattr(scores, column)[row] - getattr(occluded, column)[mine]
    strongest = np.argsort(-np.abs(effect), kind='stable')[:REASONS_MAX]
    return [{**words(occlusions, int(mine[at])), 'effect': round(float(effect[at]), 4)}
            for at in strongest if abs(effect[at]) >= _EFFECT_MIN]


def words(occlusions: Occlusions, variant: int) -> dict:
    """What a variant lacks, in words."""
    snapshots, row = occlusions.snapshots, int(occlusions.row[variant])
    header, moment_ms, group = snapshots.headers[row], int(snapshots.as_of_ms[row]), occlusions.group[variant]
    if not group:
        taken = occlusions.base.slot_of_row == occlusions.slot[variant]
        return _event_words(snapshots.rows[taken], moment_ms)
    if group == 'silence':
        return {'name': 'silence', 'text': f'nothing for {_duration(moment_ms - int(header["last_seen_ms"]))}'}
    days = snapshots.headers['days']
    mine = snapshots.days[_span(days, np.cumsum(days, dtype=np.int64), row)]
    return _counter_words(group, header, mine, moment_ms)


def _span(counts: np.ndarray, ends: np.ndarray, row: int) -> np.ndarray:
    """Indices of one row's parts, in an array that holds `counts[i]` parts for row i, ending before `ends[i]`."""
    return np.arange(int(ends[row]) - int(counts[row]), int(ends[row]))


def _event_words(lines: np.ndarray, moment_ms: int) -> dict:
    name = TYPE_NAMES[int(lines['type'][0])]
    amount, ts_ms = float(lines['amount'].sum()), int(lines['ts_ms'].max())
    deed = _DEEDS[name]
    if name == 'purchase':
        deed = f'bought {_count(len(lines), "line")}'
    worth = f' {"for" if name in ("purchase", "refund") else "worth"} {amount:.2f}' if amount > 0 else ''
    return {'name': name, 'text': f'{deed}{worth} {_ago(moment_ms - ts_ms)}', 'ts_ms': ts_ms,
            'amount': round(amount, 2)}


def _counter_words(group: str, header: np.void, days: np.ndarray, moment_ms: int) -> dict:
    if group == 'history':
        text = (f'{_count(int(header["applied"]), "event")} in '
                f'{_duration(moment_ms - int(header["first_seen_ms"]))}')
    elif group == 'orders':
        orders = int(header['orders'])
        text = (f'{_count(orders, "order")} for {float(header["spend"]):.2f}, the last one '
                f'{_ago(moment_ms - int(header["last_order_ms"]))}' if orders else 'no order so far')
    else:
        recent = days[moment_ms // DAY_MS - days['day'].astype(np.int64) < ACTIVITY_DAYS]
        text = (f'{_count(len(recent), "active day")} and {_count(int(recent["orders"].sum()), "order")} '
                f'in the last {ACTIVITY_DAYS} days')
    return {'name': group, 'text': text}


def _count(number: int, noun: str) -> str:
    return f'{number} {noun}{"" if number == 1 else "s"}'


def _duration(span_ms: int) -> str:
    minutes = span_ms // 60_000
    if minutes < 120:
        return _count(minutes, 'minute')
    if minutes < 48 * 60:
        return _count(minutes // 60, 'hour')
    return _count(minutes // (24 * 60), 'day')


def _ago(span_ms: int) -> str:
    return f'{_duration(span_ms)} before' if span_ms >= 60_000 else 'just before'
