"""What was known at a moment, what came after it, and who is asked."""
import json

import numpy as np
import pytest

from stream.core.events import Decoder, EventRules
from stream.core.user import User, fold, pack_header
from stream.core.window import DAY_MS, WindowLimits
from stream.errors import UsageError
from stream.learn.dataset import ExampleOptions, Kind, Split, build, moments, outcomes, split_of, tier_of

START_MS = 1_700_006_400_000
LIMITS = WindowLimits()
OPTIONS = ExampleOptions()


def line(number: int, day: float, kind: str, user: str = 'ann', **fields) -> bytes:
    return json.dumps({'event_id': f'e{number}', 'user_id': user, 'ts': START_MS + round(day * DAY_MS), 'type': kind,
                       **fields}).encode()


def decoded(values):
    decode = Decoder(EventRules())
    return [decode(value) for value in values]


@pytest.fixture(scope='module')
def data(lines):
    return build(lines, EventRules(), LIMITS, OPTIONS, seed=3)


def test_outcomes_of_hand_made_events():
    events = decoded([
        line(0, 0, 'view'),
        line(1, 5, 'purchase', price=10, quantity=2),
        line(2, 9, 'refund', price=5),
        line(3, 40, 'purchase', price=30),
        line(3, 40, 'purchase', price=30),      # the same event again counts once
        line(4, 95, 'purchase', price=100)])
    days = {0: (5, 45), 4.999: (0.001, 45), 5: (35, 125), 9: (31, 130), 40: (55, 100), 95: (np.inf, 0)}
    after = outcomes(events, [START_MS + round(day * DAY_MS) for day in days])
    assert [spend for _, spend in after] == [spend for _, spend in days.values()]
    assert [ahead for ahead, _ in after] == pytest.approx([ahead for ahead, _ in days.values()])


def test_refunds_of_earlier_orders_do_not_make_spend_negative():
    events = decoded([line(0, 0, 'purchase', price=50), line(1, 3, 'refund', price=50)])
    assert outcomes(events, [START_MS]) == [(np.inf, 0.0)]


def test_tiers_by_edges():
    assert tier_of(np.array([0, 0.5, 10, 15, 20, 29, 30, 99]), np.array([10, 20, 30])).tolist() == [
        0, 1, 2, 2, 3, 3, 4, 4]


def test_moments_are_those_of_the_worker():
    events = decoded([line(0, 0, 'view'), line(1, 0.01, 'click'), line(1, 0.015, 'click'), line(2, 8, 'view')])
    seen = [(kind, (as_of_ms - START_MS) / DAY_MS, user.applied)
            for kind, as_of_ms, user in moments(events, LIMITS, START_MS + 16 * DAY_MS)]
    assert seen == [
        (Kind.EVENT, 0, 1), (Kind.EVENT, 0.01, 2),
        (Kind.TIMER, 3.01, 2), (Kind.TIMER, 7.01, 2),       # day 14 is after the next event
        (Kind.SESSION_END, 8, 3), (Kind.TIMER, 11, 3), (Kind.TIMER, 15, 3)]


def test_labels_equal_a_recount_of_the_lines(data, lines):
    events = [json.loads(value) for value in lines]
    names = list(dict.fromkeys(event['user_id'] for event in events))
    money = {name: [] for name in names}
    for event in events:
        if event['type'] in ('purchase', 'refund'):
            money[event['user_id']].append(event)
    for split in (data.train, data.validation, data.test):
        for row in range(0, len(split), 3):
            as_of_ms = split.snapshots.as_of_ms[row]
            after = [event for event in money[names[split.user[row]]] if event['ts'] > as_of_ms]
            bought = [event['ts'] - as_of_ms for event in after if event['type'] == 'purchase']
            spend = sum(event['price'] * event['quantity'] * (1 if event['type'] == 'purchase' else -1)
                        for event in after if event['ts'] - as_of_ms <= 90 * DAY_MS)
            labels = split.labels
            assert labels.intent[row] == any(wait <= 7 * DAY_MS for wait in bought)
            assert labels.churn[row] == (not any(wait <= 30 * DAY_MS for wait in bought))
            assert labels.spend[row] == pytest.approx(max(0, spend), rel=1e-6, abs=1e-6)
            if np.abs(data.tier_edges - spend).min() > 1e-6:    # an edge may be a sum, added in another order
                assert labels.tier[row] == tier_of(max(0, spend), data.tier_edges)


def test_a_snapshot_is_the_fold_of_what_had_happened(data, lines):
    events = decoded(lines)
    names = list(dict.fromkeys(event.user_id for event in events))
    for split in (data.train, data.test):
        place = np.concatenate([[0], np.cumsum(split.snapshots.headers['events'].astype(int))])
        for row in range(0, len(split), 17):
            header, as_of_ms = split.snapshots.headers[row], split.snapshots.as_of_ms[row]
            window = split.snapshots.rows[place[row]:place[row + 1]]
            assert window['ts_ms'].max() <= as_of_ms and header['last_seen_ms'] <= as_of_ms
            user = User(names[split.user[row]])
            own = [event for event in events if event.user_id == user.user_id][:header['applied']]
            for offset, event in enumerate(own):
                assert event.ts_ms <= as_of_ms
                event.offset = offset
                fold(user, [event], LIMITS)
            assert bytes(user.rows) == window.tobytes()
            if split.kind[row] != Kind.TIMER:
                assert pack_header(user) == header.tobytes()


def test_no_user_is_in_two_splits_and_the_test_is_later(data):
    users = [set(split.user.tolist()) for split in (data.train, data.validation, data.test)]
    assert not users[0] & users[1] and not users[0] & users[2] and not users[1] & users[2]
    assert max(data.train.snapshots.as_of_ms.max(), data.validation.snapshots.as_of_ms.max()) < data.cut_ms
    assert data.cut_ms <= data.test.snapshots.as_of_ms.min()
    assert data.test.snapshots.as_of_ms.max() <= data.labelled_until_ms == data.end_ms - 90 * DAY_MS


def test_moments_of_every_kind_up_to_their_number(data):
    for kind, at_most in zip(Kind, OPTIONS.moments_per_user, strict=True):
        counts = np.bincount(data.train.user[data.train.kind == kind])
        assert counts.max() == at_most


def test_edges_are_quartiles_of_positive_training_spend(data):
    counts = np.bincount(data.train.labels.tier, minlength=5)[1:]
    assert counts.min() > 0 and counts.max() - counts.min() <= 3


def test_twice_the_same_and_other_users_change_nothing(data, lines):
    names = list(dict.fromkeys(json.loads(value)['user_id'] for value in lines))
    first = names[:60]
    fewer = build([value for value in lines if json.loads(value)['user_id'] in first] + lines[:1] + lines[-1:],
                  EventRules(), LIMITS, OPTIONS, seed=3)
    number = {name: place for place, name in enumerate(names)}

    def asked(split):
        return {(int(user), int(kind), int(as_of)) for user, kind, as_of in
                zip(split.user, split.kind, split.snapshots.as_of_ms, strict=True) if user < 60}

    assert [number[name] for name in first] == list(range(60))
    assert asked(fewer.train) == asked(data.train)


def test_split_shares():
    splits = [split_of(f'user {number}', (0.6, 0.15), seed=1) for number in range(20_000)]
    shares = [splits.count(split) / len(splits) for split in Split]
    assert shares == pytest.approx([0.6, 0.15, 0.25], abs=0.015)


def test_refused_records_are_counted_and_skipped(lines):
    data = build([*lines, b'{', b'null'], EventRules(), LIMITS, OPTIONS, seed=3)
    assert data.refused == 2 and data.events == len(lines)


@pytest.mark.parametrize('values', [
    [], [line(0, 0, 'view'), line(1, 30, 'view')],
    [line(number, number / 2, 'view', user=f'u{number % 50}') for number in range(800)]])
def test_nothing_to_learn_from_says_what_to_do(values):
    with pytest.raises(UsageError, match='Do: '):
        build(values, EventRules(), LIMITS, OPTIONS, seed=3)
