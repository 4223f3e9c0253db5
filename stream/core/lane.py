"""One step of a lane, without its I/O: which events are folded now, and which users are then scored as of when.

A lane folds its users' events in order. A step is a run of events, or a sweep of silence timers; its users are scored,
decided and written together. Two rules cut a block into steps, so that a timer fires at its due time and before the
user's next later event is folded:

    before the block    timers due at or before a user's first event of the block fire first, as a sweep
    within the block    an event at or after the due time that an earlier event of the same block has set ends the step
"""
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from stream.core.events import Event, Source
from stream.core.features import Snapshots
from stream.core.messages import Origin
from stream.core.window import Fold, User, WindowLimits, fire_timer, fold, pack_header


class Read(msgspec.Struct, gc=False):
    """A valid event and where it was read."""

    event: Event
    source: Source
    offset: int


class Touched(msgspec.Struct, gc=False):
    """One user of a step: scored as of `origin`; `origin` is None where nothing was applied and nothing is scored.

    event_ids   the events applied in this step, in order (empty for a timer)
    """

    user: User
    origin: Origin | None
    event_ids: list[str]


class Folded(msgspec.Struct):
    """What became of the events of a step. `counts` by `Fold`; `end` is the index of the first event not folded."""

    touched: list[Touched]
    counts: list[int]
    end: int


def overdue(users: Mapping[str, User], reads: Sequence[Read]) -> list[User]:
    """The users whose timer comes before their first event among `reads`, by due time, then id."""
    newest_ms = max(read.event.ts_ms for read in reads)
    waiting = {user_id for user_id, user in users.items() if 0 < user.due_ms <= newest_ms}
    due = []
    for read in reads:
        if not waiting:
            break
        event = read.event
        if event.user_id in waiting:
            waiting.remove(event.user_id)
            user = users[event.user_id]
            if user.due_ms <= event.ts_ms:
                due.append(user)
    return sorted(due, key=lambda user: (user.due_ms, user.user_id))


def fire(users: Iterable[User], limits: WindowLimits) -> list[Touched]:
    """Fire the due timer of each user; they are scored as of the time it was due."""
    return [Touched(user, Origin(due_ms := fire_timer(user, limits), due_ms), []) for user in users]


def fold_step(users: Mapping[str, User], reads: Sequence[Read], start: int, limits: WindowLimits) -> Folded:
    """Fold `reads[start:]` into `users` until the end, or until a timer has to fire in between.

    Promise  every read before `end` is counted exactly once, as applied, duplicate, late or seen.
    """
    counts = [0] * len(Fold)
    events_of: dict[str, list[str]] = {}
    end = start
    for end in range(start, len(reads)):
        read = reads[end]
        event = read.event
        user = users[event.user_id]
        applied = events_of.get(event.user_id)
        if applied is None:
            applied = events_of[event.user_id] = []
        elif 0 < user.due_ms <= event.ts_ms:
            break
        what = fold(user, event, limits, read.source, read.offset)
        counts[what] += 1
        if what == Fold.APPLIED:
            applied.append(event.event_id)
    else:
        end = len(reads)
    return Folded([
        Touched(users[user_id], Origin(users[user_id].last_seen_ms, 0) if applied else None, applied)
        for user_id, applied in events_of.items()], counts, end)


def snapshot(touched: Sequence[Touched]) -> Snapshots:
    """The scored users' records as the model's input sees them; one row per entry, all of which have an origin."""
    users = [entry.user for entry in touched]
    return Snapshots.join([pack_header(user) for user in users], [user.days for user in users],
                          [user.rows for user in users],
                          [entry.origin.as_of_ms for entry in touched if entry.origin is not None])
