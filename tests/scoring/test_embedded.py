"""The shipped model in onnxruntime: what a window's scores depend on."""
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np

from stream.core.events import Event, EventType, Source
from stream.core.features import LENGTHS, Batch, Features, Snapshots, batches, features
from stream.core.layout import DAY_MS, WindowLimits
from stream.core.scores import OUTPUT_NAMES, Outputs, Scores, collect
from stream.core.user import User, fold, pack_header
from stream.scoring.embedded import EmbeddedScorer

SHIPPED = Path(__file__).parents[2] / 'triton_models' / 'shopper' / '1'
T0_MS = 1_700_000_000_000
COMPANY_MAX = 33
APART_MAX = 2e-6            # of an output; of spend above 1, relative
EQUAL_SHARE_MIN = 0.999     # of the rounded numbers: other processors may round the last bit in another way


@cache
def windows(slots_max: int, count: int = COMPANY_MAX) -> Features:
    """Windows of shoppers who view, put into the cart and buy at random, up to `slots_max` times."""
    rng = np.random.default_rng(slots_max)
    users = []
    for number in range(count):
        user, ts_ms = User(f'u{number}'), T0_MS
        for at in range(int(rng.integers(1, slots_max + 1))):
            ts_ms += int(rng.exponential(2 * DAY_MS))
            kind = rng.choice([EventType.VIEW, EventType.VIEW, EventType.ADD_TO_CART, EventType.PURCHASE])
            fold(user, [Event(user.user_id, str(at), at, ts_ms, int(kind), int(rng.integers(1, 1 << 32)),
                              int(rng.integers(1, 1 << 16)), 0, float(rng.lognormal(3, 1)), 0, Source.CLICKS, at)],
                 WindowLimits(silence_ms=()))
        users.append(user)
    return features(Snapshots.join([pack_header(user) for user in users], [user.days for user in users],
                                   [user.rows for user in users],
                                   [user.last_seen_ms + int(rng.integers(0, 40 * DAY_MS)) for user in users]))


def some(inputs: Features, rows: np.ndarray) -> Features:
    """These rows alone, renumbered."""
    counts = np.diff(inputs.starts)[rows]
    slots = np.concatenate([np.arange(inputs.starts[row], inputs.starts[row + 1]) for row in rows])
    slots = np.append(slots, len(inputs.categories) - 1)
    return Features(inputs.categories[slots], inputs.numbers[slots], np.concatenate(([0], np.cumsum(counts))),
                    inputs.counters[rows], inputs.slot_of_row[:0])


def longer(batch: Batch, length: int) -> Batch:
    missing = ((0, 0), (0, length - batch.categories.shape[1]), (0, 0))
    return Batch(np.pad(batch.categories, missing), np.pad(batch.numbers, missing), batch.counters, batch.row_id)


def by_row(asked: list[Batch], outputs: list[Outputs], rows: int) -> np.ndarray:
    """The raw outputs, [rows, all columns]."""
    parts = [np.concatenate([getattr(output, name) for name in OUTPUT_NAMES if name != 'row_id_out'], axis=1)
             for output in outputs]
    found = np.full((rows, parts[0].shape[1]), np.nan)
    for batch, part in zip(asked, parts, strict=True):
        found[batch.row_id[:batch.windows, 0]] = part[:batch.windows]
    return found


def rounded(scores: Scores) -> np.ndarray:
    """All numbers of the scores, [rows, all columns]."""
    parts = [getattr(scores, field.name) for field in fields(scores)]
    return np.concatenate([part.reshape(len(scores), -1).astype(np.float64) for part in parts], axis=1)


def in_any_company(slots_max: int, lengths: tuple[int, ...]) -> Iterator[tuple[np.ndarray, list[Batch]]]:
    """Batches of 1 to COMPANY_MAX drawn windows, padded to each length in turn."""
    rng = np.random.default_rng(7)
    for count in range(1, COMPANY_MAX + 1):
        rows = rng.permutation(COMPANY_MAX)[:count]
        cut = list(batches(some(windows(slots_max), rows), 256))
        for length in lengths:
            yield rows, [longer(batch, length) for batch in cut]


def assert_alike(slots_max: int, lengths: tuple[int, ...]) -> None:
    """A window's scores in any company are those of the window alone."""
    scorer = EmbeddedScorer(SHIPPED, off_loop=False)
    inputs, raw_alone, alone = windows(slots_max), [], []
    for row in range(COMPANY_MAX):
        asked = list(batches(some(inputs, np.array([row])), 256))
        outputs = scorer.score_now(asked)
        raw_alone.append(by_row(asked, outputs, 1))
        alone.append(rounded(collect(asked, outputs, 1)))
    raw_alone, alone = np.concatenate(raw_alone), np.concatenate(alone)
    assert np.unique(alone[:, 1]).size > COMPANY_MAX / 2     # the windows differ, so mixing them up would show
    equal = total = 0
    for rows, asked in in_any_company(slots_max, lengths):
        outputs = scorer.score_now(asked)
        raw = by_row(asked, outputs, len(rows))
        apart = np.abs(raw - raw_alone[rows]) / np.maximum(1.0, np.abs(raw_alone[rows]))
        assert apart.max() <= APART_MAX, f'{len(rows)} windows of {asked[-1].categories.shape[1]} slots'
        same = rounded(collect(asked, outputs, len(rows))) == alone[rows]
        equal, total = equal + int(same.sum()), total + same.size
    assert equal >= EQUAL_SHARE_MIN * total, f'{equal:,} of {total:,} numbers are equal'


def test_a_short_windows_scores_depend_on_neither_company_nor_padding():
    assert_alike(LENGTHS[0], LENGTHS)


def test_a_long_windows_scores_do_not_depend_on_company():
    assert_alike(LENGTHS[-1], LENGTHS[-1:])


def test_padding_rows_are_not_counted_as_windows():
    scorer = EmbeddedScorer(SHIPPED, off_loop=False)
    scorer.score_now(list(batches(some(windows(8), np.arange(5)), 256)))
    assert scorer.windows_scored == 5
