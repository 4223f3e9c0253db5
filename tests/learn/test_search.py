"""A search of a few tiny trainings: seeded, judged by the validation users, and what it keeps is what is served."""
import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')
pytest.importorskip('optuna', reason='optuna is not installed: pip install stream-scoring[train]')

from rich.console import Console

from stream.core.layout import WindowLimits
from stream.errors import UsageError
from stream.learn import search as searching
from stream.learn.checkpoint import load
from stream.learn.export import export
from stream.learn.fit import fit
from stream.learn.search import search
from stream.learn.train import train
from stream.learn.training_log import TrainingLog

LIMITS = WindowLimits()


@pytest.fixture(scope='module')
def given(tiny_fit):
    return tiny_fit(epochs=2, rows_per_epoch=100)


class Plotted(TrainingLog):
    """Remembers which curves were drawn, instead of drawing them."""

    @contextmanager
    def plotter(self, run):
        assert self.state is None       # a search does not go on
        yield lambda number, figures: PLOTTED.append((self.curves / run, number, figures['validation']))


PLOTTED: list[tuple[Path, int, float]] = []


@pytest.fixture(scope='module')
def searched(history, given):
    """Of three trials, and what was said about them."""
    console = Console(record=True, quiet=True)
    console.quiet = False
    with console.capture() as said:
        found = search(history, range(len(history.user_ids)), history.end_ms, given, LIMITS, 3, console,
                       Plotted(Path('states'), curves=Path('curves')))
    return found, said.get()


def test_the_first_trial_is_what_was_given(searched, given):
    found, said = searched
    assert found.trials[0]['settings'] == {
        'hidden': 16, 'layers': 1, 'dropout': given.encoder.dropout, 'learning_rate': given.learning_rate,
        'weight_decay': given.weight_decay, 'counters_decay': given.counters_decay, 'rows_per_epoch': 100}
    assert all(f'Trial {number} of 3' in said for number in (1, 2, 3))


def test_the_best_by_validation_is_kept(searched, history):
    found, _ = searched
    losses = [trial['validation'] for trial in found.trials]
    kept, = (trial for trial in found.trials if trial['kept'])
    assert kept['validation'] == min(losses) == found.fitted.validation
    assert len(set(losses)) == 3 and all(trial['passes'] == 2 for trial in found.trials)
    assert (found.options.encoder.hidden, found.options.learning_rate) == (
        kept['settings']['hidden'], kept['settings']['learning_rate'])
    again = fit(history, range(len(history.user_ids)), history.end_ms, found.options, LIMITS, Console(quiet=True))
    assert again.validation == found.fitted.validation


def test_each_trial_has_curves_of_its_own(searched):
    assert [(folder, number) for folder, number, _ in PLOTTED] == [
        (Path(f'curves/trial_{trial}/window'), number) for trial in (1, 2, 3) for number in (1, 2)]
    assert len({validation for _, _, validation in PLOTTED}) == 6


def test_a_training_hands_its_curves_to_the_search(tiny_options, given, tmp_path, monkeypatch):
    asked = []

    def stopped(*arguments, **named):
        asked.append(next(one for one in arguments if isinstance(one, TrainingLog)))
        raise KeyboardInterrupt

    monkeypatch.setattr('stream.learn.train.search', stopped)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_options(fit=given, trials=2, curves=tmp_path / 'curves'), tmp_path / 'checkpoint')
    assert [log.curves for log in asked] == [tmp_path / 'curves' / 'test']


def test_the_same_seed_tries_the_same(searched, history, given):
    again = search(history, range(len(history.user_ids)), history.end_ms, given, LIMITS, 3, Console(quiet=True))
    assert again.trials == searched[0].trials


def test_a_bad_trial_is_given_up(history, given, monkeypatch):
    """After three that go well, whoever learns nothing at all is worse than their median."""
    tried = []

    def suggested(trial, options):
        tried.append(trial)
        trial.suggest_float('learning_rate', 1e-9, 1.0)
        return replace(options, learning_rate=1e-9 if len(tried) > 3 else options.learning_rate)

    monkeypatch.setattr(searching, '_suggested', suggested)
    longer = replace(given, epochs=3, patience=3)
    found = search(history, range(len(history.user_ids)), history.end_ms, longer, LIMITS, 4, Console(quiet=True))
    assert [trial['passes'] for trial in found.trials[:3]] == [3, 3, 3]
    assert found.trials[3]['validation'] is None and found.trials[3]['passes'] == searching._FULL_EPOCHS + 1
    assert not found.trials[3]['kept']


def test_a_training_takes_what_was_found_and_tells_it(tiny_options, given, tmp_path):
    train(tiny_options(fit=given, trials=2, refit=False), tmp_path / 'checkpoint')
    kept = load(tmp_path / 'checkpoint')
    trials = json.loads((tmp_path / 'checkpoint' / 'metrics.json').read_bytes())['trials']
    best, = (trial for trial in trials if trial['kept'])
    assert len(trials) == 2 and kept.config['learning']['learning_rate'] == best['settings']['learning_rate']
    card = (export(tmp_path / 'checkpoint', tmp_path / 'models').parent / 'README.md').read_text()
    assert '### Sizes and rates' in card and f'| {best["validation"]:.4f} |' in card


def test_sizes_of_weights_that_are_there_are_what_they_are(given):
    assert {'hidden', 'layers'} <= set(searching._settings(given))
    assert not {'hidden', 'layers', 'dropout'} & set(searching._settings(replace(given, start_from='there')))


def test_without_optuna_it_says_what_to_do(history, given, monkeypatch):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(UsageError, match=r"needs optuna.*\[train\]"):
        search(history, range(len(history.user_ids)), history.end_ms, given, LIMITS, 2, Console(quiet=True))
