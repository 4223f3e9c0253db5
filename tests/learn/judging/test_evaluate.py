"""What the card's figures are made of."""
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from rich.console import Console

from stream.core.layout import DAY_MS, WindowLimits
from stream.learn.dataset import HORIZON_DAYS, ExampleOptions, part_of, sample
from stream.learn.fit import fit
from stream.learn.judging import evaluate as evaluating
from stream.learn.judging.evaluate import evaluate_ranking
from stream.learn.judging.judge import BOUGHT, MODEL, OWN, POPULAR, RECENT
from stream.learn.train import split


def test_baselines_and_intervals_stand_beside_the_model(checkpoint):
    test = json.loads((checkpoint / 'metrics.json').read_bytes())['test']
    assert {'purchase within 7 d', 'purchase within 30 d', 'churn within 30 d, active'} <= test['tasks'].keys()
    for contenders in test['tasks'].values():
        assert len(contenders) >= 2
        for numbers in contenders.values():
            for metric, (value, low, high) in [*numbers['metrics'].items(), *numbers['model_less'].items()]:
                if value is not None and low is not None:
                    assert low <= high, metric
            assert all(low <= value + 0.1 for value, low, _ in numbers['metrics'].values()
                       if None not in (value, low))
    assert 0 < sum(row['rows'] for row in test['calibration']['purchase within 7 d']) <= test['rows']


def test_typical_spend_is_judged_by_its_mean_error_beside_constants(history, monkeypatch):
    """By hand: it stands beside the middle of what the training users spent, and beside nothing at all."""
    monkeypatch.setattr(evaluating, 'RESAMPLES', 20)
    tests = [part_of(user_id, (0.4,), 1) == 0 for user_id in history.user_ids]
    train, test = (sample(history, np.flatnonzero(np.array(tests) == tested).tolist(), history.start_ms, history.end_ms,
                          ExampleOptions(6, 2.0), WindowLimits(), 1) for tested in (False, True))
    spent = test.labels.spend.astype(float)
    known = ~np.isnan(spent)
    guessed = np.where(known, spent, 0.0) + np.arange(len(test)) % 3            # off by 1 on average, or so
    figures = evaluating.evaluate(SimpleNamespace(data=train, tier_edges=np.array([20.0, 50.0, 90.0])), {
        'purchase': np.full((len(test), len(HORIZON_DAYS)), 0.5), 'tier_probabilities': np.full((len(test), 5), 0.2),
        'expected_spend': np.ones((len(test), 1)), 'typical_spend': guessed[:, None]}, test, seed=3)
    typical = figures['tasks']['typical spend in 90 d']
    errors = {name: numbers['metrics']['mean_absolute_error'][0] for name, numbers in typical.items()
              if name != 'spend of 90 days'}
    middle = np.median(train.labels.spend[~np.isnan(train.labels.spend)])
    assert middle > 0 and known.sum() < len(test)
    assert errors == pytest.approx({
        MODEL: abs(guessed - spent)[known].mean(), 'median of training': abs(middle - spent[known]).mean(),
        'nothing': spent[known].mean()})
    assert typical['nothing']['model_less']['mean_absolute_error'][2] < 0
    assert figures['tasks']['spend in 90 d'][MODEL]['metrics']['mean_absolute_error'][0] > errors[MODEL]


def test_the_ranking_is_judged_beside_simple_rules(history, tiny_fit):
    limits, known_until_ms = WindowLimits(), history.end_ms + 1
    cut_ms = known_until_ms - 60 * DAY_MS
    seen, learners, users = split(history, cut_ms, 0.6, 3)
    fitted = fit(seen, learners, cut_ms, tiny_fit(), limits, Console(file=io.StringIO()))
    figures = evaluate_ranking(fitted, seen, history, users, cut_ms, limits, known_until_ms, 3)
    assert figures.keys() == {'item', 'category'}
    for judged in figures.values():
        assert list(judged['contenders']) == [MODEL, POPULAR, RECENT, OWN, BOUGHT] and 10 <= judged['rows'] < len(users)
        for numbers in judged['contenders'].values():
            for value, low, high in numbers['metrics'].values():
                assert 0 <= low <= value <= high <= 1
    ndcg = {name: numbers['metrics']['ndcg'][0] for name, numbers in figures['category']['contenders'].items()}
    assert ndcg[MODEL] > ndcg[POPULAR] and ndcg[MODEL] > 0.1
    # Where the days are not settled yet nothing is said; nor of a user whom nobody has seen before.
    assert not evaluate_ranking(fitted, seen, history, users, cut_ms, limits, cut_ms + 29 * DAY_MS, 3)
    assert not evaluate_ranking(fitted, seen, history, [], cut_ms, limits, known_until_ms, 3)
