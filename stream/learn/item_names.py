"""What a ranked bucket is called: buckets are hashes, and a shop sells items.

    bucket, or the user's own -> hash of the item that it most likely stands for (Names) -> its id in the events (Texts)

Needs no torch.
"""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from stream.core.events import EventType, hash16, hash32
from stream.core.features import buckets
from stream.learn.dataset import History
from stream.learn.past_items import BUCKETS, Named

_PURCHASE = int(EventType.PURCHASE)


@dataclass(frozen=True)
class Ranked:
    """A user's chances: of all buckets, float32 [v]; of the own items, float32 [m], whose hashes are int64 [m]."""

    buckets: np.ndarray
    own: np.ndarray
    own_chances: np.ndarray


class Names:
    """What a bucket stands for in a recording, beside the user's own: what most people bought, else dealt with."""

    def __init__(self, history: History, users: Iterable[int], column: str) -> None:
        weight: dict[int, int] = {}
        for user in users:
            named = Named.of(history, user, column)
            for hashed, bought in set(zip(named.hashes.tolist(), (named.types == _PURCHASE).tolist(), strict=True)):
                weight[hashed] = weight.get(hashed, 0) + (1 + len(history.user_ids) if bought else 1)
        hashes = np.array(sorted(weight, key=lambda hashed: (weight[hashed], hashed)), np.int64)
        self._common = np.zeros(BUCKETS[column], np.int64)
        self._common[buckets(hashes, BUCKETS[column])] = hashes      # the last one assigned weighs most

    def best(self, ranked: Ranked, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes and chances of the `count` best, best first: the user's own, and what is new in each bucket."""
        new = ranked.buckets.astype(np.float64)
        np.subtract.at(new, buckets(ranked.own, len(new)), ranked.own_chances)
        named = (self._common > 0) & ~np.isin(self._common, ranked.own)
        hashes = np.concatenate([ranked.own, self._common[named]])
        chances = np.concatenate([ranked.own_chances, np.maximum(new[named], 0.0)])
        first = np.argsort(-chances, kind='stable')[:count]
        return hashes[first], chances[first]


class _Named(msgspec.Struct):
    item_id: str | None = None
    category: str | None = None


class Texts:
    """Ids by hash, for each column. Of those that share a hash the first one read."""

    def __init__(self) -> None:
        self._of: dict[str, dict[int, str]] = {column: {} for column in BUCKETS}
        self._seen: set[tuple[str | None, str | None]] = set()

    def remembered(self, values: Iterable[bytes]) -> Iterator[bytes]:
        """Event JSON as it comes, its names kept; what is no event passes."""
        decode = msgspec.json.Decoder(_Named).decode
        for value in values:
            try:
                named = decode(value)
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
                yield value
                continue
            names = named.item_id, named.category
            if names not in self._seen:
                self._seen.add(names)
                for column, text, hashed in zip(BUCKETS, names, (hash32, hash16), strict=True):
                    if text:
                        self._of[column].setdefault(hashed(text), text)
            yield value

    def of(self, column: str, hashes: np.ndarray) -> list[str]:
        """The ids of hashes that the recording has."""
        return [self._of[column][hashed] for hashed in hashes.tolist()]
