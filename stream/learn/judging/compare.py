"""The model beside its contenders, on people and days that none of them has seen: read from top to bottom.

    1 cut-offs   times T of the recording: what was before T is known, what came after it is to be foretold
    2 folds      users are cut into parts by a hash of their id; each part is scored by what the other parts taught
    3 training   the model and the contenders on the same moments, as it was just before T: a label that is not settled
                 by then is not known
    4 scoring    the part's users as of T; the model through its exported graph, as it is served
    5 figures    of all parts together (stream.learn.judging.judge)

A fold of a cut-off needs nothing of the others: they run in several processes, each on one thread, and the figures do
not depend on how many processes there are.
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

    folds               parts of the users
    contender_rows_max  cut-offs that the contenders learn from at most, drawn from those that the model learns from
    resamples           of the bootstrap
    processes           at a time; 1: none but this one
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
    """What a part's users were given, n of them.

    user      int64 [n], places in the history's `user_ids`
    chances   by task and contender
    spend     by horizon and contender, float64 [n]; empty where there is no money, or too little settled spend to learn
              from
    tiers     by contender, [n, tiers]; as `spend`
    tier      int64 [n], what it came to be; -1: not settled
    ranked    by column and contender how well each ranked what was bought next, of whoever bought something
    left_out  (task, contender, reason) where one could not be fitted
    training  its figures, ready for JSON
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

    say      is given a line about each part when it is done
    Errors   UsageError where a cut-off leaves nothing to learn or to foretell.
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
    """Which part of the users somebody is in."""
    return part_of(user_id, [1 / options.folds] * (options.folds - 1), options.seed + _FOLD_SEED)


def score_fold(history: History, at_ms: int, part: int, tasks: list[Task], options: CompareOptions) -> FoldScores:
    """Train on the users of the other parts as it was just before a cut-off; score those of this one."""
    with threadpool_limits(1):      # the processes are as many as the cores; and a sum in another order is another sum
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
    """What gives a function's answers to jobs, in their order."""
    if processes == 1:
        yield lambda function, jobs: (function(*job) for job in jobs)
        return
    # Forked, a process would inherit the threads' locks, but not the threads.
    with ProcessPoolExecutor(processes, get_context('spawn'), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield lambda function, jobs: pool.map(function, *zip(*jobs, strict=True))
        except BaseException:
            for process in active_children():       # else the pool would wait for what nobody asks for any more
                process.terminate()
            raise


# ---- 3 training -----------------------------------------------------------------------------------------------------

def _contender_table(data: Examples, as_of: Examples, options: CompareOptions) -> Table:
    """What contenders learn from: the cut-offs that the model learns from, and the training users as of T. Nobody knows
    the labels of these, but to BG/NBD a user's orders so far are all there is."""
    rows = np.flatnonzero(data.kind == SnapshotKind.CUTOFF)
    if len(rows) > options.contender_rows_max:
        rows = np.sort(np.random.default_rng(options.seed).choice(rows, options.contender_rows_max, replace=False))
    parts = Table.of_examples(data).take(rows), Table.of_examples(as_of)
    return Table(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(Table)))


class _Contenders:
    """All contenders, fitted to `train` when a task is asked for, and their scores of `test`.

    left_out        (task, contender, reason) where one could not be fitted
    network_curves  of each task the loss of the network by passes: of the training users, of the validation users
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
        """By name, as they answer the task.

        Of a horizon that too few labels settle the regressions, trees and networks learn the longest one that is
        settled, and then only rank. BG/NBD foretells any horizon.
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
        """By name, within a horizon. Of one that too few labels settle trees and networks learn the longest one that is
        settled, and foretell as if it went on like that."""
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
        """By name, of the tier of the next 90 days' spend."""
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
    """By task: the model's chances as they are served, `purchase` [n, horizons], and how each branch alone ranks."""
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
    """(name, what judges it, its arguments) of each question about a cut-off, all parts together."""
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
    """Whoever answered in each part, by name; `rows` of all parts."""
    return {name: Predictions(np.concatenate([part[name].scores for part in parts])[rows],
                         all(part[name].is_chance for part in parts)) for name in _in_all(parts)}


def _in_all(parts: Sequence[Mapping[Any, Any]]) -> list[Any]:
    """The keys that are in each part, in their order."""
    return [name for name in parts[0] if all(name in part for part in parts)]


def _judge(judge: Callable[..., dict], arguments: tuple) -> dict:
    return judge(*arguments)
