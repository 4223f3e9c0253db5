"""A batch is read back by the client library's own parser as what was put into it."""
from typing import Any

import pytest
from aiokafka.record.memory_records import MemoryRecords
from hypothesis import given
from hypothesis import strategies as st

from stream.core.decide import Kind
from stream.core.outbox import Message
from stream.kafka.batch import RecordBatch, source_header

NAME = st.text(st.characters(exclude_categories=['Cs']), max_size=9)
BYTES = st.none() | st.binary(max_size=300)


def read(batch: RecordBatch) -> tuple[Any, list[Any]]:
    records = MemoryRecords(bytes(batch._build()))
    assert records.has_next()
    first = records.next_batch()
    assert first is not None
    assert first.validate_crc()
    assert not records.has_next()
    return first, list(first)


def message(user_id: str, as_of_ms: int = 1_700_000_000_123, kind: Kind = Kind.SCORES) -> Message:
    return Message(kind, b'ab' * 16, user_id.encode(), as_of_ms, b'{"tier":1}')


@given(st.lists(st.tuples(BYTES, BYTES, st.lists(st.tuples(NAME, BYTES), max_size=3)), min_size=1, max_size=200))
def test_records_come_back(records: list[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]]):
    batch = RecordBatch(1 << 20, 1_700_000_000_000)
    assert batch.add_records(records, 0) == len(records)
    assert batch.record_count() == len(records)
    batch._set_producer_state(2**40, 3, 77)
    first, found = read(batch)
    assert [(record.key, record.value, list(record.headers)) for record in found] == [
        (key, value, headers) for key, value, headers in records]
    assert [record.offset for record in found] == list(range(len(records)))
    assert {record.timestamp for record in found} == {1_700_000_000_000}
    assert (first.producer_id, first.producer_epoch, first.base_sequence) == (2**40, 3, 77)


def test_without_a_producer_of_its_own_it_says_so():
    batch = RecordBatch(1000, 0)
    batch.add_records([(b'k', b'v', [])], 0)
    first, _ = read(batch)
    assert (first.producer_id, first.producer_epoch) == (-1, -1)


def test_a_full_batch_takes_nothing_more_but_the_first_record_always():
    batch = RecordBatch(1000, 0)
    assert batch.add_records([(b'k', bytes(5000), []), (b'k', b'', [])], 0) == 1
    assert batch.closed()
    assert batch.record_count() == 1
    batch = RecordBatch(1000, 0)
    records: list[Any] = [(b'key', bytes(50), [])] * 100
    added = batch.add_records(records, 50) - 50
    assert added == batch.record_count() < 50
    assert 1000 - batch.size() < 70
    assert len(batch._build()) == batch.size() <= 1000


@pytest.mark.parametrize(('as_of_ms', 'time'), [
    (1_700_000_000_123, b'2023-11-14T22:13:20.123Z'), (951_782_400_000, b'2000-02-29T00:00:00.000Z'),
    (4_102_444_799_999, b'2099-12-31T23:59:59.999Z'), (100_000_000_000, b'1973-03-03T09:46:40.000Z'),
])
def test_a_message_gets_cloudevents_headers(as_of_ms: int, time: bytes):
    batch = RecordBatch(1 << 20, 0)
    assert batch.add_messages([message('u1', as_of_ms, Kind.CHURN)], 0, source_header('/shop/scoring')) == 1
    _, (record,) = read(batch)
    assert (record.key, record.value) == (b'u1', b'{"tier":1}')
    assert list(record.headers) == [
        ('ce_specversion', b'1.0'), ('ce_id', b'ab' * 16), ('ce_type', b'churn.alert'),
        ('ce_source', b'/shop/scoring'), ('ce_time', time), ('ce_subject', b'u1'),
        ('content-type', b'application/json')]


@given(st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=256))
def test_whatever_the_user_is_called(user_id: str):
    batch = RecordBatch(1 << 20, 0)
    assert batch.add_messages([message(user_id)], 0, source_header('s')) == 1
    _, (record,) = read(batch)
    headers = dict(record.headers)
    assert (headers['ce_subject'], headers['ce_time']) == (user_id.encode(), b'2023-11-14T22:13:20.123Z')


@pytest.mark.parametrize('message_id', [b'', b'ab' * 15, b'ab' * 17])
def test_an_id_has_32_digits(message_id: bytes):
    with pytest.raises(ValueError, match='32 hex digits'):
        Message(Kind.SCORES, message_id, b'u', 0, b'{}')
