"""Rows to records, without a broker: where each goes, with which key, time and bytes."""
import asyncio
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.config import Settings
from stream.core.events import peek_ts_ms
from stream.core.partitioners import partition
from stream.kafka.topics import Found
from stream.replay import publish as module
from stream.replay.formats import kafka_format
from stream.replay.publish import Outgoing, Published, PublishOptions, with_ts
from stream.replay.recording import Recording
from stream.replay.topic_records import Inputs, TopicRecord, encode_record

T0 = 1_700_000_000_000
NOW = T0 + 10**9


def event(number: int, after_ms: int = 0, user: str = 'ada', kind: str = 'view', **more: Any) -> bytes:
    return orjson.dumps({'event_id': f'e{number}', 'user_id': user, 'ts': T0 + after_ms, 'type': kind} | more)


def records(recording: Recording, shift_ms: int = 0, options: PublishOptions | None = None, partitions: int = 4,
            config: dict[str, str] | None = None, **settings: Any) -> tuple[list[tuple[int, Outgoing]], Published]:
    """Every record with the number of its partition, in the order of sending."""
    recording.scan()
    topics = {name: Found(partitions, 1, config or {}) for name in ('clicks', 'carts')}
    account = Published(shift_ms=shift_ms)
    outgoing = module._Sorter(Settings(**settings), recording, topics, account, NOW)
    sent = [(number, record) for chunk, _ in outgoing.groups(options or PublishOptions())
            for (topic, number), entries in chunk.items() for record in entries if record.topic == topic]
    return sent, account


def recording_of(folder: Path, *rows: bytes) -> Recording:
    path = folder / 'events.jsonl'
    path.write_bytes(b''.join(row + b'\n' for row in rows))
    return Recording([path], 'events')


def test_events_go_to_the_topic_of_their_type_keyed_by_user_at_their_own_time(tmp_path: Path):
    rows = event(1), event(2, 5, 'bob', 'purchase'), event(3, 9, 'ada', 'custom'), event(4, 12, 'ada', 'refund')
    sent, account = records(recording_of(tmp_path, *rows))
    assert {(record.topic, number, record.key, record.value, record.timestamp_ms) for number, record in sent} == {
        ('clicks', partition('murmur2', b'ada', 4), b'ada', rows[0], T0),
        ('carts', partition('murmur2', b'bob', 4), b'bob', rows[1], T0 + 5),
        ('clicks', partition('murmur2', b'ada', 4), b'ada', rows[2], T0 + 9),
        ('carts', partition('murmur2', b'ada', 4), b'ada', rows[3], T0 + 12)}
    assert (account.rows, account.clicks, account.carts, account.no_events) == (4, 2, 2, 0)


@pytest.mark.parametrize(('setting', 'rule'), [('crc32', 'crc32'), ('fnv1a', 'fnv1a'), ('none', 'murmur2')])
def test_the_configured_partitioner_chooses(tmp_path: Path, setting: str, rule: Any):
    rows = [event(number, number, f'u{number}') for number in range(40)]
    sent, _ = records(recording_of(tmp_path, *rows), partitioner=setting)
    assert all(number == partition(rule, record.key or b'', 4) for number, record in sent)
    assert len({number for number, _ in sent}) == 4


def test_what_is_no_event_goes_to_clicks_as_it_is(tmp_path: Path):
    rows = (event(1, 7), b'{"user_id":"bob","ts":"soon","type":"purchase"}', b'\xff\xfe', event(2, 9, kind='purchase',
                                                                                             price=-1), b'')
    sent, account = records(recording_of(tmp_path, *rows), shift_ms=100)
    assert account.no_events == 4
    bad = {record.value: record for _, record in sent if record.value in rows[1:]}
    assert set(bad) == set(rows[1:])        # not a byte changed, though times are moved
    assert {record.topic for record in bad.values()} == {'clicks'}
    assert [bad[row].key for row in rows[1:]] == [b'bob', None, b'ada', None]
    assert {record.timestamp_ms for record in bad.values()} == {T0 + 7 + 100}      # that of the event before


def test_times_move_together_and_nothing_else_changes(tmp_path: Path):
    rows = event(1, 0, price=1.5), event(2, 50, text='"ts": 5'), event(3, 99)
    sent, _ = records(recording_of(tmp_path, *rows), shift_ms=10**9)
    for (_, record), row, after_ms in zip(sent, rows, (0, 50, 99), strict=True):
        assert orjson.loads(record.value or b'') == orjson.loads(row) | {'ts': T0 + after_ms + 10**9}
        assert record.timestamp_ms == T0 + after_ms + 10**9


@pytest.mark.parametrize(('before', 'after'), [
    (b'{"user_id":"a","ts":1700000000000,"type":"view"}', b'{"user_id":"a","ts":7,"type":"view"}'),
    (b'{ "ts" : "2023-11-14T22:13:20Z" }', b'{ "ts" : 7 }'),
    (b'{"ts":-5}', b'{"ts":7}'),
    (b'{"a":{"ts":1},"ts":2}', b'{"a":{"ts":1},"ts":7}'),
    (b'{"ts":1,"ts":2}', b'{"ts":7}'),
    (b'{"a":"\\"ts\\":1","ts":2}', b'{"a":"\\"ts\\":1","ts":7}'),
    (b'{"t\\u0073":1,"a":{"ts":1}}', b'{"ts":7,"a":{"ts":1}}'),
    (b'{"ts":1.0}', b'{"ts":7}'),
])
def test_the_time_of_an_event_is_replaced_where_the_decoder_reads_it(before: bytes, after: bytes):
    assert with_ts(before, 7) == after


@given(st.dictionaries(st.sampled_from(['ts', 'a', 'text', 'tt']), st.text() | st.integers(-9, 9) | st.dictionaries(
    st.just('ts'), st.integers(0, 9)), max_size=4), st.integers(T0, 2 * T0))
def test_a_new_time_is_read_back_whatever_stands_around_it(fields: dict[str, Any], ts_ms: int):
    value = orjson.dumps(fields | {'ts': T0})
    assert peek_ts_ms(with_ts(value, ts_ms)) == ts_ms
    assert orjson.loads(with_ts(value, ts_ms)) == fields | {'ts': ts_ms}


def test_records_go_back_as_they_were(tmp_path: Path):
    misrouted = (partition('murmur2', b'ada', 4) + 1) % 4
    lines = [TopicRecord('clicks', 0, 0, T0 + 3, b'ada', event(1), [('h', b'1')], 0),
             TopicRecord('carts', 0, 1, T0, None, event(2, 1), [], 4),
             TopicRecord('clicks', 0, 2, T0 + 1, b'ada', None, [], 4),
             TopicRecord('clicks', misrouted, 3, T0 + 2, b'ada', event(3, 2), [], 4)]
    path = tmp_path / 'r.jsonl'
    path.write_bytes(b''.join(encode_record(line) + b'\n' for line in lines))
    sent, account = records(Recording([path], kafka_format(Inputs(partitioner='murmur2'))), shift_ms=1000)
    by_topic = {(record.topic, record.key, record.timestamp_ms): (number, record) for number, record in sent}
    number, first = by_topic['clicks', b'ada', T0 + 1003]
    assert number == partition('murmur2', b'ada', 4)
    assert first.headers == [('h', b'1')]
    assert peek_ts_ms(first.value or b'') == T0 + 1000
    assert by_topic['carts', None, T0 + 1000][1].value == event(2, 1)
    assert by_topic['clicks', b'ada', T0 + 1001][1].value is None
    assert by_topic['clicks', b'ada', T0 + 1002][0] == misrouted        # a dead letter there, a dead letter here
    assert (account.clicks, account.carts, account.no_events) == (1, 0, 3)


def test_what_brokers_would_refuse_is_counted(tmp_path: Path):
    """A timestamp too far ahead costs its whole batch, and a record too large is never taken."""
    rows = event(1), event(2, 10**9 + 3_600_001), event(3, 10**9 + 3_599_000), event(4, text='x' * 2000)
    sent, account = records(recording_of(tmp_path, *rows), config={'max.message.bytes': '2000'})
    assert (account.rows, account.clicks, account.too_large, account.ahead) == (4, 3, 1, 1)
    stamps = {record.value: record.timestamp_ms for _, record in sent}
    assert stamps == {rows[0]: T0, rows[1]: NOW, rows[2]: NOW + 3_599_000}


def test_a_limit_ends_the_sending_in_time_order(tmp_path: Path):
    rows = [event(number, 100 - number) for number in range(50)]
    sent, account = records(recording_of(tmp_path, *rows), options=PublishOptions(rows_max=7), partitions=1)
    assert account.rows == 7
    assert [record.value for _, record in sent] == rows[:-8:-1]


def test_old_recordings_are_warned_of_where_topics_delete_by_age():
    def warned(keep_ms: int, policy: str = 'delete') -> list[str]:
        config = {'retention.ms': str(keep_ms), 'cleanup.policy': policy}
        return module._retention_warnings(Settings(), {'clicks': Found(1, 1, config)}, Published(first_ms=T0), NOW)

    assert warned(-1) == warned(10**9) == warned(5, 'compact') == []
    [text] = warned(10**9 - 1)
    assert 'begins 12 days ago' in text
    assert '--topic clicks --add-config retention.ms=-1' in text


def test_chunks_keep_the_rate_and_make_up_for_little():
    async def run(rate: float, pauses: list[float]) -> tuple[float, list[float]]:
        started, at = time.monotonic(), []
        chunks = iter([({}, 10)] * len(pauses))
        async for _ in module._paced(chunks, rate):
            at.append(time.monotonic() - started)
            time.sleep(pauses[len(at) - 1])
        return time.monotonic() - started, at

    seconds, at = asyncio.run(run(200, [0] * 11))
    assert 0.5 <= seconds < 5
    assert all(when >= 0.05 * place for place, when in enumerate(at))
    seconds, at = asyncio.run(run(20, [1.9, *[0] * 6]))      # a chunk is due every 0.5 s, one took 1.9 s
    assert at[2] - at[1] < 0.2      # made up for
    assert at[5] >= 2.9 - 0.01      # due 2.5 s after the start, and 0.4 s were given up
    assert asyncio.run(run(0, [0] * 100))[0] < 0.5
