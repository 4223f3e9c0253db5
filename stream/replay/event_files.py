"""The product's own events: one JSON object a line, or a Parquet file whose columns are the event's fields."""
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from stream.core.events import EventRecord
from stream.errors import INSTALL_REPORT, InputError, extra_module
from stream.replay.rows import DETAIL_CHARS_MAX, BadRow, Occurrences, Rows, dumps, lines

_PARQUET_BATCH_ROWS = 8192


def event_rows(path: Path, _occurrences: Occurrences) -> Rows:
    """Rows of a file of events, by its name: Parquet, or lines of JSON."""
    return _parquet_rows(path) if path.suffix == '.parquet' else lines(path)


def _parquet_rows(path: Path) -> Rows:
    """Rows of a Parquet file. Its columns have the names of the event's fields; other columns are ignored."""
    extra_module('pyarrow', 'A Parquet file', INSTALL_REPORT)
    import pyarrow  # here, because it takes 0.2 s and few recordings need it
    from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in EventRecord.__struct_fields__ if name in file.schema_arrow.names]
            missing = [name for name in ('event_id', 'user_id', 'ts', 'type') if name not in names]
            if missing:
                raise InputError(f'{path} lacks the columns {", ".join(missing)}.',
                                 'name the columns like the fields of an event: '
                                 f'{", ".join(EventRecord.__struct_fields__)}.')
            for batch in file.iter_batches(_PARQUET_BATCH_ROWS, columns=names):
                columns = [_plain(batch.column(name), name) for name in names]
                yield from map(partial(_rendered, names), _values(columns))
    except FileNotFoundError as error:
        raise InputError(f'There is no file {path}.', 'check the path.') from error
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f'{path} cannot be read as Parquet: {error}.',
                         'write the file again. Only a Parquet file may end in .parquet.') from error


def _plain(column: Any, name: str) -> Any:
    """The Arrow column as a type that JSON has: times as Unix ms, decimals as floats, whole-number ids as text."""
    import pyarrow
    from pyarrow import compute, types
    if types.is_timestamp(column.type) or types.is_date(column.type):
        milliseconds = compute.CastOptions(pyarrow.timestamp('ms'), allow_time_truncate=True)
        if types.is_timestamp(column.type) and column.type.tz is not None:
            milliseconds = compute.CastOptions(pyarrow.timestamp('ms', column.type.tz), allow_time_truncate=True)
        return compute.cast(column, options=milliseconds).cast(pyarrow.int64())
    if types.is_decimal(column.type):
        return column.cast(pyarrow.float64())
    if types.is_integer(column.type) and name.endswith('_id'):
        return column.cast(pyarrow.string())
    return column


def _values(columns: list[Any]) -> Iterator[tuple[Any, ...]]:
    try:
        return zip(*[column.to_pylist() for column in columns], strict=True)
    except UnicodeDecodeError:      # one text that is not UTF-8 must not spoil its whole batch
        return zip(*[map(_value_or_error, column) for column in columns], strict=True)


def _value_or_error(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return error


def _rendered(names: list[str], row: tuple[Any, ...]) -> bytes | BadRow:
    event = {name: value for name, value in zip(names, row, strict=True) if value is not None}
    for name, value in event.items():
        if type(value) is float and not math.isfinite(value):   # JSON has no such number: it would become null
            return _bad_parquet_row(event, 'bad_number', f'{name} is {value}')
    try:
        return dumps(event)
    except orjson.JSONEncodeError as error:
        return _bad_parquet_row(event, 'unrenderable', str(error))


def _bad_parquet_row(event: dict[str, Any], reason: str, detail: str) -> BadRow:
    return BadRow(repr(event).encode(errors='backslashreplace'), reason, detail[:DETAIL_CHARS_MAX])
