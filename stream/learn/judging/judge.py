"""Judge predictions of the model and its contenders against what happened; figures are ready for JSON.

An interval is [value, low, high], see `stream.learn.judging.quality`. A contender's `model_less` is the model's figure
less the contender's, over the same resamples of users. One of them is called better only if the interval of the
difference lies on one side of 0.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stream.learn.dataset import SPEND_DAYS
from stream.learn.judging.quality import (
    AMOUNT,
    BINARY,
    CHOICE,
    CLASSES,
    RANKING,
    SPENDERS,
    Metric,
    at_threshold,
    auc,
    calibration,
    ece_if_true,
    interval,
    resamples,
)

MODEL = 'our model'
TYPICAL, LIKELIEST = 'its typical spend', 'its chance of a purchase'
WINDOW, COUNTERS = 'its window branch alone', 'its counters branch alone'
REFERENCES = ('logistic regression', 'LightGBM', 'BG/NBD')      # whom it has to beat
COMMONEST, PAST_TIER = 'shares of the training users', 'tier of the last 90 days'
SCRATCH, TRANSFERRED = 'from scratch', "from the other shop's"
RULES = ('recency rule', 'past rate', 'past spend', 'spend of 90 days')     # who need no training
LEAST_ERROR = 'LightGBM'     # trained for a small mean error of spend
SPEND_BINS = 10
_TINY = 1e-6
POINTS = 100            # of a curve
LIFT_FROM = 0.01
TOP = 10
POPULAR, RECENT, OWN, BOUGHT, SASREC = (
    'popularity', 'popularity of 30 days', 'own past', 'own purchases', 'SASRec')

Curve = tuple[list[float], list[float]]     # x, y


@dataclass(frozen=True)
class Predictions:
    """A contender's scores of some rows, float64 [n], or [n, classes]: higher is likelier. `is_chance`: the scores are
    probabilities."""

    scores: np.ndarray
    is_chance: bool

    def complement(self) -> 'Predictions':
        """Predictions of the opposite."""
        return Predictions(1 - self.scores if self.is_chance else -self.scores, self.is_chance)


def judge_chances(by_name: Mapping[str, Predictions], truth: np.ndarray, segments: Mapping[str, np.ndarray], count: int,
                  seed: int, rivals: Sequence[str] = REFERENCES, threshold: float = 0.5) -> dict:
    """Figures of a yes-or-no question.

    by_name     predictions, MODEL among them, all for the same rows, one row per user
    truth       float [n], 0 or 1
    segments    bool [n] each
    count       bootstrap resamples
    rivals      the model must beat the best of these
    threshold   probability that counts as positive; the base rate is used as another threshold
    """
    base_rate = float(truth.mean())
    samples = resamples(np.arange(len(truth)), count, seed)
    contenders = beside_model({name: (scored.scores, BINARY if scored.is_chance else RANKING)
                              for name, scored in by_name.items()}, truth, samples)
    references = [name for name in rivals if name in contenders]
    best = max(references, key=lambda name: contenders[name]['metrics']['auc'][0], default=None)
    shown = [name for name in (MODEL, *rivals) if name in by_name]
    return {
        'rows': len(truth), 'positives': int(truth.sum()), 'base_rate': base_rate,
        'contenders': contenders,
        'ece_if_true': ece_if_true(by_name[MODEL].scores, count, seed) if by_name[MODEL].is_chance else None,
        'best_reference': best,
        'verdict': _verdict(contenders[best]['model_less']['auc']) if best else None,
        'curves': {name: curves(by_name[name].scores, truth) for name in shown},
        'calibration': {name: calibration(by_name[name].scores, truth) for name in shown if by_name[name].is_chance},
        'thresholds': {
            name: {words: _called(by_name[name].scores, truth, samples, at)
                   for words, at in (('stated', threshold), ('base rate', base_rate))}
            for name in shown if by_name[name].is_chance},
        'segments': {words: {'rows': int(rows.sum()), 'positives': int(truth[rows].sum()),
                             'auc': {name: auc(by_name[name].scores[rows], truth[rows]) for name in shown}}
                     for words, rows in segments.items()},
    }


def _called(scores: np.ndarray, truth: np.ndarray, samples: list[np.ndarray], threshold: float) -> dict:
    """The confusion matrix at a threshold, with accuracy, precision, recall and F1 as intervals."""
    drawn = [at_threshold(scores[rows], truth[rows], threshold) for rows in samples]
    shares = {name: interval(np.array([found[name] for found in drawn]))
              for name in ('accuracy', 'precision', 'recall', 'f1')}
    return {'threshold': threshold} | drawn[0] | shares


def spend_forecasts(served: Mapping[str, np.ndarray], days: int, horizon_days: Sequence[int]) -> dict[str, np.ndarray]:
    """Forecasts of spend within so many days from a graph's outputs, by name, float64 [n] each; LIKELIEST only ranks.

    The outputs cover SPEND_DAYS. For other days spend is scaled by the expected orders: at a steady rate, the
    probability of no order is exp(-orders), see `stream.learn.calibrate`.

    horizon_days  those of the output `purchase`, `days` and SPEND_DAYS among them
    """
    column = {told: served['purchase'][:, place].astype(float) for place, told in enumerate(horizon_days)}
    orders, orders_told = (-np.log1p(-np.clip(column[within], _TINY, 1 - _TINY)) for within in (days, SPEND_DAYS))
    found = {MODEL: served['expected_spend'][:, 0] * (orders / orders_told)}
    if 'typical_spend' in served:       # older graphs lack it
        found[TYPICAL] = served['typical_spend'][:, 0] * (orders / orders_told)
    return found | {LIKELIEST: column[days]}


def judge_spend(by_name: Mapping[str, np.ndarray], truth: np.ndarray, count: int, seed: int) -> dict:
    """Figures of a forecast of spend: forecasts by name, MODEL among them, and what was spent, float64 [n] each.

    `error_ratio`: mean error of the model's forecasts over that of LEAST_ERROR, where that is among them.
    """
    samples = resamples(np.arange(len(truth)), count, seed)
    drawn = {name: {metric: np.array([rule(scores[rows], truth[rows]) for rows in samples])
                    for metric, rule in (SPENDERS if name == LIKELIEST else AMOUNT).items()}
             for name, scores in by_name.items()}
    by_forecast = [rows for rows in np.array_split(np.argsort(by_name[MODEL], kind='stable'), SPEND_BINS) if len(rows)]
    return {
        'rows': len(truth), 'mean': float(truth.mean()), 'spending': float((truth > 0).mean()),
        'contenders': intervals(drawn),
        'error_ratio': {name: interval(drawn[name]['mean_absolute_error'] / drawn[LEAST_ERROR]['mean_absolute_error'])
                        for name in (MODEL, TYPICAL) if name in drawn and LEAST_ERROR in drawn},
        'bins': [{'rows': len(rows), 'forecast': float(by_name[MODEL][rows].mean()), 'spent': float(truth[rows].mean())}
                 for rows in by_forecast],
    }


def judge_tiers(by_name: Mapping[str, Predictions], truth: np.ndarray, count: int, seed: int) -> dict:
    """Figures of the tier: scores by name, float64 [n, tiers], MODEL among them, and the tier it was, int64 [n].

    `confusion[i][j]`: rows of tier i for which the model's likeliest tier was j.
    """
    samples = resamples(np.arange(len(truth)), count, seed)
    model = by_name[MODEL].scores
    tiers = model.shape[1]
    confusion = np.bincount(truth * tiers + model.argmax(1), minlength=tiers * tiers).reshape(tiers, tiers)
    return {'rows': len(truth), 'confusion': confusion.tolist(),
            'contenders': beside_model({name: (scored.scores, CLASSES if scored.is_chance else CHOICE)
                                        for name, scored in by_name.items()}, truth, samples)}


def beside_model(by_name: Mapping[str, tuple[np.ndarray, Mapping[str, Metric]]], truth: np.ndarray,
                 samples: list[np.ndarray]) -> dict[str, dict]:
    """By contender, MODEL among them: `metrics` and `model_less`, intervals over the same resamples.

    by_name   scores of each, and what they are judged by
    samples   of `stream.learn.judging.quality.resamples`
    """
    return intervals({name: {metric: np.array([rule(scores[rows], truth[rows]) for rows in samples])
                             for metric, rule in rules.items()} for name, (scores, rules) in by_name.items()})


def intervals(drawn: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict]:
    """`metrics` and `model_less` of each contender, MODEL among them, from its metrics on the same resamples."""
    model = drawn[MODEL]
    return {name: {'metrics': {metric: interval(values) for metric, values in numbers.items()},
                   'model_less': {} if name == MODEL else {metric: interval(model[metric] - values)
                                                           for metric, values in numbers.items()}}
            for name, numbers in drawn.items()}


def _verdict(difference: list[float]) -> str:
    """The verdict from the interval of the model's AUROC less a contender's."""
    _, low, high = difference
    return 'better' if low > 0 else 'worse' if high < 0 else 'no difference shown'


def curves(scores: np.ndarray, truth: np.ndarray) -> dict[str, Curve]:
    """The points of the usual curves by name, as more and more rows count as positive, highest scores first.

    roc               x: share of the negatives called, y: share of the positives called
    precision_recall  x: share of the positives called, y: share of the called rows that are positive
    gain              x: share of all rows called, y: share of the positives called
    lift              x: share of all rows called, y: share of positives among them over that among all rows; from
                      LIFT_FROM on, since a handful of rows is chance

    Rows of equal score are called together; between two scores a curve is straight, as if the rows in between were
    called in any order. A curve is thinned to about POINTS points, both ends included: it is for the eye, not for an
    area.

    truth   holds 0 and 1. If it holds only one of them, every curve is empty.
    """
    positives, rows = int((truth > 0).sum()), len(truth)
    if positives in (0, rows):
        return {'roc': ([], []), 'precision_recall': ([], []), 'gain': ([], []), 'lift': ([], [])}
    called, hits = _cumulative(scores, truth)
    share, recall = called / rows, hits / positives
    precision = hits[1:] / called[1:]
    far = share[1:] >= LIFT_FROM
    return {
        'roc': _thinned((called - hits) / (rows - positives), recall),
        'precision_recall': _thinned(recall[1:], precision),
        'gain': _thinned(share, recall),
        'lift': _thinned(share[1:][far], precision[far] / (positives / rows)),
    }


def _cumulative(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [distinct scores + 1] each: how many rows, and how many positives, reach each score; 0 and 0 at first."""
    order = np.argsort(-scores, kind='stable')
    last = np.append(scores[order][1:] != scores[order][:-1], True)
    return (np.append(0, np.flatnonzero(last) + 1), np.append(0, np.cumsum(truth[order] > 0)[last]))


def _thinned(x: np.ndarray, y: np.ndarray) -> Curve:
    """Some points of a curve whose x never falls, spread evenly along the curve and over its points."""
    along = np.searchsorted(x, np.linspace(x[0], x[-1], POINTS // 2))
    kept = np.unique(np.concatenate([along, np.linspace(0, len(x) - 1, POINTS // 2).round().astype(np.int64)]))
    return x[kept].tolist(), y[kept].tolist()
