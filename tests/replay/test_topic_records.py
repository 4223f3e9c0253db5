"""Records of topics in files: nothing is lost on the way, and a replay refuses what the worker would."""
import asyncio
import io
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.core.events import Decoder, Event, EventRules, Reason, Source
from stream.core.partitioners import MISROUTED, partition
from stream.core.rules import ReplayRules
from stream.errors import InputError
from stream.replay.formats import kafka_format
from stream.replay.recording import Recording
from stream.replay.replay import Replay
from stream.replay.topic_records import (
    BAD_RECORD,
    Inputs,
    TopicRecord,
    decode_record,
    decoder,
    encode_record,
    event_bytes,
)
from stream.scoring.constant import ConstantScorer
from stream.state.replay_state import MemoryState

T0 = 1_700_000_000_000
INPUTS = Inputs(('clicks', 'carts'), 'murmur2')

records = st.builds(
    TopicRecord, st.text(min_size=1, max_size=9), st.integers(0, 99), st.integers(0, 1 << 60), st.integers(-1, 1 << 50),
    st.none() | st.binary(max_size=20), st.none() | st.binary(max_size=40) | st.text(max_size=9).map(str.encode),
    st.lists(st.tuples(st.text(max_size=5), st.none() | st.binary(max_size=9)), max_size=3), st.integers(0, 100))


@given(records)
def test_a_record_comes_back_as_it_was(record: TopicRecord):
    line = encode_record(record)
    assert b'\n' not in line
    assert decode_record(line) == record


def test_the_line_is_readable_where_the_bytes_are_text():
    line = encode_record(TopicRecord('clicks', 3, 7, T0, b'ada', b'{"a":1}', [('h', b'\xff'), ('n', None)], 8))
    assert orjson.loads(line) == {
        'topic': 'clicks', 'partition': 3, 'offset': 7, 'partitions': 8, 'timestamp_ms': T0, 'key': 'ada',
        'value': '{"a":1}', 'headers': [['h', {'base64': '/w=='}], ['n', None]]}


@pytest.mark.parametrize('line', [
    b'', b'{}', b'[]', b'{"topic":"clicks"', b'\xff', b'[' * 100_000,
    b'{"topic":"clicks","partition":0,"offset":0,"timestamp_ms":0,"key":null,"value":{"base64":"*"}}',
    b'{"topic":"clicks","partition":0,"offset":0,"timestamp_ms":0,"key":null,"value":{"base65":""}}',
    b'{"topic":"clicks","partition":"0","offset":0,"timestamp_ms":0,"key":null,"value":""}',
])
def test_a_damaged_line_is_no_record_and_a_dead_letter(line: bytes):
    assert decode_record(line) is None
    assert decoder(EventRules(), INPUTS)(line).reason == BAD_RECORD
    assert event_bytes(line) == b''


def record(offset: int, after_ms: int = 0, user: str = 'ada', topic: str = 'clicks', number: int | None = None,
           partitions: int = 8, **changed: Any) -> TopicRecord:
    """A view (or a purchase, in carts) of `user`, where murmur2 puts it unless `number` says otherwise."""
    key = user.encode()
    event = {'event_id': f'{topic}-{offset}-{user}', 'user_id': user, 'ts': T0 + after_ms,
             'type': 'view' if topic == 'clicks' else 'purchase', 'price': 5}
    fields = {'timestamp_ms': T0 + after_ms, 'key': key, 'value': orjson.dumps(event)} | changed
    place = partition('murmur2', key, 8) if number is None else number
    return TopicRecord(topic, place, offset, **fields, partitions=partitions)


def test_an_event_knows_its_topic_and_offset_and_keeps_its_content():
    decode = decoder(EventRules(), INPUTS)
    for topic, source in (('clicks', Source.CLICKS), ('carts', Source.CARTS)):
        given_record = record(41, topic=topic)
        event = decode(encode_record(given_record))
        assert isinstance(event, Event)
        assert (event.source, event.offset) == (source, 41)
        alone = Decoder(EventRules())(given_record.value)
        assert isinstance(alone, Event)
        assert (event.key, event.ts_ms, event.amount) == (alone.key, alone.ts_ms, alone.amount)
        assert event_bytes(encode_record(given_record)) == given_record.value


OTHER = (partition('murmur2', b'ada', 8) + 1) % 8


@pytest.mark.parametrize(('bad', 'reason'), [
    (record(0, key=None), Reason.NULL_KEY),
    (record(0, key=b'bob'), Reason.KEY_MISMATCH),
    (record(0, value=None), Reason.NULL_VALUE),
    (record(0, value=b'\xff{}'), Reason.INVALID_UTF8),
    (record(0, timestamp_ms=T0 - 600_001), Reason.TS_AHEAD_OF_CLOCK),
    (record(0, number=OTHER), MISROUTED),
])
def test_a_replay_refuses_what_the_worker_refuses(bad: TopicRecord, reason: str):
    assert decoder(EventRules(), INPUTS)(encode_record(bad)).reason == reason


@pytest.mark.parametrize('good', [
    record(0, timestamp_ms=T0 - 600_000), record(0, timestamp_ms=-1), record(0, number=OTHER, partitions=0)])
def test_what_is_not_known_refuses_nothing(good: TopicRecord):
    assert isinstance(decoder(EventRules(), INPUTS)(encode_record(good)), Event)


def test_another_partitioner_is_asked_where_the_settings_say_so():
    line = encode_record(record(0, number=OTHER))
    assert isinstance(decoder(EventRules(), Inputs(partitioner='none'))(line), Event)
    by_crc32 = encode_record(record(0, number=partition('crc32', b'ada', 8)))
    assert isinstance(decoder(EventRules(), Inputs(partitioner='crc32'))(by_crc32), Event)


def write(path: Path, *rows: TopicRecord | bytes) -> Path:
    path.write_bytes(b''.join((row if isinstance(row, bytes) else encode_record(row)) + b'\n' for row in rows))
    return path


def stream_of(*paths: Path) -> list[tuple[str, int, int]]:
    recording = Recording(paths, kafka_format(INPUTS))
    recording.scan()
    found = [decode_record(value) for block in recording.chunks(3, 1 << 60) for value in block.values]
    return [(entry.topic, entry.partition, entry.offset) for entry in found if entry]


def test_partitions_are_merged_by_event_time_and_keep_their_own_order(tmp_path: Path):
    """Offset 1 of the first partition is late: it stays behind offset 0, as it lay in the log."""
    path = write(tmp_path / 'r.jsonl', record(0, 50, number=0), record(1, 10, number=0), record(2, 70, number=0),
                 record(0, 5, number=1), record(1, 60, number=1), record(0, 55, number=0, topic='carts'))
    assert stream_of(path) == [('clicks', 1, 0), ('clicks', 0, 0), ('clicks', 0, 1), ('carts', 0, 0), ('clicks', 1, 1),
                               ('clicks', 0, 2)]


def test_a_record_that_will_be_refused_moves_no_clock(tmp_path: Path):
    path = write(tmp_path / 'r.jsonl', record(0, 10, number=0), record(1, 10**10, number=0, timestamp_ms=T0),
                 record(2, 20, number=0, value=b'{'), record(3, 30, number=0), record(0, 25, number=1))
    assert stream_of(path) == [('clicks', 0, 0), ('clicks', 0, 1), ('clicks', 0, 2), ('clicks', 1, 0), ('clicks', 0, 3)]


def test_records_of_other_topics_are_passed_over(tmp_path: Path):
    path = write(tmp_path / 'r.jsonl', record(0), record(5, topic='alerts'), record(0, topic='carts'))
    assert stream_of(path) == [('clicks', record(0).partition, 0), ('carts', record(0).partition, 0)]


def test_recordings_that_overlap_or_are_in_another_order_are_an_error(tmp_path: Path):
    first, second = write(tmp_path / '1.jsonl', record(0), record(1)), write(tmp_path / '2.jsonl', record(1), record(2))
    for paths in ((first, second), (second, first), (first, first)):
        with pytest.raises(InputError, match='after offset') as caught:
            stream_of(*paths)
        assert 'name each recording once' in caught.value.do
    later = write(tmp_path / '3.jsonl', record(5))
    assert len(stream_of(first, later)) == 3


def replayed(path: Path) -> tuple[Any, ...]:
    recording = Recording([path], kafka_format(INPUTS))
    recording.scan()
    state, outputs, letters = MemoryState(), io.BytesIO(), io.BytesIO()
    run = Replay(recording, state, ConstantScorer(), ReplayRules(publish='events'), outputs, letters)
    counts = asyncio.run(run.run())
    read = [[orjson.loads(line) for line in text.getvalue().splitlines()] for text in (outputs, letters)]
    return counts, state, *read


def test_a_replay_keeps_offsets_and_names_the_record_of_a_dead_letter(tmp_path: Path):
    path = write(tmp_path / 'r.jsonl', record(10), record(11, 5, key=None), record(14, 9), record(3, 7, topic='carts'),
                 record(20, 8, value=None), record(21, 9, value=b'\xff'), b'{"no":"record"}')
    counts, state, outputs, letters = replayed(path)
    assert (counts.read, counts.applied, counts.dead) == (7, 3, 4)
    assert state.load(['ada'])['ada'].next_offset == [15, 4]
    assert outputs[-1]['cause']['clicks_offset'] == 15
    place = record(0).partition
    assert [(letter['reason'], letter.get('topic'), letter.get('partition'), letter.get('offset')) for letter in letters
            ] == [('null_key', 'clicks', place, 11), ('null_value', 'clicks', place, 20),
                  ('invalid_utf8', 'clicks', place, 21), ('bad_record', None, None, None)]
    assert [letter.get('value', letter.get('value_base64')) for letter in letters[1:]] == [
        None, '/w==', '{"no":"record"}']


def test_a_late_event_is_applied_though_its_offset_is_the_newer_one(tmp_path: Path):
    """In order of event time alone, offset 0 would come after offset 1 and be taken for a redelivery."""
    path = write(tmp_path / 'r.jsonl', record(0, 9_000_000), record(1, 5))
    counts, state, _, _ = replayed(path)
    assert (counts.applied, counts.duplicate) == (2, 0)
    assert state.load(['ada'])['ada'].first_seen_ms == T0 + 5
