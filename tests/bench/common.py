"""What the benches of the live worker share: a real broker, workers as processes, made-up shoppers, and figures.

    python -m tests.bench.NAME [--json FILE] [--set SETTING=VALUE ...]

Each bench starts a broker of its own in a temporary folder and `stream worker` processes beside it, and stops both.
It prints one line per figure, with unit, target and whether that holds; exit code 1: one does not hold. A target is
meant for the default sizes. `--json` writes the same figures for whoever collects them.
"""
import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import statistics
import struct
import sys
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.util import calc_crc32c

from stream.config import Settings
from stream.core.events import Decoder, Event, EventRules, Source
from stream.core.layout import (
    DAY_DTYPE,
    DAY_MS,
    HEADER,
    HEADER_DTYPE,
    HOUR_MS,
    ROW_DTYPE,
    WindowLimits,
)
from stream.core.user import User, encode, fold
from stream.kafka.topics import changelog_topic, wanted_topics
from stream.simulator.shop import SimulatorOptions, simulate
from stream.state.store import LANE_KEY, LaneRecord
from tests.integration.running import Shop, Worker, wait_for

ROOT = Path(__file__).parents[2]

MIB = 1 << 20
BATCH_BYTES_MAX = 900_000
CARTS_SHARE = 0.2           # of all events
OPEN_SHARE = 0.02           # of made-up users: those who may get an alert of a kind at once
APPEND_TIME = {'message.timestamp.type': 'LogAppendTime'}
_TICKS_A_SECOND = os.sysconf('SC_CLK_TCK')


# ---- figures --------------------------------------------------------------------------------------------------------

@dataclass
class Figure:
    """One number. `holds` is None where there is no target."""

    name: str
    value: float
    unit: str
    target: str = ''
    holds: bool | None = None

    def __str__(self) -> str:
        verdict = {None: '', True: f'   target {self.target}: holds', False: f'   target {self.target}: DOES NOT HOLD'}
        return f'{self.name:<58} {_number(self.value):>12} {self.unit}{verdict[self.holds]}'


class Report:
    """The figures of one bench, printed as they come."""

    def __init__(self, bench: str, options: argparse.Namespace) -> None:
        self.figures: list[Figure] = []
        self._bench = bench
        self._options = options
        say(f'== {bench}: ' + ' '.join(f'{name}={value}' for name, value in vars(options).items() if name != 'json'))

    def add(self, name: str, value: float, unit: str, at_most: float | None = None,
            at_least: float | None = None) -> None:
        """A figure and, with one of the bounds, its target."""
        figure = Figure(name, float(value), unit)
        if at_most is not None:
            figure.target, figure.holds = f'<= {_number(at_most)}', bool(value <= at_most)
        elif at_least is not None:
            figure.target, figure.holds = f'>= {_number(at_least)}', bool(value >= at_least)
        self.figures.append(figure)
        say(str(figure))

    def spread(self, name: str, values: Sequence[float], unit: str, **target: float) -> None:
        """The median as a figure, with the smallest and the largest in its name."""
        self.add(f'{name} ({_number(min(values))} .. {_number(max(values))}, {len(values)} runs)',
                 statistics.median(values), unit, **target)

    def end(self) -> int:
        """Write the JSON, if asked to; return the exit code."""
        if self._options.json:
            sizes = {name: value for name, value in vars(self._options).items() if name != 'json'}
            Path(self._options.json).write_text(json.dumps(
                {'bench': self._bench, 'options': sizes, 'figures': [vars(figure) for figure in self.figures]},
                indent=2, default=str) + '\n')
        return int(any(figure.holds is False for figure in self.figures))


def _number(value: float) -> str:
    return f'{value:,.0f}' if abs(value) >= 1000 or value == int(value) else f'{value:,.3g}'


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A bench's command line, with what all of them take."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument('--json', help='write the figures there')
    made.add_argument('--set', dest='settings', action='append', default=[], metavar='NAME=VALUE',
                      help='any setting of the worker')
    return made


def main(bench: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> None:
    """Run it; SIGTERM ends it as Ctrl-C does, so that whatever it started is stopped."""
    logging.getLogger('aiokafka').setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(bench(options))


# ---- broker, topics, workers ----------------------------------------------------------------------------------------

@contextlib.contextmanager
def broker(properties: Mapping[str, str] | None = None) -> Iterator[tuple[str, Path]]:
    """A broker of its own: its address, and a folder for what else a bench writes."""
    from deploy.local.parts import Kafka
    with TemporaryDirectory(prefix='stream-bench-') as folder, \
            Kafka(Path(folder) / 'kafka', properties=properties) as kafka:
        yield kafka.brokers, Path(folder)


def shop(brokers: str, folder: Path, options: argparse.Namespace, **settings: Any) -> Shop:
    """A shop whose workers have the defaults of the settings, but what is given here and on the command line."""
    kept = ('partitions', 'session_timeout_ms', 'commit_interval_ms', 'merge_wait_ms')
    defaults = {name: Settings.model_fields[name].default for name in kept}
    given = {}
    for text in options.settings:
        name, _, value = text.partition('=')
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    return Shop(brokers, 'bench', folder, **defaults | settings | given)


def changelog_of(of: Shop) -> str:
    """Name of the shop's changelog."""
    return changelog_topic(Settings(**of.settings))


def output_topics(of: Shop) -> list[str]:
    """Where scores and decisions go."""
    return [of.settings['alerts_topic'], *([of.settings['scores_topic']] if of.settings.get('publish') else [])]


def make_topics(of: Shop, **more: Mapping[str, str]) -> None:
    """Create the worker's topics; `more` adds to the configuration, by role (`dead_letters` for dead letters)."""
    async def make() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=of.brokers)
        await admin.start()
        try:
            answer: Any = await admin.create_topics([
                NewTopic(topic.name, of.partitions, 1, topic_configs={
                    **topic.config, **more.get(topic.role.replace(' ', '_'), {})})
                for topic in wanted_topics(Settings(**of.settings))])
            for name, error_code, message in answer.topic_errors:
                assert error_code == 0, f'{name}: {message}'
        finally:
            await admin.close()
    asyncio.run(make())


@contextlib.contextmanager
def stopped(workers: Sequence[Worker]) -> Iterator[None]:
    """The processes stand still (SIGSTOP), for less than their session: nothing is read meanwhile."""
    for worker in workers:
        worker.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGCONT)


def wait_balanced(workers: Sequence[Worker], partitions: int) -> None:
    """Until all partitions run, on all of the workers."""
    def balanced() -> bool:
        lanes = [[lane for lane in worker.get('/status')['lanes'] if lane['state'] == 'running'] for worker in workers]
        return all(lanes) and sum(map(len, lanes)) == partitions and all(worker.get('/ready')['ready']
                                                                         for worker in workers)
    wait_for(balanced, 'partitions on every worker', 120.0)


# ---- processes ------------------------------------------------------------------------------------------------------

def cpu_s(worker: Worker) -> float:
    """Seconds of CPU that the process has used so far."""
    fields = Path(f'/proc/{worker.process.pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND


def memory_mib(worker: Worker, which: str = 'VmRSS') -> float:
    """Memory of the process as it is (VmRSS), or the most that it ever was (VmHWM)."""
    lines = Path(f'/proc/{worker.process.pid}/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1]) / 1024


def disk_bytes(folder: Path) -> int:
    """Bytes of disk that the files below a folder take."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob('*') if path.is_file())


# ---- shoppers and their events --------------------------------------------------------------------------------------

class Shoppers:
    """Made-up users, and on which partition each is.

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
    """A plausible event; `number` makes its id. Both have the same width for all numbers."""
    item = rng.randrange(2_000)
    head = b'{"event_id":"%016d","user_id":"%s","ts":%013d,' % (number, user, ts_ms)
    if source is Source.CLICKS:
        return head + b'"type":"%s","item_id":"i%05d","category":"c%02d","session_id":"s%08x"}' % (
            b'search' if item % 11 == 0 else b'view', item, item % 40, rng.getrandbits(32))
    kind = b'"purchase","order_id":"o%08x"' % rng.getrandbits(32) if item % 4 == 0 else b'"add_to_cart"'
    return head + b'"type":%s,"item_id":"i%05d","category":"c%02d","price":%d.9,"quantity":1}' % (
        kind, item, item % 40, 3 + item % 90)


class RawBatch:
    """A finished record batch, in the shape in which aiokafka's producer (not an idempotent one) takes a builder."""

    def __init__(self, data: bytes, records: int) -> None:
        self._data, self._records = data, records

    def close(self) -> None:
        """It is."""

    def closed(self) -> bool:
        return True

    def size(self) -> int:
        return len(self._data)

    def record_count(self) -> int:
        return self._records

    def _build(self) -> bytes:
        return self._data


class Template:
    """A batch of events that is sent again and again with other ids and times, for a tenth of the price of a new one.

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
        """The events with ids from `number` on, all of one moment."""
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
    """Send batches, a partition's in order; return how many records that were."""
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
    """Put at least so many events into the inputs, a millisecond of event time after one another by rounds."""
    async def fill() -> int:
        start_ms = int(time.time() * 1000) - HOUR_MS
        async with producing(of.brokers) as producer:
            rounds = -(-events // templates.round_events)
            return await send_all(producer, (batch for number in range(rounds)
                                             for batch in templates.round(start_ms + number)))
    return asyncio.run(fill())


# ---- users' records -------------------------------------------------------------------------------------------------

class Pool:
    """Users whom the simulator made, with `events` events each in their windows; any number of others are made of them.

    A copy has ids of its own; its items and baskets are those of the original, moved by a number of its own, so that
    what repeats within a user repeats still; its times are moved by whole days. Hashes stay hashes: nothing of it can
    be compressed better than the original. It has a tier, and has had its alerts, so that it does not get them all when
    it is scored for the first time: `OPEN_SHARE` of the cool-downs are over.

    record_bytes   mean length of a record
    """

    def __init__(self, events: int, users_max: int = 200, seed: int = 1) -> None:
        found: dict[str, list[Event]] = defaultdict(list)
        decode, whole = Decoder(EventRules()), 0
        days = 180 if events < 60 else 540
        for line in simulate(SimulatorOptions(shoppers=users_max * 3, days=days, seed=seed)).lines():
            event = decode(line)
            if not isinstance(event, Event):
                continue
            run = found[event.user_id]
            if len(run) < events + (events >> 2):
                run.append(event)
                whole += len(run) == events + (events >> 2)
                if whole == users_max:
                    break
        self._records: list[bytes] = []
        for user_id, run in found.items():
            if len(run) == events + (events >> 2):
                user = User(user_id)
                for offset, event in enumerate(run):
                    event.offset = offset       # below nothing that was folded: sources count together here
                    fold(user, [event], WindowLimits(events_max=events, silence_ms=WindowLimits().silence_ms))
                self._records.append(encode(user))
        assert self._records, 'the simulator made nobody with so many events'
        self.record_bytes = statistics.fmean(map(len, self._records))

    def records(self, count: int, newest_ms: int, step: int, rng: np.random.Generator) -> list[bytes]:
        """So many different records, their newest events up to two days before `newest_ms`."""
        made: list[bytes] = [b''] * count
        kinds = len(self._records)
        for kind in range(min(kinds, count)):
            places = range(kind, count, kinds)
            for place, record in zip(places, self._copies(self._records[kind], len(places), newest_ms, step, rng),
                                     strict=True):
                made[place] = record
        return made

    @staticmethod
    def _copies(record: bytes, count: int, newest_ms: int, step: int, rng: np.random.Generator) -> list[bytes]:
        width = len(record)
        data = np.tile(np.frombuffer(record, np.uint8), (count, 1))
        header = np.ndarray((count,), HEADER_DTYPE, data, 0, (width,))
        events, days = int(header['events'][0]), int(header['days'][0])
        ids_at = HEADER.size + days * DAY_DTYPE.itemsize + int(header['outbox_bytes'][0])
        rows = np.ndarray((count, events), ROW_DTYPE, data, ids_at + 8 * events, (width, ROW_DTYPE.itemsize))
        buckets = np.ndarray((count, days), DAY_DTYPE, data, HEADER.size, (width, DAY_DTYPE.itemsize))
        data[:, ids_at:ids_at + 8 * events] = rng.integers(0, 256, (count, 8 * events), np.uint8)
        for name in ('item', 'basket'):
            moved = rows[name] ^ rng.integers(1, 1 << 32, (count, 1), np.uint32)
            rows[name] = np.where(rows[name] == 0, 0, moved)
        ends = newest_ms - rng.integers(HOUR_MS, 2 * DAY_MS, count)
        shift_days = (ends - header['last_seen_ms']) // DAY_MS
        shift_ms = shift_days * DAY_MS
        rows['ts_ms'] += shift_ms[:, None]
        buckets['day'] += shift_days[:, None].astype(np.uint16)
        for name in ('first_seen_ms', 'last_seen_ms', 'last_order_ms', 'due_ms'):
            header[name] += np.where(header[name] == 0, 0, shift_ms)
        header['next_offset'] = 0
        header['tier'] = 1          # by no model: the first one that scores sets it anew, silently
        for name, cooldown_ms in (('intent_at_ms', DAY_MS), ('churn_at_ms', 7 * DAY_MS)):
            header[name] = newest_ms - rng.integers(0, round(cooldown_ms / (1 - OPEN_SHARE)), count)
        header['step'] = step
        text = data.tobytes()
        return [text[at:at + width] for at in range(0, len(text), width)]


def fill_changelog(of: Shop, shoppers: Shoppers, pool: Pool, records: int, step_users: int = 500, seed: int = 1) -> int:
    """Write the changelog of a worker whose users came up in turn, `records` records in all; return its bytes.

    Steps have `step_users` users and end with the lane's record, as the worker writes them.
    """
    topic, now_ms = changelog_of(of), int(time.time() * 1000)
    rng = np.random.default_rng(seed)
    size = 0

    def batches() -> Iterator[tuple[str, int, BatchBuilder]]:
        nonlocal size
        at, step = [0] * of.partitions, 0
        shares = [records * len(numbers) // shoppers.count for numbers in shoppers.of]
        while at != shares:
            step += 1
            for partition, numbers in enumerate(shoppers.of):
                count = min(step_users, len(numbers), shares[partition] - at[partition])
                if not count:
                    continue
                made = pool.records(count, now_ms, step, rng)
                builder = BatchBuilder(BATCH_BYTES_MAX, 0)
                whose = [shoppers.ids[numbers[(at[partition] + index) % len(numbers)]] for index in range(count)]
                at[partition] += count
                lane = LaneRecord(step, 1, [0, 0], [now_ms, now_ms], step - (at[partition] < shares[partition]))
                for key, value in [*zip(whose, made, strict=True), (LANE_KEY, orjson.dumps(_plain(lane)))]:
                    if builder.append(timestamp=now_ms, key=key, value=value) is None:
                        yield topic, partition, builder
                        builder = BatchBuilder(BATCH_BYTES_MAX, 0)
                        builder.append(timestamp=now_ms, key=key, value=value)
                    size += len(key) + len(value)
                yield topic, partition, builder

    async def fill() -> None:
        async with producing(of.brokers) as producer:
            await send_all(producer, batches())
    asyncio.run(fill())
    return size


def _plain(lane: LaneRecord) -> dict[str, Any]:
    return {name: getattr(lane, name) for name in lane.__struct_fields__}


# ---- an open loop, and how late its events came out ------------------------------------------------------------------

@dataclass
class Sent:
    """What an open loop sent: for each batch, where its first record was appended, when, and whose events it holds.

    late_ms    how much later than planned each batch was appended: what the loop itself, or the broker, held up
    """

    batches: list[tuple[int, int, int, int, list[bytes]]] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)

    @property
    def events(self) -> int:
        return sum(len(users) for *_, users in self.batches)


async def drive(of: Shop, shoppers: Shoppers, rate: float, seconds: float, numbers: int = 0, tick_s: float = 0.02,
                seed: int = 1, each_partition: bool = False) -> Sent:
    """Send events at a rate that does not slow down when anybody else does; the inputs keep the time of appending.

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
    """Forget a task that is done; an error stays, and comes out at the end."""
    def end(task: asyncio.Task) -> None:
        if not task.cancelled() and task.exception() is None:
            tasks.discard(task)
    return end


@dataclass
class Output:
    """One message: its user, when it was appended, and the first offsets that its user's state had not folded."""

    partition: int
    user: bytes
    at_ms: int
    clicks: int
    carts: int
    timer: bool
    topic: str


def read_outputs(of: Shop, topics: Iterable[str]) -> list[Output]:
    """Everything in these topics, by topic, partition and offset."""
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
    """For each event, from its appending to that of the first output whose cause covers it; and how many have none.

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


class Lag:
    """How far the group's commits are behind the inputs' ends; keeps its connections."""

    def __init__(self, of: Shop) -> None:
        self._of = of
        self._consumer = AIOKafkaConsumer(bootstrap_servers=of.brokers)
        self._admin = AIOKafkaAdminClient(bootstrap_servers=of.brokers)
        self._tps = [TopicPartition(topic, number) for topic in of.inputs for number in range(of.partitions)]

    async def __aenter__(self) -> Self:
        await self._consumer.start()
        await self._admin.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._admin.close()
        await self._consumer.stop()

    async def events(self) -> int:
        """Records that are not committed."""
        committed = await self._admin.list_consumer_group_offsets(self._of.name)
        ends = await self._consumer.end_offsets(self._tps)
        return sum(ends[tp] - max(committed[tp].offset if tp in committed else 0, 0) for tp in self._tps)


async def wait_done(of: Shop, deadline_s: float = 600.0) -> None:
    """Until everything that is in the inputs is committed. Errors: AssertionError after the deadline."""
    until = time.monotonic() + deadline_s
    async with Lag(of) as lag:
        while left := await lag.events():
            for worker in of.workers:
                worker.check()
            assert time.monotonic() < until, f'{left:,} events are left after {deadline_s:.0f} s'
            await asyncio.sleep(0.2)


def drain_s(of: Shop, workers: Sequence[Worker], templates: Templates, events: int) -> tuple[int, float, float]:
    """Put a backlog into the inputs while the workers stand still, and let them work it off.

    Returns   events, seconds until the last commit, seconds of CPU that all workers used meanwhile
    """
    with stopped(workers):
        sent = prefill(of, templates, events)
        before = sum(map(cpu_s, workers))
        began = time.monotonic()
    asyncio.run(wait_done(of))
    return sent, time.monotonic() - began, sum(map(cpu_s, workers)) - before
