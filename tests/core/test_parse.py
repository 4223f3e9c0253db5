"""The parser of ordinary events returns the same event as the decoder, or leaves the record to the decoder."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from stream.core.events import Decoder, Event, EventRules, Refusal
from stream.core.parse import EventParser

TS_MS = 1_700_000_000_000
DECODER = Decoder(EventRules(rates={'USD': 0.5}))
PARSER: EventParser = DECODER._parser
ORDINARY = {'event_id': 'e1', 'user_id': 'ada', 'ts': TS_MS, 'type': 'purchase', 'item_id': 'i9', 'category': 'coffee',
            'price': 8.9, 'quantity': 2, 'currency': 'EUR', 'order_id': 'o4', 'session_id': 's1', 'rating': 4.5,
            'query': 'beans', 'text': 'good', 'page': '/p/1', 'depth': 3, 'new': True, 'ref': None}
PLAIN = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters='"\\'), max_size=140)
NUMBER = st.one_of(st.integers(-3, 10**17), st.floats(), st.decimals(0, 10**10, places=3).map(float))
VALUE = st.one_of(PLAIN, st.text(max_size=20), NUMBER, st.booleans(), st.none(), st.lists(st.integers(), max_size=2))


def agree(value: bytes, key: bytes | None = b'ada', record_ts_ms: int | None = TS_MS) -> Event | None:
    """The parser's result, which must be None or equal to the decoder's."""
    event = PARSER.parse(value, key, record_ts_ms)
    assert event is None or event == DECODER.judge(value, key, record_ts_ms)
    return event


def test_an_ordinary_event_is_read_here():
    for separators in ((',', ':'), (', ', ': '), (' ,\t', '\n:\r')):
        assert agree(json.dumps(ORDINARY, separators=separators).encode() + b' \n') is not None
    assert agree(json.dumps(dict.fromkeys(ORDINARY) | {name: ORDINARY[name] for name in (
        'event_id', 'user_id', 'ts', 'type')}).encode()) is not None


@pytest.mark.parametrize('what', [
    {'event_id': 'na\u00efve'}, {'text': 'a "quoted" word'}, {'ts': '2023-11-14T22:13:20Z'}, {'currency': 'USD'},
    {'price': 1e-7}, {'more': {'a': 1}}, {'event_id': 'e' * 200},
], ids=lambda what: next(iter(what)))
def test_what_is_valid_but_not_ordinary_is_left_to_the_decoder(what: dict):
    value = json.dumps(ORDINARY | what).encode()
    assert agree(value) is None
    assert isinstance(DECODER(value, b'ada', TS_MS), Event)


@given(st.dictionaries(st.sampled_from([*ORDINARY, 'other']), VALUE, max_size=4), st.booleans(),
       st.sampled_from([b'ada', b'bob', None]), st.sampled_from([None, 0, TS_MS, TS_MS - 3_600_000]))
@settings(max_examples=500)
def test_parser_and_decoder_agree(changed: dict, ascii_only: bool, key: bytes | None, record_ts_ms: int | None):
    agree(json.dumps(ORDINARY | changed, ensure_ascii=ascii_only).encode('utf-8', 'surrogatepass'), key, record_ts_ms)


@given(st.data())
@settings(max_examples=500)
def test_they_agree_on_damaged_bytes(data: st.DataObject):
    value = bytearray(json.dumps(ORDINARY).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(value) - 1))
        value[at:at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    agree(bytes(value))


def test_they_agree_wherever_it_is_cut_and_on_junk_behind_it():
    value = json.dumps(ORDINARY).encode()
    assert all(agree(value[:cut]) is None for cut in range(len(value)))
    assert all(agree(value + junk) is None for junk in (b'x', b'{', b'}', b'\0', b',', value))


@given(st.integers(0, 10**15 - 1), st.integers(0, 15))
def test_plain_decimals_are_the_nearest_doubles(mantissa: int, places: int):
    digits = f'{mantissa:0{places + 1}d}'
    text = f'{digits[:-places]}.{digits[-places:]}' if places else digits
    value = json.dumps(ORDINARY | {'price': 0, 'quantity': 1}).replace('"price": 0', f'"price": {text}').encode()
    event = agree(value)
    if event is not None:
        assert event.amount == float(text)


def test_of_a_key_given_twice_the_last_one_counts():
    value = json.dumps(ORDINARY).encode()[:-1] + b', "price": 1, "type": "view"}'
    event = agree(value)
    assert event is not None
    assert (event.amount, event.type) == (2.0, 1)


@pytest.mark.parametrize('size', [*range(1, 66)])
def test_hashes_are_xxh3(size: int):
    name = ''.join(chr(0x23 + (size * 7 + at * 13) % 57) for at in range(size))
    value = json.dumps(ORDINARY | {'event_id': name, 'item_id': name, 'category': name, 'order_id': name}).encode()
    event = agree(value)
    assert (event is None) == (size > 64 or '\\' in name)
    if event is not None:
        assert event.key == xxh3_64_intdigest(name.encode())


def test_events_know_where_they_were_read():
    class Record:
        key, timestamp, offset = b'ada', TS_MS, 7
        value = json.dumps(ORDINARY).encode()

    class Unusual(Record):
        value, offset = json.dumps(ORDINARY | {'text': '\u00ef'}).encode(), 8

    class Bad(Record):
        value, timestamp = b'{', -1

    events = DECODER.decode_records([Record(), Unusual(), Bad()], 1)
    assert isinstance(events[2], Refusal)
    assert [(event.source, event.offset) for event in events[:2]] == [(1, 7), (1, 8)]


def test_events_are_compared_by_what_they_hold():
    event, twin = (agree(json.dumps(ORDINARY).encode()) for _ in range(2))
    assert event is not None and twin is not None
    assert twin == event
    twin.offset = 1
    assert twin != event
    assert 'ada' in repr(event)
