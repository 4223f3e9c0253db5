"""The posterior where its answer is known, and against what simulated shoppers then did."""
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from stream.core.events import Decoder, EventRules, EventType, hash32
from stream.core.layout import DAY_MS
from stream.core.parse import Event
from stream.errors import InputError, UsageError
from stream.learn.dataset import SnapshotKind, outcomes
from stream.learn.judging.quality import auc, ece
from stream.simulator import posterior as posterior_module
from stream.simulator import shop as law
from stream.simulator.desire import Desire, Shelf
from stream.simulator.posterior import HORIZONS_DAYS, Resolution, posterior, posteriors
from stream.simulator.shop import SimulatorOptions, simulate

SHOP = SimulatorOptions(shoppers=320, days=400, seed=19)
YEAR = SimulatorOptions(shoppers=1, days=365)
MINUTE_DAYS = 1 / 1440
EXACT = Resolution(interests=16, rates=120, cells=512, futures=8192)


def event(day: float, kind: EventType = EventType.VIEW, item: int = 3) -> Event:
    return Event('u', '', 0, at(day), int(kind), hash32(f'i{item:05d}'), 0, 0, 1.0, 0)


def at(day: float) -> int:
    return YEAR.start_ms + round(day * DAY_MS)


def users_of(options: SimulatorOptions) -> dict[str, list[Event]]:
    decode, users = Decoder(EventRules()), defaultdict(list)
    for line in simulate(options).lines():
        found = decode(line)
        assert isinstance(found, Event)
        users[found.user_id].append(found)
    return users


@pytest.fixture
def plain(monkeypatch):
    """A law with known answers: visits of a constant rate, half of them buy, nobody dies or leaves a cart."""
    def change(**constants):
        for name, value in constants.items():
            monkeypatch.setattr(law, name, value)

    change(HOUR_FACTORS=np.ones(24), WEEKDAY_FACTORS=np.ones(7), QUIET_SEASON_FACTOR=1.0, PEAK_SEASON_EXTRA=0.0,
           INTEREST_SWING=0.0, TIER_VISIT_FACTORS=(1.0,) * 5, SHARE_BEFORE_START=1.0, LIFE_MEDIAN_DAYS=1e9,
           SHARE_FADING=0.0, CONVERSION_MEDIAN=0.5, CONVERSION_SPREAD=0.0, CONVERSION_DRIFT=0.0, DESIRE_LOG_ODDS=0.0,
           ADD_TO_CART=0.0, ADD_WANTED_TO_CART=0.0)
    return change


# ---- known answers --------------------------------------------------------------------------------------------------


def test_gamma_rate_without_death_is_a_negative_binomial(plain):
    plain(VISIT_RATE_RANGE=(0.002, 4.0))
    visits, now = [10.0, 30.0, 31.0, 70.0], 120.0
    shape, scale_days = law.VISIT_RATE_SHAPE + len(visits), law.VISIT_RATE_SHAPE / law.VISIT_RATE_MEAN + now
    expected = 1 - (1 + 0.5 * np.array(HORIZONS_DAYS) / scale_days) ** -shape
    chances = posterior([event(day) for day in visits], [at(now)], YEAR, np.random.default_rng(1), EXACT)
    assert chances[0] == pytest.approx(expected, abs=0.012)


def test_silence_of_a_known_rate_is_weighed_against_death(plain):
    rate = 0.2
    plain(VISIT_RATE_RANGE=(rate, rate), LIFE_MEDIAN_DAYS=40.0)
    last, now = 50.0, 65.0
    # Deaths by day, on a fine grid: density of the Lomax life x chance of the silence until death or now.
    days = np.arange(last, 3000, 0.01) + 0.005
    scale = law.HAZARD_SHAPE * 40 / np.log(2)
    weight = (1 + days / scale) ** -(law.HAZARD_SHAPE + 1) * np.exp(-rate * (np.minimum(days, now) - last))
    ahead = np.clip(days[:, None] - now, 0, HORIZONS_DAYS)
    expected = (weight[:, None] * (1 - np.exp(-0.5 * rate * ahead))).sum(0) / weight.sum()
    chances = posterior([event(20.0), event(last)], [at(now)], YEAR, np.random.default_rng(1), EXACT)
    assert chances[0] == pytest.approx(expected, abs=0.012)


def test_a_cart_is_come_back_to_on_another_day(plain):
    plain(VISIT_RATE_RANGE=(1e-9, 1e-9), ADD_TO_CART=0.05, ADD_WANTED_TO_CART=0.05)
    events = [event(10.0), event(10.0 + MINUTE_DAYS, EventType.ADD_TO_CART)]
    chances = posterior(events, [at(11.5), at(12.5)], YEAR, np.random.default_rng(1), EXACT)[:, 0]
    once, again = law.COME_BACK_FOR_CART, law.COME_BACK_LATER
    tomorrow = 1 - again
    second = once * again * tomorrow / (1 - once * tomorrow)
    third = once * again**2 * tomorrow / (1 - once * (tomorrow + again * tomorrow))
    assert chances == pytest.approx([0.5 * second, 0.5 * third], abs=0.012)


def test_who_buys_is_seen_to_buy_more(plain):
    plain(CONVERSION_MEDIAN=0.05, CONVERSION_SPREAD=1.0)
    visits = [event(day) for day in (10.0, 20.0, 30.0)]
    bought = [event(day + MINUTE_DAYS * (1 + (kind == EventType.PURCHASE)), kind) for day in (10.0, 20.0, 30.0)
              for kind in (EventType.ADD_TO_CART, EventType.PURCHASE)]
    buyer = posterior(sorted(visits + bought, key=lambda one: one.ts_ms), [at(31)], YEAR, np.random.default_rng(1))
    looker = posterior(visits, [at(31)], YEAR, np.random.default_rng(1))
    assert (buyer > 1.5 * looker).all()


# ---- against simulated shoppers -------------------------------------------------------------------------------------


def test_calibrated_and_better_than_recency_at_random_times():
    rng = np.random.default_rng(5)
    last_ms = SHOP.end_ms - 90 * DAY_MS
    moments = [(events, [int(rng.integers(events[0].ts_ms, last_ms))])
               for events in users_of(SHOP).values() if events[0].ts_ms < last_ms]
    chances = np.concatenate(posteriors(moments, SHOP, np.random.default_rng(6)))
    bought = np.array([outcomes(events, [(SnapshotKind.EVENT, now)], SHOP.end_ms)[0] for events, (now,) in moments])
    recency = np.array([max((one.ts_ms - now for one in events if one.ts_ms <= now
                             and one.type == EventType.PURCHASE), default=-np.inf) for events, (now,) in moments])
    for chance, horizon, buys in zip(chances.T, HORIZONS_DAYS, bought.T, strict=False):
        # The number of buyers: within three of its own standard deviations, if the chances are right.
        assert abs(chance.sum() - buys.sum()) < 3 * np.sqrt((chance * (1 - chance)).sum())
        assert ece(chance, buys) < 0.05
        if horizon in (7, 30):
            assert auc(chance, buys) > auc(recency, buys) + 0.05
    assert (np.diff(chances, axis=1) >= 0).all()


def test_desire_is_followed(monkeypatch):
    options = replace(SHOP, shoppers=60)
    hidden: dict[str, list[tuple[int, float]]] = defaultdict(list)
    visit = law._Life.visit

    def spied_visit(life, at_ms):
        chance = visit(life, at_ms)
        hidden[life.shopper.user_id].append((life.at_ms, life.desire))
        return chance

    monkeypatch.setattr(law._Life, 'visit', spied_visit)
    users = users_of(options)
    shelf, rng = Shelf(options), np.random.default_rng(1)
    truth, known = [], []
    for user_id, events in users.items():
        desires, desire, last_ms = dict(hidden[user_id]), Desire(shelf), -DAY_MS
        for one in events:
            if one.type in (EventType.RATING, EventType.REVIEW, EventType.REFUND):
                continue
            if one.ts_ms - last_ms > law.SESSION_GAP_MS:
                desire.arrive((one.ts_ms - options.start_ms) / DAY_MS)
            desire.see(one, (one.ts_ms - options.start_ms) / DAY_MS)
            last_ms = one.ts_ms
            if last_ms in desires:
                truth.append(desires[last_ms])
                known.append(desire.draw(True, 200, rng).desire.mean())
    difference = np.array(truth) - known
    assert len(truth) > 500
    assert np.corrcoef(truth, known)[0, 1] > 0.95
    assert abs(difference.mean()) < 3 * difference.std() / np.sqrt(len(truth))


def test_silence_ends_a_session_without_a_jump():
    # After 14 minutes the silence weighs the draws, after 16 it is taken as the end.
    events = [event(40.0), event(40 + MINUTE_DAYS), event(40 + 2 * MINUTE_DAYS, EventType.ADD_TO_CART)]
    moments = [at(40 + 16 * MINUTE_DAYS), at(40 + 18.1 * MINUTE_DAYS)]
    during, after = posterior(events, moments, YEAR, np.random.default_rng(1), Resolution(futures=16_384))
    assert during == pytest.approx(after, abs=0.015)


def test_a_basket_being_filled_is_bought():
    # Only buying adds what was not looked at just before.
    events = [event(40.0), event(40 + MINUTE_DAYS, EventType.ADD_TO_CART),
              event(40 + 2 * MINUTE_DAYS, EventType.ADD_TO_CART, item=5)]
    chances = posterior(events, [one.ts_ms for one in events], YEAR, np.random.default_rng(1))
    assert chances[2] == pytest.approx(1, abs=1e-9)
    assert (chances[1] < 0.9).all()


def test_nobody_who_surely_buys_nothing_has_a_chance_below_zero(monkeypatch):
    # The weighted mean of ones, as it may round: the weights are summed twice.
    def rounded(futures, horizons_days, *_rest):
        weights = np.ones(len(futures))
        return np.outer(np.nextafter(weights, 2), np.ones(len(horizons_days))), weights

    monkeypatch.setattr(posterior_module, 'survival', rounded)
    chances = posterior([event(10.0)], [at(20.0)], YEAR, np.random.default_rng(1))
    assert (chances == 0).all()


# ---- the interface --------------------------------------------------------------------------------------------------


def test_nothing_after_the_moment_is_used():
    events = max(users_of(replace(SHOP, shoppers=30)).values(), key=len)
    half = len(events) // 2
    now_ms = events[half].ts_ms
    whole = posterior(events, [now_ms], SHOP, np.random.default_rng(1))
    past = posterior([one for one in events if one.ts_ms <= now_ms], [now_ms], SHOP, np.random.default_rng(1))
    assert (whole == past).all()


def test_moments_are_answered_in_the_order_asked():
    events = [event(10.0), event(20.0)]
    days = [150.0, 10.0, 25.0]
    asked = posterior(events, [at(day) for day in days], YEAR, np.random.default_rng(1), EXACT)
    alone = [posterior(events, [at(day)], YEAR, np.random.default_rng(2), EXACT)[0] for day in days]
    assert asked == pytest.approx(np.array(alone), abs=0.02)
    assert asked[0, 2] < asked[2, 2] < asked[1, 2]
    together = posteriors([(events, [at(150)]), (events, []), (events, [at(10), at(25)])], YEAR,
                          np.random.default_rng(3), EXACT)
    assert [len(rows) for rows in together] == [1, 0, 2]
    assert np.concatenate(together) == pytest.approx(asked, abs=0.02)
    assert posteriors([], YEAR, np.random.default_rng(1)) == []


@pytest.mark.parametrize(('events', 'day', 'options', 'error'), [
    ([event(5.0)], 4.0, YEAR, UsageError),
    ([], 4.0, YEAR, UsageError),
    ([event(5.0), event(4.0)], 6.0, YEAR, UsageError),
    ([event(5.0)], 6.0, replace(YEAR, noise=0.1), UsageError),
    ([event(5.0), event(5 + MINUTE_DAYS, EventType.ADD_TO_CART, item=9), event(5 + 2 * MINUTE_DAYS)], 6.0, YEAR,
     InputError),
    ([event(5.0, item=2001)], 6.0, YEAR, InputError),
], ids=['before the first event', 'no event', 'unsorted', 'noise', 'a basket that is left', 'unknown item'])
def test_what_cannot_be_answered_is_said(events, day, options, error):
    with pytest.raises(error, match='Do: '):
        posterior(events, [at(day)], options, np.random.default_rng(1))
