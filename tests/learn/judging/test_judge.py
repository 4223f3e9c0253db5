"""Figures of made-up scores whose answer is known."""
import numpy as np
import pytest

pytest.importorskip('sklearn', reason='scikit-learn is not installed: pip install stream-scoring[train]')

from sklearn.metrics import precision_recall_curve, roc_curve

from stream.learn.judging.judge import (
    LEAST_ERROR,
    LIFT_FROM,
    LIKELIEST,
    MODEL,
    POINTS,
    TYPICAL,
    Predictions,
    curves,
    judge_chances,
    judge_spend,
    judge_tiers,
    spend_forecasts,
)
from stream.learn.judging.quality import auc

A = np.array
RNG = np.random.default_rng(1)
CHANCE = RNG.beta(1, 2, 1500)
TRUTH = (RNG.random(1500) < CHANCE).astype(float)
GUESSES = RNG.random(1500)
NOBODY: dict[str, np.ndarray] = {}


def judged(model: np.ndarray, **others: np.ndarray) -> dict:
    by_name = {MODEL: Predictions(model, True)} | {name.replace('_', ' '): Predictions(scores, False)
                                              for name, scores in others.items()}
    return judge_chances(by_name, TRUTH, NOBODY, 200, seed=3)


def test_a_win_is_claimed_only_where_the_whole_interval_is_above_0():
    better = judged(CHANCE, logistic_regression=GUESSES)
    assert better['verdict'] == 'better'
    _, low, high = better['contenders']['logistic regression']['model_less']['auc']
    assert 0.1 < low < high
    worse = judged(GUESSES, logistic_regression=CHANCE)
    assert worse['verdict'] == 'worse'
    assert worse['contenders']['logistic regression']['model_less']['auc'][2] < -0.1
    nearly = judged(CHANCE, logistic_regression=CHANCE + RNG.normal(size=1500) * 0.02)
    assert nearly['verdict'] == 'no difference shown'
    low, high = nearly['contenders']['logistic regression']['model_less']['auc'][1:]
    assert low <= 0 <= high


def test_the_best_of_the_references_is_who_has_to_be_beaten():
    figures = judged(CHANCE - 0.3 * GUESSES, LightGBM=CHANCE, logistic_regression=GUESSES, MLP_regression=TRUTH)
    assert figures['best_reference'] == 'LightGBM'
    assert figures['verdict'] == 'worse'
    assert set(figures['curves']) == {MODEL, 'logistic regression', 'LightGBM'}
    alone = judged(CHANCE, MLP_regression=GUESSES)
    assert (alone['best_reference'], alone['verdict']) == (None, None)


def test_differences_are_paired():
    """A contender that ranks alike differs by nothing in every resample, however wide the intervals of both are."""
    figures = judged(CHANCE, LightGBM=10 * CHANCE + 3)
    assert figures['contenders']['LightGBM']['model_less']['auc'] == [0, 0, 0]
    _, low, high = figures['contenders'][MODEL]['metrics']['auc']
    assert high - low > 0.02


def test_only_chances_are_judged_as_chances():
    figures = judged(CHANCE, LightGBM=CHANCE)
    assert set(figures['contenders'][MODEL]['metrics']) == {
        'auc', 'pr_auc', 'top_decile_lift', 'log_loss', 'brier', 'ece'}
    assert set(figures['contenders']['LightGBM']['metrics']) == {'auc', 'pr_auc', 'top_decile_lift'}
    assert set(figures['calibration']) == set(figures['thresholds']) == {MODEL}


def test_turned_round_is_the_opposite():
    scored = Predictions(CHANCE, True).complement()
    assert scored.is_chance
    assert scored.scores == pytest.approx(1 - CHANCE)
    assert Predictions(CHANCE, False).complement().scores == pytest.approx(-CHANCE)


def test_thresholds_and_segments_by_a_recount():
    half = np.arange(1500) < 750
    figures = judge_chances({MODEL: Predictions(CHANCE, True)}, TRUTH, {'the first half': half}, 20, seed=3)
    assert (figures['rows'], figures['positives'], figures['base_rate']) == (1500, TRUTH.sum(), TRUTH.mean())
    at = figures['thresholds'][MODEL]['base rate']
    assert at['threshold'] == TRUTH.mean()
    assert at['true_positive'] + at['false_positive'] == (TRUTH.mean() <= CHANCE).sum()
    recall, low, high = at['recall']
    assert recall == at['true_positive'] / TRUTH.sum() and low < recall < high
    assert figures['thresholds'][MODEL]['stated']['threshold'] == 0.5
    segment = figures['segments']['the first half']
    assert (segment['rows'], segment['positives']) == (750, TRUTH[:750].sum())
    assert segment['auc'][MODEL] != figures['contenders'][MODEL]['metrics']['auc'][0]


def test_spend_of_more_days_grows_with_the_expected_orders():
    """By hand: half an order in 90 days and one in 273 leave exp(-0.5) and exp(-1) without any."""
    served = {'expected_spend': np.array([[10.0], [10.0]]), 'typical_spend': np.array([[8.0], [0.0]]),
              'purchase': 1 - np.exp(-np.array([[0.5, 1.0], [0.1, 0.3]]))}
    near, far = (spend_forecasts(served, days, (90, 273)) for days in (90, 273))
    assert near[MODEL].tolist() == [10, 10] and near[LIKELIEST] == pytest.approx(served['purchase'][:, 0])
    assert far[MODEL] == pytest.approx([20, 30]) and far[TYPICAL] == pytest.approx([16, 0])
    assert far[LIKELIEST] == pytest.approx(served['purchase'][:, 1])
    certain = {'expected_spend': np.ones((1, 1)), 'purchase': np.ones((1, 2))}      # as float32 rounds
    assert spend_forecasts(certain, 273, (90, 273))[MODEL] == pytest.approx([1])


def test_spend_and_tiers_by_hand():
    spent = np.array([0.0, 0, 0, 10, 20, 30, 40, 50, 60, 90])
    spend = judge_spend({MODEL: spent / 2, 'past spend': spent[::-1], LIKELIEST: spent / 100, LEAST_ERROR: spent - 10},
                        spent, 50, seed=3)
    assert spend['contenders'][MODEL]['metrics']['spearman'][0] == pytest.approx(1)
    assert spend['contenders'][MODEL]['metrics']['total_predicted_over_real'] == pytest.approx([0.5] * 3)
    assert spend['contenders']['past spend']['model_less']['spearman'][1] > 0
    assert (spend['mean'], spend['spending']) == (30, 0.7)
    assert spend['contenders'][LIKELIEST]['metrics'].keys() == {'spearman', 'top_decile_share'}        # no amounts
    value, low, high = spend['error_ratio'][MODEL]
    assert value == pytest.approx(15 / 10) and low < value < high
    assert [row['spent'] for row in spend['bins']] == spent.tolist()

    chances = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    tiers = judge_tiers({MODEL: Predictions(chances, True), 'a choice': Predictions(np.eye(3)[[0, 1, 1, 1]], False)},
                        np.array([0, 1, 2, 2]), 20, seed=3)
    assert tiers['confusion'] == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert tiers['contenders'][MODEL]['metrics']['accuracy'][0] == 0.75
    assert set(tiers['contenders']['a choice']['metrics']) == {'accuracy', 'within_one_tier'}      # it gives no chances
    assert tiers['contenders']['a choice']['model_less']['accuracy'][0] == 0.25


def test_curves_by_hand():
    found = curves(A([0.9, 0.8, 0.8, 0.1]), A([1.0, 1, 0, 0]))
    assert found['roc'] == ([0, 0, 0.5, 1], [0, 0.5, 1, 1])
    assert found['gain'] == ([0, 0.25, 0.75, 1], [0, 0.5, 1, 1])
    assert found['lift'] == ([0.25, 0.75, 1], [2, pytest.approx(4 / 3), 1])
    assert found['precision_recall'] == ([0.5, 1, 1], [1, pytest.approx(2 / 3), 0.5])


def test_of_one_class_there_is_nothing_to_draw():
    for truth in (np.zeros(4), np.ones(4)):
        assert set(curves(np.arange(4.0), truth)) == {'roc', 'precision_recall', 'gain', 'lift'}
        assert all(curve == ([], []) for curve in curves(np.arange(4.0), truth).values())


@pytest.mark.parametrize('ties', [False, True])
def test_points_of_a_curve_are_those_of_scikit_learn(ties):
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
