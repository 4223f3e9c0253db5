"""What the card's figures are made of."""
import json

import pytest

pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')


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
