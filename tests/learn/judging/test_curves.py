"""Curves by hand, and by scikit-learn as a referee."""
import numpy as np
import pytest

pytest.importorskip('sklearn', reason='scikit-learn is not installed: pip install stream-scoring[train]')

from sklearn.metrics import precision_recall_curve, roc_curve

from stream.learn.judging.curves import LIFT_FROM, POINTS, curves
from stream.learn.judging.quality import auc

A = np.array


def test_by_hand():
    found = curves(A([0.9, 0.8, 0.8, 0.1]), A([1.0, 1, 0, 0]))
    assert found['roc'] == ([0, 0, 0.5, 1], [0, 0.5, 1, 1])
    assert found['gain'] == ([0, 0.25, 0.75, 1], [0, 0.5, 1, 1])
    assert found['lift'] == ([0.25, 0.75, 1], [2, pytest.approx(4 / 3), 1])
    assert found['precision_recall'] == ([0.5, 1, 1], [1, pytest.approx(2 / 3), 0.5])


def test_without_both_kinds_there_is_nothing_to_draw():
    for truth in (np.zeros(4), np.ones(4)):
        assert set(curves(np.arange(4.0), truth)) == {'roc', 'precision_recall', 'gain', 'lift'}
        assert all(curve == ([], []) for curve in curves(np.arange(4.0), truth).values())


@pytest.mark.parametrize('ties', [False, True])
def test_points_are_those_of_the_referee(ties):
    rng = np.random.default_rng(1)
    scores = rng.beta(1, 3, 5000)
    truth = (rng.random(5000) < scores).astype(float)
    scores = np.round(scores, 1) if ties else scores
    found = curves(scores, truth)
    assert all(len(x) == len(y) <= POINTS + 2 for x, y in found.values())

    x, y = found['roc']
    false_alarms, hits, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert set(zip(x, y, strict=True)) <= set(zip(false_alarms.tolist(), hits.tolist(), strict=True))
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(auc(scores, truth), abs=0.003)

    precision, recall, _ = precision_recall_curve(truth, scores)
    real = set(zip(recall.round(9).tolist(), precision.round(9).tolist(), strict=True))
    assert {(round(a, 9), round(b, 9)) for a, b in zip(*found['precision_recall'], strict=True)} <= real

    assert found['lift'][0][0] >= LIFT_FROM
    for share, times in zip(*found['lift'], strict=True):       # the lift is the gain by the share that was called
        place = np.searchsorted(np.sort(-scores), np.sort(-scores)[round(share * 5000) - 1], side='right')
        best = np.argsort(-scores, kind='stable')[:place]
        assert times == pytest.approx(truth[best].mean() / truth.mean())
