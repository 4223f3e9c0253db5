"""The producer with a scripted broker: what it sends, and what it does about each answer."""
import asyncio
import io
import struct
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import errors
from aiokafka.client import ConnectionGroup
from aiokafka.protocol.produce import ProduceRequest_v3, ProduceRequest_v7
from aiokafka.record.memory_records import MemoryRecords

from stream.kafka import producer as producer_module
from stream.kafka.batch import RecordBatch
from stream.kafka.producer import Producer

HOST = SimpleNamespace(host='broker', port=9092)
OK, NOT_LEADER, NO_TOPIC, TOO_LARGE, NOT_ALLOWED = 0, 6, 3, 10, 29
OUT_OF_ORDER, DUPLICATE, BAD_EPOCH, FENCED, UNKNOWN_PRODUCER = 45, 46, 47, 90, 59


class FakeBroker:
    """A broker that keeps batches as Kafka does, unless the script of a topic partition says otherwise.

    script     topic partition -> what to do with the next requests: an error code, 'lost' (the records are kept, but
               the connection closes before the answer), 'silent' (kept, never answered), 'late' (answered by `release`)
    versions   the versions that it offers
    """

    def __init__(self) -> None:
        self.script: dict[tuple[str, int], list[Any]] = defaultdict(list)
        self.logs: dict[tuple[str, int], list[bytes]] = defaultdict(list)
        self.next_sequence: dict[tuple[str, int], int] = defaultdict(int)
        self.offsets: dict[Any, int] = {}
        self.requests: list[list[tuple[str, int, int, int]]] = []      # topic, partition, sequence, attempts to keep
        self.versions = {0: (0, 7)}
        self.held: list[Callable[[], None]] = []

    def take(self, data: bytes) -> tuple[list[Any], list[Any]]:
        """The answers to a request, and the words of the script."""
        version = struct.unpack_from('>h', data, 6)[0]
        body = data[4 + 10 + struct.unpack_from('>h', data, 12)[0]:]
        kind: Any = ProduceRequest_v7 if version == 7 else ProduceRequest_v3
        request: Any = kind.decode(io.BytesIO(body))
        assert (request.required_acks, request.transactional_id) == (-1, None)
        answers, words, seen = [], [], []
        for topic, partitions in request.topics:
            for partition, records in partitions:
                place = topic, partition
                batch: Any = MemoryRecords(records).next_batch()
                assert batch.validate_crc()
                seen.append((topic, partition, batch.base_sequence, batch.producer_id))
                word = self.script[place].pop(0) if self.script[place] else OK
                words.append(word)
                if isinstance(word, int) and word:
                    answers.append((topic, partition, word, -1))
                else:
                    answers.append((topic, partition, OK, self.keep(place, batch)))
        self.requests.append(seen)
        return answers, words

    def keep(self, place: tuple[str, int], batch: Any) -> int:
        known = (*place, batch.base_sequence)
        values = [record.value for record in batch]
        if known not in self.offsets:
            assert batch.base_sequence == self.next_sequence[place], 'out of order'
            self.next_sequence[place] += len(values)
            self.offsets[known] = len(self.logs[place])
            self.logs[place] += values
        return self.offsets[known]

    def release(self) -> None:
        for answer in self.held:
            answer()
        self.held.clear()


class FakeConnection:
    """Stands for AIOKafkaConnection: the parts that `post` uses, and its way to answer."""

    def __init__(self, broker: FakeBroker) -> None:
        self.host, self.port = 'broker', 9092
        self._broker, self._versions, self._client_id = broker, broker.versions, 'tests'
        self._writer: Any = self
        self._requests: Any = []
        self._correlation_id = 0

    def _next_correlation_id(self) -> int:
        self._correlation_id += 1
        return self._correlation_id

    def connected(self) -> bool:
        return self._writer is not None

    def close(self, reason: Any = None) -> None:
        self._writer = None
        for _, _, response in self._requests:
            if not response.done():
                response.set_exception(errors.KafkaConnectionError('closed'))
        self._requests = []

    def write(self, data: bytes) -> None:
        correlation_id = struct.unpack_from('>i', data, 8)[0]
        version = struct.unpack_from('>h', data, 6)[0]
        answers, words = self._broker.take(data)

        def answer() -> None:
            for entry in list(self._requests):
                if entry[0] == correlation_id and not entry[2].done():
                    buffer = io.BytesIO(struct.pack('>i', correlation_id) + response_of(answers, version))
                    assert entry[1].parse_response_header(buffer).correlation_id == correlation_id
                    entry[2].set_result(entry[1].RESPONSE_TYPE.decode(buffer))
                    self._requests.remove(entry)
        if 'lost' in words:
            asyncio.get_running_loop().call_soon(self.close)
        elif 'late' in words:
            self._broker.held.append(answer)
        elif 'silent' not in words:
            asyncio.get_running_loop().call_soon(answer)


def response_of(answers: list[Any], version: int) -> bytes:
    parts = []
    for topic, partition, code, offset in answers:
        name = topic.encode()
        parts.append(struct.pack('>h', len(name)) + name + struct.pack('>iihqq', 1, partition, code, offset, -1)
                     + (struct.pack('>q', 0) if version >= 5 else b''))
    return struct.pack('>i', len(parts)) + b''.join(parts) + struct.pack('>i', 0)


class FakeClient:
    """Stands for AIOKafkaClient. `leaders` names the partitions without a leader, `away` the brokers that are away."""

    def __init__(self, broker: FakeBroker) -> None:
        self.broker, self.refreshes, self.connects, self.away = broker, 0, 0, False
        self.leaders: dict[tuple[str, int], Any] = {}
        self._conns: dict[Any, Any] = {}
        self.cluster = SimpleNamespace(leader_for_partition=lambda tp: self.leaders.get(tuple(tp), 1))
        self.closed = False
        self.unknown = 0        # how often no topic is known yet
        self.id_answers: list[Any] = []

    async def bootstrap(self) -> None:
        pass

    async def close(self) -> None:
        self.closed = True
        for connection in self._conns.values():
            connection.close()
        await asyncio.sleep(0)

    def add_topic(self, topic: str) -> None:
        pass

    def get_random_node(self) -> int:
        return 1

    async def send(self, node: int, request: Any) -> Any:
        word = self.id_answers.pop(0) if self.id_answers else OK
        if isinstance(word, Exception):
            raise word
        return SimpleNamespace(error_code=word, producer_id=77, producer_epoch=0)

    async def ready(self, node: int) -> bool:
        if self.away:
            return False
        self.connects += 1
        self._conns[node, ConnectionGroup.DEFAULT] = FakeConnection(self.broker)
        return True

    def force_metadata_update(self) -> None:
        self.refreshes += 1

    async def _maybe_wait_metadata(self) -> None:
        pass

    async def _wait_on_metadata(self, topic: str) -> set[int]:
        await asyncio.sleep(0.01)
        if self.unknown:
            self.unknown -= 1
            raise errors.UnknownTopicOrPartitionError
        return {0, 1, 2}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(producer_module, 'BACKOFF_S', 0.001)
    yield


def run(test: Callable[[Producer, FakeBroker, FakeClient], Awaitable[None]], timeout_ms: int = 30_000) -> None:
    async def go() -> None:
        broker = FakeBroker()
        client = FakeClient(broker)
        made = Producer({}, timeout_ms)
        original = producer_module.AIOKafkaClient
        producer_module.AIOKafkaClient = lambda **_: client       # pyright: ignore
        try:
            await made.start()
        finally:
            producer_module.AIOKafkaClient = original
        async with asyncio.timeout(20):
            await test(made, broker, client)
            await made.stop()
        assert client.closed
        assert not made._tasks
        assert not made._in_flight
    asyncio.run(go())


def batch(*values: bytes) -> RecordBatch:
    made = RecordBatch(1 << 20, 0)
    made.add_records([(b'k', value, []) for value in values], 0)
    return made


def test_what_is_sent_in_one_turn_goes_in_one_request_and_offsets_follow_the_last_record():
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        first = [producer.send('a', number, [batch(b'x', b'y')]) for number in range(3)]
        other = producer.send('b', 0, [batch(b'z')])
        assert await asyncio.gather(*first, other) == [2, 2, 2, 1]
        assert len(broker.requests) == 1
        assert await producer.send('a', 1, [batch(b'w')]) == 3
        assert broker.requests[1] == [('a', 1, 2, 77)]      # its sequence follows the two records
    run(test)


def test_one_batch_of_a_partition_is_in_flight_and_the_other_partitions_do_not_wait():
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        broker.script['a', 0] = ['late']
        slow = producer.send('a', 0, [batch(b'1'), batch(b'2')])
        more = producer.send('a', 0, [batch(b'3')])
        while not broker.requests:
            await asyncio.sleep(0)
        assert await producer.send('a', 1, [batch(b'x')]) == 1
        assert await producer.send('a', 2, [batch(b'x')]) == 1
        assert not slow.done()
        assert broker.logs['a', 0] == [b'1']
        broker.release()
        assert await asyncio.gather(slow, more) == [2, 3]
        assert broker.logs['a', 0] == [b'1', b'2', b'3']
    run(test)


@pytest.mark.parametrize('words', [
    [NOT_LEADER], [NO_TOPIC, NOT_LEADER], [7], [19], [20], [5], [56], [2], [75], ['lost'], ['lost', 'lost', NOT_LEADER],
])
def test_after_an_error_that_may_pass_the_same_is_sent_again(words: list[Any]):
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        assert await producer.send('a', 0, [batch(b'0')]) == 1
        broker.script['a', 0] = list(words)
        sent = [producer.send('a', 0, [batch(b'1', b'2')]), producer.send('a', 0, [batch(b'3')]),
                producer.send('a', 1, [batch(b'x')])]
        assert await asyncio.gather(*sent) == [3, 4, 1]
        assert broker.logs['a', 0] == [b'0', b'1', b'2', b'3']
        assert broker.logs['a', 1] == [b'x']
        tries = [part[2] for request in broker.requests for part in request if part[:2] == ('a', 0)]
        assert tries == [0] + [1] * (len(words) + 1) + [3]
        assert (client.refreshes > 0) == bool({NOT_LEADER, NO_TOPIC, 5, 56, 'lost'} & set(words))
        assert client.connects == 1 + words.count('lost')
    run(test)


def test_a_partition_without_a_leader_waits_for_one():
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        client.leaders['a', 0] = -1
        sent = producer.send('a', 0, [batch(b'1')])
        while client.refreshes < 3:
            await asyncio.sleep(0.001)
        client.leaders['a', 0] = 1
        assert await sent == 1
    run(test)


def test_a_broker_that_is_away_is_tried_until_it_is_back():
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        client.away = True
        sent = producer.send('a', 0, [batch(b'1')])
        while client.refreshes < 3:
            await asyncio.sleep(0.001)
        client.away = False
        assert await sent == 1
    run(test)


def test_a_broker_that_answers_no_more_loses_its_connection_and_gets_the_same_again():
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        broker.script['a', 0] = ['silent']
        assert await producer.send('a', 0, [batch(b'1')]) == 1
        assert broker.logs['a', 0] == [b'1']
        assert [len(request) for request in broker.requests] == [1, 1]
        assert client.connects == 2
    run(test, timeout_ms=400)


@pytest.mark.parametrize('how', ['leader', 'away', 'silent', 'refused'])
def test_the_time_limit_ends_every_wait(how: str):
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        client.away = how == 'away'
        client.leaders['a', 0] = None if how == 'leader' else 1
        broker.script['a', 0] = {'silent': ['silent'] * 9, 'refused': [NOT_LEADER] * 10_000}.get(how, [])
        sent, second = producer.send('a', 0, [batch(b'1')]), producer.send('a', 0, [batch(b'2')])
        with pytest.raises(errors.KafkaTimeoutError, match=r'within 0\.2 s.*last error'):
            await sent
        with pytest.raises(errors.KafkaTimeoutError):
            await second
        with pytest.raises(errors.KafkaTimeoutError):
            producer.send('a', 0, [batch(b'3')])
        if how != 'away':
            assert await producer.send('a', 1, [batch(b'x')]) == 1      # another partition goes on
    run(test, timeout_ms=200)


@pytest.mark.parametrize(('code', 'kind'), [
    (TOO_LARGE, errors.MessageSizeTooLargeError), (18, errors.RecordListTooLargeError),
    (NOT_ALLOWED, errors.TopicAuthorizationFailedError), (32, errors.InvalidTimestampError), (87, errors.UnknownError)])
def test_nothing_follows_a_batch_that_is_refused(code: int, kind: type[Exception]):
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        broker.script['a', 0] = [OK, code]
        sent = producer.send('a', 0, [batch(b'1'), batch(b'2'), batch(b'3')])
        later = producer.send('a', 0, [batch(b'4')])
        other = producer.send('a', 1, [batch(b'x')])
        for future in (sent, later):
            with pytest.raises(kind):
                await future
        assert await other == 1
        assert broker.logs['a', 0] == [b'1']
        with pytest.raises(kind):
            producer.send('a', 0, [batch(b'5')])
        assert await producer.send('a', 1, [batch(b'y')]) == 2
    run(test)


@pytest.mark.parametrize(('code', 'words'), [
    (OUT_OF_ORDER, 'lacks records'), (DUPLICATE, 'no longer knows where'), (BAD_EPOCH, 'took over'),
    (FENCED, 'took over'), (31, '31')])
def test_an_error_that_leaves_open_what_is_in_the_log_fails_everything(code: int, words: str):
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        broker.script['a', 0], broker.script['a', 1] = [code], ['late']
        sent = [producer.send('a', 1, [batch(b'1')])]
        while not broker.requests:
            await asyncio.sleep(0)
        sent.append(producer.send('a', 0, [batch(b'1')]))
        for future in sent:
            with pytest.raises(errors.KafkaError, match=words):
                await future
        with pytest.raises(errors.KafkaError, match=words):
            producer.send('a', 2, [batch(b'1')])
        broker.release()
        await asyncio.sleep(0)
    run(test)


def test_a_producer_that_the_broker_has_forgotten_begins_again_if_nothing_can_be_there_twice():
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        assert await producer.send('a', 0, [batch(b'1', b'2')]) == 2
        broker.script['a', 0] = [UNKNOWN_PRODUCER]
        broker.next_sequence['a', 0] = 0
        broker.offsets.clear()
        assert await producer.send('a', 0, [batch(b'3')]) == 3
        assert await producer.send('a', 0, [batch(b'4')]) == 4
        assert [request[0][2] for request in broker.requests] == [0, 2, 0, 1]
        broker.script['a', 0] = ['lost', UNKNOWN_PRODUCER]      # the broker may have kept it
        with pytest.raises(errors.UnknownProducerId, match='may or may not'):
            await producer.send('a', 0, [batch(b'5')])
    run(test)


def test_sequence_numbers_begin_again_after_the_largest():
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        assert await producer.send('a', 0, [batch(b'0')]) == 1
        last = producer_module.SEQUENCES - 2
        producer._places['a', 0].sequence = broker.next_sequence['a', 0] = last
        await producer.send('a', 0, [batch(b'1', b'2', b'3')])
        broker.next_sequence['a', 0] = 1
        await producer.send('a', 0, [batch(b'4')])
        assert [request[0][2] for request in broker.requests] == [0, last, 1]
    run(test)


def test_a_topic_is_looked_for_until_the_time_limit():
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        client.unknown = 3
        assert await producer.partitions_of('a') == 3
        client.unknown = 10_000
        with pytest.raises(errors.UnknownTopicOrPartitionError):
            await producer.partitions_of('b')
    run(test, timeout_ms=200)


def test_large_batches_go_in_several_requests():
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        size = producer_module.REQUEST_BYTES_MAX // 2 - 1000
        await asyncio.gather(*[producer.send('a', number, [batch(bytes(size))]) for number in range(5)])
        assert [len(request) for request in broker.requests] == [2, 2, 1]
    run(test)


def test_what_nobody_waits_for_any_more_is_not_sent_unless_it_is_on_its_way():
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        broker.script['a', 0] = ['late']
        dropped = producer.send('a', 0, [batch(b'1'), batch(b'2'), batch(b'3')])
        after = producer.send('a', 0, [batch(b'4')])
        await asyncio.sleep(0)
        dropped.cancel()
        broker.release()
        assert await after == 2
        assert broker.logs['a', 0] == [b'1', b'4']
    run(test)


def test_stop_sends_what_is_queued_and_takes_nothing_more():
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        sent = producer.send('a', 0, [batch(b'1'), batch(b'2')])
        stopping = asyncio.create_task(producer.stop())
        await asyncio.sleep(0)
        with pytest.raises(errors.ProducerClosed):
            producer.send('a', 0, [batch(b'3')])
        await stopping
        assert await sent == 2
        assert broker.logs['a', 0] == [b'1', b'2']
    run(test)


def test_stop_ends_although_the_broker_is_silent():
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        broker.script['a', 0] = ['silent'] * 9
        sent = producer.send('a', 0, [batch(b'1')])
        await producer.stop()
        with pytest.raises(errors.KafkaError):
            await sent
    run(test, timeout_ms=200)


def test_a_broker_without_a_known_version_is_refused_clearly():
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        broker.versions[0] = (9, 12)
        with pytest.raises(errors.IncompatibleBrokerVersion, match=r'9 to 12 of the request Produce.*3 to 8'):
            await producer.send('a', 0, [batch(b'1')])
    run(test)


@pytest.mark.parametrize('version', [3, 4, 5, 6, 7])
def test_the_newest_version_that_both_know_is_used(version: int):
    async def test(producer: Producer, broker: FakeBroker, client: FakeClient) -> None:
        broker.versions[0] = (0, version)
        assert await producer.send('a', 0, [batch(b'1')]) == 1
    run(test)


def test_an_id_is_asked_for_until_a_broker_gives_one(monkeypatch: pytest.MonkeyPatch):
    async def go() -> None:
        client = FakeClient(FakeBroker())
        client.id_answers = [14, errors.NodeNotReadyError('away'), OK]
        monkeypatch.setattr(producer_module, 'AIOKafkaClient', lambda **_: client)
        producer = Producer({}, 10_000)
        await producer.start()
        assert producer._producer_id == 77
        await producer.stop()
        client.id_answers = [31]
        producer = Producer({}, 10_000)
        with pytest.raises(errors.ClusterAuthorizationFailedError):
            await producer.start()
        await producer.stop()
    asyncio.run(go())
