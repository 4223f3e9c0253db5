"""A user's record, taken apart by the layout that the docstring of `stream/core/layout.py` gives, byte by byte.

Imports nothing of `stream`: a defect of the product's codec shows as a difference.
"""
import struct
from typing import NamedTuple

import orjson
from xxhash import xxh3_128_hexdigest

LAYOUT = 2
# format events days alerting tier outbox_bytes generation step next_offset[2] applied duplicate late first_seen_ms
# last_seen_ms counts[14] spend refunds orders last_basket last_order_ms gaps gap_days gap_days_squared due_ms silence
# power_grid power_at_ms intent_at_ms churn_at_ms decisions decision_id model claims
_HEADER = struct.Struct('<HHHBbIIqqqIIIqq14IddIIqIddqBiqqqI16s8s32s')
_DAY = struct.Struct('<HHHHf')
_ROW_BYTES, _ID_BYTES = 24, 8
_SCORES = struct.Struct('<32sqqdHHHBBBI')
_SCORES_BIT = 1 << 31


class State(NamedTuple):
    """A decoded record; names as in the layout."""

    alerting: int
    tier: int
    generation: int
    step: int
    clicks: int
    carts: int
    applied: int
    duplicate: int
    late: int
    first_seen_ms: int
    last_seen_ms: int
    counts: list[int]
    spend: float
    refunds: float
    orders: int
    last_basket: int
    last_order_ms: int
    gaps: int
    gap_days: float
    gap_days_squared: float
    due_ms: int
    silence: int
    power_grid: int
    power_at_ms: int
    intent_at_ms: int
    churn_at_ms: int
    decisions: int
    decision_id: bytes
    model: bytes
    days: bytes
    outbox: bytes
    ids: bytes
    rows: bytes


def unpack(value: bytes) -> State:
    """A record's fields. Errors: ValueError where the bytes are not one record of the known layout."""
    if len(value) < _HEADER.size:
        raise ValueError(f'{len(value)} bytes are shorter than a header')
    fields = _HEADER.unpack_from(value)
    layout, events, days, alerting, tier, outbox_bytes = fields[:6]
    if layout != LAYOUT:
        raise ValueError(f'layout {layout}')
    at = [_HEADER.size]
    for size in (days * _DAY.size, outbox_bytes, events * _ID_BYTES, events * _ROW_BYTES):
        at.append(at[-1] + size)
    if at[-1] != len(value):
        raise ValueError(f'{len(value)} bytes, the header says {at[-1]}')
    return State(
        alerting, tier, *fields[6:15], list(fields[15:29]), *fields[29:-1],
        value[at[0]:at[1]], value[at[1]:at[2]], value[at[2]:at[3]], value[at[3]:])


def messages(user_id: str, record: State) -> list[bytes]:
    """What the record's outbox announces, by the docstring of `stream/core/outbox.pyx`.

    Errors   ValueError where it is cut short.
    """
    found, at, outbox = [], 0, record.outbox
    while at < len(outbox):
        size = int.from_bytes(outbox[at:at + 4], 'little')
        whole, size = not size & _SCORES_BIT, size & ~_SCORES_BIT
        end = at + 4 + size
        if end > len(outbox):
            raise ValueError('the outbox is cut short')
        item = outbox[at + 4:end]
        found += [item] if whole else _scores(user_id, record, item)
        at = end
    return found


def _scores(user_id: str, record: State, item: bytes) -> list[bytes]:
    digest, as_of_ms, timer_ms, spend, intent, power, churn, tiers, name, version, events = _SCORES.unpack_from(item)
    rest = item[_SCORES.size:]
    table = struct.unpack_from(f'<{tiers}H', rest)
    rest = rest[2 * tiers:]
    model = {'name': rest[:name].decode(), 'version': rest[name:name + version].decode(), 'sha256': digest.hex()}
    rest = rest[name + version:]
    named: list[str | None] = []
    for _ in range(events):
        size = int.from_bytes(rest[:2], 'little')
        named.append(rest[2:2 + size].decode())
        rest = rest[2 + size:]
    if rest:
        raise ValueError(f'{len(rest)} bytes too many in an item of scores')
    found = []
    for event_id in named or [None]:
        identity = xxh3_128_hexdigest(orjson.dumps([
            user_id, 'scores.updated', event_id or '', timer_ms, record.clicks, record.carts, record.applied,
            digest.hex()]))
        found.append(orjson.dumps({
            'id': identity, 'type': 'scores.updated', 'user_id': user_id, 'as_of_ms': as_of_ms,
            'events_seen': record.applied,
            'cause': {'clicks_offset': record.clicks, 'carts_offset': record.carts, 'timer_ms': timer_ms or None},
            'model': model, **({} if event_id is None else {'event_id': event_id}),
            'scores': {'purchase_intent': intent / 10_000, 'purchase_power': power / 10_000, 'churn': churn / 10_000,
                       'expected_spend_90d': spend},
            'tier_probabilities': [step / 10_000 for step in table], 'tier': None if record.tier < 0 else record.tier}))
    return found


def pack_days(days: dict[int, list]) -> bytes:
    """Day buckets as a record keeps them, oldest first."""
    return b''.join(_DAY.pack(day, *bucket) for day, bucket in sorted(days.items()))
