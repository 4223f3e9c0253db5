"""Metrics of scores against what happened, and bootstrap intervals over users.

An interval is [value, low, high]: the middle 95 % of a bootstrap over users, since the rows of one user are not
independent. Two contenders are compared over the same resamples.

Plain NumPy, since `stream evaluate` runs without the packages of training. The tests compare it with scikit-learn.
"""
from collections.abc import Callable

import numpy as np

CALIBRATION_BINS = 10
_TINY = 1e-7

Metric = Callable[[np.ndarray, np.ndarray], float]      # (scores, truth) of some rows


def ranks(values: np.ndarray) -> np.ndarray:
    """float64 [n], from 1; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Probability that a random positive row ranks above a random negative one. Ties count half. NaN without both."""
    positives = int((truth > 0).sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return float('nan')
    return float((ranks(scores)[truth > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def pr_auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Average precision: the mean, over the positives, of the precision where each is found; NaN without any."""
    if not (truth > 0).any():
        return float('nan')
    order = np.argsort(-scores, kind='stable')
    found = np.cumsum(truth[order] > 0)
    ordered = scores[order]
    last = np.append(ordered[1:] != ordered[:-1], True)         # equal scores are found together
    precision, recall = found[last] / (np.flatnonzero(last) + 1), found[last] / found[-1]
    return float((np.diff(recall, prepend=0) * precision).sum())


def log_loss(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean negative log probability of the outcome, in nats; scores [n] of a yes, or [n, classes]."""
    chances = np.column_stack([1 - scores, scores]) if scores.ndim == 1 else scores
    return float(-np.log(np.maximum(chances[np.arange(len(truth)), truth.astype(np.int64)], _TINY)).mean())


def brier(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean squared difference of probability and outcome."""
    return float(((scores - truth) ** 2).mean())


def calibration(scores: np.ndarray, truth: np.ndarray) -> list[dict[str, float]]:
    """Bins of equal size, by score: rows, mean score, share of positives."""
    bins = [rows for rows in np.array_split(np.argsort(scores, kind='stable'), CALIBRATION_BINS) if len(rows)]
    return [{'rows': len(rows), 'score': float(scores[rows].mean()), 'rate': float(truth[rows].mean())}
            for rows in bins]


def ece(scores: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error: mean distance of score and rate over the bins of `calibration`, weighted by rows.

    Source   Naeini, Cooper, Hauskrecht (2015), "Obtaining Well Calibrated Probabilities Using Bayesian Binning"
             (equal-frequency bins here).
    """
    return sum(row['rows'] * abs(row['score'] - row['rate']) for row in calibration(scores, truth)) / len(truth)


def ece_if_true(scores: np.ndarray, count: int, seed: int) -> list[float]:
    """The ECE of perfectly calibrated probabilities [n]: the mean and the middle 95 % over `count` simulated outcomes.
    It is large for few rows. No model can be shown to be better than this."""
    rng = np.random.default_rng(seed)
    drawn = np.array([ece(scores, (rng.random(len(scores)) < scores).astype(float)) for _ in range(count)])
    return [float(drawn.mean()), *map(float, np.quantile(drawn, (0.025, 0.975)))]


def spearman(scores: np.ndarray, truth: np.ndarray) -> float:
    """Rank correlation; NaN where one side is constant."""
    a, b = ranks(scores), ranks(truth)
    if a.std() == 0 or b.std() == 0:
        return float('nan')
    return float(np.corrcoef(a, b)[0, 1])


def top_decile_share(scores: np.ndarray, truth: np.ndarray) -> float:
    """The share of all spend that comes from the tenth of the rows with the highest scores."""
    best = np.argsort(-scores, kind='stable')[:max(1, len(scores) // 10)]
    return float(truth[best].sum() / max(truth.sum(), _TINY))


def top_decile_lift(scores: np.ndarray, truth: np.ndarray) -> float:
    """Share of positives in the tenth of rows with the highest scores, over that in all; of equal scores at the edge
    each counts in proportion. NaN without positives."""
    if not (truth > 0).any():
        return float('nan')
    count = max(1, len(scores) // 10)
    edge = np.partition(scores, len(scores) - count)[len(scores) - count]
    above, level = scores > edge, scores == edge
    found = truth[above].sum() + truth[level].mean() * (count - above.sum())
    return float(found / count / truth.mean())


def mean_absolute_error(scores: np.ndarray, truth: np.ndarray) -> float:
    """In the unit of both."""
    return float(np.abs(scores - truth).mean())


def total_ratio(scores: np.ndarray, truth: np.ndarray) -> float:
    """The sum of the forecasts over the sum of what happened."""
    return float(scores.sum() / max(truth.sum(), _TINY))


def accuracy(scores: np.ndarray, truth: np.ndarray) -> float:
    """Share of rows whose likeliest class was right; scores [n, classes]."""
    return float((scores.argmax(1) == truth).mean())


def within_one(scores: np.ndarray, truth: np.ndarray) -> float:
    """Share of rows whose likeliest class is at most one away."""
    return float((np.abs(scores.argmax(1) - truth) <= 1).mean())


def at_threshold(scores: np.ndarray, truth: np.ndarray, threshold: float) -> dict[str, float]:
    """The confusion matrix at a threshold, with accuracy, precision, recall and F1; NaN for a share of nothing."""
    called, is_so = scores >= threshold, truth > 0
    hits, alarms = float((called & is_so).sum()), float((called & ~is_so).sum())
    missed, quiet = float((~called & is_so).sum()), float((~called & ~is_so).sum())
    precision = hits / (hits + alarms) if hits + alarms else float('nan')
    recall = hits / (hits + missed) if hits + missed else float('nan')
    return {'true_positive': hits, 'false_positive': alarms, 'false_negative': missed, 'true_negative': quiet,
            'accuracy': (hits + quiet) / max(len(truth), 1), 'precision': precision, 'recall': recall,
            'f1': 2 * hits / (2 * hits + alarms + missed) if hits + alarms + missed else float('nan')}


RANKING: dict[str, Metric] = {'auc': auc, 'pr_auc': pr_auc, 'top_decile_lift': top_decile_lift}
BINARY: dict[str, Metric] = RANKING | {'log_loss': log_loss, 'brier': brier, 'ece': ece}
CHOICE: dict[str, Metric] = {'accuracy': accuracy, 'within_one_tier': within_one}
CLASSES: dict[str, Metric] = {'log_loss': log_loss} | CHOICE
SPENDERS: dict[str, Metric] = {'spearman': spearman, 'top_decile_share': top_decile_share}      # of whoever only ranks
AMOUNT: dict[str, Metric] = SPENDERS | {'mean_absolute_error': mean_absolute_error,
                                        'total_predicted_over_real': total_ratio}


def resamples(users: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """First all rows; then, `count` times, the rows of as many users, drawn with replacement."""
    rng = np.random.default_rng(seed)
    by_user = np.split(np.argsort(users, kind='stable'), np.flatnonzero(np.diff(np.sort(users))) + 1)
    alone = len(by_user) == len(users)      # one row a user: a draw of users is a draw of rows
    rows = np.concatenate(by_user)
    draws = (rng.integers(len(by_user), size=len(by_user)) for _ in range(count))
    return [np.arange(len(users)), *(rows[draw] if alone else np.concatenate([by_user[user] for user in draw])
                                     for draw in draws)]


def interval(values: np.ndarray) -> list[float]:
    """The first value, which is that of all rows, and the middle 95 % of the other values that exist."""
    others = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(others, (0.025, 0.975)) if len(others) else (np.nan, np.nan)
    return [float(values[0]), float(low), float(high)]
