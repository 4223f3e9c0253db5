"""Where a replay keeps its users' records: in memory, or in RocksDB for more users than memory holds.

Both keep, beside the records, the index of due silence timers, written together with them.
"""
import heapq
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
from rocksdict import Options, Rdict, WriteBatch

from stream.core.window import NO_TIMER_MS
from stream.errors import UsageError

_DUE = struct.Struct('>Q')


class Put(msgspec.Struct, gc=False):
    """A record to store, the timer that it had when it was read, and the one that it has now."""

    user_id: str
    record: bytes
    due_before_ms: int
    due_ms: int


class State(Protocol):
    """Records by user, and users by due time."""

    def get_many(self, user_ids: Sequence[str]) -> list[bytes | None]:
        """The records of these users, None where there is none."""
        ...

    def write(self, puts: Iterable[Put]) -> None:
        """Store records and their timers, together."""
        ...

    def due(self, until_ms: int, users_max: int) -> list[str]:
        """At most `users_max` users whose timer is due at or before `until_ms`, by due time, then id."""
        ...

    def records(self) -> Iterator[tuple[str, bytes]]:
        """All users' records."""
        ...

    def close(self) -> None: ...


class MemoryState:
    """Everything in dictionaries."""

    def __init__(self) -> None:
        self._records: dict[str, bytes] = {}
        self._due_ms: dict[str, int] = {}
        # The heap holds every timer at or before its time; an entry that is not the user's queued one is stale.
        self._heap: list[tuple[int, str]] = []
        self._queued_ms: dict[str, int] = {}

    def get_many(self, user_ids: Sequence[str]) -> list[bytes | None]:
        return [self._records.get(user_id) for user_id in user_ids]

    def write(self, puts: Iterable[Put]) -> None:
        for put in puts:
            self._records[put.user_id] = put.record
            if put.due_ms == NO_TIMER_MS:
                self._due_ms.pop(put.user_id, None)
                continue
            self._due_ms[put.user_id] = put.due_ms
            if put.due_ms < self._queued_ms.get(put.user_id, put.due_ms + 1):
                self._queue(put.due_ms, put.user_id)

    def due(self, until_ms: int, users_max: int) -> list[str]:
        heap, ready = self._heap, []
        while heap and heap[0][0] <= until_ms and len(ready) < users_max:
            queued_ms, user_id = heapq.heappop(heap)
            if self._queued_ms.get(user_id) != queued_ms:
                continue
            due_ms = self._due_ms.get(user_id)
            if due_ms == queued_ms:
                ready.append((due_ms, user_id))
            elif due_ms is None:
                del self._queued_ms[user_id]
            else:
                self._queue(due_ms, user_id)
        for entry in ready:     # asking changes nothing; `write` moves the timer
            heapq.heappush(heap, entry)
        return [user_id for _, user_id in ready]

    def records(self) -> Iterator[tuple[str, bytes]]:
        return iter(self._records.items())

    def close(self) -> None:
        """Nothing is held."""

    def _queue(self, due_ms: int, user_id: str) -> None:
        heapq.heappush(self._heap, (due_ms, user_id))
        self._queued_ms[user_id] = due_ms


class RocksState:
    """Records and timers in one RocksDB directory, each write one atomic batch."""

    def __init__(self, directory: Path) -> None:
        if directory.exists() and any(directory.iterdir()):
            raise UsageError(f'The state directory {directory} is not empty.',
                             'name a new one: a replay begins with no history.')
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.create_missing_column_families(True)
        self._db = Rdict(str(directory), options, column_families={'due': Options(raw_mode=True)})
        self._due = self._db.get_column_family('due')
        self._due_handle = self._db.get_column_family_handle('due')
        self._swept = b''       # no timer lies before it: spares iteration over what sweeps have deleted

    def get_many(self, user_ids: Sequence[str]) -> list[bytes | None]:
        return self._db.get([user_id.encode() for user_id in user_ids]) if user_ids else []

    def write(self, puts: Iterable[Put]) -> None:
        batch = WriteBatch(raw_mode=True)
        for put in puts:
            user_id = put.user_id.encode()
            batch.put(user_id, put.record)
            if put.due_before_ms != put.due_ms:
                if put.due_before_ms != NO_TIMER_MS:
                    batch.delete(_DUE.pack(put.due_before_ms) + user_id, self._due_handle)
                if put.due_ms != NO_TIMER_MS:
                    key = _DUE.pack(put.due_ms) + user_id
                    batch.put(key, b'', self._due_handle)
                    self._swept = min(self._swept, key)
        self._db.write(batch)

    def due(self, until_ms: int, users_max: int) -> list[str]:
        end, ready = _DUE.pack(until_ms + 1), []
        for key in self._due.keys(from_key=self._swept):
            if key >= end or len(ready) == users_max:
                self._swept = ready[0] if ready else key
                break
            ready.append(key)
        return [key[_DUE.size:].decode() for key in ready]

    def records(self) -> Iterator[tuple[str, bytes]]:
        for user_id, record in self._db.items():
            yield user_id.decode(), record

    def close(self) -> None:
        self._due.close()
        self._db.close()
