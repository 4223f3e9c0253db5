"""What the card's figures are made of."""
import io
import json

import pytest

pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from rich.console import Console

from stream.core.window import DAY_MS, WindowLimits
from stream.learn.evaluate import evaluate_ranking
from stream.learn.fit import fit
from stream.learn.judge import BOUGHT, MODEL, OWN, POPULAR, RECENT
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
