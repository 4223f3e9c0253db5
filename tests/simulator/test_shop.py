from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache

import orjson
import pytest

from stream.core.events import TYPE_CODES, Decoder, Event, EventRules, Reason
from stream.errors import UsageError
from stream.simulator.shop import (
    CATEGORIES,
    DAY_MS,
    LATE_DELAY_MS,
    TIER_SHARES,
    Simulation,
    SimulatorOptions,
    simulate,
    write,
)

SMALL = SimulatorOptions(shoppers=300, days=120, seed=11)
NOISY = replace(SMALL, noise=0.3)
ITEM_TYPES = set(TYPE_CODES) - {'other', 'login', 'search', 'follow'}
ORDER_TYPES = {'purchase', 'refund'}
QUANTITY_TYPES = {'add_to_cart', 'remove_from_cart', *ORDER_TYPES}
FOLLOW_UPS = {'rating', 'review', 'refund'}


@cache
def simulated(options: SimulatorOptions) -> Simulation:
    return simulate(options)


@cache
def lines(options: SimulatorOptions) -> list[bytes]:
    return list(simulated(options).lines())


@cache
def events(options: SimulatorOptions) -> list[dict]:
    return [orjson.loads(line) for line in lines(options)]


def by_user(rows: list[dict]) -> dict[str, list[dict]]:
    users = defaultdict(list)
    for row in rows:
        users[row['user_id']].append(row)
    return users


# ---- the same bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('options', [SMALL, NOISY], ids=['clean', 'noisy'])
def test_same_options_same_bytes(options):
    again = simulate(options)
    assert list(again.lines()) == lines(options)
    assert list(again.lines()) == lines(options), 'a second reading starts anew'
    assert again.truth == simulated(options).truth


def test_another_seed_is_another_shop():
    assert lines(replace(SMALL, seed=12))[:100] != lines(SMALL)[:100]


def test_a_shopper_does_not_depend_on_the_others():
    def lives(options: SimulatorOptions) -> dict[str, list[dict]]:
        return by_user([{**event, 'event_id': None} for event in events(options)])

    few, many = lives(replace(SMALL, shoppers=20)), lives(SMALL)
    assert few
    assert all(many[user_id] == life for user_id, life in few.items())
    assert simulated(replace(SMALL, shoppers=20)).truth == simulated(SMALL).truth[:20]


def test_noise_does_not_touch_the_world():
    assert simulated(NOISY).bodies == simulated(SMALL).bodies
    assert simulated(NOISY).truth == simulated(SMALL).truth


def test_currency_changes_nothing_else():
    in_euros = events(replace(SMALL, currency='EUR'))
    assert all((event.pop('currency', None) == 'EUR') == ('price' in event) for event in in_euros)
    assert in_euros == events(SMALL)


# ---- the events -----------------------------------------------------------------------------------------------------


def test_events_are_in_time_order_and_inside_the_period():
    times = [event['ts'] for event in events(SMALL)]
    assert times == sorted(times)
    assert SMALL.start_ms <= times[0]
    assert times[-1] < SMALL.end_ms


def test_every_event_has_the_fields_of_its_type():
    for event in events(SMALL):
        kind = event['type']
        expected = {'event_id', 'user_id', 'ts', 'type'}
        expected |= set() if kind in FOLLOW_UPS else {'session_id'}
        expected |= {'item_id', 'category', 'price'} if kind in ITEM_TYPES else set()
        expected |= {'quantity'} if kind in QUANTITY_TYPES else set()
        expected |= {'order_id'} if kind in ORDER_TYPES else set()
        expected |= {'search': {'query'}, 'follow': {'category'}, 'rating': {'rating'}}.get(kind, set())
        expected |= {'rating', 'text'} if kind == 'review' else set()
        assert set(event) == expected
        assert type(event['ts']) is int
        assert event.get('price', 1.0) > 0
        assert event.get('rating', 1) in range(1, 6)
        assert event.get('category', 'coffee') in CATEGORIES


def test_the_core_takes_every_clean_line():
    decode = Decoder(EventRules(currency='EUR'))
    assert all(isinstance(decode(line), Event) for line in lines(replace(SMALL, currency='EUR')))


def test_every_event_type_appears():
    assert {event['type'] for event in events(SMALL)} == set(TYPE_CODES) - {'other'}


def test_event_ids_are_unique_and_count_in_time_order():
    assert [event['event_id'] for event in events(SMALL)] == [f'e{n:09d}' for n in range(simulated(SMALL).events)]


def test_an_item_has_one_price_and_one_category():
    items = {(e['item_id'], e['category'], e['price']) for e in events(SMALL) if 'item_id' in e}
    assert len(items) == len({item_id for item_id, _, _ in items})


def test_a_session_belongs_to_one_shopper_and_is_about_eight_events():
    sessions = defaultdict(list)
    for event in events(SMALL):
        if 'session_id' in event:
            sessions[event['session_id']].append(event)
    assert all(len({event['user_id'] for event in session}) == 1 for session in sessions.values())
    assert all(session[-1]['ts'] - session[0]['ts'] < DAY_MS / 4 for session in sessions.values())
    assert 7 < len(events(SMALL)) / len(sessions) < 9.5


def test_a_basket_is_one_moment_and_was_in_the_cart_before():
    baskets = defaultdict(list)
    for life in by_user(events(SMALL)).values():
        cart = Counter()
        for event in life:
            if event['type'] == 'add_to_cart':
                cart[event['item_id']] += event['quantity']
            elif event['type'] == 'purchase':
                assert event['quantity'] <= cart[event['item_id']]
                cart[event['item_id']] -= event['quantity']
                baskets[event['order_id']].append(event)
    assert max(len(basket) for basket in baskets.values()) > 1
    for basket in baskets.values():
        assert len({(line['user_id'], line['ts'], line['session_id']) for line in basket}) == 1
        assert len({line['item_id'] for line in basket}) == len(basket)


def test_follow_ups_come_after_a_purchase_of_the_item():
    for life in by_user(events(SMALL)).values():
        bought = set()
        for event in life:
            if event['type'] == 'purchase':
                bought |= {(event['item_id'], event['order_id']), event['item_id']}
            elif event['type'] == 'refund':
                assert (event['item_id'], event['order_id']) in bought
            elif event['type'] in FOLLOW_UPS:
                assert event['item_id'] in bought


# ---- the truth ------------------------------------------------------------------------------------------------------


def test_truth_names_every_shopper_once():
    truth = simulated(SMALL).truth
    assert [row['user_id'] for row in truth] == [f'u{n:06d}' for n in range(SMALL.shoppers)]
    assert set(by_user(events(SMALL))) <= {row['user_id'] for row in truth}
    assert {row['tier'] for row in truth} == set(range(len(TIER_SHARES)))


def test_nothing_happens_before_joining_or_after_churn():
    lives = by_user(events(SMALL))
    for row in simulated(SMALL).truth:
        times = [event['ts'] for event in lives[row['user_id']]]
        assert all(row['joined_ms'] <= ts < row['churned_ms'] for ts in times)


def test_truth_adds_up_to_the_purchases():
    lives = by_user(events(SMALL))
    for row in simulated(SMALL).truth:
        bought = [event for event in lives[row['user_id']] if event['type'] == 'purchase']
        assert row['purchases'] == len({line['order_id'] for line in bought})
        assert row['spend'] == pytest.approx(sum(line['price'] * line['quantity'] for line in bought), abs=0.01)


def test_tiers_order_the_spend_per_purchase():
    truth = simulated(replace(SMALL, shoppers=800)).truth
    tiers = [[row for row in truth if row['tier'] == tier] for tier in range(len(TIER_SHARES))]
    means = [sum(row['spend'] for row in rows) / sum(row['purchases'] for row in rows) for rows in tiers]
    assert means == sorted(means)
    assert means[-1] > 4 * means[0]


def test_conversion_is_the_chance_that_a_session_buys():
    sessions = Counter()
    for user_id, life in by_user(events(SMALL)).items():
        sessions[user_id] = len({event['session_id'] for event in life if 'session_id' in event})
    expected = sum(row['conversion'] * sessions[row['user_id']] for row in simulated(SMALL).truth)
    assert sum(row['purchases'] for row in simulated(SMALL).truth) == pytest.approx(expected, rel=0.1)


def test_an_open_cart_announces_a_purchase():
    # Compared within each shopper (Mantel-Haenszel risk ratio): the own rate must not be all that there is to learn.
    after_cart, without_cart = 0.0, 0.0
    for life in by_user(events(SMALL)).values():
        bought_ms = [event['ts'] for event in life if event['type'] == 'purchase']
        cart_ms = [event['ts'] for event in life if event['type'] == 'add_to_cart']
        visits_ms = {event['session_id']: event['ts'] for event in reversed(life) if 'session_id' in event}
        buys = {True: [], False: []}
        for visit_ms in visits_ms.values():
            last_bought_ms = max((ts for ts in bought_ms if ts < visit_ms), default=0)
            is_open = any(max(last_bought_ms, visit_ms - 7 * DAY_MS) < ts < visit_ms for ts in cart_ms)
            buys[is_open].append(any(visit_ms < ts <= visit_ms + 7 * DAY_MS for ts in bought_ms))
        after_cart += sum(buys[True]) * len(buys[False]) / max(1, len(visits_ms))
        without_cart += sum(buys[False]) * len(buys[True]) / max(1, len(visits_ms))
    assert after_cart > 1.2 * without_cart


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_noise_is_the_share_of_rows_that_it_says():
    decode = Decoder(EventRules())
    rows = simulated(SMALL).events
    refused = Counter(answer.reason for answer in map(decode, lines(NOISY)) if not isinstance(answer, Event))
    third = NOISY.noise / 3 * rows
    assert simulated(NOISY).events == len(lines(NOISY))
    assert simulated(NOISY).events - rows == pytest.approx(third, rel=0.1)
    assert sum(refused.values()) == pytest.approx(third, rel=0.1)
    assert set(refused) == {Reason.INVALID_JSON, Reason.MISSING_FIELD, Reason.TS_IN_SECONDS}
    assert refused[Reason.INVALID_JSON] == pytest.approx(third / 2, rel=0.15), 'cut lines and NaN prices'


def test_a_repeat_is_the_same_line_later():
    places = defaultdict(list)
    for place, line in enumerate(lines(NOISY)):
        places[line].append(place)
    assert max(map(len, places.values())) == 2
    repeats = [line for line, at in places.items() if len(at) == 2]
    assert len(repeats) == simulated(NOISY).events - simulated(SMALL).events
    assert set(repeats) <= set(lines(SMALL))
    assert any(at[1] - at[0] > 1 for at in places.values() if len(at) == 2)


def test_a_delayed_line_is_late_by_minutes_to_days():
    clean = set(lines(SMALL))
    seen, newest_ms, late_ms = set(), 0, []
    for line in lines(NOISY):
        if line in clean and line not in seen:
            ts = orjson.loads(line)['ts']
            late_ms.append(max(0, newest_ms - ts))
            newest_ms = max(newest_ms, ts)
        seen.add(line)
    late_ms = [ms for ms in late_ms if ms]
    assert len(late_ms) == pytest.approx(NOISY.noise / 3 * simulated(SMALL).events, rel=0.1)
    assert max(late_ms) <= LATE_DELAY_MS[1]
    assert max(late_ms) > DAY_MS
    assert min(late_ms) < DAY_MS / 24


def test_no_row_is_lost_but_the_broken_ones():
    kept = set(lines(NOISY)) & set(lines(SMALL))
    broken = [line for line in lines(NOISY) if line not in kept]
    assert len(kept) + len(broken) == simulated(SMALL).events


# ---- files and options ----------------------------------------------------------------------------------------------


def test_write_puts_both_files(tmp_path):
    write(simulated(NOISY), tmp_path / 'events.jsonl', tmp_path / 'truth.jsonl')
    assert (tmp_path / 'events.jsonl').read_bytes() == b''.join(line + b'\n' for line in lines(NOISY))
    written = [orjson.loads(line) for line in (tmp_path / 'truth.jsonl').read_bytes().splitlines()]
    assert written == simulated(NOISY).truth


def test_one_shopper_for_one_day_is_a_simulation():
    tiny = simulate(SimulatorOptions(shoppers=1, days=1, noise=0.5))
    assert len(list(tiny.lines())) == tiny.events
    assert len(tiny.truth) == 1


@pytest.mark.parametrize(
    'wrong', [{'shoppers': 0}, {'days': 0}, {'seed': -1}, {'noise': 0.6}, {'noise': float('nan')}, {'currency': 'euro'}]
)
def test_options_out_of_range_say_what_to_do(wrong):
    with pytest.raises(UsageError, match=r'Do: '):
        SimulatorOptions(**wrong)
