"""The state of a replay: its users, in memory, or in RocksDB if memory cannot hold them all.

Both kinds also keep an index of silence timers by due time, and write it together with the users.
"""
import heapq
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

from stream.core.layout import NO_TIMER_MS
from stream.core.user import User, change_of
from stream.errors import UsageError
from stream.state.store import Memory, Meta, PartitionStore

_CACHE_MIB, _WRITE_BUFFERS_MIB, _SHARE_MIB_MIN = 256, 128, 8


class State(Protocol):
    """Users by id, and users by due time."""

    def load(self, user_ids: Iterable[str]) -> dict[str, User]:
        """These users, in this order. An unknown user has no events.

        A caller that changes a user must save it before the user is loaded again.
        """
        ...

    def save(self, users: Iterable[User]) -> None:
        """Keep these users and their timers, together."""
        ...

    def due(self, until_ms: int, users_max: int) -> list[str]:
        """At most `users_max` users whose timer is due at or before `until_ms`, ordered by due time, then id."""
        ...

    def users(self) -> Iterator[User]:
        """All users that were saved."""
        ...

    def close(self) -> None: ...


class MemoryState:
    """Keeps everything in dictionaries. Users stay decoded."""

    def __init__(self) -> None:
        self._users: dict[str, User] = {}
        # A user's entry in the heap is at or before the user's due time. Only the entry in `_queued_ms` counts; others
        # are stale.
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
                continue        # the entry is stale, or it was queued twice for the same time
            due_ms = self._users[user_id].stored_due_ms
            if due_ms == queued_ms:
                ready.append((due_ms, user_id))
            elif due_ms == NO_TIMER_MS:
                del self._queued_ms[user_id]
            else:
                self._queue(due_ms, user_id)
        for entry in ready:     # `due` must not change the index; only `save` moves a timer
            heapq.heappush(heap, entry)
        return [user_id for _, user_id in ready]

    def users(self) -> Iterator[User]:
        return iter(self._users.values())

    def close(self) -> None:
        """Does nothing: memory needs no closing."""

    def _queue(self, due_ms: int, user_id: str) -> None:
        heapq.heappush(self._heap, (due_ms, user_id))
        self._queued_ms[user_id] = due_ms


class RocksState:
    """Keeps records and timers in one directory. It uses a worker's partition store, without a changelog."""

    def __init__(self, directory: Path, states: int = 1) -> None:
        """`states` is the number of states of the replay: they share its memory for RocksDB."""
        check_unused(directory)
        cache_mib, write_buffers_mib = (max(mib // states, _SHARE_MIB_MIN) for mib in (_CACHE_MIB, _WRITE_BUFFERS_MIB))
        self._store = PartitionStore(directory, Memory(cache_mib, write_buffers_mib))

    def load(self, user_ids: Iterable[str]) -> dict[str, User]:
        return self._store.load(user_ids)

    def save(self, users: Iterable[User]) -> None:
        self._store.write([change_of(user) for user in users], Meta())

    def due(self, until_ms: int, users_max: int) -> list[str]:
        return self._store.due(until_ms, users_max)

    def users(self) -> Iterator[User]:
        return self._store.users()

    def close(self) -> None:
        self._store.close()


def state_of_shard(directory: Path | None, shards: int, shard: int) -> State:
    """The state of one of the shards of a replay, in a folder of its own below `directory`; None: in memory."""
    return MemoryState() if directory is None else RocksState(directory / f'shard-{shard}', shards)


def check_unused(directory: Path) -> None:
    """Errors: UsageError if the directory exists and is not empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f'The state directory {directory} is not a folder, or it is not empty.',
                         'name a new folder: a replay starts without history.')


def load_silent(state: State, clock_ms: int, users_max: int, active: Collection[str]) -> list[User]:
    """Users with a timer due by `clock_ms`, except the `active` ones: the first `users_max` by due time, then id."""
    due = state.due(clock_ms, users_max + len(active))
    return list(state.load(islice((user_id for user_id in due if user_id not in active), users_max)).values())
