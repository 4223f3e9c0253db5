"""The databases of one worker: one for each partition that it owns or stands by for. They share one memory limit."""
import logging
from collections.abc import Iterable
from pathlib import Path

from stream.state.store import Memory, PartitionStore

log = logging.getLogger(__name__)


class PartitionStores:
    """Opens and closes the databases in `directory`."""

    def __init__(self, directory: Path, memory: Memory) -> None:
        self._directory = directory
        self._memory = memory
        self._open: dict[int, PartitionStore] = {}

    def take(self, partition: int) -> PartitionStore:
        """The partition's database. Opens it if necessary."""
        store = self._open.get(partition)
        if store is None:
            store = self._open[partition] = PartitionStore(self._directory / f'users-{partition}', self._memory)
            if store.set_aside is not None:
                log.error('%s was damaged and is set aside as %s. It is restored from its changelog.',
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

    def open_stores(self) -> Iterable[PartitionStore]:
        """The open databases."""
        return self._open.values()
