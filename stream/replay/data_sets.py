"""Public data sets as events: Retailrocket, REES46, Online Retail, CDNOW and Tmall.

Each adapter only renames and converts. The decoder of the core, which reads the result, decides whether an event is
valid.
"""
import csv
import math
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import orjson
from xxhash import xxh3_64_hexdigest

from stream.errors import InputError
from stream.replay.rows import DETAIL_CHARS_MAX, BadRow, Format, Occurrences, Rows, UnusableRowError, dumps, lines

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
_RETAILROCKET_TYPES = {'view': 'view', 'addtocart': 'add_to_cart', 'transaction': 'purchase'}
_REES46_TYPES = {'view': 'view', 'cart': 'add_to_cart', 'remove_from_cart': 'remove_from_cart', 'purchase': 'purchase'}
_TMALL_TYPES = {'0': 'click', '1': 'purchase', '2': 'favorite', '3': 'add_to_cart'}
_TMALL_YEAR = 2014      # the set names month and day only
_CDNOW_COLUMNS = ('customer_id', 'date', 'number_of_cds', 'dollar_value')
_COLUMNS = {
    'retailrocket': ('timestamp', 'visitorid', 'event', 'itemid', 'transactionid'),
    'rees46': ('event_time', 'event_type', 'product_id', 'category_id', 'category_code', 'price', 'user_id',
               'user_session'),
    'online-retail': ('InvoiceNo', 'StockCode', 'Quantity', 'InvoiceDate', 'UnitPrice', 'CustomerID'),
    'tmall': ('user_id', 'brand_id', 'type', 'visit_datetime'),
}


def _csv_rows(
    name: str, columns: tuple[str, ...], convert: Callable[..., dict[str, Any]], sorted_by_time: bool,
    path: Path, occurrences: Occurrences,
) -> Rows:
    """Rows of a comma-separated file. Its header must name at least `columns`, in any order."""
    rows = lines(path)
    header_line = next(rows, None)
    if header_line is None:
        return
    header = _header(header_line, columns, path)
    picked = itemgetter(*[header.index(column) for column in columns])

    def fields_of(text: str) -> tuple[str, ...]:
        fields = _split(text)
        _check_count(fields, len(header))
        return picked(fields)

    yield from _converted(name, rows, fields_of, convert, sorted_by_time, occurrences)


def _cdnow_rows(path: Path, occurrences: Occurrences) -> Rows:
    """Rows of the CDNOW master file: four fields separated by blanks. The header is optional."""
    rows = lines(path)
    first_line = next(rows, None)
    if first_line is None:
        return
    is_header = bool(first_line) and not re.search(rb'[0-9]', first_line)
    if is_header and tuple(first_line.decode(errors='replace').split()) != _CDNOW_COLUMNS:
        raise _wrong_header(path, _CDNOW_COLUMNS, first_line)

    def fields_of(text: str) -> list[str]:
        fields = text.split()
        _check_count(fields, len(_CDNOW_COLUMNS))
        return fields

    data = rows if is_header else chain([first_line], rows)
    yield from _converted('cdnow', data, fields_of, _cdnow_event, False, occurrences)


def _converted(
    name: str, rows: Iterator[bytes], fields_of: Callable[[str], Any], convert: Callable[..., dict[str, Any]],
    sorted_by_time: bool, occurrences: Occurrences,
) -> Rows:
    for raw in rows:
        try:
            # A field that no event uses may be in any encoding. A field that an event uses fails in orjson below.
            event = convert(*fields_of(raw.decode(errors='surrogateescape')))
            if sorted_by_time:
                # Equal rows have equal times, so they stand together. Counts of earlier times are not needed again: a
                # month of 42 million rows takes no more memory than its busiest second. If the file is not sorted
                # after all, a later repeat gets the id of the first row and is dropped as a duplicate.
                occurrences.forget_before(event['ts'])
            digest = xxh3_64_hexdigest(raw)
            event['event_id'] = f'{name}-{digest}-{occurrences.next_number(digest)}'
            yield dumps(event)
        except UnusableRowError as unusable:
            yield BadRow(raw, unusable.reason, unusable.detail[:DETAIL_CHARS_MAX])
        except orjson.JSONEncodeError as error:
            yield BadRow(raw, 'bad_encoding', str(error)[:DETAIL_CHARS_MAX])


def _header(line: bytes, columns: tuple[str, ...], path: Path) -> list[str]:
    # Spreadsheet programs put a byte order mark before the first name.
    header = _names(line.removeprefix(b'\xef\xbb\xbf'))
    if not set(columns) <= set(header):
        raise _wrong_header(path, columns, line)
    return header


def _names(line: bytes) -> list[str]:
    try:
        return [field.strip() for field in _split(line.decode(errors='replace'))]
    except UnusableRowError:       # a first line that is not CSV names no column
        return []


def _wrong_header(path: Path, columns: tuple[str, ...], line: bytes) -> InputError:
    given = set(_names(line.removeprefix(b'\xef\xbb\xbf')))
    fitting = [name for name, needed in _COLUMNS.items() if set(needed) <= given]
    if not fitting and line.lstrip().startswith(b'{'):
        fitting = ['events']
    shown = line.decode(errors='replace')[:DETAIL_CHARS_MAX]
    return InputError(
        f'{path} does not start with the columns {", ".join(columns)} (its first line is {shown!r}).',
        f'use --format {fitting[0]}.' if fitting else
        'name another --format (see `stream replay --help`), or add the header.')


def _split(text: str) -> list[str]:
    if '"' not in text:
        return text.split(',')
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise UnusableRowError('bad_csv', str(error)) from error


def _check_count(fields: list[str], expected: int) -> None:
    if len(fields) != expected:
        raise UnusableRowError('short_row' if len(fields) < expected else 'long_row',
                        f'{len(fields)} fields, expected {expected}')


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or '_' in text:    # Python reads 1_000 as a number
        raise UnusableRowError('bad_number', f'{name} is {text!r}')
    return number


# Neighbouring rows often have the same time, so a small cache saves most of the parsing.
@lru_cache(maxsize=4096)
def _utc_ms(pattern: re.Pattern[str], text: str, year: int | None = None) -> int:
    """Unix ms of a UTC time that `pattern` matches. Pass `year` if the pattern has none."""
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


def _bad_time(text: str) -> UnusableRowError:
    return UnusableRowError('bad_time', f'the time is {text!r}')


def _event_type(types: dict[str, str], given: str) -> str:
    known = types.get(given)
    if known is None:
        raise UnusableRowError('unknown_type', f'the type is {given!r}, known: {", ".join(types)}')
    return known


def _event(user_id: str, ts_ms: int, event_type: str, **optional: str | float) -> dict[str, Any]:
    """The event without its id. An empty text means that the row lacks the field."""
    if not user_id.strip():
        raise UnusableRowError('no_user', 'the user id is empty')
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
        raise UnusableRowError('bad_number', f'Quantity is {quantity} on invoice {invoice_no!r}')
    if price < 0:
        raise UnusableRowError('bad_number', f'UnitPrice is {unit_price}')
    return event


def _cdnow_event(customer: str, date: str, cds: str, dollars: str) -> dict[str, Any]:
    """A row becomes one unit at the price `dollars`, its total: a price per CD would be rounded."""
    _number('number_of_cds', cds)       # not used, but a row without a number here is damaged
    price = _number('dollar_value', dollars)
    if price < 0:
        raise UnusableRowError('bad_number', f'dollar_value is {dollars}')
    return _event(customer, _utc_ms(_COMPACT_DATE, date), 'purchase', price=price, quantity=1)


def _tmall_event(user_id: str, brand_id: str, kind: str, visit_datetime: str) -> dict[str, Any]:
    return _event(user_id, _utc_ms(_MONTH_DAY, visit_datetime, _TMALL_YEAR), _event_type(_TMALL_TYPES, kind),
                  item_id=brand_id)


def _csv_format(name: str, help_line: str, convert: Callable[..., dict[str, Any]], is_sorted: bool = False,
                currency: str = '') -> Format:
    return Format(name, help_line, partial(_csv_rows, name, _COLUMNS[name], convert, is_sorted), currency=currency)


DATA_SETS = (
    _csv_format('retailrocket', 'events.csv of the Retailrocket data set.', _retailrocket_event),
    _csv_format('rees46', 'A month of the REES46 multi-category store data set.', _rees46_event, is_sorted=True),
    _csv_format('online-retail', 'UCI Online Retail as CSV: invoice lines.', _online_retail_event, currency='GBP'),
    Format('cdnow', 'CDNOW_master.txt: customer, day, CDs, dollars.', _cdnow_rows, currency='USD'),
    _csv_format('tmall', 'Tmall (Alibaba 2014): user, brand, type, month and day.', _tmall_event),
)
