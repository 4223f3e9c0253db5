"""Renders decisions as JSON messages with CloudEvents 1.0 attributes. Each message states its cause.

The same decision always gives the same bytes and the same id, so consumers can recognise a message that was published
twice. Anyone can recompute a message from the input topics:

    cause         the offsets that the user's state had reached in both input topics, and the timer that fired, if any
    model         the weights
    previous_id   the user's previous decision
"""
from collections.abc import Mapping

import msgspec
import orjson
from xxhash import xxh3_128_digest

from stream.core.decide import Decision, Kind, Occasion, Policy
from stream.core.events import Source
from stream.core.layout import NO_TIER
from stream.core.outbox import Message
from stream.core.scores import Scores
from stream.core.user import User

_STATES: Mapping[Occasion, str] = {'intent': 'raised', 'churn_raised': 'raised', 'churn_cleared': 'cleared'}


class ModelInfo(msgspec.Struct, frozen=True):
    """Which model scored: its name, version, and the SHA-256 (hex) of its weights."""

    name: str
    version: str
    sha256: str

    @property
    def tag(self) -> bytes:
        """The first 8 bytes of the SHA-256, which the user's record stores."""
        return bytes.fromhex(self.sha256[:16])


class Origin(msgspec.Struct, frozen=True):
    """The time and cause of a score: the user as of `as_of_ms`, after events (`timer_ms` is 0) or after a timer."""

    as_of_ms: int
    timer_ms: int


def decision_message(
    user: User, decision: Decision, occasion: Occasion, origin: Origin, row: int, scores: Scores, model: ModelInfo,
    policy: Policy, reasons: list[dict] | None,
) -> Message:
    """The message of one decision. Advances the user's chain of decisions.

    reasons   None for a first tier, and for any decision that the budget for reasons does not cover
    """
    user.decisions += 1
    identity = _identity(user, origin, model, decision.kind, occasion, user.decisions)
    previous, user.decision_id = user.decision_id, identity
    value = _head(identity, decision.kind, user, origin, model)
    if occasion in _STATES:
        value['state'] = _STATES[occasion]
    value |= _scores(row, scores)
    value['tier'] = _tier(decision.tier)
    if decision.kind is Kind.POWER:
        value['previous_tier'] = _tier(decision.previous_tier)
    value |= {
        'reasons': reasons,
        'action': policy.action(occasion, decision.tier, user.spend),
        'expires_at_ms': origin.as_of_ms + policy.ttl_ms(decision.kind),
        'previous_id': previous.hex() if any(previous) else None,
    }
    return Message(decision.kind, value['id'].encode(), user.user_id.encode(), origin.as_of_ms, orjson.dumps(value),
                   value)


def with_reasons(message: Message, reasons: list[dict]) -> Message:
    """The message of a decision that was just taken, with these reasons: the bytes that it would have had at once."""
    assert message.content is not None
    value = message.content | {'reasons': reasons}
    return Message(message.kind, message.message_id, message.key, message.as_of_ms, orjson.dumps(value), value)


def _identity(user: User, origin: Origin, model: ModelInfo, *what: str | int) -> bytes:
    clicks, carts = user.next_offset
    return xxh3_128_digest(orjson.dumps(
        [user.user_id, *what, origin.timer_ms, clicks, carts, user.applied, model.sha256]))


def _head(identity: bytes, kind: Kind, user: User, origin: Origin, model: ModelInfo) -> dict:
    return {
        'id': identity.hex(),
        'type': kind,
        'user_id': user.user_id,
        'as_of_ms': origin.as_of_ms,
        'events_seen': user.applied,
        'cause': {'clicks_offset': user.next_offset[Source.CLICKS], 'carts_offset': user.next_offset[Source.CARTS],
                  'timer_ms': origin.timer_ms or None},
        'model': {'name': model.name, 'version': model.version, 'sha256': model.sha256},
    }


def _scores(row: int, scores: Scores) -> dict:
    return {
        'scores': {'purchase_intent': float(scores.intent[row]), 'purchase_power': float(scores.power[row]),
                   'churn': float(scores.churn[row]), 'expected_spend_90d': float(scores.spend[row])},
        'tier_probabilities': scores.tiers[row].tolist(),
    }


def _tier(tier: int) -> int | None:
    return None if tier == NO_TIER else tier
