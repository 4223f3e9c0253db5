from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.core.events import Event, EventType, Source
from stream.core.features import (
    COUNTER_NAMES,
    COUNTERS,
    LENGTHS,
    SLOT_NUMBER_NAMES,
    SLOTS_MAX,
    Features,
    Snapshots,
    batches,
    features,
)
from stream.core.layout import DAY_MS, WindowLimits
from stream.core.user import User, fold, pack_header

T0_MS = 1_700_006_400_000 // DAY_MS * DAY_MS     # a midnight
LIMITS = WindowLimits()
BUY, VIEW = EventType.PURCHASE, EventType.VIEW


def user_of(*events: tuple[int, EventType, float, int]) -> User:
    """A user with events (ms after T0, type, amount, basket)."""
    user = User('u')
    for at, (after_ms, kind, amount, basket) in enumerate(events):
        fold(user, [Event('u', str(at), at, T0_MS + after_ms, kind, at + 1, at + 1, basket, amount, 0, Source.CLICKS,
                         at)], LIMITS)
    return user


def inputs_of(users: list[User], as_of_ms: list[int] | None = None) -> Features:
    return features(Snapshots.join([pack_header(user) for user in users], [user.days for user in users],
                                   [user.rows for user in users],
                                   as_of_ms or [user.last_seen_ms for user in users]))


def counter(inputs: Features, row: int, name: str) -> float:
    return float(np.expm1(inputs.counters[row, COUNTER_NAMES.index(name)]))


def number(inputs: Features, slot: int, name: str) -> float:
    return float(inputs.numbers[slot, SLOT_NUMBER_NAMES.index(name)])


def test_lines_of_a_basket_share_a_slot():
    inputs = inputs_of([user_of((0, VIEW, 1.0, 0), (10, BUY, 5.0, 3), (10, BUY, 6.0, 3), (20, BUY, 7.0, 4))])
    assert inputs.starts.tolist() == [0, 3]
    assert inputs.categories[:-1, 0].tolist() == [VIEW, BUY, BUY]
    assert np.expm1(inputs.numbers[:-1, 0]) == pytest.approx([1.0, 11.0, 7.0], rel=1e-6)
    assert np.expm1(inputs.numbers[:-1, 3]) == pytest.approx([0.0, 1.0, 0.0])
    assert inputs.slot_of_row.tolist() == [0, 1, 1, 2]


def test_events_of_one_type_at_one_moment_share_a_slot_in_whatever_order_they_stand():
    """In a recording with a resolution of one day, the events of a day are ordered by their ids."""
    inputs = inputs_of([user_of((0, VIEW, 1.0, 0), (0, BUY, 5.0, 0), (0, VIEW, 2.0, 0), (10, VIEW, 4.0, 0))])
    assert inputs.starts.tolist() == [0, 3]
    assert inputs.categories[:-1, 0].tolist() == [VIEW, BUY, VIEW]
    assert np.expm1(inputs.numbers[:-1, 0]) == pytest.approx([3.0, 5.0, 4.0], rel=1e-6)
    assert np.expm1(inputs.numbers[:-1, 3]) == pytest.approx([1.0, 0.0, 0.0])
    assert inputs.slot_of_row.tolist() == [0, 1, 0, 2]


def test_neither_users_nor_types_nor_events_without_a_basket_share_a_slot():
    inputs = inputs_of([user_of((0, VIEW, 1, 0), (1, VIEW, 1, 0), (2, BUY, 1, 3)), user_of((2, BUY, 1, 3))])
    assert inputs.starts.tolist() == [0, 3, 4]
    inputs = inputs_of([user_of((0, BUY, 1, 3), (1, EventType.REFUND, 1, 3))])
    assert inputs.starts.tolist() == [0, 2]


def test_only_the_newest_slots_are_kept():
    inputs = inputs_of([user_of(*((at, VIEW, at, 0) for at in range(SLOTS_MAX + 5)))])
    assert inputs.starts.tolist() == [0, SLOTS_MAX]
    assert np.expm1(inputs.numbers[0, 0]) == pytest.approx(5)
    assert inputs.slot_of_row.tolist() == [-1] * 5 + list(range(SLOTS_MAX))


def test_times_are_as_of_the_given_moment():
    user = user_of((0, VIEW, 0, 0), (2 * DAY_MS, VIEW, 0, 0))
    inputs = inputs_of([user, user], [T0_MS + 2 * DAY_MS, T0_MS + 5 * DAY_MS])
    assert np.expm1([number(inputs, slot, 'age_days') for slot in range(4)]) == pytest.approx([2, 0, 5, 3])
    assert np.expm1([number(inputs, slot, 'gap_days') for slot in range(4)]) == pytest.approx([0, 2, 0, 2])
    assert [counter(inputs, row, 'days_since_last_seen') for row in (0, 1)] == pytest.approx([0, 3])
    assert [counter(inputs, row, 'days_since_first_seen') for row in (0, 1)] == pytest.approx([2, 5])


def test_rolling_counters_forget():
    user = user_of((0, BUY, 8.0, 0), (10 * DAY_MS, EventType.ADD_TO_CART, 3.0, 0), (12 * DAY_MS, VIEW, 0, 0))
    inputs = inputs_of([user] * 3, [T0_MS + days * DAY_MS for days in (12, 40, 200)])
    assert [counter(inputs, row, 'spend_7d') for row in range(3)] == pytest.approx([0, 0, 0])
    assert [counter(inputs, row, 'spend_30d') for row in range(3)] == pytest.approx([8, 0, 0])
    assert [counter(inputs, row, 'orders_90d') for row in range(3)] == pytest.approx([1, 1, 0])
    assert [counter(inputs, row, 'carts_7d') for row in range(3)] == pytest.approx([1, 0, 0])
    assert [counter(inputs, row, 'active_days_30d') for row in range(3)] == pytest.approx([3, 1, 0])
    assert [counter(inputs, row, 'spend') for row in range(3)] == pytest.approx([8, 8, 8])


def test_a_user_does_not_change_with_the_company():
    alone = user_of((0, BUY, 8.0, 3), (9, VIEW, 1.0, 0))
    others = [user_of((0, VIEW, 1.0, 0)), alone, user_of((4, BUY, 2.0, 3), (5, BUY, 2.0, 3))]
    one, many = inputs_of([alone]), inputs_of(others)
    assert np.array_equal(one.counters[0], many.counters[1])
    assert np.array_equal(one.numbers[:-1], many.numbers[many.starts[1]:many.starts[2]])
    assert np.array_equal(one.categories[:-1], many.categories[many.starts[1]:many.starts[2]])


@pytest.mark.parametrize('rows', [[2, 0], [1], [0, 1, 2], []])
def test_taken_snapshots_are_those_of_these_users_alone(rows: list[int]):
    users = [user_of((0, VIEW, 1.0, 0), (DAY_MS, BUY, 5.0, 3)), User('nobody'), user_of((5, BUY, 6.0, 3))]

    def joined(some: list[User]) -> Snapshots:
        return Snapshots.join([pack_header(user) for user in some], [user.days for user in some],
                              [user.rows for user in some], [T0_MS + 2 * DAY_MS for _ in some])

    taken, alone = joined(users).take(rows), joined([users[row] for row in rows])
    for name in ('headers', 'days', 'rows', 'as_of_ms'):
        assert getattr(taken, name).tobytes() == getattr(alone, name).tobytes()


def test_every_counter_is_finite_for_an_empty_user_and_after_refunds():
    inputs = inputs_of([User('new'), user_of((0, EventType.REFUND, 50.0, 0))], [T0_MS, T0_MS])
    assert inputs.counters.shape == (2, COUNTERS)
    assert np.isfinite(inputs.counters).all()
    assert inputs.starts.tolist() == [0, 0, 1]


@given(st.lists(st.integers(0, SLOTS_MAX), min_size=1, max_size=40), st.integers(1, 7),
       st.sampled_from([0, 16, 256]))
def test_batches_hold_every_row_once_in_the_shortest_bucket_or_few_in_the_next(
    lengths: list[int], rows_max: int, padding_slots_max: int,
):
    starts = np.concatenate(([0], np.cumsum(lengths)))
    slots = int(starts[-1])
    inputs = Features(np.pad(np.arange(1, slots * 3 + 1, dtype=np.int32).reshape(-1, 3), ((0, 1), (0, 0))),
                      np.pad(np.arange(slots * 7, dtype=np.float32).reshape(-1, 7), ((0, 1), (0, 0))), starts,
                      np.arange(len(lengths) * COUNTERS, dtype=np.float32).reshape(-1, COUNTERS),
                      np.zeros(0, np.int64))
    seen, length_of = [], {}
    for batch in batches(inputs, rows_max, padding_slots_max):
        length = batch.categories.shape[1]
        assert len(batch) <= rows_max
        for at, row in enumerate(batch.row_id[:, 0]):
            seen.append(int(row))
            count = lengths[row]
            length_of[int(row)] = length
            assert np.array_equal(batch.categories[at, :count], inputs.categories[starts[row]:starts[row + 1]])
            assert np.array_equal(batch.numbers[at, :count], inputs.numbers[starts[row]:starts[row + 1]])
            assert not batch.categories[at, count:].any()
            assert not batch.numbers[at, count:].any()
            assert np.array_equal(batch.counters[at], inputs.counters[row])
    assert sorted(seen) == list(range(len(lengths)))
    for row, count in enumerate(lengths):
        length, shortest = length_of[row], next(bucket for bucket in LENGTHS if bucket >= count)
        assert length >= shortest
        for bucket, longer in pairwise(LENGTHS):
            if shortest <= bucket < length:     # few rows had this length or less, and longer rows existed
                few = sum(length_of[other] > bucket >= size for other, size in enumerate(lengths))
                assert few * (longer - bucket) <= padding_slots_max
                assert any(length_of[other] > bucket < size for other, size in enumerate(lengths))
