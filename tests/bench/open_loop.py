"""An open loop: events are sent at a fixed rate that nothing slows down, and the latency of each is measured."""
import asyncio
import random
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition

from stream.core.events import Source
from tests.bench.load import CARTS_SHARE, Shoppers, event_line, producing
from tests.integration.running import Shop


@dataclass
class Sent:
    """What an open loop sent: for each batch the place and time of its first record, and the users of its events.

    late_ms    how much later than planned each batch was appended: what the loop itself, or the broker, held up
    """

    batches: list[tuple[int, int, int, int, list[bytes]]] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)

    @property
    def events(self) -> int:
        return sum(len(users) for *_, users in self.batches)


async def drive(of: Shop, shoppers: Shoppers, rate: float, seconds: float, numbers: int = 0, tick_s: float = 0.02,
                seed: int = 1, each_partition: bool = False) -> Sent:
    """Send events at a fixed rate, whatever the worker does. The inputs store the time of appending.

    rate             events a second over both topics, Poisson within each tick
    each_partition   instead of drawing users, send `rate` events a second to each topic partition, evenly
    """
    draw, rng, sent = np.random.default_rng(seed), random.Random(seed), Sent()
    tasks: set[asyncio.Task] = set()
    due_by_place = np.zeros((len(Source), of.partitions))

    async def send(source: int, partition: int, users: list[bytes], first: int, planned_ms: float) -> None:
        builder = producer.create_batch()
        now_ms = int(time.time() * 1000)
        for number, user in enumerate(users, first):
            builder.append(timestamp=now_ms, key=user, value=event_line(number, user, Source(source), now_ms, rng))
        builder.close()
        done = await (await producer.send_batch(builder, of.inputs[source], partition=partition))
        assert done.timestamp_type == 1, 'the inputs do not keep the time of appending'
        sent.batches.append((source, partition, done.offset, done.timestamp, users))
        sent.late_ms.append(done.timestamp - planned_ms)

    async with producing(of.brokers) as producer:
        for topic in of.inputs:
            await producer.partitions_for(topic)
        began, began_ms = time.monotonic(), time.time() * 1000
        for tick in range(round(seconds / tick_s)):
            await asyncio.sleep(max(began + tick * tick_s - time.monotonic(), 0))
            places: dict[tuple[int, int], list[bytes]] = defaultdict(list)
            if each_partition:
                before = np.floor(due_by_place)
                due_by_place += rate * tick_s
                for source, partition in zip(*np.nonzero(np.floor(due_by_place) > before), strict=True):
                    places[int(source), int(partition)].append(shoppers.ids[draw.choice(shoppers.of[partition])])
            else:
                drawn = draw.integers(0, shoppers.count, draw.poisson(rate * tick_s))
                sources = draw.random(len(drawn)) < CARTS_SHARE
                for index, source in zip(drawn.tolist(), sources.tolist(), strict=True):
                    places[int(source), int(shoppers.partition_of[index])].append(shoppers.ids[index])
            for (source, partition), users in places.items():
                task = asyncio.create_task(send(source, partition, users, numbers, began_ms + tick * tick_s * 1000))
                numbers += len(users)
                tasks.add(task)
                task.add_done_callback(_finished(tasks))
        while tasks:
            await asyncio.gather(*tasks)
    return sent


def _finished(tasks: set[asyncio.Task]) -> Callable[[asyncio.Task], None]:
    """Forget a task that is done. A failed one stays, so that its error is raised at the end."""
    def end(task: asyncio.Task) -> None:
        if not task.cancelled() and task.exception() is None:
            tasks.discard(task)
    return end


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


def latencies_ms(sent: Sent, outputs: Iterable[Output], skip_s: float = 0.0) -> tuple[np.ndarray, int]:
    """Latency of each event: until the first output whose cause covers it. Also the number of events without one.

    skip_s   events of so many first seconds do not count
    """
    waiting: dict[tuple[bytes, int], deque[tuple[int, int]]] = defaultdict(deque)
    for source, _, offset, at_ms, users in sorted(sent.batches, key=lambda batch: batch[:3]):
        for place, user in enumerate(users):
            waiting[user, source].append((offset + place, at_ms))
    from_ms = min(batch[3] for batch in sent.batches) + skip_s * 1000
    found = []
    for output in outputs:
        for source, upto in ((0, output.clicks), (1, output.carts)):
            queue = waiting.get((output.user, source))
            while queue and queue[0][0] < upto:
                _, at_ms = queue.popleft()
                if at_ms >= from_ms:
                    found.append(output.at_ms - at_ms)
    return np.array(found, float), sum(map(len, waiting.values()))
