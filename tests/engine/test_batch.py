"""A batch is read back by the client library's own parser as what was put into it."""
import json
from typing import Any

import pytest
from aiokafka.record.memory_records import MemoryRecords
from hypothesis import given
from hypothesis import strategies as st

from stream.engine.batch import Batch, source_header

NAME = st.text(st.characters(exclude_categories=['Cs']), max_size=9)
BYTES = st.none() | st.binary(max_size=300)


def read(batch: Batch) -> tuple[Any, list[Any]]:
    records = MemoryRecords(bytes(batch._build()))
    assert records.has_next()
    first = records.next_batch()
    assert first is not None
    assert first.validate_crc()
    assert not records.has_next()
    return first, list(first)


def message(user_id: str, as_of_ms: int = 1_700_000_000_123, kind: str = 'scores.updated') -> bytes:
    return json.dumps({'id': 'ab' * 16, 'type': kind, 'user_id': user_id, 'as_of_ms': as_of_ms, 'tier': 1},
                      separators=(',', ':')).encode()


@given(st.lists(st.tuples(BYTES, BYTES, st.lists(st.tuples(NAME, BYTES), max_size=3)), min_size=1, max_size=200))
def test_records_come_back(records: list[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]]):
    batch = Batch(1 << 20, 1_700_000_000_000)
    assert all(batch.add(*record) for record in records)
    assert batch.record_count() == len(records)
    batch._set_producer_state(2**40, 3, 77)
    first, found = read(batch)
    assert [(record.key, record.value, list(record.headers)) for record in found] == [
        (key, value, headers) for key, value, headers in records]
    assert [record.offset for record in found] == list(range(len(records)))
    assert {record.timestamp for record in found} == {1_700_000_000_000}
    assert (first.producer_id, first.producer_epoch, first.base_sequence) == (2**40, 3, 77)


def test_without_a_producer_of_its_own_it_says_so():
    batch = Batch(1000, 0)
    batch.add(b'k', b'v', [])
    first, _ = read(batch)
    assert (first.producer_id, first.producer_epoch) == (-1, -1)


def test_a_full_batch_takes_nothing_more_but_the_first_record_always():
    batch = Batch(1000, 0)
    assert batch.add(b'k', bytes(5000), [])
    assert not batch.add(b'k', b'', [])
    assert batch.closed()
    assert batch.record_count() == 1
    batch = Batch(1000, 0)
    while batch.add(b'key', bytes(50), []):
        assert batch.size() <= 1000
    assert 1000 - batch.size() < 70
    assert len(batch._build()) == batch.size() <= 1000


@pytest.mark.parametrize(('as_of_ms', 'time'), [
    (1_700_000_000_123, b'2023-11-14T22:13:20.123Z'), (951_782_400_000, b'2000-02-29T00:00:00.000Z'),
    (4_102_444_799_999, b'2099-12-31T23:59:59.999Z'), (100_000_000_000, b'1973-03-03T09:46:40.000Z'),
])
def test_a_message_gets_cloudevents_headers(as_of_ms: int, time: bytes):
    batch = Batch(1 << 20, 0)
    assert batch.add_message(b'u1', message('u1', as_of_ms, 'churn.alert'), source_header('/shop/scoring'))
    _, (record,) = read(batch)
    assert (record.key, record.value) == (b'u1', message('u1', as_of_ms, 'churn.alert'))
    assert list(record.headers) == [
        ('ce_specversion', b'1.0'), ('ce_id', b'ab' * 16), ('ce_type', b'churn.alert'),
        ('ce_source', b'/shop/scoring'), ('ce_time', time), ('ce_subject', b'u1'),
        ('content-type', b'application/json')]


@given(st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=256))
def test_whatever_the_user_is_called(user_id: str):
    batch = Batch(1 << 20, 0)
    assert batch.add_message(user_id.encode(), message(user_id), source_header('s'))
    _, (record,) = read(batch)
    headers = dict(record.headers)
    assert (headers['ce_subject'], headers['ce_time']) == (user_id.encode(), b'2023-11-14T22:13:20.123Z')


@pytest.mark.parametrize('value', [b'', b'{}', message('u')[:60], b'x' * 200, message('u').replace(b'as_of', b'as-of')])
def test_what_is_no_message_is_told(value: bytes):
    with pytest.raises(ValueError, match='no message'):
        Batch(1000, 0).add_message(b'u', value, source_header('s'))
