"""A second copy of the same model, which scores while the first one is unavailable."""
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stream.core.features import Batch
from stream.core.scorer import Scorer
from stream.core.scores import Outputs
from stream.errors import ModelError, ScorerUnavailable

if TYPE_CHECKING:
    from stream.scoring.triton import RequestStatistics


class FallbackScorer:
    """Asks `primary`. Asks `secondary` only if `primary` is unavailable.

    A wrong answer is not an absence: ResponseRefused and the other ModelErrors of the primary stay errors.

    Errors   ModelError at construction if the two do not have the same weights.
    """

    def __init__(self, primary: Scorer, secondary: Scorer) -> None:
        if primary.model != secondary.model:
            raise ModelError(f'The fallback is {secondary.model}, but the model is {primary.model}.',
                             'point both at copies of one model folder.')
        self.primary = primary
        self.secondary = secondary
        self.model = primary.model
        self.tier_names = primary.tier_names
        self.trained_on = primary.trained_on
        self.rows_max = min(primary.rows_max, secondary.rows_max)

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        """Outputs of each batch, all from the same scorer."""
        try:
            return await self.primary.score(batches)
        except ScorerUnavailable:
            return await self.secondary.score(batches)

    @property
    def statistics(self) -> 'RequestStatistics | None':
        """Those of the primary, if it keeps any."""
        return getattr(self.primary, 'statistics', None)

    async def close(self) -> None:
        """Close both."""
        try:
            await self.primary.close()
        finally:
            await self.secondary.close()
