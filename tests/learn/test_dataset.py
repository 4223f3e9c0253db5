"""What was known at a moment, what came after it, and who is asked."""
import json

import numpy as np
import pytest

from stream.core.events import Decoder, EventRules
from stream.core.features import Snapshots, features
from stream.core.layout import DAY_MS, WindowLimits
from stream.core.user import User, fold, pack_header
from stream.errors import UsageError
from stream.learn.dataset import (
    HORIZON_DAYS,
    ExampleOptions,
    SnapshotKind,
    at_cutoffs,
    at_time,
    history_of,
    outcomes,
    part_of,
    read,
    sample,
    scoring_times,
)

START_MS = 1_700_006_400_000
LIMITS = WindowLimits()
OPTIONS = ExampleOptions(cutoffs_per_user=5, moments_per_user=8.0)
FOREVER_MS = 1 << 60


def line(number: int, day: float, kind: str, user: str = 'ann', **fields) -> bytes:
    return json.dumps({'event_id': f'e{number}', 'user_id': user, 'ts': START_MS + round(day * DAY_MS), 'type': kind,
                       **fields}).encode()


def decoded(values):
    decode = Decoder(EventRules())
    return [decode(value) for value in values]


def at(day: float) -> int:
    return START_MS + round(day * DAY_MS)


@pytest.fixture(scope='module')
def everyone(history):
    """Moments of all users up to the end of the recording, and up to a middle."""
    middle_ms = (history.start_ms + history.end_ms) // 2
    return {until: sample(history, range(len(history.user_ids)), history.start_ms, until, OPTIONS, LIMITS, seed=3)
            for until in (history.end_ms, middle_ms)}


def test_outcomes_of_hand_made_events():
    events = decoded([
        line(0, 0, 'view'),
        line(1, 5, 'purchase', price=10, quantity=2),
        line(2, 9, 'refund', price=5),
        line(3, 40, 'purchase', price=30),
        line(3, 40, 'purchase', price=30),      # the same event again counts once
        line(4, 95, 'purchase', price=100)])
    #        day: bought within 1, 7, 30, 90, 273 d; refund within 30 d; spent within 1, 7, 30, 90, 273 d
    wanted = {0: [0, 1, 1, 1, 1, 1, 0, 20, 15, 45, 145], 4.5: [1, 1, 1, 1, 1, 1, 20, 15, 15, 45, 145],
              5: [0, 0, 0, 1, 1, 1, 0, 0, 0, 125, 125], 9: [0, 0, 0, 1, 1, 0, 0, 0, 0, 130, 130],
              40: [0, 0, 0, 1, 1, 0, 0, 0, 0, 100, 100], 95: [0] * 11}
    found = outcomes(events, [(SnapshotKind.EVENT, at(day)) for day in wanted], FOREVER_MS)
    assert found.tolist() == list(wanted.values())


def test_what_is_at_the_time_of_a_cut_off_comes_after_it():
    events = decoded([line(0, 0, 'view'), line(1, 5, 'purchase', price=10), line(2, 6, 'purchase', price=1)])
    cutoff, event = outcomes(events, [(SnapshotKind.CUTOFF, at(5)), (SnapshotKind.EVENT, at(5))], FOREVER_MS)
    assert cutoff[0] == 1 and cutoff[-1] == 11
    assert event[0] == 1 and event[-1] == 1
    assert not list(at_cutoffs(events[1:], [at(5)], LIMITS))


def test_a_label_is_unknown_until_its_days_are_over():
    events = decoded([line(0, 0, 'view'), line(1, 1, 'purchase', price=10)])
    for known_days, settled in ((0.5, 0), (1, 1), (6.9, 1), (7, 2), (30, 3), (90, 4), (273, 5)):
        row, = outcomes(events, [(SnapshotKind.EVENT, at(0))], at(known_days))
        assert (~np.isnan(row[:5])).sum() == settled
        assert np.isnan(row[5]) == (known_days < 30) and (~np.isnan(row[6:])).sum() == settled


def test_refunds_of_earlier_orders_do_not_make_spend_negative():
    events = decoded([line(0, 0, 'purchase', price=50), line(1, 3, 'refund', price=50)])
    assert outcomes(events, [(SnapshotKind.EVENT, at(0))], FOREVER_MS)[0, -5:].tolist() == [0.0] * 5


def test_without_prices_purchases_are_counted():
    values = [line(0, 0, 'view'), line(1, 1, 'purchase'), line(2, 2, 'purchase')]
    history = read(values, EventRules())
    assert not history.priced
    assert at_time(history, [0], at(0.5), LIMITS, FOREVER_MS).labels.spend.tolist() == [2.0]


def test_moments_are_those_of_the_worker():
    events = decoded([line(0, 0, 'view'), line(1, 0.01, 'click'), line(1, 0.015, 'click'), line(2, 8, 'view')])
    seen = [(kind, (as_of_ms - START_MS) / DAY_MS, user.applied)
            for kind, as_of_ms, user in scoring_times(events, LIMITS, START_MS + 16 * DAY_MS)]
    assert seen == [
        (SnapshotKind.EVENT, 0, 1), (SnapshotKind.EVENT, 0.01, 2),
        (SnapshotKind.TIMER, 3.01, 2), (SnapshotKind.TIMER, 7.01, 2),       # day 14 is after the next event
        (SnapshotKind.SESSION_END, 8, 3), (SnapshotKind.TIMER, 11, 3), (SnapshotKind.TIMER, 15, 3)]


def test_labels_equal_a_recount_of_the_lines(everyone, history, lines):
    events = [json.loads(value) for value in lines]
    money = {name: [] for name in history.user_ids}
    for event in events:
        if event['type'] in ('purchase', 'refund'):
            money[event['user_id']].append(event)
    for until_ms, examples in everyone.items():
        for row in range(0, len(examples), 5):
            as_of_ms = int(examples.as_of_ms[row])
            first_ms = as_of_ms if examples.kind[row] == SnapshotKind.CUTOFF else as_of_ms + 1
            after = [event for event in money[history.user_ids[examples.user[row]]] if event['ts'] >= first_ms]
            bought = [event['ts'] - first_ms for event in after if event['type'] == 'purchase']
            for horizon, days in enumerate(HORIZON_DAYS):
                got = examples.labels.bought[row, horizon]
                if as_of_ms + days * DAY_MS > until_ms:
                    assert np.isnan(got) and np.isnan(examples.labels.spent[row, horizon])
                else:
                    assert got == any(wait < days * DAY_MS for wait in bought)
                    spend = sum(event['price'] * event['quantity'] * (1 if event['type'] == 'purchase' else -1)
                                for event in after if event['ts'] - first_ms < days * DAY_MS)
                    assert examples.labels.spent[row, horizon] == pytest.approx(max(0, spend), rel=1e-6, abs=1e-6)


def test_a_snapshot_is_the_fold_of_what_had_happened(everyone, history):
    examples = next(iter(everyone.values()))
    place = np.concatenate([[0], np.cumsum(examples.snapshots.headers['events'].astype(int))])
    for row in range(0, len(examples), 17):
        header, as_of_ms = examples.snapshots.headers[row], examples.as_of_ms[row]
        window = examples.snapshots.rows[place[row]:place[row + 1]]
        assert window['ts_ms'].max() <= as_of_ms and header['last_seen_ms'] <= as_of_ms
        user = User(history.user_ids[examples.user[row]])
        for offset, event in enumerate(history.events[examples.user[row]][:header['applied']]):
            assert event.ts_ms <= as_of_ms
            event.offset = offset
            fold(user, [event], WindowLimits(silence_ms=()))
        assert bytes(user.rows) == window.tobytes() and user.spend == header['spend']


def test_a_cut_off_knows_what_a_moment_at_that_time_knows(history):
    """The path of runs gives the model the same as the worker's own, timers or not."""
    events = max(history.events, key=len)
    for kind, as_of_ms, user in list(scoring_times(events, LIMITS, history.end_ms))[-1:]:
        (_, (header, days, rows)), = at_cutoffs(events, [as_of_ms + 1], LIMITS)
        mine, theirs = (features(Snapshots.join([part[0]], [part[1]], [part[2]], [as_of_ms])) for part in (
            (header, days, rows), (pack_header(user), bytes(user.days), bytes(user.rows))))
        np.testing.assert_array_equal(mine.counters, theirs.counters)
        np.testing.assert_array_equal(mine.numbers, theirs.numbers)
        assert kind in SnapshotKind


def test_a_planted_leak_is_not_seen(history):
    """A purchase planted at the time changes neither what is known before it, nor who is asked, nor a label."""
    until_ms = (history.start_ms + history.end_ms) // 2
    clean = history.before(until_ms)
    decode = Decoder(EventRules())
    planted = {}
    for number, (user_id, events) in enumerate(zip(clean.user_ids, clean.events, strict=True)):
        leak = decode(line(10**6 + number, 0, 'purchase', user=user_id, price=1e5))
        leak.ts_ms = until_ms
        planted[user_id] = [*events, leak]
    examples = [sample(of, range(len(clean.user_ids)), clean.start_ms, until_ms, OPTIONS, LIMITS, seed=3)
                for of in (clean, history_of(planted))]
    for part in ('rows', 'days', 'headers', 'as_of_ms'):
        first, second = (getattr(found.snapshots, part).tobytes() for found in examples)
        assert first == second, part
    for part in ('bought', 'refunded', 'spend'):
        np.testing.assert_array_equal(*(getattr(found.labels, part) for found in examples))
    # The same leak a moment earlier is seen: the test can fail.
    for events in planted.values():
        events[-1].ts_ms = until_ms - 1
    late = sample(history_of(planted), range(len(clean.user_ids)), clean.start_ms, until_ms, OPTIONS, LIMITS, seed=3)
    assert np.nansum(late.labels.bought) > np.nansum(examples[0].labels.bought)


def test_whether_a_moment_is_taken_does_not_look_ahead(history):
    """Of a user whose life was cut short the same moments are taken, up to the cut, as of the whole life."""
    longest = max(range(len(history.user_ids)), key=lambda user: len(history.events[user]))
    until_ms = history.end_ms
    whole = sample(history, [longest], history.start_ms, until_ms, OPTIONS, LIMITS, seed=3)
    kinds = np.bincount(whole.kind, minlength=4)
    assert kinds[SnapshotKind.EVENT] > 0 and kinds[SnapshotKind.CUTOFF] == OPTIONS.cutoffs_per_user
    every = sample(history, range(len(history.user_ids)), history.start_ms, until_ms, OPTIONS, LIMITS, seed=3)
    own = every.kind != SnapshotKind.CUTOFF
    counts = np.bincount(every.user[own], minlength=len(history.user_ids))
    assert counts.mean() == pytest.approx(OPTIONS.moments_per_user, rel=0.25)
    lengths = np.array([len(events) for events in history.events])
    assert np.corrcoef(counts, lengths)[0, 1] > 0.9     # a long life has more of them, in proportion


def test_at_a_time_everybody_who_was_seen_before(history):
    at_ms = (history.start_ms + history.end_ms) // 2
    people = at_time(history, range(len(history.user_ids)), at_ms, LIMITS, history.end_ms)
    assert people.user.tolist() == [user for user, events in enumerate(history.events) if events[0].ts_ms < at_ms]
    assert set(people.as_of_ms) == {at_ms} and people.snapshots.headers['last_seen_ms'].max() < at_ms
    last_order = {user: max((event.ts_ms for event in history.events[user] if event.type == 12 and event.ts_ms < at_ms),
                            default=None) for user in people.user.tolist()}
    assert people.active.tolist() == [last is not None and at_ms - last <= 90 * DAY_MS for last in last_order.values()]


def test_parts_of_users():
    parts = [part_of(f'user {number}', (0.6, 0.15), seed=1) for number in range(20_000)]
    shares = [parts.count(part) / len(parts) for part in range(3)]
    assert shares == pytest.approx([0.6, 0.15, 0.25], abs=0.015)
    assert parts[:50] != [part_of(f'user {number}', (0.6, 0.15), seed=2) for number in range(50)]


def test_refused_records_are_counted_and_skipped(lines):
    assert read([*lines[:50], b'{', b'null'], EventRules()).refused == 2


def test_nothing_to_learn_from_says_what_to_do(history):
    with pytest.raises(UsageError, match='Do: '):
        read([b'{'], EventRules())
    with pytest.raises(UsageError, match='Do: '):
        history.before(history.start_ms)
    with pytest.raises(UsageError, match='Do: '):
        sample(history, [], history.start_ms, history.end_ms, OPTIONS, LIMITS, seed=3)
