"""What Faust knows of the users' state: a table with a changelog, the store `users://`, and when partitions move.

Faust's assignor hands the table's partitions out together with the inputs', standby copies included. Reading changelogs
back is ours: Faust's recovery shares the group's consumer, loses blocks while it seeks, and logs what should stop it.
"""
from collections.abc import Iterable, Iterator
from typing import Any

from faust.stores.base import Store
from faust.tables.manager import TableManager as FaustTableManager
from faust.types import TP, AppT, CollectionT

from stream.core.user import User
from stream.engine.transport import runtime
from stream.state.store import Memory, PartitionStore

TABLE = 'users'


class UserStore(Store):
    """Registered as `users` among Faust's stores: one database per partition, all within one bound of memory.

    As a mapping it is read only: records are written by the lanes, step by step.
    """

    def __init__(self, url: Any, app: AppT, table: CollectionT, **kwargs: Any) -> None:
        super().__init__(url, app, table, **kwargs)
        settings = runtime(app).settings
        self._directory = settings.state_dir
        self._memory = Memory(settings.rocksdb_cache_mib, settings.rocksdb_write_buffers_mib)
        self._open: dict[int, PartitionStore] = {}

    def take(self, partition: int) -> PartitionStore:
        """The partition's database, opened if it is not yet."""
        store = self._open.get(partition)
        if store is None:
            store = self._open[partition] = PartitionStore(self._directory / f'users-{partition}', self._memory)
            if store.set_aside is not None:
                self.log.error('%s was damaged and is set aside as %s; its changelog fills it again.',
                               store.directory, store.set_aside.name)
        return store

    def release(self, partition: int) -> None:
        """Close the partition's database."""
        store = self._open.pop(partition, None)
        if store is not None:
            store.close()

    def open_partitions(self) -> list[int]:
        """Partitions whose databases are open."""
        return sorted(self._open)

    def persisted_offset(self, tp: TP) -> int | None:
        store = self._open.get(tp.partition)
        return store.meta.changelog - 1 if store is not None else None

    def apply_changelog_batch(self, batch: Iterable[Any], to_key: Any, to_value: Any) -> None:
        raise NotImplementedError('changelogs are read by `stream.engine.changelog`')

    def reset_state(self) -> None:
        """Nothing is kept beside the databases."""

    async def backup_partition(self, tp: Any, flush: bool = True, purge: bool = False, keep: int = 1) -> None:
        raise NotImplementedError('the changelog is the backup')

    def restore_backup(self, tp: Any, latest: bool = True, backup_id: int = 0) -> None:
        raise NotImplementedError('the changelog is the backup')

    def __getitem__(self, key: str) -> User:
        for store in self._open.values():
            user = store.load([key])[key]
            if user.applied or user.late:
                return user
        raise KeyError(key)

    def __setitem__(self, key: str, value: User) -> None:
        raise TypeError('users are written by the lanes')

    def __delitem__(self, key: str) -> None:
        raise TypeError('users are written by the lanes')

    def __iter__(self) -> Iterator[str]:
        return (user.user_id for store in self._open.values() for user in store.users())

    def __len__(self) -> int:
        return sum(store.meta.users for store in self._open.values())


class TableManager(FaustTableManager):
    """Tells the lanes which partitions are theirs, and lets the fetches go on at once: lanes wait by themselves."""

    async def on_start(self) -> None:
        self._tables_finalized.set()
        for table in self.values():
            await table.maybe_start()
        self._tables_registered.set()

    async def on_stop(self) -> None:
        await self.app._fetcher.stop()      # type: ignore[attr-defined]
        for table in self.values():
            await table.stop()

    def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """The lanes are drained by the consumer."""

    async def on_rebalance(self, assigned: set[TP], revoked: set[TP], newly_assigned: set[TP],
                           generation_id: int = 0) -> None:
        app: Any = self.app
        self._recovery_started.set()
        clicks = runtime(app).settings.clicks_topic
        active = {tp.partition for tp in assigned if tp.topic == clicks}
        standby = {tp.partition for tp in app.assignor.assigned_standbys() if tp.topic == clicks}
        await runtime(app).owner.assign(active, standby, generation_id)
        app.consumer.resume_partitions(assigned)
        app.flow_control.resume()
        app.consumer.resume_flow()
        await app._fetcher.maybe_start()
        self.on_actives_ready()
        self.on_standbys_ready()

    async def wait_until_recovery_completed(self) -> bool:
        return False
