"""Files to topics and back on a real broker."""
import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete
from typer.testing import CliRunner, Result

from deploy.local.parts import Kafka
from stream.cli.main import app
from stream.config import Settings
from stream.core.rules import ReplayRules
from stream.core.user import User
from stream.errors import KafkaError, UsageError
from stream.kafka.clients import client_arguments, open_admin
from stream.kafka.topics import ensure_topics
from stream.replay.formats import kafka_format
from stream.replay.recording import Recording
from stream.replay.replay import Counts, Replay
from stream.replay.topic_records import Inputs, TopicRecord, decode_record
from stream.scoring.constant import ConstantScorer
from stream.simulator.shop import SimulatorOptions, simulate, write
from stream.state.replay_state import MemoryState
from tests.integration.running import wait_for
from tests.integration.test_topics_broker import existing, shop

STREAM = Path(sys.executable).with_name('stream')


def ready(kafka: Kafka, name: str, **values: Any) -> Settings:
    given = shop(kafka, name, **values)
    asyncio.run(ensure_topics(given))
    return given


def flags(given: Settings) -> list[str]:
    return [f'--set={name}={value}' for name, value in given.model_dump(exclude_defaults=True).items()]


def command(given: Settings, *arguments: str, expect: type[Exception] | None = None) -> Result:
    result = CliRunner().invoke(app, [*arguments, *flags(given)])
    assert isinstance(result.exception, expect) if expect else result.exit_code == 0, result.output
    return result


def records_of(path: Path) -> list[TopicRecord]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    found = [decode_record(line) for line in content.splitlines()]
    assert None not in found
    return found        # type: ignore[return-value]


@pytest.fixture(scope='module')
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated shoppers with every fault that the simulator knows."""
    path = tmp_path_factory.mktemp('recording') / 'events.jsonl'
    write(simulate(SimulatorOptions(shoppers=60, days=60, seed=3, noise=0.03)), path, path.with_suffix('.truth.jsonl'))
    return path


def replayed(recording: Recording) -> tuple[Counts, dict[str, tuple[Any, ...]]]:
    recording.scan()
    state = MemoryState()
    with open(os.devnull, 'wb') as nowhere:
        counts = asyncio.run(Replay(recording, state, ConstantScorer(), ReplayRules(), nowhere, nowhere).run())
    return counts, {user.user_id: facts(user) for user in state.users()}


def facts(user: User) -> tuple[Any, ...]:
    return (bytes(user.ids), bytes(user.rows), bytes(user.days), user.applied, user.duplicate, user.late, user.counts,
            user.first_seen_ms, user.last_seen_ms, user.spend, user.refunds, user.orders, user.gaps, user.gap_days)


def test_a_file_published_recorded_and_replayed_gives_what_the_file_gives(
    kafka: Kafka, recording: Path, tmp_path: Path,
):
    given = ready(kafka, 'publish-same')
    sent = json.loads(command(given, 'publish', str(recording), '--json').stdout)
    rows = recording.read_bytes().splitlines()
    assert sent['rows'] == len(rows) == sent['clicks'] + sent['carts'] + sent['no_events']
    assert sent['no_events'] > 10
    out = tmp_path / 'r.jsonl.gz'
    told = json.loads(command(given, 'record', '--out', str(out), '--json').stdout)
    assert told['records'] == {given.clicks_topic: sent['clicks'] + sent['no_events'],
                               given.carts_topic: sent['carts']}
    assert told['missing'] == 0
    kept = records_of(out)
    assert sorted(record.value or b'' for record in kept) == sorted(rows)
    for record in kept:
        assert record.partitions == 3
        if record.topic == given.carts_topic:
            event = json.loads(record.value or b'')
            assert ((record.key or b'').decode(), record.timestamp_ms) == (event['user_id'], event['ts'])

    counts, users = replayed(Recording([recording], 'events'))
    inputs = Inputs((given.clicks_topic, given.carts_topic), 'murmur2')
    again, same = replayed(Recording([out], kafka_format(inputs)))
    assert users == same
    assert [getattr(again, name) for name in ('read', 'applied', 'duplicate', 'late', 'dead')] == [
        getattr(counts, name) for name in ('read', 'applied', 'duplicate', 'late', 'dead')]
    assert counts.dead == sent['no_events']

    alerts = tmp_path / 'alerts.jsonl'
    command(given, 'replay', str(out), '--format', 'kafka', '--scorer', 'constant', '--no-report', '--out', str(alerts))
    letters = [json.loads(line) for line in alerts.with_suffix('.dead.jsonl').read_text().splitlines()]
    assert len(letters) == counts.dead
    assert {letter['topic'] for letter in letters} == {given.clicks_topic}


def test_a_recording_published_again_is_the_same_records(kafka: Kafka, recording: Path, tmp_path: Path):
    given = ready(kafka, 'publish-again')
    command(given, 'publish', str(recording), '--limit', '500')
    command(given, 'record', '--out', str(tmp_path / 'one.jsonl'))
    sent = json.loads(command(given, 'publish', str(tmp_path / 'one.jsonl'), '--format', 'kafka', '--json').stdout)
    assert sent['rows'] == 500
    # Only the second half: records from the offsets where the first one ended differ in nothing else.
    command(given, 'record', '--out', str(tmp_path / 'both.jsonl'))

    def content(records: list[TopicRecord]) -> list[tuple[Any, ...]]:
        return sorted((record.topic, record.partition, record.timestamp_ms, record.key or b'', record.value or b'')
                      for record in records)

    one, both = records_of(tmp_path / 'one.jsonl'), records_of(tmp_path / 'both.jsonl')
    ends = {(record.topic, record.partition): record.offset for record in one}
    second = [record for record in both if record.offset > ends.get((record.topic, record.partition), -1)]
    # A row without a key had no partition of its own.
    assert [entry for entry in content(second) if entry[3]] == [entry for entry in content(one) if entry[3]]
    assert len(second) == len(one)


def test_times_are_moved_so_that_the_newest_event_is_now(kafka: Kafka, recording: Path, tmp_path: Path):
    given = ready(kafka, 'publish-now')
    before_ms = time.time_ns() // 1_000_000
    sent = json.loads(command(given, 'publish', str(recording), '--shift-to-now', '--json').stdout)
    after_ms = time.time_ns() // 1_000_000
    assert before_ms <= sent['last_ms'] <= after_ms
    command(given, 'record', '--out', str(tmp_path / 'now.jsonl'))
    originals = {event['event_id']: event['ts'] for event in map(loaded, recording.read_bytes().splitlines()) if event}
    moved = [(event, record) for record in records_of(tmp_path / 'now.jsonl') if (event := loaded(record.value or b''))]
    assert len(moved) > 1000
    for event, record in moved:
        assert event['ts'] - originals[event['event_id']] == sent['shift_ms']
        assert record.timestamp_ms == event['ts']
    assert max(event['ts'] for event, _ in moved) == sent['last_ms']


def loaded(line: bytes) -> dict[str, Any] | None:
    """The event in a line that the worker would take."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if 'user_id' in event and event['ts'] > 10**11 and event.get('price') == event.get('price') else None


def test_a_rate_is_kept(kafka: Kafka, recording: Path):
    given = ready(kafka, 'publish-rate')
    sent = json.loads(command(given, 'publish', str(recording), '--rate', '400', '--limit', '400', '--json').stdout)
    assert sent['rows'] == 400
    assert sent['seconds'] >= 0.9


def test_a_topic_that_is_missing_is_an_error_and_stays_missing(kafka: Kafka, recording: Path, tmp_path: Path):
    given = shop(kafka, 'publish-missing')
    assert 'There is no topic' in str(command(given, 'publish', str(recording), expect=KafkaError).exception)
    out = tmp_path / 'r.jsonl'
    assert 'There is no topic' in str(command(given, 'record', '--out', str(out), expect=KafkaError).exception)
    assert list(tmp_path.iterdir()) == []
    assert existing(given) == []
    out.write_text('kept')
    command(given, 'record', '--out', str(out), expect=UsageError)
    assert out.read_text() == 'kept'


def test_aborted_and_deleted_records_hold_nothing_up(kafka: Kafka, tmp_path: Path):
    """The topic ends with a marker of an aborted transaction: no record will ever reach its end."""
    given = ready(kafka, 'record-gaps', partitions=1)

    async def fill() -> None:
        producer = AIOKafkaProducer(**client_arguments(given, 'test'), transactional_id='record-gaps')
        await producer.start()
        for value, commit in ((b'one', True), (b'lost', False), (b'two', True), (b'lost too', False)):
            await producer.begin_transaction()
            await producer.send_and_wait(given.clicks_topic, value, key=b'k', headers=[('h', b'\xff')])
            await (producer.commit_transaction() if commit else producer.abort_transaction())
        await producer.stop()

    asyncio.run(fill())
    told = json.loads(command(given, 'record', '--out', str(tmp_path / 'r.jsonl'), '--json').stdout)
    assert told['records'] == {given.clicks_topic: 2, given.carts_topic: 0}
    assert told['missing'] == 6         # four markers, two aborted records
    kept = records_of(tmp_path / 'r.jsonl')
    assert [(record.offset, record.value, list(record.headers)) for record in kept] == [
        (0, b'one', [('h', b'\xff')]), (4, b'two', [('h', b'\xff')])]

    async def shorten() -> None:
        async with open_admin(given) as admin:
            await admin.delete_records({TopicPartition(given.clicks_topic, 0): RecordsToDelete(before_offset=4)})

    asyncio.run(shorten())
    command(given, 'record', '--out', str(tmp_path / 'rest.jsonl'))
    assert [record.value for record in records_of(tmp_path / 'rest.jsonl')] == [b'two']


def test_a_recording_begins_at_an_offset_or_a_time(kafka: Kafka, recording: Path, tmp_path: Path):
    given = ready(kafka, 'record-from')
    command(given, 'publish', str(recording))
    command(given, 'record', '--out', str(tmp_path / 'all.jsonl'))
    everything = records_of(tmp_path / 'all.jsonl')
    command(given, 'record', '--from', '40', '--out', str(tmp_path / 'offset.jsonl'))
    assert {(record.topic, record.partition, record.offset) for record in records_of(tmp_path / 'offset.jsonl')} == {
        (record.topic, record.partition, record.offset) for record in everything if record.offset >= 40}
    command(given, 'record', given.carts_topic, '--from', '2025-02-01T00:00:00Z', '--out', str(tmp_path / 'time.jsonl'))
    since_ms = 1_738_368_000_000
    carts = [record for record in everything if record.topic == given.carts_topic]
    assert {(record.partition, record.offset) for record in records_of(tmp_path / 'time.jsonl')} == {
        (record.partition, record.offset) for record in carts if record.timestamp_ms >= since_ms}
    assert any(record.timestamp_ms < since_ms for record in carts)
    command(given, 'record', '--from', '2099-01-01T00:00:00Z', '--out', str(tmp_path / 'none.jsonl'))
    assert records_of(tmp_path / 'none.jsonl') == []


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_following_goes_on_until_it_is_stopped_and_the_file_is_whole(
    kafka: Kafka, recording: Path, tmp_path: Path, number: int,
):
    given = ready(kafka, f'record-follow-{number}')
    out, part = tmp_path / 'r.jsonl', tmp_path / 'r.jsonl.part'
    arguments = ['record', '--follow', '--out', str(out), *flags(given)]
    with subprocess.Popen([STREAM, *arguments], stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            assert process.stderr is not None
            assert 'until stopped' in process.stderr.readline()
            for _ in range(3):
                command(given, 'publish', str(recording))
            wait_for(lambda: part.exists() and part.stat().st_size > 1 << 20, 'a MiB of records')
            assert not out.exists()
            process.send_signal(number)
            _, told = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0, told
    assert not part.exists()
    offsets: dict[tuple[str, int], list[int]] = {}
    for record in records_of(out):
        offsets.setdefault((record.topic, record.partition), []).append(record.offset)
    assert sum(map(len, offsets.values())) > 2000
    assert all(found == list(range(len(found))) for found in offsets.values())
