"""Writes finished steps to the stores, a little later and many at once.

A step is durable when its changelog is acknowledged, so nothing waits for the store. What is not written when a worker
is killed is read back from the changelog. A delay lets one write, and one turn of a thread, serve the steps of all
lanes in that time, and a user who changes in several of them is written once.

A lane keeps the users of unwritten steps in memory (`UserCache.trim`), because the store has only older records.
"""
import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stream.core.layout import NO_TIMER_MS
from stream.core.user import Change, gather
from stream.engine.threads import in_thread
from stream.state.store import Meta, PartitionStore

BYTES_SOON = 4 << 20        # records of this size are not left waiting
BYTES_MAX = 32 << 20        # no new beat starts while records of this size wait


@dataclass
class _Pending:
    """What waits to be written to one store.

    due_ms   the earliest timer among the changes; NO_TIMER_MS if there is none
    """

    changes: dict[bytes, Change] = field(default_factory=dict)
    meta: Meta | None = None
    due_ms: int = NO_TIMER_MS


class Writer:
    """Belongs to one event loop.

    bytes    size of the records that wait
    full     called once the waiting records are so large that they must be written now; not again until they are taken
    """

    def __init__(self, full: Callable[[], None]) -> None:
        self.bytes = 0
        self._full = full
        self._full_called = False
        self._pending: dict[PartitionStore, _Pending] = {}
        self._writing: dict[PartitionStore, _Pending] = {}
        self._turn = asyncio.Lock()

    def add(self, store: PartitionStore, changes: list[Change], meta: Meta) -> None:
        """Write these changes with one of the next writes. `meta.users` is calculated then."""
        pending = self._pending.setdefault(store, _Pending())
        grown, due_ms = gather(pending.changes, changes)
        if due_ms != NO_TIMER_MS and (pending.due_ms == NO_TIMER_MS or due_ms < pending.due_ms):
            pending.due_ms = due_ms
        pending.meta = meta
        self.bytes += grown
        if self.bytes > BYTES_SOON and not self._full_called:
            self._full_called = True
            self._full()

    @property
    def waiting(self) -> bool:
        """Whether there is anything to write."""
        return bool(self._pending)

    def none_due(self, store: PartitionStore, until_ms: int) -> bool:
        """Whether no timer of this store can be due, written or not."""
        return store.none_due(until_ms) and not any(
            0 < part[store].due_ms <= until_ms for part in (self._pending, self._writing) if store in part)

    async def flush(self) -> None:
        """Write everything that has been added so far."""
        async with self._turn:
            if not self._pending:
                return
            self._writing, self._pending, self.bytes, self._full_called = self._pending, {}, 0, False
            try:
                await in_thread(_write, [(store, list(part.changes.values()), part.meta)
                                         for store, part in self._writing.items()])
            finally:
                self._writing = {}


def _write(parts: Sequence[tuple[PartitionStore, list[Change], Meta]]) -> None:
    for store, changes, meta in parts:
        store.write(changes, meta)
