"""Made-up shoppers, and their events in batches that are cheap to send in bulk."""
import asyncio
import contextlib
import random
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import numpy as np
from aiokafka import AIOKafkaProducer
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.util import calc_crc32c

from stream.core.events import Source
from stream.core.layout import HOUR_MS
from tests.bench.figures import MIB
from tests.bench.live import cpu_s, stopped, wait_done
from tests.integration.running import Shop, Worker

BATCH_BYTES_MAX = 900_000
CARTS_SHARE = 0.2           # of all events


class Shoppers:
    """Made-up users, and the partition of each.

    ids      bytes, e.g. b'u0000041'; at most 10 million
    of       numbers of the users of each partition, ascending
    """

    def __init__(self, count: int, partitions: int) -> None:
        self.count = count
        self.partitions = partitions
        numbers = np.arange(count)
        text = np.full((count, 8), ord('u'), np.uint8)
        text[:, 1:] = _digits(numbers, 7)
        self.ids: list[bytes] = text.view('S8').ravel().tolist()
        self.partition_of = (_murmur2(text) & 0x7FFF_FFFF) % partitions
        self.of = [np.flatnonzero(self.partition_of == number) for number in range(partitions)]


def _digits(numbers: np.ndarray, width: int) -> np.ndarray:
    """Decimal digits as ASCII, uint8 [len(numbers), width]."""
    powers = 10 ** np.arange(width - 1, -1, -1, dtype=np.int64)
    return (numbers[:, None] // powers % 10 + ord('0')).astype(np.uint8)


def _murmur2(keys: np.ndarray) -> np.ndarray:
    """`stream.core.partitioners.murmur2` of many keys of 8 bytes; uint8 [n, 8] in, uint32 [n] out."""
    multiplier = np.uint32(0x5BD1E995)
    h = np.full(len(keys), 0x9747B28C ^ 8, np.uint32)
    for k in np.ascontiguousarray(keys).view('<u4').T:
        k = k * multiplier
        h = h * multiplier ^ (k ^ k >> np.uint32(24)) * multiplier
    h = (h ^ h >> np.uint32(13)) * multiplier
    return h ^ h >> np.uint32(15)


def event_line(number: int, user: bytes, source: Source, ts_ms: int, rng: random.Random) -> bytes:
    """A plausible event. Its id is made of `number`; ids and events have the same width for all numbers."""
    item = rng.randrange(2_000)
    head = b'{"event_id":"%016d","user_id":"%s","ts":%013d,' % (number, user, ts_ms)
    if source is Source.CLICKS:
        return head + b'"type":"%s","item_id":"i%05d","category":"c%02d","session_id":"s%08x"}' % (
            b'search' if item % 11 == 0 else b'view', item, item % 40, rng.getrandbits(32))
    kind = b'"purchase","order_id":"o%08x"' % rng.getrandbits(32) if item % 4 == 0 else b'"add_to_cart"'
    return head + b'"type":%s,"item_id":"i%05d","category":"c%02d","price":%d.9,"quantity":1}' % (
        kind, item, item % 40, 3 + item % 90)


class RawBatch:
    """A finished record batch that looks like a builder to aiokafka's producer (not to an idempotent one)."""

    def __init__(self, data: bytes, records: int) -> None:
        self._data, self._records = data, records

    def close(self) -> None:
        """It is closed already."""

    def closed(self) -> bool:
        return True

    def size(self) -> int:
        return len(self._data)

    def record_count(self) -> int:
        return self._records

    def _build(self) -> bytes:
        return self._data


class Template:
    """A batch of events that is sent repeatedly with other ids and times, at a tenth of the cost of a new batch.

    Source   Kafka's record batch, version 2: CRC-32C at byte 17 over everything from byte 21 on, the first and the
             largest time at 27 and 35; the records' own times are differences, here 0.
    """

    def __init__(self, users: Iterable[bytes], source: Source, rng: random.Random) -> None:
        builder = BatchBuilder(BATCH_BYTES_MAX, 0)
        for user in users:
            appended = builder.append(timestamp=0, key=user, value=event_line(0, user, source, 0, rng))
            assert appended is not None, 'too many events for one batch'
        self.records = builder.record_count()
        self._data = np.frombuffer(builder._build(), np.uint8).copy()
        text = self._data.tobytes()
        self._ids, self._times = _after(text, b'"event_id":"', 16), _after(text, b'"ts":', 13)

    def batch(self, number: int, ts_ms: int) -> RawBatch:
        """The events with ids from `number` on, all with the same time."""
        data = self._data
        data[self._ids] = _digits(np.arange(number, number + self.records), 16)
        data[self._times] = _digits(np.array([ts_ms]), 13)
        data[27:43] = np.frombuffer(struct.pack('>qq', ts_ms, ts_ms), np.uint8)
        data[17:21] = np.frombuffer(struct.pack('>I', calc_crc32c(data[21:].tobytes())), np.uint8)
        return RawBatch(data.tobytes(), self.records)


def _after(text: bytes, what: bytes, width: int) -> np.ndarray:
    """Indices of the `width` bytes after each place of `what`, [places, width]."""
    places, at = [], text.find(what)
    while at >= 0:
        places.append(at + len(what))
        at = text.find(what, at + 1)
    return np.array(places)[:, None] + np.arange(width)


class Templates:
    """Templates for all topic partitions. Carts have `CARTS_SHARE` of the events.

    skew     users are drawn with weight 1 / rank**skew; 0: evenly
    numbers  event ids handed out so far
    """

    def __init__(self, of: Shop, shoppers: Shoppers, batch_events: int = 1_000, each: int = 4, seed: int = 1,
                 numbers: int = 0, skew: float = 0.0) -> None:
        rng = random.Random(seed)
        draw = np.random.default_rng(seed)
        weights = [np.arange(1, len(users) + 1) ** -skew for users in shoppers.of]
        self.numbers = numbers
        self._topics = of.inputs
        self._turn = 0
        carts = max(round(batch_events * CARTS_SHARE / (1 - CARTS_SHARE)), 1)
        sizes = {Source.CLICKS: batch_events, Source.CARTS: carts}
        self._templates = [
            [(source, partition, Template([shoppers.ids[index] for index in draw.choice(
                shoppers.of[partition], size, p=weights[partition] / weights[partition].sum())],
                                          source, rng))
             for partition in range(of.partitions) for source, size in sizes.items()] for _ in range(each)]
        self.round_events = sum(template.records for _, _, template in self._templates[0])

    def round(self, ts_ms: int) -> list[tuple[str, int, RawBatch]]:
        """One batch for each topic partition, `round_events` events in all."""
        made = []
        for source, partition, template in self._templates[self._turn % len(self._templates)]:
            made.append((self._topics[source], partition, template.batch(self.numbers, ts_ms)))
            self.numbers += template.records
        self._turn += 1
        return made


@contextlib.asynccontextmanager
async def producing(brokers: str, linger_ms: int = 0) -> AsyncIterator[AIOKafkaProducer]:
    """A producer of large batches."""
    producer = AIOKafkaProducer(bootstrap_servers=brokers, acks='all', linger_ms=linger_ms,
                                max_batch_size=BATCH_BYTES_MAX, max_request_size=8 * MIB)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def send_all(producer: AIOKafkaProducer, batches: Iterable[tuple[str, int, Any]], in_flight_max: int = 64) -> int:
    """Send batches, those of a partition in order. Returns the number of records."""
    waiting: deque[Any] = deque()
    records = 0
    for topic, partition, batch in batches:
        records += batch.record_count()
        waiting.append(await producer.send_batch(batch, topic, partition=partition))
        if len(waiting) > in_flight_max:
            await waiting.popleft()
    await asyncio.gather(*waiting)
    return records


def prefill(of: Shop, templates: Templates, events: int) -> int:
    """Write at least `events` events to the inputs. Each round is a millisecond of event time after the last."""
    async def fill() -> int:
        start_ms = int(time.time() * 1000) - HOUR_MS
        async with producing(of.brokers) as producer:
            rounds = -(-events // templates.round_events)
            return await send_all(producer, (batch for number in range(rounds)
                                             for batch in templates.round(start_ms + number)))
    return asyncio.run(fill())


def drain_s(of: Shop, workers: Sequence[Worker], templates: Templates, events: int) -> tuple[int, float, float]:
    """Write a backlog to the inputs while the workers are stopped, and let them process it.

    Returns   events, seconds until the last commit, seconds of CPU that all workers used meanwhile
    """
    with stopped(workers):
        sent = prefill(of, templates, events)
        before = sum(map(cpu_s, workers))
        began = time.monotonic()
    asyncio.run(wait_done(of))
    return sent, time.monotonic() - began, sum(map(cpu_s, workers)) - before
