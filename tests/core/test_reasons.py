import itertools

import numpy as np
import pytest

from stream.core.decide import Kind
from stream.core.events import Event, EventType, Source
from stream.core.features import COUNTER_NAMES, Snapshots, features
from stream.core.layout import DAY_MS, WindowLimits
from stream.core.reasons import REASONS_MAX, Claim, Occlusions, explain, occlude, variants, within_budget, words
from stream.core.scores import Scores
from stream.core.user import User, fold, pack_header

T0_MS = 1_700_000_000_000
BUY, VIEW, CART = EventType.PURCHASE, EventType.VIEW, EventType.ADD_TO_CART


def snapshots_of(*users: list[tuple[int, EventType, float, int]], silent_ms: int = 0) -> Snapshots:
    folded = []
    for events in users:
        user = User('u')
        for at, (after_ms, kind, amount, basket) in enumerate(events):
            fold(user, [Event('u', str(at), at, T0_MS + after_ms, kind, 1, 1, basket, amount, 0, Source.CLICKS, at)],
                 WindowLimits())
        folded.append(user)
    return Snapshots.join([pack_header(user) for user in folded], [user.days for user in folded],
                          [user.rows for user in folded], [user.last_seen_ms + silent_ms for user in folded])


def scored(values: np.ndarray) -> Scores:
    zeros = np.zeros(len(values))
    return Scores(np.ones(len(values), bool), values, zeros, zeros, np.zeros((len(values), 2)), zeros)


def carts(occlusions: Occlusions) -> np.ndarray:
    """A stand-in for the model: the intent is 0.3 for each cart event in the window."""
    starts = occlusions.inputs.starts
    return np.array([0.3 * np.sum(occlusions.inputs.categories[start:end, 0] == CART)
                     for start, end in itertools.pairwise(starts)])


def test_the_event_that_made_the_score_is_the_first_reason():
    shopper = [(0, VIEW, 0, 0), (3_600_000 * 5, CART, 9.9, 0), (3_600_000 * 8, VIEW, 0, 0)]
    snapshots = snapshots_of([(0, VIEW, 0, 0)], shopper)
    occlusions = occlude(snapshots, [1], features(snapshots))
    reasons = explain(occlusions, scored(carts(occlusions)), 1, Kind.INTENT, scored(np.array([0.0, 0.3])))
    assert reasons == [{'name': 'add_to_cart', 'text': 'put an item in the cart worth 9.90 3 hours before',
                        'ts_ms': T0_MS + 5 * 3_600_000, 'amount': 9.9, 'effect': 0.3}]


def test_a_basket_is_taken_away_whole():
    snapshots = snapshots_of([(0, BUY, 5.0, 3), (0, BUY, 7.5, 3), (DAY_MS, VIEW, 0, 0)])
    occlusions = occlude(snapshots, [0], features(snapshots))
    what = next(at for at in range(len(occlusions.group)) if words(occlusions, at)['name'] == 'purchase')
    assert words(occlusions, what)['text'] == 'bought 2 lines for 12.50 24 hours before'
    assert occlusions.inputs.starts[what + 1] - occlusions.inputs.starts[what] == 1


def test_silence_is_taken_away_by_going_back_to_the_newest_event():
    snapshots = snapshots_of([(0, VIEW, 0, 0)], silent_ms=14 * DAY_MS)
    occlusions = occlude(snapshots, [0], features(snapshots))
    what = occlusions.group.index('silence')
    assert words(occlusions, what)['text'] == 'nothing for 14 days'
    column = COUNTER_NAMES.index('days_since_last_seen')
    assert occlusions.inputs.counters[what, column] == 0
    assert occlusions.inputs.counters[what - 1, column] == pytest.approx(np.log1p(14))


def test_a_group_of_counters_is_neutralised_alone():
    snapshots = snapshots_of([(0, BUY, 5.0, 0), (DAY_MS, BUY, 7.0, 0)])
    base = features(snapshots)
    occlusions = occlude(snapshots, [0], base)
    what = occlusions.group.index('orders')
    differing = [COUNTER_NAMES[column] for column in
                 np.flatnonzero(occlusions.inputs.counters[what] != base.counters[0])]
    # The last order was just now, so its age is 0 with or without the group. There are no refunds.
    assert differing == ['spend', 'spend_per_order', 'orders', 'has_ordered', 'gap_days_mean']
    assert words(occlusions, what)['text'] == '2 orders for 12.00, the last one just before'


def test_never_more_variants_than_the_budget_counts_with():
    snapshots = snapshots_of([(at, VIEW, 0, 0) for at in range(100)], silent_ms=DAY_MS)
    inputs = features(snapshots)
    assert len(occlude(snapshots, [0], inputs).group) == variants(inputs, np.array([0]))[0]


def test_the_strongest_come_first_and_noise_is_no_reason():
    snapshots = snapshots_of([(0, VIEW, 0, 0), (1, CART, 0, 0)])
    occlusions = occlude(snapshots, [0], features(snapshots))
    values = np.full(len(occlusions.group), 0.5)
    assert explain(occlusions, scored(values), 0, Kind.INTENT, scored(np.array([0.5002]))) == []
    values[:5] = [0.1, 0.9, 0.45, 0.2, 0.55]
    reasons = explain(occlusions, scored(values), 0, Kind.INTENT, scored(np.array([0.5])))
    assert [reason['effect'] for reason in reasons] == [0.4, -0.4, 0.3]
    assert len(reasons) == REASONS_MAX


def test_a_variant_without_a_usable_score_is_no_reason():
    snapshots = snapshots_of([(0, VIEW, 0, 0)])
    occlusions = occlude(snapshots, [0], features(snapshots))
    occluded = scored(np.zeros(len(occlusions.group)))
    occluded.usable[:] = False
    assert explain(occlusions, occluded, 0, Kind.INTENT, scored(np.array([0.9]))) == []


@pytest.mark.parametrize(('rows_max', 'rows'), [(100, [0, 3, 5]), (65, [0, 3, 5]), (64, [3, 5]), (49, [3]), (19, [])])
def test_the_budget_goes_to_the_most_urgent_and_then_to_the_first(rows_max: int, rows: list[int]):
    claims = [Claim(0, 2, 15), Claim(5, 0, 30), Claim(3, 0, 20)]
    assert within_budget(claims, rows_max) == rows
