"""Reads recordings of input topics by topic, partition and offset. A replay along a journal needs this access."""
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import msgspec
import numpy as np

from stream.errors import InputError, UsageError
from stream.replay.formats import kafka_format
from stream.replay.topic_records import Inputs

_PROGRESS_RECORDS = 8192


class Place(msgspec.Struct, gc=False):
    """The topic, partition, offset and time of a recorded record."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int = 0


class RecordedTopics:
    """Recordings of the input topics, read by topic, partition and offset. Call `scan` first and `close` at the end.

    `scan` copies the lines, uncompressed, to an unnamed temporary file. It needs 24 bytes of memory per record.

    rows      number of distinct records; a record in two files counts once
    """

    def __init__(self, paths: Sequence[Path], inputs: Inputs, spool_dir: Path | None = None) -> None:
        """`spool_dir` is the folder for the temporary file; None: the system's temporary folder."""
        if not paths:
            raise UsageError('No file to replay was named.', 'name at least one file.')
        self.inputs = inputs
        self.rows = 0
        self._paths = list(paths)
        self._spool_dir = spool_dir
        self._spool: IO[bytes] | None = None
        self._tables: dict[tuple[str, int], np.ndarray] = {}     # int64 [N, 3]: offset, start, length; by offset

    def scan(self, progress: Callable[[int], None] | None = None) -> None:
        """Read everything once.

        progress  called from time to time with the number of records read so far
        Errors    InputError if a file cannot be read or was not written by `stream record`, or if no file has a record
                  of an input topic.
        """
        columns: dict[tuple[str, int], tuple[array, array, array]] = {}
        start = 0
        try:
            self._spool = spool = TemporaryFile(dir=self._spool_dir)    # noqa: SIM115 - kept until `close`
            for read, (path, line) in enumerate(self._lines(), 1):
                place = _place(path, line)
                table = columns.setdefault((place.topic, place.partition), (array('q'), array('q'), array('q')))
                for column, value in zip(table, (place.offset, start, len(line)), strict=True):
                    column.append(value)
                spool.write(line)
                start += len(line)
                if progress and read % _PROGRESS_RECORDS == 0:
                    progress(read)
            spool.flush()
        except OSError as error:
            raise InputError(f'The records cannot be copied to a temporary file: {error}.',
                             'free enough disk space for all records, or set TMPDIR to another folder.') from error
        if not columns:
            raise InputError(f'The recording has no record of {" or ".join(self.inputs.topics)}.',
                             'name recordings of the input topics (settings clicks_topic and carts_topic).')
        for place, table in columns.items():
            rows = np.stack([np.frombuffer(column, np.int64) for column in table], axis=1)
            self._tables[place] = rows[np.unique(rows[:, 0], return_index=True)[1]]
        self.rows = sum(map(len, self._tables.values()))

    def lines(self, topic: str, partition: int, start: int, stop: int) -> list[bytes]:
        """The recorded lines at offsets [start, stop), in order. Gaps are normal: topics have them."""
        table = self._tables.get((topic, partition))
        if table is None:
            return []
        assert self._spool is not None      # there is a table
        first, end = np.searchsorted(table[:, 0], (start, stop))
        number = self._spool.fileno()
        return [os.pread(number, length, at) for _, at, length in table[first:end].tolist()]

    def places(self) -> list[tuple[str, int]]:
        """Topics and partitions with records."""
        return sorted(self._tables)

    def count_from(self, topic: str, partition: int, offset: int) -> int:
        """How many recorded records have this offset or a later one."""
        table = self._tables[topic, partition]
        return len(table) - int(np.searchsorted(table[:, 0], offset))

    def end(self, topic: str, partition: int) -> int:
        """The newest recorded offset plus one; 0 if there are no records."""
        table = self._tables.get((topic, partition))
        return 0 if table is None else int(table[-1, 0]) + 1

    def close(self) -> None:
        """Close the temporary file, which deletes it."""
        if self._spool is not None:
            self._spool.close()

    def _lines(self) -> Iterator[tuple[Path, bytes]]:
        for path in self._paths:
            with closing(kafka_format(self.inputs).rows(path)) as rows:
                for line in rows:
                    assert isinstance(line, bytes)      # this format never refuses a row
                    yield path, line


decode_place = msgspec.json.Decoder(Place).decode


def _place(path: Path, line: bytes) -> Place:
    try:
        return decode_place(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f'{path} has a line that is not a record of a topic: {error}.',
                         'name complete files of `stream record`.') from error
