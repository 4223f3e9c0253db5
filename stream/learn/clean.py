"""Cleaning of the training data. Each step is switched on by name. The steps run in this order.

    duplicates     of identical purchases or refunds of a user at one time, only the first counts (an event that is read
                   twice counts once in any case, by its key)
    cancellations  a refund and the newest earlier purchase of the same item and amount that no other refund has taken:
                   both are removed. Refunds without a purchase stay, and so do partial ones
    outliers       an amount far above those of the training users' purchases is cut to the bound
    wholesalers    training users who spend far more, or buy far more lines, than the others are not learned from

Only the labels and the choice of training users are cleaned. Windows and counters stay as recorded, in training as in
serving: the worker cannot know that an order will be cancelled, and must not forget a user. The labels that judge a
model stay as recorded too, in `stream train` and in `stream compare`. After `cancellations` a model predicts purchases
that last, so its probabilities of any purchase are too low.

Bounds are fitted on the training users and past events. Recent purchases may still be cancelled. Who is a wholesaler is
known only at the end, so dropping them looks ahead: their earlier snapshots are missing. This is why every step is off
by default.

"Far above" is a modified z-score of the logarithm above 3.5. Source: Iglewicz, Hoaglin (1993), "How to Detect and
Handle Outliers".
"""
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from stream.core.events import Event, EventType
from stream.errors import UsageError
from stream.learn.dataset import History

Z_MAX = 3.5
_NORMAL_MAD = 0.6745        # median absolute deviation of a normal distribution, in standard deviations
_MONEY = (EventType.PURCHASE, EventType.REFUND)


@dataclass(frozen=True)
class Removed:
    """What a step removed.

    lines          purchases and refunds that were removed, or whose amount was cut
    users          users with such lines
    money          the amount removed, purchases and refunds alike, in the currency of the events
    money_share    its share of all money of the training users before the step
    bound          in words, if there is one
    """

    step: str
    lines: int
    users: int
    money: float
    money_share: float
    bound: str = ''


@dataclass(frozen=True)
class Cleaned:
    """Cleaned training data.

    history  for labels only: the same users, with fewer or smaller purchases and refunds
    users    the users to learn from
    removed  what each step removed, ready for JSON
    """

    history: History
    users: list[int]
    removed: list[dict]


def steps_named(names: str) -> tuple[str, ...]:
    """Cleaning steps from a comma-separated list, in their order. Errors: UsageError if a name is not a step."""
    asked = {name.strip() for name in names.split(',') if name.strip()}
    if unknown := asked - STEPS.keys():
        raise UsageError(f'{", ".join(sorted(unknown))} is not a cleaning step.', do=f'choose from {", ".join(STEPS)}.')
    return tuple(step for step in STEPS if step in asked)


def clean(history: History, users: Iterable[int], steps: Sequence[str], known_until_ms: int) -> Cleaned:
    """Run these steps, one after the other.

    users    the training users, as indices into the history; the other users do not matter
    Promise  events at or after `known_until_ms` do not matter, and `history` is not changed.
    """
    kept, removed = list(users), []
    if not steps:
        return Cleaned(history, kept, removed)
    chosen = set(kept)
    told = replace(history, events=[
        [event for event in events if event.ts_ms < known_until_ms] if user in chosen else events
        for user, events in enumerate(history.events)])
    for step in STEPS:
        if step in steps:
            told, kept, what = STEPS[step](told, kept)
            removed.append(asdict(what))
    return Cleaned(told, kept, removed)


def in_words(removed: dict) -> str:
    """An entry of `Cleaned.removed` as a sentence without a full stop."""
    lines = f'{removed["lines"]:,} {"line" if removed["lines"] == 1 else "lines"}'
    return (f'{removed["step"]}: {lines} of {removed["users"]:,} training users, {removed["money_share"]:.1%} of their '
            'money' + (f' (beyond {removed["bound"]})' if removed['bound'] else ''))


def duplicates(history: History, users: list[int]) -> tuple[History, list[int], Removed]:
    """Keep the first of identical purchases and refunds."""
    def kept(events: list[Event]) -> list[Event]:
        said: dict[tuple, int] = {}
        # Identical lines with the same key are one event, which counts once in any case.
        return [event for event in events if event.type not in _MONEY or said.setdefault(
            (event.ts_ms, event.type, event.item, event.category, event.basket, event.amount, event.rating),
            event.key) == event.key]

    return _without_lines('duplicates', history, users, kept)


def cancellations(history: History, users: list[int]) -> tuple[History, list[int], Removed]:
    """Remove pairs of a refund and its purchase."""
    def kept(events: list[Event]) -> list[Event]:
        open_places: dict[tuple, list[int]] = defaultdict(list)
        gone, keys = set(), set()
        for place in sorted(range(len(events)), key=lambda place: events[place].ts_ms):
            event = events[place]
            if event.type not in _MONEY or not event.item or event.key in keys:
                continue
            keys.add(event.key)
            same = open_places[event.item, round(event.amount, 4)]
            if event.type == EventType.PURCHASE:
                same.append(place)
            elif same:
                gone |= {place, same.pop()}
        taken = {events[place].key for place in gone}       # a repeat of a removed event would count instead
        return [event for event in events if event.key not in taken]

    return _without_lines('cancellations', history, users, kept)


def outliers(history: History, users: list[int]) -> tuple[History, list[int], Removed]:
    """Reduce amounts above the bound to the bound."""
    amounts = np.array([event.amount for user in users for event in history.events[user]
                        if event.type == EventType.PURCHASE and event.amount > 0])
    bound = _bound(amounts)
    events, cut = list(history.events), []
    for user in users:
        beyond = [event for event in events[user] if event.type in _MONEY and event.amount > bound]
        if beyond:
            events[user] = [_of_amount(event, bound) if event.type in _MONEY and event.amount > bound else event
                            for event in events[user]]
            cut.append((user, beyond))
    money = sum(event.amount - bound for _, beyond in cut for event in beyond)
    return replace(history, events=events), users, Removed(
        'outliers', sum(len(beyond) for _, beyond in cut), len(cut), money, _share(money, history, users),
        f'a line of {bound:,.2f}' if np.isfinite(bound) else '')


def wholesalers(history: History, users: list[int]) -> tuple[History, list[int], Removed]:
    """Drop training users above the bounds."""
    bought = {user: [event.amount for event in history.events[user] if event.type == EventType.PURCHASE]
              for user in users}
    spend, lines = (np.array([measure(amounts) for amounts in bought.values()], float) for measure in (sum, len))
    spend_max, lines_max = _bound(spend[spend > 0]), _bound(lines[lines > 0])
    gone = {user for user, far in zip(bought, (spend > spend_max) | (lines > lines_max), strict=True) if far}
    money = _money(history, gone)
    bounds = {f'{spend_max:,.2f} of spend': spend_max, f'{lines_max:,.0f} lines': lines_max}
    return history, [user for user in users if user not in gone], Removed(
        'wholesalers', sum(event.type in _MONEY for user in gone for event in history.events[user]), len(gone), money,
        _share(money, history, users), ' or '.join(words for words, bound in bounds.items() if np.isfinite(bound)))


STEPS: dict[str, Callable[[History, list[int]], tuple[History, list[int], Removed]]] = {
    'duplicates': duplicates, 'cancellations': cancellations, 'outliers': outliers, 'wholesalers': wholesalers}


def _without_lines(step: str, history: History, users: list[int], kept: Callable[[list[Event]], list[Event]],
                   ) -> tuple[History, list[int], Removed]:
    events, touched = list(history.events), []
    for user in users:
        events[user] = kept(history.events[user])
        if len(events[user]) < len(history.events[user]):
            touched.append(user)
    after = replace(history, events=events)
    lines = sum(len(history.events[user]) - len(events[user]) for user in touched)
    money = _money(history, touched) - _money(after, touched)
    return after, users, Removed(step, lines, len(touched), money, _share(money, history, users))


def _bound(amounts: np.ndarray) -> float:
    """The bound above which an amount is an outlier; infinite if half of the amounts are equal, or there is none."""
    if not len(amounts):
        return float('inf')
    logs = np.log(amounts)
    median = np.median(logs)
    distance = np.median(np.abs(logs - median))
    return float(np.exp(median + Z_MAX * distance / _NORMAL_MAD)) if distance > 0 else float('inf')


def _of_amount(event: Event, amount: float) -> Event:
    return Event(event.user_id, event.event_id, event.key, event.ts_ms, event.type, event.item, event.category,
                 event.basket, amount, event.rating, event.source, event.offset)


def _money(history: History, users: Iterable[int]) -> float:
    return sum(event.amount for user in users for event in history.events[user] if event.type in _MONEY)


def _share(money: float, history: History, users: list[int]) -> float:
    return money / max(_money(history, users), 1e-9)
