"""One step of a lane, without its I/O: which events are folded now, and which users are then scored as of when.

A lane folds its users' events in order. A step is a run of events, or a sweep of silence timers; its users are scored,
decided and written together. Two rules cut a block into steps, so that a timer fires at its due time and before the
user's next later event is folded:

    before the block    timers due at or before a user's first event of the block fire first, as a sweep
    within the block    a user's events at or after the due time that earlier events of the block have set wait for the
                        next step; users do not wait for one another

`block_steps` is this cut of a block; the worker's lane and the replay of its journal both walk it. (A replay of files
also fires by the stream's time between these steps, and so has a loop of its own.)
"""
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import msgspec

from stream.core.events import Event
from stream.core.features import Snapshots
from stream.core.layout import Fold, WindowLimits
from stream.core.messages import Origin
from stream.core.user import User, clock_ms, fire_timer, fold_runs, join, overdue


class Touched(msgspec.Struct, gc=False):
    """One user of a step: scored as of `origin`; `origin` is None where nothing was applied and nothing is scored.

    applied     the events applied in this step, in order (none for a timer)
    """

    user: User
    origin: Origin | None
    applied: list[Event]


class Folded(msgspec.Struct):
    """What became of the events of a step. `counts` by `Fold`; `rest` are the events that wait for a timer."""

    touched: list[Touched]
    counts: list[int]
    rest: list[Event]


def time_order(clicks_ms: Sequence[int], carts_ms: Sequence[int]) -> list[int]:
    """The order in which records of both topics are folded: by the records' times, clicks first of equal ones.

    Shapes   indices into the records of clicks followed by those of carts, each once.
    Promise  a topic's own order is kept, whatever its records' times: a record counts as no earlier than those before
             it.
    """
    times = [*accumulate(clicks_ms, max), *accumulate(carts_ms, max)]
    return sorted(range(len(times)), key=times.__getitem__)


def fire(users: Iterable[User], limits: WindowLimits) -> list[Touched]:
    """Fire the due timer of each user; they are scored as of the time it was due."""
    return [Touched(user, Origin(due_ms := fire_timer(user, limits), due_ms), []) for user in users]


def fold_step(users: dict[str, User], events: Iterable[Event], limits: WindowLimits) -> Folded:
    """Fold `events`, in order, into `users`, each user's until a timer has to fire in between.

    Promise  every event is either in `rest` or counted exactly once, as applied, duplicate, late or seen.
    """
    runs, counts, rest = fold_runs(users, events, limits)
    return Folded([Touched(user, Origin(clock_ms(user, limits), 0) if applied else None, applied)
                   for user, applied in runs], counts, rest)


def block_steps(users: dict[str, User], events: list[Event], limits: WindowLimits) -> Iterator[Folded]:
    """Cut a block into its steps, and take each when it is asked for: the steps before it are decided by then.

    users    has every user of `events`; what is touched is changed in place
    Yields   sweeps of timers that come before a user's next event (counts are zero, `rest` is everything that waits),
             and runs of events; none for a block without events.
    Promise  every event is counted exactly once; a redelivered block gives steps in which nobody is scored.
    """
    while events:
        while due := overdue(users, events):
            yield Folded(fire(due, limits), [0] * len(Fold), events)
        folded = fold_step(users, events, limits)
        yield folded
        events = folded.rest


def snapshot(touched: Sequence[Touched]) -> Snapshots:
    """The scored users' records as the model's input sees them; one row per entry, all of which have an origin."""
    headers, days, rows = join([entry.user for entry in touched])
    return Snapshots.join([headers], [days], [rows],
                          [entry.origin.as_of_ms for entry in touched if entry.origin is not None])
