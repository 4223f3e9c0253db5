"""Customers made by the models' own laws, the closed forms of the papers, and a real shop."""
import gzip
from datetime import date
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip('sklearn', reason='scikit-learn is not installed: pip install stream-scoring[train]')

from scipy.special import hyp2f1

from stream.errors import ModelError, UsageError
from stream.learn.judging import bgnbd
from stream.learn.judging.bgnbd import BgNbd, GammaGamma

TRUE = BgNbd(r=0.8, alpha_weeks=6.0, a=0.9, b=2.5)
AHEAD_DAYS = 90.0


@pytest.fixture(scope='module')
def customers() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """20,000 of them by the law of the model: frequency, recency_days, age_days, orders in the days ahead."""
    rng = np.random.default_rng(8)
    n = 20_000
    age = rng.uniform(100, 300, n)
    rate_per_day, dies = rng.gamma(TRUE.r, 1 / TRUE.alpha_weeks, n) / 7, rng.beta(TRUE.a, TRUE.b, n)
    frequency, recency, ahead = np.zeros(n), np.zeros(n), np.zeros(n)
    now, alive = np.zeros(n), np.ones(n, bool)
    while alive.any():
        now[alive] += rng.exponential(1 / rate_per_day[alive])
        alive &= now <= age + AHEAD_DAYS
        seen = alive & (now <= age)
        frequency[seen] += 1
        recency[seen] = now[seen]
        ahead[alive & ~seen] += 1
        alive &= rng.random(n) >= dies
    return frequency, recency, age, ahead


def test_parameters_are_found_again(customers):
    frequency, recency, age, _ = customers
    found = BgNbd.fit(frequency, recency, age)
    assert found.r == pytest.approx(TRUE.r, rel=0.06)
    assert found.alpha_weeks == pytest.approx(TRUE.alpha_weeks, rel=0.06)
    assert found.a == pytest.approx(TRUE.a, rel=0.12)
    assert found.b == pytest.approx(TRUE.b, rel=0.12)


def test_chances_and_expectations_come_true(customers):
    frequency, recency, age, ahead = customers
    chance = TRUE.buys_within(frequency, recency, age, AHEAD_DAYS)
    expected = TRUE.orders_within(frequency, recency, age, AHEAD_DAYS)
    for rows in np.array_split(np.argsort(chance), 10):
        bought = ahead[rows] > 0
        assert chance[rows].mean() == pytest.approx(bought.mean(), abs=4 * bought.std() / len(rows) ** 0.5)
        assert expected[rows].mean() == pytest.approx(ahead[rows].mean(), abs=4 * ahead[rows].std() / len(rows) ** 0.5)


def test_expected_orders_equal_the_closed_form(customers):
    frequency, recency, age, _ = (column[:2000] for column in customers)
    r, alpha, a, b = TRUE.r, TRUE.alpha_weeks, TRUE.a, TRUE.b
    later = alpha + age / 7 + AHEAD_DAYS / 7
    closed = ((a + b + frequency - 1) / (a - 1) * TRUE.alive(frequency, recency, age)
              * (1 - ((alpha + age / 7) / later) ** (r + frequency)
                 * hyp2f1(r + frequency, b + frequency, a + b + frequency - 1, AHEAD_DAYS / 7 / later)))
    assert TRUE.orders_within(frequency, recency, age, AHEAD_DAYS) == pytest.approx(closed, rel=1e-9)


def test_where_the_closed_form_breaks_down():
    one = np.ones(1)
    below, at, above = (BgNbd(1.0, 5.0, a, 2.0).orders_within(3 * one, 50 * one, 60 * one, 90.0)
                        for a in (0.9999, 1.0, 1.0001))
    assert above < at < below
    assert at == pytest.approx((below + above) / 2, rel=1e-6)
    frequent = TRUE.orders_within(2000 * one, 365 * one, 365 * one, 1.0)
    rate_per_day = (TRUE.r + 2000) / (TRUE.alpha_weeks * 7 + 365)
    assert 0.99 * rate_per_day < frequent < rate_per_day
    assert np.isfinite(TRUE.buys_within(5000 * one, 10 * one, 365 * one, 1.0)).all()


def test_a_chance_to_die_that_is_solved_to_zero_or_below(monkeypatch):
    # Beta(a, b) with a far smaller than b lies within 1e-16 of 0; on which side an eigenvalue falls is up to rounding.
    solve = bgnbd.eigh_tridiagonal
    repeat, model = np.array([0.0, 3.0]), BgNbd(1.0, 5.0, 1e-5, 1e10)
    expected = (model.r + repeat) * 30 / (model.alpha_weeks * 7 + 60)       # orders of whoever does not die
    for least in (-1 - 2.0**-52, -1.0, np.nextafter(-1.0, 0)):
        monkeypatch.setattr(bgnbd, 'eigh_tridiagonal', lambda *matrix, least=least: (
            np.append(least, solve(*matrix)[0][1:]), solve(*matrix)[1]))
        assert model.orders_within(repeat, 50 * (repeat > 0), np.full(2, 60.0), 30.0) == pytest.approx(
            expected, rel=1e-4)
    tiny = BgNbd(1.0, 5.0, 1.0, 1e-20)      # b + 1 - 1 would be 0, whose logarithm is none
    assert tiny.alive(np.ones(1), np.full(1, 50.0), np.full(1, 60.0)) == pytest.approx(0, abs=1e-15)
    assert np.isfinite(bgnbd._log_likelihood(1.0, 5.0, 1.0, 1e-20, np.ones(1), np.full(1, 7.0), np.full(1, 9.0))).all()


def test_alive():
    age = np.full(3, 200.0)
    chance = TRUE.alive(np.array([0.0, 5.0, 5.0]), np.array([0.0, 195.0, 100.0]), age)
    assert chance[0] == 1.0
    assert 1.0 > chance[1] > 2 * chance[2] > 0.0


def test_more_time_is_more_chance(customers):
    frequency, recency, age, _ = customers
    chances = [TRUE.buys_within(frequency, recency, age, days) for days in (1, 7, 30, 90, 1e9)]
    assert all((less < more).all() for less, more in pairwise(chances))
    alive = TRUE.alive(frequency, recency, age)
    assert (chances[-1] <= alive).all()
    assert chances[-1][frequency > 0] == pytest.approx(alive[frequency > 0], abs=1e-6)


def test_nothing_to_learn_from():
    with pytest.raises(UsageError, match='no customer'):
        BgNbd.fit(np.zeros(0), np.zeros(0), np.zeros(0))
    with pytest.raises(UsageError, match='no order value'):
        GammaGamma.fit(np.ones(5), np.zeros(5))
    for age in (0.5, np.nan):
        with pytest.raises(ModelError, match='5 customers'):
            BgNbd.fit(np.ones(5), np.ones(5), np.full(5, age))


@pytest.mark.parametrize('frequency', [0.0, 20.0])
def test_customers_that_are_all_alike_have_finite_parameters(frequency):
    found = BgNbd.fit(np.full(50, frequency), np.full(50, 100.0 if frequency else 0.0), np.full(50, 110.0))
    chance = found.buys_within(np.array([frequency]), np.array([100.0 if frequency else 0.0]), np.array([110.0]), 30.0)
    assert 0.0 <= chance <= 1.0
    assert (chance > 0.5) == (frequency > 0)


@pytest.mark.parametrize('currency', [0.01, 1.0, 1e5])
def test_values_are_found_again_in_any_currency(currency):
    rng = np.random.default_rng(4)
    n, true = 20_000, GammaGamma(6.0, 3.7, 15.0)
    orders = rng.integers(1, 12, n).astype(float)
    scale = rng.gamma(true.q, 1 / true.gamma, n)
    mean = rng.gamma(true.p * orders, 1 / scale) / orders
    found = GammaGamma.fit(orders, currency * mean)
    assert found.q == pytest.approx(true.q, rel=0.05)
    assert found.p == pytest.approx(true.p, rel=0.15)       # p and gamma for themselves are hard to tell apart
    assert found.gamma == pytest.approx(true.gamma * currency, rel=0.15)
    assert found.p * found.gamma == pytest.approx(true.p * true.gamma * currency, rel=0.02)
    own = true.p / scale        # what an order of each customer is worth on average
    value = true.value(orders, mean)
    for rows in np.array_split(np.argsort(value), 5):
        assert value[rows].mean() == pytest.approx(own[rows].mean(), rel=0.03)


def test_many_orders_speak_for_themselves():
    model = GammaGamma(6.0, 3.7, 15.0)
    everybody = model.p * model.gamma / (model.q - 1)
    one, many = model.value(np.array([1.0, 1000.0]), np.array([200.0, 200.0]))
    assert everybody < one < many < 200.0
    assert many == pytest.approx(200.0, rel=0.01)
    assert model.value(np.zeros(1), np.zeros(1)) == pytest.approx(everybody)


def test_the_published_parameters_of_cdnow(real_data):
    """Fitted on the first 39 weeks, as the papers do on every tenth customer. The file may hold part of the customers,
    so what these have in common is asked for: about the same parameters, and closely the same mean chances."""
    last = date(1997, 9, 30).toordinal()
    spent: dict[str, dict[int, float]] = {}
    with gzip.open(real_data / 'cdnow' / 'CDNOW_master.txt.gz', 'rt') as lines:
        for line in lines:
            customer, day, _, dollars = line.split()
            if customer.isdigit():
                ordinal = date(int(day[:4]), int(day[4:6]), int(day[6:])).toordinal()
                days = spent.setdefault(customer, {})
                days[ordinal] = days.get(ordinal, 0.0) + float(dollars)
    rows = []
    for days in spent.values():
        first, *repeat = sorted(day for day in days if day <= last)
        rows.append((len(repeat), max(repeat, default=first) - first, last - first,
                     np.mean([days[day] for day in repeat]) if repeat else 0.0))
    frequency, recency, age, value = np.array(rows, float).T

    found, published = BgNbd.fit(frequency, recency, age), BgNbd(0.243, 4.414, 0.793, 2.426)
    assert found.r == pytest.approx(published.r, rel=0.1)
    assert found.alpha_weeks == pytest.approx(published.alpha_weeks, rel=0.15)
    assert found.a == pytest.approx(published.a, rel=0.25)
    assert found.b == pytest.approx(published.b, rel=0.25)
    assert found.a / (found.a + found.b) == pytest.approx(published.a / (published.a + published.b), rel=0.1)
    ours, theirs = (model.buys_within(frequency, recency, age, 39 * 7).mean() for model in (found, published))
    assert ours == pytest.approx(theirs, rel=0.05)

    money = GammaGamma.fit(frequency, value)
    assert money.p == pytest.approx(6.25, rel=0.1)
    assert money.q == pytest.approx(3.74, rel=0.1)
    assert money.gamma == pytest.approx(15.44, rel=0.1)
