import json
from pathlib import Path

import numpy as np
import orjson

from stream.core.decide import Decision, Kind, Policy
from stream.core.messages import ModelInfo, Origin, cloudevents_headers, decision_message, scores_message
from stream.core.scores import Scores
from stream.core.user import User
from stream.core.window import NO_TIER

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


def messages() -> list[bytes]:
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
        scores_message(user, ORIGIN, 0, SCORES, MODEL),
        scores_message(user, ORIGIN, 0, SCORES, MODEL, event_id='e9'),
    ]


def test_messages_are_byte_for_byte_the_recorded_ones():
    """Subscribers parse these. A change here is a change of the contract: say so in the README."""
    assert b'\n'.join(messages()) + b'\n' == GOLDEN.read_bytes()


def test_ids_are_distinct_and_chain():
    values = [json.loads(message) for message in messages()]
    assert len({value['id'] for value in values}) == len(values)
    assert values[0]['previous_id'] is None
    assert [value['previous_id'] for value in values[1:4]] == [value['id'] for value in values[:3]]


def test_an_id_depends_on_the_cause():
    def identity(user: User, origin: Origin = ORIGIN) -> str:
        return orjson.loads(scores_message(user, origin, 0, SCORES, MODEL))['id']

    ahead, other = shopper(), shopper()
    ahead.next_offset = [31, 4]
    other.user_id = 'other'
    assert len({identity(shopper()), identity(ahead), identity(other), identity(shopper(), Origin(1, 1))}) == 4
    assert identity(shopper()) == identity(shopper())


def test_expiry_and_action_come_from_the_policy():
    value = json.loads(messages()[1])
    assert value['expires_at_ms'] - value['as_of_ms'] == Policy().intent_ttl_ms
    assert value['action'] == 'recommendation'


def test_cloudevents_headers():
    headers = dict(cloudevents_headers(messages()[2], '/shop/scoring'))
    value = json.loads(messages()[2])
    assert headers == {
        'ce_specversion': b'1.0', 'ce_id': value['id'].encode(), 'ce_type': b'churn.alert',
        'ce_source': b'/shop/scoring', 'ce_time': b'2023-11-14T22:13:20.123Z', 'ce_subject': 'u-é"<'.encode(),
        'content-type': b'application/json'}
