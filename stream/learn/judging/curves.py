"""What happens as more and more rows are called, those with the highest scores first: the points of the usual curves.

Rows of equal score are called together; between two scores a curve runs straight, as it would if the rows in between
were called in any order. A curve is thinned to about `POINTS` points, ends included: for the eye, not for an area.

    roc               x: share of the negatives that were called, y: share of the positives
    precision_recall  x: share of the positives that were called, y: share of the called that are positive
    gain              x: share of all rows that were called, y: share of the positives
    lift              x: share of all rows that were called, y: share of positives among them over that among all;
                      from LIFT_FROM on, since among a handful it is mere chance

`truth` holds 0 and 1, both of them, else every curve is empty.
"""
import numpy as np

POINTS = 100
LIFT_FROM = 0.01

Curve = tuple[list[float], list[float]]     # x, y


def curves(scores: np.ndarray, truth: np.ndarray) -> dict[str, Curve]:
    """All four by name."""
    positives, rows = int((truth > 0).sum()), len(truth)
    if positives in (0, rows):
        return {'roc': ([], []), 'precision_recall': ([], []), 'gain': ([], []), 'lift': ([], [])}
    called, hits = _steps(scores, truth)
    share, recall = called / rows, hits / positives
    precision = hits[1:] / called[1:]
    far = share[1:] >= LIFT_FROM
    return {
        'roc': _thinned((called - hits) / (rows - positives), recall),
        'precision_recall': _thinned(recall[1:], precision),
        'gain': _thinned(share, recall),
        'lift': _thinned(share[1:][far], precision[far] / (positives / rows)),
    }


def _steps(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [distinct scores + 1] each: how many rows, and how many positives, reach each score; 0 and 0 at first."""
    order = np.argsort(-scores, kind='stable')
    last = np.append(scores[order][1:] != scores[order][:-1], True)
    return (np.append(0, np.flatnonzero(last) + 1), np.append(0, np.cumsum(truth[order] > 0)[last]))


def _thinned(x: np.ndarray, y: np.ndarray) -> Curve:
    """Some of the points of a curve whose x never falls: spread evenly both along it and over the points."""
    along = np.searchsorted(x, np.linspace(x[0], x[-1], POINTS // 2))
    kept = np.unique(np.concatenate([along, np.linspace(0, len(x) - 1, POINTS // 2).round().astype(np.int64)]))
    return x[kept].tolist(), y[kept].tolist()
