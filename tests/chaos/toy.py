"""A minimal worker in memory that keeps the promises, and can be made to break them.

It is what the auditor is tried on: it makes logs as the real worker does, from the product's own core, with crashes in
between. `bugs` names promises to break, at the place in the code where a real worker would.
"""
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import orjson

from stream.core.decide import Kind
from stream.core.driver import Step, StepDriver
from stream.core.events import Decoder, Event, EventRules
from stream.core.features import Batch
from stream.core.layout import DAY_MS, NO_TIMER_MS, WindowLimits
from stream.core.messages import ModelInfo
from stream.core.outbox import Message, unpack_outbox
from stream.core.rules import Publish, StepRules
from stream.core.scores import Outputs
from stream.core.step_scorer import StepScorer
from stream.core.user import User, decode, encode
from tests.chaos.log import SOURCES, Record, Run, Sample, Topic
from tests.chaos.reference import partition_of
from tests.chaos.workload import Input

GROUP = 'toy'
LANE_KEY = b'\xfflane'


class CrashError(Exception):
    """The process was killed."""


class WildScorer:
    """Scores that jump with every event, so that many decisions are taken; the same input gives the same scores."""

    model = ModelInfo('wild', '1', 'ab' * 32)
    tier_names = tuple('01234')
    trained_on = 'nothing'
    rows_max = 256

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        return [self._outputs(batch) for batch in batches]

    async def close(self) -> None:
        """Nothing is held."""

    def __init__(self, mixed_up: Callable[[], bool] = lambda: False) -> None:
        self._mixed_up = mixed_up       # asked per batch, whether its rows change places

    def _outputs(self, batch: Batch) -> Outputs:
        noise = np.abs(batch.counters.astype(np.float64).sum(axis=1, keepdims=True)) * 1e3
        if self._mixed_up():
            noise[:batch.windows] = noise[:batch.windows][::-1].copy()
        draws = [(noise * factor) % 1 for factor in (1, 7, 13)]
        tiers = np.exp(4 * np.cos(noise * np.arange(1, 6)))
        return Outputs(draws[0], tiers / tiers.sum(axis=1, keepdims=True), draws[2] * 900, draws[1], batch.row_id)


class MemoryLog:
    """Topics as lists. A record gets the next offset of its partition."""

    def __init__(self, partitions: int) -> None:
        self.partitions = partitions
        self.names: dict[Topic, str] = dict(zip(SOURCES, SOURCES, strict=True))
        self.topics: dict[tuple[Topic, int], list[Record]] = defaultdict(list)

    def append(self, topic: Topic, partition: int, key: bytes | None, value: bytes | None,
               headers: Iterable[tuple[str, bytes]] = (), timestamp_ms: int = 0) -> None:
        """Write one record."""
        records = self.topics[topic, partition]
        records.append(Record(records[-1].offset + 1 if records else 0, timestamp_ms, key, value, tuple(headers)))

    def end(self, topic: Topic, partition: int) -> int:
        """The end offset."""
        records = self.topics[topic, partition]
        return records[-1].offset + 1 if records else 0

    async def read(self, topic: Topic, partition: int) -> AsyncIterator[Record]:
        for record in self.topics[topic, partition]:
            yield record


@dataclass
class MemoryStore:
    """A database as a dict."""

    name: str
    partition: int
    owner: bool = True
    users: dict[bytes, bytes] = field(default_factory=dict)
    timers: set[bytes] = field(default_factory=set)

    def records(self) -> Iterable[tuple[bytes, bytes]]:
        return [*sorted(self.users.items()), (b'\xffmeta', b'{}')]

    def due(self) -> Iterable[bytes]:
        return sorted(self.timers)


@dataclass
class Outcome:
    """The result of a toy run."""

    log: MemoryLog
    run: Run
    stores: list[MemoryStore]


class Toy:
    """One lane per partition, with occasional crashes.

    crashes   chance of a crash after a stage of a step
    bugs      promises to break: see the calls of `bug`
    """

    def __init__(self, inputs: list[Input], partitions: int = 2, seed: int = 1, crashes: float = 0.02,
                 publish: Publish = 'changes', bugs: Iterable[str] = ()) -> None:
        self.log = MemoryLog(partitions)
        self.run = Run(clean=crashes == 0)
        self.limits = WindowLimits(24, 200 * DAY_MS)
        self._crashes, self._bugs = crashes, set(bugs)
        self._publish: Publish = publish
        self._asked: dict[str, int] = defaultdict(int)
        self._rng = random.Random(seed)
        self._decoder = Decoder(EventRules())
        for entry in inputs:
            partition = entry.partition if entry.partition is not None else partition_of(entry.key or b'', partitions)
            self.log.append(entry.topic, partition, entry.key, entry.value, entry.headers, entry.timestamp_ms)
        self._committed: dict[tuple[Topic, int], int] = {}
        self._stores = [MemoryStore(f'users-{partition}', partition) for partition in range(partitions)]

    async def work(self) -> Outcome:
        """Consume everything, with all crashes and recoveries."""
        for partition in range(self.log.partitions):
            while True:
                try:
                    await _Lane(self, partition).work()
                    break
                except CrashError:
                    continue
        self.sample()
        return Outcome(self.log, self.run, self._stores)

    def sample(self) -> None:
        """What an observer sees at this moment."""
        topics: tuple[Topic, ...] = (*SOURCES, 'alerts', 'scores', 'dead_letters', 'changelog')
        ends: dict[tuple[Topic, int], int] = {
            (topic, place): self.log.end(topic, place) for topic in topics for place in range(self.log.partitions)}
        self.run.samples.append(Sample(float(len(self.run.samples)) / 100, dict(self._committed), ends))

    def bug(self, name: str, every: int = 1) -> bool:
        """Whether to break a promise now: true on every `every`-th call."""
        if name not in self._bugs:
            return False
        self._asked[name] += 1
        return self._asked[name] % every == 0

    def crash(self) -> None:
        """Possibly crash here."""
        if self._rng.random() < self._crashes:
            raise CrashError


class _Lane:
    """The owner of one partition, from its recovery to its crash."""

    def __init__(self, toy: Toy, partition: int) -> None:
        self._toy, self._partition, self._log = toy, partition, toy.log
        self._store = toy._stores[partition]
        self._rng = toy._rng
        self._scorer = WildScorer(lambda: toy.bug('swap_rows', 30))
        lane = {'step': 0, 'positions': [0, 0], 'stream_ms': [0, 0]}
        unsent: dict[bytes, bytes] = {}
        newest = 0
        if self._rng.random() < 0.3:        # an emptied data directory
            self._store.users, self._store.timers = {}, set()
        for record in self._log.topics['changelog', partition]:
            assert record.key is not None and record.value is not None
            if record.key == LANE_KEY:
                lane = orjson.loads(record.value)
                continue
            self._put(record.key, record.value)
            step = decode('', record.value).step
            if step > newest:
                newest, unsent = step, {}
            unsent[record.key] = record.value
        rules = StepRules(limits=toy.limits, publish=toy._publish, reasons_rows_max=0)
        self._driver, self._step_scorer = StepDriver(toy.limits), StepScorer(rules, self._scorer)
        self._driver.number = max(lane['step'], newest)
        self._stream_ms = lane['stream_ms']
        self._lane_positions = lane['positions']
        self._positions = [toy._committed.get((topic, partition), 0) for topic in SOURCES]
        self._letters: list[tuple[bytes, bytes | None, list[tuple[str, bytes]]]] = []
        if not toy.bug('no_resend'):
            for user in [decode(key.decode(), record) for key, record in unsent.items()]:
                self._send(unpack_outbox(user))

    async def work(self) -> None:
        inputs = [self._log.topics[topic, self._partition] for topic in SOURCES]
        while any(self._positions[source] < len(inputs[source]) for source in (0, 1)):
            starts = list(self._positions)
            stops = [min(start + self._rng.randint(0, most), len(inputs[source]))
                     for source, (start, most) in enumerate(zip(starts, (60, 10), strict=True))]
            if stops == starts:
                continue
            if self._toy.bug('skip_block', 20):
                self._positions = stops
                continue
            run = [(record, source) for source in (0, 1) for record in inputs[source][starts[source]:stops[source]]]
            await self._run(sorted(run, key=lambda entry: entry[0].timestamp_ms), stops)
        if not self._toy.bug('no_sweep'):
            await self._sweeps(max(self._stream_ms))

    async def _run(self, records: list[tuple[Record, int]], stops: list[int]) -> None:
        """Records of both topics, with their sources, in the order of their times."""
        toy = self._toy
        if toy.bug('commit_first'):
            self._commit(stops)
        events = self._decode(records)
        if toy.bug('lane_first', 30):
            self._lane_record(stops)
        toy.crash()
        if toy.bug('drop_event', 20) and events:
            del events[self._rng.randrange(len(events))]
        users = self._load(event.user_id for event in events)
        if toy.bug('fold_redelivered'):
            for user in users.values():
                user.next_offset = [0, 0]
        self._send_letters()
        for step in self._steps(users, events):
            await self._take(step, None)
        await self._take(next(self._driver.run({}, [])), stops)
        toy.crash()
        self._commit(stops)
        toy.crash()
        if not toy.bug('no_sweep'):
            others = [self._stream_ms[other] for other in (0, 1)
                      if self._positions[other] < len(self._log.topics[SOURCES[other], self._partition])]
            await self._sweeps(min(others, default=max(self._stream_ms)))

    def _steps(self, users: dict[str, User], events: list[Event]) -> Iterator:
        if self._toy.bug('wrong_timer'):
            for user in users.values():
                user.due_ms = NO_TIMER_MS
        return self._driver.run(users, events) if events else iter(())

    def _decode(self, records: list[tuple[Record, int]]) -> list[Event]:
        events = []
        for record, source in records:
            outcome = self._toy._decoder(record.value, record.key, record.timestamp_ms)
            misrouted = isinstance(outcome, Event) and (
                partition_of(outcome.user_id.encode(), self._log.partitions) != self._partition)
            if isinstance(outcome, Event) and not misrouted:
                outcome.source, outcome.offset = source, record.offset
                events.append(outcome)
                self._stream_ms[source] = max(self._stream_ms[source], outcome.ts_ms)
                continue
            reason, detail = ('misrouted', '?') if isinstance(outcome, Event) else (outcome.reason, outcome.detail)
            place = {'topic': SOURCES[source], 'partition': self._partition, 'offset': record.offset,
                     'timestamp_ms': record.timestamp_ms, 'reason': reason, 'detail': detail}
            headers = [*record.headers, *((f'stream_{name}', str(value).encode()) for name, value in place.items())]
            if record.key is not None:
                headers.append(('stream_key', record.key))
            key = f'{SOURCES[source]}-{self._partition}-{record.offset}'.encode()
            self._letters.append((key, record.value, headers))
        return events

    def _send_letters(self) -> None:
        for key, value, headers in self._letters:
            if not self._toy.bug('skip_dead_letter', 10):
                self._log.append('dead_letters', self._partition, key, value, headers)
        self._letters = []

    def _load(self, user_ids: Iterable[str]) -> dict[str, User]:
        users = {}
        for user_id in dict.fromkeys(user_ids):
            record = self._store.users.get(user_id.encode())
            users[user_id] = User(user_id) if record is None else decode(user_id, record)
        return users

    async def _sweeps(self, clock_ms: int) -> None:
        while True:
            due = sorted(key for key in self._store.timers if int.from_bytes(key[:8], 'big') <= clock_ms)
            if not due:
                return
            users = self._load(key[8:].decode() for key in due[:50])
            await self._take(self._driver.sweep(users.values()), None)

    async def _take(self, step: Step, done: list[int] | None) -> None:
        """One step. `done`: the positions of a run that ends with it."""
        toy, log, partition = self._toy, self._log, self._partition
        touched = step.touched
        scored, = await self._step_scorer.score([step])
        toy.crash()
        if touched and toy.bug('forget_counters', 90):
            touched[0].user.applied -= 1
        if touched and toy.bug('wrong_window', 90):
            touched[0].user.rows[:8] = bytes(8)
        if toy.bug('decide_twice', 50):
            for entry in touched:
                entry.user.decisions += 1
        changes = [(entry.user.user_id.encode(), encode(entry.user)) for entry in touched]
        if len(changes) > 1 and toy.bug('swap_users', 40):
            (one, first), (other, second), *rest = changes
            changes = [(one, second), (other, first), *rest]
        for key, record in changes:
            log.append('changelog', partition, key, record)
            if self._rng.random() < 0.2:
                toy.crash()
        self._lane_record(done)
        toy.crash()
        messages = list(scored.messages)
        if toy.bug('unordered_outputs'):
            messages.reverse()
        self._send(message for message in messages if not toy.bug('skip_output', 50))
        toy.crash()
        for key, record in changes:
            if not toy.bug('wrong_store', 50):
                self._put(key, record)
        toy.crash()

    def _lane_record(self, done: list[int] | None) -> None:
        self._lane_positions = done or self._lane_positions
        self._log.append('changelog', self._partition, LANE_KEY, orjson.dumps(
            {'step': self._driver.number, 'generation': 1, 'positions': self._lane_positions,
             'stream_ms': self._stream_ms}))

    def _send(self, messages: Iterable[Message]) -> None:
        for message in messages:
            topic: Topic = 'scores' if message.kind is Kind.SCORES else 'alerts'
            self._log.append(topic, self._partition, message.key, message.value,
                             cloudevents_headers(message.value, f'/stream/{GROUP}'))
            if self._rng.random() < 0.2:
                self._toy.crash()

    def _put(self, key: bytes, record: bytes) -> None:
        before = self._store.users.get(key)
        if before is not None:
            self._store.timers.discard(decode('', before).due_ms.to_bytes(8, 'big') + key)
        self._store.users[key] = record
        due_ms = decode('', record).due_ms
        if due_ms != NO_TIMER_MS:
            self._store.timers.add(due_ms.to_bytes(8, 'big') + key)

    def _commit(self, stops: list[int]) -> None:
        self._positions = list(stops)
        for topic, stop in zip(SOURCES, stops, strict=True):
            self._toy._committed[topic, self._partition] = stop
        self._toy.sample()


def cloudevents_headers(message: bytes, source: str) -> list[tuple[str, bytes]]:
    """The binary-mode CloudEvents headers of a message (Kafka protocol binding 1.0.2)."""
    value = orjson.loads(message)
    time = datetime.fromtimestamp(value['as_of_ms'] / 1000, UTC).isoformat(timespec='milliseconds')
    return [(name, text.encode()) for name, text in (
        ('ce_specversion', '1.0'), ('ce_id', value['id']), ('ce_type', value['type']), ('ce_source', source),
        ('ce_time', time.replace('+00:00', 'Z')), ('ce_subject', value['user_id']),
        ('content-type', 'application/json'))]
