"""Both states keep one contract."""
import inspect
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.core.user import User
from stream.errors import UsageError
from stream.state.replay_state import MemoryState, RocksState, State

FIELDS = [name for name, kind in vars(User).items() if inspect.isgetsetdescriptor(kind)]


@pytest.fixture(params=['memory', 'rocksdb'])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[State]:
    made = MemoryState() if request.param == 'memory' else RocksState(tmp_path / 'state')
    yield made
    made.close()


def save(state: State, **due_ms: int) -> None:
    """Set the timers of these users."""
    users = state.load(due_ms)
    for user_id, user in users.items():
        user.due_ms = due_ms[user_id]
        user.applied += 1
    state.save(users.values())


def test_what_is_saved_is_loaded(state: State):
    fresh = state.load(['a', 'b'])
    assert [user.applied for user in fresh.values()] == [0, 0]
    assert list(state.users()) == []
    save(state, a=0, ü=0)
    save(state, a=0)
    loaded = state.load(['ü', 'zz', 'a'])
    assert [(user_id, user.user_id, user.applied) for user_id, user in loaded.items()] == [
        ('ü', 'ü', 1), ('zz', 'zz', 0), ('a', 'a', 2)]
    assert sorted((user.user_id, user.applied) for user in state.users()) == [('a', 2), ('ü', 1)]
    assert state.load([]) == {}


def test_everything_of_a_user_is_kept(state: State):
    user = User('a')
    user.outbox, user.rows, user.ids, user.alerting, user.tier = b'xyz', bytearray(24), bytearray(8), 3, 2
    user.spend, user.next_offset, user.decision_id = 1.5, [7, 9], bytes(range(16))
    state.save([user])
    loaded = state.load(['a'])['a']
    assert all(getattr(loaded, name) == getattr(user, name) for name in FIELDS)


def test_due_users_come_by_time_then_id_and_asking_changes_nothing(state: State):
    save(state, c=20, b=10, a=20, d=21, e=0)
    for _ in range(2):
        assert state.due(9, 10) == []
        assert state.due(20, 10) == ['b', 'a', 'c']
        assert state.due(99, 2) == ['b', 'a']


def test_a_timer_can_move_later_earlier_and_away(state: State):
    save(state, a=10)
    save(state, a=30)
    assert state.due(29, 10) == []
    save(state, a=5)
    assert state.due(5, 10) == ['a']
    save(state, a=0)
    assert state.due(99, 10) == []
    save(state, a=40)
    assert state.due(99, 10) == ['a']


def test_a_timer_that_moved_back_and_forth_is_due_once(state: State):
    for due_ms in (10, 5, 10):
        save(state, a=due_ms)
    save(state, b=11)
    assert state.due(100, 2) == ['a', 'b']


@pytest.mark.parametrize('seed', range(5))
def test_timers_agree_with_a_plain_dictionary(state: State, seed: int):
    chance, due = random.Random(seed), {}
    for _ in range(300):
        user, moved = f'u{chance.randrange(8)}', chance.choice([0, chance.randrange(1, 60)])
        save(state, **{user: moved})
        due[user] = moved
        if chance.random() < 0.5:
            continue        # timers move more than once between two sweeps
        until, most = chance.randrange(60), chance.randrange(1, 9)
        expected = sorted((at, name) for name, at in due.items() if 0 < at <= until)[:most]
        assert state.due(until, most) == [name for _, name in expected]


def test_a_used_directory_is_refused(tmp_path: Path):
    RocksState(tmp_path / 'state').close()
    with pytest.raises(UsageError, match='not empty'):
        RocksState(tmp_path / 'state')
