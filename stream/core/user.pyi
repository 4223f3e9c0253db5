from collections.abc import Iterable, Sequence

from stream.core.layout import Fold, WindowLimits
from stream.core.parse import Event

SOURCE_HASH: str

class User:
    user_id: str
    generation: int
    step: int
    next_offset: Sequence[int]
    applied: int
    duplicate: int
    late: int
    first_seen_ms: int
    last_seen_ms: int
    counts: Sequence[int]
    spend: float
    refunds: float
    orders: int
    last_basket: int
    last_order_ms: int
    gaps: int
    gap_days: float
    gap_days_squared: float
    due_ms: int
    stored_due_ms: int
    silence: int
    alerting: int
    tier: int
    power_grid: int
    power_at_ms: int
    intent_at_ms: int
    churn_at_ms: int
    decisions: int
    decision_id: bytes
    model: bytes
    claims: bytes
    days: bytearray
    outbox: bytes
    ids: bytearray
    rows: bytearray
    def __init__(self, user_id: str) -> None: ...

class Change:
    user_id: bytes
    record: bytes
    due_before_ms: int
    due_ms: int
    new: bool
    def __init__(self, user_id: bytes, record: bytes, due_before_ms: int, due_ms: int, new: bool = False) -> None: ...

def fold(user: User, events: Iterable[Event], limits: WindowLimits) -> list[Fold]: ...
def fold_runs(
    users: dict[str, User], events: Iterable[Event], limits: WindowLimits,
) -> tuple[list[tuple[User, list[Event]]], list[int], list[Event]]: ...
def overdue(users: dict[str, User], events: list[Event]) -> list[User]: ...
def newest_ms(events: list[Event]) -> list[int]: ...
def clock_ms(user: User, limits: WindowLimits) -> int: ...
def fire_timer(user: User, limits: WindowLimits) -> int: ...
def pack_header(user: User) -> bytes: ...
def encode(user: User) -> bytes: ...
def decode(user_id: str, record: bytes) -> User: ...
def change_of(user: User, new: bool = False) -> Change: ...
def gather(pending: dict[bytes, Change], changes: list[Change]) -> tuple[int, int]: ...
def stamp(users: list[User], step: int, generation: int) -> list[bool]: ...
def keep(kept: dict[str, User], users: list[User], changes: list[Change], object_bytes: int) -> int: ...
def join(users: list[User]) -> tuple[bytes, bytes, bytes]: ...
