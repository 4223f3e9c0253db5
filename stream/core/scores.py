"""Checks the model's answers row by row and rounds them to the grid on which scores are published and decided."""
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from stream.core.features import Batch
from stream.errors import ModelError

# The last bits of a score depend on its batch. Rounding to this grid hides that, unless a score is close to a rounding
# edge.
STEPS_PER_UNIT = 10_000
SPEND_STEPS_PER_UNIT = 100
_TIER_SUM_TOLERANCE = 1e-3


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


def collect(batches: Sequence[Batch], outputs: Sequence[Outputs], rows: int) -> Scores:
    """Join the answers to all batches, `rows` rows in total, into one table.

    A row with NaN, infinity or a number out of range is refused on its own: its `usable` is false.
    Errors   ModelError if an answer has other rows than the batch, or another shape: no part of it can be trusted.
    """
    tiers = outputs[0].tier_probabilities.shape[1] if outputs else 1
    columns = np.zeros((rows, tiers + 3))
    answered = np.zeros(rows, bool)
    for batch, output in zip(batches, outputs, strict=True):
        if not np.array_equal(batch.row_id, output.row_id_out):
            raise ModelError('The model returned scores for other rows than the request had.',
                             'check that the model passes row_id through, and that nothing reorders its batches.')
        ids = batch.row_id[:, 0]
        for at, part in ((0, output.purchase_intent), (1, output.churn), (2, output.expected_spend),
                         (slice(3, None), output.tier_probabilities)):
            shape = (len(ids), tiers if isinstance(at, slice) else 1)
            if part.shape != shape:
                raise ModelError(f'The model returned an output of shape {part.shape}, expected {shape}.',
                                 'serve the model that this version was exported for.')
            columns[ids, at] = part if isinstance(at, slice) else part[:, 0]
        answered[ids] = True

    probabilities, spend = columns[:, [0, 1, *range(3, tiers + 3)]], columns[:, 2]
    with np.errstate(invalid='ignore'):     # comparisons with NaN are false, so such rows are not usable
        usable = (answered & np.all((probabilities >= 0) & (probabilities <= 1), axis=1)
                  & np.isfinite(spend) & (spend >= 0)
                  & (np.abs(probabilities[:, 2:].sum(axis=1) - 1) <= _TIER_SUM_TOLERANCE))
    columns[~usable] = 0
    tier_table = columns[:, 3:]
    power = tier_table @ np.arange(tiers) / max(tiers - 1, 1)
    return Scores(usable, _on_grid(columns[:, 0]), _on_grid(columns[:, 1]), _on_grid(np.minimum(power, 1.0)),
                  _on_grid(tier_table), np.rint(columns[:, 2] * SPEND_STEPS_PER_UNIT) / SPEND_STEPS_PER_UNIT)


def _on_grid(values: np.ndarray) -> np.ndarray:
    return np.rint(values * STEPS_PER_UNIT) / STEPS_PER_UNIT
