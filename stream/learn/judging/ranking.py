"""Judge the ranking of what is bought next beside simple ones: how many of its first TOP items are bought.

    popularity               how many training users ever bought it
    popularity of 30 days    in the days before
    own past                 what the user dealt with most, newer events counting more, then popularity
    own purchases            what the user bought most often, then popularity
    SASRec                   self-attention over the sequence of the user's items (stream.learn.judging.sasrec)

All rank the items seen in training or by the user, by their 32-bit hash (16 for categories), not by bucket: each bucket
of our ranking stands for one item (stream.learn.ranking.next_items). Users who buy a named item within NEXT_DAYS count.
Everything is learned from training users, from earlier events.

    ndcg     normalised discounted cumulative gain at TOP, each thing bought counts the same
    recall   share of the things bought that are among the first TOP

Source: Järvelin, Kekäläinen (2002), "Cumulated gain-based evaluation of IR techniques".
"""
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from stream.core.events import EventType
from stream.core.layout import DAY_MS
from stream.learn.dataset import NEXT_DAYS, Examples, History, SnapshotKind, bought_next
from stream.learn.judging.judge import BOUGHT, MODEL, OWN, POPULAR, RECENT, SASREC, TOP, intervals
from stream.learn.judging.quality import resamples
from stream.learn.judging.sasrec import SasRecOptions, fit_sasrec
from stream.learn.ranking.next_items import Names, Ranked
from stream.learn.ranking.past_items import Named

ASKED_MIN = 10          # of fewer users nothing is said
_OWN_DAYS = 30.0        # an event's weight falls to 1/e in so many days

_PURCHASE = int(EventType.PURCHASE)

Measured = dict[str, np.ndarray]    # 'ndcg', 'recall': float64 [n]
RankedFold = dict[str, Measured]    # by contender


def measured(best: np.ndarray, bought: Sequence[np.ndarray]) -> Measured:
    """Of n lists int [n, TOP], or fewer where there are no more to name, best first, -1: none. `bought`: what it should
    have been, each once, not empty."""
    discounts = 1 / np.log2(np.arange(TOP) + 2)
    hits = np.stack([np.isin(row, expected) for row, expected in zip(best, bought, strict=True)])
    counts = np.array([len(expected) for expected in bought])
    ideal = np.cumsum(discounts)[np.minimum(counts, TOP) - 1]
    return {'ndcg': (hits * discounts[:hits.shape[1]]).sum(1) / ideal, 'recall': hits.sum(1) / counts}


def top(scores: np.ndarray) -> np.ndarray:
    """int64 [n, TOP], or [n, v] if that is less, of scores [n, v]: the places of the highest, best first; of equal ones
    the first."""
    return np.argsort(-scores, axis=1, kind='stable')[:, :TOP]


def rank(known: History, learners: Sequence[int], history: History, test: Examples,
         ranked: Iterable[Mapping[str, Ranked]], sasrec: SasRecOptions | None, seed: int,
         known_until_ms: int) -> dict[str, RankedFold]:
    """Quality of each contender's ranking of what the test users buy next, by column.

    known      the recording up to the test's time, of which `learners` are the training users
    history    all of it, of which the test's users are
    ranked     ours of each row of `test`, by column; taken one by one, since each has the chances of all buckets
    sasrec     None: it is not asked, which saves the time
    """
    asked: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}     # by column and row: what is bought, our best
    after, names = {}, {}
    for row, mine in enumerate(ranked):
        for column, chances in mine.items():
            if column not in asked:
                after[column] = bought_next(history, test, column, known_until_ms)
                asked[column], names[column] = {}, Names(known, learners, column)
            hashes = after[column][row]
            if hashes is not None and len(hashes):
                asked[column][row] = hashes, names[column].best(chances, TOP)[0]
    found = {}
    for column, by_row in asked.items():
        if not by_row:
            continue
        rows, bought = np.array(list(by_row), np.int64), [hashes for hashes, _ in by_row.values()]
        past = [Named.of(history, int(test.user[row]), column).until(
            int(test.as_of_ms[row]), SnapshotKind(test.kind[row])) for row in rows]
        ours = np.full((len(rows), TOP), -1, np.int64)
        for place, (_, best) in enumerate(by_row.values()):
            ours[place, :len(best)] = best
        found[column] = {MODEL: measured(ours, bought)} | {
            name: measured(best, bought)
            for name, best in _contenders(known, learners, past, test.as_of_ms[rows], column, sasrec, seed)}
    return found


def _contenders(known: History, learners: Sequence[int], past: list[Named], as_of_ms: np.ndarray, column: str,
                sasrec: SasRecOptions | None, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Name and best hashes of each, [n, TOP], or as many as there are."""
    taught = [Named.of(known, user, column) for user in learners]
    catalogue = np.unique(np.concatenate([part.hashes for part in (*taught, *past)]))
    place = {int(hashed): index for index, hashed in enumerate(catalogue)}
    index_of = [np.array([place[hashed] for hashed in part.hashes.tolist()], np.int64) for part in taught]
    recent_ms = int(as_of_ms.max()) - NEXT_DAYS * DAY_MS
    ever, lately = np.zeros(len(catalogue)), np.zeros(len(catalogue))
    for part, index in zip(taught, index_of, strict=True):
        is_bought = part.types == _PURCHASE
        ever[np.unique(index[is_bought])] += 1
        lately[np.unique(index[is_bought & (part.ts_ms >= recent_ms)])] += 1
    yield POPULAR, np.tile(catalogue[top(ever[None])], (len(past), 1))
    yield RECENT, np.tile(catalogue[top((lately + ever / (ever.max() + 1))[None])], (len(past), 1))
    popular, mine, bought, sequences = (lately + ever / (ever.max() + 1)) * 1e-9, [], [], []
    for part, now_ms in zip(past, as_of_ms.tolist(), strict=True):
        own = np.array([place[hashed] for hashed in part.hashes.tolist()], np.int64)
        # User by user: of all at once the scores of a large catalogue would fill the memory.
        for best, weight in ((mine, np.exp(-(now_ms - part.ts_ms) / DAY_MS / _OWN_DAYS)),
                             (bought, (part.types == _PURCHASE).astype(float))):
            scores = popular.copy()
            np.add.at(scores, own, weight)
            best.append(top(scores[None])[0])
        sequences.append(own + 1)
    yield OWN, catalogue[np.array(mine)]
    yield BOUGHT, catalogue[np.array(bought)]
    if sasrec is None:
        return
    model = fit_sasrec([index + 1 for index in index_of], len(catalogue), sasrec, seed)
    yield SASREC, catalogue[top(model.score(sequences)[:, 1:])]


def judge_ranking(by_name: dict[str, Measured], count: int, seed: int) -> dict:
    """Figures with bootstrap intervals over users, as `stream.learn.judging.judge` gives them; one row a user."""
    samples = resamples(np.arange(len(by_name[MODEL]['ndcg'])), count, seed)
    return {'rows': len(samples[0]), 'contenders': intervals({
        name: {metric: np.array([values[rows].mean() for rows in samples]) for metric, values in numbers.items()}
        for name, numbers in by_name.items()})}
