"""The interface of a scorer. `stream.scoring` has the implementations; one contract test covers all of them."""
from collections.abc import Sequence
from typing import Protocol

from stream.core.features import Batch
from stream.core.messages import ModelInfo
from stream.core.scores import Outputs


class Scorer(Protocol):
    """Scores batches with one pinned model.

    Outputs are in the order of the batches, with rows in the order of each batch and `row_id_out` equal to `row_id`.
    Errors   ModelError if the model cannot answer.
    """

    model: ModelInfo
    tier_names: tuple[str, ...]
    trained_on: str
    rows_max: int       # the largest batch that it accepts

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]: ...

    async def close(self) -> None: ...
