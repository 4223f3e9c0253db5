"""What somebody had to do with items before a moment, counted by hand; nothing later is in it."""
import json

import numpy as np
import pytest

from stream.core.events import EventRules, hash16, hash32
from stream.core.features import CATEGORY_BUCKETS, buckets
from stream.core.layout import DAY_MS, WindowLimits
from stream.learn.dataset import NEXT_DAYS, ExampleOptions, at_time, bought_next, history_of, read, sample
from stream.learn.ranking.next_items import Names, Ranked, Texts
from stream.learn.ranking.past_items import BUCKETS, DECAY_DAYS, OWN_NUMBERS, Named, past, popular

START_MS = 1_700_006_400_000
BOUGHT, WANTED, UNDONE, ANY = range(4)
FOREVER_MS = 1 << 60


def at(day: float) -> int:
    return START_MS + round(day * DAY_MS)


def line(number: int, day: float, kind: str, item: str | None = None, user: str = 'ann', **fields) -> bytes:
    return json.dumps({'event_id': f'e{number}', 'user_id': user, 'ts': at(day), 'type': kind, 'item_id': item}
                      | fields).encode()


LINES = [
    line(0, 0, 'view', 'lamp', category='light'),
    line(1, 1, 'add_to_cart', 'lamp', category='light'),
    line(2, 2, 'purchase', 'lamp', category='light', order_id='o1'),
    line(3, 2, 'purchase', 'desk', order_id='o1'),
    line(3, 2, 'purchase', 'desk', order_id='o1'),      # the same event again counts once
    line(4, 3, 'refund', 'lamp', category='light'),
    line(5, 4, 'login'),
    line(6, 10, 'purchase', 'sofa'),
    line(7, 40, 'purchase', 'lamp', category='light')]


@pytest.fixture
def ann():
    return read(LINES, EventRules())


def test_own_items_are_counted_by_kind_and_age(ann):
    examples = at_time(ann, [0], at(10), WindowLimits(), FOREVER_MS)
    found = past(ann, examples, np.array([0]), 'item')
    assert found.hashes[:-1].tolist() == sorted([hash32('lamp'), hash32('desk')])       # the sofa is not known yet
    assert found.own.tolist() == [*buckets(found.hashes[:-1], BUCKETS['item']).tolist(), 0]
    own, numbers = found.padded(np.array([0]))
    lamp = np.expm1(numbers[0, found.hashes[:-1].tolist().index(hash32('lamp'))]).reshape(4, len(DECAY_DAYS))
    ages = {WANTED: 9, BOUGHT: 8, UNDONE: 7}
    for kind, age in ages.items():
        np.testing.assert_allclose(lamp[kind], [np.exp(-age / days) for days in DECAY_DAYS], rtol=1e-4, atol=1e-6)
    # The look, 10 days ago, counts among all.
    np.testing.assert_allclose(lamp[ANY], [sum(np.exp(-age / days) for age in (7, 8, 9, 10)) for days in DECAY_DAYS],
                               rtol=1e-4, atol=1e-6)
    desk = np.expm1(numbers[0, found.hashes[:-1].tolist().index(hash32('desk'))]).reshape(4, len(DECAY_DAYS))
    np.testing.assert_allclose(desk[BOUGHT], [np.exp(-8 / days) for days in DECAY_DAYS], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(desk[ANY], desk[BOUGHT])
    assert not desk[[WANTED, UNDONE]].any() and own.shape == (1, 2)
    categories = past(ann, examples, np.array([0]), 'category')
    assert categories.hashes.tolist() == [hash16('light'), 0]
    assert categories.own.tolist() == [int(buckets(np.array(hash16('light')), CATEGORY_BUCKETS)), 0]


def test_rows_are_padded_with_nothing(ann):
    examples = at_time(ann, [0], at(1), WindowLimits(), FOREVER_MS)
    twice = past(ann, examples, np.array([0, 0]), 'item')
    own, numbers = twice.padded(np.array([1, 0]))
    assert own.shape == (2, 1) and np.array_equal(own[0], own[1])
    nobody = past(read([line(0, 0, 'login')], EventRules()), examples, np.array([0]), 'item')
    own, numbers = nobody.padded(np.array([0]))
    assert own.tolist() == [[0]] and numbers.shape == (1, 1, OWN_NUMBERS) and not numbers.any()


def test_what_is_bought_next(ann):
    for day, wanted in ((0, {'lamp', 'desk', 'sofa'}), (2, {'lamp', 'desk', 'sofa'}), (2.5, {'sofa'}),
                        (10, {'sofa'}), (10.001, {'lamp'}), (41, set())):
        examples = at_time(ann, [0], max(at(day), at(0) + 1), WindowLimits(), FOREVER_MS)
        found, = bought_next(ann, examples, 'item', FOREVER_MS)
        assert found.tolist() == sorted(map(hash32, wanted)), day
    examples = at_time(ann, [0], at(5), WindowLimits(), FOREVER_MS)
    assert bought_next(ann, examples, 'item', at(5 + NEXT_DAYS) - 1) == [None]
    assert bought_next(ann, examples, 'item', at(5 + NEXT_DAYS))[0].tolist() == [hash32('sofa')]


def test_next_items_equal_a_recount_and_a_planted_purchase_leaks_nowhere(history, lines):
    until_ms = (history.start_ms + history.end_ms) // 2
    options = ExampleOptions(3, 3.0)
    examples = sample(history, range(0, len(history.user_ids), 3), history.start_ms, until_ms, options, WindowLimits(),
                      3)
    rows = np.arange(len(examples))
    before, after = past(history, examples, rows, 'item'), bought_next(history, examples, 'item', until_ms)
    events = [json.loads(value) for value in lines]
    bought = [(event['user_id'], event['ts'], hash32(event['item_id'])) for event in events
              if event['type'] == 'purchase']
    settled = 0
    for row in range(0, len(examples), 7):
        first_ms = int(examples.as_of_ms[row]) + (0 if examples.kind[row] == 0 else 1)
        wanted = {item for user, ts_ms, item in bought if user == history.user_ids[examples.user[row]]
                  and first_ms <= ts_ms < first_ms + NEXT_DAYS * DAY_MS}
        if after[row] is None:
            assert examples.as_of_ms[row] + NEXT_DAYS * DAY_MS > until_ms
        else:
            settled += len(wanted)
            assert set(after[row].tolist()) == wanted
    assert settled
    # Whoever bought a planted thing at the very time knows nothing of it before.
    planted = read([*lines, *(line(number, 0, 'purchase', 'planted', user, ts=until_ms)
                              for number, user in enumerate(history.user_ids))], EventRules())
    place = {user_id: user for user, user_id in enumerate(planted.user_ids)}
    assert [place[user_id] for user_id in history.user_ids] == list(range(len(history.user_ids)))
    again = past(planted, examples, rows, 'item')
    for mine, theirs in zip((before.hashes, before.numbers), (again.hashes, again.numbers), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(after, bought_next(planted, examples, 'item', until_ms), strict=True):
        assert (mine is None and theirs is None) or np.array_equal(mine, theirs)
    now = at_time(planted, range(len(planted.user_ids)), until_ms, WindowLimits(), FOREVER_MS)
    assert hash32('planted') not in past(planted, now, np.arange(len(now)), 'item').hashes
    assert all(hash32('planted') in bought for bought in bought_next(planted, now, 'item', FOREVER_MS))
    times = np.array([until_ms])
    np.testing.assert_array_equal(popular(planted, range(len(history.user_ids)), 'item', times, 30.0),
                                  popular(history, range(len(history.user_ids)), 'item', times, 30.0))


def test_popularity_counts_people_before_each_time():
    history = read([line(0, 0, 'purchase', 'lamp'), line(1, 1, 'purchase', 'lamp'), line(2, 2, 'view', 'lamp'),
                    line(3, 5, 'purchase', 'lamp', 'bob'), line(4, 5, 'purchase', 'desk', 'bob')], EventRules())
    lamp, desk = (int(buckets(np.array(hash32(name)), BUCKETS['item'])) for name in ('lamp', 'desk'))
    found = np.expm1(popular(history, [0, 1], 'item', np.array([at(1), at(5), at(6), at(10)]), 6.0))
    np.testing.assert_allclose(found[:, lamp], [1, 1, 2, 1], rtol=1e-5)
    np.testing.assert_allclose(found[:, desk], [0, 0, 1, 1], rtol=1e-5)
    assert not popular(history, [0], 'category', np.array([at(10)]), 6.0).any()


def test_a_bucket_is_named_by_what_most_bought_and_own_items_by_themselves():
    bucket = int(buckets(np.array(hash32('lamp')), BUCKETS['item']))
    twin = next(f'lamp{number}' for number in range(100_000)
                if int(buckets(np.array(hash32(f'lamp{number}')), BUCKETS['item'])) == bucket)
    values = [line(0, 0, 'view', twin), line(1, 0, 'view', twin, 'bob'), line(2, 0, 'view', twin, 'eve'),
              line(3, 0, 'purchase', 'lamp', 'eve'), line(4, 0, 'purchase', 'desk', 'eve')]
    texts = Texts()
    history = read(texts.remembered([*values, b'not json']), EventRules())
    names = Names(history, range(3), 'item')
    chances = np.zeros(BUCKETS['item'], np.float32)
    chances[bucket], chances[int(buckets(np.array(hash32('desk')), BUCKETS['item']))] = 0.6, 0.1
    # One bought lamp outweighs three views of its twin.
    hashes, found = names.best(Ranked(chances, np.zeros(0, np.int64), np.zeros(0, np.float32)), 2)
    assert texts.of('item', hashes) == ['lamp', 'desk'] and found.tolist() == pytest.approx([0.6, 0.1])
    # Who has seen the twin has it apart: the bucket's rest is the lamp's.
    hashes, found = names.best(Ranked(chances, np.array([hash32(twin)]), np.array([0.45], np.float32)), 5)
    assert texts.of('item', hashes) == [twin, 'lamp', 'desk']
    assert found.tolist() == pytest.approx([0.45, 0.15, 0.1], abs=1e-6)
    # Who owns the lamp gets it once.
    hashes, _ = names.best(Ranked(chances, np.array([hash32('lamp')]), np.array([0.5], np.float32)), 5)
    assert texts.of('item', hashes) == ['lamp', 'desk']


def test_events_in_any_order_give_the_same(ann):
    shuffled = history_of({'ann': ann.events[0][::-1]})
    assert Named.of(shuffled, 0, 'item').hashes.tolist() == Named.of(ann, 0, 'item').hashes.tolist()
