"""Recorded files become event JSON, the same bytes that a producer would put on Kafka.

An adapter only renames and converts; whether an event is valid is decided by the one decoder of the core, which reads
these bytes next. A row that an adapter cannot turn into an event at all is a `BadRow`, not an exception. A row is one
line, in every text format: a quoted field with a line break in it gives bad rows, so that a quote that is never closed
costs one row and not the rest of the file.

    format           columns (any order, more are ignored)                     becomes
    events           one event JSON a line, or Parquet with its field names    itself
    retailrocket     timestamp visitorid event itemid transactionid            view, add_to_cart, purchase
    rees46           event_time event_type product_id category_id              view, add_to_cart, remove_from_cart,
                     category_code price user_id user_session                  purchase
    online-retail    InvoiceNo StockCode Quantity InvoiceDate UnitPrice        purchase; refund where InvoiceNo starts
                     CustomerID                                                with C
    cdnow            customer, yyyymmdd, CDs, dollars; blanks between them     purchase
    tmall            user_id brand_id type visit_datetime                      click, purchase, favorite, add_to_cart
    kafka            records of the input topics (see topic_records)           as the worker would read them

Text files may be compressed (.gz, .zst). Times without a zone are UTC. No row of theirs names a currency but those of
`events` and `kafka`; where a set is known to be in one, the format says it (`currency`).

Event ids: except for `events`, an event's id is its format, 16 hex digits of XXH3 of the row's bytes, and how often
these bytes have been seen, from 1: `cdnow-0123456789abcdef-1`. The same file gives the same ids whatever the order of
its rows, and a row that stands there twice is two events.

Sources: Retailrocket recommender system dataset (Kaggle); REES46 eCommerce behavior data from multi category store;
UCI Online Retail; CDNOW master data of Fader and Hardie; Tmall (Alibaba big data competition 2014).
"""
import csv
import math
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from operator import itemgetter, methodcaller
from pathlib import Path
from typing import Any

import orjson
from xxhash import xxh3_64_hexdigest

from stream.core.events import EventRecord
from stream.errors import INSTALL_REPORT, InputError, extra_module
from stream.replay.compression import DAMAGED, is_compressed, open_to_read
from stream.replay.topic_records import Inputs

_READ_BUFFER_BYTES = 1 << 20
_PARQUET_BATCH_ROWS = 8192
_DETAIL_CHARS_MAX = 200     # a detail quotes the row, and a row may be long; the whole row is in `raw`


@dataclass(frozen=True)
class BadRow:
    """A row that is no event.

    raw     the row's bytes without its line end (of a Parquet row, which has none: its Python repr)
    reason  short_row, long_row, bad_csv, bad_encoding, no_user, bad_time, bad_number, unknown_type, unrenderable
    detail  one sentence for a person
    """

    raw: bytes
    reason: str
    detail: str


class Occurrences:
    """How often each row has been seen, over all files of one recording: the last part of an event id."""

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


Rows = Generator[bytes | BadRow, None, None]


@dataclass(frozen=True)
class Format:
    """One kind of recorded file: its name, a line of help, and how it is read.

    records   None: a row is an event's JSON. Else a row is a line with a record of one of these topics, and stands in
              the stream where `RecordTimes` puts it.
    currency  ISO 4217 code of the set's amounts; empty: they are in that of the settings, for all that is known
    """

    name: str
    help: str
    read: Callable[[Path, Occurrences], Rows]
    records: Inputs | None = None
    currency: str = ''

    def rows(self, path: Path, occurrences: Occurrences | None = None) -> Rows:
        """The file's rows in file order, as event JSON or `BadRow`; a header is not a row.

        occurrences  shared by the files of one recording; None: this file stands alone
        Errors       InputError where the file as a whole cannot be read: missing, truncated, the wrong columns.
                     UsageError for a Parquet file where pyarrow is not installed.
        """
        return self.read(path, Occurrences() if occurrences is None else occurrences)


class _UnusableRowError(Exception):
    """The adapter cannot make an event of this row: reason and detail of the `BadRow`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


# ---- files ----------------------------------------------------------------------------------------------------------

def _lines(path: Path) -> Generator[bytes, None, None]:
    """The lines of a text file without their line ends; InputError where it cannot be read to its end."""
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
    except (OSError, *DAMAGED) as error:
        raise InputError(f'{path} cannot be read: {error}.', _how_to_read(path)) from error


_without_cr = methodcaller('rstrip', b'\r')


def _how_to_read(path: Path) -> str:
    if is_compressed(path):
        return (f'copy or download the file again if it was cut short; a file that is not compressed must not end in '
                f'{path.suffix}.')
    return 'name a file (not a folder) that this user may read.'


# ---- the product's own events ---------------------------------------------------------------------------------------

def _event_rows(path: Path, _occurrences: Occurrences) -> Rows:
    return _parquet_rows(path) if path.suffix == '.parquet' else _lines(path)


def _parquet_rows(path: Path) -> Rows:
    """Rows of a Parquet file whose columns are named as the event's fields; other columns are not read."""
    extra_module('pyarrow', 'A Parquet file', INSTALL_REPORT)
    import pyarrow  # here, because it takes 0.2 s and few recordings need it
    from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in EventRecord.__struct_fields__ if name in file.schema_arrow.names]
            missing = [name for name in ('event_id', 'user_id', 'ts', 'type') if name not in names]
            if missing:
                raise InputError(f'{path} lacks the columns {", ".join(missing)}.',
                                 'name the columns as the fields of an event: '
                                 f'{", ".join(EventRecord.__struct_fields__)}.')
            for batch in file.iter_batches(_PARQUET_BATCH_ROWS, columns=names):
                columns = [_plain(batch.column(name), name) for name in names]
                yield from map(partial(_rendered, names), _values(columns))
    except FileNotFoundError as error:
        raise InputError(f'There is no file {path}.', 'check the path.') from error
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f'{path} cannot be read as Parquet: {error}.',
                         'write the file again; only a Parquet file may end in .parquet.') from error


def _plain(column: Any, name: str) -> Any:
    """The Arrow column in a type that JSON has: times as Unix ms, decimals as floats, whole-number ids as text."""
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
    except UnicodeDecodeError:      # one text that is not UTF-8 must not cost its whole batch
        return zip(*[map(_value_or_error, column) for column in columns], strict=True)


def _value_or_error(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return error


def _dumps(event: dict[str, Any]) -> bytes:
    # A copy: orjson's own result keeps a buffer of kilobytes for as long as the row is held for sorting.
    return bytes(memoryview(orjson.dumps(event)))


def _rendered(names: list[str], row: tuple[Any, ...]) -> bytes | BadRow:
    event = {name: value for name, value in zip(names, row, strict=True) if value is not None}
    for name, value in event.items():
        if type(value) is float and not math.isfinite(value):   # JSON has none of these: they would turn into null
            return _bad_parquet_row(event, 'bad_number', f'{name} is {value}')
    try:
        return _dumps(event)
    except orjson.JSONEncodeError as error:
        return _bad_parquet_row(event, 'unrenderable', str(error))


def _bad_parquet_row(event: dict[str, Any], reason: str, detail: str) -> BadRow:
    return BadRow(repr(event).encode(errors='backslashreplace'), reason, detail[:_DETAIL_CHARS_MAX])


# ---- rows of fields -------------------------------------------------------------------------------------------------

def _csv_rows(
    name: str, columns: tuple[str, ...], convert: Callable[..., dict[str, Any]], sorted_by_time: bool,
    path: Path, occurrences: Occurrences,
) -> Rows:
    """Rows of a comma-separated file with a header that names at least `columns`, in any order."""
    lines = _lines(path)
    header_line = next(lines, None)
    if header_line is None:
        return
    header = _header(header_line, columns, path)
    picked = itemgetter(*[header.index(column) for column in columns])

    def fields_of(text: str) -> tuple[str, ...]:
        fields = _split(text)
        _check_count(fields, len(header))
        return picked(fields)

    yield from _converted(name, lines, fields_of, convert, sorted_by_time, occurrences)


def _cdnow_rows(path: Path, occurrences: Occurrences) -> Rows:
    """Rows of the CDNOW master file: four fields with blanks between them; the header is optional."""
    lines = _lines(path)
    first_line = next(lines, None)
    if first_line is None:
        return
    is_header = bool(first_line) and not re.search(rb'[0-9]', first_line)
    if is_header and tuple(first_line.decode(errors='replace').split()) != _CDNOW_COLUMNS:
        raise _wrong_header(path, _CDNOW_COLUMNS, first_line)

    def fields_of(text: str) -> list[str]:
        fields = text.split()
        _check_count(fields, len(_CDNOW_COLUMNS))
        return fields

    rows = lines if is_header else _chain_first(first_line, lines)
    yield from _converted('cdnow', rows, fields_of, _cdnow_event, False, occurrences)


def _chain_first(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _converted(
    name: str, lines: Iterator[bytes], fields_of: Callable[[str], Any], convert: Callable[..., dict[str, Any]],
    sorted_by_time: bool, occurrences: Occurrences,
) -> Rows:
    for raw in lines:
        try:
            # Fields that no event takes may be in any encoding; one that is taken fails in orjson below.
            event = convert(*fields_of(raw.decode(errors='surrogateescape')))
            if sorted_by_time:
                # Equal rows have equal times and so stand together: counts of earlier times are not needed again, and
                # a month of 42 million rows takes no more memory than its busiest second. In a file that is not
                # sorted after all, a repeat that comes later takes the id of the first and is dropped as a duplicate.
                occurrences.forget_before(event['ts'])
            digest = xxh3_64_hexdigest(raw)
            event['event_id'] = f'{name}-{digest}-{occurrences.next_number(digest)}'
            yield _dumps(event)
        except _UnusableRowError as unusable:
            yield BadRow(raw, unusable.reason, unusable.detail[:_DETAIL_CHARS_MAX])
        except orjson.JSONEncodeError as error:
            yield BadRow(raw, 'bad_encoding', str(error)[:_DETAIL_CHARS_MAX])


def _header(line: bytes, columns: tuple[str, ...], path: Path) -> list[str]:
    # Spreadsheets put a byte order mark before the first name.
    header = _names(line.removeprefix(b'\xef\xbb\xbf'))
    if not set(columns) <= set(header):
        raise _wrong_header(path, columns, line)
    return header


def _names(line: bytes) -> list[str]:
    try:
        return [field.strip() for field in _split(line.decode(errors='replace'))]
    except _UnusableRowError:       # a first line that is not even CSV names no column
        return []


def _wrong_header(path: Path, columns: tuple[str, ...], line: bytes) -> InputError:
    given = set(_names(line.removeprefix(b'\xef\xbb\xbf')))
    fitting = [name for name, needed in _COLUMNS.items() if set(needed) <= given]
    if not fitting and line.lstrip().startswith(b'{'):
        fitting = ['events']
    shown = line.decode(errors='replace')[:_DETAIL_CHARS_MAX]
    return InputError(
        f'{path} does not start with the columns {", ".join(columns)} (its first line is {shown!r}).',
        f'use --format {fitting[0]}.' if fitting else f'try another --format ({", ".join(FORMATS)}) or add the header.')


def _split(text: str) -> list[str]:
    if '"' not in text:
        return text.split(',')
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise _UnusableRowError('bad_csv', str(error)) from error


def _check_count(fields: list[str], expected: int) -> None:
    if len(fields) != expected:
        raise _UnusableRowError('short_row' if len(fields) < expected else 'long_row',
                        f'{len(fields)} fields, expected {expected}')


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or '_' in text:    # Python reads 1_000 as a number
        raise _UnusableRowError('bad_number', f'{name} is {text!r}')
    return number


# ---- times ----------------------------------------------------------------------------------------------------------

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_UNIX_MS = re.compile(r'[0-9]{1,15}')
# The groups are the parameters of datetime().
_DATE = r'(?P<year>[0-9]{4})-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})'
_CLOCK = r'(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2})'
_REES46_TIME = re.compile(rf'{_DATE} {_CLOCK}:(?P<second>[0-9]{{2}}) UTC')
_ISO_TIME = re.compile(rf'{_DATE}[T ]{_CLOCK}(?::(?P<second>[0-9]{{2}})(?:\.(?P<microsecond>[0-9]{{1,6}}))?)?')
_US_TIME = re.compile(
    r'(?P<month>[0-9]{1,2})/(?P<day>[0-9]{1,2})/(?P<year>[0-9]{4}) (?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})')
_COMPACT_DATE = re.compile(r'(?P<year>[0-9]{4})(?P<month>[0-9]{2})(?P<day>[0-9]{2})')
# Month and day as 6-4 or in Chinese, in UTF-8 or in GBK (whose bytes, being no UTF-8, arrive as surrogates).
_MONTH_DAY = re.compile(
    '(?P<month>[0-9]{1,2})(?:-|\u6708|\udcd4\udcc2)(?P<day>[0-9]{1,2})(?:\u65e5|\udcc8\udcd5)?')


# Neighbouring rows share their time, so a small cache spares most of the parsing.
@lru_cache(maxsize=4096)
def _utc_ms(pattern: re.Pattern[str], text: str, year: int | None = None) -> int:
    """Unix ms of a time in UTC that `pattern` matches; `year` where the pattern has none."""
    match = pattern.fullmatch(text)
    if match is None:
        raise _bad_time(text)
    given = {part: digits for part, digits in match.groupdict().items() if digits is not None}
    if 'microsecond' in given:
        given['microsecond'] = given['microsecond'].ljust(6, '0')       # .5 is half a second
    parts = {part: int(digits) for part, digits in given.items()}
    if year is not None:
        parts['year'] = year
    try:
        return (datetime(**parts, tzinfo=UTC) - _EPOCH) // _MILLISECOND
    except ValueError as error:     # the 31st of February
        raise _bad_time(text) from error


def _bad_time(text: str) -> _UnusableRowError:
    return _UnusableRowError('bad_time', f'the time is {text!r}')


# ---- one row each ---------------------------------------------------------------------------------------------------

_RETAILROCKET_TYPES = {'view': 'view', 'addtocart': 'add_to_cart', 'transaction': 'purchase'}
_REES46_TYPES = {'view': 'view', 'cart': 'add_to_cart', 'remove_from_cart': 'remove_from_cart', 'purchase': 'purchase'}
_TMALL_TYPES = {'0': 'click', '1': 'purchase', '2': 'favorite', '3': 'add_to_cart'}
_TMALL_YEAR = 2014      # the set names month and day only
_CDNOW_COLUMNS = ('customer_id', 'date', 'number_of_cds', 'dollar_value')


def _event_type(types: dict[str, str], given: str) -> str:
    known = types.get(given)
    if known is None:
        raise _UnusableRowError('unknown_type', f'the type is {given!r}, known: {", ".join(types)}')
    return known


def _event(user_id: str, ts_ms: int, event_type: str, **optional: str | float) -> dict[str, Any]:
    """The event without its id; an empty text is a field that the row does not have."""
    if not user_id.strip():
        raise _UnusableRowError('no_user', 'the user id is empty')
    event = {'event_id': '', 'user_id': user_id, 'ts': ts_ms, 'type': event_type}
    for name, value in optional.items():
        if value != '':
            event[name] = value
    return event


def _retailrocket_event(
    timestamp: str, visitorid: str, event: str, itemid: str, transactionid: str,
) -> dict[str, Any]:
    if not _UNIX_MS.fullmatch(timestamp):
        raise _bad_time(timestamp)
    return _event(visitorid, int(timestamp), _event_type(_RETAILROCKET_TYPES, event),
                  item_id=itemid, order_id=transactionid)


def _rees46_event(
    event_time: str, event_type: str, product_id: str, category_id: str, category_code: str, price: str, user_id: str,
    user_session: str,
) -> dict[str, Any]:
    return _event(user_id, _utc_ms(_REES46_TIME, event_time), _event_type(_REES46_TYPES, event_type),
                  item_id=product_id, category=category_code or category_id,
                  price=_number('price', price) if price else '', session_id=user_session)


def _online_retail_event(
    invoice_no: str, stock_code: str, quantity: str, invoice_date: str, unit_price: str, customer_id: str,
) -> dict[str, Any]:
    is_refund = invoice_no.startswith('C')
    units = _number('Quantity', quantity)
    price = _number('UnitPrice', unit_price)
    event = _event(customer_id, _utc_ms(_US_TIME if '/' in invoice_date else _ISO_TIME, invoice_date),
                   'refund' if is_refund else 'purchase',
                   item_id=stock_code, price=price, quantity=-units if is_refund else units, order_id=invoice_no)
    if event['quantity'] <= 0:
        raise _UnusableRowError('bad_number', f'Quantity is {quantity} on invoice {invoice_no!r}')
    if price < 0:
        raise _UnusableRowError('bad_number', f'UnitPrice is {unit_price}')
    return event


def _cdnow_event(customer: str, date: str, cds: str, dollars: str) -> dict[str, Any]:
    """`dollars` is the total of the row: a price per CD would be rounded, so a row is one unit at that price."""
    _number('number_of_cds', cds)       # not taken, but a row without a number there is not what it seems
    price = _number('dollar_value', dollars)
    if price < 0:
        raise _UnusableRowError('bad_number', f'dollar_value is {dollars}')
    return _event(customer, _utc_ms(_COMPACT_DATE, date), 'purchase', price=price, quantity=1)


def _tmall_event(user_id: str, brand_id: str, kind: str, visit_datetime: str) -> dict[str, Any]:
    return _event(user_id, _utc_ms(_MONTH_DAY, visit_datetime, _TMALL_YEAR), _event_type(_TMALL_TYPES, kind),
                  item_id=brand_id)


# ---- records of topics ----------------------------------------------------------------------------------------------

def _record_rows(inputs: Inputs, path: Path, _occurrences: Occurrences) -> Rows:
    yield from filter(inputs.holds, _lines(path))


def kafka_format(inputs: Inputs) -> Format:
    """What `stream record` writes, of these input topics."""
    return Format('kafka', 'What stream record writes: records of the input topics.', partial(_record_rows, inputs),
                  inputs)


# ---- the formats ----------------------------------------------------------------------------------------------------

_COLUMNS = {
    'retailrocket': ('timestamp', 'visitorid', 'event', 'itemid', 'transactionid'),
    'rees46': ('event_time', 'event_type', 'product_id', 'category_id', 'category_code', 'price', 'user_id',
               'user_session'),
    'online-retail': ('InvoiceNo', 'StockCode', 'Quantity', 'InvoiceDate', 'UnitPrice', 'CustomerID'),
    'tmall': ('user_id', 'brand_id', 'type', 'visit_datetime'),
}


def _csv_format(name: str, help_line: str, convert: Callable[..., dict[str, Any]], is_sorted: bool = False,
                currency: str = '') -> Format:
    return Format(name, help_line, partial(_csv_rows, name, _COLUMNS[name], convert, is_sorted), currency=currency)


FORMATS: dict[str, Format] = {given.name: given for given in (
    Format('events', 'Event JSON, one a line (.jsonl, also .gz or .zst), or a .parquet file with its fields.',
           _event_rows),
    _csv_format('retailrocket', 'events.csv of the Retailrocket data set.', _retailrocket_event),
    _csv_format('rees46', 'A month of the REES46 multi-category store data set.', _rees46_event, is_sorted=True),
    _csv_format('online-retail', 'UCI Online Retail as CSV: invoice lines.', _online_retail_event, currency='GBP'),
    Format('cdnow', 'CDNOW_master.txt: customer, day, CDs, dollars.', _cdnow_rows, currency='USD'),
    _csv_format('tmall', 'Tmall (Alibaba 2014): user, brand, type, month and day.', _tmall_event),
    kafka_format(Inputs()),
)}
