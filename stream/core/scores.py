"""Checks the model's answers row by row and rounds them to the grid on which scores are published and decided.

An answer is possible if probabilities are in [0, 1], those of the tiers add up to 1 (give or take a thousandth), and
spend is finite and not negative. `stream.core.verdicts`, which is compiled, does the arithmetic.
"""
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from stream.core.features import PADDING_ROW, Batch
from stream.core.verdicts import CONSTANTS, judge

# The last bits of a score depend on the processor, and on a GPU also on the batch. Rounding to this grid hides that,
# unless a score is close to a rounding edge.
STEPS_PER_UNIT = 10_000
SPEND_STEPS_PER_UNIT = 100

if CONSTANTS != (STEPS_PER_UNIT, SPEND_STEPS_PER_UNIT, PADDING_ROW):
    raise AssertionError('stream.core.verdicts was compiled for another grid: install the package again')


@dataclass(slots=True)
class Outputs:
    """What a scorer returns for one `Batch` of n rows. The names are those of the exported graph."""

    purchase_intent: np.ndarray     # float32 [n, 1] probability of a purchase within 7 days
    tier_probabilities: np.ndarray  # float32 [n, tiers] softmax over tiers of spend in 90 days
    expected_spend: np.ndarray      # float32 [n, 1] spend in 90 days, configured currency
    churn: np.ndarray               # float32 [n, 1] probability of no purchase within 30 days
    row_id_out: np.ndarray          # int64 [n, 1] the batch's `row_id`


OUTPUT_NAMES = tuple(field.name for field in fields(Outputs))


@dataclass(slots=True)
class Scores:
    """Scores of N rows, rounded to the grid.

    usable          bool [N]; if false, the row's scores are 0 and must not be published
    intent, churn   float64 [N] in [0, 1]
    power           float64 [N] in [0, 1]: the expected tier, divided by the highest one
    tiers           float64 [N, tiers]
    spend           float64 [N] >= 0
    """

    usable: np.ndarray
    intent: np.ndarray
    churn: np.ndarray
    power: np.ndarray
    tiers: np.ndarray
    spend: np.ndarray

    def __len__(self) -> int:
        return len(self.usable)

    def take(self, rows: Sequence[int]) -> 'Scores':
        """The scores of some rows, in this order."""
        return Scores(*(getattr(self, field.name)[rows] for field in fields(self)))

    def part(self, start: int, end: int) -> 'Scores':
        """Rows [start, end)."""
        return Scores(self.usable[start:end], self.intent[start:end], self.churn[start:end], self.power[start:end],
                      self.tiers[start:end], self.spend[start:end])


def collect(batches: Sequence[Batch], outputs: Sequence[Outputs], rows: int) -> Scores:
    """Join the answers to all batches, `rows` rows in total, into one table.

    A row with NaN, infinity or a number out of range is refused on its own: its `usable` is false.
    The rows that fill up a batch count for nothing, whatever their scores.
    Errors   ModelError if an answer has other rows than the batch, or another shape: no part of it can be trusted.
    """
    return Scores(*judge(batches, outputs, rows))
