"""Buy till you die: how often a customer buys while alive, when they die, and what an order is worth.

BG/NBD. While alive a customer buys at random with a rate of their own; after each repeat order they die with a chance
of their own. Rates are Gamma(r, alpha) over customers, chances Beta(a, b). Three numbers per customer are all there is:

    frequency     orders after the first one
    recency_days  first order to last order
    age_days      first order to now

Gamma-Gamma. An order's value is Gamma(p, v) around a mean of the customer's own, with v ~ Gamma(q, gamma).

Both are fitted by maximum posterior on the logarithms of their parameters; the prior only keeps parameters finite
that the data says nothing about. Times are weeks inside, as in the papers, so that their parameters can be compared.

Sources  Fader, Hardie, Lee (2005), "Counting Your Customers" the Easy Way: An Alternative to the Pareto/NBD Model;
         Fader, Hardie (2013), The Gamma-Gamma Model of Monetary Value.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh_tridiagonal
from scipy.optimize import minimize
from scipy.special import betaln, gammaln

from stream.errors import ModelError, UsageError

_PRIOR_DEVIATION = 3.0      # of the logarithm of a parameter: a factor of 20 either way is one deviation
_LOG_MAX = 12.0
_DAYS_PER_WEEK = 7.0
_NODE_MIN = 1e-300          # far enough from 0 that a time times it keeps all its digits
_NODES = 20                 # of the quadrature over the chance to die; 10 give the same to 12 digits


@dataclass(frozen=True)
class BgNbd:
    """The four parameters of the customers. Arrays of customers are float64 [n] throughout, times in days."""

    r: float
    alpha_weeks: float
    a: float
    b: float

    @staticmethod
    def fit(frequency: np.ndarray, recency_days: np.ndarray, age_days: np.ndarray) -> 'BgNbd':
        """The parameters under which these customers, one row each, are most likely.

        Errors   UsageError without a customer; ModelError where a time is missing or impossible.
        """
        if not len(frequency):
            raise UsageError('BG/NBD has no customer to learn from.', do='use a recording with purchases.')
        possible = (frequency >= 0) & (recency_days >= 0) & (recency_days <= age_days)
        if not possible.all():
            raise ModelError(f'{(~possible).sum()} customers lack a time or are younger than their last order.',
                             do='take recency and age of the same moment.')
        recency, age = recency_days / _DAYS_PER_WEEK, age_days / _DAYS_PER_WEEK

        def loss(logs: np.ndarray) -> float:
            r, alpha, a, b = np.exp(logs)
            return -float(_log_likelihood(r, alpha, a, b, frequency, recency, age).sum())

        # Started from one order per typical age, and a tenth of orders being the last one.
        start = np.log([1.0, max(float(np.median(age)), 1.0), 1.0, 9.0])
        return BgNbd(*_most_likely(loss, start, len(frequency)))

    def alive(self, frequency: np.ndarray, recency_days: np.ndarray, age_days: np.ndarray) -> np.ndarray:
        """Probability that the customer is alive. It is 1 without a repeat order, because nobody has died yet."""
        recency, age = recency_days / _DAYS_PER_WEEK, age_days / _DAYS_PER_WEEK
        repeat = np.maximum(frequency, 1)       # of those without, the odds are not looked at
        log_odds_dead = (np.log(self.a) - np.log(self.b + (repeat - 1))
                         + (self.r + frequency) * np.log((self.alpha_weeks + age) / (self.alpha_weeks + recency)))
        return np.where(frequency > 0, np.exp(-np.logaddexp(0.0, log_odds_dead)), 1.0)

    def buys_within(
        self, frequency: np.ndarray, recency_days: np.ndarray, age_days: np.ndarray, days: float,
    ) -> np.ndarray:
        """Probability of at least one order in the next `days`.

        Nobody dies but at an order, so whoever is alive stays so until the next one: with the rate's posterior
        Gamma(r + frequency, alpha + age), no order comes for a time t with chance ((alpha + age) / (alpha + age + t))
        ** (r + frequency).
        """
        return self.alive(frequency, recency_days, age_days) * -np.expm1(
            (self.r + frequency) * -np.log1p(days / _DAYS_PER_WEEK / self._weeks_at_risk(age_days)))

    def orders_within(
        self, frequency: np.ndarray, recency_days: np.ndarray, age_days: np.ndarray, days: float,
    ) -> np.ndarray:
        """Expected orders in the next `days`.

        Alive with rate l and chance p to die, orders until death or time t are (1 - exp(-l p t)) / p on average. The
        mean over l is closed; the one over p, whose posterior is Beta(a, b + frequency), is a Gauss-Jacobi sum, since
        the closed form of the paper breaks down at a = 1 and its 2F1 for frequent buyers.
        """
        reach = days / _DAYS_PER_WEEK / self._weeks_at_risk(age_days)
        expected = np.empty(len(frequency))
        for repeat in np.unique(frequency):
            rows = frequency == repeat
            dies, weights = _beta_nodes(self.a, self.b + float(repeat))                         # [nodes]
            orders = -np.expm1(-(self.r + repeat) * np.log1p(reach[rows, None] * dies)) / dies   # [rows, nodes]
            expected[rows] = orders @ weights
        return self.alive(frequency, recency_days, age_days) * expected

    def _weeks_at_risk(self, age_days: np.ndarray) -> np.ndarray:
        return self.alpha_weeks + age_days / _DAYS_PER_WEEK


@dataclass(frozen=True)
class GammaGamma:
    """The three parameters of order values; `gamma` is in the currency of the values."""

    p: float
    q: float
    gamma: float

    @staticmethod
    def fit(orders: np.ndarray, mean_order_value: np.ndarray) -> 'GammaGamma':
        """The parameters under which these customers' mean order values are most likely; values of 0 are left out.

        q is kept above 1: below, the mean of all customers does not exist.

        Errors   UsageError where nobody has paid anything.
        """
        paid = mean_order_value > 0
        orders, values = orders[paid], mean_order_value[paid]
        if not len(values):
            raise UsageError('Gamma-Gamma has no order value to learn from.', do='use a recording with prices.')
        unit = float(np.exp(np.log(values).mean()))      # the prior must not depend on the currency

        def loss(logs: np.ndarray) -> float:
            p, q_less_one, gamma = np.exp(logs)
            return -float(_value_log_likelihood(p, 1 + q_less_one, gamma, orders, values / unit).sum())

        p, q_less_one, gamma = _most_likely(loss, np.log([4.0, 2.0, 1.0]), len(values))
        return GammaGamma(p, 1 + q_less_one, gamma * unit)

    def value(self, orders: np.ndarray, mean_order_value: np.ndarray) -> np.ndarray:
        """Expected value of an order: the customer's own mean, drawn towards the mean of all if orders are few."""
        return self.p * (self.gamma + orders * mean_order_value) / (self.p * orders + self.q - 1)


def _beta_nodes(a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """Points in (0, 1) and weights that sum to 1. Weighted sums over them are means under Beta(a, b).

    From the recurrence of the Jacobi polynomials, since scipy's roots_jacobi overflows at b of a thousand.
    Source  Golub, Welsch (1969), Calculation of Gauss Quadrature Rules.
    """
    k = np.arange(1, _NODES)
    total = a + b + 2 * k
    diagonal = np.empty(_NODES)
    diagonal[0] = (a - b) / (a + b)
    diagonal[1:] = (a - b) * (a + b - 2) / ((total - 2) * total)
    squares = np.empty(_NODES - 1)
    squares[0] = 4 * a * b / ((a + b) ** 2 * (a + b + 1))
    k, total = k[1:], total[1:]
    squares[1:] = (4 * k * (k + a - 1) * (k + b - 1) * (k + a + b - 2)
                   / ((total - 2) ** 2 * (total - 1) * (total - 3)))
    nodes, vectors = eigh_tridiagonal(diagonal, np.sqrt(squares))
    # A node within 1e-16 of an end may be solved to lie on it or beyond; at 0 the mean over it would be 0 / 0.
    return np.clip((1 + nodes) / 2, _NODE_MIN, 1.0), vectors[0] ** 2


def _log_likelihood(
    r: float, alpha: float, a: float, b: float, frequency: np.ndarray, recency: np.ndarray, age: np.ndarray,
) -> np.ndarray:
    """Per customer: the paper's likelihood, its two cases (alive, dead since the last order) added as logarithms."""
    alive = -(r + frequency) * np.log(alpha + age)
    dead = np.where(frequency > 0, np.log(a) - np.log(b + (np.maximum(frequency, 1) - 1))
                    - (r + frequency) * np.log(alpha + recency), -np.inf)
    return (gammaln(r + frequency) - gammaln(r) + r * np.log(alpha) + betaln(a, b + frequency) - betaln(a, b)
            + np.logaddexp(alive, dead))


def _value_log_likelihood(p: float, q: float, gamma: float, orders: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Likelihood of each customer's mean order value, given the number of orders."""
    shape = p * orders
    return (gammaln(shape + q) - gammaln(shape) - gammaln(q) + q * np.log(gamma) + (shape - 1) * np.log(mean)
            + shape * np.log(orders) - (shape + q) * np.log(gamma + orders * mean))


def _most_likely(loss: Callable[[np.ndarray], float], start: np.ndarray, customers: int) -> list[float]:
    """The positive parameters that minimise `loss`. Their logarithms have a wide normal prior around 0."""
    found = minimize(lambda logs: (loss(logs) + float(logs @ logs) / (2 * _PRIOR_DEVIATION**2)) / customers,
                     start, method='L-BFGS-B', jac='3-point', bounds=[(-_LOG_MAX, _LOG_MAX)] * len(start),
                     options={'ftol': 1e-12, 'gtol': 1e-7})
    return np.exp(found.x).tolist()
