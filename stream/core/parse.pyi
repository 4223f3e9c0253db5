from collections.abc import Iterable
from typing import Any

SOURCE_HASH: str

class Event:
    user_id: str
    event_id: str
    key: int
    ts_ms: int
    type: int
    item: int
    category: int
    basket: int
    amount: float
    rating: int
    source: int
    offset: int
    def __init__(self, user_id: str, event_id: str, key: int, ts_ms: int, type: int, item: int, category: int,  # noqa: A002
                 basket: int, amount: float, rating: int, source: int = 0, offset: int = 0) -> None: ...

class EventParser:
    def __init__(self, currency: str, clock_ahead_ms_max: int, record_bytes_max: int, ts_ms_min: int, ts_ms_max: int,
                 price_max: float, quantity_max: float, rating_max: float, types: dict[str, int],
                 other: int) -> None: ...
    def parse(self, value: bytes | None, key: Any, record_ts_ms: int | None) -> Event | None: ...
    def parse_records(self, records: Iterable[Any], source: int) -> list[Event | None]: ...
