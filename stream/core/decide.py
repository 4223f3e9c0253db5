"""Scores become decisions: tier changes, intent alerts, churn alerts raised and cleared.

    purchase power   The tier is the median of the tier probabilities: half of the probability lies at or below it. The
                     most likely tier would be less stable: an undecided shopper has most of the probability in the
                     lowest and the highest tier. A new median replaces the published tier if all of these hold:
                         - at least half plus `tier_margin` of the probability lies beyond the published tier
                           (hysteresis)
                         - the power has moved by at least `power_move_min`
                         - the last change is at least `power_cooldown_ms` old
                     After a change of model, the new tier replaces the old one without a message: the shopper has not
                     changed, only the measure has.
    purchase intent  raised at `intent_raise`; re-armed at `intent_clear`, without a message
    churn            raised at `churn_raise` for shoppers with at least `churn_orders_min` orders; cleared at
                     `churn_clear`

Each alert has two thresholds, so a score that fluctuates around one of them causes no flood of messages. During a
cool-down an alert is not raised at all. If the score still calls for it when the cool-down ends, it is raised then. A
churn alert is cleared without a cool-down, because a coupon for someone who has just bought wastes money. Decisions use
the rounded scores that are published. `stream.core.verdicts`, which is compiled, applies the thresholds to the scores.
"""
import enum
from typing import Literal

import msgspec
import numpy as np

from stream.core.layout import CHURN_RAISED, DAY_MS, HOUR_MS, INTENT_RAISED, NO_TIER
from stream.core.scores import STEPS_PER_UNIT, Scores
from stream.core.user import User
from stream.core.verdicts import changes

Occasion = Literal['power_first', 'power_up', 'power_down', 'intent', 'churn_raised', 'churn_cleared']


class Kind(enum.StrEnum):
    """CloudEvents types of the messages."""

    POWER = 'purchase_power.updated'
    INTENT = 'purchase_intent.alert'
    CHURN = 'churn.alert'
    SCORES = 'scores.updated'


_KINDS = (Kind.POWER, Kind.INTENT, Kind.CHURN)      # as `stream.core.verdicts.changes` numbers them


class ActionRule(msgspec.Struct, frozen=True):
    """Propose `action` on an occasion to shoppers with a tier in [tier_min, tier_max]. The first matching rule wins.

    tier_min    the default, -1, also matches shoppers who have no tier yet
    spend_min   minimum spend of the shopper so far, in the configured currency. The tier cannot stand in for it: a
                shopper who is about to leave has a low tier, however much they have spent
    """

    occasion: Occasion
    action: str
    tier_min: int = NO_TIER
    tier_max: int = 100
    spend_min: float = 0.0


class Policy(msgspec.Struct, frozen=True):
    """Thresholds on scores in [0, 1], cool-downs and lifetimes in milliseconds of event time."""

    tier_margin: float = 0.2
    power_move_min: float = 0.1
    tier_events_min: int = 5
    intent_raise: float = 0.7
    intent_clear: float = 0.4
    churn_raise: float = 0.8
    churn_clear: float = 0.6
    churn_orders_min: int = 1
    power_cooldown_ms: int = 7 * DAY_MS
    intent_cooldown_ms: int = DAY_MS
    churn_cooldown_ms: int = 7 * DAY_MS
    power_ttl_ms: int = 30 * DAY_MS
    intent_ttl_ms: int = 12 * HOUR_MS
    churn_ttl_ms: int = 7 * DAY_MS
    actions: tuple[ActionRule, ...] = (
        ActionRule('churn_raised', 'service_call', spend_min=500.0),
        ActionRule('churn_raised', 'coupon'),
        ActionRule('intent', 'recommendation', tier_min=2),
        ActionRule('intent', 'coupon'),
        ActionRule('power_up', 'loyalty_invitation', tier_min=3),
    )

    def ttl_ms(self, kind: Kind) -> int:
        """How long a message of this kind is worth acting on."""
        return {Kind.INTENT: self.intent_ttl_ms, Kind.CHURN: self.churn_ttl_ms}.get(kind, self.power_ttl_ms)

    def action(self, occasion: Occasion, tier: int, spend: float) -> str | None:
        """The action to propose; None if no rule matches."""
        for rule in self.actions:
            if rule.occasion == occasion and rule.tier_min <= tier <= rule.tier_max and spend >= rule.spend_min:
                return rule.action
        return None


class Decision(msgspec.Struct, frozen=True):
    """What changes for the user in row `row`. A decision without an occasion changes state but publishes nothing."""

    row: int
    kind: Kind
    occasion: Occasion | None
    tier: int               # after the decision
    previous_tier: int


def decide(headers: np.ndarray, as_of_ms: np.ndarray, scores: Scores, policy: Policy, model: bytes) -> list[Decision]:
    """Decisions for N scored users, ordered by row, then by kind: power, intent, churn.

    headers   HEADER_DTYPE [N], the users' state before the decision
    as_of_ms  int64 [N]
    model     first 8 bytes of the model's SHA-256
    """
    return [Decision(row, _KINDS[kind], occasion, tier, previous_tier)
            for row, kind, occasion, tier, previous_tier in changes(headers, as_of_ms, scores, policy, model)]


def apply(user: User, decision: Decision, power: float, as_of_ms: int, model: bytes) -> None:
    """Write the decision into the user's alert state."""
    if decision.kind is Kind.POWER:
        user.tier, user.power_grid, user.model = decision.tier, round(power * STEPS_PER_UNIT), model
        if decision.occasion:
            user.power_at_ms = as_of_ms
    elif decision.kind is Kind.INTENT:
        user.alerting ^= INTENT_RAISED
        if decision.occasion:
            user.intent_at_ms = as_of_ms
    else:
        user.alerting ^= CHURN_RAISED
        if decision.occasion == 'churn_raised':
            user.churn_at_ms = as_of_ms

