"""The lean producer and the light fetcher on a real broker, beside aiokafka's own."""
import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import OffsetOutOfRangeError

from deploy.local.parts import Kafka
from stream.config import Settings
from stream.engine.publisher import Publisher
from stream.errors import KafkaError
from stream.kafka.batch import RecordBatch
from stream.kafka.clients import fetch_position
from stream.kafka.fetcher import LightFetcher


async def create(brokers: str, topic: str, partitions: int = 1, **config: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=brokers)
    await admin.start()
    try:
        answer: Any = await admin.create_topics([NewTopic(topic, partitions, 1, topic_configs=config)])
        assert answer.topic_errors[0][1] == 0, answer
    finally:
        await admin.close()


@asynccontextmanager
async def publishing(brokers: str, **settings: Any) -> AsyncIterator[Publisher]:
    publisher = Publisher(Settings(brokers=brokers, **settings))
    await publisher.start()
    try:
        yield publisher
    finally:
        await publisher.stop()


@asynccontextmanager
async def reading(brokers: str, *tps: TopicPartition, light: bool = False) -> AsyncIterator[AIOKafkaConsumer]:
    consumer = AIOKafkaConsumer(bootstrap_servers=brokers, isolation_level='read_committed', auto_offset_reset='none',
                                fetch_max_wait_ms=100)
    await consumer.start()
    try:
        if light:
            LightFetcher.adopt(consumer._fetcher)
        consumer.assign(tps)
        for tp in tps:
            consumer.seek(tp, 0)
        yield consumer
    finally:
        await consumer.stop()


async def read(brokers: str, *tps: TopicPartition, light: bool = False) -> dict[Any, list[Any]]:
    """All records up to the ends, with their offsets, keys, values, headers and timestamps."""
    found: dict[Any, list[Any]] = {tp: [] for tp in tps}
    async with reading(brokers, *tps, light=light) as consumer:
        ends = await consumer.end_offsets(tps)
        async with asyncio.timeout(30):
            while any((fetch_position(consumer, tp) or 0) < ends[tp] for tp in tps):
                for tp, records in (await consumer.getmany(timeout_ms=100)).items():
                    found[tp] += [(record.offset, record.key, record.value, tuple(record.headers), record.timestamp)
                                  for record in records]
    return found


def run(test: Awaitable[None]) -> None:
    async def go() -> None:
        async with asyncio.timeout(200):
            await test
    asyncio.run(go())


def test_the_same_batches_make_the_same_log_as_aiokafkas_producer(kafka: Kafka):
    async def test() -> None:
        tps = TopicPartition('same-ours', 0), TopicPartition('same-theirs', 0)
        for tp in tps:
            await create(kafka.brokers, tp.topic)
        batches = [[(b'%d' % number, None if number % 7 == 0 else bytes(number), [('a', b'b')] * (number % 3))
                    for number in range(first, first + 40)] for first in range(0, 400, 40)]
        async with publishing(kafka.brokers) as publisher:
            ours = [await publisher.send(tps[0].topic, 0, records) for records in batches]
        producer = AIOKafkaProducer(bootstrap_servers=kafka.brokers, enable_idempotence=True)
        await producer.start()
        theirs = []
        for records in batches:
            made: Any = RecordBatch(1 << 20, 0)
            made.add_records(records, 0)
            made.close()
            sent = await (await producer.send_batch(made, tps[1].topic, partition=0))
            theirs.append(sent.offset + len(records))
        await producer.stop()
        assert ours == theirs == [40 * (number + 1) for number in range(10)]
        for light in (False, True):
            found = await read(kafka.brokers, *tps, light=light)
            assert [record[:4] for record in found[tps[0]]] == [record[:4] for record in found[tps[1]]]
            assert len(found[tps[0]]) == 400
    run(test())


def test_order_is_kept_whatever_is_handed_over_at_once(kafka: Kafka):
    async def test() -> None:
        await create(kafka.brokers, 'ordered', 4)
        async with publishing(kafka.brokers) as publisher:
            sendings = []
            for number in range(400):
                sendings.append(await publisher.begin('ordered', number % 4, [(b'k', b'%d' % number, [])]))
                if number % 7 == 0:
                    await asyncio.sleep(0)
            large = await publisher.begin('ordered', 1, [(b'k', bytes(300_000), [])] * 10)      # several batches
            last = await publisher.begin('ordered', 1, [(b'k', b'last', [])])
            assert [await sending.end() for sending in sendings] == [number // 4 + 1 for number in range(400)]
            assert (await large.end(), await last.end()) == (110, 111)
        found = await read(kafka.brokers, *(TopicPartition('ordered', number) for number in range(4)))
        for tp, records in found.items():
            values = [record[2] for record in records if len(record[2]) < 9 and record[2] != b'last']
            assert values == [b'%d' % number for number in range(tp.partition, 400, 4)]
        assert found[TopicPartition('ordered', 1)][-1][2] == b'last'
    run(test())


@pytest.mark.parametrize('how', ['kill', 'stop', 'pause'])
def test_a_broker_that_goes_and_comes_back_loses_nothing_and_has_nothing_twice(tmp_path: Path, how: str):
    async def test(kafka: Kafka) -> None:
        await create(kafka.brokers, 'restarted', 3)
        count = 0

        async def send_all(publisher: Publisher, until: Callable[[], bool]) -> None:
            nonlocal count
            while not until():
                sendings = [await publisher.begin('restarted', number, [(b'k', b'%d' % count, [])] * 2)
                            for number in range(3)]
                count += 1
                ends = [await sending.end() for sending in sendings]
                assert ends == [2 * count] * 3      # and so each offset is right
        async with publishing(kafka.brokers, send_timeout_ms=60_000) as publisher:
            for _ in range(2):
                more = count + 30
                await send_all(publisher, lambda: count >= more)        # noqa: B023 - called at once
                back = asyncio.create_task(asyncio.to_thread(gone, kafka))
                await send_all(publisher, back.done)        # while it goes, is away, and comes back
                await back
        found = await read(kafka.brokers, *(TopicPartition('restarted', number) for number in range(3)))
        for records in found.values():
            assert [record[2] for record in records] == [b'%d' % number for number in range(count) for _ in range(2)]

    def gone(kafka: Kafka) -> None:
        if how == 'pause':
            kafka.pause()
            time.sleep(1)       # how long it is paused
            kafka.resume()
        else:
            (kafka.kill if how == 'kill' else kafka.stop)()
            kafka.start()

    with Kafka(tmp_path / 'kafka') as own:
        run(test(own))


def test_a_paused_broker_is_given_up_at_the_request_limit_and_gets_the_same_again(tmp_path: Path):
    async def test(kafka: Kafka) -> None:
        await create(kafka.brokers, 'paused')
        async with publishing(kafka.brokers, send_timeout_ms=12_000) as publisher:
            assert await publisher.send('paused', 0, [(b'k', b'0', [])]) == 1
            kafka.pause()
            try:
                sending = await publisher.begin('paused', 0, [(b'k', b'1', [])])
                producer: Any = publisher._producer
                async with asyncio.timeout(20):
                    while producer._places['paused', 0].queue[0].error is None:
                        await asyncio.sleep(0.05)
            finally:
                kafka.resume()
            assert await sending.end() == 2
        found = await read(kafka.brokers, TopicPartition('paused', 0))
        assert [record[2] for record in found[TopicPartition('paused', 0)]] == [b'0', b'1']

    with Kafka(tmp_path / 'kafka') as own:
        run(test(own))


def test_a_broker_that_stays_away_is_an_error_after_the_time_limit(tmp_path: Path):
    async def test(kafka: Kafka) -> None:
        await create(kafka.brokers, 'away')
        async with publishing(kafka.brokers, send_timeout_ms=2000) as publisher:
            await publisher.send('away', 0, [(b'k', b'0', [])])
            await asyncio.to_thread(kafka.kill)
            with pytest.raises(KafkaError, match=r'did not acknowledge records for away-0.*within 2 s'):
                await publisher.send('away', 0, [(b'k', b'1', [])])

    with Kafka(tmp_path / 'kafka') as own:
        run(test(own))


def test_a_record_that_is_too_large_says_what_to_do(kafka: Kafka):
    async def test() -> None:
        await create(kafka.brokers, 'small-records', 2, **{'max.message.bytes': '1000'})
        async with publishing(kafka.brokers) as publisher:
            assert await publisher.send('small-records', 0, [(b'k', b'0', [])]) == 1
            with pytest.raises(KafkaError, match=r'exceeds the size limit') as raised:
                await publisher.send('small-records', 0, [(b'k', bytes(2000), [])])
            assert 'max.message.bytes' in str(raised.value.do)
            with pytest.raises(KafkaError, match='exceeds the size limit'):
                await publisher.send('small-records', 0, [(b'k', b'1', [])])       # nothing follows a gap
            assert await publisher.send('small-records', 1, [(b'k', b'0', [])]) == 1
    run(test())


def test_an_unknown_topic_is_an_error_after_the_time_limit(kafka: Kafka):
    async def test() -> None:
        async with publishing(kafka.brokers, send_timeout_ms=1000) as publisher:
            with pytest.raises(KafkaError, match='UnknownTopicOrPartition'):
                await publisher.send('nobody-made-it', 0, [(b'k', b'0', [])])
    run(test())


def test_a_topic_that_is_deleted_is_an_error_after_the_time_limit(kafka: Kafka):
    async def test() -> None:
        await create(kafka.brokers, 'deleted')
        async with publishing(kafka.brokers, send_timeout_ms=1500) as publisher:
            await publisher.send('deleted', 0, [(b'k', b'0', [])])
            admin = AIOKafkaAdminClient(bootstrap_servers=kafka.brokers)
            await admin.start()
            await admin.delete_topics(['deleted'])
            await admin.close()
            with pytest.raises(KafkaError, match=r'within 1\.5 s'):
                async with asyncio.timeout(30):
                    while True:     # the broker may take a few more records before it deletes the topic
                        await publisher.send('deleted', 0, [(b'k', b'1', [])])
    run(test())


def test_stop_sends_what_is_queued(kafka: Kafka):
    async def test() -> None:
        await create(kafka.brokers, 'stopped')
        async with publishing(kafka.brokers) as publisher:
            sendings = [await publisher.begin('stopped', 0, [(b'k', b'%d' % number, [])]) for number in range(20)]
        assert [sending.offset() for sending in sendings] == list(range(1, 21))
    run(test())


def test_fetches_skip_aborted_records_and_end_at_the_same_place_as_aiokafkas(kafka: Kafka):
    async def test() -> None:
        tp = TopicPartition('transacted-fetch', 0)
        await create(kafka.brokers, tp.topic)
        producer = AIOKafkaProducer(bootstrap_servers=kafka.brokers, transactional_id='transacted-fetch')
        await producer.start()
        for turn in range(9):
            await producer.begin_transaction()
            for number in range(5):
                await producer.send(tp.topic, b'%d-%d' % (turn, number), partition=0)
            await (producer.abort_transaction() if turn % 2 else producer.commit_transaction())
        theirs = await read(kafka.brokers, tp)
        ours = await read(kafka.brokers, tp, light=True)
        assert ours == theirs
        assert len(ours[tp]) == 25
        await producer.begin_transaction()
        await (await producer.send(tp.topic, b'open', partition=0))
        async with reading(kafka.brokers, tp, light=True) as consumer, asyncio.timeout(30):
            while consumer.highwater(tp) is None or (fetch_position(consumer, tp) or 0) < 54:
                await consumer.getmany(timeout_ms=100)
            assert (consumer.highwater(tp), consumer.last_stable_offset(tp)) == (55, 54)
            await producer.commit_transaction()
            while (consumer.last_stable_offset(tp) or 0) < 56:
                await consumer.getmany(timeout_ms=100)
        await producer.stop()
    run(test())


def test_fetches_tell_the_time_of_every_partition_and_offsets_that_are_gone(kafka: Kafka):
    async def test() -> None:
        await create(kafka.brokers, 'quiet', 4)
        tps = [TopicPartition('quiet', number) for number in range(4)]
        async with publishing(kafka.brokers) as publisher, reading(kafka.brokers, *tps, light=True) as consumer:
            before_ms, seen = time.time() * 1000, 0
            await publisher.send('quiet', 2, [(b'k', b'v', [])] * 3)
            async with asyncio.timeout(30):
                while seen < 3 or not all((consumer.last_poll_timestamp(tp) or 0) > before_ms for tp in tps):
                    seen += sum(map(len, (await consumer.getmany(timeout_ms=100)).values()))
                assert [consumer.highwater(tp) for tp in tps] == [0, 0, 3, 0]
                consumer.pause(tps[0])
                await publisher.send('quiet', 0, [(b'k', b'v', [])])
                await publisher.send('quiet', 1, [(b'k', b'v', [])])
                found: dict[Any, Any] = {}
                while tps[1] not in found:
                    found |= await consumer.getmany(timeout_ms=100)
                assert tps[0] not in found
                consumer.resume(tps[0])
                while tps[0] not in found:
                    found |= await consumer.getmany(timeout_ms=100)
                consumer.seek(tps[3], 99)
                with pytest.raises(OffsetOutOfRangeError):
                    while True:
                        await consumer.getmany(timeout_ms=100)
    run(test())


def test_fetches_go_on_after_a_restart_of_the_broker(tmp_path: Path):
    async def test(kafka: Kafka) -> None:
        await create(kafka.brokers, 'again', 2)
        tps = [TopicPartition('again', number) for number in range(2)]
        async with publishing(kafka.brokers) as publisher, reading(kafka.brokers, *tps, light=True) as consumer:
            values: list[Any] = []
            for turn in range(2):
                for number in range(20):
                    await publisher.send('again', number % 2, [(b'k', b'%d' % (turn * 20 + number), [])])
                async with asyncio.timeout(60):
                    while len(values) < 20 * (turn + 1):
                        for records in (await consumer.getmany(timeout_ms=100)).values():
                            values += [int(record.value) for record in records]
                if not turn:
                    await asyncio.to_thread(kafka.kill)
                    await asyncio.to_thread(kafka.start)
            assert sorted(values) == list(range(40))

    with Kafka(tmp_path / 'kafka') as own:
        run(test(own))
