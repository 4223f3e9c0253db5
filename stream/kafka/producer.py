"""An idempotent producer of finished batches. It takes over from aiokafka's, whose cost is in its many small objects.

aiokafka's client is kept: it has the connections, the metadata, and the negotiation of versions. What is relied on
beyond its public methods, in release 0.14: `_conns`, `_wait_on_metadata`, `_maybe_wait_metadata`, and what requests.py
says. The project allows no later release.

Each batch carries the producer's id and a sequence number, so a broker recognises a batch that it already has. What
follows from that:

- One batch of a topic partition is in flight at a time. So order is kept, whatever is sent again.
- After an error that may pass, the same bytes are sent again: after a pause, with newer metadata if the error says so,
  until the time limit. It does not matter whether the broker has them, even if its answer was lost.
- The sequence number of the next batch is known only after the answer to this one. If a batch fails for good, the topic
  partition takes no more: what came after it would follow upon a gap.
- An error that leaves open what is in the log fails all topic partitions, and so ends the worker. Its next start begins
  with a new id, and reads what is in the log. The Java client goes on with a new epoch instead; it has no log to read.
"""
import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.conn import CloseReason
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    DuplicateSequenceNumber,
    IncompatibleBrokerVersion,
    InvalidProducerEpoch,
    KafkaError,
    KafkaProtocolError,
    KafkaTimeoutError,
    NodeNotReadyError,
    OutOfOrderSequenceNumber,
    ProducerClosed,
    TopicAuthorizationFailedError,
    UnknownError,
    UnknownProducerId,
    UnknownTopicOrPartitionError,
    UnsupportedVersionError,
    for_code,
)
from aiokafka.protocol.transaction import InitProducerIdRequest

from stream.kafka.batch import RecordBatch
from stream.kafka.requests import ProduceRequest, post

log = logging.getLogger(__name__)
REQUEST_BYTES_MAX = 4 << 20     # batches for one broker that exceed this together go in several requests
REQUEST_TIMEOUT_MS_MAX = 30_000
WATCH_S = 1.0                   # how often time limits are looked at; more often if they are short
BACKOFF_S = 0.1                 # pause before the second attempt; it doubles with each attempt
BACKOFF_S_MAX = 1.0
SEQUENCES = 1 << 31             # sequence numbers begin again at 0 after the largest
TRANSACTION_TIMEOUT_MS = (1 << 31) - 1      # there are no transactions
# Errors that may pass, although aiokafka does not say so: a batch damaged on its way, a replica or a listener that is
# not there yet, an old or a new leader epoch, and a quota.
RETRIABLE_CODES = frozenset({2, 9, 72, 74, 75, 89})
FENCED_CODE = 90                # aiokafka has no error of this code
Answers = dict[tuple[bytes, int], tuple[int | None, int, bytes | None]]     # topic, partition -> code, offset, text
NO_ANSWER = (None, -1, None)
# Errors after which no batch can be sent.
FATAL = (ClusterAuthorizationFailedError, DuplicateSequenceNumber, IncompatibleBrokerVersion, InvalidProducerEpoch,
         OutOfOrderSequenceNumber, UnknownProducerId, UnsupportedVersionError)
IN_WORDS: dict[type[KafkaError], str] = {
    DuplicateSequenceNumber: 'the broker has these records already, and no longer knows where',
    OutOfOrderSequenceNumber: 'the broker lacks records that it has acknowledged before',
    UnknownProducerId: 'the broker no longer knows this producer, so it may or may not have these records',
    InvalidProducerEpoch: 'another producer took over the id of this one',
}


class _Place:
    """One topic partition. `queue` begins with the batch in flight if `busy`."""

    __slots__ = ('busy', 'error', 'queue', 'sequence', 'topic', 'tp')

    def __init__(self, topic: str, partition: int) -> None:
        self.tp = TopicPartition(topic, partition)
        self.topic = topic.encode()
        self.queue: deque[_Entry] = deque()
        self.busy = False           # a batch is in flight, or waits for its next attempt
        self.sequence = 0           # of the next batch
        self.error: KafkaError | None = None


class _Entry:
    """A batch in the queue of its place.

    future   that of the call of `send`, which all its batches share
    last     whether it is the last batch of its call
    """

    __slots__ = ('attempts', 'batch', 'deadline_s', 'error', 'future', 'last', 'place')

    def __init__(self, place: _Place, batch: RecordBatch, deadline_s: float, future: asyncio.Future[int]) -> None:
        self.place = place
        self.batch = batch
        self.deadline_s = deadline_s
        self.future = future
        self.last = False
        self.attempts = 0
        self.error: KafkaError | None = None        # of the last attempt


class Producer:
    """Sends batches. Call `start` first, and `stop` at the end."""

    def __init__(self, arguments: dict[str, Any], send_timeout_ms: int) -> None:
        """
        arguments         those of every client, from `client_arguments`
        send_timeout_ms   time from `send` to the acknowledgement
        """
        self._arguments = arguments
        self._timeout_s = send_timeout_ms / 1000
        # Half of it, so that a broker that answers no more leaves time for another attempt.
        self._request_timeout_ms = min(max(send_timeout_ms // 2, 1), REQUEST_TIMEOUT_MS_MAX)
        self._watch_s = min(WATCH_S, send_timeout_ms / 10_000)
        self._places: dict[tuple[str, int], _Place] = {}
        self._ready: dict[_Place, None] = {}        # have something to send, and are not busy
        self._flushing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight: dict[asyncio.Future[Any], tuple[Any, float]] = {}      # response -> connection, time limit
        self._timer: asyncio.TimerHandle | None = None      # is set while anything is queued
        self._error: KafkaError | None = None
        self._closed = False
        self._producer_id, self._epoch = -1, -1
        self._client_made: AIOKafkaClient | None = None
        self._loop: asyncio.AbstractEventLoop

    # ---- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect, and get an id from a broker. Errors: KafkaError of aiokafka."""
        self._loop = asyncio.get_running_loop()
        self._client_made = AIOKafkaClient(**self._arguments, request_timeout_ms=self._request_timeout_ms)
        await self._client.bootstrap()
        deadline_s, attempts = self._loop.time() + self._timeout_s, 0
        while True:
            error = await self._get_id()
            if error is None:
                return
            attempts += 1
            if not error.retriable or self._loop.time() > deadline_s:
                raise error
            log.warning('No id for the producer yet: %r. Retrying.', error)
            await self._pause(attempts, refresh=True)

    async def _get_id(self) -> KafkaError | None:
        node = self._client.get_random_node()
        try:
            answer: Any = await self._client.send(node, InitProducerIdRequest(None, TRANSACTION_TIMEOUT_MS))  # pyright: ignore
        except KafkaError as error:
            return error
        if answer.error_code:
            return for_code(answer.error_code)()
        self._producer_id, self._epoch = answer.producer_id, answer.producer_epoch
        return None

    async def stop(self) -> None:
        """Send what is queued, at most until its time limit, and disconnect. What is left then fails."""
        self._closed = True
        try:
            left = [entry.future for place in self._places.values() for entry in place.queue if entry.last]
            if left:
                await asyncio.wait(left, timeout=self._timeout_s)
        finally:
            self._fail_all(ProducerClosed('the producer was stopped'))
            if self._timer is not None:
                self._timer.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._client_made is not None:
                await self._client_made.close()

    @property
    def _client(self) -> AIOKafkaClient:
        if self._client_made is None:
            raise RuntimeError('start() comes first')
        return self._client_made

    # ---- what callers hand over --------------------------------------------------------------------------------------

    async def partitions_of(self, topic: str) -> int:
        """The topic's number of partitions. Errors: KafkaError of aiokafka if it is not known within the time limit."""
        deadline_s = self._loop.time() + self._timeout_s
        while True:
            try:
                return len(await self._client._wait_on_metadata(topic))
            except UnknownTopicOrPartitionError:        # after the time limit of one request
                if self._loop.time() >= deadline_s:
                    raise

    def send(self, topic: str, partition: int, batches: Sequence[RecordBatch]) -> asyncio.Future[int]:
        """Queue the batches, of which there must be some; return a future of the offset after the last record.

        It is done when all batches are acknowledged, or when one of them has failed. What is queued in one turn of the
        event loop goes out in one request to each broker. The future has an error of aiokafka, which `send` itself
        raises if nothing can be sent there any more. If it is cancelled, batches that were not sent yet are not sent.
        """
        place = self._places.get((topic, partition))
        if place is None:
            place = self._places[topic, partition] = _Place(topic, partition)
            self._client.add_topic(topic)
        error = self._error or place.error
        if error is None and self._closed:
            error = ProducerClosed('the producer is stopping')
        if error is not None:
            raise error
        deadline_s = self._loop.time() + self._timeout_s
        future = self._loop.create_future()
        for batch in batches:
            batch.close()
            place.queue.append(_Entry(place, batch, deadline_s, future))
        place.queue[-1].last = True
        if not place.busy:
            self._make_ready(place)
        if self._timer is None:
            self._timer = self._loop.call_later(self._watch_s, self._watch)
        return future

    def _make_ready(self, place: _Place) -> None:
        self._ready[place] = None
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Send the first batch of each place that is ready."""
        self._flushing = False
        by_node: dict[Any, list[list[_Entry]]] = {}     # node -> requests
        sizes: dict[Any, int] = {}                      # node -> bytes in its last request
        leaderless: list[_Entry] = []
        for place in self._ready:
            while place.queue and not place.queue[0].attempts and place.queue[0].future.cancelled():
                place.queue.popleft()
            if not place.queue:
                continue        # it has failed since, or nobody waits for it any more
            entry = place.queue[0]
            place.busy = True
            node = self._client.cluster.leader_for_partition(place.tp)
            if node is None or node == -1:
                entry.error = entry.error or KafkaError(f'no leader of {place.tp.topic}-{place.tp.partition} is known')
                leaderless.append(entry)
                continue
            size = entry.batch.size()
            sizes[node] = sizes.get(node, REQUEST_BYTES_MAX) + size
            if sizes[node] > REQUEST_BYTES_MAX:
                sizes[node] = size
                by_node.setdefault(node, []).append([])
            by_node[node][-1].append(entry)
        self._ready.clear()
        for node, requests in by_node.items():
            connection = self._client._conns.get((node, ConnectionGroup.DEFAULT))
            for entries in requests:
                if connection is not None and connection.connected():
                    self._post(connection, entries)
                else:
                    self._spawn(self._connect(node, entries))
        if leaderless:
            self._spawn(self._again(leaderless, refresh=True))

    async def _connect(self, node: Any, entries: list[_Entry]) -> None:
        """Connect to the broker first. One that cannot be reached is an error that may pass."""
        if await self._client.ready(node):
            self._post(self._client._conns[node, ConnectionGroup.DEFAULT], entries)
        else:
            self._answered(entries, {}, NodeNotReadyError(f'broker {node} cannot be reached'))

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            failure = KafkaError(f'the producer failed: {error!r}')
            failure.__cause__ = error
            self._fail_all(failure)

    def _post(self, connection: Any, entries: list[_Entry]) -> None:
        """Send the batches in one request."""
        topics: dict[bytes, list[tuple[int, bytearray]]] = {}
        for entry in entries:
            place = entry.place
            # Bytes that were sent once do not change, as the broker may have them: the state is the same as before.
            entry.batch._set_producer_state(self._producer_id, self._epoch, place.sequence)
            entry.attempts += 1
            part = (place.tp.partition, entry.batch._build())
            if place.topic in topics:
                topics[place.topic].append(part)
            else:
                topics[place.topic] = [part]
        try:
            response = post(connection, ProduceRequest(self._request_timeout_ms, topics))
        except KafkaError as error:
            self._answered(entries, {}, error)
            return
        self._in_flight[response] = connection, self._loop.time() + self._request_timeout_ms / 1000
        response.add_done_callback(partial(self._done, entries))

    def _done(self, entries: list[_Entry], response: asyncio.Future[Any]) -> None:
        del self._in_flight[response]
        error: Any = response.exception()
        answers = {} if error else {(topic, number): (code, offset, text)
                                    for topic, number, code, offset, text in response.result()}
        self._answered(entries, answers, error)

    def _answered(self, entries: list[_Entry], answers: Answers, error: KafkaError | None) -> None:
        """Act on the response to a request, or on its error."""
        if error is not None:
            log.warning('Sending records failed: %r.', error)
        again, refresh = [], error is not None
        for entry in entries:
            place = entry.place
            if not place.queue or place.queue[0] is not entry:
                continue        # it has failed in the meantime
            code, offset, text = answers.get((place.topic, place.tp.partition), NO_ANSWER)
            if code == 0:
                self._acknowledged(entry, offset)
                continue
            failure = error or self._as_error(place, code, text)
            if isinstance(failure, UnknownProducerId) and entry.attempts == 1 and place.sequence:
                # The broker has forgotten this producer, as its records were deleted. It cannot have this batch.
                place.sequence = 0
            elif isinstance(failure, FATAL):
                self._fail_all(failure)
                return
            elif not (failure.retriable or code in RETRIABLE_CODES):
                self._fail(place, failure)
                continue
            if error is None:
                log.warning('Records for %s-%d were not taken: %r. Retrying.', *place.tp, failure)
            entry.error = failure
            refresh = refresh or failure.invalid_metadata
            again.append(entry)
        if again:
            self._spawn(self._again(again, refresh))

    @staticmethod
    def _as_error(place: _Place, code: int | None, text: bytes | None) -> KafkaError:
        if code is None:
            return KafkaProtocolError('the response lacks this topic partition')
        if code == FENCED_CODE:
            return InvalidProducerEpoch(IN_WORDS[InvalidProducerEpoch])
        kind = for_code(code)
        words = IN_WORDS.get(kind, '') or (text or b'').decode(errors='replace')
        if kind is UnknownError:
            return kind(f'error code {code} {words}'.strip())
        if kind is TopicAuthorizationFailedError:
            return kind(place.tp.topic)
        return kind(words) if words else kind()

    def _acknowledged(self, entry: _Entry, offset: int) -> None:
        place, count = entry.place, entry.batch.record_count()
        place.queue.popleft()
        place.sequence = (place.sequence + count) % SEQUENCES
        place.busy = False
        if place.queue:
            self._make_ready(place)
        if entry.last and not entry.future.done():
            entry.future.set_result(offset + count)

    # ---- errors ------------------------------------------------------------------------------------------------------

    async def _again(self, entries: list[_Entry], refresh: bool) -> None:
        """After a pause, let the places of the batches take part again."""
        await self._pause(max(entry.attempts for entry in entries), refresh)
        for entry in entries:
            entry.place.busy = False
            if entry.place.queue:
                self._make_ready(entry.place)

    async def _pause(self, attempts: int, refresh: bool) -> None:
        if refresh:
            self._client.force_metadata_update()
        await asyncio.sleep(min(BACKOFF_S * 2 ** min(max(attempts - 1, 0), 10), BACKOFF_S_MAX))
        await self._client._maybe_wait_metadata()

    def _watch(self) -> None:
        """Look at the time limits, of requests and of batches. One timer does for all."""
        self._timer, now_s = None, self._loop.time()
        late = {connection for connection, deadline_s in self._in_flight.values() if deadline_s <= now_s}
        for connection in late:
            connection.close(reason=CloseReason.CONNECTION_TIMEOUT)     # all its requests fail, and are tried again
        for place in self._places.values():
            if place.queue and place.queue[0].deadline_s <= now_s:
                last = place.queue[0].error
                self._fail(place, KafkaTimeoutError(f'no acknowledgement within {self._timeout_s:g} s'
                                                    + (f'; the last error: {last!r}' if last else '')))
        if any(place.queue for place in self._places.values()):
            self._timer = self._loop.call_later(self._watch_s, self._watch)

    def _fail(self, place: _Place, error: KafkaError) -> None:
        """Fail all that is queued for the place, and all that comes."""
        place.error = place.error or error
        entries = list(place.queue)
        place.queue.clear()
        for entry in entries:
            if not entry.future.done():
                entry.future.set_exception(error)
                entry.future.exception()        # whoever waits gets it; nobody has to wait

    def _fail_all(self, error: KafkaError) -> None:
        self._error = self._error or error
        for place in self._places.values():
            self._fail(place, error)
