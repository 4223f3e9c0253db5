"""The worker on a real broker: what goes in comes out, nothing is lost, whatever happens to it."""
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.local.parts import Kafka
from stream.cli.main import app
from stream.core.layout import DAY_MS
from stream.core.user import User
from stream.simulator.shop import SimulatorOptions, simulate, write
from stream.state.store import Memory, PartitionStore
from tests.integration.running import Shop, wait_for

NOW_MS = 1_770_000_000_000


@pytest.fixture(scope='module')
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated shoppers without noise, so that live and replayed windows are comparable."""
    path = tmp_path_factory.mktemp('recording') / 'events.jsonl'
    write(simulate(SimulatorOptions(shoppers=120, days=60, seed=5)), path, path.with_suffix('.truth.jsonl'))
    return path


def event(number: int, user: str, ts_ms: int, kind: str = 'view', **more: Any) -> dict[str, Any]:
    return {'event_id': f'{user}-{number}', 'user_id': user, 'ts': ts_ms, 'type': kind} | more


def facts(user: User) -> tuple[Any, ...]:
    """What events alone decide: neither offsets nor steps nor timers nor scores."""
    return (bytes(user.ids), bytes(user.rows), bytes(user.days), user.applied, user.duplicate, user.late, user.counts,
            user.first_seen_ms, user.last_seen_ms, user.spend, user.refunds, user.orders, user.gaps)


def replayed(recording: Path, folder: Path) -> dict[str, User]:
    result = CliRunner().invoke(app, ['replay', str(recording), '--out', str(folder / 'alerts.jsonl'), '--no-report',
                                      '--scorer', 'constant', '--state-dir', str(folder / 'replayed')])
    assert result.exit_code == 0, result.output
    store = PartitionStore(folder / 'replayed', Memory(16, 16))
    users = {user.user_id: user for user in store.users()}
    store.close()
    return users


@pytest.mark.parametrize('noise', [0.0, 0.02], ids=['clean', 'repeats, late and broken rows'])
def test_live_and_replay_agree_user_by_user(kafka: Kafka, tmp_path: Path, noise: float):
    recording = tmp_path / 'events.jsonl'
    write(simulate(SimulatorOptions(shoppers=120, days=60, seed=6, noise=noise)), recording,
          recording.with_suffix('.truth.jsonl'))
    with Shop(kafka.brokers, f'agree-{bool(noise)}'.lower(), tmp_path) as shop:
        shop.make_topics()
        worker = shop.worker()
        flags = [flag for name, value in shop.settings.items() for flag in ('--set', f'{name}={value}')]
        published = CliRunner().invoke(app, ['publish', str(recording), '--json', *flags])
        assert published.exit_code == 0, published.output
        shop.wait_done()
        assert worker.metric('stream_events_read_total') == recording.read_bytes().count(b'\n')
        assert (worker.metric('stream_dead_letters_total') > 0) == bool(noise)
        assert worker.stop() == 0
        live, from_file = shop.users(), replayed(recording, tmp_path)
        assert live.keys() == from_file.keys()
        assert [user_id for user_id in live if facts(live[user_id]) != facts(from_file[user_id])] == []
        messages = shop.alerts()
        assert len(messages) > 100
        assert Counter(message['id'] for message in messages).most_common(1)[0][1] == 1


def test_what_cannot_be_read_becomes_a_dead_letter_as_it_came(kafka: Kafka, tmp_path: Path):
    with Shop(kafka.brokers, 'poison', tmp_path) as shop:
        shop.make_topics()
        clicks, carts = shop.inputs
        good = json.dumps(event(1, 'u1', NOW_MS)).encode()
        poison = [(b'u1', b'{"broken'), (b'u1', b'\xff\xfe'), (b'u1', None), (b'u1', b''), (None, good), (b'u2', good),
                  (b'u1', json.dumps(event(2, 'u1', NOW_MS + DAY_MS)).encode())]
        for key, value in poison:
            shop.send(clicks, key, value, 0, NOW_MS, [('trace', b'7'), ('Faust-Ag-ReplyTo', b'elsewhere')])
        home = 0 if good_partition('u1', 2) == 0 else 1
        shop.send(carts, b'u1', good, 1 - home, NOW_MS)      # a key where the partitioner would not put it
        shop.send(carts, b'u1', good, home, NOW_MS)
        worker = shop.worker()
        shop.wait_done()
        letters = shop.read(shop.settings['dead_letters_topic'])
        reasons = Counter(dict(letter.headers)['stream_reason'].decode() for letter in letters)
        assert reasons == {'invalid_json': 1, 'invalid_utf8': 1, 'null_value': 1, 'empty_value': 1, 'null_key': 1,
                           'key_mismatch': 1, 'ts_ahead_of_clock': 1, 'misrouted': 1}
        first = next(letter for letter in letters if letter.key == f'{clicks}-0-0'.encode())
        assert first.value == b'{"broken'
        assert dict(first.headers)['trace'] == b'7'
        assert dict(first.headers)['stream_offset'] == b'0'
        assert dict(first.headers)['stream_key'] == b'u1'
        assert 'elsewhere' not in shop.topics()      # headers that Faust would obey steer nothing
        assert worker.stop() == 0
        assert shop.users()['u1'].applied == 1


def good_partition(user_id: str, partitions: int) -> int:
    from stream.core.partitioners import partition
    return partition('murmur2', user_id.encode(), partitions)


@pytest.mark.parametrize('emptied', [False, True], ids=['same directory', 'emptied directory'])
def test_killed_and_started_again_it_is_as_if_nothing_had_been(kafka: Kafka, recording: Path, tmp_path: Path,
                                                               emptied: bool):
    with Shop(kafka.brokers, f'killed-{emptied}'.lower(), tmp_path) as shop:
        shop.make_topics()
        lines = recording.read_bytes().splitlines()
        worker = shop.worker()
        for part in range(3):
            shop.publish(lines[part * len(lines) // 3:(part + 1) * len(lines) // 3])
            wait_for(lambda running=worker: running.metric('stream_steps_total') > 5, 'some steps')
            worker.kill()
            if emptied:
                os.rename(shop.settings['state_dir'], tmp_path / f'taken-{part}')
            worker = shop.worker()
        shop.wait_done()
        assert worker.stop() == 0
        live, from_file = shop.users(), replayed(recording, tmp_path)
        assert [user_id for user_id in from_file if facts(live[user_id]) != facts(from_file[user_id])] == []
        by_id: dict[str, set[bytes]] = {}
        for record in shop.read(shop.settings['alerts_topic']):
            by_id.setdefault(json.loads(record.value)['id'], set()).add(record.value)
        assert all(len(values) == 1 for values in by_id.values())
        published = Counter(json.loads(next(iter(values)))['user_id'] for values in by_id.values())
        assert {user_id: user.decisions for user_id, user in live.items() if user.decisions} == published


def test_a_second_worker_joins_and_leaves_and_nothing_is_lost(kafka: Kafka, recording: Path, tmp_path: Path):
    with Shop(kafka.brokers, 'joined', tmp_path) as shop:
        shop.make_topics()
        lines = recording.read_bytes().splitlines()
        first = shop.worker()
        shop.publish(lines[:len(lines) // 2])
        second = shop.worker(state_dir=str(tmp_path / 'second'))
        wait_for(lambda: len(first.get('/status')['lanes']) == 1 and len(second.get('/status')['lanes']) == 1,
                 'a partition each')
        shop.publish(lines[len(lines) // 2:])
        shop.wait_done()
        assert second.stop() == 0
        wait_for(lambda: len(first.get('/status')['lanes']) == 2 and first.get('/ready')['ready'], 'both partitions')
        assert first.stop() == 0
        ids = Counter(alert['id'] for alert in shop.alerts())
        assert ids.most_common(1)[0][1] == 1        # who leaves says that nothing is left to send
        live, from_file = shop.users(), replayed(recording, tmp_path)
        assert [user_id for user_id in from_file if facts(live[user_id]) != facts(from_file[user_id])] == []


def test_a_standby_has_the_state_ready_and_takes_over(kafka: Kafka, recording: Path, tmp_path: Path):
    with Shop(kafka.brokers, 'standby', tmp_path, standbys=1) as shop:
        shop.make_topics()
        lines = recording.read_bytes().splitlines()
        first, second = shop.worker(), shop.worker(state_dir=str(tmp_path / 'second'))
        wait_for(lambda: sorted(lane['state'] for lane in second.get('/status')['lanes']) == ['running', 'standby'],
                 'one partition owned, one copied')
        shop.publish(lines)
        shop.wait_done()
        wait_for(lambda: first.metric('stream_standby_lag_records') == second.metric('stream_standby_lag_records') == 0,
                 'copies that are up to date')
        first.kill()
        wait_for(lambda: second.get('/ready')['ready'] and len(second.get('/status')['lanes']) == 2, 'a takeover')
        late = event(1, 'somebody', max(json.loads(line)['ts'] for line in lines) + 40 * DAY_MS)
        shop.publish([late])        # moves the clock: what the copy's index of timers holds fires
        wait_for(lambda: second.metric('stream_timers_fired_total') > 50, 'timers of the copied partition')
        assert second.stop() == 0
        live, from_file = shop.users(tmp_path / 'second'), replayed(recording, tmp_path)
        assert [user_id for user_id in from_file if facts(live[user_id]) != facts(from_file[user_id])] == []


@pytest.mark.parametrize('silent_days', [0, 3], ids=['everybody came', 'somebody did not'])
def test_an_outage_of_two_days_makes_nobody_a_churner(kafka: Kafka, tmp_path: Path, silent_days: int):
    """The events of the outage wait in the backlog; in them everybody came every day, so that nobody was silent."""
    users = [f'u{number}' for number in range(20)]
    now_ms = int(time.time() * 1000)
    start_ms = now_ms - 20 * DAY_MS

    def day(number: int) -> list[dict[str, Any]]:
        coming = users if number < 20 - silent_days else users[1:]
        return [event(number, user, start_ms + number * DAY_MS + index, 'purchase', price=9.0, order_id=f'o{number}')
                for index, user in enumerate(coming)]

    with Shop(kafka.brokers, f'outage-{silent_days}', tmp_path, clock='wall', clock_grace_ms=1000,
              silence_days=[2]) as shop:
        shop.make_topics()
        worker = shop.worker()
        for number in range(15):
            shop.publish(day(number))
        shop.wait_done()
        assert worker.metric('stream_timers_fired_total') == 0      # the newest event is days old: no time of day
        assert worker.stop() == 0
        for number in range(15, 20):        # five days, more than the two of silence that count
            shop.publish(day(number))
        shop.publish([event(99, users[1], now_ms), event(99, users[2], now_ms)])
        worker = shop.worker()
        shop.wait_done()
        if silent_days:
            wait_for(lambda: worker.metric('stream_timers_fired_total') == 1, 'the timer of the one that stayed away')
        assert worker.metric('stream_timers_fired_total') == (1 if silent_days else 0)
        assert worker.stop() == 0
