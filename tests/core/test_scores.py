from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.core.features import PADDING_ROW, Batch
from stream.core.scores import OUTPUT_NAMES, Outputs, Scores, collect
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


@pytest.mark.parametrize('nonsense', [0.25, float('nan'), 7.0])
def test_padding_rows_get_no_scores(nonsense: float):
    asked = batch(1, 0, PADDING_ROW, PADDING_ROW)
    outputs = answer(asked)
    outputs.purchase_intent[2:] = nonsense
    scores = collect([asked], [outputs], 2)
    assert scores.intent.tolist() == [0.25, 0.25]
    assert scores.usable.all()


def test_padding_rows_must_come_back_as_they_went():
    asked = batch(0, PADDING_ROW)
    wrong = answer(asked)
    wrong.row_id_out = np.array([[0], [0]])
    with pytest.raises(ModelError, match='other rows'):
        collect([asked], [wrong], 1)


def test_a_row_outside_of_the_table_is_an_error():
    for row in (2, -2, 1 << 60):
        with pytest.raises(IndexError):
            collect([batch(row)], [answer(batch(row))], 2)


def test_no_batches_give_no_usable_scores():
    assert collect([], [], 2).usable.tolist() == [False, False]
    assert collect([], [], 0).tiers.shape == (0, 1)


# ---- against a plain calculation -------------------------------------------------------------------------------------

def plain(asked: Batch, outputs: Outputs, rows: int) -> Scores:
    """The scores, column by column. Errors: none; every row of `asked` is a row of the table."""
    tiers = outputs.tier_probabilities.shape[1]
    columns = np.zeros((rows, tiers + 3))
    answered = np.zeros(rows, bool)
    ids = asked.row_id[:, 0]
    columns[ids] = np.concatenate([outputs.purchase_intent, outputs.churn, outputs.expected_spend,
                                   outputs.tier_probabilities], axis=1)
    answered[ids] = True
    probabilities, spend = columns[:, [0, 1, *range(3, tiers + 3)]], columns[:, 2]
    usable = (answered & np.all((probabilities >= 0) & (probabilities <= 1), axis=1) & np.isfinite(spend) & (spend >= 0)
              & (np.abs(sum(columns[:, 3:].T, np.zeros(rows)) - 1) <= 1e-3))
    columns[~usable] = 0
    power = sum((columns[:, 3 + tier] * tier for tier in range(tiers)), np.zeros(rows)) / max(tiers - 1, 1)

    def on_grid(values: np.ndarray, steps: int = 10_000) -> np.ndarray:
        return np.rint(values * steps) / steps
    return Scores(usable, on_grid(columns[:, 0]), on_grid(columns[:, 1]), on_grid(np.minimum(power, 1.0)),
                  on_grid(columns[:, 3:]), on_grid(columns[:, 2], 100))


# Halves of a grid step are rounded to the even step, in both kinds of floats.
NUMBERS = st.one_of(st.floats(0, 1, width=32), st.integers(0, 20_000).map(lambda half: half / 20_000),
                    st.sampled_from([0.0, -0.0, 1.0, -1e-9, 1 + 1e-6, float('nan'), float('inf'), -float('inf')]))


@given(st.lists(st.tuples(NUMBERS, NUMBERS, st.one_of(NUMBERS, st.floats(0, 1e9, width=32))), min_size=1, max_size=6),
       st.integers(1, 9), st.sampled_from([np.float32, np.float64]), st.integers(0, 2**32 - 1), st.floats(-2e-3, 2e-3))
def test_scores_are_those_of_a_plain_calculation(numbers: list[tuple], tiers: int, dtype: type, seed: int, off: float):
    rng = np.random.default_rng(seed)
    asked = batch(*rng.permutation(len(numbers) + 1)[:len(numbers)])
    shares = rng.dirichlet(np.full(tiers, rng.choice([0.01, 1.0])), len(numbers))
    shares[rng.random(len(numbers)) < 0.3, 0] += off
    intent, churn, spend = np.array(numbers, dtype).T[:, :, None]
    outputs = Outputs(intent, shares.astype(dtype), spend, churn, asked.row_id)
    with np.errstate(all='ignore'):
        wanted = plain(asked, outputs, len(numbers) + 1)
    apart = replace(outputs, **{name: np.repeat(getattr(outputs, name), 2, axis=0)[::2] for name in OUTPUT_NAMES})
    packed = replace(outputs, **{name: unaligned(getattr(outputs, name)) for name in OUTPUT_NAMES})
    for given_ in (outputs, apart, packed):
        got = collect([asked], [given_], len(numbers) + 1)
        for field in fields(Scores):
            one, other = getattr(got, field.name), getattr(wanted, field.name)
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), field.name


def unaligned(part: np.ndarray) -> np.ndarray:
    """The same numbers at an odd address, as in an answer from the network."""
    return np.frombuffer(b'!' + part.tobytes(), part.dtype, offset=1).reshape(part.shape)
