"""The store of one partition's users: a RocksDB database with the users' records and an index of their timers.

    users-<partition>/      one database per partition
        default             user id in UTF-8 -> the user's record; META -> `Meta`
        due                 due time in ms, u64 big-endian, then the user id -> empty value

Every write is one atomic batch of records, index entries and the changelog offset that they correspond to, so the three
never disagree. Applying a changelog, on a recovering owner or on a standby, builds the same index.
All partitions of a worker share one cache and one set of write buffers, which limits their total memory.
"""
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rocksdict import BlockBasedOptions, Cache, DBCompressionType, Options, Rdict, WriteBatch, WriteBufferManager

from stream.core.layout import HEADER_DTYPE, NO_TIMER_MS
from stream.core.user import Change, User, decode
from stream.errors import StateError, StreamError

LANE_KEY = b'\xfflane'      # cannot be a user id: 0xff never occurs in UTF-8
_META = b'\xffmeta'
DAMAGED = 'DAMAGED'         # a file of this name marks a directory that was found damaged while in use
_USERS_END = b'\xff'
_DUE = struct.Struct('>Q')
_HEADER_FIELDS: Any = HEADER_DTYPE.fields
_DUE_AT: int = _HEADER_FIELDS['due_ms'][1]
_STEP_AT: int = _HEADER_FIELDS['step'][1]
_I64 = struct.Struct('<q')
_NEVER_MS = 1 << 62
_MIB = 1 << 20


class LaneRecord(msgspec.Struct):
    """A lane's progress. It is the last record of each step in the changelog.

    step        number of the step
    generation  generation of the lane's owner

    positions   the first fetch position not yet done, per source
    stream_ms   the newest event time seen, per source
    sent        the newest step whose messages are known to be sent
    """

    step: int = 0
    generation: int = 0
    positions: list[int] = msgspec.field(default_factory=lambda: [0, 0])
    stream_ms: list[int] = msgspec.field(default_factory=lambda: [0, 0])
    sent: int = 0


class Meta(msgspec.Struct):
    """The database's metadata.

    changelog   the first changelog offset that the database does not include
    lane        the lane's newest record
    newest      the newest step among the users' records
    unsent      users of that step, if their records came from the changelog: their messages may not have been sent
    users       number of users
    """

    changelog: int = 0
    lane: LaneRecord = msgspec.field(default_factory=LaneRecord)
    newest: int = 0
    unsent: list[str] = []
    users: int = 0


class Memory:
    """Cache and write buffers of all partitions of a worker."""

    def __init__(self, cache_mib: int, write_buffers_mib: int) -> None:
        self.cache = Cache(cache_mib * _MIB)
        self.write_buffers = WriteBufferManager(write_buffers_mib * _MIB, False)
        self.write_buffer_bytes = max(1, write_buffers_mib // 16) * _MIB

    def options(self) -> Options:
        """The options of one column family of one partition."""
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.create_missing_column_families(True)
        options.set_write_buffer_manager(self.write_buffers)
        options.set_write_buffer_size(self.write_buffer_bytes)
        options.set_max_write_buffer_number(2)
        options.set_max_open_files(256)
        options.set_keep_log_file_num(2)
        options.set_max_total_wal_size(16 * _MIB)
        # Save disk. Records are rewritten often. The newest level is rewritten soonest, so it gets the fast compression
        # and the levels below get the strong one. Small files and levels keep few old versions of a record.
        options.set_compression_per_level([DBCompressionType.lz4(), *[DBCompressionType.zstd()] * 6])
        options.set_compression_options(-14, 1, 0, 0)       # zstd's level 1
        options.set_level_zero_file_num_compaction_trigger(2)
        options.set_max_bytes_for_level_base(16 * _MIB)
        options.set_target_file_size_base(8 * _MIB)
        table = BlockBasedOptions()
        table.set_block_cache(self.cache)
        table.set_bloom_filter(10, False)
        # Keep indices and filters with their files, 3 MB for a million users. In the cache, the blocks of deleted files
        # would stay until it is full: memory grew by 5 MB per minute for half an hour.
        table.set_cache_index_and_filter_blocks(False)
        options.set_block_based_table_factory(table)
        return options


def _is_damage(text: str) -> bool:
    """Whether an error of RocksDB is about its files rather than about the machine."""
    return text.startswith('Corruption') or 'No such file' in text or 'checksum' in text


class PartitionStore:
    """One partition's users. One thread may read while another one writes. Neither may run during `close`."""

    def __init__(self, directory: Path, memory: Memory) -> None:
        """Open or create the database.

        A damaged database is renamed to `.damaged`. An empty one takes its place, to be restored from the changelog.
        Errors   StateError if another process holds the database, or the machine prevents opening it.
        """
        self.directory = directory
        self.set_aside: Path | None = None
        directory.parent.mkdir(parents=True, exist_ok=True)
        if (directory / DAMAGED).exists():
            self._set_aside()
        try:
            self._open(memory)
        except Exception as error:      # rocksdict raises plain Exception
            text = str(error).replace(str(directory), '')
            if '/LOCK:' in text:
                raise StateError(f'{directory} is in use by another process: {error}.',
                                 'stop the other worker, or give each worker its own state_dir.') from error
            if not _is_damage(text):
                raise StateError(f'{directory} cannot be opened: {error}.', 'check the disk, its free space, the '
                                 'permissions and the limit on open files; nothing was changed.') from error
            self._set_aside()
            self._open(memory)
        with self._marking_damage():
            stored: Any = self._db.get(_META)
        self.meta = msgspec.json.decode(stored, type=Meta) if stored else Meta()
        self._earliest_ms = 0           # a lower bound on the due times of all timers

    def _set_aside(self) -> None:
        self.set_aside = self.directory.with_name(self.directory.name + '.damaged')
        shutil.rmtree(self.set_aside, ignore_errors=True)
        self.directory.rename(self.set_aside)

    @contextmanager
    def _marking_damage(self) -> Iterator[None]:
        """Raise StateError if damage shows in use, and mark the directory, which the next start then sets aside.

        A full or failing disk is a StateError too, but no damage: the next start opens the directory as it is.
        """
        try:
            yield
        except Exception as error:      # rocksdict raises plain Exception
            text = str(error)
            if isinstance(error, StreamError):
                raise
            if not _is_damage(text):
                if not text.startswith('IO error'):
                    raise
                raise StateError(f'{self.directory} cannot be read or written: {text}.', 'check the disk, its free '
                                 'space, the permissions and the limit on open files, then start again: no events '
                                 'are lost.') from error
            (self.directory / DAMAGED).touch()
            raise StateError(f'{self.directory} is damaged: {error}.', 'start the worker again: it sets the directory '
                             'aside and restores the state from the changelog; check the disk.') from error

    def _open(self, memory: Memory) -> None:
        self._db = Rdict(str(self.directory), memory.options(), column_families={'due': memory.options()})
        self._due = self._db.get_column_family('due')
        self._due_handle = self._db.get_column_family_handle('due')

    def load(self, user_ids: Iterable[str]) -> dict[str, User]:
        """These users, in this order. An unknown user has no events. Errors: StateError if a record is damaged."""
        wanted = list(user_ids)
        with self._marking_damage():
            records: Any = self._db.get([user_id.encode() for user_id in wanted]) if wanted else []
        return {user_id: User(user_id) if record is None else decode(user_id, record)
                for user_id, record in zip(wanted, records, strict=True)}

    def write(self, changes: Sequence[Change], meta: Meta) -> None:
        """Make one step durable. Sets `meta.users` to the new number of users."""
        meta.users = self.meta.users + sum([change.new for change in changes])
        batch = WriteBatch(raw_mode=True)
        handle, earliest_ms = self._due_handle, self._earliest_ms
        for change in changes:
            batch.put(change.user_id, change.record)
            if change.due_before_ms != change.due_ms:
                if change.due_before_ms != NO_TIMER_MS:
                    batch.delete(_DUE.pack(change.due_before_ms) + change.user_id, handle)
                if change.due_ms != NO_TIMER_MS:
                    batch.put(_DUE.pack(change.due_ms) + change.user_id, b'', handle)
                    earliest_ms = min(earliest_ms, change.due_ms)
        batch.put(_META, msgspec.json.encode(meta))
        with self._marking_damage():
            self._db.write(batch)
        self.meta, self._earliest_ms = meta, earliest_ms

    def apply(self, records: Sequence[tuple[bytes, bytes | None]], next_offset: int) -> None:
        """Apply records of the partition's changelog, in order, up to `next_offset` (exclusive)."""
        newest: dict[bytes, bytes | None] = {}
        meta = Meta(next_offset, self.meta.lane, self.meta.newest, self.meta.unsent, self.meta.users)
        unsent = dict.fromkeys(meta.unsent)
        for key, record in records:
            if key == LANE_KEY:
                meta.lane = msgspec.json.decode(record or b'', type=LaneRecord)
                if meta.lane.sent >= meta.newest:
                    unsent = {}
                continue
            newest[key] = record
            if record is None:
                continue
            step = _I64.unpack_from(record, _STEP_AT)[0]
            if step > meta.newest:
                meta.newest, unsent = step, {}
            if step == meta.newest:
                unsent[key.decode()] = None
        meta.unsent = list(unsent)
        batch = WriteBatch(raw_mode=True)
        with self._marking_damage():
            stored: Any = self._db.get(list(newest)) if newest else []
        for (key, record), before in zip(newest.items(), stored, strict=True):
            due_before_ms = _I64.unpack_from(before, _DUE_AT)[0] if before is not None else NO_TIMER_MS
            due_ms = _I64.unpack_from(record, _DUE_AT)[0] if record is not None else NO_TIMER_MS
            if due_before_ms not in (NO_TIMER_MS, due_ms):
                batch.delete(_DUE.pack(due_before_ms) + key, self._due_handle)
            if due_ms not in (NO_TIMER_MS, due_before_ms):
                batch.put(_DUE.pack(due_ms) + key, b'', self._due_handle)
                self._earliest_ms = min(self._earliest_ms, due_ms)
            meta.users += (record is not None) - (before is not None)
            if record is None:
                batch.delete(key)
            else:
                batch.put(key, record)
        batch.put(_META, msgspec.json.encode(meta))
        with self._marking_damage():
            self._db.write(batch)
        self.meta = meta

    def none_due(self, until_ms: int) -> bool:
        """Whether no timer can be due. Answers without reading the index; false means that one may be due."""
        return until_ms < self._earliest_ms

    def due(self, until_ms: int, users_max: int) -> list[str]:
        """At most `users_max` users whose timer is due at or before `until_ms`, ordered by due time, then id."""
        if self.none_due(until_ms):
            return []
        ready: list[bytes] = []
        index: Any = self._due
        for key in index.keys(from_key=_DUE.pack(self._earliest_ms)):
            due_ms = _DUE.unpack_from(key)[0]
            if due_ms > until_ms or len(ready) == users_max:
                self._earliest_ms = due_ms if not ready else _DUE.unpack_from(ready[0])[0]
                break
            ready.append(key)
        else:
            self._earliest_ms = _DUE.unpack_from(ready[0])[0] if ready else _NEVER_MS
        return [key[_DUE.size:].decode() for key in ready]

    def users(self) -> Iterator[User]:
        """All users, ordered by id."""
        records: Any = self._db.items()
        for key, record in records:
            if key >= _USERS_END:
                return
            yield decode(key.decode(), record)

    def close(self) -> None:
        """Flush and release the directory."""
        self._due.close()
        self._db.close()
        del self._due_handle, self._due, self._db       # a remaining handle would keep the lock
