"""The figures of the model card: a model on users and days that it has not seen, beside rules that anyone could run.

Every figure is a list [value, low, high], see `stream.learn.judging.quality`. `model_less` is the model's figure less
the baseline's, over the same resamples.

    recency rule         minus the days since the last order; users without an order come last
    logistic regression  on the normalised counters, trained on the same examples
    spend of 90 days     the spend of the 90 days before, for spend
    median of training   the median spend of training, the same for everybody: a baseline of the mean error
    nothing              no spend for everybody
    most common tier     of the training rows

Churn is judged for active users: those who bought within the 90 days before. `stream compare` has more contenders.
"""
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stream.core.layout import WindowLimits
from stream.learn.dataset import CHURN, HORIZON_DAYS, INTENT, Examples, History, SnapshotKind, at_time, tier_of
from stream.learn.fit import Fitted
from stream.learn.judging.baselines import purchase_contenders
from stream.learn.judging.judge import MODEL, beside_model
from stream.learn.judging.quality import (
    AMOUNT,
    BINARY,
    CLASSES,
    RANKING,
    Metric,
    auc,
    calibration,
    ece,
    mean_absolute_error,
    resamples,
)
from stream.learn.judging.ranking import ASKED_MIN, judge_ranking, rank
from stream.learn.judging.simple_rules import Table
from stream.learn.ranking.export import write_ranking
from stream.learn.ranking.next_items import rankings

RESAMPLES = 200
POSITIVES_MIN = 20      # fewer tell nothing


def evaluate(fitted: Fitted, answers: Mapping[str, np.ndarray], test: Examples, seed: int) -> dict[str, Any]:
    """All numbers of the model card, ready for JSON. `answers`: those of the model's exported graph to `test`."""
    purchase, tiers = answers['purchase'].astype(float), answers['tier_probabilities'].astype(float)
    spend, typical = (answers[name][:, 0].astype(float) for name in ('expected_spend', 'typical_spend'))
    bought, labels = test.labels.bought, test.labels
    train, asked = Table.of_examples(fitted.data), Table.of_examples(test)

    def beside(truth: np.ndarray, contenders: Mapping[str, tuple[np.ndarray, Mapping[str, Metric]]],
                rows: np.ndarray) -> dict[str, dict]:
        chosen = {name: (scores[rows], rules) for name, (scores, rules) in contenders.items()}
        return beside_model(chosen, truth[rows], resamples(test.user[rows], RESAMPLES, seed))

    tasks: dict[str, dict] = {}
    rates: dict[str, float] = {}
    for horizon, days in enumerate(HORIZON_DAYS):
        known = ~np.isnan(bought[:, horizon])
        if min(bought[known, horizon].sum(), (1 - bought[known, horizon]).sum()) < POSITIVES_MIN:
            continue
        contenders = {MODEL: (purchase[:, horizon], BINARY)}
        for name, rules in (('recency rule', RANKING), ('logistic regression', BINARY)):
            contenders[name] = purchase_contenders(seed)[name].fit(train, horizon).predict(asked), rules
        tasks[f'purchase within {days} d'] = beside(bought[:, horizon], contenders, known)
        rates[f'purchase within {days} d'] = float(bought[known, horizon].mean())
        active = known & test.active
        buyers = bought[active, horizon].sum()
        if days in (30, 90) and min(buyers, active.sum() - buyers) >= POSITIVES_MIN:
            turned = {name: (1 - scores if rules is BINARY else -scores, rules)
                      for name, (scores, rules) in contenders.items()}
            tasks[f'churn within {days} d, active'] = beside(1 - bought[:, horizon], turned, active)
            rates[f'churn within {days} d, active'] = float(1 - bought[active, horizon].mean())
    known = ~np.isnan(labels.spend)
    if (labels.spend[known] > 0).sum() >= POSITIVES_MIN:
        tier = tier_of(labels.spend, fitted.tier_edges)
        seen = tier_of(fitted.data.labels.spend, fitted.tier_edges)
        shares = np.bincount(seen[seen >= 0], minlength=tiers.shape[1]) / max((seen >= 0).sum(), 1)
        tasks['tier of spend in 90 d'] = beside(tier, {
            MODEL: (tiers, CLASSES), 'most common tier': (np.tile(shares, (len(test), 1)), CLASSES)}, known)
        tasks['spend in 90 d'] = beside(labels.spend, {
            MODEL: (spend, AMOUNT), 'spend of 90 days': (asked.spend_90d, AMOUNT)}, known)
        middle = np.nanmedian(fitted.data.labels.spend)
        tasks['typical spend in 90 d'] = beside(labels.spend, {
            name: (amounts, {'mean_absolute_error': mean_absolute_error}) for name, amounts in (
                (MODEL, typical), ('spend of 90 days', asked.spend_90d),
                ('median of training', np.full(len(test), middle)), ('nothing', np.zeros(len(test))))}, known)
    return {
        'rows': len(test), 'users': len(np.unique(test.user)), 'base_rates': rates, 'tasks': tasks,
        'calibration': {f'purchase within {HORIZON_DAYS[horizon]} d': _calibration(purchase, bought, horizon)
                        for horizon in (INTENT, CHURN)},
        'segments': {name: _segment(rows, purchase, bought) for name, rows in _segments(test).items()},
    }


def evaluate_ranking(fitted: Fitted, seen: History, history: History, users: Sequence[int], at_ms: int,
                     limits: WindowLimits, known_until_ms: int, seed: int) -> dict[str, dict]:
    """How well the exported ranking names what is bought next, by column, beside rules; nothing of what is not ranked,
    or too few buy within the settled days.

    seen    what `fitted` has learned from: the recording before `at_ms`
    users   of the test, places in `history`; they are asked as of `at_ms`
    """
    before = [user for user in users if any(event.ts_ms < at_ms for event in history.events[user])]
    if fitted.recommender is None or not before:
        return {}
    test = at_time(history, before, at_ms, limits, known_until_ms)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / 'model.onnx'
        write_ranking(fitted.recommender, graph)
        found = rank(seen, fitted.users, history, test, rankings(graph, history, test), None, seed,
                     known_until_ms)
    return {column: judge_ranking(by_name, RESAMPLES, seed) for column, by_name in found.items()
            if len(by_name[MODEL]['ndcg']) >= ASKED_MIN}


def _calibration(purchase: np.ndarray, bought: np.ndarray, horizon: int) -> list[dict[str, float]]:
    known = ~np.isnan(bought[:, horizon])
    return calibration(purchase[known, horizon], bought[known, horizon])


def _segments(test: Examples) -> dict[str, np.ndarray]:
    slots = np.diff(test.inputs.starts)
    ordered = test.snapshots.headers['orders'] > 0
    return {
        'at a cut-off': test.kind == SnapshotKind.CUTOFF,
        'right after an event': (test.kind == SnapshotKind.EVENT) | (test.kind == SnapshotKind.SESSION_END),
        'silence timer': test.kind == SnapshotKind.TIMER,
        'never ordered': ~ordered,
        'has ordered': ordered,
        'up to 16 slots': slots <= 16,
        '17 to 63 slots': (slots > 16) & (slots < 64),
        '64 slots (window full)': slots == 64,
    }


def _segment(rows: np.ndarray, purchase: np.ndarray, bought: np.ndarray) -> dict[str, float]:
    row: dict[str, float] = {'rows': int(rows.sum())}
    for name, horizon in (('intent', INTENT), ('purchase', CHURN)):
        known = rows & ~np.isnan(bought[:, horizon])
        if known.any():
            scores, truth = purchase[known, horizon], bought[known, horizon]
            row |= {f'{name}_rate': float(truth.mean()), f'{name}_auc': auc(scores, truth),
                    f'{name}_ece': ece(scores, truth)}
    return row
