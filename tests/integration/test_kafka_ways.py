"""Kafka's own ways: transactions, compaction, static members, holding, and state that does not fit its changelog."""
import asyncio
import json
import shutil
import time
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

from deploy.local.parts import Kafka, Triton
from stream.config import Settings
from stream.core.partitioners import partition
from stream.engine.consumer import BlockConsumer
from tests.integration.running import Shop, wait_for

NOW_MS = 1_770_000_000_000


def event(number: int, user: str, ts_ms: int = NOW_MS) -> dict[str, Any]:
    return {'event_id': f'{user}-{number}', 'user_id': user, 'ts': ts_ms + number, 'type': 'view'}


def events(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [event(number, f'u{number % 7}') for number in range(first, first + count)]


def test_aborted_transactions_are_never_folded_and_their_gaps_hang_nothing(kafka: Kafka, tmp_path: Path):
    async def transact(shop: Shop) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=shop.brokers, transactional_id='shop')
        await producer.start()
        try:
            for turn in range(6):
                await producer.begin_transaction()
                for item in events(10, turn * 10):
                    key = item['user_id'].encode()
                    await producer.send(shop.inputs[0], json.dumps(item).encode(), key=key, timestamp_ms=item['ts'],
                                        partition=partition('murmur2', key, shop.partitions))
                await (producer.abort_transaction() if turn % 2 else producer.commit_transaction())
        finally:
            await producer.stop()

    with Shop(kafka.brokers, 'transacted', tmp_path) as shop:
        shop.make_topics()
        worker = shop.worker()
        asyncio.run(transact(shop))         # the last one is aborted: nothing but a gap follows the last event
        shop.wait_done()
        assert worker.metric('stream_events_read_total') == 30
        shop.publish(events(5, 100))
        shop.wait_done()
        assert worker.metric('stream_events_read_total') == 35
        assert worker.stop() == 0
        assert sum(user.applied for user in shop.users().values()) == 35


def test_a_compacted_input_hangs_nothing(kafka: Kafka, tmp_path: Path):
    async def create(shop: Shop) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=shop.brokers)
        await admin.start()
        try:
            await admin.create_topics([NewTopic(shop.inputs[0], shop.partitions, 1, topic_configs={
                'cleanup.policy': 'compact', 'min.cleanable.dirty.ratio': '0.01', 'segment.ms': '100',
                'segment.bytes': '1048576', 'max.compaction.lag.ms': '100', 'delete.retention.ms': '0'})])
        finally:
            await admin.close()

    with Shop(kafka.brokers, 'compacted', tmp_path) as shop:
        asyncio.run(create(shop))
        shop.make_topics()
        sent = shop.publish(events(200))
        ts_ms = int(time.time() * 1000)

        def compacted() -> bool:        # a segment is rolled by a record that comes after its time
            nonlocal sent, ts_ms
            ts_ms += 1000
            sent += shop.publish([event(0, f'u{number}', ts_ms) for number in range(7)])
            return len(shop.read(shop.inputs[0])) < sent - 100
        wait_for(compacted, 'compaction of the input', 120)
        worker = shop.worker()
        shop.wait_done()
        left = worker.metric('stream_events_read_total')
        assert 0 < left < sent
        assert worker.metric('stream_reseeks_total') == 0
        assert worker.stop() == 0


def test_a_static_member_comes_back_without_a_rebalance(kafka: Kafka, tmp_path: Path):
    with Shop(kafka.brokers, 'static', tmp_path, instance_id='one', session_timeout_ms=30_000) as shop:
        shop.make_topics()
        shop.publish(events(50))
        worker = shop.worker()
        shop.wait_done()
        worker.kill()
        shop.publish(events(50, 50))
        started = time.monotonic()
        again = shop.worker()
        shop.wait_done(25)
        assert time.monotonic() - started < 25      # no waiting for the dead one's session
        assert again.stop() == 0
        assert sum(user.applied for user in shop.users().values()) == 100


def test_while_triton_is_away_the_worker_holds_and_stays_in_its_group(kafka: Kafka, tmp_path: Path):
    """Away for more than twice `max_poll_interval_ms`: nothing is lost, nobody rebalances, readiness says why."""
    with Triton(tmp_path / 'triton') as triton, Shop(
            kafka.brokers, 'held', tmp_path, scorer='triton', triton=triton.address, triton_timeout_ms=1000,
            max_poll_interval_ms=4000) as shop:
        shop.make_topics()
        worker = shop.worker()
        shop.publish(events(100))
        shop.wait_done()
        triton.kill()
        away_at = time.monotonic()
        shop.publish(events(500, 100))
        wait_for(lambda: 'events are held' in str(worker.get('/ready')['reasons']), 'a worker that holds')
        wait_for(lambda: time.monotonic() - away_at > 2.5 * 4, 'twice max_poll_interval')
        assert shop.lag() > 0
        assert worker.metric('stream_rebalances_total') == 1
        triton.restart()
        shop.wait_done()
        assert worker.metric('stream_rebalances_total') == 1
        assert worker.get('/ready')['ready']
        assert worker.stop() == 0
        assert sum(user.applied for user in shop.users().values()) == 600


def test_a_worker_that_holds_stops_at_once_and_loses_nothing(kafka: Kafka, tmp_path: Path):
    with Triton(tmp_path / 'triton') as triton, Shop(kafka.brokers, 'held-stop', tmp_path, scorer='triton',
                                                     triton=triton.address, triton_timeout_ms=1000) as shop:
        shop.make_topics()
        worker = shop.worker()
        triton.kill()
        shop.publish(events(100))
        wait_for(lambda: 'events are held' in str(worker.get('/ready')['reasons']), 'a worker that holds')
        started = time.monotonic()
        assert worker.stop() == 0
        assert time.monotonic() - started < 10
        triton.restart()
        worker = shop.worker()
        shop.wait_done()
        assert worker.stop() == 0
        assert sum(user.applied for user in shop.users().values()) == 100


def test_state_of_another_changelog_is_refused(kafka: Kafka, tmp_path: Path):
    with Shop(kafka.brokers, 'ahead', tmp_path) as shop:
        shop.make_topics()
        shop.publish(events(100))
        worker = shop.worker()
        shop.wait_done()
        assert worker.stop() == 0
        other = shop.settings | {'group': 'ahead-other'}        # its changelog is empty
        shop.settings = other
        worker = shop.worker(ready=False)
        assert worker.process.wait(60) == 4
        assert 'move' in worker.said().splitlines()[-1]
        worker.stopped = True


def test_a_damaged_directory_is_set_aside_and_filled_again(kafka: Kafka, tmp_path: Path):
    with Shop(kafka.brokers, 'damaged', tmp_path) as shop:
        shop.make_topics()
        shop.publish(events(100))
        worker = shop.worker()
        shop.wait_done()
        assert worker.stop() == 0
        before = {user_id: user.applied for user_id, user in shop.users().items()}
        for directory in Path(shop.settings['state_dir']).glob('users-*'):
            (directory / 'CURRENT').write_text('nonsense\n')
        worker = shop.worker()
        assert 'set aside' in worker.said()
        assert worker.stop() == 0
        for directory in Path(shop.settings['state_dir']).glob('*.damaged'):
            shutil.rmtree(directory)
        assert {user_id: user.applied for user_id, user in shop.users().items()} == before


def test_two_workers_on_one_directory_are_told(kafka: Kafka, tmp_path: Path):
    with Shop(kafka.brokers, 'locked', tmp_path) as shop:
        shop.make_topics()
        shop.worker()
        second = shop.worker(ready=False)
        assert second.process.wait(60) == 4
        assert 'state_dir' in second.said().splitlines()[-1]
        second.stopped = True


def test_records_that_were_deleted_unread_are_told_with_their_number(kafka: Kafka, tmp_path: Path):
    async def delete(shop: Shop, before: int) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=shop.brokers)
        await admin.start()
        try:
            await admin.delete_records({TopicPartition(shop.inputs[0], 0): RecordsToDelete(before)})
        finally:
            await admin.close()

    with Shop(kafka.brokers, 'deleted', tmp_path, partitions=1) as shop:
        shop.make_topics()
        shop.publish(events(100))
        worker = shop.worker()
        shop.wait_done()
        assert worker.stop() == 0
        shop.publish(events(200, 100))
        asyncio.run(delete(shop, 230))
        worker = shop.worker()
        shop.wait_done()
        assert worker.metric('stream_events_lost_total') == 130
        assert '130 records' in worker.said()
        assert worker.metric('stream_events_read_total') == 70
        assert worker.stop() == 0


def test_a_partition_without_room_does_not_delay_the_others(kafka: Kafka, tmp_path: Path):
    """Each time that it has taken some of its records, more are fetched, and they wait in the client."""
    first, second = TopicPartition('crowded.clicks', 0), TopicPartition('crowded.clicks', 1)
    with Shop(kafka.brokers, 'crowded', tmp_path) as shop:
        shop.make_topics()

        async def delays() -> list[float]:
            consumer = BlockConsumer(Settings(brokers=shop.brokers, group='crowded-too'))
            producer = AIOKafkaProducer(bootstrap_servers=shop.brokers, linger_ms=5)
            await producer.start()
            await asyncio.gather(*[await producer.send(first.topic, b'x' * 1000, partition=0) for _ in range(20_000)])
            await consumer.start(RoundRobinPartitionAssignor)
            try:
                consumer.driver.assign([first, second])
                consumer.driver.seek(first, 0)
                consumer.driver.seek(second, 0)
                found = []
                for _ in range(15):
                    while not await consumer.driver.getmany(first, timeout_ms=200):
                        pass
                    await asyncio.sleep(.02)        # more of the first one are fetched
                    started = time.monotonic()
                    await producer.send_and_wait(second.topic, b'y', partition=1)
                    while not await consumer.driver.getmany(second, timeout_ms=200):
                        pass
                    found.append(time.monotonic() - started)
                return found
            finally:
                await consumer.driver.stop()
                await producer.stop()
        assert sorted(asyncio.run(delays()))[7] < .05
