"""How good the scores are on the test split, beside baselines that anyone could run, with intervals.

Every number is a list [value, low, high]: the interval is the middle 95 % of a bootstrap over users (rows of one user
are not independent). `less_*` is the model's number less the baseline's over the same resamples.

    recency rule         minus the days since the last order; whoever never ordered comes last
    logistic regression  on the normalised counters: what the window's slots add is what the model has beyond it
    last 90 days         the spend of the 90 days before the moment, for spend
    most common tier     of the training split

Thresholds of churn are told for users who have ordered: nobody else gets a churn alert by default.
"""
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from stream.learn.dataset import TIERS, Dataset, Examples, Kind

RESAMPLES = 200
CALIBRATION_BINS = 10
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_TINY = 1e-7

Metric = Callable[[np.ndarray, np.ndarray], float]      # (scores, truth) of some rows


def evaluate(data: Dataset, scores: dict[str, np.ndarray], seed: int) -> dict[str, object]:
    """All numbers of the model card, ready for JSON. `scores`: the model's outputs by name, rows as in `data.test`."""
    test, labels = data.test, data.test.labels
    ordered = test.counter('has_ordered') > 0
    recency = -np.where(ordered, test.counter('days_since_last_order'), np.inf)
    intent, churn = scores['purchase_intent'][:, 0], scores['churn'][:, 0]
    tiers, spend = scores['tier_probabilities'], scores['expected_spend'][:, 0]
    counts = np.bincount(data.train.labels.tier, minlength=TIERS) / len(data.train)
    spend_before = np.expm1(test.counter('spend_90d').astype(float))
    regress = partial(_regression, data.train.inputs.counters, test.inputs.counters)

    compare = partial(_compare, users=test.user, seed=seed)
    tasks = {
        'purchase_intent': compare(labels.intent, {
            'model': (intent, BINARY), 'recency rule': (recency, RANKING),
            'logistic regression': (regress(data.train.labels.intent, 2)[:, 1], BINARY)}),
        'churn': compare(labels.churn, {
            'model': (churn, BINARY), 'recency rule': (-recency, RANKING),
            'logistic regression': (regress(data.train.labels.churn, 2)[:, 1], BINARY)}),
        'tier': compare(labels.tier, {
            'model': (tiers, CLASSES), 'most common tier': (np.tile(counts, (len(test), 1)), CLASSES),
            'logistic regression': (regress(data.train.labels.tier, TIERS), CLASSES)}),
        'expected_spend': compare(labels.spend, {
            'model': (spend, AMOUNT), 'last 90 days': (spend_before, AMOUNT)}),
    }
    binary = {'purchase_intent': (intent, labels.intent), 'churn': (churn, labels.churn)}
    return {
        'rows': len(test), 'users': len(np.unique(test.user)),
        'base_rates': {'purchase_intent': float(labels.intent.mean()), 'churn': float(labels.churn.mean()),
                       'spend_mean': float(labels.spend.mean()),
                       'tier': (np.bincount(labels.tier, minlength=TIERS) / len(test)).tolist()},
        'tasks': tasks,
        'calibration': {task: calibration(*pair) for task, pair in binary.items()},
        'segments': {name: _segment(rows, test, intent, churn, spend) for name, rows in _segments(test).items()},
        'score_quantiles': {
            task: {kind.name.lower(): dict(zip(map(str, QUANTILES), np.quantile(score[test.kind == kind], QUANTILES)
                                               .tolist(), strict=True)) for kind in Kind if (test.kind == kind).any()}
            for task, (score, _) in binary.items()},
        'thresholds': {
            task: {kind.name.lower(): _thresholds(score, truth, (test.kind == kind) & alerted) for kind in Kind}
            for (task, (score, truth)), alerted in zip(binary.items(), (np.ones(len(test), bool), ordered),
                                                       strict=True)},
    }


def auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Chance that a random positive row is above a random negative one, ties counting half; NaN without both."""
    positives = int((truth > 0).sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return float('nan')
    return float((_ranks(scores)[truth > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def log_loss(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean of minus log probability of what happened, nats; scores [n] of a yes, or [n, classes]."""
    chances = np.column_stack([1 - scores, scores]) if scores.ndim == 1 else scores
    return float(-np.log(np.maximum(chances[np.arange(len(truth)), truth.astype(np.int64)], _TINY)).mean())


def brier(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean squared difference of probability and outcome."""
    return float(((scores - truth) ** 2).mean())


def calibration(scores: np.ndarray, truth: np.ndarray) -> list[dict[str, float]]:
    """Bins of equally many rows, by score: rows, mean score, share of positives."""
    bins = [rows for rows in np.array_split(np.argsort(scores, kind='stable'), CALIBRATION_BINS) if len(rows)]
    return [{'rows': len(rows), 'score': float(scores[rows].mean()), 'rate': float(truth[rows].mean())}
            for rows in bins]


def expected_calibration_error(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean distance of score and rate over the bins of `calibration`, weighted by rows. Source: Naeini, Cooper,
    Hauskrecht (2015), "Obtaining Well Calibrated Probabilities Using Bayesian Binning" (equal-frequency bins here)."""
    bins = calibration(scores, truth)
    return sum(row['rows'] * abs(row['score'] - row['rate']) for row in bins) / len(truth)


def spearman(scores: np.ndarray, truth: np.ndarray) -> float:
    """Rank correlation; NaN where one side is constant."""
    a, b = _ranks(scores), _ranks(truth)
    if a.std() == 0 or b.std() == 0:
        return float('nan')
    return float(np.corrcoef(a, b)[0, 1])


def top_decile_share(scores: np.ndarray, truth: np.ndarray) -> float:
    """Share of all that was spent, by the tenth of rows with the highest scores."""
    best = np.argsort(-scores, kind='stable')[:max(1, len(scores) // 10)]
    return float(truth[best].sum() / max(truth.sum(), _TINY))


def _accuracy(scores: np.ndarray, truth: np.ndarray) -> float:
    return float((scores.argmax(1) == truth).mean())


def _within_one(scores: np.ndarray, truth: np.ndarray) -> float:
    return float((np.abs(scores.argmax(1) - truth) <= 1).mean())


def _mean_error(scores: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(scores - truth).mean())


def _total_ratio(scores: np.ndarray, truth: np.ndarray) -> float:
    return float(scores.sum() / max(truth.sum(), _TINY))


RANKING: dict[str, Metric] = {'auc': auc}
BINARY: dict[str, Metric] = {'auc': auc, 'log_loss': log_loss, 'brier': brier, 'ece': expected_calibration_error}
CLASSES: dict[str, Metric] = {'log_loss': log_loss, 'accuracy': _accuracy, 'within_one_tier': _within_one}
AMOUNT: dict[str, Metric] = {'spearman': spearman, 'top_decile_share': top_decile_share,
                             'mean_absolute_error': _mean_error, 'total_predicted_over_real': _total_ratio}


def _compare(
    truth: np.ndarray, contenders: dict[str, tuple[np.ndarray, dict[str, Metric]]], users: np.ndarray, seed: int,
) -> dict[str, dict[str, list[float]]]:
    whole = np.arange(len(truth))
    samples = [whole, *_resamples(users, seed)]
    drawn = {name: {metric: np.array([rule(scores[rows], truth[rows]) for rows in samples])
                    for metric, rule in rules.items()} for name, (scores, rules) in contenders.items()}
    model = drawn['model']
    return {name: {metric: _interval(values) for metric, values in numbers.items()} | (
        {} if name == 'model' else {f'less_{metric}': _interval(model[metric] - values)
                                    for metric, values in numbers.items()})
            for name, numbers in drawn.items()}


def _resamples(users: np.ndarray, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    by_user = np.split(np.argsort(users, kind='stable'), np.flatnonzero(np.diff(np.sort(users))) + 1)
    return [np.concatenate([by_user[user] for user in rng.integers(len(by_user), size=len(by_user))])
            for _ in range(RESAMPLES)]


def _interval(values: np.ndarray) -> list[float]:
    """The first value, of all rows, and the middle 95 % of the others that could be computed."""
    others = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(others, (0.025, 0.975)) if len(others) else (np.nan, np.nan)
    return [float(values[0]), float(low), float(high)]


def _regression(train: np.ndarray, test: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Class probabilities [n, classes] of the test rows, by a softmax regression on the training rows' counters."""
    mean, deviation = train.mean(0), np.maximum(train.std(0), 1e-3)
    x, y = torch.from_numpy((train - mean) / deviation), torch.from_numpy(labels.astype(np.int64))
    weights = torch.zeros(x.shape[1] + 1, classes, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=200, line_search_fn='strong_wolfe')

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = cross_entropy(x @ weights[1:] + weights[0], y) + 1e-4 * weights[1:].square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        logits = torch.from_numpy((test - mean) / deviation) @ weights[1:] + weights[0]
        return logits.softmax(-1).numpy()


def _segments(test: Examples) -> dict[str, np.ndarray]:
    slots = np.diff(test.inputs.starts)
    ordered = test.counter('has_ordered') > 0
    return {
        'within a session': test.kind == Kind.EVENT,
        'end of a session': test.kind == Kind.SESSION_END,
        'silence timer': test.kind == Kind.TIMER,
        'never ordered': ~ordered,
        'has ordered': ordered,
        'up to 16 slots': slots <= 16,
        '17 to 63 slots': (slots > 16) & (slots < 64),
        '64 slots (window full)': slots == 64,
    }


def _segment(
    rows: np.ndarray, test: Examples, intent: np.ndarray, churn: np.ndarray, spend: np.ndarray,
) -> dict[str, float]:
    labels = test.labels
    if not rows.any():
        return {'rows': 0}
    return {
        'rows': int(rows.sum()),
        'intent_rate': float(labels.intent[rows].mean()), 'intent_auc': auc(intent[rows], labels.intent[rows]),
        'intent_ece': expected_calibration_error(intent[rows], labels.intent[rows]),
        'churn_rate': float(labels.churn[rows].mean()), 'churn_auc': auc(churn[rows], labels.churn[rows]),
        'churn_ece': expected_calibration_error(churn[rows], labels.churn[rows]),
        'spend_spearman': spearman(spend[rows], labels.spend[rows]),
    }


def _thresholds(scores: np.ndarray, truth: np.ndarray, rows: np.ndarray) -> list[dict[str, float | None]]:
    """For each threshold: the share of `rows` at or above it, how many of those are right, how many are found."""
    scores, truth = scores[rows], truth[rows]
    table = []
    for threshold in THRESHOLDS:
        above = scores >= threshold
        hits = float(truth[above].sum())
        table.append({'at_least': threshold, 'flagged': float(above.mean()) if len(above) else None,
                      'precision': hits / float(above.sum()) if above.any() else None,
                      'recall': hits / float(truth.sum()) if truth.any() else None})
    return table


def _ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """1-based ranks; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]
