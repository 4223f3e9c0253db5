"""What contenders see, by a recount of the events; and that each finds what is there to be found, and nothing else."""
import json
from dataclasses import fields, replace

import numpy as np
import pytest

pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from stream.core.events import Decoder, EventRules
from stream.core.features import COUNTERS, Snapshots, features
from stream.core.layout import DAY_MS, WindowLimits
from stream.core.user import pack_header
from stream.errors import UsageError
from stream.learn.dataset import HORIZON_DAYS, SPEND, scoring_times, tier_of
from stream.learn.judging.baselines import (
    BuyTillYouDie,
    BuyTillYouDieSpend,
    SpendNetwork,
    SpendTrees,
    TierRegression,
    purchase_contenders,
    spend_contenders,
)
from stream.learn.judging.bgnbd import BgNbd, GammaGamma
from stream.learn.judging.quality import accuracy, auc, log_loss, spearman
from stream.learn.judging.simple_rules import PastRate, RecencyRule, Table, past_tier

START_MS = 1_700_006_400_000
WEEK = HORIZON_DAYS.index(7)
MONTH = HORIZON_DAYS.index(30)
LONGEST = len(HORIZON_DAYS) - 1
LEARNERS = ('logistic regression', 'PCA + logistic', 'LDA + logistic', 'LightGBM', 'MLP regression')


def table_of(values: list[bytes]) -> Table:
    """A row per moment of the worker, without labels. User numbers in the order of first events."""
    decode, by_user = Decoder(EventRules()), {}
    for value in values:
        event = decode(value)
        by_user.setdefault(event.user_id, []).append(event)
    rows = []
    for number, events in enumerate(by_user.values()):
        rows += [(number, as_of_ms, pack_header(user), bytes(user.days), bytes(user.rows))
                 for _, as_of_ms, user in scoring_times(events, WindowLimits(), events[-1].ts_ms)]
    user, as_of_ms, *parts = zip(*rows, strict=True)
    snapshots = Snapshots.join(*parts, as_of_ms)
    unknown = np.full((len(rows), len(HORIZON_DAYS)), np.nan)
    return Table.of(snapshots, features(snapshots), unknown, unknown, np.array(user))


def line(number: int, day: float, kind: str, **given) -> bytes:
    return json.dumps({'event_id': f'e{number}', 'user_id': 'ann', 'ts': START_MS + round(day * DAY_MS), 'type': kind,
                       **given}).encode()


def of_90_days(spend: np.ndarray) -> np.ndarray:
    """Labels of spend of which only those of 90 days are known, float32 [n, HORIZON_DAYS]."""
    spent = np.full((len(spend), len(HORIZON_DAYS)), np.nan, np.float32)
    spent[:, SPEND] = spend
    return spent


def made(users: int, seed: int, rows_per_user: int = 2) -> Table:
    """Random counters of which three say how likely a purchase within 7 days is, and how much is spent."""
    rng = np.random.default_rng(seed)
    n = users * rows_per_user
    counters = rng.normal(size=(n, COUNTERS)).astype(np.float32)
    log_odds = 1.5 * counters[:, 0] - counters[:, 1] + counters[:, 2] - 1
    bought = np.full((n, len(HORIZON_DAYS)), np.nan, np.float32)
    bought[:, WEEK] = rng.random(n) < 1 / (1 + np.exp(-log_odds))
    spend = np.where(rng.random(n) < 0.8, np.exp(3 + log_odds / 2 + rng.normal(size=n) / 2), 0.0).astype(np.float32)
    orders = rng.integers(0, 5, n).astype(float)
    recency = np.where(orders > 1, rng.uniform(1, 100, n), 0.0)
    money = rng.gamma(4, 10, n) * orders
    return Table(counters, np.repeat(np.arange(users), rows_per_user),
                 START_MS + np.tile(np.arange(rows_per_user), users) * DAY_MS, np.maximum(orders - 1, 0), recency,
                 np.where(orders > 0, recency + rng.uniform(0, 100, n), 0.0), orders, money,
                 money / np.maximum(orders, 1), money / 2, bought, of_90_days(spend))


@pytest.fixture(scope='module')
def train() -> Table:
    return made(1500, seed=1)


@pytest.fixture(scope='module')
def test() -> Table:
    return made(1000, seed=2)


# ---- the table ------------------------------------------------------------------------------------------------------

def test_columns_of_hand_made_events():
    table = table_of([
        line(0, 0, 'view'),
        line(1, 10, 'purchase', price=10, quantity=2, order_id='a'),
        line(2, 10, 'purchase', price=5, order_id='a'),
        line(3, 30, 'purchase', price=40, order_id='b'),
        line(4, 31, 'refund', price=15),
        line(5, 115, 'view')])
    first, last = table.take(np.array([0])), table.newest()
    assert len(last) == 1
    assert (first.orders, first.frequency, first.recency_days, first.age_days, first.spend) == (0, 0, 0, 0, 0)
    assert (last.orders, last.frequency, last.recency_days, last.age_days) == (2, 1, 20, 105)
    assert (last.spend, last.mean_order_value, last.spend_90d) == (50, 25, 25)      # the first order is forgotten
    middle = table.take(table.as_of_ms == START_MS + 10 * DAY_MS)
    assert middle.age_days.tolist() == [0, 0]
    assert middle.orders.tolist() == [1, 1]
    assert middle.spend.tolist() == [20, 25]


def test_columns_equal_a_recount_of_the_lines(lines):
    table = table_of(lines)
    events = [json.loads(value) for value in lines]
    names = list(dict.fromkeys(event['user_id'] for event in events))
    # A moment in the midst of a basket knows some of the events of its time: those are not recounted here.
    complete = np.append(np.diff(table.user) + np.diff(table.as_of_ms) != 0, True)
    rows = np.random.default_rng(0).permutation(np.flatnonzero(complete))[:400]
    assert (table.orders[rows] > 2).sum() > 50
    for row in rows:
        as_of_ms = table.as_of_ms[row]
        known = [event for event in events
                 if event['user_id'] == names[table.user[row]] and event['ts'] <= as_of_ms]
        bought = [event for event in known if event['type'] == 'purchase']
        opened = {event['order_id']: event['ts'] for event in reversed(bought)}.values()
        assert table.orders[row] == len(opened)
        assert table.frequency[row] == max(len(opened) - 1, 0)
        if opened:
            assert table.age_days[row] == pytest.approx((as_of_ms - min(opened)) / DAY_MS)
            assert table.recency_days[row] == pytest.approx((max(opened) - min(opened)) / DAY_MS)
        amounts = [(event['ts'], event['price'] * event['quantity'] * (1 if event['type'] == 'purchase' else -1))
                   for event in known if event['type'] in ('purchase', 'refund')]
        assert table.spend[row] == pytest.approx(max(sum(amount for _, amount in amounts), 0), abs=1e-6)
        recent = sum(amount for ts, amount in amounts if as_of_ms // DAY_MS - ts // DAY_MS < 90)
        assert table.spend_90d[row] == pytest.approx(max(recent, 0), rel=1e-5, abs=1e-3)


def test_newest_row_of_each_user(train):
    shuffled = train.take(np.random.default_rng(0).permutation(len(train)))
    newest = shuffled.newest()
    assert newest.user.tolist() == list(range(1500))
    assert (newest.as_of_ms == train.as_of_ms.max()).all()
    assert np.array_equal(newest.spend, train.spend[1::2])


# ---- purchase -------------------------------------------------------------------------------------------------------

def test_rules_by_hand(test):
    table = replace(test.take(np.arange(4)), orders=np.array([0.0, 1, 2, 9]), recency_days=np.array([0.0, 0, 9, 90]),
                    age_days=np.array([0.0, 5, 9, 99]))
    assert RecencyRule().fit(table, WEEK).predict(table).tolist() == [-np.inf, -5, 0, -9]
    assert PastRate().fit(table, WEEK).predict(table).tolist() == pytest.approx([0, 1 / 6, 0.2, 0.09])


@pytest.mark.parametrize('name', LEARNERS)
def test_learners_find_what_is_there(train, test, name):
    truth = test.bought[:, WEEK]
    best = auc(1.5 * test.counters[:, 0] - test.counters[:, 1] + test.counters[:, 2], truth)
    contender = purchase_contenders(seed=3)[name]
    scores = contender.fit(train, WEEK).predict(test)
    assert scores.shape == (len(test),)
    assert auc(scores, truth) > best - (0.02 if name in ('logistic regression', 'LDA + logistic') else 0.05)
    if contender.is_chance:
        assert (scores > 0).all()
        assert (scores < 1).all()
        assert scores.mean() == pytest.approx(truth.mean(), abs=0.04)
        assert log_loss(scores, truth) < 0.85 * log_loss(np.full(len(test), truth.mean()), truth)


@pytest.mark.parametrize('name', list(purchase_contenders(0)))
def test_the_same_again_and_unknown_labels_are_not_looked_at(train, test, name):
    known = train.take(np.arange(1200))
    last = replace(train.take(np.arange(1200, 1400)), orders=np.zeros(200))       # no row for BG/NBD's customers
    unknown = replace(last, counters=last.counters + 50, bought=np.full_like(last.bought, np.nan))
    both = Table(*(np.concatenate([getattr(known, field.name), getattr(unknown, field.name)])
                   for field in fields(Table)))
    scores, again, with_unknown = (purchase_contenders(seed=3)[name].fit(rows, WEEK).predict(test)
                                   for rows in (known, known, both))
    assert np.array_equal(scores, again)
    assert np.array_equal(scores, with_unknown)


@pytest.mark.parametrize('name', LEARNERS)
def test_one_kind_of_label_is_nothing_to_learn_from(train, name):
    everybody = replace(train, bought=np.ones_like(train.bought))
    with pytest.raises(UsageError, match='within 7 days'):
        purchase_contenders(seed=3)[name].fit(everybody, WEEK)
    with pytest.raises(UsageError, match='within 30 days'):
        purchase_contenders(seed=3)[name].fit(train, MONTH)


def test_users_are_not_split_between_learning_and_choosing(test):
    """Labels are noise, but the same for all rows of a user, whom a counter gives away: trees that chose when to stop
    by rows of users they know would never stop."""
    rng = np.random.default_rng(5)
    noise = made(300, seed=6, rows_per_user=20)
    noise.bought[:, WEEK] = np.repeat(rng.random(300) < 0.5, 20)
    noise.counters[:, 0] = np.repeat(rng.normal(size=300), 20)
    trees = purchase_contenders(seed=3)['LightGBM'].fit(noise, WEEK)
    assert trees.booster.best_iteration < 60
    assert abs(trees.predict(test) - 0.5).mean() < 0.15


def customers(n: int, seed: int) -> tuple[Table, np.ndarray]:
    """BG/NBD customers and a fifth who never ordered; those buy within 30 days in 1 of 20 cases, the customers with
    half the odds that the model gives them. The second answer is their true chance."""
    rng = np.random.default_rng(seed)
    model, table = BgNbd(0.8, 6.0, 0.9, 2.5), made(n, seed, rows_per_user=1)
    rate, dies, age = rng.gamma(model.r, 1 / model.alpha_weeks, n) / 7, rng.beta(model.a, model.b, n), np.full(n, 250.0)
    frequency, recency = np.zeros(n), np.zeros(n)
    now, alive = np.zeros(n), np.ones(n, bool)
    while alive.any():
        now += rng.exponential(1 / rate)
        alive &= now <= age
        frequency[alive] += 1
        recency[alive] = now[alive]
        alive &= rng.random(n) >= dies
    chance = model.buys_within(frequency, recency, age, 30)
    chance = chance / (chance + 2 * (1 - chance))
    never = rng.random(n) < 0.2
    chance[never] = 0.05
    bought = np.full((n, len(HORIZON_DAYS)), np.nan, np.float32)
    bought[:, MONTH] = rng.random(n) < chance
    frequency[never] = recency[never] = age[never] = 0.0
    return replace(table, frequency=frequency, recency_days=recency, age_days=age, bought=bought,
                   orders=np.where(never, 0.0, frequency + 1),
                   mean_order_value=np.where(never, 0.0, rng.gamma(4, 10, n))), chance


def test_bg_nbd_is_calibrated_on_the_labels():
    (train, _), (test, chance) = customers(12_000, seed=1), customers(12_000, seed=2)
    truth = test.bought[:, MONTH]
    fitted = BuyTillYouDie().fit(train, MONTH)
    scores = fitted.predict(test)
    assert abs(scores - chance).mean() < 0.01
    assert np.unique(scores[test.orders == 0]) == pytest.approx(train.bought[train.orders == 0, MONTH].mean())

    unlabelled = BuyTillYouDie().fit(replace(train, bought=np.full_like(train.bought, np.nan)), MONTH)
    own = unlabelled.predict(test)
    ordered = test.orders > 0
    assert own[ordered] == pytest.approx(
        fitted.model.buys_within(test.frequency, test.recency_days, test.age_days, 30)[ordered])
    assert (own[~ordered] == 0).all()
    assert log_loss(scores, truth) < log_loss(own, truth) - 0.02
    order = np.argsort(own[ordered])
    assert (np.diff(scores[ordered][order]) >= 0).all()


def test_bg_nbd_learns_from_one_row_of_each_user():
    train, _ = customers(3000, seed=1)
    earlier = replace(train, as_of_ms=train.as_of_ms - DAY_MS, age_days=train.age_days * 0.5,
                      recency_days=train.recency_days * 0.5)
    both = Table(*(np.concatenate([getattr(earlier, field.name), getattr(train, field.name)])
                   for field in fields(Table)))
    assert BuyTillYouDie().fit(both, MONTH).model == BuyTillYouDie().fit(train, MONTH).model
    with pytest.raises(UsageError, match='no customer'):
        BuyTillYouDie().fit(replace(train, orders=np.zeros(3000)), MONTH)


# ---- spend ----------------------------------------------------------------------------------------------------------

def test_expected_spend_is_orders_times_value():
    train, _ = customers(3000, seed=1)
    fitted = BuyTillYouDieSpend().fit(train, SPEND)
    ordered = train.orders > 0
    values = GammaGamma.fit(train.orders[ordered], train.mean_order_value[ordered])
    orders = fitted.model.orders_within(train.frequency, train.recency_days, train.age_days, 90)
    scores = fitted.predict(train)
    assert scores[ordered] == pytest.approx(
        (orders * values.value(train.orders, train.mean_order_value))[ordered], rel=1e-3)
    assert np.unique(scores[~ordered]) == pytest.approx(train.spent[:, SPEND][~ordered].mean())


@pytest.mark.parametrize('learner', [lambda: SpendTrees(3, 1), lambda: SpendNetwork(3)])
def test_spend_learners_find_what_is_there(train, test, learner):
    truth, signal = test.spent[:, SPEND], 1.5 * test.counters[:, 0] - test.counters[:, 1] + test.counters[:, 2]
    unknown = replace(train.take(np.arange(300)), counters=train.counters[:300] + 50,
                      spent=of_90_days(np.full(300, np.nan)))
    both = Table(*(np.concatenate([getattr(train, field.name), getattr(unknown, field.name)])
                   for field in fields(Table)))
    scores, again = learner().fit(train, SPEND).predict(test), learner().fit(both, SPEND).predict(test)
    assert np.array_equal(scores, again)
    assert (scores >= 0).all()
    assert spearman(scores, truth) > 0.85 * spearman(signal, truth)
    with pytest.raises(UsageError, match='spend'):
        learner().fit(unknown, SPEND)
    with pytest.raises(UsageError, match='273 days'):
        learner().fit(train, LONGEST)


def test_trees_forecast_the_median(train, test):
    truth = test.spent[:, SPEND]
    error = abs(SpendTrees(3, 1).fit(train, SPEND).predict(test) - truth).mean()
    assert error < 0.85 * abs(np.median(train.spent[:, SPEND]) - truth).mean()


def test_the_network_keeps_its_curves_and_its_best_pass(train):
    network = SpendNetwork(3).fit(train, SPEND)
    assert len(network.loss_curve) == len(network.validation_curve) > network.PATIENCE
    assert network.loss_curve[-1] < 0.7 * network.loss_curve[0]
    assert np.argmin(network.validation_curve) < len(network.validation_curve) - 1
    held_out = train.take(np.isin(train.user, np.random.default_rng(3).permutation(1500)[:300]))
    error = np.mean((np.log1p(network.predict(held_out)) - np.log1p(held_out.spent[:, SPEND])) ** 2)
    assert error == pytest.approx(min(network.validation_curve), rel=0.02)


def test_every_spend_contender_answers(train, test):
    for name, contender in spend_contenders(seed=3).items():
        scores = contender.fit(train, SPEND).predict(test)
        assert scores.shape == (len(test),), name
        assert np.isfinite(scores).all(), name
        assert (scores >= 0).all(), name


def test_spend_of_a_longer_time_is_what_goes_on_like_that(train, test):
    """The law and the rule of the last 90 days know how long; all that was spent so far is no rate."""
    shoppers, _ = customers(3000, seed=1)
    ordered = shoppers.orders > 0
    near, far = (BuyTillYouDieSpend().fit(shoppers, horizon).predict(shoppers)[ordered] for horizon in (SPEND, LONGEST))
    assert (far > near).all() and far.sum() < 273 / 90 * near.sum()         # customers die
    rates = spend_contenders(seed=3)
    assert rates['spend of 90 days'].fit(train, LONGEST).predict(test) == pytest.approx(273 / 90 * test.spend_90d)
    assert rates['past spend'].fit(train, LONGEST).predict(test) == pytest.approx(test.spend)


# ---- tiers ----------------------------------------------------------------------------------------------------------

EDGES = np.array([15.0, 30.0])


def test_tier_regression_finds_what_is_there(train, test):
    truth = tier_of(test.spent[:, SPEND], EDGES)
    chances = TierRegression(3, EDGES).fit(train, SPEND).predict(test)
    assert chances.sum(1) == pytest.approx(np.ones(len(test)))
    shares = np.tile(np.bincount(tier_of(train.spent[:, SPEND], EDGES), minlength=4) / len(train), (len(test), 1))
    assert log_loss(chances, truth) < 0.93 * log_loss(shares, truth)


def test_a_tier_that_nobody_reached_has_no_chance(train, test):
    poor = train.take(train.spent[:, SPEND] < 30)
    chances = TierRegression(3, EDGES).fit(poor, SPEND).predict(test)
    assert (chances[:, 3] == 0).all() and chances.sum(1) == pytest.approx(np.ones(len(test)))
    with pytest.raises(UsageError, match='one tier'):
        TierRegression(3, EDGES).fit(train.take(train.spent[:, SPEND] == 0), SPEND)


def test_the_past_tier_helps_where_the_counters_do_not(train, test):
    rng = np.random.default_rng(5)

    def faithful(table: Table) -> Table:
        """Whoever spent much spends much again; the counters are noise."""
        spend = rng.choice([0.0, 10.0, 20.0, 40.0], len(table))
        return replace(table, counters=rng.normal(size=table.counters.shape).astype(np.float32), spend_90d=spend,
                       spent=of_90_days(spend))

    learned, asked = faithful(train), faithful(test)
    truth = tier_of(asked.spent[:, SPEND], EDGES)
    assert accuracy(TierRegression(3, EDGES).fit(learned, SPEND).predict(asked), truth) > 0.95
    assert accuracy(past_tier(asked, EDGES), truth) == 1
