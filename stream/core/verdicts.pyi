from collections.abc import Sequence
from typing import Any

import numpy as np

from stream.core.decide import Occasion, Policy
from stream.core.features import Batch
from stream.core.scores import Outputs, Scores

SOURCE_HASH: str
CONSTANTS: tuple[Any, ...]

def judge(
    batches: Sequence[Batch], outputs: Sequence[Outputs], rows: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...
def changes(
    headers: np.ndarray, as_of_ms: np.ndarray, scores: Scores, policy: Policy, model: bytes,
) -> list[tuple[int, int, Occasion | None, int, int]]: ...
