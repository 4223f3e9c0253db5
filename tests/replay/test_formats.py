"""Each format's fields, its bad rows and its ids; what makes a whole file unreadable."""
import gzip
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import orjson
import pyarrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from stream.cli.shared import amounts_in
from stream.config import Settings
from stream.core.events import Decoder, Event, EventRules
from stream.errors import InputError
from stream.replay.formats import FORMATS
from stream.replay.rows import BadRow, Occurrences

RETAILROCKET = b'timestamp,visitorid,event,itemid,transactionid\n'
REES46 = b'event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session\n'
ONLINE_RETAIL = b'InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n'
TMALL = b'user_id,brand_id,type,visit_datetime\n'

# One file of each text format that has no bad row.
GOOD_FILES = {
    'events': b'{"event_id":"a","user_id":"u","ts":1600000000000,"type":"view"}\n'
              b'{"event_id":"b","user_id":"u","ts":1600000000001,"type":"view"}\n',
    'retailrocket': RETAILROCKET + b'1433221332117,257597,view,355908,\n1433221332118,257597,transaction,355908,77\n',
    'rees46': REES46 + b'2019-11-05 10:00:00 UTC,view,1,2,a.b,,3.50,9,s1\n'
                       b'2019-11-05 10:00:01 UTC,cart,1,2,a.b,,3.50,9,s1\n',
    'online-retail': ONLINE_RETAIL + b'5001,X1,"MUG, BLUE",2,2011-03-04T10:20:00.000000,1.25,42,France\n'
                                     b'C5002,X1,MUG,-1,3/5/2011 9:05,1.25,42,France\n',
    'cdnow': b' 00007 19970203  2   25.00\r\n 00008 19970204  1   11.50\r\n',
    'tmall': TMALL + b'11,22,0,6-4\n11,22,1,6-5\n',
}


def read(tmp_path: Path, name: str, content: bytes, suffix: str = '.csv') -> list:
    path = tmp_path / f'file{suffix}'
    path.write_bytes(content)
    return list(FORMATS[name].rows(path))


def read_events(tmp_path: Path, name: str, content: bytes) -> list[dict]:
    """The events without their ids."""
    events = [orjson.loads(row) for row in read(tmp_path, name, content)]
    for event in events:
        assert event.pop('event_id').startswith(f'{name}-')
    return events


def reasons(rows: list) -> list[str | None]:
    return [row.reason if isinstance(row, BadRow) else None for row in rows]


def ms(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=UTC).timestamp()) * 1000


def write_parquet(tmp_path: Path, **columns: object) -> Path:
    path = tmp_path / 'events.parquet'
    parquet.write_table(pyarrow.table(columns), path)
    return path


# ---- all formats ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', GOOD_FILES)
def test_the_core_takes_every_event(tmp_path, name):
    rows = read(tmp_path, name, GOOD_FILES[name])
    assert [type(Decoder(EventRules())(row)) for row in rows] == [Event, Event]
    assert all('currency' not in orjson.loads(row) for row in rows)


@pytest.mark.parametrize('name', GOOD_FILES)
def test_compressed_files_give_the_same_rows(tmp_path, name):
    content = GOOD_FILES[name]
    plain = read(tmp_path, name, content)
    assert read(tmp_path, name, gzip.compress(content), '.csv.gz') == plain
    assert read(tmp_path, name, zstandard.compress(content), '.csv.zst') == plain
    half = len(content) // 2       # tools that compress in parallel write several members
    assert read(tmp_path, name, gzip.compress(content[:half]) + gzip.compress(content[half:]), '.gz') == plain


@pytest.mark.parametrize('name', GOOD_FILES)
def test_an_empty_file_has_no_rows(tmp_path, name):
    assert read(tmp_path, name, b'') == []
    assert read(tmp_path, name, gzip.compress(b''), '.gz') == []


@pytest.mark.parametrize('name', GOOD_FILES)
def test_line_ends_do_not_matter(tmp_path, name):
    content = GOOD_FILES[name].replace(b'\r\n', b'\n')
    plain = read(tmp_path, name, content)
    assert read(tmp_path, name, content.replace(b'\n', b'\r\n')) == plain
    assert read(tmp_path, name, content.removesuffix(b'\n')) == plain


@pytest.mark.parametrize('name', GOOD_FILES)
@pytest.mark.parametrize(('suffix', 'compress'), [('.gz', gzip.compress), ('.zst', zstandard.compress)])
def test_a_compressed_file_cut_anywhere_is_an_error(tmp_path, name, suffix, compress):
    whole = compress(GOOD_FILES[name])
    for cut in range(1, len(whole)):
        with pytest.raises(InputError, match='cannot be read'):
            read(tmp_path, name, whole[:cut], suffix)


@pytest.mark.parametrize('name', GOOD_FILES)
def test_unreadable_files_are_errors(tmp_path, name):
    with pytest.raises(InputError, match='no file'):
        list(FORMATS[name].rows(tmp_path / 'absent.csv'))
    with pytest.raises(InputError, match='cannot be read'):
        list(FORMATS[name].rows(tmp_path))
    with pytest.raises(InputError, match=r'must not end in \.gz'):
        read(tmp_path, name, GOOD_FILES[name], '.gz')


@pytest.mark.parametrize('name', ['retailrocket', 'rees46', 'online-retail', 'tmall'])
@given(data=st.data())
def test_a_csv_file_cut_anywhere_never_raises(tmp_path_factory, name, data):
    """A cut row is a `BadRow` or an event of what is left; the rows before it are untouched."""
    content = GOOD_FILES[name]
    header_end = content.index(b'\n') + 1
    cut = data.draw(st.integers(header_end, len(content)))
    whole = read(tmp_path_factory.mktemp('cut'), name, content)
    rows = read(tmp_path_factory.mktemp('cut'), name, content[:cut])
    complete = content[header_end:cut].count(b'\n')
    assert rows[:complete] == whole[:complete]
    assert len(rows) == complete + (not content[:cut].endswith(b'\n'))


@pytest.mark.parametrize('name', ['retailrocket', 'rees46', 'online-retail', 'cdnow', 'tmall'])
@given(junk=st.binary(max_size=60))
def test_junk_rows_never_raise(tmp_path_factory, name, junk):
    junk_rows = junk.split(b'\n')
    rows = read(tmp_path_factory.mktemp('junk'), name, GOOD_FILES[name] + junk)
    assert len(rows) == 2 + len(junk_rows) - (junk_rows[-1] == b'')


# ---- headers --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('name', 'given_name'), [
    ('retailrocket', 'rees46'), ('rees46', 'tmall'), ('tmall', 'online-retail'), ('online-retail', 'retailrocket'),
    ('cdnow', 'tmall'), ('tmall', 'events'),
])
def test_a_wrong_header_names_the_format_that_fits(tmp_path, name, given_name):
    with pytest.raises(InputError) as raised:
        read(tmp_path, name, GOOD_FILES[given_name])
    assert raised.value.do == f'use --format {given_name}.'


def test_a_missing_header_says_what_was_expected(tmp_path):
    with pytest.raises(InputError, match='user_id, brand_id, type, visit_datetime') as raised:
        read(tmp_path, 'tmall', b'11,22,0,6-4\n')
    assert 'add the header' in raised.value.do
    with pytest.raises(InputError, match='does not start with the columns'):
        read(tmp_path, 'tmall', b'"user_id,brand_id\n')


def test_columns_may_stand_in_any_order_behind_a_byte_order_mark(tmp_path):
    content = b'\xef\xbb\xbfvisit_datetime,"brand_id",extra,type,user_id\n6-4,22,x,0,11\n'
    assert read_events(tmp_path, 'tmall', content) == read_events(tmp_path, 'tmall', TMALL + b'11,22,0,6-4\n')


# ---- ids ------------------------------------------------------------------------------------------------------------

def test_equal_rows_are_numbered_and_ids_do_not_depend_on_other_rows(tmp_path):
    rows = [b'11,22,0,6-4', b'11,22,1,6-5', b'11,22,0,6-4']
    forward = [orjson.loads(row)['event_id'] for row in read(tmp_path, 'tmall', TMALL + b'\n'.join(rows))]
    backward = [orjson.loads(row)['event_id'] for row in read(tmp_path, 'tmall', TMALL + b'\n'.join(rows[::-1]))]
    assert sorted(forward) == sorted(backward)
    assert forward[0].removesuffix('-1') == forward[2].removesuffix('-2')
    assert len(set(forward)) == 3


def test_an_id_is_stable_between_versions(tmp_path):
    """Pinned: state that was built from a file knows its events by these ids."""
    row, = read(tmp_path, 'tmall', TMALL + b'11,22,0,6-4\n')
    assert orjson.loads(row)['event_id'] == 'tmall-40313554f2f9293b-1'


def test_files_of_one_recording_share_the_count(tmp_path):
    path = tmp_path / 'file.csv'
    path.write_bytes(TMALL + b'11,22,0,6-4\n')
    shared = Occurrences()
    rows = [*FORMATS['tmall'].rows(path, shared), *FORMATS['tmall'].rows(path, shared)]
    assert [orjson.loads(row)['event_id'][-2:] for row in rows] == ['-1', '-2']


def test_rees46_counts_equal_rows_of_one_second_also_across_files(tmp_path):
    path = tmp_path / 'file.csv'
    row = b'2019-11-05 10:00:00 UTC,view,1,2,a.b,,3.50,9,s1\n'
    path.write_bytes(REES46 + row + row)
    shared = Occurrences()
    rows = [*FORMATS['rees46'].rows(path, shared), *FORMATS['rees46'].rows(path, shared)]
    assert [orjson.loads(row)['event_id'][-2:] for row in rows] == ['-1', '-2', '-3', '-4']


def test_rees46_forgets_counts_when_time_moves_on(tmp_path):
    """So that memory stays bounded; in a file that is not in order a repeat then takes the first one's id."""
    row = b'2019-11-05 10:00:%02d UTC,view,1,2,a.b,,3.50,9,s1\n'
    rows = read(tmp_path, 'rees46', REES46 + row % 0 + row % 0 + row % 1 + row % 0)
    ids = [orjson.loads(row)['event_id'] for row in rows]
    assert [event_id[-2:] for event_id in ids] == ['-1', '-2', '-1', '-1']
    assert ids[0] == ids[3]


# ---- events ---------------------------------------------------------------------------------------------------------

def test_event_lines_come_as_they_are(tmp_path):
    content = b'{"a": 1}\n\nnot json\n  {"b":2}  \r\n{"last":true}'
    assert read(tmp_path, 'events', content, '.jsonl') == [
        b'{"a": 1}', b'', b'not json', b'  {"b":2}  ', b'{"last":true}']


def test_parquet_becomes_event_json(tmp_path):
    path = write_parquet(
        tmp_path, extra=[1, 2], type=['view', 'purchase'], event_id=['a', 'b'], user_id=[7, 8],
        ts=pyarrow.array([datetime(2024, 1, 2, 3, 4, 5, 678_901), datetime(2024, 1, 2)], pyarrow.timestamp('us')),
        price=[None, Decimal('12.50')], quantity=[None, 2.0], item_id=pyarrow.array(['x', None]).dictionary_encode())
    assert [orjson.loads(row) for row in FORMATS['events'].rows(path)] == [
        {'event_id': 'a', 'user_id': '7', 'ts': ms(2024, 1, 2, 3, 4, 5) + 678, 'type': 'view', 'item_id': 'x'},
        {'event_id': 'b', 'user_id': '8', 'ts': ms(2024, 1, 2), 'type': 'purchase', 'price': 12.5, 'quantity': 2.0}]


@pytest.mark.parametrize(('times', 'expected'), [
    (pyarrow.array([1_700_000_000_123]), 1_700_000_000_123),
    (pyarrow.array(['2024-01-02T03:04:05Z']), '2024-01-02T03:04:05Z'),
    (pyarrow.array([date(2024, 1, 2)]), ms(2024, 1, 2)),
    (pyarrow.array([1_700_000_000_123_456_789], pyarrow.timestamp('ns', 'Europe/Berlin')), 1_700_000_000_123),
    (pyarrow.array([1_700_000_000], pyarrow.timestamp('s')), 1_700_000_000_000),
])
def test_parquet_times(tmp_path, times, expected):
    path = write_parquet(tmp_path, event_id=['a'], user_id=['u'], type=['view'], ts=times)
    row, = FORMATS['events'].rows(path)
    assert orjson.loads(row)['ts'] == expected


def test_parquet_rows_that_json_cannot_hold_are_bad(tmp_path):
    path = write_parquet(
        tmp_path, event_id=['a', 'b', 'c', 'd'], user_id=['u'] * 4, ts=[1_700_000_000_000] * 4, type=['view'] * 4,
        price=[float('nan'), 1.0, float('inf'), 2.0], text=[b'', None, None, b'bytes'])
    rows = list(FORMATS['events'].rows(path))
    assert reasons(rows) == ['bad_number', None, 'bad_number', 'unrenderable']
    assert b"'event_id': 'a'" in rows[0].raw


def test_parquet_text_that_is_not_utf8_costs_its_row_only(tmp_path):
    broken = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(b'\0\0\0\0\2\0\0\0\4\0\0\0'), pyarrow.py_buffer(b'ok\xff\xfe'))
    path = write_parquet(
        tmp_path, event_id=['a', 'b'], user_id=broken, ts=[1_700_000_000_000] * 2, type=['view'] * 2)
    assert reasons(list(FORMATS['events'].rows(path))) == [None, 'unrenderable']


def test_parquet_without_a_needed_column_is_an_error(tmp_path):
    path = write_parquet(tmp_path, event_id=['a'], ts=[1], type=['view'])
    with pytest.raises(InputError, match='lacks the columns user_id'):
        list(FORMATS['events'].rows(path))


def test_a_broken_or_missing_parquet_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match='cannot be read as Parquet'):
        read(tmp_path, 'events', b'PAR1 and nothing more', '.parquet')
    with pytest.raises(InputError, match='cannot be read as Parquet'):
        read(tmp_path, 'events', b'', '.parquet')
    with pytest.raises(InputError, match='no file'):
        list(FORMATS['events'].rows(tmp_path / 'absent.parquet'))


# ---- retailrocket ---------------------------------------------------------------------------------------------------

def test_retailrocket_fields(tmp_path):
    assert read_events(tmp_path, 'retailrocket', RETAILROCKET + (
        b'1433221332117,257597,view,355908,\n1433221332118,257597,addtocart,355908,\n'
        b'1433221332119,257597,transaction,355908,77\n')) == [
        {'user_id': '257597', 'ts': 1433221332117, 'type': 'view', 'item_id': '355908'},
        {'user_id': '257597', 'ts': 1433221332118, 'type': 'add_to_cart', 'item_id': '355908'},
        {'user_id': '257597', 'ts': 1433221332119, 'type': 'purchase', 'item_id': '355908', 'order_id': '77'}]


def test_retailrocket_bad_rows(tmp_path):
    rows = read(tmp_path, 'retailrocket', RETAILROCKET + (
        b'1433221332117,1,view\n1433221332117,1,view,2,,\n,1,view,2,\n1.4e12,1,view,2,\n1433221332117,,view,2,\n'
        b'1433221332117,1,wish,2,\n\n1433221332117,"1,view,2,\n1433221332117,\xff,view,2,\n'))
    assert reasons(rows) == ['short_row', 'long_row', 'bad_time', 'bad_time', 'no_user', 'unknown_type', 'short_row',
                             'bad_csv', 'bad_encoding']
    assert rows[0] == BadRow(b'1433221332117,1,view', 'short_row', '3 fields, expected 5')


# ---- rees46 ---------------------------------------------------------------------------------------------------------

def test_rees46_fields(tmp_path):
    assert read_events(tmp_path, 'rees46', REES46 + (
        b'2019-11-05 10:00:00 UTC,view,1,2,a.b,acme,3.50,9,s1\n2019-11-05 10:00:01 UTC,cart,1,2,,,3.50,9,s1\n'
        b'2019-11-05 10:00:02 UTC,remove_from_cart,1,,,,,9,\n'
        b'2019-11-05 10:00:03 UTC,purchase,1,2,a.b,acme,0.00,9,s1\n')) == [
        {'user_id': '9', 'ts': ms(2019, 11, 5, 10), 'type': 'view', 'item_id': '1', 'category': 'a.b', 'price': 3.5,
         'session_id': 's1'},
        {'user_id': '9', 'ts': ms(2019, 11, 5, 10, 0, 1), 'type': 'add_to_cart', 'item_id': '1', 'category': '2',
         'price': 3.5, 'session_id': 's1'},
        {'user_id': '9', 'ts': ms(2019, 11, 5, 10, 0, 2), 'type': 'remove_from_cart', 'item_id': '1'},
        {'user_id': '9', 'ts': ms(2019, 11, 5, 10, 0, 3), 'type': 'purchase', 'item_id': '1', 'category': 'a.b',
         'price': 0.0, 'session_id': 's1'}]


def test_rees46_bad_rows(tmp_path):
    rows = read(tmp_path, 'rees46', REES46 + (
        b'2019-11-05 10:00:00,view,1,2,a.b,,3.50,9,s1\n2019-02-30 10:00:00 UTC,view,1,2,a.b,,3.50,9,s1\n'
        b'2019-11-05 10:00:00 UTC,look,1,2,a.b,,3.50,9,s1\n2019-11-05 10:00:00 UTC,view,1,2,a.b,,free,9,s1\n'
        b'2019-11-05 10:00:00 UTC,view,1,2,a.b,,3.50,,s1\n2019-11-05 10:00:00 UTC,view,1,2,a.b,,3.50,12'))
    assert reasons(rows) == ['bad_time', 'bad_time', 'unknown_type', 'bad_number', 'no_user', 'short_row']


# ---- online-retail --------------------------------------------------------------------------------------------------

def test_online_retail_fields(tmp_path):
    assert read_events(tmp_path, 'online-retail', GOOD_FILES['online-retail']) == [
        {'user_id': '42', 'ts': ms(2011, 3, 4, 10, 20), 'type': 'purchase', 'item_id': 'X1', 'price': 1.25,
         'quantity': 2.0, 'order_id': '5001'},
        {'user_id': '42', 'ts': ms(2011, 3, 5, 9, 5), 'type': 'refund', 'item_id': 'X1', 'price': 1.25,
         'quantity': 1.0, 'order_id': 'C5002'}]


def test_online_retail_descriptions_may_be_in_any_encoding(tmp_path):
    event, = read_events(tmp_path, 'online-retail', ONLINE_RETAIL + b'5001,X1,\xa31 "MUG",2,2011-03-04T10:20,1,42,UK\n')
    assert event['user_id'] == '42'


@pytest.mark.parametrize(('row', 'reason'), [
    (b'5001,X1,MUG,2,2011-03-04T10:20:00,1.25,,UK', 'no_user'),
    (b'5001,X1,MUG,-2,2011-03-04T10:20:00,1.25,42,UK', 'bad_number'),
    (b'5001,X1,MUG,0,2011-03-04T10:20:00,1.25,42,UK', 'bad_number'),
    (b'C5001,X1,MUG,2,2011-03-04T10:20:00,1.25,42,UK', 'bad_number'),
    (b'5001,X1,MUG,2,2011-03-04T10:20:00,-1.25,42,UK', 'bad_number'),
    (b'5001,X1,MUG,1_000,2011-03-04T10:20:00,1.25,42,UK', 'bad_number'),
    (b'5001,X1,MUG,nan,2011-03-04T10:20:00,1.25,42,UK', 'bad_number'),
    (b'5001,X1,MUG,2,2011-03-04T10:20:00,inf,42,UK', 'bad_number'),
    (b'5001,X1,MUG,2,13/30/2011 10:20,1.25,42,UK', 'bad_time'),
    (b'5001,X1,MUG,2,04.03.2011,1.25,42,UK', 'bad_time'),
    (b'5001,X1,MUG, BLUE,2,2011-03-04T10:20:00,1.25,42,UK', 'long_row'),
    (b'5001,X1,"MUG,2,2011-03-04T10:20:00,1.25,42,UK', 'bad_csv'),
])
def test_online_retail_bad_rows(tmp_path, row, reason):
    good = b'5001,X1,MUG,2,2011-03-04T10:20:00.5,1.25,42,UK\n'
    assert reasons(read(tmp_path, 'online-retail', ONLINE_RETAIL + row + b'\n' + good)) == [reason, None]


# ---- cdnow ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('header', [b'', b' customer_id  date number_of_cds  dollar_value\r\n'])
def test_cdnow_fields(tmp_path, header):
    """The price is the row's total: two CDs for 25.01 have no price each."""
    assert read_events(tmp_path, 'cdnow', header + b' 00007 19970203  2   25.01\r\n') == [
        {'user_id': '00007', 'ts': ms(1997, 2, 3), 'type': 'purchase', 'price': 25.01, 'quantity': 1}]


def test_cdnow_bad_rows(tmp_path):
    rows = read(tmp_path, 'cdnow', b'7 19970203 2\n7 19970230 2 25.00\n7 970203 2 25.00\n7 19970203 two 25.00\n'
                                   b'7 19970203 2 -1\n\n7 19970203 2 25.00 x\n')
    assert reasons(rows) == ['short_row', 'bad_time', 'bad_time', 'bad_number', 'bad_number', 'short_row', 'long_row']


# ---- tmall ----------------------------------------------------------------------------------------------------------

def test_tmall_fields(tmp_path):
    assert read_events(tmp_path, 'tmall', TMALL + b'1,2,0,6-4\n1,2,1,6-5\n1,2,2,12-31\n1,2,3,06-04\n') == [
        {'user_id': '1', 'ts': ms(2014, 6, 4), 'type': 'click', 'item_id': '2'},
        {'user_id': '1', 'ts': ms(2014, 6, 5), 'type': 'purchase', 'item_id': '2'},
        {'user_id': '1', 'ts': ms(2014, 12, 31), 'type': 'favorite', 'item_id': '2'},
        {'user_id': '1', 'ts': ms(2014, 6, 4), 'type': 'add_to_cart', 'item_id': '2'}]


@pytest.mark.parametrize('encoding', ['utf-8', 'gbk'])
def test_tmall_chinese_dates(tmp_path, encoding):
    event, = read_events(tmp_path, 'tmall', TMALL + '1,2,0,6月4日\n'.encode(encoding))
    assert event['ts'] == ms(2014, 6, 4)


def test_tmall_bad_rows(tmp_path):
    rows = read(tmp_path, 'tmall', TMALL + b'1,2,0\n,2,0,6-4\n1,2,4,6-4\n1,2,0,2-29\n1,2,0,June 4\n1,2,0,6-4,\n')
    assert reasons(rows) == ['short_row', 'no_user', 'unknown_type', 'bad_time', 'bad_time', 'long_row']


def test_a_set_of_a_known_currency_says_it():
    assert {name: entry.currency for name, entry in FORMATS.items() if entry.currency} == {
        'online-retail': 'GBP', 'cdnow': 'USD'}
    settings = Settings(currency='CHF')
    assert [amounts_in(name, settings) for name in ('online-retail', 'events', 'tmall', 'unheard-of')] == [
        'GBP', 'CHF', 'CHF', 'CHF']
