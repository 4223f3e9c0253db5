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
the rounded scores that are published.
"""
import enum
from collections.abc import Iterator
from typing import Literal

import msgspec
import numpy as np

from stream.core.layout import CHURN_RAISED, DAY_MS, HOUR_MS, INTENT_RAISED, NO_TIER
from stream.core.scores import STEPS_PER_UNIT, Scores
from stream.core.user import User

Occasion = Literal['power_first', 'power_up', 'power_down', 'intent', 'churn_raised', 'churn_cleared']


class Kind(enum.StrEnum):
    """CloudEvents types of the messages."""

    POWER = 'purchase_power.updated'
    INTENT = 'purchase_intent.alert'
    CHURN = 'churn.alert'
    SCORES = 'scores.updated'


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
    power = list(_power(headers, as_of_ms, scores, policy, model))
    tiers = headers['tier'].astype(np.int64)        # the loop below applies this step's changes
    for decision in power:
        tiers[decision.row] = decision.tier
    decisions = [*power, *_intent(headers, as_of_ms, scores, policy, tiers),
                 *_churn(headers, as_of_ms, scores, policy, tiers)]
    order = {Kind.POWER: 0, Kind.INTENT: 1, Kind.CHURN: 2}
    return sorted(decisions, key=lambda decision: (decision.row, order[decision.kind]))


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


def _power(headers: np.ndarray, as_of_ms: np.ndarray, scores: Scores, policy: Policy,
           model: bytes) -> Iterator[Decision]:
    rows = np.arange(len(scores))
    tier = headers['tier'].astype(np.int64)
    below = _steps(scores.tiers.cumsum(axis=1))     # probability at or below each tier, in grid steps
    median = np.minimum((below < STEPS_PER_UNIT / 2).sum(axis=1), scores.tiers.shape[1] - 1)
    first = (tier == NO_TIER) & (headers['applied'] >= policy.tier_events_min)
    known = (tier != NO_TIER) & (tier < scores.tiers.shape[1])
    remodelled = (tier != NO_TIER) & (headers['model'] != np.void(model))
    # Compare in whole grid steps: the difference of two floats may fall just short of a threshold that it meets.
    published = np.where(known, tier, 0)
    beyond = np.where(median > tier, below[:, -1] - below[rows, published], below[rows, np.maximum(published - 1, 0)])
    move = np.abs(_steps(scores.power) - headers['power_grid'])
    changed = (known & (median != tier) & (beyond >= round((0.5 + policy.tier_margin) * STEPS_PER_UNIT))
               & (move >= round(policy.power_move_min * STEPS_PER_UNIT))
               & _cooled(headers['power_at_ms'], as_of_ms, policy.power_cooldown_ms))
    for row in np.flatnonzero(scores.usable & (first | changed | remodelled)):
        new, old = int(median[row]), int(tier[row])
        occasion: Occasion | None = (None if remodelled[row] else 'power_first' if first[row]
                                     else 'power_up' if new > old else 'power_down')
        yield Decision(int(row), Kind.POWER, occasion, new, old)


def _intent(headers: np.ndarray, as_of_ms: np.ndarray, scores: Scores, policy: Policy,
            tiers: np.ndarray) -> Iterator[Decision]:
    raised = (headers['alerting'] & INTENT_RAISED) > 0
    up = ~raised & (scores.intent >= policy.intent_raise) & _cooled(headers['intent_at_ms'], as_of_ms,
                                                                   policy.intent_cooldown_ms)
    down = raised & (scores.intent <= policy.intent_clear)
    for row in np.flatnonzero(scores.usable & (up | down)):
        tier = int(tiers[row])
        yield Decision(int(row), Kind.INTENT, 'intent' if up[row] else None, tier, tier)


def _churn(headers: np.ndarray, as_of_ms: np.ndarray, scores: Scores, policy: Policy,
           tiers: np.ndarray) -> Iterator[Decision]:
    raised = (headers['alerting'] & CHURN_RAISED) > 0
    up = (~raised & (scores.churn >= policy.churn_raise) & (headers['orders'] >= policy.churn_orders_min)
          & _cooled(headers['churn_at_ms'], as_of_ms, policy.churn_cooldown_ms))
    down = raised & (scores.churn <= policy.churn_clear)
    for row in np.flatnonzero(scores.usable & (up | down)):
        tier = int(tiers[row])
        yield Decision(int(row), Kind.CHURN, 'churn_raised' if up[row] else 'churn_cleared', tier, tier)


def _steps(values: np.ndarray) -> np.ndarray:
    return np.rint(values * STEPS_PER_UNIT)


def _cooled(at_ms: np.ndarray, as_of_ms: np.ndarray, cooldown_ms: int) -> np.ndarray:
    return (at_ms == 0) | (as_of_ms - at_ms >= cooldown_ms)
