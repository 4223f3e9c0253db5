"""What a published decision must say, given its user's state, its predecessor and the rules: pure functions.

Each yields one sentence for each thing that is wrong, and nothing where all is right.
"""
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from xxhash import xxh3_128_hexdigest

from tests.chaos.log import Record
from tests.chaos.record import State
from tests.chaos.reference import Rules, User, is_number, median_tier

ANY_TIMER = -1
POWER, INTENT, CHURN, SCORES = 'purchase_power.updated', 'purchase_intent.alert', 'churn.alert', 'scores.updated'


def _occasion(message: dict) -> str | None:
    match message['type'], message.get('state'):
        case 'purchase_intent.alert', 'raised':
            return 'intent'
        case 'churn.alert', 'raised' | 'cleared' as state:
            return f'churn_{state}'
        case 'purchase_power.updated', None:
            before, tier = message['previous_tier'], message['tier']
            return 'power_first' if before is None else 'power_up' if tier > before else 'power_down'
    return None


def wrong_message(message: dict, user_id: str, state: State, user: User | None, number: int, timer_ms: int | None,
                   rules: Rules) -> Iterable[str]:
    """What in a message does not follow from the state whose outbox has it.

    user       the reference, as of that state; None where it is not known exactly
    number     of the decision, from 1
    timer_ms   due time of the timer that fired; None: no timer, ANY_TIMER: not known
    """
    try:
        yield from _wrong_content(message, user_id, state, user, number, timer_ms, rules)
    except (KeyError, TypeError, ValueError) as error:
        yield f'cannot be read: {error!r}'


def _wrong_content(message: dict, user_id: str, state: State, user: User | None, number: int, timer_ms: int | None,
                   rules: Rules) -> Iterable[str]:
    kind, cause, scores = message['type'], message['cause'], message['scores']
    occasion = _occasion(message)
    if message['user_id'] != user_id:
        yield f'its user is {message["user_id"]!r}'
    if message['events_seen'] != state.applied:
        yield f'events_seen is {message["events_seen"]}, the record says {state.applied}'
    if [cause['clicks_offset'], cause['carts_offset']] != [state.clicks, state.carts]:
        yield f'its cause {cause} is not that of the state, {[state.clicks, state.carts]}'
    if user is not None:
        as_of_ms = user.clock_ms()
        if message['as_of_ms'] != as_of_ms:
            yield f'as_of_ms is {message["as_of_ms"]}, the state has come to {as_of_ms}'
        if timer_ms != ANY_TIMER and cause['timer_ms'] != timer_ms:
            yield f'its timer is {cause["timer_ms"]}, the state is that of {timer_ms}'
    what: list[Any] = [message.get('event_id') or ''] if kind == SCORES else [occasion, number]
    identity = [user_id, kind, *what, cause['timer_ms'] or 0, state.clicks, state.carts, state.applied,
                message['model']['sha256']]
    if message['id'] != xxh3_128_hexdigest(json.dumps(identity, ensure_ascii=False, separators=(',', ':')).encode()):
        yield 'its id does not follow from its user, kind, number, cause and model'
    for name in ('purchase_intent', 'purchase_power', 'churn'):
        if not is_number(scores[name], 0, 1) or abs(scores[name] * 10_000 - round(scores[name] * 10_000)) > 1e-6:
            yield f'{name} is {scores[name]}, which is not in [0, 1] on the grid'
    if not is_number(scores['expected_spend_90d'], 0, 1e300):
        yield f'expected_spend_90d is {scores["expected_spend_90d"]}'
    probabilities = message['tier_probabilities']
    if abs(sum(probabilities) - 1) > 2e-3:
        yield f'its tier probabilities sum to {sum(probabilities)}'
    if kind == SCORES:
        return
    if occasion is None:
        yield f'no such decision: {message.get("state")}'
        return
    if message['expires_at_ms'] != message['as_of_ms'] + rules.ttl_ms[kind]:
        yield f'expires_at_ms is {message["expires_at_ms"]}, {rules.ttl_ms[kind]} after as_of_ms was due'
    intent, churn = scores['purchase_intent'], scores['churn']
    if occasion == 'intent' and intent < rules.intent_raise:
        yield f'raised at {intent}'
    if occasion == 'churn_raised' and (churn < rules.churn_raise or state.orders < rules.churn_orders_min):
        yield f'raised at {churn} with {state.orders} orders'
    if occasion == 'churn_cleared' and churn > rules.churn_clear:
        yield f'cleared at {churn}'
    if occasion == 'power_first' and state.applied < rules.tier_events_min:
        yield f'a first tier after {state.applied} events'
    if kind == POWER and message['tier'] != median_tier(probabilities):
        yield f'tier {message["tier"]} is not the median of {probabilities}'
    tier = -1 if message['tier'] is None else message['tier']
    action = next((action for name, action, low, high, least in rules.actions
                   if name == occasion and low <= tier <= high and state.spend >= least), None)
    if message['action'] != action:
        yield f'proposes {message["action"]}, the rules say {action}'


def wrong_chain(alerts: list[dict], state: State, rules: Rules) -> Iterable[str]:
    """Compare a user's distinct decisions, in the order of the topic, with the user's final state."""
    try:
        previous, last_raised_ms = None, {}
        last: dict[str, dict] = {}
        churning, tier, ruler = False, None, None
        for alert in alerts:
            kind, as_of_ms = alert['type'], alert['as_of_ms']
            if alert['previous_id'] != previous:
                yield f'{kind} {alert["id"]} follows {previous}, but says that it follows {alert["previous_id"]}'
            previous = alert['id']
            last[kind] = alert
            if kind == CHURN:
                if churning == (alert['state'] == 'raised'):
                    yield f'churn {alert["id"]} is {alert["state"]} a second time'
                churning = alert['state'] == 'raised'
            if kind == POWER:
                # (Under another model the tier may have been set anew without a message.)
                if alert['previous_tier'] != tier and ruler in (None, alert['model']['sha256']):
                    yield f'tier {alert["id"]} replaces {alert["previous_tier"]}, the one before was {tier}'
                tier, ruler = alert['tier'], alert['model']['sha256']
            if kind != CHURN or churning:
                if kind in last_raised_ms and as_of_ms - last_raised_ms[kind] < rules.cooldown_ms[kind]:
                    yield f'{kind} {alert["id"]} came {as_of_ms - last_raised_ms[kind]} ms after the one before'
                last_raised_ms[kind] = as_of_ms
        if len(alerts) != state.decisions:
            yield f'{state.decisions} decisions are recorded, {len(alerts)} were published'
        if (previous or '0' * 32) != state.decision_id.hex():
            yield f'the last decision recorded is {state.decision_id.hex()}, the last one published {previous}'
        for kind, recorded_ms in ((POWER, state.power_at_ms), (INTENT, state.intent_at_ms), (CHURN, state.churn_at_ms)):
            published_ms = last_raised_ms.get(kind, 0)
            if published_ms != recorded_ms:
                yield f'the last {kind} was recorded at {recorded_ms}, and published as of {published_ms}'
        if churning != bool(state.alerting & 2):
            yield f'the record says churn alert {bool(state.alerting & 2)}, the topic {churning}'
        if state.alerting & 1 and INTENT not in last:
            yield 'the record says that an intent alert is raised, none was published'
        power = last.get(POWER)
        if power is None:
            if state.tier != -1:
                yield f'tier {state.tier} is recorded, none was published'
        elif power['model']['sha256'][:16] == state.model.hex():
            grid = round(power['scores']['purchase_power'] * 10_000)
            if (power['tier'], grid) != (state.tier, state.power_grid):
                yield f'tier {state.tier} at {state.power_grid} is recorded, {power["tier"]} at {grid} was published'
    except (KeyError, TypeError) as error:
        yield f'its decisions cannot be read: {error!r}'


def wrong_headers(record: Record, message: dict, rules: Rules) -> Iterable[str]:
    headers = dict(record.headers)
    try:
        time = datetime.fromtimestamp(message['as_of_ms'] / 1000, UTC).isoformat(timespec='milliseconds')
    except (KeyError, TypeError, ValueError):
        yield 'it has no as_of_ms'
        return
    for name, text in (
            ('ce_specversion', '1.0'), ('ce_id', message['id']), ('ce_type', message['type']),
            ('ce_source', f'/stream/{rules.group}'), ('ce_subject', message['user_id']),
            ('ce_time', time.replace('+00:00', 'Z')), ('content-type', 'application/json')):
        if headers.get(name) != text.encode():
            yield f'header {name} is {headers.get(name)!r}, expected {text!r}'
