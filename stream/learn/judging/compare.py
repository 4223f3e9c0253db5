"""Compare the model with contenders on users and days that none of them has seen. Read from top to bottom.

    1 cut-offs   times of the recording: events before a cut-off are known, later ones are to be predicted
    2 folds      users are split by a hash of their id; each fold is scored by models trained on the other folds
    3 training   the model and the contenders on the same snapshots, with the labels settled before the cut-off
    4 scoring    the fold's users as of the cut-off, the model through its exported graph, as it is served
    5 figures    of all folds together (stream.learn.judging.judge)

The folds of a cut-off are independent. They run in several processes with one thread each; the figures do not depend
on the number of processes.
"""
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from io import StringIO
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from threadpoolctl import threadpool_limits

from stream.core.layout import WindowLimits
from stream.errors import UsageError
from stream.learn.calibrate import SETTLED_ROWS_MIN
from stream.learn.checkpoint import some_windows
from stream.learn.dataset import (
    ACTIVE_DAYS,
    HORIZON_DAYS,
    NEXT_DAYS,
    SPEND,
    Examples,
    History,
    SnapshotKind,
    at_time,
    part_of,
    tier_of,
)
from stream.learn.fit import FitOptions, Fitted, fit, rows_max, window_logits
from stream.learn.graph import write_graph
from stream.learn.inference import score
from stream.learn.judging.baselines import (
    BuyTillYouDie,
    Network,
    SpendNetwork,
    SpendTrees,
    TierRegression,
    purchase_contenders,
    spend_contenders,
)
from stream.learn.judging.judge import (
    COMMONEST,
    COUNTERS,
    MODEL,
    PAST_TIER,
    WINDOW,
    Predictions,
    judge_chances,
    judge_spend,
    judge_tiers,
    spend_forecasts,
)
from stream.learn.judging.ranking import ASKED_MIN, RankedFold, judge_ranking, rank
from stream.learn.judging.sasrec import SasRecOptions
from stream.learn.judging.simple_rules import Table, past_tier, spend_rules
from stream.learn.judging.tasks import Cutoff, Task, day_of, known_until, segments, spend_horizons, truth_of
from stream.learn.ranking.export import write_ranking
from stream.learn.ranking.next_items import rankings
from stream.learn.ranking.past_items import BUCKETS

_FOLD_SEED = 1 << 32                # far from the seed of training, whose validation users are cut by the same hash


@dataclass(frozen=True)
class CompareOptions:
    """How to compare.

    folds               folds of the users
    contender_rows_max  most snapshots that contenders learn from, drawn from the cut-offs that the model learns from
    resamples           bootstrap resamples
    processes           processes at a time; 1: only this one
    """

    seed: int = 7
    folds: int = 3
    contender_rows_max: int = 60_000
    resamples: int = 300
    processes: int = 1
    fit: FitOptions = field(default_factory=FitOptions)
    sasrec: SasRecOptions = field(default_factory=SasRecOptions)
    limits: WindowLimits = field(default_factory=WindowLimits)


@dataclass(frozen=True)
class FoldScores:
    """Predictions for the n users of a fold.

    user      int64 [n], indices into the history's `user_ids`
    chances   by task and contender
    spend     by horizon and contender, float64 [n]; empty without prices, or with too little settled spend
    tiers     by contender, [n, tiers]; empty like `spend`
    tier      int64 [n], the true tier; -1: not settled
    ranked    by column and contender, how well each ranked what was bought next, for the users who bought something
    left_out  (task, contender, reason) of contenders that could not be fitted
    training  figures of the training, ready for JSON
    """

    user: np.ndarray
    chances: dict[str, dict[str, Predictions]]
    spend: dict[int, dict[str, np.ndarray]]
    tiers: dict[str, Predictions]
    tier: np.ndarray
    ranked: dict[str, RankedFold]
    left_out: list[tuple[str, str, str]]
    training: dict[str, Any]


def compare(history: History, cutoffs_ms: Sequence[int], options: CompareOptions, say: Callable[[str], None]) -> dict:
    """All figures, ready for JSON.

    say      prints a line when a fold is done
    Errors   UsageError where a cut-off leaves no events before or after it.
    Promise  on one machine the same options give the same figures.
    """
    began = time.monotonic()
    cutoffs = [Cutoff.of(history, at_ms, options.limits) for at_ms in cutoffs_ms]
    jobs = [(history, cutoff.at_ms, part, cutoff.tasks, options) for cutoff in cutoffs for part in range(options.folds)]
    found: dict[int, list[FoldScores]] = {cutoff.at_ms: [] for cutoff in cutoffs}
    with runner(min(options.processes, len(jobs))) as run:
        for (_, at_ms, part, *_), scores in zip(jobs, run(score_fold, jobs), strict=True):
            found[at_ms].append(scores)
            training = scores.training
            say(f'{day_of(at_ms)}, part {part + 1} of {options.folds}: {len(scores.user):,} users scored by what '
                f'{training["users"]:,} others taught ({training["moments"]:,} moments, best pass '
                f'{training["best_epoch"]} of {len(training["epochs"])}), after {time.monotonic() - began:.0f} s')
        questions = [(cutoff.at_ms, *question) for cutoff in cutoffs
                     for question in _questions(cutoff, found[cutoff.at_ms], options)]
        judged = list(run(_judge, [question[2:] for question in questions]))
    say(f'{options.resamples} resamples of the users for {len(questions)} questions, '
        f'after {time.monotonic() - began:.0f} s')
    answers = {(at_ms, name): figures for (at_ms, name, *_), figures in zip(questions, judged, strict=True)}
    return {
        'recording': {'events': len(history), 'users': len(history.user_ids), 'refused': history.refused,
                      'first_ms': history.start_ms, 'last_ms': history.end_ms, 'priced': history.priced},
        'protocol': {'folds': options.folds, 'seed': options.seed, 'resamples': options.resamples,
                     'cleaning': options.fit.clean, 'learning': asdict(options.fit),
                     'contender_rows_max': options.contender_rows_max, 'active_days': ACTIVE_DAYS},
        'cutoffs': [{
            'at_ms': cutoff.at_ms, 'users': len(cutoff.asked), 'active': int(cutoff.asked.active.sum()),
            'tasks': [task.words() | answers[cutoff.at_ms, task.name] for task in cutoff.tasks],
            'spend': [{'days': days} | answers[cutoff.at_ms, f'spend_{days}d'] for days in HORIZON_DAYS
                      if (cutoff.at_ms, f'spend_{days}d') in answers],
            'tier': answers.get((cutoff.at_ms, 'tier')),
            'ranking': [{'column': column, 'days': NEXT_DAYS} | answers[cutoff.at_ms, f'next_{column}']
                        for column in BUCKETS if (cutoff.at_ms, f'next_{column}') in answers],
            'skipped': [task.words() | {'reason': reason} for task, reason in cutoff.skipped],
            'left_out': [{'task': task, 'contender': name, 'reason': reason} for task, name, reason
                         in sorted({left for scores in found[cutoff.at_ms] for left in scores.left_out})],
            'training': [scores.training for scores in found[cutoff.at_ms]],
        } for cutoff in cutoffs],
    }


# ---- 2 folds --------------------------------------------------------------------------------------------------------

def fold_of(user_id: str, options: CompareOptions) -> int:
    """The fold of a user."""
    return part_of(user_id, [1 / options.folds] * (options.folds - 1), options.seed + _FOLD_SEED)


def score_fold(history: History, at_ms: int, part: int, tasks: list[Task], options: CompareOptions) -> FoldScores:
    """Train on the users of the other folds, on events before the cut-off; score the users of this fold."""
    with threadpool_limits(1):      # there is a process per core, and another order of a sum would change it
        known = history.before(at_ms)
        learners = [user for user, user_id in enumerate(known.user_ids) if fold_of(user_id, options) != part]
        fitted = fit(known, learners, at_ms, replace(options.fit, seed=options.seed), options.limits,
                     Console(file=StringIO()))
        as_of = at_time(known, fitted.users, at_ms, options.limits, at_ms)
        train = _contender_table(fitted.data, as_of, options)

        held_out = [user for user, user_id in enumerate(history.user_ids) if fold_of(user_id, options) == part]
        test = at_time(history, held_out, at_ms, options.limits, known_until(history))
        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder) / 'model.onnx'
            write_graph(fitted.model, some_windows(test), graph)
            served = score(graph, test.inputs, rows_max(fitted.model))
            ranked = {}
            if fitted.recommender is not None:
                write_ranking(fitted.recommender, graph)
                ranked = rank(known, learners, history, test, rankings(graph, history, test), options.sasrec,
                              options.seed, known_until(history))

        contenders = _Contenders(train, Table.of_examples(test), known.priced, options.seed)
        own = _model_chances(fitted, served['purchase'].astype(float), test, tasks)
        chances = {task.name: own[task.name] | contenders.chances(task) for task in tasks}
        spend, tiers = {}, {}
        before = tier_of(fitted.data.labels.spend[fitted.data.kind == SnapshotKind.CUTOFF], fitted.tier_edges)
        settled = before >= 0
        if known.priced and settled.sum() >= SETTLED_ROWS_MIN:
            spend = {horizon: spend_forecasts(served, HORIZON_DAYS[horizon], HORIZON_DAYS) | contenders.spend(horizon)
                     for horizon in spend_horizons(test)}
            shares = np.bincount(before[settled], minlength=fitted.model.tiers) / settled.sum()
            tiers = {MODEL: Predictions(served['tier_probabilities'].astype(float), True),
                     COMMONEST: Predictions(np.tile(shares, (len(test), 1)), True),
                     **contenders.tiers(fitted.tier_edges)}
    return FoldScores(
        test.user, chances, spend, tiers, tier_of(test.labels.spend, fitted.tier_edges), ranked,
        contenders.left_out,
        {'users': len(fitted.users), 'removed': fitted.removed, 'moments': len(fitted.data),
         'contender_rows': len(train) - len(as_of),
         'epochs': fitted.epochs, 'best_epoch': fitted.best_epoch, 'tier_edges': fitted.tier_edges.tolist(),
         'network': contenders.network_curves})


@contextmanager
def runner(processes: int) -> Iterator[Callable[[Callable, list[tuple]], Iterator[Any]]]:
    """A function that maps another one over jobs, in processes, and gives the results in order."""
    if processes == 1:
        yield lambda function, jobs: (function(*job) for job in jobs)
        return
    # Forked, a process would inherit the threads' locks, but not the threads.
    with ProcessPoolExecutor(processes, get_context('spawn'), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield lambda function, jobs: pool.map(function, *zip(*jobs, strict=True))
        except BaseException:
            for process in active_children():       # else the pool would wait for results that are not needed
                process.terminate()
            raise


# ---- 3 training -----------------------------------------------------------------------------------------------------

def _contender_table(data: Examples, as_of: Examples, options: CompareOptions) -> Table:
    """The contenders' training rows: the cut-offs that the model learns from, and the training users as of the cut-off.
    The latter have no labels yet, but BG/NBD needs only a user's orders so far."""
    rows = np.flatnonzero(data.kind == SnapshotKind.CUTOFF)
    if len(rows) > options.contender_rows_max:
        rows = np.sort(np.random.default_rng(options.seed).choice(rows, options.contender_rows_max, replace=False))
    parts = Table.of_examples(data).take(rows), Table.of_examples(as_of)
    return Table(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(Table)))


class _Contenders:
    """All contenders, fitted to `train` when a task needs them, and their scores of `test`.

    left_out        (task, contender, reason) of contenders that could not be fitted
    network_curves  for each task the network's loss per epoch: on training users, on validation users
    """

    def __init__(self, train: Table, test: Table, priced: bool, seed: int) -> None:
        self._test = test
        self._seed = seed
        self._train = train
        self._active = train.take((train.orders > 0) & (train.age_days - train.recency_days <= ACTIVE_DAYS))
        self._priced = priced
        self._scores: dict[tuple[str, int, bool], np.ndarray] = {}
        self.left_out: list[tuple[str, str, str]] = []
        self.network_curves: dict[str, dict[str, list[float]]] = {}

    def chances(self, task: Task) -> dict[str, Predictions]:
        """Predictions for a task by contender.

        If too few labels settle the horizon, regressions, trees and networks learn the longest settled one, and then
        only rank. BG/NBD predicts any horizon.
        """
        answers = {}
        for name, contender in purchase_contenders(self._seed).items():
            if name in spend_rules() and not self._priced:
                continue
            lawful = isinstance(contender, BuyTillYouDie)
            taught = task.horizon if lawful else self._taught(task.horizon)
            key = name, taught, task.churn
            try:
                if key not in self._scores:
                    contender.fit(self._active if task.churn and not lawful else self._train, taught)
                    self._scores[key] = contender.predict(self._test)
                    if isinstance(contender, Network):
                        self.network_curves[task.name] = {
                            'train': list(map(float, contender.loss_curve)),
                            'validation': contender.validation_curve}
            except UsageError as error:
                self.left_out.append((task.name, name, error.problem))
                continue
            scored = Predictions(self._scores[key], contender.is_chance and taught == task.horizon)
            answers[name] = scored.complement() if task.churn else scored
        return answers

    def spend(self, horizon: int) -> dict[str, np.ndarray]:
        """Spend forecasts by contender. If too few labels settle the horizon, trees and networks learn the longest
        settled one and extrapolate."""
        answers = {}
        for name, contender in spend_contenders(self._seed).items():
            learner = isinstance(contender, SpendTrees | SpendNetwork)
            taught = self._taught(horizon) if learner else horizon
            try:
                answers[name] = contender.fit(self._train, taught).predict(self._test) * (
                    HORIZON_DAYS[horizon] / HORIZON_DAYS[taught])
            except UsageError as error:
                self.left_out.append((f'spend_{HORIZON_DAYS[horizon]}d', name, error.problem))
        return answers

    def tiers(self, edges: np.ndarray) -> dict[str, Predictions]:
        """Predictions of the tier of the next 90 days' spend, by contender."""
        answers = {PAST_TIER: Predictions(past_tier(self._test, edges), False)}
        try:
            contender = TierRegression(self._seed, edges).fit(self._train, SPEND)
            answers['logistic regression'] = Predictions(contender.predict(self._test), True)
        except UsageError as error:
            self.left_out.append(('tier', 'logistic regression', error.problem))
        return answers

    def _taught(self, horizon: int) -> int:
        known = (~np.isnan(self._train.bought[:, :horizon + 1])).sum(0)
        return int(np.flatnonzero(known >= SETTLED_ROWS_MIN).max(initial=0))


# ---- 4 scoring ------------------------------------------------------------------------------------------------------

def _model_chances(fitted: Fitted, purchase: np.ndarray, test: Examples, tasks: list[Task],
                   ) -> dict[str, dict[str, Predictions]]:
    """By task: the served probabilities, `purchase` [n, horizons], and the scores of each branch alone."""
    window = window_logits(fitted.model, test, np.arange(len(test))).numpy()
    with torch.no_grad():
        counters = fitted.model.counters(torch.from_numpy(test.inputs.counters)).numpy()
    answers = {}
    for task in tasks:
        source = int(fitted.model.told_from[task.horizon])
        by_name = {MODEL: Predictions(purchase[:, task.horizon], True),
                   WINDOW: Predictions(window[:, source].astype(float), False),
                   COUNTERS: Predictions(counters[:, source].astype(float), False)}
        answers[task.name] = {name: scored.complement() if task.churn else scored
                              for name, scored in by_name.items()}
    return answers


# ---- 5 figures ------------------------------------------------------------------------------------------------------

def _questions(cutoff: Cutoff, found: list[FoldScores], options: CompareOptions) -> Iterator[tuple]:
    """(name, judge, its arguments) of each question about a cut-off, all folds together."""
    asked = cutoff.asked
    order = np.argsort(np.concatenate([scores.user for scores in found]))       # the order of `asked`
    drawn = options.resamples, options.seed
    kinds = segments(asked)
    for task in cutoff.tasks:
        truth = truth_of(asked, task)
        rows = ~np.isnan(truth)
        by_name = _together([scores.chances[task.name] for scores in found], order[rows])
        yield task.name, judge_chances, (by_name, truth[rows], {
            words: chosen[rows] for words, chosen in kinds.items() if chosen[rows].any()}, *drawn)
    for column in _in_all([scores.ranked for scores in found]):
        parts = [scores.ranked[column] for scores in found]
        joined = {name: {metric: np.concatenate([part[name][metric] for part in parts]) for metric in parts[0][name]}
                  for name in _in_all(parts)}
        if len(joined[MODEL]['ndcg']) >= ASKED_MIN:
            yield f'next_{column}', judge_ranking, (joined, *drawn)
    for horizon in _in_all([scores.spend for scores in found]):
        parts = [scores.spend[horizon] for scores in found]
        amounts = {name: np.concatenate([part[name] for part in parts])[order] for name in _in_all(parts)}
        yield f'spend_{HORIZON_DAYS[horizon]}d', judge_spend, (
            amounts, asked.labels.spent[:, horizon].astype(float), *drawn)
    if np.isnan(asked.labels.spend).any():
        return
    tiers = _together([scores.tiers for scores in found], order)
    if MODEL in tiers:
        yield 'tier', judge_tiers, (tiers, np.concatenate([scores.tier for scores in found])[order], *drawn)


def _together(parts: list[dict[str, Predictions]], rows: np.ndarray) -> dict[str, Predictions]:
    """The contenders that scored every fold, by name. `rows` are those of all folds."""
    return {name: Predictions(np.concatenate([part[name].scores for part in parts])[rows],
                         all(part[name].is_chance for part in parts)) for name in _in_all(parts)}


def _in_all(parts: Sequence[Mapping[Any, Any]]) -> list[Any]:
    """The keys that every part has, in order."""
    return [name for name in parts[0] if all(name in part for part in parts)]


def _judge(judge: Callable[..., dict], arguments: tuple) -> dict:
    return judge(*arguments)
