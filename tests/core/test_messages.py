import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_hexdigest

from stream.core.decide import Decision, Kind, Policy
from stream.core.events import Event
from stream.core.layout import NO_TIER
from stream.core.messages import ModelInfo, Origin, decision_message
from stream.core.outbox import Message, ScoresPen, pack_messages, unpack_outbox
from stream.core.scores import Scores
from stream.core.user import User
from stream.errors import StateError

GOLDEN = Path(__file__).parents[1] / 'golden' / 'messages.jsonl'
MODEL = ModelInfo('shopper', '1', 'ab' * 32)
SCORES = Scores(np.array([True]), np.array([0.7312]), np.array([0.1]), np.array([0.375]),
                np.array([[0.5, 0.25, 0.25]]), np.array([12.34]))
ORIGIN = Origin(1_700_000_000_123, 0)
REASONS = [{'name': 'add_to_cart', 'text': 'put an item in the cart worth 9.90 2 hours before', 'ts_ms': 1,
            'amount': 9.9, 'effect': 0.21}]


def shopper() -> User:
    user = User('u-é"<')
    user.applied, user.next_offset, user.tier = 12, [30, 4], 2
    return user


def messages() -> list[Message]:
    """One of each kind, in one user's order."""
    user = shopper()
    return [
        decision_message(user, Decision(0, Kind.POWER, 'power_first', 2, NO_TIER), 'power_first', ORIGIN, 0, SCORES,
                         MODEL, Policy(), None),
        decision_message(user, Decision(0, Kind.INTENT, 'intent', 2, 2), 'intent', ORIGIN, 0, SCORES, MODEL, Policy(),
                         REASONS),
        decision_message(user, Decision(0, Kind.CHURN, 'churn_raised', 2, 2), 'churn_raised',
                         Origin(1_700_000_000_123, 1_700_000_000_123), 0, SCORES, MODEL, Policy(), []),
        decision_message(user, Decision(0, Kind.CHURN, 'churn_cleared', 2, 2), 'churn_cleared', ORIGIN, 0, SCORES,
                         MODEL, Policy(), []),
        *scores_messages(user),
        *scores_messages(user, events=('e9',)),
    ]


def scores_messages(user: User, origin: Origin = ORIGIN, events: Sequence[str] = (),
                    scores: Scores = SCORES) -> list[Message]:
    named = [Event(user.user_id, event_id, 0, 0, 1, 0, 0, 0, 0.0, 0) for event_id in events]
    messages = ScoresPen(MODEL, scores).write(user, None, 0, origin.as_of_ms, origin.timer_ms, named)
    assert unpack_outbox(user) == messages
    return messages


def test_a_message_carries_what_its_json_says():
    user = shopper()
    for message in messages():
        value = json.loads(message.value)
        assert (message.kind, message.message_id, message.key, message.as_of_ms) == (
            value['type'], value['id'].encode(), user.user_id.encode(), value['as_of_ms'])
        assert (message.content is None) == (message.kind is Kind.SCORES)
        if message.content is not None:
            user.outbox = pack_messages([message])
            assert unpack_outbox(user) == [message]


@pytest.mark.parametrize('value', [b'', b'{}', b'{"id":"ab","type":"churn.alert","as_of_ms":1}', b'\xff',
                                   b'{"id":"%s","type":"no.kind","as_of_ms":1}' % (b'ab' * 16),
                                   b'{"id":"%s","type":"churn.alert","as_of_ms":1%s}' % (b'ab' * 16, b'0' * 30),
                                   b'{"x":' + 5_000 * b'['])
def test_an_outbox_with_something_else_than_decisions_is_refused(value: bytes):
    user = shopper()
    user.outbox = len(value).to_bytes(4, 'little') + value
    with pytest.raises(StateError, match='damaged'):
        unpack_outbox(user)


def test_messages_are_byte_for_byte_the_recorded_ones():
    """Subscribers parse these messages. A change here changes the contract and belongs in the changelog."""
    assert b'\n'.join(message.value for message in messages()) + b'\n' == GOLDEN.read_bytes()


def test_ids_are_distinct_and_chain():
    values = [json.loads(message.value) for message in messages()]
    assert len({value['id'] for value in values}) == len(values)
    assert values[0]['previous_id'] is None
    assert [value['previous_id'] for value in values[1:4]] == [value['id'] for value in values[:3]]


def test_an_id_depends_on_the_cause():
    def identity(user: User, origin: Origin = ORIGIN) -> str:
        return json.loads(scores_messages(user, origin)[0].value)['id']

    ahead, other = shopper(), shopper()
    ahead.next_offset = [31, 4]
    other.user_id = 'other'
    assert len({identity(shopper()), identity(ahead), identity(other), identity(shopper(), Origin(1, 1))}) == 4
    assert identity(shopper()) == identity(shopper())


def test_expiry_and_action_come_from_the_policy():
    value = json.loads(messages()[1].value)
    assert value['expires_at_ms'] - value['as_of_ms'] == Policy().intent_ttl_ms
    assert value['action'] == 'recommendation'


@given(st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=20),
       st.lists(st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=9), max_size=3),
       st.integers(0, 10_000), st.floats(0, 1e9), st.integers(-1, 4), st.integers(0, 2**31))
def test_scores_are_the_json_that_a_library_writes(user_id: str, events: list[str], step: int, spend: float, tier: int,
                                                   timer_ms: int):
    user = User(user_id)
    user.applied, user.next_offset, user.tier = 7, [2**40, 3], tier
    scores = Scores(np.array([True]), np.array([step / 10_000]), np.array([0.0]), np.array([(10_000 - step) / 10_000]),
                    np.array([[step / 10_000, 0.0]]), np.array([spend]))
    messages = scores_messages(user, Origin(1_700_000_000_123, timer_ms), events, scores)
    assert [orjson.dumps(orjson.loads(message.value)) for message in messages] == [
        message.value for message in messages]
    for message, event_id in zip(messages, events or [None], strict=True):
        value = orjson.loads(message.value)
        identity = [user_id, 'scores.updated', event_id or '', timer_ms, 2**40, 3, 7, MODEL.sha256]
        assert value['id'] == xxh3_128_hexdigest(orjson.dumps(identity))
        assert (value['user_id'], value.get('event_id')) == (user_id, event_id)
        assert (message.message_id, message.key) == (value['id'].encode(), user_id.encode())
        assert value['scores'] == {'purchase_intent': step / 10_000, 'purchase_power': (10_000 - step) / 10_000,
                                   'churn': 0.0, 'expected_spend_90d': spend}
        assert value['tier'] == (None if tier < 0 else tier)
        assert value['cause'] == {'clicks_offset': 2**40, 'carts_offset': 3, 'timer_ms': timer_ms or None}


FIRST = Message(Kind.CHURN, b'01' * 16, shopper().user_id.encode(), 5,
                b'{"id":"%s","type":"churn.alert","as_of_ms":5}' % (b'01' * 16))


def outbox_of_everything() -> User:
    user = shopper()
    scores_messages(user, events=('e9', 'e10'))
    user.outbox = pack_messages([FIRST]) + user.outbox
    return user


def test_an_outbox_that_is_cut_is_refused():
    whole = outbox_of_everything().outbox
    for size in range(1, len(whole)):
        user = shopper()
        user.outbox = whole[:size]
        if size == 4 + len(FIRST.value):
            assert unpack_outbox(user) == [FIRST]
        else:
            with pytest.raises(StateError, match='damaged'):
                unpack_outbox(user)


@given(st.data())
def test_a_damaged_outbox_never_gives_what_is_not_in_it(data: st.DataObject):
    whole = bytearray(outbox_of_everything().outbox)
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    user = shopper()
    user.outbox = bytes(whole)
    try:
        messages = unpack_outbox(user)
    except StateError:
        return
    assert sum(len(message.value) for message in messages) < 10 * len(whole) + 1_000


def test_more_events_than_sixteen_bits_count_have_a_message_each():
    assert len(scores_messages(shopper(), events=[f'e{number}' for number in range(70_000)])) == 70_000
