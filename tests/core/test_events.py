"""The expected outcome for every kind of malformed record, unusual time and unusual identity."""
import json

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.core.events import (
    RECORD_BYTES_MAX,
    TYPE_CODES,
    Decoder,
    Event,
    EventRecord,
    EventRules,
    EventType,
    Reason,
    Refusal,
    hash16,
    hash32,
    json_schema,
    parse_rfc3339_ms,
    peek_ts_ms,
)

TS_MS = 1_700_000_000_000
decode = Decoder(EventRules(rates={'USD': 0.5}))


def event_bytes(**fields: object) -> bytes:
    return json.dumps({'event_id': 'e1', 'user_id': 'u1', 'ts': TS_MS, 'type': 'view', **fields}).encode()


def raw(field: bytes) -> bytes:
    """A valid event with one more field, given as raw JSON."""
    return b'{"event_id":"e1","user_id":"u1","ts":%d,"type":"view",%s}' % (TS_MS, field)


def padded(size: int) -> bytes:
    """A valid event of exactly `size` bytes."""
    shell = event_bytes(text='')
    return shell.replace(b'"text": ""', b'"text": "' + b'a' * (size - len(shell)) + b'"')


def test_a_full_event():
    event = decode(event_bytes(item_id='i1', category='shoes', price=10.0, quantity=3, currency='USD', order_id='o1',
                               session_id='s1', rating=4.5, query='red', text='nice', type='purchase', agent='ios'))
    assert isinstance(event, Event)
    assert (event.user_id, event.event_id, event.ts_ms, event.type) == ('u1', 'e1', TS_MS, EventType.PURCHASE)
    assert event.amount == 15.0         # 10 * 3 at the rate of 0.5
    assert (event.item, event.category, event.basket) == (hash32('i1'), hash16('shoes'), hash32('o1'))
    assert event.rating == 46


def test_absent_fields_are_zero():
    event = decode(event_bytes(item_id=None, category=''))
    assert isinstance(event, Event)
    assert (event.item, event.category, event.basket, event.amount, event.rating) == (0, 0, 0, 0.0, 0)


@pytest.mark.parametrize('name', TYPE_CODES)
def test_every_type_is_known(name: str):
    event = decode(event_bytes(type=name))
    assert isinstance(event, Event)
    assert event.type == TYPE_CODES[name]


def test_an_unknown_type_is_kept_as_other():
    event = decode(event_bytes(type='wishlist_shared'))
    assert isinstance(event, Event)
    assert event.type == EventType.OTHER


POISON = {
    'null value': (None, Reason.NULL_VALUE),
    'empty': (b'', Reason.EMPTY_VALUE),
    'blank': (b'  ', Reason.INVALID_JSON),
    'not JSON': (b'hello', Reason.INVALID_JSON),
    'cut': (event_bytes()[:-1], Reason.INVALID_JSON),
    'junk after': (event_bytes() + b'}', Reason.INVALID_JSON),
    'byte order mark': (b'\xef\xbb\xbf' + event_bytes(), Reason.INVALID_JSON),
    'array': (b'[]', Reason.INVALID_FIELD),
    'JSON null': (b'null', Reason.INVALID_FIELD),
    'invalid UTF-8 in an id': (b'{"event_id":"\xff","user_id":"u","ts":%d,"type":"view"}' % TS_MS, Reason.INVALID_UTF8),
    'invalid UTF-8 in an unknown field': (raw(b'"x":"\xff"'), Reason.INVALID_UTF8),
    'lone surrogate': (raw(b'"text":"\\ud800"'), Reason.INVALID_JSON),
    'lone surrogate in an unknown field': (raw(b'"x":"\\ud800"'), Reason.INVALID_JSON),
    'control character': (raw(b'"text":"a\nb"'), Reason.INVALID_JSON),
    'NaN': (raw(b'"price":NaN'), Reason.INVALID_JSON),
    'NaN in an unknown field': (raw(b'"x":NaN'), Reason.INVALID_JSON),
    'Infinity': (raw(b'"price":Infinity'), Reason.INVALID_JSON),
    '1e999': (raw(b'"price":1e999'), Reason.INVALID_FIELD),
    '5,000 digits': (raw(b'"price":' + b'1' * 5000), Reason.INVALID_FIELD),
    '5,000 digits of time': (b'{"event_id":"e","user_id":"u","type":"view","ts":' + b'1' * 5000 + b'}',
                             Reason.INVALID_FIELD),
    'depth 100,000': (raw(b'"x":' + b'[' * 100_000 + b']' * 100_000), Reason.TOO_DEEP),
    'depth 100,000 in a known field': (raw(b'"price":' + b'[' * 100_000 + b']' * 100_000), Reason.INVALID_FIELD),
    'price is text': (raw(b'"price":"3"'), Reason.INVALID_FIELD),
    'price is true': (raw(b'"price":true'), Reason.INVALID_FIELD),
    'price is negative': (raw(b'"price":-1'), Reason.INVALID_FIELD),
    'quantity is 0': (raw(b'"quantity":0'), Reason.INVALID_FIELD),
    'item is a number': (raw(b'"item_id":5'), Reason.INVALID_FIELD),
    'rating out of scale': (raw(b'"rating":11'), Reason.INVALID_FIELD),
    'currency is no code': (raw(b'"currency":"EURO"'), Reason.INVALID_FIELD),
    'currency without a rate': (raw(b'"currency":"JPY"'), Reason.UNKNOWN_CURRENCY),
    'no user': (b'{"event_id":"e","ts":%d,"type":"view"}' % TS_MS, Reason.MISSING_FIELD),
    'empty user': (event_bytes(user_id=''), Reason.INVALID_FIELD),
    'user is null': (event_bytes(user_id=None), Reason.INVALID_FIELD),
    '10 KB id': (event_bytes(user_id='u' * 10_240), Reason.INVALID_FIELD),
    'id of cap + 1': (event_bytes(event_id='e' * 257), Reason.INVALID_FIELD),
    '1 MiB + 1': (padded(RECORD_BYTES_MAX + 1), Reason.TOO_LARGE),
    'ts is missing': (b'{"event_id":"e","user_id":"u","type":"view"}', Reason.MISSING_FIELD),
    'ts is a float': (event_bytes(ts=1.7e12), Reason.INVALID_FIELD),
    'ts is true': (event_bytes(ts=True), Reason.INVALID_FIELD),
    'ts is null': (event_bytes(ts=None), Reason.INVALID_FIELD),
    'ts is negative': (event_bytes(ts=-TS_MS), Reason.TS_NOT_POSITIVE),
    'ts is 0': (event_bytes(ts=0), Reason.TS_NOT_POSITIVE),
    'ts in seconds': (event_bytes(ts=TS_MS // 1000), Reason.TS_IN_SECONDS),
    'ts in microseconds': (event_bytes(ts=TS_MS * 1000), Reason.TS_OUT_OF_RANGE),
    'year 9999': (event_bytes(ts='9999-12-31T23:59:59Z'), Reason.TS_OUT_OF_RANGE),
    'ts without an offset': (event_bytes(ts='2024-01-01T00:00:00'), Reason.TS_UNREADABLE),
    'ts is no date': (event_bytes(ts='2024-02-30T00:00:00Z'), Reason.TS_UNREADABLE),
    'ts is text': (event_bytes(ts='yesterday'), Reason.TS_UNREADABLE),
}


@pytest.mark.parametrize(('value', 'reason'), POISON.values(), ids=POISON)
def test_poison_is_refused_with_its_reason(value: bytes | None, reason: Reason):
    refusal = decode(value)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == reason
    assert refusal.detail


ACCEPTED = {
    '1 MiB': padded(RECORD_BYTES_MAX),
    '1 MiB - 1': padded(RECORD_BYTES_MAX - 1),
    'id of the cap': event_bytes(user_id='u' * 256),
    'an unknown field out of range': raw(b'"x":1e999'),
    'an unknown field of 5,000 digits': raw(b'"x":' + b'1' * 5000),
    'whitespace around': b' \n' + event_bytes() + b'\n',
    'a whole number as a price': raw(b'"price":3'),
    'the last day': event_bytes(ts='2100-01-01T00:00:00Z'),
}


@pytest.mark.parametrize('value', ACCEPTED.values(), ids=ACCEPTED)
def test_what_looks_odd_and_is_taken(value: bytes):
    assert isinstance(decode(value), Event)


def test_of_a_key_given_twice_the_last_one_counts():
    event = decode(b'{"event_id":"a","event_id":"b","user_id":"u","ts":%d,"type":"view"}' % TS_MS)
    assert isinstance(event, Event)
    assert event.event_id == 'b'


def test_unicode_forms_of_a_name_are_different_users():
    composed, decomposed = decode(event_bytes(user_id='\u00e9')), decode(event_bytes(user_id='e\u0301'))
    assert isinstance(composed, Event)
    assert isinstance(decomposed, Event)
    assert composed.user_id != decomposed.user_id


@pytest.mark.parametrize(('key', 'reason'), [
    (None, Reason.NULL_KEY), (b'u2', Reason.KEY_MISMATCH), (b'', Reason.KEY_MISMATCH), (b'\xff', Reason.KEY_MISMATCH)])
def test_the_key_must_be_the_user(key: bytes | None, reason: Reason):
    refusal = decode(event_bytes(), key)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == reason


def test_the_right_key_is_taken():
    assert isinstance(decode(event_bytes(), b'u1'), Event)
    assert isinstance(decode(event_bytes(user_id='ü'), 'ü'.encode()), Event)


def test_an_event_may_be_ahead_of_its_record_by_the_configured_time_and_no_more():
    limit_ms = EventRules().clock_ahead_ms_max
    assert isinstance(decode(event_bytes(), b'u1', TS_MS - limit_ms), Event)
    refusal = decode(event_bytes(), b'u1', TS_MS - limit_ms - 1)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == Reason.TS_AHEAD_OF_CLOCK


@pytest.mark.parametrize(('text', 'expected_ms'), [
    ('1970-01-01T00:00:00Z', 0),
    ('2023-11-14T22:13:20Z', TS_MS),
    ('2023-11-14 22:13:20.123456z', TS_MS + 123),
    ('2023-11-15T00:13:20+02:00', TS_MS),
    ('2023-11-14T22:13:20', None),
    ('2023-11-14', None),
    ('2023-W46-2T22:13:20Z', None),
    ('2023-11-14T25:13:20Z', None),
    ('٢٠٢٣-11-14T22:13:20Z', None),
])
def test_rfc3339(text: str, expected_ms: int | None):
    assert parse_rfc3339_ms(text) == expected_ms


def test_peek_agrees_with_decode():
    assert peek_ts_ms(event_bytes()) == TS_MS
    assert peek_ts_ms(event_bytes(ts='2023-11-14T22:13:20Z')) == TS_MS
    for value, _ in POISON.values():
        peeked = peek_ts_ms(value or b'')
        assert peeked is None or 100_000_000_000 <= peeked <= 4_102_444_800_000


@given(st.binary(max_size=200))
def test_no_bytes_raise(value: bytes):
    assert isinstance(decode(value), Event | Refusal)


def test_cut_at_every_byte_and_with_junk_after():
    whole = event_bytes(item_id='i1', price=10.0, text='na\u00efve')
    assert isinstance(decode(whole), Event)
    assert all(isinstance(decode(whole[:cut]), Refusal) for cut in range(len(whole)))
    assert all(isinstance(decode(whole + junk), Refusal) for junk in (b'x', b'{', b'}', b'\0', b',', whole))


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5),
       st.sampled_from([*msgspec.structs.fields(EventRecord), *'abc']))
def test_no_json_raises(value: object, field: object):
    name = getattr(field, 'name', field)
    assert isinstance(decode(json.dumps({'event_id': 'e', 'user_id': 'u', 'ts': TS_MS, 'type': 'view',
                                         str(name): value}).encode()), Event | Refusal)


def test_the_schema_says_what_the_decoder_does():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    good = json.loads(event_bytes(price=1.5, currency='USD', rating=3))
    assert validator.is_valid(good)
    for broken in ({'price': '3'}, {'price': -1}, {'user_id': ''}, {'quantity': 0}, {'rating': 11}, {'ts': 1.5}):
        assert not validator.is_valid({**good, **broken})
        assert isinstance(decode(json.dumps({**good, **broken}).encode()), Refusal)
    for field in ('event_id', 'user_id', 'ts', 'type'):
        assert not validator.is_valid({key: value for key, value in good.items() if key != field})
