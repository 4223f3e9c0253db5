import asyncio
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from stream.core.features import COUNTERS, SLOT_NUMBERS, Batch
from stream.core.scores import Outputs
from stream.errors import ModelError, ResponseRefused, ScorerUnavailable, StreamError
from stream.scoring.constant import ConstantScorer
from stream.scoring.fallback import FallbackScorer

BATCH = Batch(np.ones((3, 8, 3), np.int32), np.ones((3, 8, SLOT_NUMBERS), np.float32),
              np.ones((3, COUNTERS), np.float32), np.arange(3)[:, None])


class Failing(ConstantScorer):
    """Fails while it has an error to fail with."""

    error: StreamError | None = None
    asked = 0
    closed = False

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        self.asked += 1
        if self.error:
            raise self.error
        return await super().score(batches)

    async def close(self) -> None:
        self.closed = True
        if self.error:
            raise self.error


def test_the_second_answers_only_while_the_first_is_away():
    first, second = Failing(), Failing()
    scorer = FallbackScorer(first, second)
    asyncio.run(scorer.score([BATCH]))
    assert (first.asked, second.asked) == (1, 0)
    first.error = ScorerUnavailable('away.', 'wait.', 10)
    outputs = asyncio.run(scorer.score([BATCH, BATCH]))
    assert [len(output.churn) for output in outputs] == [3, 3]
    assert (first.asked, second.asked) == (2, 1)
    first.error = None
    asyncio.run(scorer.score([BATCH]))
    assert (first.asked, second.asked) == (3, 1)


@pytest.mark.parametrize('error', [ResponseRefused('lies.', 'look.'), ModelError('another model.', 'look.')])
def test_a_wrong_answer_is_no_absence(error: ModelError):
    first, second = Failing(), Failing()
    first.error = error
    with pytest.raises(type(error)):
        asyncio.run(FallbackScorer(first, second).score([BATCH]))
    assert second.asked == 0


@pytest.mark.parametrize('change', [{'sha256': 'ab' * 32}, {'version': '2'}, {'name': 'other'}])
def test_another_model_is_no_fallback(change: dict[str, str]):
    first, second = ConstantScorer(), ConstantScorer()
    second.model = msgspec.structs.replace(second.model, **change)
    with pytest.raises(ModelError, match='copies of one model'):
        FallbackScorer(first, second)


def test_batches_fit_both_and_both_are_closed():
    first, second = Failing(rows_max=64), Failing(rows_max=128)
    scorer = FallbackScorer(first, second)
    assert scorer.rows_max == 64
    first.error = ModelError('cannot close.', 'look.')
    with pytest.raises(ModelError, match='cannot close'):
        asyncio.run(scorer.close())
    assert second.closed
