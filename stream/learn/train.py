"""A recording in, a checkpoint out. Read from top to bottom.

    1 history      the recording, up to a time; later events do not count
    2 test         fit without the test's users and days, after a search if one is asked for (stream.learn.search);
                   export the graph and judge it (stream.learn.judging.evaluate)
    3 ceiling      for a simulated shop: the best possible scores (stream.simulator.posterior)
    4 refit        fit again on all users and days: the model that is kept
    5 checkpoint   weights, options and figures (stream.learn.checkpoint)

The splits share neither users nor time: no training label reaches into the days of the test.
"""
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from stream.core.events import EventRules
from stream.core.layout import DAY_MS, WindowLimits
from stream.errors import UsageError
from stream.learn import dataset
from stream.learn.checkpoint import Checkpoint, save, some_training_windows, some_windows
from stream.learn.dataset import HORIZON_DAYS, ExampleOptions, Examples, History
from stream.learn.epochs import device_name
from stream.learn.fit import FitOptions, Fitted, check_fit, fit, rows_max
from stream.learn.graph import write_graph
from stream.learn.inference import score
from stream.learn.judging.evaluate import evaluate, evaluate_ranking
from stream.learn.judging.quality import auc, ece
from stream.learn.search import search
from stream.learn.training_log import TrainingLog
from stream.scoring.artefact import LAYOUT
from stream.simulator.posterior import posteriors
from stream.simulator.shop import SimulatorOptions, simulate

UNFINISHED = 'unfinished'     # folder of a training's states while it runs
_CEILING_MOMENTS = 1_500    # their posterior takes a minute
_TEST_MOMENTS = ExampleOptions(cutoffs_per_user=6, moments_per_user=4.0)
TIERS_MAX = 20
_TIER_NAMES = {2: ('nothing', 'some'), 3: ('nothing', 'low', 'high'), 4: ('nothing', 'low', 'middle', 'high'),
               5: ('nothing', 'low', 'middle', 'high', 'top')}


@dataclass(frozen=True)
class TrainOptions:
    """What to learn from, and how.

    events       event JSON in the order in which the worker would read it; read once
    source       the data in words, for the model card
    command      the command that reproduces this training, for the model card
    limits       bounds of the window; serve with the same ones
    fit          options of the fit; its seed is replaced by `seed`
    until_ms     events at or after this time do not count; None: the whole recording
    test_users   share of the users that only the test uses
    test_time    share of the time, at its end, that only the test uses
    trials       trials of a search (stream.learn.search); 0: no search
    resume       whether to resume an interrupted training
    curves       folder for TensorBoard's curves; None: write none
    refit        whether the kept model is trained again on all users and days, after the test
    simulator    options of the simulated shop, for the ceiling
    """

    events: Iterable[bytes]
    source: str
    command: str
    seed: int = 7
    rules: EventRules = field(default_factory=EventRules)
    limits: WindowLimits = field(default_factory=WindowLimits)
    until_ms: int | None = None
    fit: FitOptions = field(default_factory=FitOptions)
    test_users: float = 0.25
    test_time: float = 0.25
    trials: int = 0
    refit: bool = True
    resume: bool = False
    curves: Path | None = None
    simulator: SimulatorOptions | None = None


def simulated(shoppers: int, days: int, seed: int) -> TrainOptions:
    """Options for training on a simulated shop, as for the shipped model (`stream train --simulate`). There is enough
    data for larger epochs, and for keeping the model that was judged."""
    shop = SimulatorOptions(shoppers=shoppers, days=days, seed=seed)
    return TrainOptions(
        simulate(shop).lines(), source=f'{shoppers:,} simulated shoppers over {days} days (seed {seed})',
        command=f'stream train --simulate {shoppers} --days {days} --seed {seed} --out DIR', seed=seed,
        fit=FitOptions(rows_per_epoch=24_000), refit=False, simulator=shop)


def train(options: TrainOptions, out: Path, console: Console | None = None) -> dict:
    """Train a model, write its checkpoint into the directory `out`, and return its figures.

    Errors   UsageError where the events hold nothing to learn from.
    Promise  on one machine the same options give the same bytes, except for the seconds in metrics.json, interrupted
             and resumed or not. While it runs, `out`/UNFINISHED holds the state to resume from.
    """
    console = console or Console(stderr=True, soft_wrap=True)
    began = time.monotonic()

    fitting = replace(options.fit, seed=options.seed)
    names = tier_names(fitting.tiers)
    check_fit(fitting)      # before minutes of reading
    log = TrainingLog(out / UNFINISHED, options.resume, options.curves)
    if not options.resume:
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)

    # 1 history

    console.print(f'Examples from {options.source}')
    history = dataset.read(options.events, options.rules)
    if options.until_ms is not None:
        history = history.before(options.until_ms)
    known_until_ms = history.end_ms + 1 if options.until_ms is None else options.until_ms
    console.print(f'  {len(history):,} events of {len(history.user_ids):,} users, {history.refused:,} records refused')

    # 2 test

    cut_ms = known_until_ms - int(options.test_time * (known_until_ms - history.start_ms)) // DAY_MS * DAY_MS
    seen, learners, test_users = split(history, cut_ms, options.test_users, options.seed)
    console.print('Without the users and days of the test')
    trials: list[dict] = []
    if options.trials:
        found_best = search(seen, learners, cut_ms, fitting, options.limits, options.trials, console,
                            log.part('test'))
        fitted, fitting, trials = found_best.fitted, found_best.options, found_best.trials
    else:
        fitted = fit(seen, learners, cut_ms, fitting, options.limits, console, log.part('test'))
    test = dataset.sample(history, test_users, cut_ms, known_until_ms, _TEST_MOMENTS, options.limits, options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / 'model.onnx'
        write_graph(fitted.model, some_windows(test), graph)
        answers = score(graph, test.inputs, rows_max(fitted.model))
        figures = evaluate(fitted, answers, test, options.seed)
        for task, contenders in figures['tasks'].items():
            for name, numbers in contenders.items():
                console.print(f'  {task:28} {name:20} ' + '  '.join(
                    f'{metric} {value:.3f} ({low:.3f} .. {high:.3f})'
                    for metric, (value, low, high) in numbers['metrics'].items()))

        ranking = evaluate_ranking(fitted, seen, history, test_users, cut_ms, options.limits, known_until_ms,
                                   options.seed)

        # 3 ceiling

        ceiling = {}
        if options.simulator is not None:
            console.print("The simulator's own chances")
            ceiling = _ceiling(options.simulator, history, test, answers['purchase'], options.seed)

    # 4 refit

    counts = {'train_users': len(np.unique(fitted.data.user)), 'train_moments': len(fitted.data),
             'test_users': len(np.unique(test.user)), 'test_moments': len(test)}
    if options.refit:
        console.print('With all users and days')
        fitted = fit(history, range(len(history.user_ids)), known_until_ms, fitting, options.limits, console,
                     log.part('refit'))

    # 5 checkpoint

    found = {'test': figures, 'ranking': ranking, 'ceiling': ceiling, 'trials': trials,
             'pretraining': fitted.pretraining, 'epochs': fitted.epochs, 'best_epoch': fitted.best_epoch,
             'device': device_name(),
             'seconds': round(time.monotonic() - began)}
    config = _config(replace(options, fit=fitting), history, fitted, names, known_until_ms, cut_ms, counts)
    save(Checkpoint(fitted.model, config, found, some_windows(test),
                    some_training_windows(fitted.data, options.seed), fitted.recommender), out)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)     # a search leaves none
    console.print(f'checkpoint in {out}, {found["seconds"]} s')
    return found


def split(history: History, cut_ms: int, test_share: float, seed: int) -> tuple[History, list[int], list[int]]:
    """The history before the test's days, the training users (indices into that), and the test's users (indices into
    `history`)."""
    seen = history.before(cut_ms)

    def tests(user_id: str) -> bool:
        return dataset.part_of(user_id, (test_share,), seed + 1) == 0

    return (seen, [user for user, user_id in enumerate(seen.user_ids) if not tests(user_id)],
            [user for user, user_id in enumerate(history.user_ids) if tests(user_id)])


def _ceiling(simulator: SimulatorOptions, history: History, test: Examples, purchase: np.ndarray, seed: int) -> dict:
    """AUC of the recency rule, the model and the posterior, for each horizon and on the same snapshots.
    `share`: how far the model gets from the rule to the posterior."""
    rng = np.random.default_rng(seed)
    users = rng.permutation(np.unique(test.user))
    counts = np.cumsum(np.bincount(test.user)[users])
    users = np.sort(users[:int(np.searchsorted(counts, _CEILING_MOMENTS)) + 1])
    rows = [np.flatnonzero(test.user == user) for user in users]
    best = np.concatenate(posteriors([(history.events[user], test.as_of_ms[mine].tolist())
                                      for user, mine in zip(users, rows, strict=True)], simulator, rng))
    chosen = np.concatenate(rows)
    header = test.snapshots.headers[chosen]
    recency = np.where(header['orders'] > 0, header['last_order_ms'] - test.as_of_ms[chosen], -np.inf)
    found = {}
    for horizon, days in enumerate(HORIZON_DAYS[:best.shape[1]]):
        truth = test.labels.bought[chosen, horizon]
        known = ~np.isnan(truth)
        if not known.any():
            continue
        rule, model, top = (auc(scores[known], truth[known])
                            for scores in (recency, purchase[chosen, horizon], best[:, horizon]))
        found[f'purchase within {days} d'] = {
            'moments': int(known.sum()), 'recency rule': rule, 'model': model, 'posterior': top,
            'posterior_ece': ece(best[known, horizon], truth[known]), 'share': (model - rule) / (top - rule)}
    return found


def _config(options: TrainOptions, history: History, fitted: Fitted, names: list[str], known_until_ms: int, cut_ms: int,
            counts: dict[str, int]) -> dict:
    fitting = asdict(options.fit)
    backbone = options.fit.backbone
    fitting['backbone'] |= {'source': _called(backbone.source), 'catalogue': _called(backbone.catalogue)}
    return {
        'source': options.source, 'command': options.command, 'seed': options.seed,
        'currency': options.rules.currency,
        'window': {'events_max': options.limits.events_max, 'span_ms': options.limits.span_ms,
                   'silence_ms': list(options.limits.silence_ms)},
        'learning': fitting, 'refit': options.refit, 'removed': fitted.removed,
        'tiers': {'names': names, 'edges': fitted.tier_edges.tolist()}, 'priced': history.priced,
        'data': {'users': len(history.user_ids), 'events': len(history), 'refused': history.refused,
                 'start_ms': history.start_ms, 'cut_ms': cut_ms, 'known_until_ms': known_until_ms,
                 'moments': len(fitted.data), **counts},
        'layout': msgspec.to_builtins(LAYOUT),
    }


def tier_names(tiers: int) -> list[str]:
    """Names of the spend tiers, lowest first. Errors: UsageError if there are too few or too many."""
    if not 2 <= tiers <= TIERS_MAX:
        raise UsageError(f'There cannot be {tiers} tiers of spend.', do=f'choose 2 to {TIERS_MAX}.')
    return list(_TIER_NAMES.get(tiers) or ('nothing', *(f'tier {tier}' for tier in range(1, tiers))))


def _called(source: str | None) -> str | None:
    """A file or folder by its name without its path; a Hugging Face id as it is."""
    return Path(source).name if source and Path(source).exists() else source
