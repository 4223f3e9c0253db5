import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.core.decide import Decision, Kind, Policy, apply, decide
from stream.core.layout import DAY_MS, HEADER_DTYPE, NO_TIER
from stream.core.scores import Scores
from stream.core.user import User, pack_header

T0_MS = 1_700_000_000_000
MODEL = b'model--1'
POLICY = Policy(tier_margin=0.1, power_move_min=0.1, tier_events_min=3, intent_raise=0.7, intent_clear=0.3,
                churn_raise=0.8, churn_clear=0.5, churn_orders_min=2, power_cooldown_ms=DAY_MS)


def shopper(**state: object) -> User:
    user = User('u')
    user.applied, user.orders, user.model = 10, 5, MODEL
    for name, value in state.items():
        setattr(user, name, value)
    return user


def scores_of(intent: float = 0.5, churn: float = 0.6, tiers: tuple[float, ...] = (0.2, 0.6, 0.2),
              usable: bool = True) -> Scores:
    table = np.array([tiers], np.float64)
    return Scores(np.array([usable]), np.array([intent]), np.array([churn]),
                  table @ np.arange(len(tiers)) / (len(tiers) - 1), table, np.array([1.0]))


def decided(user: User, scores: Scores, as_of_ms: int = T0_MS) -> list[tuple[Kind, str | None]]:
    """Decide, apply the decisions, and return them."""
    headers = np.frombuffer(pack_header(user), HEADER_DTYPE)
    decisions = decide(headers, np.array([as_of_ms]), scores, POLICY, MODEL)
    for decision in decisions:
        apply(user, decision, float(scores.power[0]), as_of_ms, MODEL)
    return [(decision.kind, decision.occasion) for decision in decisions]


def test_the_first_tier_waits_for_enough_events():
    assert decided(shopper(applied=2), scores_of()) == []
    user = shopper(applied=3)
    assert decided(user, scores_of()) == [(Kind.POWER, 'power_first')]
    assert (user.tier, user.power_grid, user.power_at_ms, user.model) == (1, 5000, T0_MS, MODEL)


@pytest.mark.parametrize(('tiers', 'expected'), [
    ((0.10, 0.30, 0.60), 'power_up'),
    ((0.60, 0.30, 0.10), 'power_down'),
    ((0.06, 0.35, 0.59), None),         # the median lies beyond, but not by the margin
    ((0.59, 0.35, 0.06), None),
    ((0.45, 0.10, 0.45), None),         # both ends are likelier than the middle, which is the median
    ((0.10, 0.80, 0.10), None),
])
def test_a_tier_changes_by_margin_and_move(tiers: tuple[float, ...], expected: str | None):
    user = shopper(tier=1, power_grid=5000)
    assert decided(user, scores_of(tiers=tiers)) == ([(Kind.POWER, expected)] if expected else [])


def test_a_tier_stays_while_the_power_hardly_moves():
    user = shopper(tier=1, power_grid=7900)
    assert decided(user, scores_of(tiers=(0.0, 0.4, 0.6))) == []        # power .8
    user.power_grid = 6900
    assert decided(user, scores_of(tiers=(0.0, 0.4, 0.6))) == [(Kind.POWER, 'power_up')]


def test_a_tier_change_waits_for_its_cool_down_and_comes_then():
    user = shopper(tier=1, power_grid=5000, power_at_ms=T0_MS)
    up = scores_of(tiers=(0, 0, 1))
    assert decided(user, up, T0_MS + DAY_MS - 1) == []
    assert user.tier == 1
    assert decided(user, up, T0_MS + DAY_MS) == [(Kind.POWER, 'power_up')]


def test_a_new_model_sets_tiers_anew_without_a_message():
    user = shopper(tier=1, power_grid=5000, model=b'model--0', power_at_ms=77)
    assert decided(user, scores_of(tiers=(0, 0, 1))) == [(Kind.POWER, None)]
    assert (user.tier, user.model, user.power_at_ms) == (2, MODEL, 77)
    assert decided(user, scores_of(tiers=(0, 0, 1))) == []


def test_a_model_with_fewer_tiers_does_not_trip_over_an_old_tier():
    user = shopper(tier=7, power_grid=5000, model=b'model--0')
    assert decided(user, scores_of()) == [(Kind.POWER, None)]
    assert user.tier == 1


def test_intent_is_raised_once_and_re_armed_below_the_lower_threshold():
    user = shopper(tier=1, power_grid=5000)
    assert decided(user, scores_of(intent=0.7)) == [(Kind.INTENT, 'intent')]
    assert decided(user, scores_of(intent=0.9), T0_MS + 9 * DAY_MS) == []
    assert decided(user, scores_of(intent=0.31), T0_MS + 9 * DAY_MS) == []
    assert decided(user, scores_of(intent=0.3), T0_MS + 9 * DAY_MS) == [(Kind.INTENT, None)]
    assert decided(user, scores_of(intent=0.7), T0_MS + 9 * DAY_MS) == [(Kind.INTENT, 'intent')]


def test_intent_waits_for_its_cool_down():
    user = shopper(tier=1, power_grid=5000, intent_at_ms=T0_MS)
    assert decided(user, scores_of(intent=0.9), T0_MS + DAY_MS - 1) == []
    assert decided(user, scores_of(intent=0.9), T0_MS + DAY_MS) == [(Kind.INTENT, 'intent')]


def test_churn_is_raised_and_cleared_each_at_its_threshold():
    user = shopper(tier=1, power_grid=5000)
    assert decided(user, scores_of(churn=0.79)) == []
    assert decided(user, scores_of(churn=0.8)) == [(Kind.CHURN, 'churn_raised')]
    assert decided(user, scores_of(churn=0.51)) == []
    assert decided(user, scores_of(churn=0.5)) == [(Kind.CHURN, 'churn_cleared')]     # clearing has no cool-down
    assert decided(user, scores_of(churn=0.9)) == []
    assert decided(user, scores_of(churn=0.9), T0_MS + 7 * DAY_MS) == [(Kind.CHURN, 'churn_raised')]


def test_churn_needs_orders():
    assert decided(shopper(tier=1, power_grid=5000, orders=1), scores_of(churn=1.0)) == []


def test_several_decisions_come_in_one_order():
    user = shopper(tier=1, power_grid=5000)
    assert [kind for kind, _ in decided(user, scores_of(0.9, 0.9, (0, 0, 1)))] == [Kind.POWER, Kind.INTENT, Kind.CHURN]


def test_an_unusable_row_decides_nothing():
    assert decided(shopper(applied=3), scores_of(0.9, 0.9, (0, 0, 1), usable=False)) == []


def test_rows_are_decided_alone():
    users = [shopper(tier=1, power_grid=5000) for _ in range(3)]
    headers = np.frombuffer(b''.join(map(pack_header, users)), HEADER_DTYPE)
    one = scores_of()
    scores = Scores(np.ones(3, bool), np.array([0.1, 0.9, 0.1]), np.array([0.1, 0.1, 0.9]), one.power.repeat(3),
                    one.tiers.repeat(3, axis=0), one.spend.repeat(3))
    assert decide(headers, np.full(3, T0_MS), scores, POLICY, MODEL) == [
        Decision(1, Kind.INTENT, 'intent', 1, 1), Decision(2, Kind.CHURN, 'churn_raised', 1, 1)]


def test_the_first_rule_that_fits_proposes_the_action():
    policy = Policy()
    assert policy.action('churn_raised', 0, 500.0) == 'service_call'
    assert policy.action('churn_raised', 4, 499.0) == 'coupon'
    assert policy.action('churn_cleared', 4, 900.0) is None
    assert policy.action('intent', 2, 0.0) == 'recommendation'
    assert policy.action('intent', 1, 0.0) == 'coupon'
    assert msgspec.structs.replace(policy, actions=()).action('intent', 1, 0.0) is None


def test_alerts_name_the_tier_that_the_same_step_has_set():
    user = shopper(tier=0, power_grid=0)
    headers = np.frombuffer(pack_header(user), HEADER_DTYPE)
    decisions = decide(headers, np.array([T0_MS]), scores_of(0.9, 0.9, (0, 0, 1)), POLICY, MODEL)
    assert [(decision.kind, decision.tier) for decision in decisions] == [
        (Kind.POWER, 2), (Kind.INTENT, 2), (Kind.CHURN, 2)]


def test_a_shopper_without_a_tier_gets_an_action_too():
    assert Policy().action('churn_raised', -1, 0.0) == 'coupon'
    assert Policy().action('intent', -1, 0.0) == 'coupon'


@pytest.mark.parametrize('share', [at / 100 for at in range(60, 100, 3)])
def test_a_threshold_that_is_met_to_the_step_is_met(share: float):
    scores = scores_of(tiers=(1 - share, share / 3, share * 2 / 3))
    policy = msgspec.structs.replace(POLICY, tier_margin=share - 0.5)
    headers = np.frombuffer(pack_header(shopper(tier=0, power_grid=0)), HEADER_DTYPE)
    assert [decision.occasion for decision in decide(headers, np.array([T0_MS]), scores, policy, MODEL)] == ['power_up']


def test_clearing_an_alert_starts_no_cool_down():
    user = shopper(tier=1, power_grid=5000, alerting=2, churn_at_ms=5)
    assert decided(user, scores_of(churn=0.1)) == [(Kind.CHURN, 'churn_cleared')]
    assert user.churn_at_ms == 5


# ---- against a plain calculation -------------------------------------------------------------------------------------

def plain(header: np.void, as_of_ms: int, row: int, steps: tuple[int, int, int, list[int]], policy: Policy,
          ) -> list[Decision]:
    """The decisions for one usable row, whose scores are whole grid steps: intent, churn, power and each tier."""
    intent, churn, power, shares = steps
    old, highest = int(header['tier']), len(shares) - 1
    median = next((tier for tier in range(highest) if 2 * sum(shares[:tier + 1]) >= 10_000), highest)

    def cooled(at_ms: int, cooldown_ms: int) -> bool:
        return at_ms == 0 or as_of_ms - at_ms >= cooldown_ms

    found, tier = [], old
    above, under = sum(shares[old + 1:]), sum(shares[:max(old, 0)])
    if old != NO_TIER and header['model'].tobytes() != MODEL:
        found, tier = [Decision(row, Kind.POWER, None, median, old)], median
    elif old == NO_TIER and header['applied'] >= policy.tier_events_min:
        found, tier = [Decision(row, Kind.POWER, 'power_first', median, old)], median
    elif (old != NO_TIER and old <= highest and median != old
          and (above if median > old else under) >= round((0.5 + policy.tier_margin) * 10_000)
          and abs(power - int(header['power_grid'])) >= round(policy.power_move_min * 10_000)
          and cooled(int(header['power_at_ms']), policy.power_cooldown_ms)):
        found, tier = [Decision(row, Kind.POWER, 'power_up' if median > old else 'power_down', median, old)], median
    if header['alerting'] & 1:
        if intent <= round(policy.intent_clear * 10_000):
            found.append(Decision(row, Kind.INTENT, None, tier, tier))
    elif intent >= round(policy.intent_raise * 10_000) and cooled(int(header['intent_at_ms']),
                                                                  policy.intent_cooldown_ms):
        found.append(Decision(row, Kind.INTENT, 'intent', tier, tier))
    if header['alerting'] & 2:
        if churn <= round(policy.churn_clear * 10_000):
            found.append(Decision(row, Kind.CHURN, 'churn_cleared', tier, tier))
    elif (churn >= round(policy.churn_raise * 10_000) and header['orders'] >= policy.churn_orders_min
          and cooled(int(header['churn_at_ms']), policy.churn_cooldown_ms)):
        found.append(Decision(row, Kind.CHURN, 'churn_raised', tier, tier))
    return found


STEPS = st.one_of(st.integers(0, 10_000), st.sampled_from([2999, 3000, 3001, 4999, 5000, 5001, 6999, 7000, 7999, 8000]))
AT_MS = st.sampled_from([0, 1, T0_MS, T0_MS - DAY_MS, T0_MS - DAY_MS + 1, T0_MS - 7 * DAY_MS, T0_MS - 7 * DAY_MS + 1])
SHOPPERS = st.fixed_dictionaries({
    'tier': st.integers(-1, 6), 'alerting': st.integers(0, 3), 'applied': st.integers(0, 5),
    'orders': st.integers(0, 3), 'power_grid': st.integers(-1, 10_000), 'power_at_ms': AT_MS, 'intent_at_ms': AT_MS,
    'churn_at_ms': AT_MS, 'model': st.sampled_from([MODEL, MODEL, b'model--0'])})


@given(st.lists(st.tuples(SHOPPERS, STEPS, STEPS, STEPS, st.booleans(), st.lists(st.integers(0, 9), min_size=4,
                                                                                max_size=4)), max_size=6))
@settings(max_examples=300)
def test_decisions_are_those_of_a_plain_calculation(rows: list[tuple]):
    headers = np.frombuffer(b''.join(pack_header(shopper(**state)) for state, *_ in rows), HEADER_DTYPE)
    tables = []
    for *_, weights in rows:
        cuts = [round(10_000 * sum(weights[:at]) / max(sum(weights), 1)) for at in range(1, len(weights))]
        tables.append([one - other for one, other in zip([*cuts, 10_000], [0, *cuts], strict=True)])
    scores = Scores(np.array([usable for *_, usable, _ in rows], bool), *(
        np.array([row[column] for row in rows], np.float64) / 10_000 for column in (1, 2, 3)),
        np.array(tables, np.float64).reshape(-1, 4) / 10_000, np.zeros(len(rows)))
    wanted = [decision for at, (_, intent, churn, power, usable, _) in enumerate(rows) if usable
              for decision in plain(headers[at], T0_MS, at, (intent, churn, power, tables[at]), POLICY)]
    assert decide(headers, np.full(len(rows), T0_MS), scores, POLICY, MODEL) == wanted


def test_a_damaged_header_leads_nowhere():
    """Nobody checks the numbers of a stored record."""
    for tier in (-128, -2, 3, 127):
        for at_ms in (-2**63, 2**63 - 1):
            header = np.frombuffer(pack_header(shopper(tier=tier, power_at_ms=at_ms)), HEADER_DTYPE)
            for as_of_ms in (-2**63, 2**63 - 1):
                assert decide(header, np.array([as_of_ms]), scores_of(), POLICY, MODEL) == []


def test_arrays_that_do_not_belong_together_are_refused():
    header = np.frombuffer(pack_header(shopper()), HEADER_DTYPE)
    with pytest.raises(ValueError, match='for 1 users'):
        decide(header[:0], np.array([T0_MS]), scores_of(), POLICY, MODEL)
    with pytest.raises(ValueError, match='8 bytes'):
        decide(header, np.array([T0_MS]), scores_of(), POLICY, b'short')
