"""Where a replay keeps its users: in memory, or in RocksDB for more users than memory holds.

Both keep, beside the users, the index of due silence timers, written together with them.
"""
import heapq
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from rocksdict import Options, Rdict, WriteBatch

from stream.core.window import NO_TIMER_MS, User, decode, encode
from stream.errors import UsageError

_DUE = struct.Struct('>Q')


class State(Protocol):
    """Users by id, and users by due time."""

    def load(self, user_ids: Iterable[str]) -> dict[str, User]:
        """These users, in this order; one that is not known yet comes without events.

        Whoever changes a user saves it before it is loaded again.
        """
        ...

    def save(self, users: Iterable[User]) -> None:
        """Keep these users and their timers, together."""
        ...

    def due(self, until_ms: int, users_max: int) -> list[str]:
        """At most `users_max` users whose timer is due at or before `until_ms`, by due time, then id."""
        ...

    def users(self) -> Iterator[User]:
        """All users that were saved."""
        ...

    def close(self) -> None: ...


class MemoryState:
    """Everything in dictionaries; users stay decoded."""

    def __init__(self) -> None:
        self._users: dict[str, User] = {}
        # The heap holds every timer at or before its time; an entry that is not the user's queued one is stale.
        self._heap: list[tuple[int, str]] = []
        self._queued_ms: dict[str, int] = {}

    def load(self, user_ids: Iterable[str]) -> dict[str, User]:
        users = self._users
        return {user_id: users.get(user_id) or User(user_id) for user_id in user_ids}

    def save(self, users: Iterable[User]) -> None:
        for user in users:
            self._users[user.user_id] = user
            user.stored_due_ms = user.due_ms
            if user.due_ms != NO_TIMER_MS and user.due_ms < self._queued_ms.get(user.user_id, user.due_ms + 1):
                self._queue(user.due_ms, user.user_id)

    def due(self, until_ms: int, users_max: int) -> list[str]:
        heap, ready = self._heap, []
        while heap and heap[0][0] <= until_ms and len(ready) < users_max:
            queued_ms, user_id = heapq.heappop(heap)
            if self._queued_ms.get(user_id) != queued_ms or (ready and ready[-1] == (queued_ms, user_id)):
                continue        # stale, or queued twice for the same time
            due_ms = self._users[user_id].stored_due_ms
            if due_ms == queued_ms:
                ready.append((due_ms, user_id))
            elif due_ms == NO_TIMER_MS:
                del self._queued_ms[user_id]
            else:
                self._queue(due_ms, user_id)
        for entry in ready:     # asking changes nothing; `save` moves the timer
            heapq.heappush(heap, entry)
        return [user_id for _, user_id in ready]

    def users(self) -> Iterator[User]:
        return iter(self._users.values())

    def close(self) -> None:
        """Nothing is held."""

    def _queue(self, due_ms: int, user_id: str) -> None:
        heapq.heappush(self._heap, (due_ms, user_id))
        self._queued_ms[user_id] = due_ms


class RocksState:
    """Records and timers in one RocksDB directory, each save one atomic batch."""

    def __init__(self, directory: Path) -> None:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UsageError(f'The state directory {directory} is no folder, or not empty.',
                             'name a new one: a replay begins with no history.')
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.create_missing_column_families(True)
        self._db = Rdict(str(directory), options, column_families={'due': Options(raw_mode=True)})
        self._due = self._db.get_column_family('due')
        self._due_handle = self._db.get_column_family_handle('due')
        self._swept = b''       # no timer lies before it: spares iteration over what sweeps have deleted

    def load(self, user_ids: Iterable[str]) -> dict[str, User]:
        wanted = list(user_ids)
        records: Any = self._db.get([user_id.encode() for user_id in wanted]) if wanted else []
        return {user_id: User(user_id) if record is None else decode(user_id, record)
                for user_id, record in zip(wanted, records, strict=True)}

    def save(self, users: Iterable[User]) -> None:
        batch = WriteBatch(raw_mode=True)
        for user in users:
            user_id = user.user_id.encode()
            batch.put(user_id, encode(user))
            if user.stored_due_ms != user.due_ms:
                if user.stored_due_ms != NO_TIMER_MS:
                    batch.delete(_DUE.pack(user.stored_due_ms) + user_id, self._due_handle)
                if user.due_ms != NO_TIMER_MS:
                    key = _DUE.pack(user.due_ms) + user_id
                    batch.put(key, b'', self._due_handle)
                    self._swept = min(self._swept, key)
                user.stored_due_ms = user.due_ms
        self._db.write(batch)

    def due(self, until_ms: int, users_max: int) -> list[str]:
        end = _DUE.pack(until_ms + 1)
        ready: list[bytes] = []
        due: Any = self._due
        for key in due.keys(from_key=self._swept):
            if key >= end or len(ready) == users_max:
                self._swept = ready[0] if ready else key
                break
            ready.append(key)
        return [key[_DUE.size:].decode() for key in ready]

    def users(self) -> Iterator[User]:
        db: Any = self._db
        for user_id, record in db.items():
            yield decode(user_id.decode(), record)

    def close(self) -> None:
        self._due.close()
        self._db.close()
