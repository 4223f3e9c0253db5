"""The next items and categories of each user, from an exported ranking.

    events -> own items (past_items) -> graph -> chances of buckets and own items (Ranked)
           -> hash of the item that each bucket most likely stands for (Names) -> its id in the events (Texts)

Buckets are hashes, but a shop sells items: hence the names. Needs no torch.
"""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from stream.core.events import EventType, hash16, hash32
from stream.core.features import buckets
from stream.errors import InputError, ModelError, UsageError
from stream.learn.dataset import Examples, History
from stream.learn.inference import run, session_of
from stream.learn.ranking.past_items import BUCKETS, OWN_NUMBERS, Named, past
from stream.scoring.artefact import WEIGHTS
from stream.scoring.repository import RANKING_MANIFEST, load_ranking

CANDIDATES = 'candidates'
ROWS_MAX = 64           # at once: each row is answered with the chances of all buckets
_PURCHASE = int(EventType.PURCHASE)
_HASH = {'item': hash32, 'category': hash16}    # as events have them


@dataclass(frozen=True)
class Ranked:
    """A user's chances: of all buckets, float32 [v]; of the own items, float32 [m], whose hashes are int64 [m]."""

    buckets: np.ndarray
    own: np.ndarray
    own_chances: np.ndarray


def ranking_dir(version_dir: Path) -> Path:
    """Where the ranking of an exported version of the scores' model lies."""
    return version_dir.parent.with_name(f'{version_dir.parent.name}_next') / version_dir.name


def tensor_names(column: str) -> tuple[str, str]:
    """The graph's inputs of a column."""
    return f'own_{column}', f'{column}_numbers'


def score_names(column: str) -> tuple[str, str]:
    """The graph's outputs of a column: of all buckets, of the user's own."""
    return f'{column}_scores', f'own_{column}_scores'


def verified(version_dir: Path) -> Path:
    """The graph of the ranking beside a version. Errors: ModelError where there is none, it has been changed, or it was
    made by a version of stream that counted otherwise."""
    folder = ranking_dir(version_dir)
    if not (folder / RANKING_MANIFEST).is_file():
        raise ModelError(f'The model in {version_dir} has no ranking of items beside it: {folder} is missing.',
                         do='train and export one from events that name items, with this version.')
    served, graph = load_ranking(folder), folder / WEIGHTS
    for column, count in BUCKETS.items():
        (own, numbers), (scores, _) = tensor_names(column), score_names(column)
        if own in served.inputs and (served.inputs[numbers].row_shape != (-1, OWN_NUMBERS)
                                     or served.outputs[scores].row_shape != (count,)):
            raise ModelError(f'{graph} ranks by other numbers or buckets than this version has.',
                             do='train and export the model again.')
    return graph


def rankings(graph: Path, history: History, examples: Examples) -> Iterator[dict[str, Ranked]]:
    """By column, row by row of the examples."""
    session = session_of(graph)
    given = {entry.name for entry in session.get_inputs()}
    columns = [column for column in BUCKETS if tensor_names(column)[0] in given]
    names = [name for column in columns for name in score_names(column)]
    for at in range(0, len(examples), ROWS_MAX):
        rows = np.arange(at, min(at + ROWS_MAX, len(examples)))
        feed = {CANDIDATES: np.zeros((len(rows), 1), np.int32)}
        before = {column: past(history, examples, rows, column) for column in columns}
        for column, part in before.items():
            feed |= zip(tensor_names(column), part.padded(np.arange(len(rows))), strict=True)
        answers = dict(zip(names, run(session, names, feed), strict=True))
        for row in range(len(rows)):
            found = {}
            for column, part in before.items():
                scores, own_scores = score_names(column)
                own = part.hashes[part.starts[row]:part.starts[row + 1]]
                found[column] = Ranked(answers[scores][row], own, answers[own_scores][row, :len(own)])
            yield found


class Names:
    """What a bucket stands for in a recording, beside the user's own: what most people bought, else dealt with.

    candidates   ids of which alone one is named, the user's own among them; None: whatever the recording names
    unknown      those of them that no event of these users names: of them nothing can be said
    Errors       UsageError where all candidates are unknown.

    Candidates that nobody can tell apart, since they share a bucket, have the same chance each: that of the bucket.
    """

    def __init__(self, history: History, users: Iterable[int], column: str,
                 candidates: Sequence[str] | None = None) -> None:
        weight: dict[int, int] = {}
        for user in users:
            named = Named.of(history, user, column)
            for hashed, bought in set(zip(named.hashes.tolist(), (named.types == _PURCHASE).tolist(), strict=True)):
                weight[hashed] = weight.get(hashed, 0) + (1 + len(history.user_ids) if bought else 1)
        hashes = np.array(sorted(weight, key=lambda hashed: (weight[hashed], hashed)), np.int64)
        common = np.zeros(BUCKETS[column], np.int64)
        common[buckets(hashes, BUCKETS[column])] = hashes       # the last one assigned weighs most
        self.unknown: list[str] = []
        self._candidates = None
        if candidates is not None:
            hashed = {name: _HASH[column](name) for name in candidates}
            self.unknown = [name for name, value in hashed.items() if value not in weight]
            if len(self.unknown) == len(hashed):
                raise UsageError(f'No event before that time names any of the {len(hashed):,} candidates.',
                                 'name ids as the events have them, or give a recording that holds them.')
            self._candidates = np.array([value for value in hashed.values() if value in weight], np.int64)
        self._named = common[common > 0] if self._candidates is None else self._candidates

    def best(self, ranked: Ranked, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes and chances of the `count` best, best first: the user's own, and what is new in each bucket."""
        new = ranked.buckets.astype(np.float64)
        np.subtract.at(new, buckets(ranked.own, len(new)), ranked.own_chances)
        others = self._named[~np.isin(self._named, ranked.own)]
        mine = np.isin(ranked.own, self._candidates) if self._candidates is not None else slice(None)
        hashes = np.concatenate([ranked.own[mine], others])
        chances = np.concatenate([ranked.own_chances[mine], np.maximum(new[buckets(others, len(new))], 0.0)])
        first = np.argsort(-chances, kind='stable')[:count]
        return hashes[first], chances[first]


def read_candidates(path: Path) -> list[str]:
    """Item ids, one a line, each once.

    Errors   InputError where the file cannot be read; UsageError where it names nothing.
    """
    try:
        lines = path.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'{path} cannot be read: {error}.', 'name a file of item ids, one a line.') from error
    found = list(dict.fromkeys(line for text in lines if (line := text.strip())))
    if not found:
        raise UsageError(f'{path} names no item.', 'write one item id a line.')
    return found


class _Named(msgspec.Struct):
    item_id: str | None = None
    category: str | None = None


class Texts:
    """Ids by hash, for each column. Of those that share a hash the first one read."""

    def __init__(self) -> None:
        self._of: dict[str, dict[int, str]] = {column: {} for column in BUCKETS}
        self._seen: set[tuple[str | None, str | None]] = set()

    def remembered(self, values: Iterable[bytes]) -> Iterator[bytes]:
        """Pass event JSON on unchanged and remember its names. Lines that are not events pass too."""
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
                for column, text in zip(BUCKETS, names, strict=True):
                    if text:
                        self._of[column].setdefault(_HASH[column](text), text)
            yield value

    def of(self, column: str, hashes: np.ndarray) -> list[str]:
        """The ids of hashes that the recording has."""
        return [self._of[column][hashed] for hashed in hashes.tolist()]
