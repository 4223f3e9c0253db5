"""A table of the facts about users, and contenders that anyone could run on it. They learn nothing.

    Table         rows of users as of moments, and what came after
    RecencyRule   whoever ordered last comes first
    PastRate      orders per day so far
    PastSpend     what was spent so far
    past_tier     the tier of what was spent in the last 90 days

They answer as the contenders of `stream.learn.judging.baselines` do, and need no more than NumPy.
"""
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from stream.core.features import Features, Snapshots
from stream.core.layout import DAY_MS, DAYS_KEPT
from stream.learn.dataset import HORIZON_DAYS, Examples, tier_of


@dataclass(frozen=True)
class Table:
    """N users, each as of a moment. Times in days, money in the currency of the events, refunds subtracted.

    counters          float32 [N, COUNTERS], as the model sees them
    user              int64 [N], the same number for the rows of one user
    as_of_ms          int64 [N]
    frequency         float64 [N], orders after the first one; 0 also without an order
    recency_days      float64 [N], first to last order; 0 without an order
    age_days          float64 [N], first order to the moment; 0 without an order
    orders, spend, mean_order_value
                      float64 [N], of the user's life; never below 0
    spend_90d         float64 [N], of the last 90 days; never below 0
    bought            float32 [N, HORIZON_DAYS], 1: an order within so many days after the moment; NaN: not known
    spent             float32 [N, HORIZON_DAYS], within so many days after the moment; NaN: not known
    """

    counters: np.ndarray
    user: np.ndarray
    as_of_ms: np.ndarray
    frequency: np.ndarray
    recency_days: np.ndarray
    age_days: np.ndarray
    orders: np.ndarray
    spend: np.ndarray
    mean_order_value: np.ndarray
    spend_90d: np.ndarray
    bought: np.ndarray
    spent: np.ndarray

    @staticmethod
    def of(snapshots: Snapshots, inputs: Features, bought: np.ndarray, spent: np.ndarray, user: np.ndarray) -> 'Table':
        """From snapshots, their features, and the labels `bought` and `spent` [N, HORIZON_DAYS].

        The first order's time is the last one's less all gaps: exact where orders arrived in their order.
        """
        header = snapshots.headers
        orders = header['orders'].astype(np.float64)
        silence = np.where(orders > 0, (snapshots.as_of_ms - header['last_order_ms']) / DAY_MS, 0.0)
        net = np.maximum(header['spend'] - header['refunds'], 0.0)
        owner = np.repeat(np.arange(len(snapshots)), header['days'])
        recent = (snapshots.as_of_ms // DAY_MS)[owner] - snapshots.days['day'] < DAYS_KEPT
        last = np.bincount(owner[recent], snapshots.days['spend'][recent].astype(np.float64), len(snapshots))
        return Table(
            inputs.counters, user.astype(np.int64), snapshots.as_of_ms, np.maximum(orders - 1, 0.0),
            header['gap_days'].astype(np.float64), header['gap_days'] + silence, orders, net,
            net / np.maximum(orders, 1.0), np.maximum(last, 0.0), bought.astype(np.float32), spent.astype(np.float32))

    @staticmethod
    def of_examples(examples: Examples) -> 'Table':
        """One row for each user, labels included."""
        return Table.of(examples.snapshots, examples.inputs, examples.labels.bought, examples.labels.spent,
                        examples.user)

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> 'Table':
        """Some rows, by mask or indices."""
        return Table(*(getattr(self, field.name)[rows] for field in fields(self)))

    def newest(self) -> 'Table':
        """The newest row of each user."""
        order = np.lexsort((self.as_of_ms, self.user))
        last = np.flatnonzero(np.diff(self.user[order], append=-1))
        return self.take(order[last])


# Names as a table shows them.

def purchase_rules() -> dict[str, 'RecencyRule | PastRate | PastSpend']:
    """Scores for buying within any horizon."""
    return {'recency rule': RecencyRule(), 'past rate': PastRate()} | spend_rules()


def past_tier(table: 'Table', edges: np.ndarray) -> np.ndarray:
    """float64 [n, tiers], 1 at the tier of the last 90 days' spend: a choice, not probabilities."""
    return np.eye(len(edges) + 2)[tier_of(table.spend_90d, edges)]


def spend_rules() -> dict[str, 'PastSpend']:
    """Scores for future spend, and for buying at all. They need prices."""
    return {'past spend': PastSpend('spend'), 'spend of 90 days': PastSpend('spend_90d')}


class RecencyRule:
    """Minus the days since the last order. Users who never ordered come last."""

    is_chance = False

    def fit(self, _train: Table, _horizon: int) -> Self:
        return self

    def predict(self, test: Table) -> np.ndarray:
        return -np.where(test.orders > 0, test.age_days - test.recency_days, np.inf)


class PastRate:
    """Orders per day since the first one. A day is added: the first hours after the first order make no rate."""

    is_chance = False

    def fit(self, _train: Table, _horizon: int) -> Self:
        return self

    def predict(self, test: Table) -> np.ndarray:
        return test.orders / (test.age_days + 1.0)


class PastSpend:
    """A past amount: `spend` of the table as it stands, which only ranks, or `spend_90d` as if it went on like that."""

    is_chance = False

    def __init__(self, column: str) -> None:
        self.column = column

    def fit(self, _train: Table, horizon: int) -> Self:
        self.times = HORIZON_DAYS[horizon] / DAYS_KEPT if self.column == 'spend_90d' else 1.0
        return self

    def predict(self, test: Table) -> np.ndarray:
        return self.times * getattr(test, self.column)
