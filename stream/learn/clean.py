"""What a model learns from, cleaned: steps that are switched on by name, in this order.

    duplicates     of a user's purchases and refunds that say the same of one time the first counts (that the same event
                   is read twice is no matter: its key tells)
    cancellations  a refund, and the newest purchase before it of the same item and amount that no other refund took
                   back: neither of them happened. A refund without its purchase stays, and so do returns of a part
    outliers       an amount far beyond those of the training users' purchases counts as much as the bound
    wholesalers    training users far beyond the others in what they spend or in how many lines they buy: nobody learns
                   from them

Only labels, and who is learned from, are cleaned. The worker scores everybody from all that was recorded: it cannot
know that an order will be taken back, and must not forget a user. So windows and counters stay as they were recorded,
in training as in serving, and so do the answers by which a model is judged, in the test of `stream train` as in
`stream compare`: a cleaned model is measured by what really happened. After `cancellations` it foretells purchases that
last, and gives too small a chance to purchases of any kind.

Bounds are fitted on the training users, by what was known. A purchase of the last days may yet be taken back: nobody
knows. Who is a wholesaler is known at the end alone, so dropping them looks ahead: the moments before somebody became
one are missed. That is why no step is on by default.

Far beyond: a modified z-score of the logarithm above 3.5. Source: Iglewicz, Hoaglin (1993), "How to Detect and Handle
Outliers".
"""
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from stream.core.events import Event, EventType
from stream.errors import UsageError
from stream.learn.dataset import History

Z_MAX = 3.5
_NORMAL_MAD = 0.6745        # of a normal distribution the median distance to the median is so many deviations
_MONEY = (EventType.PURCHASE, EventType.REFUND)


@dataclass(frozen=True)
class Removed:
    """What a step took away.

    lines          purchases and refunds that are gone, or whose amount was cut
    users          whose they were
    money          that is gone, purchases and refunds alike, in the currency of the events
    money_share    of all money of the training users before the step
    bound          in words, where there is one
    """

    step: str
    lines: int
    users: int
    money: float
    money_share: float
    bound: str = ''


@dataclass(frozen=True)
class Cleaned:
    """What to learn from.

    history  for labels only: the same users, fewer or smaller purchases and refunds
    users    to learn from
    removed  by each step, ready for JSON
    """

    history: History
    users: list[int]
    removed: list[dict]


def steps_of(names: str) -> tuple[str, ...]:
    """Names with commas between them, as steps in their order. Errors: UsageError where one is no step."""
    asked = {name.strip() for name in names.split(',') if name.strip()}
    if unknown := asked - STEPS.keys():
        raise UsageError(f'{", ".join(sorted(unknown))} is no step of cleaning.', do=f'choose of {", ".join(STEPS)}.')
    return tuple(step for step in STEPS if step in asked)


def clean(history: History, users: Iterable[int], steps: Sequence[str], known_until_ms: int) -> Cleaned:
    """Take these steps, one after the other.

    users    the training users, places in the history; what others did is not looked at
    Promise  nothing at or after `known_until_ms` is looked at, and the history given is as it was.
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
    """What a step took away, of `Cleaned.removed`, as a sentence without a stop."""
    lines = f'{removed["lines"]:,} {"line" if removed["lines"] == 1 else "lines"}'
    return (f'{removed["step"]}: {lines} of {removed["users"]:,} training users, {removed["money_share"]:.1%} of their '
            'money' + (f' (beyond {removed["bound"]})' if removed['bound'] else ''))


def duplicates(history: History, users: list[int]) -> tuple[History, list[int], Removed]:
    """Of purchases and refunds that say the same, the first one."""
    def kept(events: list[Event]) -> list[Event]:
        said: dict[tuple, int] = {}
        # What says the same under the same key is the same event, and counts once in any case.
        return [event for event in events if event.type not in _MONEY or said.setdefault(
            (event.ts_ms, event.type, event.item, event.category, event.basket, event.amount, event.rating),
            event.key) == event.key]

    return _without_lines('duplicates', history, users, kept)


def cancellations(history: History, users: list[int]) -> tuple[History, list[int], Removed]:
    """Pairs of a refund and its purchase gone."""
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
        taken = {events[place].key for place in gone}       # a repeat of what is gone would count instead
        return [event for event in events if event.key not in taken]

    return _without_lines('cancellations', history, users, kept)


def outliers(history: History, users: list[int]) -> tuple[History, list[int], Removed]:
    """Amounts beyond the bound cut to it."""
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
    """Nobody learns from users beyond the bounds."""
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
    """Whatever is above it is far beyond the others; infinite where half of them are equal, or there is none."""
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
