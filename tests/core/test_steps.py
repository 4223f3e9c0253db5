import random

from stream.core.events import Event, EventType, Source
from stream.core.layout import DAY_MS, Fold, WindowLimits
from stream.core.messages import Origin
from stream.core.steps import block_steps, fire, fold_step, snapshot
from stream.core.user import User, overdue

T0_MS = 1_700_000_000_000
LIMITS = WindowLimits(silence_ms=(3 * DAY_MS, 7 * DAY_MS))


def reads(*events: tuple[str, float]) -> list[Event]:
    """Events as (user, days after T0)."""
    return [Event(user, f'{user}{at}', at, T0_MS + int(days * DAY_MS), EventType.VIEW, 0, 0, 0, 0.0, 0, Source.CLICKS,
                  at) for at, (user, days) in enumerate(events)]


def users_of(entries: list[Event]) -> dict[str, User]:
    return {entry.user_id: User(entry.user_id) for entry in entries}


def test_a_step_takes_a_block_whole_when_no_timer_is_in_it():
    entries = reads(('a', 0), ('b', 1), ('a', 2), ('b', 3.9))
    step = fold_step(users_of(entries), entries, LIMITS)
    assert step.rest == []
    assert step.counts[Fold.APPLIED] == 4
    assert [(touched.user.user_id, [event.event_id for event in touched.applied], touched.origin)
            for touched in step.touched] == [
        ('a', ['a0', 'a2'], Origin(T0_MS + 2 * DAY_MS, 0)),
        ('b', ['b1', 'b3'], Origin(T0_MS + int(3.9 * DAY_MS), 0))]


#   day      0    1    2    3    4    5
#   a        x    |    |    !    x        ! due: fires before the event of day 4
def test_a_timer_set_within_the_block_ends_the_step():
    entries = reads(('a', 0), ('b', 1), ('a', 4), ('b', 4))
    users = users_of(entries)
    step = fold_step(users, entries, LIMITS)
    assert (step.rest, step.counts[Fold.APPLIED]) == ([entries[2], entries[3]], 2)
    assert [user.user_id for user in overdue(users, step.rest)] == ['a', 'b']
    fired = fire(overdue(users, step.rest), LIMITS)
    assert [touched.origin for touched in fired] == [
        Origin(T0_MS + 3 * DAY_MS, T0_MS + 3 * DAY_MS), Origin(T0_MS + 4 * DAY_MS, T0_MS + 4 * DAY_MS)]
    assert overdue(users, step.rest) == []
    assert fold_step(users, step.rest, LIMITS).rest == []


def test_a_user_with_two_timers_before_the_event_fires_both_in_turn():
    entries = reads(('a', 0), ('a', 9))
    users = users_of(entries)
    fold_step(users, entries, LIMITS)
    due_days = []
    while due := overdue(users, entries[1:]):
        due_days += [(touched.origin.timer_ms - T0_MS) // DAY_MS for touched in fire(due, LIMITS) if touched.origin]
    assert due_days == [3, 7]


def test_an_older_event_fires_nothing():
    entries = reads(('a', 5), ('a', 1), ('a', 7.9))
    users = users_of(entries)
    assert fold_step(users, entries, LIMITS).rest == []


def test_users_with_nothing_applied_are_touched_but_not_scored():
    first = reads(('a', 0), ('b', 0))
    users = users_of(first)
    fold_step(users, first, LIMITS)
    again = reads(('a', 0), ('b', 0), ('b', 0.1))
    for entry in again:
        entry.offset += 2
    step = fold_step(users, again, LIMITS)
    assert (step.counts[Fold.DUPLICATE], step.counts[Fold.APPLIED]) == (2, 1)
    assert [touched.origin is None for touched in step.touched] == [True, False]


def test_a_redelivered_block_touches_its_users_and_scores_nobody():
    entries = reads(('a', 0), ('a', 1))
    users = users_of(entries)
    fold_step(users, entries, LIMITS)
    step = fold_step(users, entries, LIMITS)
    assert step.counts[Fold.SEEN] == 2
    assert step.touched[0].origin is None


def test_a_snapshot_has_a_row_for_each_scored_user_as_of_its_origin():
    entries = reads(('a', 0), ('b', 1), ('b', 2))
    taken = snapshot(fold_step(users_of(entries), entries, LIMITS).touched)
    assert taken.as_of_ms.tolist() == [T0_MS, T0_MS + 2 * DAY_MS]
    assert taken.headers['events'].tolist() == [1, 2]
    assert len(taken.rows) == 3


def described(users: dict[str, User], entries: list[Event]) -> list[str]:
    """The steps of a block: `a@3!` is a timer of `a` due on day 3, `a:1,2` events of `a`, `a-` touched for nothing."""
    steps = []
    for folded in block_steps(users, entries, LIMITS):
        told = []
        for touched in folded.touched:
            if touched.origin is None:
                told.append(f'{touched.user.user_id}-')
            elif touched.origin.timer_ms:
                told.append(f'{touched.user.user_id}@{(touched.origin.timer_ms - T0_MS) / DAY_MS:g}!')
            else:
                told.append(f'{touched.user.user_id}:{",".join(str(event.offset) for event in touched.applied)}')
        steps.append(' '.join(told))
    return steps


#   day      0    1    2    3    4    5    6    7    8    9
#   a        x    |    |    !    x    |    |    !    |    x
#   b        |    x    |    |    !    x
#   c        |    |    |    |    x
def test_a_block_is_cut_where_timers_fire_first():
    entries = reads(('a', 0), ('b', 1), ('c', 4), ('a', 4), ('b', 5), ('a', 9))
    users = users_of(entries)
    assert described(users, entries) == ['a:0 b:1 c:2', 'a@3! b@4!', 'a:3 b:4', 'a@7!', 'a:5']
    assert users['a'].next_offset == [6, 0]


def test_a_long_silence_fires_its_timers_one_sweep_each_before_the_event():
    first, then = reads(('a', 0)), reads(('b', 0), ('a', 9))
    users = users_of(first + then)
    assert described(users, first) == ['a:0']
    assert described(users, then) == ['a@3!', 'a@7!', 'b:0 a:1']


def test_a_block_without_events_has_no_steps():
    assert described({}, []) == []


def test_a_redelivered_block_fires_nothing_and_scores_nobody():
    # A repeat with a later time moves the clock of `a` past an event that comes after it: day 1 sets the timer of day
    # 4, which day 10 of the redelivery must leave alone.
    entries = reads(('a', 0), ('a', 10), ('a', 1))
    entries[1].event_id, entries[1].key = entries[0].event_id, entries[0].key
    users = users_of(entries)
    assert described(users, entries) == ['a:0', 'a@3!', 'a@7!', 'a:2']
    assert users['a'].due_ms == T0_MS + 4 * DAY_MS
    assert set(' '.join(described(users, entries)).split()) == {'a-'}
    assert users['a'].due_ms == T0_MS + 4 * DAY_MS


def test_a_step_is_taken_when_it_is_asked_for():
    entries = reads(('a', 0), ('a', 4))
    users = users_of(entries)
    steps = block_steps(users, entries, LIMITS)
    next(steps)
    assert (users['a'].applied, users['a'].silence) == (1, 0)
    next(steps)
    assert (users['a'].applied, users['a'].silence) == (1, 1)


def test_cuts_of_a_stream_into_blocks_change_neither_users_nor_timers():
    for seed in range(20):
        draw = random.Random(seed)
        entries = reads(*[(draw.choice('abc'), draw.uniform(0, 40)) for _ in range(60)])
        taken = []
        for size in (1, 7, 60):
            users, timers = users_of(entries), []
            counts = [0] * len(Fold)
            for start in range(0, len(entries), size):
                for folded in block_steps(users, entries[start:start + size], LIMITS):
                    counts = [was + more for was, more in zip(counts, folded.counts, strict=True)]
                    timers += [(touched.user.user_id, touched.origin.timer_ms) for touched in folded.touched
                               if touched.origin and touched.origin.timer_ms]
            assert sum(counts) == len(entries), f'SEED={seed}'
            taken.append((counts, sorted(timers), {
                name: (user.applied, user.due_ms, user.silence, bytes(user.rows)) for name, user in users.items()}))
        assert taken[0] == taken[1] == taken[2], f'SEED={seed}'
