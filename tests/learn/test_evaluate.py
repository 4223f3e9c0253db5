"""The metrics, by hand and against their definitions."""
import numpy as np
import pytest

pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from stream.learn import evaluate


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 6, 60).astype(float), rng.integers(0, 2, 60)
    pairs = [(a > b) + (a == b) / 2 for a in scores[truth == 1] for b in scores[truth == 0]]
    assert evaluate.auc(scores, truth) == pytest.approx(np.mean(pairs))
    assert np.isnan(evaluate.auc(scores, np.ones(60)))


def test_infinite_scores_are_ranked():
    assert evaluate.auc(np.array([-np.inf, -np.inf, 1.0]), np.array([0, 0, 1])) == 1.0


def test_log_loss_of_two_and_more_classes():
    assert evaluate.log_loss(np.array([0.9, 0.2]), np.array([1, 0])) == pytest.approx(-np.log([0.9, 0.8]).mean())
    assert evaluate.log_loss(np.array([[0.5, 0.2, 0.3]]), np.array([2])) == pytest.approx(-np.log(0.3))


def test_calibration_error_of_a_constant():
    truth = np.arange(100) % 4 == 0
    assert evaluate.brier(np.full(100, 0.25), truth) == pytest.approx(0.1875)
    assert evaluate.expected_calibration_error(np.full(1000, 0.5), np.ones(1000)) == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    scores = rng.random(200_000)
    assert evaluate.expected_calibration_error(scores, rng.random(200_000) < scores) < 0.01


def test_spearman_and_top_decile():
    spend = np.arange(20.0)
    assert evaluate.spearman(np.exp(spend), spend) == pytest.approx(1.0)
    assert evaluate.spearman(-spend, spend) == pytest.approx(-1.0)
    assert evaluate.top_decile_share(spend, spend) == pytest.approx((18 + 19) / spend.sum())


def test_baselines_and_intervals_stand_beside_the_model(checkpoint):
    import json
    test = json.loads((checkpoint / 'metrics.json').read_bytes())['test']
    for contenders in test['tasks'].values():
        assert len(contenders) >= 2
        for numbers in contenders.values():
            for metric, (value, low, high) in numbers.items():
                assert low <= high, metric
                assert metric.startswith('less_') or low <= value + 0.1
    assert sum(row['rows'] for row in test['calibration']['churn']) == test['rows']
