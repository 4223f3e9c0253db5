import tomllib
from pathlib import Path

import pytest
from pydantic import Field, SecretStr

from stream.config import Settings, as_toml, load_settings
from stream.core.decide import Policy
from stream.core.layout import DAY_MS, WindowLimits
from stream.errors import UsageError


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def test_defaults_are_those_of_the_core():
    settings = load_settings()
    assert settings.policy() == Policy()
    assert settings.window_limits() == WindowLimits()


def test_file_then_environment_then_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / 'stream.toml').write_text('churn_raise = 0.9\nintent_raise = 0.9\npublish = "all"\n')
    monkeypatch.setenv('STREAM_INTENT_RAISE', '0.8')
    monkeypatch.setenv('STREAM_PUBLISH', 'events')
    settings = load_settings(publish='changes', churn_clear=None)
    assert (settings.churn_raise, settings.intent_raise, settings.publish) == (0.9, 0.8, 'changes')


def test_another_file(tmp_path: Path):
    (tmp_path / 'other.toml').write_text('window_span_days = 30\nsilence_days = [1, 2]\n')
    limits = load_settings(tmp_path / 'other.toml').window_limits()
    assert (limits.span_ms, limits.silence_ms) == (30 * DAY_MS, (DAY_MS, 2 * DAY_MS))


@pytest.mark.parametrize(('flags', 'named'), [
    ({'churn_raise': 1.5}, 'churn_raise'), ({'publish': 'some'}, 'publish'), ({'no_such': 1}, 'no_such'),
    ({'churn_raise': 0.5, 'churn_clear': 0.6}, 'churn_clear'), ({'intent_raise': 0.1}, 'intent_clear'),
    ({'silence_days': [3, 2]}, 'ascend'), ({'currency': 'euro'}, 'currency')])
def test_a_wrong_setting_is_named(flags: dict, named: str):
    with pytest.raises(UsageError, match=named) as wrong:
        load_settings(**flags)
    assert 'Do:' in str(wrong.value)


@pytest.mark.parametrize('text', ['churn_raise = ', 'churn_rais = 0.5'])
def test_a_wrong_file_is_an_error(text: str, tmp_path: Path):
    (tmp_path / 'stream.toml').write_text(text)
    with pytest.raises(UsageError):
        load_settings()


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(UsageError, match='no settings file'):
        load_settings(tmp_path / 'absent.toml')


def test_what_is_printed_can_be_read_again(tmp_path: Path):
    printed = as_toml(load_settings(churn_raise=0.7, currency_rates={'USD': 0.9}))
    (tmp_path / 'stream.toml').write_text(printed)
    assert tomllib.loads(printed)['churn_raise'] == 0.7
    assert as_toml(load_settings()) == printed
    assert '(default: 0.8)' in printed


def test_every_setting_says_what_it_is():
    assert all(field.description for field in Settings.model_fields.values())


def test_secrets_are_masked():
    class WithSecret(Settings):
        password: SecretStr = Field(SecretStr('hunter2'), description='a secret')

    assert 'hunter2' not in as_toml(WithSecret())
    assert '*****' in as_toml(WithSecret())


def test_a_setting_that_does_not_exist_is_named_with_its_neighbour():
    with pytest.raises(UsageError, match=r'there is no setting brokres \(did you mean brokers\?\)\.'):
        load_settings(brokres='x')
