"""The step driver turns events and due timers into steps.

It has three callers: the worker, a replay of files, and a replay of a journal. The callers read and decode records,
load the users, store the results and send the messages. What comes in between is the same for all of them: this module
cuts and folds the steps, and `stream.core.step_scorer` scores them.

    run      cut a run of events into steps
    sweep    make a step out of due silence timers

A step is a group of events or timers. Its users are scored, decided and written together. A timer must fire at its due
time, before any later event of the same user is folded. Two rules ensure this:

    before the run    A timer that is due at or before the user's first event of the run fires first, in a sweep.
    within the run    An event of the run may set a timer. The user's events at or after the due time wait for the next
                      step. Other users' events do not wait.

The driver uses no clock, network or file.
"""
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter

import msgspec

from stream.core.events import Event
from stream.core.layout import Fold, WindowLimits
from stream.core.messages import Origin
from stream.core.user import User, clock_ms, fire_timer, fold_runs, overdue, stamp

Silent = Callable[[], Iterable[User]]
_by_due_time = attrgetter('due_ms', 'user_id')


def nobody() -> Iterable[User]:
    """The default for `silent`: no other user has a timer to fire."""
    return ()


class Touched(msgspec.Struct, gc=False):
    """One user of a step.

    origin      the time and cause of the user's score; None if no event was applied, so nothing is scored
    applied     the events applied in this step, in order; empty for a timer
    """

    user: User
    origin: Origin | None
    applied: list[Event]


class Step(msgspec.Struct):
    """Events or timers of some users, which are scored and written together.

    number   counts the steps of one driver; the users' records store it
    touched  the step's users
    new      for each touched user, whether the user had no record before
    counts   number of events per outcome, indexed by `stream.core.layout.Fold`
    waiting  events of the same run that wait for later steps
    """

    number: int
    touched: list[Touched]
    new: list[bool]
    counts: list[int]
    waiting: list[Event]


class StepDriver:
    """Drives one serial stream of steps.

    number      number of the newest step
    generation  generation of the owner, stored in the users' records; 0 if ownership never changes
    """

    def __init__(self, limits: WindowLimits, generation: int = 0) -> None:
        self.number = 0
        self._limits = limits
        self._generation = generation

    def run(self, users: dict[str, User], events: list[Event], silent: Silent = nobody) -> Iterator[Step]:
        """Cut a run of events into steps, lazily. The caller must score each step before it asks for the next one.

        users    all users of `events`, by id; changed in place
        silent   returns other users with a timer to fire before the remaining events; called until it returns none
        Yields   at least one step: a run without events is one step that changes nothing.
        Promise  every event is counted exactly once; a run that is delivered again scores nobody.
        """
        if not events:
            yield self._step([], [0] * len(Fold), [])
        while events:
            while due := sorted([*silent(), *overdue(users, events)], key=_by_due_time):
                yield self.sweep(due, events)
            step = self._fold(users, events)
            yield step
            events = step.waiting

    def sweep(self, users: Iterable[User], waiting: list[Event] | None = None) -> Step:
        """Fire the due timer of each user, in this order. Each user is scored as of the timer's due time."""
        touched = [Touched(user, Origin(due_ms := fire_timer(user, self._limits), due_ms), []) for user in users]
        return self._step(touched, [0] * len(Fold), waiting or [])

    def _fold(self, users: dict[str, User], events: list[Event]) -> Step:
        runs, counts, waiting = fold_runs(users, events, self._limits)
        touched = [Touched(user, Origin(clock_ms(user, self._limits), 0) if applied else None, applied)
                   for user, applied in runs]
        return self._step(touched, counts, waiting)

    def _step(self, touched: list[Touched], counts: list[int], waiting: list[Event]) -> Step:
        self.number += 1
        new = stamp([entry.user for entry in touched], self.number, self._generation)
        return Step(self.number, touched, new, counts, waiting)
