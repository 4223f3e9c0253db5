"""Rows of recorded files: what a format is, how often a row was seen, and the lines of a text file.

A row becomes the JSON of an event, or a `BadRow` if it is not an event. In every text format, a row is one line. So a
quoted field with a line break gives bad rows, but a quote that is never closed costs only one row.

Text files may be compressed (.gz, .zst).
"""
from collections.abc import Callable, Generator
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

import orjson

from stream.errors import InputError
from stream.replay.compression import DAMAGE_ERRORS, is_compressed, open_to_read
from stream.replay.topic_records import Inputs

_READ_BUFFER_BYTES = 1 << 20
DETAIL_CHARS_MAX = 200     # a detail quotes the row, and a row may be long; the whole row is in `raw`
_without_cr = methodcaller('rstrip', b'\r')


@dataclass(frozen=True)
class BadRow:
    """A row that is not an event.

    raw     the row's bytes without its line end; of a Parquet row, its Python repr
    reason  short_row, long_row, bad_csv, bad_encoding, no_user, bad_time, bad_number, unknown_type, unrenderable
    detail  one sentence for a person
    """

    raw: bytes
    reason: str
    detail: str


Rows = Generator[bytes | BadRow, None, None]


class Occurrences:
    """Counts how often each row was seen, over all files of one recording. The count ends an event id."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._ts_ms: int | None = None

    def next_number(self, digest: str) -> int:
        """1 for the first row with this digest, then 2, 3 and so on."""
        number = self._counts.get(digest, 0) + 1
        self._counts[digest] = number
        return number

    def forget_before(self, ts_ms: int) -> None:
        """Forget everything unless `ts_ms` is the event time of the row before."""
        if ts_ms != self._ts_ms:
            self._ts_ms = ts_ms
            self._counts.clear()


@dataclass(frozen=True)
class Format:
    """One kind of recorded file: its name, a line of help, and a function that reads it.

    records   None: a row is the JSON of an event. Otherwise a row is a record of one of these topics, and
              `RecordTimes` says where in the stream it belongs.
    currency  ISO 4217 code of the data set's amounts. Empty: not known, and the currency of the settings is assumed.
    """

    name: str
    help: str
    read: Callable[[Path, Occurrences], Rows]
    records: Inputs | None = None
    currency: str = ''

    def rows(self, path: Path, occurrences: Occurrences | None = None) -> Rows:
        """The file's rows in file order, each as event JSON or as a `BadRow`. A header is not a row.

        occurrences  shared by the files of one recording; None: this file is the only one
        Errors       InputError if the file as a whole cannot be read: it is missing or cut short, or has other columns.
        """
        return self.read(path, Occurrences() if occurrences is None else occurrences)


class UnusableRowError(Exception):
    """The adapter cannot make an event of this row. Carries the reason and detail of the `BadRow`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def lines(path: Path) -> Generator[bytes, None, None]:
    """The lines of a text file without their line ends. Errors: InputError if it cannot be read to its end."""
    try:
        with open_to_read(path) as file:
            rest = b''
            while chunk := file.read(_READ_BUFFER_BYTES):       # split by hand: twice as fast as asking for each line
                text = rest + chunk
                *lines, rest = text.split(b'\n')
                yield from map(_without_cr, lines) if b'\r' in text else lines
            if rest:
                yield _without_cr(rest)
    except FileNotFoundError as error:
        raise InputError(f'There is no file {path}.', 'check the path.') from error
    except (OSError, *DAMAGE_ERRORS) as error:
        raise InputError(f'{path} cannot be read: {error}.', _how_to_read(path)) from error


def _how_to_read(path: Path) -> str:
    if is_compressed(path):
        return (f'copy or download the file again if it was cut short. A file that is not compressed must not end in '
                f'{path.suffix}.')
    return 'name a file, not a folder, that this user may read.'


def dumps(event: dict[str, Any]) -> bytes:
    """The event as JSON."""
    # A copy: orjson's own result would hold a buffer of kilobytes as long as the row waits to be sorted.
    return bytes(memoryview(orjson.dumps(event)))
