"""The fetcher of the group's consumer, with less work for each fetch than aiokafka's own.

Relies on `Fetcher` of aiokafka 0.14: `_fetch_requests_routine` calls `_get_actions_per_node` and starts a task of
`_proc_fetch_request` for each node; `fetched_records` takes from `_records` what they put there, and calls `_notify`.
It also relies on the fields of `TopicPartitionState`, on `ClusterMetadata._partitions`, on `AIOKafkaClient._conns`, and
on what requests.py says. The project allows no later release. What differs:

- Records are returned as aiokafka's parser made them. A `ConsumerRecord` of each would take longer than folding it.
- A fetch that brings little is followed by a pause, in which the records of all partitions gather: see pace.py.
- A task goes on fetching from its node while all is as usual. So the routine, which looks at all partitions whenever a
  fetch has ended or records were taken, sleeps.
- Requests and responses are encoded and decoded in compiled code.
- Leaders only are asked: the worker names no rack, so no broker names another replica.
"""
import asyncio
import logging
import time
from typing import Any

from aiokafka import TopicPartition
from aiokafka.client import ConnectionGroup
from aiokafka.conn import CloseReason
from aiokafka.consumer.fetcher import Fetcher, FetchResult, OffsetResetStrategy, PartitionRecords
from aiokafka.errors import (
    KafkaError,
    NotLeaderForPartitionError,
    OffsetOutOfRangeError,
    RecordTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.record.memory_records import MemoryRecords

from stream.kafka.pace import Pace
from stream.kafka.requests import FetchRequest, post

log = logging.getLogger(__name__)
# How long records of one partition that nobody takes hold up fetches from its broker. With aiokafka's own tenth of a
# second, a partition without room would delay the others.
UNTAKEN_S = 0.005
NO_LEADER = -1

_Planned = tuple[TopicPartition, Any, Any, bytes]       # its state, the node of its leader, its topic


class _Fetch(FetchRequest):
    """A request, and what it was made from: (topic, partition) -> topic partition, its state, and the offset."""

    def __init__(self, options: tuple[int, int, int, int, int], topics: dict[bytes, list[tuple[int, int]]],
                 asked: dict[tuple[str, int], tuple[TopicPartition, Any, int]]) -> None:
        super().__init__(options, topics)
        self.asked = asked


class LightFetcher(Fetcher):
    """Replaces the fetcher that a consumer has made, by `adopt`."""

    _pace: Pace
    _fetch_again_s: float       # when the next request may be sent, in monotonic seconds
    _turn: int                  # the place in the list of partitions at which the next request begins
    _planned: list[_Planned]
    _leaders: set[Any]          # the nodes of the planned partitions
    _planned_for: tuple[Any, Any]       # the assignment and the metadata

    @classmethod
    def adopt(cls, fetcher: Any) -> None:
        """Make this fetcher one of this class, before it fetches. A consumer makes its fetcher itself."""
        fetcher.__class__ = cls
        fetcher._pace, fetcher._fetch_again_s, fetcher._turn = Pace(), 0.0, 0
        fetcher._planned, fetcher._planned_for, fetcher._leaders = [], (None, None), {NO_LEADER}
        fetcher._prefetch_backoff = UNTAKEN_S

    def _get_actions_per_node(self, assignment: Any) -> Any:
        """What to do next, as the method that it replaces."""
        records: Any = self._records
        in_flight = self._in_flight
        fetchable: dict[Any, list[_Planned]] = {}
        resets: dict[Any, list[TopicPartition]] = {}
        backoffs: dict[Any, float] = {}     # node -> the longest of its partitions' whose records nobody has taken
        resumes, leaderless = [], False
        for planned in self._plan(assignment):
            tp, state, node, _ = planned
            if records and tp in records:
                if backoff := records[tp].calculate_backoff():
                    backoffs[node] = max(backoffs.get(node, 0.0), backoff)
            elif node in in_flight:
                continue
            elif node == NO_LEADER:
                leaderless = True
            elif state._position is None:
                resets.setdefault(node, []).append(tp)
            elif state._paused:
                resumes.append(state.resume_fut)
            elif node in fetchable:
                fetchable[node].append(planned)
            else:
                fetchable[node] = [planned]
        requests = [(node, self._request(partitions)) for node, partitions in fetchable.items()
                    if node not in backoffs and node not in resets]
        timeout_s = min(backoffs.values()) if backoffs else self._fetcher_timeout
        return requests, resets, timeout_s, leaderless, resumes

    def _plan(self, assignment: Any) -> list[_Planned]:
        """The partitions of the assignment with their leaders. Made again if either has changed."""
        cluster = self._client.cluster
        leaders: Any = cluster._partitions      # is replaced with each update of the metadata
        if self._planned_for[0] is not assignment or self._planned_for[1] is not leaders:
            self._planned_for = assignment, leaders
            self._planned = []
            for tp in assignment.tps:
                node = cluster.leader_for_partition(tp)
                self._planned.append((tp, assignment.state_value(tp), NO_LEADER if node is None else node,
                                      tp.topic.encode()))
            self._leaders = {node for _, _, node, _ in self._planned}
        return self._planned

    def _request(self, partitions: list[_Planned]) -> _Fetch:
        # A response that is full lacks the last partitions, so each request begins with another one.
        self._turn += 1
        begin = self._turn % len(partitions)
        topics: dict[bytes, list[tuple[int, int]]] = {}
        asked: dict[tuple[str, int], tuple[TopicPartition, Any, int]] = {}
        for tp, state, _, topic in partitions[begin:] + partitions[:begin]:
            position = state._position
            asked[tp] = tp, state, position
            if topic in topics:
                topics[topic].append((tp[1], position))
            else:
                topics[topic] = [(tp[1], position)]
        return _Fetch((self._fetch_max_wait_ms, self._fetch_min_bytes, self._fetch_max_bytes, self._isolation_level,
                       self._max_partition_fetch_bytes), topics, asked)

    def _next(self, assignment: Any, node_id: Any) -> _Fetch | None:
        """The next request to this node. None if the routine has to decide, as something is not as usual."""
        if not assignment.active:
            return None
        records: Any = self._records
        partitions = [planned for planned in self._plan(assignment) if planned[2] == node_id]
        for tp, state, _, _ in partitions:
            if state._position is None or state._paused or tp in records:
                return None
        return self._request(partitions) if partitions else None

    async def _proc_fetch_request(self, assignment: Any, node_id: Any, request: _Fetch | None) -> bool:
        """Fetch from a node again and again, as long as somebody takes the records during the pause."""
        try:
            await self._pause()
            while request is not None:
                response: Any = await self._answer(node_id, request)
                if not assignment.active or not await self._keep(assignment, request, *response):
                    break
                await self._pause()
                request = self._next(assignment, node_id)
        except KafkaError as error:
            log.error('Fetching from broker %s failed: %s', node_id, error)
            await asyncio.sleep(self._retry_backoff)
        except asyncio.CancelledError:
            pass        # as the method that this replaces: the fetcher is closed, or its partitions are revoked
        return False        # who waits has been told already

    async def _pause(self) -> None:
        pause_s = self._fetch_again_s - time.monotonic()
        if pause_s > 0:
            await asyncio.sleep(pause_s)

    def _notify(self, future: Any) -> None:
        # That records were taken is no news for the routine while it can ask nobody for more.
        if future is self._wait_consume_future and self._leaders <= self._in_flight:
            return
        super()._notify(future)

    async def _answer(self, node_id: Any, request: _Fetch) -> Any:
        client: Any = self._client
        connection = client._conns.get((node_id, ConnectionGroup.DEFAULT))
        if connection is None or not connection.connected():
            return await client.send(node_id, request)      # connects first
        response = post(connection, request)
        timer = self._loop.call_later(client._request_timeout_ms / 1000, connection.close,
                                      CloseReason.CONNECTION_TIMEOUT)
        try:
            return await response
        finally:
            timer.cancel()

    async def _keep(self, assignment: Any, request: _Fetch, failed: int, parts: list[Any]) -> bool:
        """Keep what came, and tell who waits. Returns false if the next request must wait for the routine."""
        if failed:
            log.error('Fetching failed: %r', for_code(failed)())
            await asyncio.sleep(self._retry_backoff)
            return False
        news, usual, fetched_bytes, now_ms, asked = False, True, 0, int(time.time() * 1000), request.asked
        for place, code, end, stable, aborted, data in parts:
            tp, state, offset = asked[place]
            if state._position != offset:
                continue        # somebody has sought since
            if code:
                usual = False
                news |= self._failed(tp, state, offset, code)
                continue
            state.highwater, state.lso, state.timestamp = end, stable, now_ms
            if data:
                news = True
                fetched_bytes += len(data)
                self._take(assignment, tp, state, offset, aborted, data)
        if news:
            self._pace.fetched(fetched_bytes)
            self._fetch_again_s = time.monotonic() + self._pace.pause_s
            for waiter in self._fetch_waiters:
                self._notify(waiter)
        return usual

    def _take(self, assignment: Any, tp: TopicPartition, state: Any, offset: int, aborted: Any, data: bytes) -> None:
        """Keep the records of a topic partition for who asks for them."""
        records = MemoryRecords(data)
        if not records.has_next():
            # The broker returns the first batch whatever its size, so this is one of an old broker or of a proxy.
            self._set_error(tp, RecordTooLargeError(
                f'the records of {tp.topic}-{tp.partition} at offset {offset} exceed the fetch size '
                f'{self._max_partition_fetch_bytes}'))
            state.consumed_to(offset + 1)
            return
        parsed: Any = PartitionRecords(
            tp, records, aborted, offset, None, None, self._check_crcs, self._isolation_level)
        parsed._consumer_record = _as_parsed
        self._records[tp] = FetchResult(tp, partition_records=parsed, assignment=assignment,
                                        backoff=self._prefetch_backoff)

    def _failed(self, tp: TopicPartition, state: Any, offset: int, code: int) -> bool:
        """Act on the error of one topic partition. Returns whether there is something for who waits."""
        kind: Any = for_code(code)
        if kind in (NotLeaderForPartitionError, UnknownTopicOrPartitionError):
            self._client.force_metadata_update()
        elif kind is OffsetOutOfRangeError:
            log.info('Offset %d of %s-%d is out of range.', offset, *tp)
            if self._default_reset_strategy != OffsetResetStrategy.NONE:
                state.await_reset(self._default_reset_strategy)
                return False
            self._set_error(tp, kind({tp: offset}))
            return True
        elif kind is TopicAuthorizationFailedError:
            log.warning('Not allowed to read from topic %s.', tp.topic)
            self._set_error(tp, kind(tp.topic))
            return True
        else:
            log.warning('Fetching from %s-%d failed: error code %d, %s.', *tp, code, kind.__name__)
        return False


def _as_parsed(tp: Any, record: Any) -> Any:
    return record
