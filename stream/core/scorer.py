"""What the rules ask of a scorer. `stream.scoring` has the scorers; one contract test runs over all of them."""
from collections.abc import Sequence
from typing import Protocol

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
