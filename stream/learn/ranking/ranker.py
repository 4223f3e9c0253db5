"""Rank the items and categories that a user buys next.

    the user's own items: how often, how lately, of what kind; and buyers -> a weight each --+
                                                                                             +-> one softmax
    something new: one logit for all of it -> shared out by how many bought each ------------+

Two simple rules, "most often bought" and "most recently seen", are special cases of these weights. Which rule is
right differs from shop to shop, so the weights are learned. More events never lower a probability. An item that
nobody has bought has its own weight. Otherwise the weight of popularity would have to separate it from an item with
one buyer, would become too steep, and would rank new bestsellers above the user's own items.

The ranking is learned last and does not change the other scores. It has its own graph for two reasons. It needs more
than their inputs hold (a slot names one item, a basket may have dozens, and buckets are shared). And onnxruntime
computes all outputs, asked for or not: thousands of probabilities per row would slow the worker. b rows, m own items,
p pairs of a row and an own item, v buckets.

A network instead of weights, and item embeddings, ranked worse on our recordings; see LOG.md.
"""
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from stream.core.features import buckets
from stream.core.layout import DAY_MS
from stream.learn.dataset import NEXT_DAYS, Examples, History, bought_next
from stream.learn.options import CountOrNone, NotNegative
from stream.learn.ranking.past_items import BUCKETS, OWN_NUMBERS, UNDONE_NUMBERS, past, popular

ROWS_MIN = 100          # fewer settled snapshots followed by a purchase teach nothing
STEPS_MAX = 150         # of L-BFGS: it has converged by then
_EVER_DAYS = 36_500.0
_WEEK_MS = 7 * DAY_MS
_POPULARITY_NUMBERS = 3
_WEIGHTS = 'weights'    # of a ranker's state: every one has it
_HIDDEN = -1e4          # the logit of what nobody can buy: no chance


@dataclass(frozen=True)
class RankerOptions:
    """How to learn what is bought next.

    rows_max   most snapshots, drawn from all that are followed by a purchase; 0: no ranking
    ridge      penalty of a weight of 1, in nats: there are few users, with many snapshots each
    """

    rows_max: CountOrNone = 4_000
    ridge: NotNegative = 2e-3


class Ranker(nn.Module):
    """The ranking of items, or of categories."""

    popularity: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer('popularity', torch.zeros(_POPULARITY_NUMBERS, count))     # as `_popularity` tells it
        self.by_popularity = nn.Parameter(torch.tensor([0.3, 0.3, 1.0]))
        self.weights = nn.Parameter(torch.zeros(OWN_NUMBERS + _POPULARITY_NUMBERS))    # see `own_weights`
        self.bias = nn.Parameter(torch.zeros(1))

    @property
    def own_weights(self) -> Tensor:
        """Of an own item's numbers, then of its bucket's popularity. None is below 0 but those of what was undone."""
        free = torch.zeros(len(self.weights), dtype=torch.bool)
        free[UNDONE_NUMBERS] = True
        return torch.where(free, self.weights, softplus(self.weights - 2.0))

    def again(self, numbers: Tensor, popularity: Tensor) -> Tensor:
        """Logits [...] of own items beside 0, that of something new: from [..., OWN_NUMBERS] and [..., 3]."""
        return torch.cat([numbers, popularity], -1) @ self.own_weights + self.bias

    def new(self, popularity: Tensor) -> Tensor:
        """Log share of each bucket [..., v] in what is new to a user, from [..., 3, v]. Bucket 0 is nothing."""
        logits = (self.by_popularity[:, None] * popularity).sum(-2)
        return torch.cat([torch.full_like(logits[..., :1], _HIDDEN), logits[..., 1:]], -1).log_softmax(-1)

    def chances(self, own: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """That a purchase of the next NEXT_DAYS is of a bucket [b, v], and of the user's own items [b, m], from
        int [b, m] and [b, m, OWN_NUMBERS]."""
        index = own.long()
        again = torch.where(index > 0, self.again(numbers, self.popularity.T[index]), _HIDDEN)
        shares = torch.cat([torch.zeros_like(again[:, :1]), again], 1).softmax(1)
        new, mine = shares.split((1, own.shape[1]), 1)
        return (new * self.new(self.popularity).exp()).scatter_add(1, index, mine), mine


class Recommender(nn.Module):
    """Rankers of what the recording names: 'item', 'category', or both."""

    def __init__(self, rankers: Mapping[str, Ranker]) -> None:
        super().__init__()
        self.rankers = nn.ModuleDict(rankers)

    @staticmethod
    def of(weights: dict[str, Tensor]) -> 'Recommender':
        """From its own `state_dict`. Errors: ValueError where it is none."""
        columns = [column for column in BUCKETS if f'rankers.{column}.{_WEIGHTS}' in weights]
        if not columns:
            raise ValueError('there is no ranking in its file that this version knows')
        found = Recommender({column: Ranker(BUCKETS[column]) for column in columns})
        try:
            found.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return found.eval()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it ranks."""
        return tuple(self.rankers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The probabilities of each column, then those of the candidates [b, c].

        inputs   of each column `own` and `numbers`; then candidates, int [b, c], buckets of the first column
        """
        chances = [part for place, ranker in enumerate(cast(Iterable[Ranker], self.rankers.values()))
                   for part in ranker.chances(*inputs[2 * place:2 * place + 2])]
        return *chances, chances[0].gather(1, inputs[-1].long())


def fit_recommender(history: History, told: History, users: Iterable[int], data: Examples, known_until_ms: int,
                    options: RankerOptions, seed: int) -> Recommender | None:
    """A ranking; None if purchases name nothing, too few snapshots are followed by one, or it is switched off.

    told       the same users, with the purchases that are learned from; what a user had to do is told by `history`
    users      whose purchases are counted as popularity
    seed       of the moments that are drawn where there are too many; nothing else is drawn
    """
    found, chosen = {}, list(users)
    for column in BUCKETS if options.rows_max else ():
        rows = _rows(history, told, chosen, data, column, known_until_ms, options, seed)
        if rows is not None:
            found[column] = _fitted(rows, options)
    return Recommender(found).eval() if found else None


def _popularity(told: History, users: list[int], column: str, times_ms: np.ndarray) -> np.ndarray:
    """float32 [times, 3, v]: log(1 + buyers) of the last NEXT_DAYS, and ever; whether there was one."""
    lately, ever = (popular(told, users, column, times_ms, days) for days in (NEXT_DAYS, _EVER_DAYS))
    return np.stack([lately, ever, (ever > 0).astype(np.float32)], 1)


@dataclass(frozen=True)
class _Rows:
    """Training batch: b rows, p pairs of a row and an own item, and q rows with something new that was bought.

    weight      [b], sums to 1: each user's rows weigh the same together, as each user is asked once
    row         int [p], whose own item a pair is
    numbers     [p, OWN_NUMBERS]
    known       [p, 3], popularity of the item's bucket as of the row's week
    share       [p], of the row's weight: that part of what was bought next is this own item
    popularity  [weeks, 3, v]
    new         int [2, q], week and bucket of what was bought and is not one's own
    new_share   [q]
    """

    weight: Tensor
    row: Tensor
    numbers: Tensor
    known: Tensor
    share: Tensor
    popularity: Tensor
    new: Tensor
    new_share: Tensor

    def loss(self, ranker: Ranker) -> Tensor:
        """Mean over the users of the mean log probability of what was bought, in nats."""
        again = ranker.again(self.numbers, self.known)
        with torch.no_grad():
            peak = torch.zeros_like(self.weight).scatter_reduce(0, self.row, again, 'amax')
        among = (-peak).exp().scatter_add(0, self.row, (again - peak[self.row]).exp())      # something new has logit 0
        week, bucket = self.new
        found = (self.share * again).sum() + (self.new_share * ranker.new(self.popularity)[week, bucket]).sum()
        return (self.weight * (peak + among.log())).sum() - found


def _rows(history: History, told: History, users: list[int], data: Examples, column: str, known_until_ms: int,
          options: RankerOptions, seed: int) -> _Rows | None:
    after = bought_next(told, data, column, known_until_ms)
    usable = np.array([place for place, hashes in enumerate(after) if hashes is not None and len(hashes)], np.int64)
    if len(usable) < ROWS_MIN:
        return None
    if len(usable) > options.rows_max:
        usable = np.sort(np.random.default_rng(seed).choice(usable, options.rows_max, replace=False))
    # As of each week, so that nothing that a moment could not know is in its popularity.
    weeks_ms = np.append(np.arange(history.start_ms, known_until_ms, _WEEK_MS), known_until_ms)
    week = np.searchsorted(weeks_ms, data.as_of_ms[usable], side='right') - 1
    popularity = _popularity(told, users, column, weeks_ms)
    _, mine, counts = np.unique(data.user[usable], return_inverse=True, return_counts=True)
    weight = 1 / counts[mine] / len(counts)
    before = past(history, data, usable, column)
    row = np.repeat(np.arange(len(usable)), np.diff(before.starts))
    share, new, new_share = np.zeros(len(row)), [], []
    for place, (start, end) in enumerate(pairwise(before.starts.tolist())):
        own, hashes = before.hashes[start:end], after[usable[place]]
        again = np.isin(hashes, own)
        share[start + np.searchsorted(own, hashes[again])] = weight[place] / len(hashes)
        others = buckets(hashes[~again], BUCKETS[column])
        new += [(week[place], bucket) for bucket in others.tolist()]
        new_share += [weight[place] / len(hashes)] * len(others)

    def tensor(values: np.ndarray | list[float]) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.float32))

    return _Rows(
        tensor(weight), torch.from_numpy(row), tensor(before.numbers[:-1]),
        tensor(popularity[week[row], :, before.own[:-1]]), tensor(share), tensor(popularity),
        torch.from_numpy(np.array(new, np.int64).reshape(-1, 2).T), tensor(new_share))


def _fitted(rows: _Rows, options: RankerOptions) -> Ranker:
    ranker = Ranker(rows.popularity.shape[2])
    ranker.popularity.copy_(rows.popularity[-1])
    optimizer = torch.optim.LBFGS(ranker.parameters(), max_iter=STEPS_MAX, history_size=20,
                                  line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = rows.loss(ranker) + options.ridge * ranker.own_weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ranker
