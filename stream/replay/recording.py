"""A recording: one or more files, replayed as one stream in event-time order.

Two passes. `scan` reads the event times and nothing else of each row; `blocks` reads the rows again and hands them on
in order, in the file's order where times are equal. What is in memory:

    always             8 bytes a row: the event times
    files in order     one block of rows besides
    otherwise          8 bytes a row more for the order, and either all rows (`rows_in_memory_max` or fewer) or one
                       sorted run of that many; the runs go to a temporary file that no name leads to, so that nothing is
                       left of it whatever happens to the process

Because the times are in memory, the order of all rows is known before the second pass: merging the sorted runs is
taking the next row of the run that comes next, without comparing anything.
"""
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import msgspec
import numpy as np

from stream.core.events import peek_ts_ms
from stream.errors import InputError, UsageError
from stream.replay.formats import FORMATS, BadRow, Format, Occurrences

_SCAN_ROWS = 8192
_SPILL_CHUNK_ROWS = 512     # each run has one chunk in memory while the runs are merged
_LENGTH_BYTES = 8

Row = bytes | BadRow


@dataclass
class Block:
    """Consecutive rows of the stream.

    values             one event's bytes each; of a bad row, its raw bytes
    numbers            each row's number over all files, from 0 (see `Recording.locate`)
    bad                place in `values` -> what is wrong with that row
    first_ms, last_ms  event times of the first and the last row, Unix ms
    """

    values: list[bytes]
    numbers: Sequence[int]
    bad: dict[int, BadRow]
    first_ms: int
    last_ms: int


class Recording:
    """Files of one format, as one stream. Call `scan` first.

    rows              number of rows, bad ones included
    first_ms, last_ms earliest and latest event time, Unix ms; 0 where no row has a time
    in_order          whether the rows stand in event-time order already, over all files
    """

    def __init__(
        self, paths: Sequence[Path], format: str, rows_in_memory_max: int = 500_000, spill_dir: Path | None = None,
    ) -> None:
        """Nothing is read yet.

        format              a name in FORMATS
        rows_in_memory_max  files that are not in order and have more rows than this are sorted on disk
        spill_dir           where; None: the system's folder for temporary files, which may be small or in memory
        """
        if format not in FORMATS:
            raise UsageError(f'There is no format {format!r}.', f'use one of {", ".join(FORMATS)}.')
        if not paths:
            raise UsageError('No file to replay was named.', 'name at least one file.')
        self._paths = list(paths)
        self._format: Format = FORMATS[format]
        self._rows_in_memory_max = rows_in_memory_max
        self._spill_dir = spill_dir
        self._times_ms: np.ndarray | None = None
        self._first_numbers: list[int] = []     # of each file
        self.rows = 0
        self.first_ms = 0
        self.last_ms = 0
        self.in_order = True

    def scan(self, progress: Callable[[int], None] | None = None) -> None:
        """First pass: learn the rows' number, times and order.

        A row without a readable time takes the time of the row before it; the first ones that of the first readable row.

        progress  called now and then with the number of rows read so far
        Errors    InputError where a file cannot be read.
        """
        times = array('q')      # grows in place; only its bytes matter
        counts = []
        known_from: int | None = None       # the first row with a readable time
        occurrences = Occurrences()
        for path in self._paths:
            before = len(times)
            with closing(self._format.rows(path, occurrences)) as rows:
                while chunk := list(islice(rows, _SCAN_ROWS)):
                    if known_from is None:
                        known_from = _append_first_times(times, chunk)
                    else:
                        _append_times(times, chunk)
                    if progress is not None:
                        progress(len(times))
            counts.append(len(times) - before)
        if known_from:
            times[:known_from] = array('q', [times[known_from]]) * known_from
        self._times_ms = np.frombuffer(times, dtype=np.int64)
        self._first_numbers = [0, *accumulate(counts)][:-1]
        self.rows = len(times)
        self.in_order = _is_sorted(self._times_ms)
        if self.rows:
            self.first_ms = int(self._times_ms.min())
            self.last_ms = int(self._times_ms.max())

    def blocks(self, events_max: int, span_ms_max: int) -> Iterator[Block]:
        """Second pass: all rows in event-time order, equal times in file order.

        events_max   most rows of a block, at least 1
        span_ms_max  most milliseconds of event time between a block's first and last row, at least 0
        Errors       InputError where a file changed since `scan` or the temporary file cannot be written.
        """
        if self._times_ms is None:
            raise RuntimeError('scan() comes first')
        if events_max < 1 or span_ms_max < 0:
            raise ValueError(f'events_max={events_max} and span_ms_max={span_ms_max} leave no room for a row')
        if self.in_order:
            return self._blocks(self._times_ms, None, events_max, span_ms_max)
        order = np.argsort(self._times_ms, kind='stable')
        return self._blocks(self._times_ms, order, events_max, span_ms_max)

    def locate(self, number: int) -> tuple[Path, int]:
        """The file of a row and the row's number in it, from 1; a header is not counted."""
        if not 0 <= number < self.rows:
            raise IndexError(f'row {number} of {self.rows}')
        file = bisect_right(self._first_numbers, number) - 1
        return self._paths[file], number - self._first_numbers[file] + 1

    def _blocks(
        self, times_ms: np.ndarray, order: np.ndarray | None, events_max: int, span_ms_max: int,
    ) -> Iterator[Block]:
        with closing(self._read_again() if order is None else self._sorted_rows(order)) as stream:
            start = 0
            while start < self.rows:
                candidates = slice(start, start + events_max)
                times = times_ms[candidates] if order is None else times_ms[order[candidates]]
                count = int(np.searchsorted(times, int(times[0]) + span_ms_max, side='right'))
                stop = start + count
                rows = list(islice(stream, count))
                numbers = range(start, stop) if order is None else order[start:stop].tolist()
                yield _block(rows, numbers, int(times[0]), int(times[count - 1]))
                start = stop
            # The reader finds a file that has grown only when it is asked for one more row.
            next(stream, None)

    def _read_again(self) -> Iterator[Row]:
        """All rows in file order; InputError if they are not as many as `scan` saw."""
        occurrences = Occurrences()
        for path, first, end in zip(self._paths, self._first_numbers, [*self._first_numbers[1:], self.rows],
                                    strict=True):
            count = end - first
            with closing(self._format.rows(path, occurrences)) as rows:
                seen = yield from _counted(rows, count)
                if seen < count or next(rows, None) is not None:
                    raise InputError(f'{path} changed while it was replayed (it had {count} rows).',
                                     'replay a copy, or wait until nobody writes to it.')

    def _sorted_rows(self, order: np.ndarray) -> Iterator[Row]:
        if self.rows <= self._rows_in_memory_max:
            rows = list(self._read_again())
            yield from map(rows.__getitem__, map(int, order))
        else:
            yield from self._merged_runs(order)
