import numpy as np
import pytest

from stream.core.decide import Kind
from stream.core.events import TYPE_CODES, Event
from stream.core.layout import DAY_MS, HOUR_MS, NO_TIER
from stream.core.outbox import Message
from stream.core.scores import Scores
from stream.replay.statistics import SCORE_BINS, Statistics


def read(ts_ms: int, type_name: str) -> Event:
    return Event('u', 'e', 1, ts_ms, TYPE_CODES[type_name], 0, 0, 0, 0.0, 0)


def scores(intent, churn, power, usable=None) -> Scores:
    rows = len(intent)
    return Scores(np.ones(rows, bool) if usable is None else np.array(usable), np.array(intent, float),
                  np.array(churn, float), np.array(power, float), np.ones((rows, 1)), np.zeros(rows))


def alert(user_id='u', kind='churn.alert', state: str | None = 'raised', day=0, churn=0.9, spend=10.0) -> Message:
    value = {'type': kind, 'user_id': user_id, 'as_of_ms': day * DAY_MS, 'expires_at_ms': (day + 7) * DAY_MS,
             'scores': {'churn': churn, 'expected_spend_90d': spend}}
    value |= {'state': state} if state else {}
    return Message(Kind(kind), b'ab' * 16, user_id.encode(), day * DAY_MS, b'', value)


# ---- events by hour -------------------------------------------------------------------------------------------------


def test_an_hour_ends_before_the_next():
    statistics = Statistics()
    statistics.add_events([read(HOUR_MS * 20_000 - 1, 'view'), read(HOUR_MS * 20_000, 'view')])
    assert statistics.events_per_hour == {19_999: {'view': 1}, 20_000: {'view': 1}}


def test_blocks_add_up_whatever_their_cuts():
    rng = np.random.default_rng(5)
    names = list(TYPE_CODES)
    reads = [read(int(ts_ms), names[code]) for ts_ms, code in
             zip(rng.integers(0, 30 * DAY_MS, 500), rng.integers(0, len(names), 500), strict=True)]
    whole, cut = Statistics(), Statistics()
    whole.add_events(reads)
    for start in range(0, 500, 37):
        cut.add_events(reads[start:start + 37])
    assert whole.events_per_hour == cut.events_per_hour
    for hour, row in whole.events_per_hour.items():
        for name, number in row.items():
            assert number == sum(r.ts_ms // HOUR_MS == hour and r.type == TYPE_CODES[name] for r in reads)
    assert sum(row.total() for row in whole.events_per_hour.values()) == 500


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_histograms_count_each_usable_score_in_its_bin():
    statistics = Statistics()
    statistics.add_scores(scores([0.0, 0.01, 0.61], [1.0, 0.99, 0.5], [0.31, 0.33, 0.33]))
    statistics.add_scores(scores([0.01, 0.7], [0.99, 0.7], [0.31, 0.7], usable=[True, False]))
    bins = {name: {int(at): int(histogram[at]) for at in np.flatnonzero(histogram)}
            for name, histogram in statistics.score_histograms.items()}
    assert bins == {'intent': {0: 3, 30: 1}, 'churn': {25: 1, 49: 3}, 'power': {15: 2, 16: 2}}


@pytest.mark.parametrize('step', range(SCORE_BINS))
def test_a_score_on_an_edge_belongs_to_the_bin_above_it(step):
    at = np.linspace(0, 1, SCORE_BINS + 1)[step]
    statistics = Statistics()
    statistics.add_scores(scores([at], [at], [at]))
    assert np.flatnonzero(statistics.score_histograms['churn']).tolist() == [step]


# ---- alerts ---------------------------------------------------------------------------------------------------------


def test_alerts_are_counted_by_hour_kind_and_state():
    statistics = Statistics()
    statistics.add_decisions([alert(day=3), alert(day=3, user_id='v'), alert(day=4, state='cleared'),
                           alert(day=4, kind='purchase_intent.alert'),
                           alert(day=4, kind='purchase_power.updated', state=None)])
    assert statistics.alerts_per_hour == {
        72: {'churn.alert raised': 2},
        96: {'churn.alert cleared': 1, 'purchase_intent.alert raised': 1, 'purchase_power.updated': 1}}


def test_whose_alert_was_cleared_is_no_longer_at_risk():
    statistics = Statistics()
    statistics.add_decisions([alert('gone', churn=0.95), alert('back'), alert('back', state='cleared'),
                           alert('wants', kind='purchase_intent.alert')])
    assert [value['user_id'] for value in statistics.users_at_risk()] == ['gone']


def test_the_spend_at_risk_orders_the_users_and_ids_break_ties():
    statistics = Statistics()
    statistics.add_decisions([alert('b', churn=0.8, spend=100), alert('a', churn=0.8, spend=100),
                           alert('c', churn=1.0, spend=79), alert('d', churn=0.9, spend=100)])
    assert [value['user_id'] for value in statistics.users_at_risk()] == ['d', 'a', 'b', 'c']


def test_an_expired_alert_is_about_somebody_lost():
    statistics = Statistics()
    statistics.add_decisions([alert('long ago', day=1), alert('now', day=20)])
    assert {value['user_id'] for value in statistics.users_at_risk()} == {'long ago', 'now'}
    statistics.clock_ms = 20 * DAY_MS
    assert [value['user_id'] for value in statistics.users_at_risk()] == ['now']


def test_the_newest_alerts_of_each_kind_are_shown():
    statistics = Statistics()
    statistics.add_decisions([alert(f'u{number}') for number in range(50)] + [alert(kind='purchase_intent.alert')])
    shown = [(value['type'], value['user_id']) for value in statistics.alerts_shown]
    assert shown[-1] == ('purchase_intent.alert', 'u')
    assert shown[-2] == ('churn.alert', 'u49')
    assert len(shown) < 20


def test_last_tiers():
    statistics = Statistics()
    for tier in (NO_TIER, 0, 4, 4):
        statistics.add_final_tier(tier)
    assert statistics.tiers == {None: 1, 0: 1, 4: 2}
