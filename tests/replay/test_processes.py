"""Shards in processes of their own: the same bytes, and no process is left behind, however a replay ends."""
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from stream.core.rules import ReplayRules
from stream.core.scorer import Scorer
from stream.errors import ModelError, StreamError, UsageError
from stream.replay.processes import ShardProcesses
from stream.replay.shard import ShardRecipe
from stream.replay.shard_messages import Share
from stream.replay.sharded import ShardedReplay
from stream.simulator.shop import SimulatorOptions, simulate, write
from stream.state.replay_state import MemoryState, state_of_shard
from tests.replay.moody import BrokenScorer, MissingScorer, MoodyScorer
from tests.replay.test_sharded import left, recording_of, whole

RULES = ReplayRules(publish='all')
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('simulated') / 'events.jsonl'
    write(simulate(SimulatorOptions(shoppers=30, days=60, seed=5, noise=0.02)), path, path.with_suffix('.truth.jsonl'))
    return path


def recipe(scorer: Callable[[], Scorer] = MoodyScorer, state_dir: Path | None = None, count: int = 2) -> ShardRecipe:
    return ShardRecipe(scorer, partial(state_of_shard, state_dir, count), RULES, None)


def replayed(path: Path, shards: ShardProcesses) -> tuple:
    outputs, letters = io.BytesIO(), io.BytesIO()
    run = ShardedReplay(recording_of([path]), shards, RULES, outputs, letters)
    run.run()
    return left(run, outputs, letters)


def is_running(pid: int | None) -> bool:
    assert pid is not None
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def blocks_sigint(pid: int) -> bool:
    blocked = Path(f'/proc/{pid}/status').read_text().partition('SigBlk:')[2].split()[0]
    return bool(int(blocked, 16) >> signal.SIGINT - 1 & 1)


def test_processes_give_the_bytes_of_one(simulated: Path, tmp_path: Path):
    expected = whole(recording_of([simulated]), RULES)
    for count, state_dir in ((2, None), (3, tmp_path / 'state')):
        with ShardProcesses(count, recipe(state_dir=state_dir, count=count)) as shards:
            assert replayed(simulated, shards) == expected
        assert not any(map(is_running, shards.pids))
    assert sorted(path.name for path in (tmp_path / 'state').iterdir()) == ['shard-0', 'shard-1', 'shard-2']


class SlowToClose(MemoryState):
    """The state of a shard that has much to count at the end."""

    def close(self) -> None:
        time.sleep(2)


def slow_if_last(shard: int) -> MemoryState:
    return SlowToClose() if shard else MemoryState()


def test_a_process_that_is_done_early_does_not_end_the_replay(simulated: Path):
    with ShardProcesses(2, ShardRecipe(MoodyScorer, slow_if_last, RULES, None)) as shards:
        assert replayed(simulated, shards) == whole(recording_of([simulated]), RULES)


def test_a_killed_process_ends_the_replay(simulated: Path):
    with pytest.raises(StreamError, match=r'Process 2 of the 2 .* SIGKILL.*Do: '), \
            ShardProcesses(2, recipe()) as shards:
        os.kill(shards.pids[1] or 0, signal.SIGKILL)
        replayed(simulated, shards)
    assert not any(map(is_running, shards.pids))


def test_the_error_of_a_shard_is_the_error_of_the_replay(simulated: Path):
    with pytest.raises(ModelError, match=r'The model is missing. Do: find it.'), \
            ShardProcesses(2, recipe(MissingScorer)) as shards:
        replayed(simulated, shards)
    assert not any(map(is_running, shards.pids))


def test_a_defect_of_a_shard_comes_with_its_traceback(simulated: Path):
    with pytest.raises(RuntimeError, match='ZeroDivisionError: a defect'), \
            ShardProcesses(2, recipe(BrokenScorer)) as shards:
        replayed(simulated, shards)


def test_a_shard_that_cannot_be_made_says_why(tmp_path: Path):
    (tmp_path / 'shard-1').mkdir()
    (tmp_path / 'shard-1' / 'file').write_text('x')
    with pytest.raises(UsageError, match='not empty'), ShardProcesses(2, recipe(state_dir=tmp_path)) as shards:
        shards.receive()


def test_a_recipe_that_cannot_be_sent_leaves_no_process():
    with pytest.raises(AttributeError), ShardProcesses(2, recipe(lambda: MoodyScorer())):
        pass
    assert not multiprocessing.active_children()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_replay(tmp_path: Path, number: signal.Signals):
    script = tmp_path / 'replay.py'
    script.write_text(f'''
import signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.replay.test_processes import recipe
from stream.replay.processes import ShardProcesses
from stream.replay.shard_messages import Share
if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell ignores it in what it starts in the background
    with ShardProcesses(2, recipe()) as shards:
        for shard in range(2):
            shards.send(shard, Share(1, 0))
        for _ in range(2):
            shards.receive()
        print(*shards.pids, flush=True)
        time.sleep(100)
''')
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          start_new_session=True) as process:
        assert process.stdout
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert all(map(is_running, pids))
        assert len(pids) == 2
        blocking = list(map(blocks_sigint, pids))
        if number == signal.SIGINT:
            os.killpg(process.pid, number)      # as a terminal does
        else:
            process.send_signal(number)
        process.wait(60)
    assert all(blocking)        # a terminal interrupts the replay only
    deadline = time.monotonic() + 30
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_large_order_and_a_large_reply_do_not_block_each_other():
    with ShardProcesses(1, recipe(count=1)) as shards:
        for run in range(8):
            shards.send(0, Share(run, 0, [b'{"event_id":"%d","user_id":"u%d","ts":1700000000000,"type":"view"}' % (n, n)
                                          for n in range(3_000)], list(range(3_000)), list(range(3_000))))
        for _ in range(8):
            shards.receive()
