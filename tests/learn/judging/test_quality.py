"""Metrics by hand-counted cases, and by scikit-learn as a referee."""
import math

import numpy as np
import pytest

pytest.importorskip('sklearn', reason='scikit-learn is not installed: pip install stream-scoring[train]')

from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score
from sklearn.metrics import log_loss as sklearn_log_loss

from stream.learn.judging.quality import (
    accuracy,
    at_threshold,
    auc,
    brier,
    calibration,
    ece,
    ece_if_true,
    interval,
    log_loss,
    mean_absolute_error,
    pr_auc,
    ranks,
    resamples,
    spearman,
    top_decile_lift,
    top_decile_share,
    total_ratio,
    within_one,
)

A = np.array


def drawn(seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Chances, and what happened with those chances; `ties`: in steps of a tenth."""
    rng = np.random.default_rng(seed)
    scores = rng.beta(1, 3, 2000)
    return (np.round(scores, 1) if ties else scores), (rng.random(2000) < scores).astype(float)


def test_ranking_by_hand():
    truth = A([1.0, 0, 1, 0])
    assert auc(A([4.0, 3, 2, 1]), truth) == 0.75        # of four pairs one is the wrong way round
    assert auc(A([1.0, 1, 1, 1]), truth) == 0.5
    assert auc(A([2.0, 1, 1, 0]), truth) == 0.875
    assert pr_auc(A([4.0, 3, 2, 1]), truth) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert pr_auc(A([1.0, 1, 1, 1]), truth) == 0.5
    for one_kind in (np.zeros(3), np.ones(3)):
        assert math.isnan(auc(A([1.0, 2, 3]), one_kind))
    assert math.isnan(pr_auc(A([1.0, 2, 3]), np.zeros(3)))


@pytest.mark.parametrize('ties', [False, True])
def test_ranking_as_the_referee_says(ties):
    scores, truth = drawn(1, ties)
    assert auc(scores, truth) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert pr_auc(scores, truth) == pytest.approx(average_precision_score(truth, scores), abs=1e-12)


def test_scores_of_minus_infinity_are_ties():
    """A rule puts whoever never ordered last, all of them alike."""
    scores, truth = A([-np.inf, -3, -np.inf, -1]), A([0.0, 1, 1, 0])
    assert auc(scores, truth) == 0.375
    assert pr_auc(scores, truth) == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_chances_by_hand_and_as_the_referee_says():
    assert log_loss(A([0.5, 0.25]), A([1.0, 0])) == pytest.approx(-(math.log(0.5) + math.log(0.75)) / 2)
    assert log_loss(A([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]]), A([2, 0])) == pytest.approx(
        -(math.log(0.5) + math.log(0.7)) / 2)
    assert brier(A([0.5, 0.25]), A([1.0, 0])) == pytest.approx((0.25 + 0.0625) / 2)
    scores, truth = drawn(2)
    assert log_loss(scores, truth) == pytest.approx(sklearn_log_loss(truth, scores), rel=1e-6)
    assert brier(scores, truth) == pytest.approx(brier_score_loss(truth, scores), rel=1e-9)


def test_a_certain_mistake_costs_much_but_not_everything():
    assert 15 < log_loss(A([0.0]), A([1.0])) < 20


def test_calibration_by_hand():
    scores, truth = A([0.1] * 10 + [0.9] * 10), A([0.0] * 9 + [1] + [1] * 5 + [0] * 5)
    rows = calibration(scores, truth)
    assert [row['rows'] for row in rows] == [2] * 10
    assert sum(row['rows'] * row['rate'] for row in rows) == truth.sum()
    assert ece(A([0.3] * 10), A([1.0] * 3 + [0] * 7)) == pytest.approx(      # a row a bin: 3 of 0.7, 7 of 0.3 away
        (3 * 0.7 + 7 * 0.3) / 10)
    honest, truth = drawn(3)
    assert ece(honest, truth) < 0.03
    assert ece(np.minimum(honest + 0.2, 1), truth) > 0.17


def test_right_chances_are_seen_to_err_by_as_much_as_the_law_says():
    """Of 10 bins of 90 rows with a chance of .2: the mean distance of a share from .2 is that of the normal law."""
    wanted = math.sqrt(2 / math.pi * 0.2 * 0.8 / 90)
    mean, low, high = ece_if_true(np.full(900, 0.2), 400, seed=1)
    assert mean == pytest.approx(wanted, rel=0.05)
    assert low < mean < high
    assert ece_if_true(np.full(90_000, 0.2), 40, seed=1)[0] == pytest.approx(wanted / 10, rel=0.1)
    honest, truth = drawn(3)
    _, _, high = ece_if_true(honest, 200, seed=2)
    assert ece(honest, truth) < high
    assert ece(np.minimum(honest + 0.1, 1), truth) > high


def test_amounts_by_hand():
    spent = A([0.0, 10, 20, 30])
    assert spearman(A([1.0, 2, 3, 9]), spent) == pytest.approx(1)
    assert spearman(A([4.0, 3, 2, 1]), spent) == pytest.approx(-1)
    assert math.isnan(spearman(np.ones(4), spent))
    assert mean_absolute_error(A([1.0, 10, 20, 26]), spent) == pytest.approx(5 / 4)
    assert total_ratio(A([1.0, 2, 3, 24]), spent) == pytest.approx(0.5)
    assert top_decile_share(np.arange(20.0), A([5.0] * 18 + [30, 80])) == pytest.approx(110 / 200)


def test_classes_by_hand():
    chances = A([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3], [0.9, 0.1, 0.0]])
    assert accuracy(chances, A([0, 2, 0, 2])) == 0.5
    assert within_one(chances, A([0, 2, 0, 2])) == 0.75


def test_a_threshold_by_hand():
    found = at_threshold(A([0.9, 0.5, 0.4, 0.1, 0.6]), A([1.0, 1, 1, 0, 0]), 0.5)
    assert found == {'true_positive': 2, 'false_positive': 1, 'false_negative': 1, 'true_negative': 1,
                     'accuracy': 0.6, 'precision': pytest.approx(2 / 3), 'recall': pytest.approx(2 / 3),
                     'f1': pytest.approx(2 / 3)}
    nobody = at_threshold(A([0.1, 0.2]), A([1.0, 0]), 0.5)
    assert math.isnan(nobody['precision'])
    assert (nobody['recall'], nobody['f1'], nobody['accuracy']) == (0, 0, 0.5)
    scores, truth = drawn(4)
    assert at_threshold(scores, truth, 0.3)['f1'] == pytest.approx(f1_score(truth, scores >= 0.3))


def test_resamples_draw_users_with_all_their_rows():
    users = A([7, 7, 7, 3, 9, 9])
    first, *drawn_rows = resamples(users, 50, seed=1)
    assert first.tolist() == list(range(6))
    for rows in drawn_rows:
        counts = np.bincount(rows, minlength=6)
        assert counts[0] == counts[1] == counts[2]
        assert counts[4] == counts[5]
        assert counts[0] + counts[3] + counts[4] == 3
    again = resamples(users, 50, seed=1)
    assert all(np.array_equal(one, other) for one, other in zip([first, *drawn_rows], again, strict=True))
    assert {len(rows) for rows in resamples(np.arange(6), 50, seed=1)} == {6}


def test_the_interval_is_as_wide_as_the_law_says():
    """Of a mean of 400 draws with deviation 1: 1.96 / 20 to either side."""
    values = np.random.default_rng(5).normal(size=400)
    value, low, high = interval(A([values[rows].mean() for rows in resamples(np.arange(400), 2000, seed=2)]))
    assert value == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_an_interval_leaves_out_what_could_not_be_computed():
    assert interval(A([1.0, np.nan, 2.0, 2.0])) == [1.0, 2.0, 2.0]
    value, *bounds = interval(A([1.0, np.nan]))
    assert value == 1
    assert all(map(math.isnan, bounds))


def test_ranks_of_equal_values_are_shared():
    assert ranks(A([3.0, 1, 3, -np.inf, 2])).tolist() == [4.5, 2, 4.5, 1, 3]


def test_lift_of_the_top_tenth():
    scores, truth = np.arange(100.0), np.zeros(100)
    truth[[99, 98, 97, 10, 20]] = 1
    assert top_decile_lift(scores, truth) == pytest.approx(3 / 10 / 0.05)
    assert top_decile_lift(np.zeros(100), truth) == pytest.approx(1)        # nobody is told apart: as at random
    level = np.where(scores >= 80, 1.0, 0.0)        # twenty are level at the edge: half of what is among them counts
    assert top_decile_lift(level, truth) == pytest.approx(3 / 20 / 0.05)
    assert math.isnan(top_decile_lift(scores, np.zeros(100)))
