"""One partition's users in RocksDB: records, timers and changelog offset move together."""
from pathlib import Path

import msgspec
import pytest

from stream.core.user import Change, User, encode
from stream.errors import StateError
from stream.state.store import LANE_KEY, LaneRecord, Memory, Meta, PartitionStore


def user(user_id: str, due_ms: int = 0, step: int = 1, outbox: bytes = b'') -> User:
    made = User(user_id)
    made.due_ms, made.step, made.outbox, made.applied = due_ms, step, outbox, 1
    return made


def change(made: User, before_ms: int = 0) -> Change:
    return Change(made.user_id.encode(), encode(made), before_ms, made.due_ms, new=made.step == 1)


def test_what_is_written_is_there_after_reopening(store: PartitionStore, memory: Memory):
    store.write([change(user('u1', 500)), change(user('ü', 300))], Meta(7, LaneRecord(1, 4, [5, 6], [1, 2]), 1))
    store.close()
    again = PartitionStore(store.directory, memory)
    assert again.meta == Meta(7, LaneRecord(1, 4, [5, 6], [1, 2]), 1, [], 2)
    assert again.load(['ü', 'u1', 'new'])['u1'].due_ms == 500
    assert list(again.load(['new'])) == ['new']
    assert again.due(1_000, 10) == ['ü', 'u1']
    assert [found.user_id for found in again.users()] == ['u1', 'ü']
    again.close()


def test_timers_are_given_by_time_and_never_twice(store: PartitionStore):
    store.write([change(user(f'u{number}', 100 + number)) for number in range(5)], Meta(1))
    assert store.due(99, 10) == []
    assert store.none_due(99)
    assert store.due(102, 10) == ['u0', 'u1', 'u2']
    assert store.due(200, 2) == ['u0', 'u1']
    store.write([change(user('u0', 0), 100), change(user('u1', 300), 101)], Meta(2))
    assert store.due(200, 10) == ['u2', 'u3', 'u4']
    store.write([change(user('u9', 50))], Meta(3))
    assert not store.none_due(50)
    assert store.due(60, 10) == ['u9']
    assert store.due(1_000, 10) == ['u9', 'u2', 'u3', 'u4', 'u1']


def test_a_changelog_gives_the_same_database_as_the_writes(store: PartitionStore, tmp_path: Path, memory: Memory):
    first, second = user('u1', 100, 1), user('u2', 200, 1)
    later = user('u1', 400, 2)
    store.write([change(first), change(second)], Meta(3, LaneRecord(1, 1, [2, 0], [9, 0]), 1))
    store.write([change(later, 100)], Meta(5, LaneRecord(2, 1, [3, 0], [9, 0]), 2))
    copy = PartitionStore(tmp_path / 'users-1', memory)
    copy.apply([(b'u1', encode(first)), (b'u2', encode(second)),
                (LANE_KEY, msgspec.json.encode(LaneRecord(1, 1, [2, 0], [9, 0]))), (b'u1', encode(later)),
                (LANE_KEY, msgspec.json.encode(LaneRecord(2, 1, [3, 0], [9, 0])))], 5)
    assert [encode(found) for found in copy.users()] == [encode(found) for found in store.users()]
    assert copy.due(1_000, 10) == store.due(1_000, 10) == ['u2', 'u1']
    assert (copy.meta.changelog, copy.meta.lane) == (store.meta.changelog, store.meta.lane)
    assert copy.meta.users == store.meta.users == 2


def test_only_the_newest_step_of_a_changelog_may_be_unsent(store: PartitionStore):
    store.apply([(b'a', encode(user('a', step=4))), (b'b', encode(user('b', step=5)))], 2)
    assert (store.meta.newest, store.meta.unsent) == (5, ['b'])
    store.apply([(b'c', encode(user('c', step=5)))], 3)         # the same step, in another block
    assert store.meta.unsent == ['b', 'c']
    store.apply([(b'd', encode(user('d', step=6)))], 4)         # a step that was cut short
    assert (store.meta.newest, store.meta.unsent) == (6, ['d'])
    store.apply([(LANE_KEY, msgspec.json.encode(LaneRecord(6, sent=5)))], 5)    # step 6 is complete, maybe not sent
    assert store.meta.unsent == ['d']
    store.apply([(LANE_KEY, msgspec.json.encode(LaneRecord(6, sent=6)))], 6)    # the owner has signed off
    assert store.meta.unsent == []
    store.write([change(user('e', step=7))], Meta(7, store.meta.lane, 7, []))
    assert store.meta.unsent == []


def test_a_record_that_is_gone_from_the_changelog_is_gone_here(store: PartitionStore):
    store.apply([(b'a', encode(user('a', 100)))], 1)
    store.apply([(b'a', None)], 2)
    assert store.due(1_000, 10) == []
    assert store.load(['a'])['a'].applied == 0
    assert store.meta.users == 0


def test_a_directory_in_use_is_refused(store: PartitionStore, memory: Memory):
    with pytest.raises(StateError, match='another process'):
        PartitionStore(store.directory, memory)


def test_a_directory_that_cannot_be_opened_is_set_aside(store: PartitionStore, memory: Memory):
    store.write([change(user('u1'))], Meta(9))
    store.close()
    (store.directory / 'CURRENT').write_text('nonsense\n')
    again = PartitionStore(store.directory, memory)
    assert again.set_aside == store.directory.with_name('users-0.damaged')
    assert again.set_aside.is_dir()
    assert again.meta == Meta()
    again.close()


@pytest.mark.parametrize('back', [60, 300, 1200])
def test_a_flipped_byte_is_damage_whether_it_shows_at_opening_or_later(tmp_path: Path, memory: Memory, back: int):
    """RocksDB reports some of the damage as a mismatch of a `block`, which must not be mistaken for a held lock."""
    directory = tmp_path / 'blocks' / 'users-0'
    store = PartitionStore(directory, memory)
    store.write([change(user(f'u{number}')) for number in range(500)], Meta(500))
    store._db.flush()
    store.close()
    table = min(directory.glob('*.sst'))
    content = bytearray(table.read_bytes())
    content[-back] ^= 0xFF
    table.write_bytes(content)
    again = PartitionStore(directory, memory)
    if again.set_aside is None:
        try:
            again.load(['u1'])
        except StateError as error:
            assert 'start the worker again' in error.do
            again.close()
            again = PartitionStore(directory, memory)
            assert again.set_aside is not None
    again.close()


def test_what_is_wrong_with_the_machine_is_no_damage(tmp_path: Path, memory: Memory,
                                                     monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise Exception('IO error: No space left on device: While appending to file')
    monkeypatch.setattr(PartitionStore, '_open', full)
    with pytest.raises(StateError, match='cannot be opened'):
        PartitionStore(tmp_path / 'users-0', memory)
    assert list(tmp_path.iterdir()) == []


def test_write_buffers_are_bounded_over_all_partitions(tmp_path: Path):
    bounded = Memory(16, 16)
    stores = [PartitionStore(tmp_path / f'users-{number}', bounded) for number in range(4)]
    filler = user('u', outbox=bytes(20_000))
    largest = 0
    for turn in range(40):
        for store in stores:
            store.write([Change(f'u{turn}-{number}'.encode(), encode(filler), 0, 0) for number in range(25)],
                        Meta(turn))
            largest = max(largest, bounded.write_buffers.get_usage())
    assert 40 * 4 * 25 * 20_000 > 4 * (16 << 20)        # more than would fit
    assert largest < 2 * (16 << 20)
    for store in stores:
        store.close()


def test_a_full_disk_is_told_and_marks_no_damage(store: PartitionStore, monkeypatch: pytest.MonkeyPatch):
    class FullDisk:
        def write(self, batch: object) -> None:
            raise Exception('IO error: No space left on device: While appending to file')

    with monkeypatch.context() as patch:
        patch.setattr(store, '_db', FullDisk())
        with pytest.raises(StateError, match='cannot be read or written: IO error: No space left') as caught:
            store.write([change(user('u1'))], Meta())
    assert 'free space' in caught.value.do
    assert not (store.directory / 'DAMAGED').exists()
    store.write([change(user('u1'))], Meta())
    assert store.load(['u1'])['u1'].applied == 1
