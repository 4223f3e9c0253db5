import inspect
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.core.decide import Kind
from stream.core.events import Event, EventType, Source
from stream.core.layout import (
    DAY_DTYPE,
    DAY_MS,
    HEADER,
    HEADER_DTYPE,
    ROW,
    ROW_DTYPE,
    Fold,
    WindowLimits,
)
from stream.core.outbox import Message, pack_messages, unpack_outbox
from stream.core.user import User, clock_ms, decode, encode, fire_timer, fold, pack_header
from stream.errors import StateError

FIELDS = [name for name, kind in vars(User).items() if inspect.isgetsetdescriptor(kind)]

T0_MS = 1_700_000_000_000
LIMITS = WindowLimits(events_max=4, span_ms=10 * DAY_MS, silence_ms=(3 * DAY_MS, 7 * DAY_MS))


def event(ts_ms: int, key: int | None = None, kind: EventType = EventType.VIEW, amount: float = 0.0,
          basket: int = 0) -> Event:
    key = ts_ms if key is None else key
    return Event('u', str(key), key, ts_ms, kind, 7, 9, basket, amount, 0)


def fold_one(user: User, each: Event, offset: int, limits: WindowLimits = LIMITS,
             source: Source = Source.CLICKS) -> Fold:
    each.source, each.offset = source, offset
    [outcome] = fold(user, [each], limits)
    return outcome


def folded(events: Sequence[Event], limits: WindowLimits = LIMITS) -> tuple[User, list[Fold]]:
    user = User('u')
    return user, [fold_one(user, each, at, limits) for at, each in enumerate(events)]


def window(user: User) -> list[tuple[int, int]]:
    rows = np.frombuffer(user.rows, ROW_DTYPE)
    return list(zip(rows['ts_ms'].tolist(), np.frombuffer(user.ids, '<u8').tolist(), strict=True))


def reference(events: Sequence[Event], limits: WindowLimits) -> list[tuple[int, int]]:
    """The definition of a window as a set: the newest `events_max` events within the span, in total order."""
    newest_ms = max(each.ts_ms for each in events)
    kept = sorted((each.ts_ms, each.key) for each in events if each.ts_ms >= newest_ms - limits.span_ms)
    return kept[-limits.events_max:]


event_lists = st.lists(
    st.tuples(st.integers(0, 25), st.integers(0, 3)), min_size=1, max_size=30,
).map(lambda pairs: [event(T0_MS + day * DAY_MS + ms, key) for key, (day, ms) in enumerate(pairs)])


@given(event_lists, st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_arrival_order_does_not_matter(events: list[Event], shuffle: random.Random):
    expected = reference(events, LIMITS)
    shuffled = list(events)
    shuffle.shuffle(shuffled)
    user, outcomes = folded(shuffled)
    assert window(user) == expected
    assert user.last_seen_ms == max(each.ts_ms for each in events)
    assert user.applied == outcomes.count(Fold.APPLIED)
    assert user.applied + user.late == len(events)
    assert sum(user.counts) == user.applied


@given(event_lists, st.lists(st.integers(0, 29), max_size=10), st.randoms(use_true_random=False))
def test_repeats_change_nothing_but_their_count(events: list[Event], repeats: list[int], shuffle: random.Random):
    stream = events + [events[at % len(events)] for at in repeats]
    shuffle.shuffle(stream)
    user, outcomes = folded(stream)
    assert window(user) == reference(events, LIMITS)
    assert user.applied + user.duplicate + user.late == len(stream)
    assert user.duplicate == outcomes.count(Fold.DUPLICATE)


@given(event_lists)
def test_a_run_at_once_is_the_same_as_one_by_one(events: list[Event]):
    one_by_one, outcomes = folded(events)
    at_once, done = User('u'), []
    while len(done) < len(events):      # the fold stops where a timer must fire; this test goes on without firing it
        done += fold(at_once, events[len(done):], LIMITS)
    assert encode(at_once) == encode(one_by_one)
    assert done == outcomes


@given(event_lists)
def test_a_record_survives_its_codec(events: list[Event]):
    user, _ = folded(events)
    user.outbox = pack_messages([decision(1), decision(22)])
    user.decision_id, user.model = bytes(range(16)), bytes(range(8))
    user.tier, user.power_grid, user.alerting, user.generation, user.step = 3, 777, 3, 5, 1 << 40
    record = encode(user)
    again = decode('u', record)
    assert encode(again) == record
    assert all(getattr(again, name) == getattr(user, name) for name in FIELDS if name != 'stored_due_ms')
    assert again.stored_due_ms == user.due_ms


def test_a_decoded_record_folds_on_as_if_it_had_never_been_stored():
    events = [event(T0_MS + at * 3_600_000, kind=EventType(at % 14 + 1), amount=at, basket=at % 5) for at in range(200)]
    kept = User('kept')
    stored = encode(User('kept'))
    for at, each in enumerate(events):
        fold_one(kept, each, at)
        user = decode('kept', stored)
        fold_one(user, each, at)
        stored = encode(user)
    assert stored == encode(kept)


def test_the_layout_is_the_same_for_struct_and_numpy():
    user, _ = folded([event(T0_MS, kind=EventType.PURCHASE, amount=12.5)])
    header = np.frombuffer(pack_header(user), HEADER_DTYPE)[0]
    assert HEADER.size == HEADER_DTYPE.itemsize
    assert (ROW.size, DAY_DTYPE.itemsize) == (ROW_DTYPE.itemsize, 12)
    assert (header['events'], header['days'], header['tier'], header['orders']) == (1, 1, -1, 1)
    assert header['spend'] == 12.5
    assert header['counts'][EventType.PURCHASE - 1] == 1
    assert np.frombuffer(user.rows, ROW_DTYPE)['amount'][0] == 12.5


def test_a_window_of_128_events_takes_less_than_4_500_bytes_beside_its_day_buckets():
    user, _ = folded([event(T0_MS + at) for at in range(200)], WindowLimits())
    assert len(user.rows) // ROW.size == 128
    assert len(encode(user)) <= 4_500


@pytest.mark.parametrize(('spoil', 'message'), [
    (lambda record: record[:100], 'damaged'),
    (lambda record: record[:-1], 'damaged'),
    (lambda record: record + b'x', 'damaged'),
    (lambda record: b'\x03\x00' + record[2:], 'layout 3'),
])
def test_a_record_that_cannot_be_trusted_is_refused(spoil, message: str):
    user, _ = folded([event(T0_MS), event(T0_MS + 1)])
    with pytest.raises(StateError, match=message) as refused:
        decode('u', spoil(encode(user)))
    assert 'Do:' in str(refused.value)


def test_a_redelivered_event_is_seen_and_not_counted_twice():
    user, _ = folded([event(T0_MS), event(T0_MS + 1)])
    before = encode(user)
    assert fold_one(user, event(T0_MS + 1), 1) == Fold.SEEN
    assert encode(user) == before
    assert fold_one(user, event(T0_MS + 2), 0, source=Source.CARTS) == Fold.APPLIED
    assert user.next_offset == [2, 1]


def test_an_id_is_not_found_across_two_ids():
    first, second = 0x0102030405060708, 0x1112131415161718
    across = int.from_bytes((first.to_bytes(8, 'little') + second.to_bytes(8, 'little'))[4:12], 'little')
    _, outcomes = folded([event(T0_MS, first), event(T0_MS + 1, second), event(T0_MS + 2, across),
                          event(T0_MS + 3, second)])
    assert outcomes == [Fold.APPLIED, Fold.APPLIED, Fold.APPLIED, Fold.DUPLICATE]


def test_late_is_older_than_a_full_window_or_than_the_span():
    full = [event(T0_MS + at) for at in range(4)]
    assert folded([*full, event(T0_MS - 1)])[1][-1] == Fold.LATE
    assert folded([*full[1:], event(T0_MS - 1)])[1][-1] == Fold.APPLIED
    assert folded([full[0], event(T0_MS - LIMITS.span_ms)])[1][-1] == Fold.APPLIED
    assert folded([full[0], event(T0_MS - LIMITS.span_ms - 1)])[1][-1] == Fold.LATE


def test_one_future_event_only_moves_its_own_window():
    user, _ = folded([event(T0_MS), event(T0_MS + 400 * DAY_MS)])
    other, _ = folded([event(T0_MS), event(T0_MS + 1)])
    assert len(window(user)) == 1
    assert len(window(other)) == 2


def test_money_orders_and_gaps():
    buy, back = EventType.PURCHASE, EventType.REFUND
    user, _ = folded([
        event(T0_MS, 1, buy, 10.0, basket=5), event(T0_MS, 2, buy, 2.5, basket=5),          # one order of two lines
        event(T0_MS + 4 * DAY_MS, 3, buy, 1.0), event(T0_MS + 4 * DAY_MS, 4, buy, 1.0),     # one order, no basket id
        event(T0_MS + 6 * DAY_MS, 5, buy, 4.0, basket=6), event(T0_MS + 7 * DAY_MS, 6, back, 3.0),
    ], WindowLimits())
    assert (user.orders, user.spend, user.refunds) == (3, 18.5, 3.0)
    assert (user.gaps, user.gap_days, user.gap_days_squared) == (2, 6.0, 20.0)
    assert user.last_order_ms == T0_MS + 6 * DAY_MS
    days = np.frombuffer(user.days, DAY_DTYPE)
    assert days['orders'].tolist() == [1, 1, 1, 0]
    assert days['spend'].tolist() == [12.5, 2.0, 4.0, -3.0]


def test_day_buckets_keep_90_days_in_any_order():
    order = [0, 100, 50, 10, 11, 99, 100, 30]
    user, _ = folded([event(T0_MS + day * DAY_MS, at) for at, day in enumerate(order)], WindowLimits())
    days = np.frombuffer(user.days, DAY_DTYPE)
    first = T0_MS // DAY_MS
    assert (days['day'] - first).tolist() == [11, 30, 50, 99, 100]
    assert days['browses'].tolist() == [1, 1, 1, 1, 2]


def test_timers_fire_in_turn_and_an_event_starts_them_anew():
    user, _ = folded([event(T0_MS)])
    assert user.due_ms == T0_MS + 3 * DAY_MS
    assert fire_timer(user, LIMITS) == T0_MS + 3 * DAY_MS
    assert user.due_ms == T0_MS + 7 * DAY_MS
    fire_timer(user, LIMITS)
    assert user.due_ms == 0
    fold_one(user, event(T0_MS + 8 * DAY_MS), 1)
    assert user.due_ms == T0_MS + 11 * DAY_MS
    fold_one(user, event(T0_MS + 5 * DAY_MS), 2)     # older than the newest: no news of silence
    assert user.due_ms == T0_MS + 11 * DAY_MS


def decision(as_of_ms: int, user_id: str = 'u') -> Message:
    value = b'{"id":"%032x","type":"churn.alert","as_of_ms":%d}' % (as_of_ms, as_of_ms)
    return Message(Kind.CHURN, b'%032x' % as_of_ms, user_id.encode(), as_of_ms, value)


@given(st.lists(st.builds(decision, st.integers(0, 2**60)), max_size=5))
def test_an_outbox_keeps_its_messages(messages: list[Message]):
    user = User('u')
    user.outbox = pack_messages(messages)
    assert unpack_outbox(user) == messages


def test_an_event_of_the_newest_time_does_not_start_the_timers_anew():
    user, _ = folded([event(T0_MS, 1)])
    fire_timer(user, LIMITS)
    assert fold_one(user, event(T0_MS, 2), 1) == Fold.APPLIED
    assert (user.silence, user.due_ms) == (1, T0_MS + 7 * DAY_MS)


def test_a_late_event_does_not_turn_the_users_time_back():
    user, _ = folded([event(T0_MS)])
    fire_timer(user, LIMITS)
    fold_one(user, event(T0_MS - DAY_MS), 1)
    assert clock_ms(user, LIMITS) == T0_MS + 3 * DAY_MS
    fold_one(user, event(T0_MS + 4 * DAY_MS), 2)
    assert clock_ms(user, LIMITS) == T0_MS + 4 * DAY_MS


def test_purchases_out_of_order():
    buy = EventType.PURCHASE
    user, _ = folded([event(T0_MS + day * DAY_MS, key, buy, 1.0, basket=day) for key, day in enumerate((5, 3, 5))],
                     WindowLimits())
    assert (user.orders, user.gaps, user.gap_days) == (2, 1, 2.0)
    assert user.last_order_ms == T0_MS + 5 * DAY_MS
    assert user.first_seen_ms == T0_MS + 3 * DAY_MS


@pytest.mark.parametrize(('age_days', 'kept'), [(89, True), (90, False)])
def test_a_day_bucket_is_kept_for_90_days(age_days: int, kept: bool):
    for order in ((0, age_days), (age_days, 0)):
        user, _ = folded([event(T0_MS + day * DAY_MS, day) for day in order], WindowLimits())
        assert (len(np.frombuffer(user.days, DAY_DTYPE)) == 2) is kept


def test_a_day_counter_stays_at_its_largest_number():
    user = User('u')
    limits = WindowLimits(events_max=1)
    run = [event(T0_MS + at, at) for at in range(65_540)]
    for at, each in enumerate(run):
        each.offset = at
    fold(user, run, limits)
    assert np.frombuffer(user.days, DAY_DTYPE)['browses'].tolist() == [65_535]
    assert user.applied == 65_540
