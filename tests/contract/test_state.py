"""Both states keep one contract."""
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.errors import UsageError
from stream.replay.state import MemoryState, Put, RocksState, State


@pytest.fixture(params=['memory', 'rocksdb'])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[State]:
    made = MemoryState() if request.param == 'memory' else RocksState(tmp_path / 'state')
    yield made
    made.close()


def test_what_is_written_is_read(state: State):
    assert state.get_many(['a', 'b']) == [None, None]
    state.write([Put('a', b'1', 0, 0), Put('ü', b'', 0, 0)])
    state.write([Put('a', b'2', 0, 0)])
    assert state.get_many(['ü', 'zz', 'a']) == [b'', None, b'2']
    assert sorted(state.records()) == [('a', b'2'), ('ü', b'')]
    assert state.get_many([]) == []


def test_due_users_come_by_time_then_id_and_asking_changes_nothing(state: State):
    state.write([Put(name, b'', 0, due_ms) for name, due_ms in (('c', 20), ('b', 10), ('a', 20), ('d', 21), ('e', 0))])
    for _ in range(2):
        assert state.due(9, 10) == []
        assert state.due(20, 10) == ['b', 'a', 'c']
        assert state.due(99, 2) == ['b', 'a']


def test_a_timer_can_move_later_earlier_and_away(state: State):
    state.write([Put('a', b'', 0, 10)])
    state.write([Put('a', b'', 10, 30)])
    assert state.due(29, 10) == []
    state.write([Put('a', b'', 30, 5)])
    assert state.due(5, 10) == ['a']
    state.write([Put('a', b'', 5, 0)])
    assert state.due(99, 10) == []
    state.write([Put('a', b'', 0, 40)])
    assert state.due(99, 10) == ['a']


@pytest.mark.parametrize('seed', range(5))
def test_timers_agree_with_a_plain_dictionary(state: State, seed: int):
    chance, due = random.Random(seed), {}
    for _ in range(300):
        user = f'u{chance.randrange(8)}'
        moved = chance.choice([0, chance.randrange(1, 60)])
        state.write([Put(user, b'x', due.get(user, 0), moved)])
        due[user] = moved
        until, most = chance.randrange(60), chance.randrange(1, 9)
        expected = sorted((at, name) for name, at in due.items() if 0 < at <= until)[:most]
        assert state.due(until, most) == [name for _, name in expected]


def test_a_used_directory_is_refused(tmp_path: Path):
    RocksState(tmp_path / 'state').close()
    with pytest.raises(UsageError, match='not empty'):
        RocksState(tmp_path / 'state')
