"""A scorer for while another is away: a second copy of the same model."""
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stream.core.features import Batch
from stream.core.scorer import Scorer
from stream.core.scores import Outputs
from stream.errors import ModelError, ScorerUnavailable

if TYPE_CHECKING:
    from stream.scoring.triton import Statistics


class FallbackScorer:
    """Asks `primary`; `secondary` answers only what `primary` is not there to answer.

    An answer that is wrong is no absence: ResponseRefused and other ModelErrors of the primary stay errors.

    fallback_windows   windows that the secondary has scored
    Errors             ModelError at construction where the two are not the same weights.
    """

    def __init__(self, primary: Scorer, secondary: Scorer) -> None:
        if primary.model != secondary.model:
            raise ModelError(f'The fallback is {secondary.model}, the model is {primary.model}.',
                             'point both at copies of one model folder.')
        self.primary = primary
        self.secondary = secondary
        self.model = primary.model
        self.tier_names = primary.tier_names
        self.trained_on = primary.trained_on
        self.rows_max = min(primary.rows_max, secondary.rows_max)
        self.fallback_windows = 0

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        """Outputs of each batch, all from one of the two."""
        try:
            return await self.primary.score(batches)
        except ScorerUnavailable:
            outputs = await self.secondary.score(batches)
            self.fallback_windows += sum(map(len, batches))
            return outputs

    @property
    def statistics(self) -> 'Statistics | None':
        """The primary's, if it keeps any."""
        return getattr(self.primary, 'statistics', None)

    async def close(self) -> None:
        """Close both."""
        try:
            await self.primary.close()
        finally:
            await self.secondary.close()
