from pathlib import Path

import pytest

from stream.config import load_settings
from stream.errors import ModelError
from stream.scoring.constant import ConstantScorer
from stream.scoring.embedded import EmbeddedScorer
from stream.scoring.fallback import FallbackScorer
from stream.scoring.make import make_scorer
from stream.scoring.triton import TritonScorer


@pytest.mark.parametrize(('settings', 'kind'), [
    ({'scorer': 'constant'}, ConstantScorer), ({'scorer': 'embedded'}, EmbeddedScorer),
    ({'scorer': 'triton'}, TritonScorer), ({'scorer': 'triton', 'fallback': 'embedded'}, FallbackScorer)])
def test_the_settings_say_which(settings: dict[str, str], kind: type):
    warnings: list[str] = []
    scorer = make_scorer(load_settings(**settings, batch_rows_max=17), warnings.append)
    assert type(scorer) is kind
    assert scorer.rows_max == 17
    assert not warnings
    if isinstance(scorer, FallbackScorer):
        assert (type(scorer.primary), type(scorer.secondary)) == (TritonScorer, EmbeddedScorer)


@pytest.mark.parametrize('scorer', ['embedded', 'triton'])
def test_a_model_of_other_windows_or_money_is_named(scorer: str):
    warnings: list[str] = []
    make_scorer(load_settings(scorer=scorer, currency='USD', window_events_max=64), warnings.append)
    assert len(warnings) == 2
    assert 'windows of 128 events, but these hold 64' in warnings[0]
    assert 'amounts in EUR, but these are in USD' in warnings[1]


def test_the_shipped_model_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert make_scorer(load_settings(scorer='triton'), print).model.name == 'shopper'


def test_a_missing_model_is_an_error_that_says_so(tmp_path: Path):
    with pytest.raises(ModelError, match='There is no model at'):
        make_scorer(load_settings(scorer='triton', model=tmp_path), print)
