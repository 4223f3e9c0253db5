"""What every scorer must do; one contract test runs over all of them."""
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from stream.core.features import Batch
from stream.core.messages import ModelInfo
from stream.core.scores import Outputs


class Scorer(Protocol):
    """Answers batches with the outputs of one pinned model.

    Outputs come in the order of the batches, rows in the order of a batch, `row_id_out` equal to `row_id`.
    Errors   ModelError where the model cannot answer.
    """

    model: ModelInfo
    tier_names: tuple[str, ...]
    trained_on: str
    rows_max: int       # the largest batch that it takes

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]: ...

    async def close(self) -> None: ...


class ConstantScorer:
    """The same scores for everybody: what the pipeline costs without a model."""

    def __init__(self, tiers: int = 5, rows_max: int = 256) -> None:
        self.model = ModelInfo('constant', '1', '0' * 64)
        self.rows_max = rows_max
        self.trained_on = 'nothing: constant scores'
        self.tier_names = tuple(f'tier {tier}' for tier in range(tiers))

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        return [self._outputs(batch) for batch in batches]

    async def close(self) -> None:
        """Nothing is held."""

    def _outputs(self, batch: Batch) -> Outputs:
        rows = len(batch)
        tiers = np.zeros((rows, len(self.tier_names)), np.float32)
        tiers[:, 0] = 1.0
        half = np.full((rows, 1), 0.5, np.float32)
        return Outputs(half, tiers, np.zeros((rows, 1), np.float32), half, batch.row_id)
