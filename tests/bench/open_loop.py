"""An open loop: events are sent at a fixed rate that nothing slows down, and the latency of each is measured.

Everything is prepared before the first event leaves: the moments, the events, their record batches and the produce
requests. Then one thread writes each request at its moment and another reads the answers, so that sending takes a few
percent of a core. A client library that makes batches while it sends takes half of one, and comes late.
"""
import asyncio
import gc
import random
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.producer.message_accumulator import BatchBuilder

from stream.core.events import Source
from tests.bench.load import BATCH_BYTES_MAX, CARTS_SHARE, Shoppers, event_line
from tests.integration.running import Shop

SMOOTH_S, BURST_S = 0.002, 0.02
PRODUCE, PRODUCE_VERSION = 0, 3
ANSWER_S_MAX = 30.0


class SentBatch(NamedTuple):
    """Where and when the first record of a batch was appended; the users of its events, and the time in all of them."""

    source: int
    partition: int
    offset: int
    at_ms: int
    users: list[bytes]
    ts_ms: int


@dataclass
class Sent:
    """What an open loop sent.

    late_ms    how much later than planned each batch was appended: what the loop itself, or the broker, held up
    cpu_s      seconds of CPU that sending took
    """

    batches: list[SentBatch] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    @property
    def events(self) -> int:
        return sum(len(batch.users) for batch in self.batches)

    @property
    def first_ms(self) -> int:
        return min(batch.at_ms for batch in self.batches)

    def only(self, which: Callable[[SentBatch], bool]) -> 'Sent':
        """Some of the batches."""
        return Sent([batch for batch in self.batches if which(batch)], self.late_ms, self.cpu_s)


class Places(NamedTuple):
    """The users of the events that are sent at one moment, by source and partition."""

    at_s: float
    users: dict[tuple[int, int], list[bytes]]


class Request(NamedTuple):
    """A produce request: when to send it, after the beginning; its bytes; the time in its events."""

    at_s: float
    data: bytes
    users: dict[tuple[int, int], list[bytes]]
    ts_ms: int


def moments_s(rate: float, seconds: float, tick_s: float, draw: np.random.Generator) -> np.ndarray:
    """When each event is sent: Poisson arrivals, which wait for the end of their tick. Ascending."""
    arrivals = np.sort(draw.random(draw.poisson(rate * seconds))) * seconds
    return (np.floor(arrivals / tick_s) + 1) * tick_s


def drawn(shoppers: Shoppers, rate: float, seconds: float, tick_s: float, seed: int = 1,
          hot_share: float = 0.0) -> Iterator[Places]:
    """Users drawn evenly, apart from `hot_share` of the events, which are those of the first user."""
    draw = np.random.default_rng(seed)
    moments = moments_s(rate, seconds, tick_s, draw)
    whose = draw.integers(0, shoppers.count, len(moments))
    whose[draw.random(len(moments)) < hot_share] = 0
    sources = (draw.random(len(moments)) < CARTS_SHARE).tolist()
    partitions, whose = shoppers.partition_of[whose].tolist(), whose.tolist()
    begins = np.flatnonzero(np.diff(moments, prepend=-1.0)).tolist()
    for begin, end in pairwise([*begins, len(moments)]):
        users: dict[tuple[int, int], list[bytes]] = defaultdict(list)
        for event in range(begin, end):
            users[int(sources[event]), partitions[event]].append(shoppers.ids[whose[event]])
        yield Places(float(moments[begin]), users)


def in_turn(shoppers: Shoppers, rate: float, seconds: float, tick_s: float, seed: int = 1) -> Iterator[Places]:
    """`rate` events a second to each topic partition, at the same distances, of users drawn evenly from its own."""
    draw = np.random.default_rng(seed)
    due = np.floor(np.arange(1, round(seconds / tick_s) + 1) * (tick_s * rate)).astype(int)
    for tick in np.flatnonzero(np.diff(due, prepend=0)).tolist():
        yield Places(tick * tick_s, {(source, partition): [shoppers.ids[draw.choice(shoppers.of[partition])]]
                                     for source in range(len(Source)) for partition in range(shoppers.partitions)})


def prepared(topics: tuple[str, str], places: Iterable[Places], began_ms: float, numbers: int = 0,
             seed: int = 1) -> list[Request]:
    """Produce requests. `began_ms` is when the first moment is 0, for the times in the events.

    Source   Kafka's protocol: request header, version 1; Produce, version 3.
    """
    rng, made = random.Random(seed), []
    for number, (at_s, by_place) in enumerate(places):
        ts_ms = int(began_ms + at_s * 1000)
        parts = [struct.pack('>hhih5shhii', PRODUCE, PRODUCE_VERSION, number, 5, b'bench', -1, -1,
                             int(ANSWER_S_MAX * 1000), len({source for source, _ in by_place}))]
        ordered = dict(sorted(by_place.items()))
        for source, topic in enumerate(topics):
            own = [(partition, users) for (at, partition), users in ordered.items() if at == source]
            if not own:
                continue
            parts.append(struct.pack(f'>h{len(topic)}si', len(topic), topic.encode(), len(own)))
            for partition, users in own:
                builder = BatchBuilder(BATCH_BYTES_MAX, 0)
                for user in users:
                    builder.append(timestamp=ts_ms, key=user,
                                   value=event_line(numbers, user, Source(source), ts_ms, rng))
                    numbers += 1
                batch = bytes(builder._build())
                parts += (struct.pack('>ii', partition, len(batch)), batch)
        data = b''.join(parts)
        made.append(Request(at_s, struct.pack('>i', len(data)) + data, ordered, ts_ms))
    return made


def appended(answer: bytes, request: Request, number: int, topics: tuple[str, str]) -> list[SentBatch]:
    """Where the answer to request `number` says that its batches are, in any order.

    Errors   AssertionError if one was refused, or has no answer.
    """
    correlation, count = struct.unpack_from('>ii', answer)
    assert correlation == number, f'answer {correlation} to request {number}'
    at, found = 8, []
    for _ in range(count):
        length, = struct.unpack_from('>h', answer, at)
        source = topics.index(answer[at + 2:at + 2 + length].decode())
        at += 2 + length
        partitions, = struct.unpack_from('>i', answer, at)
        at += 4
        for _ in range(partitions):
            partition, error, offset, at_ms = struct.unpack_from('>ihqq', answer, at)
            at += 22
            assert error == 0, f'partition {partition} of {topics[source]} answers with error {error}'
            assert at_ms > 0, 'the inputs do not keep the time of appending'
            found.append(SentBatch(source, partition, offset, at_ms, request.users[source, partition], request.ts_ms))
    assert len(found) == len(request.users), 'a batch has no answer'
    return found


def send_prepared(brokers: str, topics: tuple[str, str], requests: list[Request], began_s: float,
                  stop: threading.Event) -> Sent:
    """Send each request at its moment after `began_s` (monotonic), whether earlier ones are answered or not."""
    sent, failed = Sent(), []
    began_ms = time.time() * 1000 + (began_s - time.monotonic()) * 1000
    host, _, port = brokers.rpartition(':')

    def read() -> None:
        try:
            for number, request in enumerate(requests):
                size, = struct.unpack('>i', _exactly(connection, 4))
                for batch in appended(_exactly(connection, size), request, number, topics):
                    sent.batches.append(batch)
                    sent.late_ms.append(batch.at_ms - began_ms - request.at_s * 1000)
        except (AssertionError, OSError, ValueError, KeyError) as error:
            failed.append(error)
            stop.set()
        sent.cpu_s += time.thread_time()

    collects = gc.isenabled()
    gc.disable()        # a collection takes tens of ms with so many objects, and makes the next events late
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_S_MAX) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader = threading.Thread(target=read, daemon=True)
            before = time.thread_time()
            connection.settimeout(None)
            reader.start()
            for request in requests:
                if stop.wait(max(began_s + request.at_s - time.monotonic(), 0)):
                    break
                connection.sendall(request.data)
            if stop.is_set():
                connection.shutdown(socket.SHUT_RDWR)
            reader.join(ANSWER_S_MAX)
            assert not reader.is_alive(), f'the broker did not answer within {ANSWER_S_MAX:.0f} s'
            sent.cpu_s += time.thread_time() - before
    finally:
        if collects:
            gc.enable()
    if failed:
        raise failed[0]
    return sent


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b''
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionError('the broker closed the connection of the open loop')
        data += more
    return data


async def drive(of: Shop, shoppers: Shoppers, rate: float, seconds: float, numbers: int = 0, tick_s: float = BURST_S,
                seed: int = 1, each_partition: bool = False, hot_share: float = 0.0,
                started: Callable[[float], object] | None = None) -> Sent:
    """Send events at a fixed rate, whatever the worker does. The inputs store the time of appending.

    rate             events a second over both topics, Poisson
    tick_s           all events of so long a time leave together, at its end. `SMOOTH_S` is as good as one by one.
                     `BURST_S` gives a worker larger steps than real arrivals do
    each_partition   instead of drawing users, send `rate` events a second to each topic partition, evenly
    hot_share        the first user's share of the events, beside what is drawn
    started          called with the beginning (monotonic), as soon as that is known
    """
    stop = threading.Event()

    def prepare_and_send() -> Sent:
        # An estimate of how long preparing takes. The times in the events refer to it.
        events = rate * seconds * (len(Source) * of.partitions if each_partition else 1)
        began_s = time.monotonic() + 0.3 + events * 40e-6
        places = (in_turn(shoppers, rate, seconds, tick_s, seed) if each_partition
                  else drawn(shoppers, rate, seconds, tick_s, seed, hot_share))
        began_ms = (time.time() + began_s - time.monotonic()) * 1000
        requests = prepared(of.inputs, places, began_ms, numbers, seed)
        began_s = max(began_s, time.monotonic() + 0.1)
        if started:
            started(began_s)
        return send_prepared(of.brokers, of.inputs, requests, began_s, stop)
    await _led(of.brokers, of.inputs, of.partitions)
    try:
        return await asyncio.to_thread(prepare_and_send)
    finally:
        stop.set()


async def _led(brokers: str, topics: Iterable[str], partitions: int) -> None:
    """Wait until each partition has a leader that answers."""
    consumer = AIOKafkaConsumer(bootstrap_servers=brokers)
    await consumer.start()
    try:
        await consumer.end_offsets([TopicPartition(topic, number) for topic in topics for number in range(partitions)])
    finally:
        await consumer.stop()


async def warm_broker(brokers: str, seconds: float = 6.0, rate: float = 1000.0) -> None:
    """Send events that nobody reads. A broker that was just started answers half a second late: its JVM interprets."""
    topics, shoppers = ('warm-clicks', 'warm-carts'), Shoppers(1_000, 8)
    admin = AIOKafkaAdminClient(bootstrap_servers=brokers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, shoppers.partitions, 1, topic_configs={
            'message.timestamp.type': 'LogAppendTime'}) for name in topics])
        await _led(brokers, topics, shoppers.partitions)
        requests = prepared(topics, drawn(shoppers, rate, seconds, SMOOTH_S), time.time() * 1000)
        await asyncio.to_thread(send_prepared, brokers, topics, requests, time.monotonic(), threading.Event())
        await admin.delete_topics(list(topics))
    finally:
        await admin.close()


@dataclass
class Output:
    """One message: its user, its time of appending, and the next offsets to fold of the user's state."""

    partition: int
    user: bytes
    at_ms: int
    clicks: int
    carts: int
    timer: bool
    topic: str


def read_outputs(of: Shop, topics: Iterable[str]) -> list[Output]:
    """All messages in these topics, ordered by topic, partition and offset."""
    async def read(topic: str) -> list[Output]:
        found: list[tuple[int, int, Output]] = []
        async for record in records_of(of, topic):
            cause = orjson.loads(record.value)['cause']
            found.append((record.partition, record.offset, Output(
                record.partition, record.key, record.timestamp, cause['clicks_offset'], cause['carts_offset'],
                cause['timer_ms'] is not None, topic)))
        return [output for *_, output in sorted(found, key=lambda entry: entry[:2])]
    return [output for topic in topics for output in asyncio.run(read(topic))]


async def records_of(of: Shop, topic: str) -> AsyncIterator[Any]:
    """All records of a topic up to its end."""
    consumer = AIOKafkaConsumer(bootstrap_servers=of.brokers, auto_offset_reset='earliest', fetch_max_wait_ms=50)
    await consumer.start()
    try:
        tps = [TopicPartition(topic, number) for number in range(of.partitions)]
        consumer.assign(tps)
        ends = await consumer.end_offsets(tps)
        begins = await consumer.beginning_offsets(tps)
        left = [tp for tp in tps if begins[tp] < ends[tp]]
        while left:
            for records in (await consumer.getmany(timeout_ms=200)).values():
                for record in records:
                    yield record
            left = [tp for tp in left if await consumer.position(tp) < ends[tp]]
    finally:
        await consumer.stop()


def latencies_ms(sent: Sent, outputs: Iterable[Output], skip_s: float = 0.0,
                 which: Callable[[bytes], bool] = bool) -> tuple[np.ndarray, int]:
    """Latency of each event: until the first output whose cause covers it. Also the number of events without one.

    skip_s   events of so many first seconds do not count
    which    the users whose events count; all by default
    """
    waiting: dict[tuple[bytes, int], deque[tuple[int, int]]] = defaultdict(deque)
    for source, _, offset, at_ms, users, _ in sorted(sent.batches, key=lambda batch: batch[:3]):
        for place, user in enumerate(users):
            if which(user):
                waiting[user, source].append((offset + place, at_ms))
    from_ms = sent.first_ms + skip_s * 1000
    found = []
    # Topics are read one after another. A later decision must not answer an event before the scores that did.
    for output in sorted(outputs, key=lambda output: output.at_ms):
        for source, upto in ((0, output.clicks), (1, output.carts)):
            queue = waiting.get((output.user, source))
            while queue and queue[0][0] < upto:
                _, at_ms = queue.popleft()
                if at_ms >= from_ms:
                    found.append(output.at_ms - at_ms)
    return np.array(found, float), sum(map(len, waiting.values()))
