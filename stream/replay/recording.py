"""A recording: one or more files, read as one stream in event-time order.

It is read in two passes. `scan` reads only the event time of each row. `chunks` reads the rows again and returns them
in time order; rows of equal times keep the order of the file. The memory in use is:

    always             8 bytes per row for the event times. In formats without event ids also about 100 bytes per
                       distinct row, to count its occurrences (rees46 is sorted by time: those of the newest second)
    files in order     one chunk of rows in addition
    otherwise          8 bytes per row more for the order, and either all rows (up to `rows_in_memory_max`) or one
                       sorted run of that many rows. The runs go to an unnamed temporary file, so that nothing of it
                       is left, even if the process is killed

The times are in memory, so the order of all rows is known before the second pass. Sorted runs are merged without any
comparison: the order says which run has the next row.
"""
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, TypeGuard

import msgspec
import numpy as np

from stream.core.events import Decoder, Event, EventRules, Refusal, peek_order
from stream.errors import InputError, UsageError
from stream.replay import topic_records
from stream.replay.formats import FORMATS
from stream.replay.rows import BadRow, Format, Occurrences
from stream.replay.topic_records import Inputs, RecordTimes

_READ_ROWS = 8192
_SPILL_ROWS = 512     # each run has so many rows in memory while the runs are merged
_LENGTH_BYTES = 8

Row = bytes | BadRow

_encode_rows = msgspec.msgpack.Encoder().encode
_decode_rows = msgspec.msgpack.Decoder(list[Row]).decode


@dataclass
class Chunk:
    """Consecutive rows of the stream.

    values             the bytes of each event; of a bad row, its raw bytes
    numbers            of each row over all files, from 0 (see `Recording.locate`)
    bad                index in `values` -> what is wrong with that row
    first_ms, last_ms  event times of the first and the last row, Unix ms
    """

    values: list[bytes]
    numbers: Sequence[int]
    bad: dict[int, BadRow]
    first_ms: int
    last_ms: int


class Recording:
    """Files of one format, as one stream. Call `scan` first.

    records           as `Format.records`: None, or the topics whose records the rows are
    rows              number of rows, including bad ones
    first_ms, last_ms earliest and latest event time, Unix ms; 0 if no row has a time
    in_order          whether the rows of all files are in event-time order already
    """

    def __init__(
        self, paths: Sequence[Path], format: str | Format,  # noqa: A002 (the word that the operator types)
        rows_in_memory_max: int = 500_000, spill_dir: Path | None = None,
    ) -> None:
        """Reads nothing yet.

        format              a name in FORMATS, or a format made from the settings
        rows_in_memory_max  if the files are not in order and have more rows, they are sorted on disk
        spill_dir           folder for that; None: the system's folder for temporary files, which may be small
        """
        if isinstance(format, str) and format not in FORMATS:
            raise UsageError(f'There is no format {format!r}.', f'use one of {", ".join(FORMATS)}.')
        if not paths:
            raise UsageError('No file to replay was named.', 'name at least one file.')
        self._paths = list(paths)
        self._format: Format = FORMATS[format] if isinstance(format, str) else format
        self.records: Inputs | None = self._format.records
        self._rows_in_memory_max = rows_in_memory_max
        self._spill_dir = spill_dir
        self._places: np.ndarray | None = None      # of each row: 2 * time in ms + source
        self._first_numbers: list[int] = []     # of each file
        self.rows = 0
        self.first_ms = 0
        self.last_ms = 0
        self.in_order = True

    def scan(self, progress: Callable[[int], None] | None = None) -> None:
        """First pass: find the number, the times and the order of the rows.

        A row without a readable time gets the time of the row before it. The first rows get that of the first row
        with a readable time.

        progress  is called from time to time with the number of rows read so far
        Errors    InputError if a file cannot be read.
        """
        places = array('q')     # int64 that grows in place
        first_numbers = []
        known_from: int | None = None       # the first row with a readable time
        occurrences = Occurrences()
        peek = peek_order if self.records is None else _record_order(RecordTimes())
        for path in self._paths:
            _refuse_stream(path)
            first_numbers.append(len(places))
            with closing(self._format.rows(path, occurrences)) as rows:
                while chunk := list(islice(rows, _READ_ROWS)):
                    found = _peek_places(chunk, peek)
                    if known_from is None:
                        known_from = next((len(places) + i for i, place in enumerate(found) if place is not None), None)
                    _append_places(places, found)
                    if progress is not None:
                        progress(len(places))
        order = np.frombuffer(places, dtype=np.int64) if places else np.empty(0, dtype=np.int64)
        if known_from:
            order[:known_from] = order[known_from]
        self._places = order
        self._first_numbers = first_numbers
        self.rows = len(order)
        self.in_order = bool(np.all(order[1:] >= order[:-1]))
        times_ms = order >> 1
        self.first_ms = int(times_ms.min()) if self.rows else 0
        self.last_ms = int(times_ms.max()) if self.rows else 0

    def chunks(self, events_max: int, span_ms_max: int) -> Iterator[Chunk]:
        """Second pass: all rows in event-time order. With equal times, clicks precede carts, then file order decides.

        events_max   most rows of a chunk, at least 1
        span_ms_max  most milliseconds of event time between the first and the last row of a chunk, at least 0
        Errors       InputError if a file changed since `scan`, or the temporary file cannot be written.
        """
        if self._places is None:
            raise RuntimeError('scan() comes first')
        if events_max < 1 or span_ms_max < 0:
            raise ValueError(f'events_max={events_max} and span_ms_max={span_ms_max} leave no room for a row')
        order = None if self.in_order else np.argsort(self._places, kind='stable')
        return self._chunks(self._places, order, events_max, span_ms_max)

    def locate(self, number: int) -> tuple[Path, int]:
        """The file of a row, and the number of the row in it, from 1. A header does not count."""
        if not 0 <= number < self.rows:
            raise IndexError(f'row {number} of {self.rows}')
        file = bisect_right(self._first_numbers, number) - 1
        return self._paths[file], number - self._first_numbers[file] + 1

    def decoder(self, rules: EventRules) -> Callable[[bytes], Event | Refusal]:
        """A function that decodes the rows that are not bad. Events from records get their source and offset."""
        return row_decoder(rules, self.records)

    def _chunks(
        self, places: np.ndarray, order: np.ndarray | None, events_max: int, span_ms_max: int,
    ) -> Iterator[Chunk]:
        with closing(self._stream(places, order)) as stream:
            start = 0
            while start < self.rows:
                window = slice(start, start + events_max)
                times = (places[window] if order is None else places[order[window]]) >> 1
                count = int(np.searchsorted(times, times[0] + span_ms_max, side='right'))
                numbers = range(start, start + count) if order is None else order[start:start + count].tolist()
                yield _chunk(list(islice(stream, count)), numbers, int(times[0]), int(times[count - 1]))
                start += count
            next(stream, None)      # asks for one more row, to notice if the last file has grown

    def _stream(self, places: np.ndarray, order: np.ndarray | None) -> Generator[Row, None, None]:
        if order is None:
            yield from self._read_again()
        elif self.rows <= self._rows_in_memory_max:
            rows = list(self._read_again())
            yield from map(rows.__getitem__, order.tolist())
        else:
            yield from self._merged_runs(places, order)

    def _read_again(self) -> Generator[Row, None, None]:
        """All rows in file order. Errors: InputError if a file does not have as many rows as in `scan`."""
        occurrences = Occurrences()
        for path, (first, end) in zip(self._paths, pairwise([*self._first_numbers, self.rows]), strict=True):
            with closing(self._format.rows(path, occurrences)) as rows:
                left = end - first
                while left and (chunk := list(islice(rows, min(left, _READ_ROWS)))):
                    yield from chunk
                    left -= len(chunk)
                if left or next(rows, None) is not None:
                    raise InputError(f'{path} changed while it was replayed (it had {end - first} rows).',
                                     'replay a copy, or wait until nothing writes to it.')

    def _merged_runs(self, places: np.ndarray, order: np.ndarray) -> Generator[Row, None, None]:
        try:
            with TemporaryFile(dir=self._spill_dir) as file:
                ends = self._write_runs(file, places)
                runs = [_read_run(file, start, end) for start, end in pairwise([0, *ends])]
                for first in range(0, self.rows, _READ_ROWS):
                    next_runs = order[first:first + _READ_ROWS] // self._rows_in_memory_max
                    yield from map(next, map(runs.__getitem__, next_runs.tolist()))
        except OSError as error:
            raise InputError(f'The rows cannot be sorted on disk: {error}.',
                             'name another folder for temporary files, with room for all rows.') from error

    def _write_runs(self, file: BinaryIO, places: np.ndarray) -> list[int]:
        """Write the rows as sorted runs. Returns the position in the file at which each run ends."""
        ends = []
        with closing(self._read_again()) as rows:
            for first in range(0, self.rows, self._rows_in_memory_max):
                run = list(islice(rows, self._rows_in_memory_max))
                order = np.argsort(places[first:first + len(run)], kind='stable').tolist()
                for start in range(0, len(run), _SPILL_ROWS):
                    chunk = _encode_rows([run[place] for place in order[start:start + _SPILL_ROWS]])
                    file.write(len(chunk).to_bytes(_LENGTH_BYTES, 'little'))
                    file.write(chunk)
                ends.append(file.tell())
            next(rows, None)        # asks for one more row, to notice if the last file has grown
        return ends


def row_decoder(rules: EventRules, records: Inputs | None) -> Callable[[bytes], Event | Refusal]:
    """As `Recording.decoder`, for `Recording.records`."""
    return Decoder(rules) if records is None else topic_records.decoder(rules, records)


def _refuse_stream(path: Path) -> None:
    """Errors: InputError if the path can be read only once, as the second pass would find nothing or wait for ever."""
    if path.is_fifo() or path.is_socket() or (path.is_char_device() and path != Path(os.devnull)):
        raise InputError(f'{path} is not a file: it can be read only once, and a replay reads twice.',
                         'save the rows as a file, and name that.')


def _peek_places(rows: list[Row], peek: Callable[[bytes], int | None]) -> list[int | None]:
    if _no_bad_row(rows):
        return list(map(peek, rows))
    return [None if isinstance(row, BadRow) else peek(row) for row in rows]


def _record_order(time_of: RecordTimes) -> Callable[[bytes], int | None]:
    """Records are ordered by their times, whatever their topic."""
    def peek(line: bytes) -> int | None:
        time_ms = time_of(line)
        return None if time_ms is None else 2 * time_ms
    return peek


def _no_bad_row(rows: list[Row]) -> TypeGuard[list[bytes]]:
    return set(map(type, rows)) <= {bytes}


def _append_places(places: array, found: list[int | None]) -> None:
    """Append the places. None takes the place before it, or 0 at the start."""
    try:
        places.fromlist(found)      # all or nothing; None is rare
    except TypeError:
        last = places[-1] if places else 0
        for place in found:
            last = last if place is None else place
            places.append(last)


def _chunk(rows: list[Row], numbers: Sequence[int], first_ms: int, last_ms: int) -> Chunk:
    if _no_bad_row(rows):
        return Chunk(rows, numbers, {}, first_ms, last_ms)
    bad = {place: row for place, row in enumerate(rows) if isinstance(row, BadRow)}
    values = [row.raw if isinstance(row, BadRow) else row for row in rows]
    return Chunk(values, numbers, bad, first_ms, last_ms)


def _read_run(file: BinaryIO, start: int, end: int) -> Iterator[Row]:
    return chain.from_iterable(_read_chunks(file, start, end))


def _read_chunks(file: BinaryIO, start: int, end: int) -> Iterator[list[Row]]:
    while start < end:
        file.seek(start)        # the runs take turns with this file
        length = int.from_bytes(file.read(_LENGTH_BYTES), 'little')
        yield _decode_rows(file.read(length))
        start += _LENGTH_BYTES + length
