"""A user's record, taken apart by the layout that the docstring of `stream/core/window.py` gives, byte by byte.

Imports nothing of `stream`: a defect of the product's codec shows as a difference.
"""
import struct
from typing import NamedTuple

LAYOUT = 1
# format events days alerting tier outbox_bytes generation step next_offset[2] applied duplicate late first_seen_ms
# last_seen_ms counts[14] spend refunds orders last_basket last_order_ms gaps gap_days gap_days_squared due_ms silence
# power_grid power_at_ms intent_at_ms churn_at_ms decisions decision_id model claims
_HEADER = struct.Struct('<HHHBbIIqqqIIIqq14IddIIqIddqBiqqqI16s8s32s')
_DAY = struct.Struct('<HHHHf')
_ROW_BYTES, _ID_BYTES = 24, 8


class Record(NamedTuple):
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
    outbox: list[bytes]
    ids: bytes
    rows: bytes


def unpack(value: bytes) -> Record:
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
    return Record(
        alerting, tier, *fields[6:15], list(fields[15:29]), *fields[29:-1],
        value[at[0]:at[1]], _messages(value[at[1]:at[2]]), value[at[2]:at[3]], value[at[3]:])


def _messages(outbox: bytes) -> list[bytes]:
    messages, at = [], 0
    while at < len(outbox):
        end = at + 4 + int.from_bytes(outbox[at:at + 4], 'little')
        if end > len(outbox):
            raise ValueError('the outbox is cut short')
        messages.append(outbox[at + 4:end])
        at = end
    return messages


def pack_days(days: dict[int, list]) -> bytes:
    """Day buckets as a record keeps them, oldest first."""
    return b''.join(_DAY.pack(day, *bucket) for day, bucket in sorted(days.items()))
