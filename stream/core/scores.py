"""The model's answers, checked row by row and put on the grid on which scores are published and decided."""
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from stream.core.features import Batch
from stream.errors import ModelError

# Floating point differs in the last bits with the batch; on this grid that shows only where a score is at an edge.
STEPS_PER_UNIT = 10_000
SPEND_STEPS_PER_UNIT = 100
_TIER_SUM_TOLERANCE = 1e-3


@dataclass(slots=True)
class Outputs:
    """What a scorer returns for one `Batch` of n rows; names as in the exported graph."""

    purchase_intent: np.ndarray     # float32 [n, 1] probability of a purchase within 7 days
    tier_probabilities: np.ndarray  # float32 [n, tiers] softmax over tiers of spend in 90 days
    expected_spend: np.ndarray      # float32 [n, 1] spend in 90 days, configured currency
    churn: np.ndarray               # float32 [n, 1] probability of no purchase within 30 days
    row_id_out: np.ndarray          # int64 [n, 1] the ids that came in


OUTPUT_NAMES = tuple(field.name for field in fields(Outputs))


@dataclass(slots=True)
class Scores:
    """Scores of N rows on the grid. Where `usable` is false the others are 0 and must not be published.

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


def collect(batches: Sequence[Batch], outputs: Sequence[Outputs], rows: int) -> Scores:
    """The answers to all batches of `rows` rows as one table.

    Errors   ModelError where an answer has other rows than were asked for, or another shape: then nothing of it can be
             trusted. A row with NaN, infinity or a number out of its range is refused alone: `usable` is false.
    """
    tiers = outputs[0].tier_probabilities.shape[1] if outputs else 1
    columns = np.zeros((rows, tiers + 3))
    answered = np.zeros(rows, bool)
    for batch, output in zip(batches, outputs, strict=True):
        if not np.array_equal(batch.row_id, output.row_id_out):
            raise ModelError('The model answered for other rows than it was asked about.',
                             'check that the model passes row_id through, and that nothing reorders its batches.')
        ids = batch.row_id[:, 0]
        for at, part in ((0, output.purchase_intent), (1, output.churn), (2, output.expected_spend),
                         (slice(3, None), output.tier_probabilities)):
            shape = (len(ids), tiers if isinstance(at, slice) else 1)
            if part.shape != shape:
                raise ModelError(f'The model gave an output of shape {part.shape}, expected {shape}.',
                                 'serve the model that this version was exported for.')
            columns[ids, at] = part if isinstance(at, slice) else part[:, 0]
        answered[ids] = True

    probabilities, spend = columns[:, [0, 1, *range(3, tiers + 3)]], columns[:, 2]
    with np.errstate(invalid='ignore'):     # comparisons with NaN are false, which is the answer wanted
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
