"""Hyper-parameter search: Optuna's tree-structured Parzen estimator, seeded.

    1 try      train with one set of options after the other, on the same users and days as a training without a search.
               The first set is the given one
    2 judge    by the loss on the validation users, both branches together. The test's users and days take no part
    3 prune    stop a training that is worse after an epoch than the median of the earlier ones after that epoch
    4 keep     the best training, which is already complete

The validation users choose the best epoch, the mix of the branches and now the hyper-parameters, so their loss flatters
the winner, more with more trials. The test is not affected: judge by it.

An interrupted search starts again; only trainings without a search can be resumed.

Sources: Bergstra et al. (2011), "Algorithms for Hyper-Parameter Optimization". Akiba et al. (2019), Optuna,
arXiv 1907.10902.
"""
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from stream.core.layout import WindowLimits
from stream.errors import INSTALL_TRAINING, UsageError
from stream.learn.dataset import History
from stream.learn.fit import FitOptions, Fitted, fit
from stream.learn.training_log import NO_LOG, TrainingLog

_FULL_TRIALS = 3        # run to the end before any is pruned
_FULL_EPOCHS = 2        # never pruned: with fewer rows an epoch, losses fall more slowly at first


@dataclass(frozen=True)
class Searched:
    """The best training.

    options  the options it was trained with
    trials   ready for JSON, in their order: settings, validation (None: pruned), passes (epochs), kept
    """

    fitted: Fitted
    options: FitOptions
    trials: list[dict[str, Any]]


def search(history: History, users: Sequence[int], known_until_ms: int, options: FitOptions, limits: WindowLimits,
           trials: int, console: Console, log: TrainingLog = NO_LOG) -> Searched:
    """Run this many trials, the first one with `options` as they are.

    log      writes the curves of each trial into a folder of its own; no states
    Errors   UsageError where Optuna is not installed, or the events hold nothing to learn from.
    Promise  on one machine the same options give the same trials and the same weights.
    """
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=options.seed, n_startup_trials=max(2, trials // 4)),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_FULL_TRIALS, n_warmup_steps=_FULL_EPOCHS + 1))
    study.enqueue_trial(_settings(options))
    best: Searched | None = None
    tried: list[dict[str, Any]] = []
    for number in range(trials):
        trial = study.ask()
        given = _suggested(trial, options)
        settings = ', '.join(f'{name} {value:.3g}' for name, value in trial.params.items())
        console.print(f'Trial {number + 1} of {trials}: {settings}')
        entry = {'settings': trial.params, 'validation': None, 'passes': 0, 'kept': False}
        tried.append(entry)
        try:
            fitted = fit(history, users, known_until_ms, given, limits, console,
                         replace(log.part(f'trial_{number + 1}'), state=None),
                         after_epoch=_report_to(trial, entry, optuna.TrialPruned))
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            console.print(f'  given up after epoch {entry["passes"]}')
            continue
        study.tell(trial, fitted.validation)
        entry['validation'] = fitted.validation
        if best is None or fitted.validation < best.fitted.validation:
            best = Searched(fitted, given, tried)
        console.print(f'  validation {fitted.validation:.4f}, best so far {best.fitted.validation:.4f}')
    assert best is not None         # the first is never given up
    tried[[entry['validation'] for entry in tried].index(best.fitted.validation)]['kept'] = True
    return best


def _report_to(trial: Any, entry: dict[str, Any], given_up: type[Exception]) -> Callable[[int, float], None]:
    def after_epoch(number: int, validation: float) -> None:
        entry['passes'] = number
        trial.report(validation, number)
        if trial.should_prune():
            raise given_up

    return after_epoch


def _settings(options: FitOptions) -> dict[str, Any]:
    """The given values of what is searched."""
    sizes = {'hidden': options.encoder.hidden, 'layers': options.encoder.layers, 'dropout': options.encoder.dropout}
    return (sizes if _sized(options) else {}) | {
        'learning_rate': options.learning_rate, 'weight_decay': options.weight_decay,
        'counters_decay': options.counters_decay, 'rows_per_epoch': options.rows_per_epoch}


def _sized(options: FitOptions) -> bool:
    """Whether sizes are searched: pretrained weights have fixed ones."""
    return options.backbone.name == 'events' and options.start_from is None


def _suggested(trial: Any, options: FitOptions) -> FitOptions:
    """The options of the next trial; ranges lie around the given values."""
    encoder = options.encoder
    if _sized(options):
        widths = [encoder.hidden // 2 // encoder.heads * encoder.heads or encoder.heads, encoder.hidden,
                  encoder.hidden * 3 // 2 // encoder.heads * encoder.heads]
        hidden = trial.suggest_categorical('hidden', widths)
        encoder = replace(
            encoder, hidden=hidden, intermediate=max(1, encoder.intermediate * hidden // encoder.hidden),
            layers=trial.suggest_int('layers', 1, encoder.layers + 1),
            dropout=trial.suggest_float('dropout', 0.0, max(0.3, encoder.dropout)))

    def near(name: str, value: float, times: float) -> float:
        if value == 0:      # switched off
            return 0.0
        return trial.suggest_float(name, value / times, value * times, log=True)

    return replace(
        options, encoder=encoder, learning_rate=near('learning_rate', options.learning_rate, 5),
        weight_decay=near('weight_decay', options.weight_decay, 10),
        counters_decay=near('counters_decay', options.counters_decay, 10),
        rows_per_epoch=trial.suggest_categorical('rows_per_epoch', [
            max(1, options.rows_per_epoch // 2), options.rows_per_epoch, options.rows_per_epoch * 2]))


def _optuna() -> Any:
    try:
        return importlib.import_module('optuna')
    except ModuleNotFoundError as error:
        raise UsageError('A search needs optuna, which is not installed.',
                         do=INSTALL_TRAINING) from error
