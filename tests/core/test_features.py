import math
from dataclasses import replace
from itertools import groupby, pairwise
from operator import itemgetter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.core.events import Event, EventType, Source
from stream.core.features import (
    CATEGORY_BUCKETS,
    COUNTER_NAMES,
    COUNTERS,
    ITEM_BUCKETS,
    LENGTHS,
    PADDING_ROW,
    ROWS_MULTIPLE,
    SLOT_NUMBER_NAMES,
    SLOTS_MAX,
    Features,
    Snapshots,
    batches,
    features,
    padded,
)
from stream.core.layout import DAY_DTYPE, DAY_MS, HEADER_DTYPE, ROW_DTYPE, WindowLimits
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


def made_up(lengths: list[int]) -> Features:
    """Features of rows with so many slots each; every number is another one, and none is 0."""
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    slots = int(starts[-1])
    return Features(np.pad(np.arange(1, slots * 3 + 1, dtype=np.int32).reshape(-1, 3), ((0, 1), (0, 0))),
                    np.pad(np.arange(1, slots * 7 + 1, dtype=np.float32).reshape(-1, 7), ((0, 1), (0, 0))), starts,
                    np.arange(1, len(lengths) * COUNTERS + 1, dtype=np.float32).reshape(-1, COUNTERS),
                    np.zeros(0, np.int64))


@given(st.lists(st.integers(0, SLOTS_MAX), min_size=1, max_size=40), st.integers(1, 14),
       st.sampled_from([0, 16, 256]))
def test_batches_hold_every_row_once_in_the_shortest_bucket_or_few_in_the_next(
    lengths: list[int], rows_max: int, padding_slots_max: int,
):
    inputs = made_up(lengths)
    starts = inputs.starts
    seen, length_of = [], {}
    for batch in batches(inputs, rows_max, padding_slots_max):
        length = batch.categories.shape[1]
        assert len(batch) <= rows_max
        for at, row in enumerate(batch.row_id[:batch.windows, 0]):
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


@given(st.lists(st.integers(0, SLOTS_MAX), min_size=1, max_size=40), st.integers(1, 14))
def test_batches_are_filled_up_to_a_multiple_of_four_with_rows_of_zeros(lengths: list[int], rows_max: int):
    for batch in batches(made_up(lengths), rows_max):
        assert len(batch) % ROWS_MULTIPLE == 0 or rows_max < ROWS_MULTIPLE
        assert len(batch) - batch.windows < ROWS_MULTIPLE
        assert (batch.row_id[:batch.windows] >= 0).all()
        for part in (batch.categories, batch.numbers, batch.counters, batch.row_id - PADDING_ROW):
            assert not part[batch.windows:].any()
        assert {name: getattr(batch, name).dtype for name in ('categories', 'numbers', 'counters', 'row_id')} == {
            'categories': np.int32, 'numbers': np.float32, 'counters': np.float32, 'row_id': np.int64}


@pytest.mark.parametrize(('rows_max', 'heights'), [
    (1, [1] * 9), (3, [3, 3, 3]), (4, [4, 4, 4]), (7, [4, 4, 4]), (8, [8, 4]), (11, [8, 4]), (256, [12])])
def test_the_limit_of_rows_counts_padding_rows(rows_max: int, heights: list[int]):
    assert [len(batch) for batch in batches(made_up([1] * 9), rows_max)] == heights


def test_a_batch_without_rows_is_no_batch():
    assert list(batches(made_up([]), 256)) == []
    assert len(padded(made_up([3]), np.zeros(0, np.int64), 8)) == 0


def test_padded_adds_no_rows():
    assert padded(made_up([3, 5, 7]), np.array([2, 0, 2]), 9).row_id.tolist() == [[2], [0], [2]]


def test_rows_and_slots_that_do_not_exist_are_errors():
    inputs = made_up([3, 5])
    for row in (-1, 2, 1 << 60):
        with pytest.raises(IndexError):
            padded(inputs, np.array([row]), 8)
    with pytest.raises(ValueError, match='has room for 4'):
        padded(inputs, np.array([1]), 4)
    for starts in ([0, 3, 10], [0, -4, 8], [-3, 3, 8], [0, 1 << 62, 8]):
        inputs.starts = np.array(starts)
        with pytest.raises(ValueError, match='slots'):
            padded(inputs, np.array([0, 1]), 64)
    inputs.starts = np.array([0, 65])
    with pytest.raises(ValueError, match='65 slots'):
        list(batches(inputs, 256))
    with pytest.raises(ValueError, match='0 rows'):
        list(batches(inputs, 0))


# ---- against a plain calculation -------------------------------------------------------------------------------------

def plain(header: np.void, days: np.ndarray, rows: np.ndarray, as_of_ms: int) -> tuple[list, list, list, list]:
    """Categories, numbers, counters and slot of each event of one user, one number at a time."""
    def log(value: float) -> float:
        with np.errstate(all='ignore'):
            return float(np.log1p(np.float64(value)))

    def days_from(ts_ms: int) -> float:
        return wrapped(as_of_ms - ts_ms) / DAY_MS

    def wrapped(span_ms: int) -> int:       # a damaged record's times may be too far apart for 64 bits
        return (span_ms + (1 << 63)) % (1 << 64) - (1 << 63)

    def bucket(hashed: int, count: int) -> int:
        return hashed % (count - 1) + 1 if hashed else 0

    events = [{name: row[name].item() for name in ROW_DTYPE.names or ()} | {'at': at} for at, row in enumerate(rows)]
    slots: list[list[dict]] = []
    for _, tied in groupby(events, key=itemgetter('ts_ms')):
        for event in sorted(tied, key=itemgetter('type')):
            last = slots[-1][-1] if slots else None
            if (last and last['type'] == event['type'] and last['basket'] == event['basket']
                    and (event['basket'] or last['ts_ms'] == event['ts_ms'])):
                slots[-1].append(event)
            else:
                slots.append([event])
    slots = slots[-SLOTS_MAX:]
    slot_of_row = [-1] * len(events)
    categories, numbers = [], []
    for at, slot in enumerate(slots):
        first = slot[0]
        for event in slot:
            slot_of_row[event['at']] = at
        angle = first['ts_ms'] % DAY_MS // 60_000 * (2 * math.pi / 1440)
        gap_ms = wrapped(first['ts_ms'] - slots[at - 1][0]['ts_ms']) if at else 0
        categories.append([first['type'], bucket(first['item'], ITEM_BUCKETS),
                           bucket(first['category'], CATEGORY_BUCKETS)])
        numbers.append([log(sum(event['amount'] for event in slot)), log(gap_ms / DAY_MS),
                        log(days_from(first['ts_ms'])), log(len(slot) - 1), first['rating'] / 10, math.sin(angle),
                        math.cos(angle)])

    orders, gaps = int(header['orders']), int(header['gaps'])
    gap_mean = float(header['gap_days']) / max(gaps, 1)
    variance = float(header['gap_days_squared']) / max(gaps, 1) - gap_mean * gap_mean
    order_age = days_from(int(header['last_order_ms'])) if orders else 0.0
    counters = [log(int(count)) for count in header['counts']]
    counters += [log(days_from(int(header['first_seen_ms']))), log(days_from(int(header['last_seen_ms']))),
                 log(header['spend']), log(header['refunds']), log(header['spend'] / max(orders, 1)), log(orders),
                 float(orders > 0), log(order_age), log(gap_mean), log(math.sqrt(max(variance, 0.0))),
                 log(order_age / max(gap_mean, 1.0)) if gaps else 0.0]
    for horizon in (7, 30, 90):
        recent = [day for day in days if as_of_ms // DAY_MS - int(day['day']) < horizon]
        counters += [log(sum(int(day[name]) for day in recent)) for name in ('browses', 'carts', 'orders')]
        counters += [log(max(sum((float(day['spend']) for day in recent), 0.0), 0.0)), log(len(recent))]
    for period_ms in (DAY_MS, 7 * DAY_MS, 365.2425 * DAY_MS):
        angle = as_of_ms % period_ms * (2 * math.pi / period_ms)
        counters += [math.sin(angle), math.cos(angle)]
    return categories, numbers, counters, slot_of_row


def assert_plain(snapshots: Snapshots) -> None:
    """The features are the plain ones, to the last bit or the one before."""
    inputs = features(snapshots)
    event = day = 0
    assert not inputs.categories[-1].any()
    assert not inputs.numbers[-1].any()
    assert len(inputs.categories) == len(inputs.numbers) == inputs.starts[-1] + 1
    for row, header in enumerate(snapshots.headers):
        start, end = inputs.starts[row:row + 2]
        events, days = int(header['events']), int(header['days'])
        categories, numbers, counters, slot_of_row = plain(
            header, snapshots.days[day:day + days], snapshots.rows[event:event + events], int(snapshots.as_of_ms[row]))
        assert inputs.categories[start:end].tolist() == categories
        with np.errstate(over='ignore'):
            np.testing.assert_allclose(inputs.numbers[start:end], np.array(numbers, np.float32).reshape(-1, 7),
                                       rtol=2.4e-7, atol=1e-7)
            np.testing.assert_allclose(inputs.counters[row], np.array(counters, np.float32), rtol=2.4e-7, atol=1e-7)
        slots = inputs.slot_of_row[event:event + events]
        assert np.where(slots < 0, -1, slots - start).tolist() == slot_of_row
        event, day = event + events, day + days


KINDS = st.sampled_from([VIEW, BUY, EventType.ADD_TO_CART, EventType.REFUND, EventType.RATING])
WINDOWS = st.lists(st.tuples(
    st.one_of(st.integers(0, 5).map(lambda day: day * DAY_MS), st.integers(0, 200 * DAY_MS)), KINDS,
    st.sampled_from([0.0, 0.1, 5.0, 1e6]), st.integers(0, 2)), max_size=150)


@given(st.lists(st.tuples(WINDOWS, st.integers(0, 400 * DAY_MS)), max_size=4))
@settings(deadline=None, max_examples=60)
def test_features_are_those_of_a_plain_calculation(shoppers: list[tuple[list, int]]):
    users = [user_of(*events) for events, _ in shoppers]
    assert_plain(Snapshots.join(
        [pack_header(user) for user in users], [user.days for user in users], [user.rows for user in users],
        [max(user.last_seen_ms, T0_MS) + silent_ms for user, (_, silent_ms) in zip(users, shoppers, strict=True)]))


EDGES = st.one_of(st.integers(-2**63, 2**63 - 1), st.sampled_from([0, -1, -2**63, 2**63 - 1]))


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 3), EDGES), max_size=5), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_any_bytes_and_any_time_give_the_plain_features_or_nan(shoppers: list[tuple[int, int, int]], seed: int):
    """Nobody checks the numbers of a stored record. They must not lead out of the arrays."""
    rng = np.random.default_rng(seed)

    def noise(dtype: np.dtype, count: int) -> np.ndarray:
        found = np.frombuffer(rng.bytes(dtype.itemsize * count), dtype).copy()
        for name in dtype.names or ():
            if found[name].dtype.kind == 'f':       # of any size, but numbers: NaN has many forms
                found[name] = rng.lognormal(0, 20, count)
        return found

    headers = noise(HEADER_DTYPE, len(shoppers))
    headers['events'], headers['days'] = [events for events, _, _ in shoppers], [days for _, days, _ in shoppers]
    assert_plain(Snapshots(headers, noise(DAY_DTYPE, int(headers['days'].sum(dtype=int))),
                           noise(ROW_DTYPE, int(headers['events'].sum(dtype=int))),
                           np.array([as_of_ms for _, _, as_of_ms in shoppers], np.int64)))


def test_a_huge_window_of_one_moment_is_sorted_fast():
    rows = np.zeros(65_535, ROW_DTYPE)
    rows['type'] = np.random.default_rng(1).integers(0, 256, len(rows))
    headers = np.zeros(1, HEADER_DTYPE)
    headers['events'] = len(rows)
    inputs = features(Snapshots(headers, np.zeros(0, DAY_DTYPE), rows, np.zeros(1, np.int64)))
    assert inputs.categories[:-1, 0].tolist() == list(range(192, 256))
    assert inputs.slot_of_row.tolist() == [kind - 192 if kind >= 192 else -1 for kind in rows['type'].tolist()]


def test_arrays_of_any_strides_are_read():
    users = [user_of((0, VIEW, 1.0, 0), (10, BUY, 5.0, 3)), user_of((5, VIEW, 2.0, 0))]
    whole = Snapshots.join([pack_header(user) for user in users], [user.days for user in users],
                           [user.rows for user in users], [user.last_seen_ms for user in users])
    apart = Snapshots(*(np.repeat(part, 2)[::2]
                        for part in (whole.headers, whole.days, whole.rows, whole.as_of_ms)))
    assert not apart.rows.flags.c_contiguous
    one, other = features(whole), features(apart)
    assert np.array_equal(one.numbers, other.numbers)
    assert np.array_equal(one.counters, other.counters)


def test_snapshots_that_do_not_belong_together_are_refused():
    user = user_of((0, VIEW, 1.0, 0))
    whole = Snapshots.join([pack_header(user)], [user.days], [user.rows], [T0_MS])
    for part, wrong in (('rows', whole.rows[:0]), ('days', whole.days[:0]), ('as_of_ms', whole.as_of_ms[:0])):
        with pytest.raises(ValueError, match='there are'):
            features(replace(whole, **{part: wrong}))
    with pytest.raises(TypeError):
        features(replace(whole, rows=whole.days))
