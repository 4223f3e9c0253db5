"""The light fetcher with a scripted client: what it asks for, and what it does about each answer."""
import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition, errors
from aiokafka.client import ConnectionGroup
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.subscription_state import SubscriptionState

from stream.kafka.batch import RecordBatch
from stream.kafka.fetcher import LightFetcher
from stream.kafka.pace import BYTES_MANY, PAUSE_S_MIN

TPS = [TopicPartition(topic, number) for topic in ('carts', 'clicks') for number in range(3)]
NOT_LEADER, NO_TOPIC, OUT_OF_RANGE, NOT_ALLOWED, CORRUPT = 6, 3, 1, 29, 2
Part = tuple[Any, int, int, int, Any, bytes]


class FakeClient:
    """Stands for AIOKafkaClient. `answers` has a response (error code and partitions) or an error for each request."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._metadata_max_age_ms = 300_000
        self._request_timeout_ms = 40_000
        self._conns: dict[Any, Any] = {}
        self.leaders: dict[Any, Any] = dict.fromkeys(TPS, 1)
        self.cluster = SimpleNamespace(leader_for_partition=lambda tp: self.leaders[tp], _partitions=object())
        self.answers: asyncio.Queue[Any] = asyncio.Queue()
        self.requests: list[tuple[Any, Any]] = []
        self.refreshes = 0

    async def send(self, node: Any, request: Any) -> Any:
        self.requests.append((node, {tp: offset for tp, _, offset in request.asked.values()}))
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def force_metadata_update(self) -> asyncio.Future[bool]:
        self.refreshes += 1
        future = self._loop.create_future()
        self._loop.call_later(0.001, future.set_result, True)
        return future


def run(test: Callable[[Any, FakeClient, Any], Awaitable[None]]) -> None:
    """A fetcher at offset 10 of all partitions."""
    async def go() -> None:
        client, subscription = FakeClient(), SubscriptionState()
        fetcher: Any = Fetcher(client, subscription, isolation_level='read_committed', auto_offset_reset='none',
                               retry_backoff_ms=1, fetcher_timeout=0.05)
        LightFetcher.adopt(fetcher)
        subscription.assign_from_user(TPS)
        assignment: Any = subscription.subscription.assignment      # pyright: ignore
        for tp in TPS:
            assignment.state_value(tp).seek(10)
        async with asyncio.timeout(20):
            await test(fetcher, client, assignment)
        await fetcher.close()
    asyncio.run(go())


def records(*values: bytes, begin: int = 10) -> bytes:
    made = RecordBatch(1 << 20, 0)
    made.add_records([(b'k', value, []) for value in values], 0)
    return begin.to_bytes(8, 'big') + bytes(made._build())[8:]      # the checksum does not cover the offset


def part(tp: Any, code: int = 0, data: bytes = b'', end: int = 20, stable: int = 19) -> Part:
    return tuple(tp), code, end, stable, None, data


async def requests(client: FakeClient, count: int) -> None:
    while len(client.requests) < count:
        await asyncio.sleep(0.001)


def test_all_partitions_are_asked_for_and_each_answered_one_has_its_ends_and_time():
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        await requests(client, 1)
        assert client.requests[0] == (1, dict.fromkeys(TPS, 10))
        before_ms = int(time.time() * 1000)
        client.answers.put_nowait((0, [part(tp) for tp in TPS[:-1]] + [part(TPS[-1], data=records(b'1', b'2'))]))
        found = await fetcher.fetched_records([], 5)
        assert {tp: [record.value for record in found[tp]] for tp in found} == {TPS[-1]: [b'1', b'2']}
        for tp in TPS:
            state = assignment.state_value(tp)
            assert (state.highwater, state.lso) == (20, 19)
            assert state.timestamp >= before_ms
        await requests(client, 2)
        assert client.requests[1] == (1, dict.fromkeys(TPS[:-1], 10) | {TPS[-1]: 12})
    run(test)


def test_a_fetch_that_brings_little_is_followed_by_a_pause_and_one_that_brings_much_is_not():
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        client.answers.put_nowait((0, [part(TPS[0], data=records(b'1'))]))
        await fetcher.fetched_records([], 5)
        assert fetcher._pace.pause_s >= PAUSE_S_MIN
        many = records(*[bytes(10_000)] * 10, begin=11)
        assert len(many) > BYTES_MANY
        client.answers.put_nowait((0, [part(TPS[0], data=many)]))
        assert len((await fetcher.fetched_records([], 5))[TPS[0]]) == 10
        assert fetcher._pace.pause_s == 0
        assert fetcher._fetch_again_s <= time.monotonic()
    run(test)


def test_while_records_of_a_partition_are_not_taken_the_others_wait_for_a_while_only():
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        client.answers.put_nowait((0, [part(TPS[0], data=records(b'1'))]))
        await requests(client, 2)
        assert set(client.requests[1][1]) == set(TPS[1:])
        assert assignment.state_value(TPS[0]).position == 10
    run(test)


def test_one_task_goes_on_fetching_while_its_records_are_taken():
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        await requests(client, 1)
        (task,) = fetcher._pending_tasks
        for number in range(5):
            client.answers.put_nowait((0, []))
            client.answers.put_nowait((0, [part(TPS[0], data=records(b'1', begin=10 + number))]))
            assert set(await fetcher.fetched_records([], 5)) == {TPS[0]}
            await requests(client, 2 * number + 3)
        assert fetcher._pending_tasks == {task}
    run(test)


def test_records_that_are_taken_late_are_followed_by_more():
    """The task has ended by then, so the routine must notice."""
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        client.answers.put_nowait((0, [part(tp, data=records(b'1')) for tp in TPS]))
        await requests(client, 1)
        while fetcher._in_flight:
            await asyncio.sleep(0.001)
        assert len(client.requests) == 1
        assert set(await fetcher.fetched_records([], 5)) == set(TPS)
        await requests(client, 2)
        assert client.requests[1] == (1, dict.fromkeys(TPS, 11))
    run(test)


def test_what_was_sought_during_the_fetch_is_dropped():
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        await requests(client, 1)
        assignment.state_value(TPS[0]).seek(3)
        client.answers.put_nowait((0, [part(TPS[0], data=records(b'1')), part(TPS[1], data=records(b'2'))]))
        assert set(await fetcher.fetched_records([], 5)) == {TPS[1]}
        await requests(client, 2)
        assert client.requests[1][1][TPS[0]] == 3
    run(test)


@pytest.mark.parametrize(('code', 'kind'), [(OUT_OF_RANGE, errors.OffsetOutOfRangeError),
                                            (NOT_ALLOWED, errors.TopicAuthorizationFailedError)])
def test_errors_that_the_caller_must_handle_are_raised_once(code: int, kind: type[Exception]):
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        client.answers.put_nowait((0, [part(TPS[0], code)]))
        with pytest.raises(kind) as raised:
            await fetcher.fetched_records([], 5)
        assert raised.value.args[0] == ({TPS[0]: 10} if code == OUT_OF_RANGE else 'carts')
        await requests(client, 2)
        assert client.requests[1][1] == dict.fromkeys(TPS, 10)
    run(test)


@pytest.mark.parametrize('code', [NOT_LEADER, NO_TOPIC, CORRUPT])
def test_after_other_errors_the_partition_is_asked_for_again(code: int):
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        client.answers.put_nowait((0, [part(TPS[0], code)]))
        await requests(client, 2)
        assert client.requests[1][1] == dict.fromkeys(TPS, 10)
        assert client.refreshes == (code != CORRUPT)
        assert assignment.state_value(TPS[0]).timestamp is None
    run(test)


@pytest.mark.parametrize('answer', [errors.NodeNotReadyError('away'), errors.KafkaConnectionError('closed'), (-1, [])])
def test_after_a_request_that_failed_the_next_one_follows(answer: Any):
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        client.answers.put_nowait(answer)
        await requests(client, 2)
        client.answers.put_nowait((0, [part(TPS[0], data=records(b'1'))]))
        assert set(await fetcher.fetched_records([], 5)) == {TPS[0]}
    run(test)


def test_a_new_leader_is_asked_after_the_metadata_say_so():
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        await requests(client, 1)
        client.leaders[TPS[0]], client.leaders[TPS[1]] = 2, None
        client.cluster._partitions = object()
        client.answers.put_nowait((0, []))
        await requests(client, 3)
        assert {node: set(asked) for node, asked in client.requests[1:3]} == {1: set(TPS[2:]), 2: {TPS[0]}}
        while not client.refreshes:     # for the partition without a leader
            await asyncio.sleep(0.001)
        client.leaders[TPS[1]] = 3
        client.cluster._partitions = object()
        await requests(client, 4)
        assert client.requests[3] == (3, {TPS[1]: 10})
    run(test)


class FakeConnection:
    """Stands for AIOKafkaConnection, to a broker that never answers."""

    host, port, _versions, _client_id = 'broker', 9092, {1: (4, 17)}, 'tests'

    def __init__(self) -> None:
        self._writer: Any = self
        self._requests: list[Any] = []
        self.written = asyncio.Event()

    def connected(self) -> bool:
        return self._writer is not None

    def _next_correlation_id(self) -> int:
        return 1

    def write(self, data: bytes) -> None:
        assert len(data) == 4 + int.from_bytes(data[:4], 'big')
        self.written.set()

    def close(self, reason: Any = None) -> None:
        self._writer = None
        for _, _, response in self._requests:
            if not response.done():
                response.set_exception(errors.KafkaConnectionError('closed'))


def test_a_broker_that_answers_no_more_loses_its_connection_and_is_asked_again():
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        client._request_timeout_ms = 20
        connection = client._conns[1, ConnectionGroup.DEFAULT] = FakeConnection()
        await connection.written.wait()
        client.answers.put_nowait((0, [part(TPS[0], data=records(b'1'))]))
        assert set(await fetcher.fetched_records([], 5)) == {TPS[0]}      # by a new connection
        assert not connection.connected()
    run(test)


def test_a_fetch_that_is_no_longer_wanted_leaves_its_connection_open():
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        connection = client._conns[1, ConnectionGroup.DEFAULT] = FakeConnection()
        await connection.written.wait()
        await fetcher.close()
        assert connection.connected()
        assert [response.cancelled() for _, _, response in connection._requests] == [True]
    run(test)


def test_paused_partitions_are_not_asked_for():
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        await requests(client, 1)
        assignment.state_value(TPS[0]).pause()
        client.answers.put_nowait((0, []))
        await requests(client, 2)
        assert set(client.requests[1][1]) == set(TPS[1:])
        assignment.state_value(TPS[0]).resume()
        client.answers.put_nowait((0, []))
        await requests(client, 3)
        assert set(client.requests[2][1]) == set(TPS)
    run(test)


def test_an_incomplete_batch_is_an_error():
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        client.answers.put_nowait((0, [part(TPS[0], data=records(b'1')[:-1])]))
        with pytest.raises(errors.RecordTooLargeError, match='carts-0 at offset 10'):
            await fetcher.fetched_records([], 5)
    run(test)


def test_each_request_begins_with_another_partition():
    async def test(fetcher: Any, client: FakeClient, assignment: Any) -> None:
        for count in range(1, 7):
            await requests(client, count)
            client.answers.put_nowait((0, []))
        assert len({next(iter(asked)) for _, asked in client.requests[:6]}) == 6
    run(test)
