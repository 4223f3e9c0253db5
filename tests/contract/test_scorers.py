"""Every scorer keeps one contract; a new one joins by one line in `SCORERS`."""
import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from stream.core.features import COUNTERS, LENGTHS, SLOT_NUMBERS, TYPE_VOCABULARY, Batch
from stream.core.scorer import Scorer
from stream.core.scores import Outputs, collect
from stream.errors import ModelError
from stream.scoring.constant import ConstantScorer
from stream.scoring.embedded import EmbeddedScorer
from stream.scoring.fallback import FallbackScorer
from stream.scoring.triton import TritonScorer
from tests.scoring.stub_triton import StubTriton

SHIPPED = Path(__file__).parents[2] / 'triton_models' / 'shopper' / '1'
NOWHERE = '127.0.0.1:1'
SCORERS: dict[str, Callable[[pytest.FixtureRequest], Scorer]] = {
    'constant': lambda request: ConstantScorer(),
    'embedded': lambda request: EmbeddedScorer(SHIPPED),
    'embedded on the loop': lambda request: EmbeddedScorer(SHIPPED, off_loop=False),
    'triton': lambda request: TritonScorer(request.getfixturevalue('triton').address, SHIPPED),
    'stub of triton': lambda request: TritonScorer(request.getfixturevalue('stub').address, SHIPPED),
    'fallback': lambda request: FallbackScorer(TritonScorer(NOWHERE, SHIPPED), EmbeddedScorer(SHIPPED)),
}


@pytest.fixture(scope='session')
def stub() -> Iterator[StubTriton]:
    """The stub that the Triton scorer's tests lie with, here answering as the real server does."""
    embedded = EmbeddedScorer(SHIPPED)
    made = StubTriton(lambda batch: embedded.score_now([batch])[0])
    yield made
    made.stop()


@pytest.fixture(params=SCORERS)
def scorer(request: pytest.FixtureRequest) -> Iterator[Scorer]:
    made = SCORERS[request.param](request)
    yield made
    asyncio.run(made.close())


def made_up_batch(rows: int, length: int, seed: int = 1, first_id: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, length + 1, rows)
    filled = np.arange(length) < counts[:, None]
    categories = rng.integers(1, TYPE_VOCABULARY, (rows, length, 3)).astype(np.int32) * filled[..., None]
    numbers = rng.random((rows, length, SLOT_NUMBERS), np.float32) * filled[..., None]
    return Batch(categories, numbers.astype(np.float32), rng.random((rows, COUNTERS), np.float32),
                 np.arange(first_id, first_id + rows)[:, None])


def score(scorer: Scorer, *batches: Batch) -> list[Outputs]:
    return asyncio.run(scorer.score(batches))


def test_it_names_its_model(scorer: Scorer):
    assert len(bytes.fromhex(scorer.model.sha256)) == 32
    assert scorer.model.name
    assert scorer.model.version
    assert len(scorer.tier_names) == score(scorer, made_up_batch(1, 8))[0].tier_probabilities.shape[1]


@pytest.mark.parametrize('length', LENGTHS)
def test_every_row_is_answered_with_scores_in_range(scorer: Scorer, length: int):
    batch = made_up_batch(5, length)
    scores = collect([batch], score(scorer, batch), 5)
    assert scores.usable.all()


def test_answers_come_in_the_order_of_the_questions(scorer: Scorer):
    asked = [made_up_batch(3, 8, first_id=4), made_up_batch(1, 64, first_id=0), made_up_batch(2, 16, first_id=7)]
    answers = score(scorer, *asked)
    assert [answer.row_id_out.tolist() for answer in answers] == [batch.row_id.tolist() for batch in asked]
    assert score(scorer) == []


def test_the_same_batch_gives_the_same_bytes(scorer: Scorer):
    batch = made_up_batch(7, 16)
    first, again = score(scorer, batch)[0], score(scorer, batch)[0]
    assert first.churn.tobytes() == again.churn.tobytes()
    assert first.tier_probabilities.tobytes() == again.tier_probabilities.tobytes()


def test_a_row_does_not_depend_on_its_company(scorer: Scorer):
    batch = made_up_batch(256, 32)
    together = score(scorer, batch)[0]
    for row in (0, 100, 255):
        alone = score(scorer, Batch(batch.categories[row:row + 1], batch.numbers[row:row + 1],
                                    batch.counters[row:row + 1], batch.row_id[row:row + 1]))[0]
        for name in ('purchase_intent', 'tier_probabilities', 'churn'):
            assert getattr(alone, name)[0] == pytest.approx(getattr(together, name)[row], abs=1e-5)
        assert alone.expected_spend[0] == pytest.approx(together.expected_spend[row], rel=1e-4)


def test_a_row_does_not_depend_on_its_padding(scorer: Scorer):
    batch = made_up_batch(9, 8)
    longer = Batch(np.pad(batch.categories, ((0, 0), (0, 8), (0, 0))), np.pad(batch.numbers, ((0, 0), (0, 8), (0, 0))),
                   batch.counters, batch.row_id)
    short, padded = score(scorer, batch, longer)
    assert short.churn == pytest.approx(padded.churn, abs=1e-5)
    assert short.purchase_intent == pytest.approx(padded.purchase_intent, abs=1e-5)


def test_a_user_without_events_can_be_scored(scorer: Scorer):
    batch = made_up_batch(2, 8)
    batch.categories[:] = 0
    batch.numbers[:] = 0
    assert collect([batch], score(scorer, batch), 2).usable.all()


def test_the_largest_batch_is_answered(scorer: Scorer):
    batch = made_up_batch(scorer.rows_max, 8)
    assert len(score(scorer, batch)[0].churn) == scorer.rows_max


def test_steps_at_once_each_get_their_own_rows(scorer: Scorer):
    steps = [[made_up_batch(5, length, seed=seed) for length in LENGTHS] for seed in range(6)]

    async def at_once() -> list[list[Outputs]]:
        return await asyncio.gather(*map(scorer.score, steps))

    for step, answers in zip(steps, asyncio.run(at_once()), strict=True):
        for alone, together in zip(score(scorer, *step), answers, strict=True):
            assert together.churn == pytest.approx(alone.churn, abs=1e-5)


def test_a_misshapen_batch_is_an_error_that_says_so(scorer: Scorer):
    if scorer.model.name == 'constant':
        return      # looks at no window
    batch = made_up_batch(2, 8)
    batch.counters = batch.counters[:, :-1]
    with pytest.raises(ModelError, match='cannot run'):
        score(scorer, batch)
    assert len(score(scorer, made_up_batch(2, 8))[0].churn) == 2
