import numpy as np
import pytest

from stream.core.features import Batch
from stream.core.scores import Outputs, collect
from stream.errors import ModelError


def batch(*rows: int) -> Batch:
    count = len(rows)
    return Batch(np.zeros((count, 8, 3), np.int32), np.zeros((count, 8, 7), np.float32),
                 np.zeros((count, 46), np.float32), np.array(rows, np.int64)[:, None])


def answer(asked: Batch, intent: float = 0.25, churn: float = 0.5, spend: float = 12.345,
           tiers: tuple[float, ...] = (0.5, 0.25, 0.25)) -> Outputs:
    def column(value: float) -> np.ndarray:
        return np.full((len(asked), 1), value, np.float32)
    return Outputs(column(intent), np.tile(np.array(tiers, np.float32), (len(asked), 1)), column(spend), column(churn),
                   asked.row_id)


def test_answers_come_together_by_row_id():
    first, second = batch(2, 0), batch(1)
    scores = collect([first, second], [answer(first, intent=0.1), answer(second, intent=0.2)], 3)
    assert scores.intent.tolist() == [0.1, 0.2, 0.1]
    assert scores.usable.all()


def test_scores_are_on_the_grid():
    scores = collect([batch(0)], [answer(batch(0), intent=0.123449, churn=0.99996, spend=12.345)], 1)
    assert (scores.intent[0], scores.churn[0]) == (0.1234, 1.0)
    assert scores.spend[0] in (12.34, 12.35)        # float32 decides which
    assert scores.power[0] == 0.375                 # (0.25 * 1 + 0.25 * 2) / 2
    assert scores.tiers[0].tolist() == [0.5, 0.25, 0.25]


@pytest.mark.parametrize('wrong', [
    {'intent': float('nan')}, {'intent': float('inf')}, {'intent': -0.01}, {'intent': 1.01}, {'churn': float('nan')},
    {'churn': 2.0}, {'spend': float('inf')}, {'spend': -1.0}, {'spend': float('nan')},
    {'tiers': (0.5, 0.5, 0.5)}, {'tiers': (float('nan'), 0.5, 0.5)}, {'tiers': (1.5, -0.5, 0.0)}])
def test_an_impossible_row_is_refused_alone(wrong: dict):
    good, bad = batch(0), batch(1)
    scores = collect([good, bad], [answer(good), answer(bad, **wrong)], 2)
    assert scores.usable.tolist() == [True, False]
    assert (scores.intent[1], scores.churn[1], scores.power[1], scores.spend[1]) == (0, 0, 0, 0)


def test_a_row_without_an_answer_is_not_usable():
    assert collect([batch(0)], [answer(batch(0))], 2).usable.tolist() == [True, False]


def test_permuted_rows_are_noticed():
    asked = batch(0, 1)
    swapped = answer(asked)
    swapped.row_id_out = asked.row_id[::-1]
    with pytest.raises(ModelError, match='other rows'):
        collect([asked], [swapped], 2)


def test_a_short_or_misshapen_answer_is_noticed():
    asked = batch(0, 1)
    short = answer(batch(0))
    with pytest.raises(ModelError, match='other rows'):
        collect([asked], [short], 2)
    flat = answer(asked)
    flat.churn = flat.churn[:, 0]
    with pytest.raises(ModelError, match='shape'):
        collect([asked], [flat], 2)
