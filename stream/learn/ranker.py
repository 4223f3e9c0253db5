"""What is bought next: items and categories ranked for a user, beside the scores and after them.

    all buckets: how many bought it lately, and ever ---------------------------+
                                                                                +-> one softmax
    the user's own items: the same of the bucket, and the past -> network ------+

Learnt last, from what `stream.learn.past_items` makes of the user's events: the other scores are the same with it and
without. It is a graph of its own beside the scores', because it needs what their inputs do not hold (a slot names one
item, a basket may have dozens, and buckets are shared), and because onnxruntime computes outputs that nobody asks for:
4,096 chances a row would slow the worker. b rows, m own items, v buckets.

Embeddings of the items (of the user's past, from neighbours by singular values) made the ranking worse on the
recordings that we have; see LOG.md.
"""
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from rich.console import Console
from torch import Tensor, nn

from stream.core.features import buckets
from stream.core.window import DAY_MS
from stream.learn.bounds import Count, Positive
from stream.learn.dataset import NEXT_DAYS, Examples, History, bought_next
from stream.learn.journal import Journal
from stream.learn.passes import Course, improve
from stream.learn.past_items import BUCKETS, OWN_NUMBERS, Past, past, popular

ROWS_MIN = 100          # fewer settled moments that are followed by a purchase teach nothing
_EVER_DAYS = 36_500.0
_WEEK_MS = 7 * DAY_MS
_WIDTH = 'by_own.0.weight'  # of a ranker's state: its rows are the units of the network
_HIDDEN = -1e4          # the logit of what nobody can buy: no chance


@dataclass(frozen=True)
class RankerOptions:
    """How to learn what is bought next.

    rows_max        moments, those of the validation users included, drawn from all that are followed by a purchase
    units           of the network
    epochs          passes over them; 0: nothing is ranked
    learning_rate   at its peak, after the first tenth of all steps; a cosine to 0 follows
    """

    rows_max: Count = 4_000
    units: Count = 32
    epochs: Annotated[int, Meta(ge=0)] = 12
    batch_rows: Count = 128
    learning_rate: Positive = 1e-2


class Ranker(nn.Module):
    """Of items, or of categories."""

    def __init__(self, count: int, options: RankerOptions) -> None:
        super().__init__()
        self.register_buffer('popularity', torch.zeros(2, count))   # of the last NEXT_DAYS, and ever: log(1 + buyers)
        self.by_popularity = nn.Parameter(torch.tensor([0.3, 0.3]))
        self.by_own = nn.Sequential(nn.Linear(OWN_NUMBERS + 2, options.units), nn.GELU(), nn.Linear(options.units, 1))

    def forward(self, own: Tensor, numbers: Tensor, popularity: Tensor | None = None) -> Tensor:
        """Logits [b, v + m] from own int [b, m] and numbers [b, m, OWN_NUMBERS]: of what is new to the user by its
        bucket, then of the user's own.

        popularity  [b, 2, v], as of the moments; None: as of the end of training
        """
        popularity = self.popularity.expand(own.shape[0], -1, -1) if popularity is None else popularity
        index = own.long()
        known = popularity.gather(2, index[:, None].expand(-1, 2, -1)).transpose(1, 2)      # [b, m, 2]
        again = torch.where(index > 0, self.by_own(torch.cat([numbers, known], -1))[..., 0], _HIDDEN)   # [b, m]
        new = (self.by_popularity[:, None] * popularity).sum(1)                             # [b, v]
        return torch.cat([torch.full_like(new[:, :1], _HIDDEN), new[:, 1:], again], 1)      # bucket 0 is nothing

    def chances(self, own: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """That a purchase of the next NEXT_DAYS is of a bucket [b, v], and of the user's own items [b, m]."""
        new, again = self(own, numbers).softmax(1).split((self.popularity.shape[1], own.shape[1]), 1)
        return new.scatter_add(1, own.long(), again), again


class Recommender(nn.Module):
    """Rankers of what the recording names: 'item', 'category', or both."""

    def __init__(self, rankers: Mapping[str, Ranker]) -> None:
        super().__init__()
        self.rankers = nn.ModuleDict(rankers)

    @staticmethod
    def of(weights: dict[str, Tensor]) -> 'Recommender':
        """From its own `state_dict`. Errors: ValueError where it is none."""
        columns = [column for column in BUCKETS if f'rankers.{column}.{_WIDTH}' in weights]
        if not columns:
            raise ValueError('there is no ranking in its file')
        options = RankerOptions(units=len(weights[f'rankers.{columns[0]}.{_WIDTH}']))
        found = Recommender({column: Ranker(BUCKETS[column], options) for column in columns})
        try:
            found.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return found.eval()

    @property
    def columns(self) -> tuple[str, ...]:
        """What it ranks."""
        return tuple(self.rankers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The chances of each column, then those of the candidates [b, c].

        inputs   of each column `own` and `numbers`; then candidates, int [b, c], buckets of the first column
        """
        chances = [part for place, ranker in enumerate(self.rankers.values())
                   for part in ranker.chances(*inputs[2 * place:2 * place + 2])]
        return *chances, chances[0].gather(1, inputs[-1].long())


def fit_recommender(history: History, told: History, users: Iterable[int], data: Examples, held_out: np.ndarray,
                    known_until_ms: int, options: RankerOptions, seed: int) -> Recommender | None:
    """Of what the purchases name; None where they name nothing, too few moments are followed by one, or it is off.

    told       the same users, with the purchases that are learned from; what a user had to do is told by `history`
    users      whose purchases are counted as popularity
    held_out   bool [n]: the rows of `data` whose loss chooses the pass
    Promise    the caller's generators go on as if this had not been called.
    """
    if not options.epochs:
        return None
    found, chosen = {}, list(users)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for column in BUCKETS:
            rows = _rows(history, told, chosen, data, held_out, column, known_until_ms, options, seed)
            if rows is not None:
                found[column] = _fitted(rows, column, options, seed)
    return Recommender(found).eval() if found else None


@dataclass(frozen=True)
class _Rows:
    """What is learnt from: n rows; popularity [weeks, 2, v]; the week of each row, int [n]; what was bought next: of
    each row's logits the places, the own ones counted from -1 down."""

    past: Past
    popularity: Tensor
    week: np.ndarray
    bought: list[np.ndarray]
    held_out: np.ndarray

    def loss(self, ranker: Ranker, rows: np.ndarray) -> Tensor:
        """Mean over the rows of the mean log chance of what was bought, in nats."""
        own, numbers = map(torch.from_numpy, self.past.padded(rows))
        chances = ranker(own, numbers, self.popularity[torch.from_numpy(self.week[rows])]).log_softmax(1)
        counts = np.array([len(self.bought[row]) for row in rows])
        places = np.concatenate([self.bought[row] for row in rows])
        places = np.where(places < 0, ranker.popularity.shape[1] - 1 - places, places)
        found = chances[torch.from_numpy(np.repeat(np.arange(len(rows)), counts)), torch.from_numpy(places)]
        return -(found / torch.from_numpy(np.repeat(counts, counts)).float()).sum() / len(rows)

    def batches(self, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """About as long as one another, so that little is padding."""
        ordered = rows[np.argsort(np.diff(self.past.starts)[rows], kind='stable')]
        return (ordered[at:at + size] for at in range(0, len(rows), size))


def _rows(history: History, told: History, users: list[int], data: Examples, held_out: np.ndarray, column: str,
          known_until_ms: int, options: RankerOptions, seed: int) -> _Rows | None:
    after = bought_next(told, data, column, known_until_ms)
    usable = np.array([place for place, hashes in enumerate(after) if hashes is not None and len(hashes)], np.int64)
    if len(usable) < ROWS_MIN or held_out[usable].all() or not held_out[usable].any():
        return None
    if len(usable) > options.rows_max:
        usable = np.sort(np.random.default_rng(seed).choice(usable, options.rows_max, replace=False))
    # As of each week, so that nothing that a moment could not know is in its popularity.
    weeks_ms = np.append(np.arange(history.start_ms, known_until_ms, _WEEK_MS), known_until_ms)
    popularity = np.stack([popular(told, users, column, weeks_ms, days) for days in (NEXT_DAYS, _EVER_DAYS)], 1)
    before = past(history, data, usable, column)
    bought = []
    for row, (start, end) in zip(usable, pairwise(before.starts.tolist()), strict=True):
        own, hashes = before.hashes[start:end], after[row]
        place = np.searchsorted(own, hashes)
        again = np.isin(hashes, own)
        bought.append(np.where(again, -1 - place, buckets(hashes, BUCKETS[column])))
    return _Rows(before, torch.from_numpy(popularity),
                 np.searchsorted(weeks_ms, data.as_of_ms[usable], side='right') - 1, bought, held_out[usable])


def _fitted(rows: _Rows, column: str, options: RankerOptions, seed: int) -> Ranker:
    ranker = Ranker(BUCKETS[column], options)
    ranker.popularity.copy_(rows.popularity[-1])
    train, validation = np.flatnonzero(~rows.held_out), np.flatnonzero(rows.held_out)
    steps = options.epochs * math.ceil(len(train) / options.batch_rows)

    def drawn(rng: np.random.Generator) -> list[np.ndarray]:
        batches = list(rows.batches(rng.permutation(train), options.batch_rows))
        return [batches[place] for place in rng.permutation(len(batches))]

    def judged() -> dict[str, float]:
        with torch.no_grad():
            return {'validation': sum(float(rows.loss(ranker, some)) * len(some)
                                      for some in rows.batches(validation, 256))}

    improve(Course(
        name='ranking', title='ranking', module=ranker, weights=[(options.learning_rate, 0.0, [*ranker.parameters()])],
        draw=drawn, loss=lambda some: rows.loss(ranker, some), judge=judged, passes=options.epochs, steps=steps,
        warmup_share=steps // 10 / steps, clip_norm=1.0, patience=options.epochs, seed=seed,
    ), Journal(), Console(quiet=True))
    return ranker
