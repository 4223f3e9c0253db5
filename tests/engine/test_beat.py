"""Beats with a fake Kafka: the order of the sends, and the state after a worker dies at any point of a beat."""
import asyncio
import gc
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaTimeoutError

from stream.core.events import Decoder, EventRules
from stream.core.layout import DAY_MS, WindowLimits
from stream.core.outbox import Message
from stream.core.partitioners import partition
from stream.core.rules import StepRules
from stream.core.user import Change, User, encode
from stream.engine import beat, writer
from stream.engine.beat import Beats
from stream.engine.blocks import Block
from stream.engine.lane import Lane, LaneRules, Tools
from stream.engine.publisher import Record, Sending
from stream.errors import KafkaError, ModelError, ScorerUnavailable
from stream.metrics import Metrics
from stream.scoring.constant import ConstantScorer
from stream.state.store import LaneRecord, Memory, Meta, PartitionStore

CLICKS = TopicPartition('clicks', 0)
NOW_MS = 1_770_000_000_000
RULES = LaneRules(
    steps=StepRules(limits=WindowLimits(silence_ms=(DAY_MS,)), publish='all', reasons_rows_max=0), digest='',
    partitioner='none', partitions=1, wall_clock=False, clock_grace_ms=0, clock_idle_ms_max=0, merge_wait_ms=0,
    blocks_ahead_max=100, block_events_max=1, events_in_flight_max=100, users_cached_bytes=1 << 20, sweep_users_max=3,
    changelog='changelog', alerts='alerts', scores='scores',
    dead_letters='dead', journal='', source='/stream/test')


class FakeKafka:
    """Topics in memory. Stands for the consumer and for the publisher, which acknowledges when `gates` allow it.

    gates   by topic, or by (topic, partition)
    """

    def __init__(self, partitions: int = 1) -> None:
        tps = [TopicPartition(topic, number) for topic in ('clicks', 'carts') for number in range(partitions)]
        self.starts = dict.fromkeys(tps, 0)
        self.epochs = dict.fromkeys(tps, 1)
        self.topics: dict[str, list[Record]] = {name: [] for name in ('changelog', 'alerts', 'scores', 'dead')}
        self.sends: list[str] = []
        self.places: list[tuple[str, int]] = []
        self.gates: dict[Any, asyncio.Event] = {}

    def seek_now(self, tp: TopicPartition, position: int) -> None:
        raise AssertionError('nothing gets lost on the way here')

    def end_offset(self, tp: TopicPartition) -> int:
        return 0

    async def begin(self, topic: str, partition: int, records: list[Record]) -> Sending:
        assert records
        self.sends.append(topic)
        self.places.append((topic, partition))
        self.topics[topic] += records
        end = len(self.topics[topic])

        async def acknowledge() -> int:
            for gate in (topic, (topic, partition)):
                if gate in self.gates:
                    await self.gates[gate].wait()
            return end
        return Sending(asyncio.create_task(acknowledge()), f'{topic}-{partition}')

    async def send(self, topic: str, partition: int, records: list[Record]) -> int:
        return await (await self.begin(topic, partition, records)).end()

    async def begin_messages(self, topic: str, partition: int, messages: list[Message], source: bytes) -> Sending:
        return await self.begin(topic, partition, [(message.key, message.value, []) for message in messages])


def record(offset: int, user: str, ts_ms: int, value: bytes | None = None) -> ConsumerRecord:
    event = json.dumps({'event_id': f'{user}-{offset}', 'user_id': user, 'ts': ts_ms, 'type': 'view'}).encode()
    return ConsumerRecord('clicks', 0, offset, ts_ms, 0, user.encode(), value or event, None, -1, -1, ())


def blocks() -> list[Block]:
    """Three blocks. In the second one, a timer becomes due and one record cannot be decoded."""
    made, offset = [], 0
    for number in range(3):
        records = []
        for index in range(8):
            ts_ms = NOW_MS + number * DAY_MS + index * DAY_MS // 6
            bad = b'{"broken' if number == 1 and index == 3 else None
            records.append(record(offset, f'u{index % 3}', ts_ms, bad))
            offset += 1
        made.append(Block('clicks', 0, 1, records[0].offset, offset, records))
    return made


def lanes_on(kafka: Any, stores: list[PartitionStore], scorer: ConstantScorer | None = None,
             rules: LaneRules = RULES) -> tuple[Beats, list[Lane]]:
    """One lane for each store, restored and ready to take part in the beats."""
    tools = Tools(rules, Decoder(EventRules()), scorer or ConstantScorer(), kafka, Metrics(), kafka)
    beats = Beats(tools)
    lanes = [Lane(number, 1, store, tools, (TopicPartition('clicks', number), TopicPartition('carts', number)),
                  beats.writer, beats.wake) for number, store in enumerate(stores)]
    for lane in lanes:
        beats.join(lane)
    return beats, lanes


def lane_on(kafka: Any, store: PartitionStore, scorer: ConstantScorer | None = None,
            rules: LaneRules = RULES) -> tuple[Beats, Lane]:
    beats, (lane,) = lanes_on(kafka, [store], scorer, rules)
    return beats, lane


@asynccontextmanager
async def running(beats: Beats, *awaited: Lane) -> AsyncIterator[asyncio.Task]:
    """Started beats. Waits until the lanes that are given take part."""
    task = beats.start()
    try:
        await until(lambda: all(lane.running for lane in awaited))
        yield task
    finally:
        if task.done():
            task.exception()
        else:
            await beats.stop(5)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(.005)


def on_a_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    import functools
    return functools.wraps(test)(lambda **given: asyncio.run(test(**given)))      # type: ignore[arg-type]


@on_a_loop
async def test_the_changelog_of_the_next_step_waits_for_the_outputs_of_this_one(store: PartitionStore):
    kafka = FakeKafka()
    gate = kafka.gates['scores'] = asyncio.Event()
    beats, lane = lane_on(kafka, store)
    async with running(beats):
        lane.admit(blocks()[0])
        lane.admit(blocks()[1])
        await until(lambda: 'scores' in kafka.sends)
        await asyncio.sleep(.1)         # nothing may happen, so there is no condition to wait for
        assert kafka.sends.count('changelog') == 1
        assert lane.done == [0, 0]
        gate.set()
        await until(lambda: lane.done == [16, 0])
        assert kafka.sends.count('changelog') > 2


@on_a_loop
async def test_what_comes_while_a_step_is_under_way_is_folded_as_one(store: PartitionStore):
    kafka = FakeKafka()
    kafka.gates['changelog'] = asyncio.Event()
    beats, lane = lane_on(kafka, store, rules=replace(RULES, block_events_max=100))
    async with running(beats):
        for offset in range(4):
            lane.admit(Block('clicks', 0, 1, offset, offset + 1, [record(offset, f'u{offset}', NOW_MS)]))
            await until(lambda: kafka.sends)
        assert len(kafka.topics['changelog']) == 2      # a user, and the lane's own
        kafka.gates['changelog'].set()
        await until(lambda: lane.done == [4, 0])
        assert kafka.sends == ['changelog', 'scores'] * 2
    assert store.meta.newest == 2


@on_a_loop
async def test_whoever_belongs_elsewhere_is_refused_with_a_timer_fired_before_or_not(store: PartitionStore):
    foreign = next(f'u{number}' for number in range(99) if partition('murmur2', b'u%d' % number, 2))
    user = User(foreign)
    user.step, user.last_seen_ms, user.due_ms = 1, NOW_MS - 2 * DAY_MS, NOW_MS - DAY_MS
    store.write([Change(foreign.encode(), encode(user), 0, user.due_ms, new=True)], Meta(0, LaneRecord(1), 1, []))
    native = next(f'u{number}' for number in range(99) if not partition('murmur2', b'u%d' % number, 2))
    kafka = FakeKafka()
    beats, lane = lane_on(kafka, store, rules=replace(RULES, partitioner='murmur2', partitions=2))
    async with running(beats):
        lane.admit(Block('clicks', 0, 1, 0, 1, [record(0, native, NOW_MS)]))
        await until(lambda: lane.done == [1, 0] and store.none_due(NOW_MS))
        lane.admit(Block('clicks', 0, 1, 1, 2, [record(1, foreign, NOW_MS + 1)]))
        await until(lambda: lane.done == [2, 0])
    assert [key for key, _, _ in kafka.topics['dead']] == [b'clicks-0-1']


@pytest.fixture
def stores(tmp_path: Path, memory: Memory) -> list[PartitionStore]:
    """Two."""
    return [PartitionStore(tmp_path / f'users-{number}', memory) for number in (10, 11)]


def block(partition: int, *records: ConsumerRecord) -> Block:
    return Block('clicks', partition, 1, records[0].offset, records[-1].offset + 1, records)


@on_a_loop
async def test_a_lane_waits_while_another_has_all_the_room(stores: list[PartitionStore]):
    kafka = FakeKafka(2)
    gate = kafka.gates['changelog'] = asyncio.Event()
    beats, (lane, other) = lanes_on(kafka, stores, rules=replace(RULES, events_in_flight_max=1))
    async with running(beats):
        lane.admit(block(0, record(0, 'u', NOW_MS)))
        await until(lambda: kafka.sends)
        other.admit(block(1, record(0, 'v', NOW_MS)))
        await until(lambda: other.queueing)
        assert other.done == [0, 0]
        gate.set()
        await until(lambda: other.done == [1, 0])
        assert not other.queueing


class Counting(ConstantScorer):
    """Counts how often it is asked, and refuses batches as told."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.refuses: Callable[[int], bool] = lambda rows: False

    async def score(self, batches: Any) -> Any:
        self.asked += 1
        if self.refuses(sum(batch.windows for batch in batches)):
            raise ModelError('refused.', 'see the log.')
        return await super().score(batches)


@on_a_loop
async def test_one_beat_scores_the_lanes_together_and_sends_for_all_before_it_waits(stores: list[PartitionStore]):
    kafka, scorer = FakeKafka(2), Counting()
    beats, lanes = lanes_on(kafka, stores, scorer)
    async with running(beats, *lanes):
        for number, lane in enumerate(lanes):
            lane.admit(block(number, record(0, f'u{number}', NOW_MS)))
        await until(lambda: [lane.done for lane in lanes] == [[1, 0], [1, 0]])
    assert scorer.asked == 1
    assert [topic for topic, _ in kafka.places[:4]] == ['changelog', 'changelog', 'scores', 'scores']
    assert {partition for _, partition in kafka.places[:2]} == {0, 1}


@on_a_loop
async def test_a_slow_partition_leaves_the_beat_and_follows_later(stores: list[PartitionStore]):
    kafka = FakeKafka(2)
    gate = kafka.gates['changelog', 1] = asyncio.Event()
    beats, (lane, slow) = lanes_on(kafka, stores)
    async with running(beats, lane, slow):
        for number in (0, 1):
            (lane, slow)[number].admit(block(number, record(0, f'u{number}', NOW_MS)))
        await until(lambda: lane.done == [1, 0])
        for offset in range(1, 4):      # the others go on
            lane.admit(block(0, record(offset, f'u{offset}', NOW_MS + offset)))
            await until(lambda: lane.done == [offset + 1, 0])       # noqa: B023 - awaited before the next turn
        assert slow.done == [0, 0]
        assert kafka.places.count(('scores', 1)) == 0
        gate.set()
        await until(lambda: slow.done == [1, 0])
    assert [store.meta.users for store in stores] == [4, 1]


@on_a_loop
async def test_a_lane_with_no_step_under_way_does_not_wait_for_the_step_of_a_slow_one(stores: list[PartitionStore]):
    kafka = FakeKafka(2)
    gate = kafka.gates['changelog', 1] = asyncio.Event()
    beats, (lane, slow) = lanes_on(kafka, stores)
    async with running(beats, lane, slow):
        slow.admit(block(1, record(0, 'u', NOW_MS)))
        await until(lambda: kafka.places)
        slow.admit(block(1, record(1, 'u', NOW_MS + 1)))
        slow.admit(block(1, record(2, 'u', NOW_MS + 2)))    # so much waits that it takes part in the next beat
        lane.admit(block(0, record(0, 'v', NOW_MS)))
        await until(lambda: lane.done == [1, 0])
        assert slow.done == [0, 0]
        gate.set()
        await until(lambda: slow.done == [3, 0])


@on_a_loop
async def test_a_step_that_sends_nothing_does_not_wait_for_the_outputs_of_a_slow_one(stores: list[PartitionStore]):
    kafka, scorer = FakeKafka(2), Alerting()
    gate = kafka.gates['alerts', 1] = asyncio.Event()
    rules = replace(RULES, block_events_max=10, steps=StepRules(publish='changes', reasons_rows_max=0))
    beats, (calm, slow) = lanes_on(kafka, stores, scorer, rules)
    async with running(beats, calm, slow):
        slow.admit(block(1, record(0, 'u', NOW_MS), record(1, 'u', NOW_MS + 1)))
        calm.admit(block(0, record(0, 'v', NOW_MS)))
        await until(lambda: calm.done == [1, 0])
        assert scorer.asked == 1
        assert slow.done == [0, 0]
        gate.set()
        await until(lambda: slow.done == [2, 0])


@on_a_loop
async def test_a_step_that_the_model_refuses_holds_up_its_own_lane_alone(stores: list[PartitionStore]):
    kafka, scorer = FakeKafka(2), Counting()
    scorer.refuses = lambda rows: rows > 1      # lane 0 has two users, lane 1 has one
    beats, (poisoned, lane) = lanes_on(kafka, stores, scorer, replace(RULES, block_events_max=10))
    async with running(beats, lane, poisoned):
        poisoned.admit(block(0, record(0, 'u', NOW_MS), record(1, 'v', NOW_MS)))
        lane.admit(block(1, record(0, 'w', NOW_MS)))
        await until(lambda: lane.done == [1, 0] and poisoned.holding)
        lane.admit(block(1, record(1, 'x', NOW_MS)))
        await until(lambda: lane.done == [2, 0])
        assert poisoned.done == [0, 0]
        scorer.refuses = lambda rows: False
        await until(lambda: poisoned.done == [2, 0])
    assert [store.meta.users for store in stores] == [2, 2]


@on_a_loop
async def test_a_slow_disk_is_read_in_threads(store: PartitionStore, monkeypatch: pytest.MonkeyPatch):
    threads, plain = [], store.load

    def slow(user_ids: list[str]) -> dict[str, User]:
        threads.append(threading.current_thread() is threading.main_thread())
        time.sleep(.05)     # stands for the disk
        return plain(user_ids)

    monkeypatch.setattr(store, 'load', slow)
    beats, lane = lane_on(FakeKafka(), store)
    async with running(beats):
        for offset in range(4):
            lane.admit(block(0, record(offset, f'u{offset}', NOW_MS + offset)))
            await until(lambda: lane.done == [offset + 1, 0])       # noqa: B023 - awaited before the next turn
    assert threads == [True, False, False, False]


class Alerting(ConstantScorer):
    """Raises an intent alert for every window with two slots. The call for its reasons waits for the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.asked = 0

    async def score(self, batches: Any) -> Any:
        self.asked += 1
        if self.asked == 2:
            await self.gate.wait()
        outputs = await super().score(batches)
        for batch, output in zip(batches, outputs, strict=True):
            slots = (batch.categories[..., 0] > 0).sum(axis=1, keepdims=True)
            output.purchase_intent = np.where(slots == 2, 0.9, 0.1).astype(np.float32)
        return outputs


@on_a_loop
async def test_only_the_lanes_with_an_alert_wait_for_reasons(stores: list[PartitionStore]):
    kafka, scorer = FakeKafka(2), Alerting()
    rules = replace(RULES, block_events_max=10, steps=StepRules(publish='changes'))
    beats, (alerting, lane) = lanes_on(kafka, stores, scorer, rules)
    async with running(beats, lane, alerting):
        alerting.admit(block(0, record(0, 'u', NOW_MS), record(1, 'u', NOW_MS + 1)))
        lane.admit(block(1, record(0, 'w', NOW_MS)))
        await until(lambda: lane.done == [1, 0] and scorer.asked == 2)
        lane.admit(block(1, record(1, 'x', NOW_MS + 2)))        # goes on meanwhile
        await until(lambda: lane.done == [2, 0])
        assert alerting.done == [0, 0]
        assert kafka.topics['alerts'] == []
        scorer.gate.set()
        await until(lambda: alerting.done == [2, 0])
    (_, alert, _), = kafka.topics['alerts']
    assert json.loads(alert or b'')['reasons']


class Unreasonable(Alerting):
    """Refuses to explain, as told: the calls with more rows than there are users of the step are for reasons."""

    def __init__(self) -> None:
        super().__init__()
        self.gate.set()
        self.refuses: Callable[[int], bool] = lambda rows: rows > 2

    async def score(self, batches: Any) -> Any:
        if self.refuses(sum(batch.windows for batch in batches)):
            raise ModelError('no reasons.', 'see the log.')
        return await super().score(batches)


@on_a_loop
async def test_a_lane_whose_reasons_are_refused_holds_up_no_other(stores: list[PartitionStore]):
    kafka, scorer = FakeKafka(2), Unreasonable()
    rules = replace(RULES, block_events_max=10, steps=StepRules(publish='changes'))
    beats, (alerting, lane) = lanes_on(kafka, stores, scorer, rules)
    async with running(beats, lane, alerting):
        alerting.admit(block(0, record(0, 'u', NOW_MS), record(1, 'u', NOW_MS + 1)))
        await until(lambda: alerting.holding)
        for offset in range(3):
            lane.admit(block(1, record(offset, f'w{offset}', NOW_MS + offset)))
            await until(lambda: lane.done == [offset + 1, 0])       # noqa: B023 - awaited before the next turn
        assert alerting.done == [0, 0]
        scorer.refuses = lambda rows: False
        await until(lambda: alerting.done == [2, 0])
        assert beats._scoring == 0


@on_a_loop
async def test_reasons_that_are_refused_for_two_lanes_are_asked_for_one_by_one(stores: list[PartitionStore]):
    kafka, scorer, asked = FakeKafka(2), Unreasonable(), list[int]()
    scorer.refuses = lambda rows: asked.append(rows) or rows == max(asked) > 2     # the call for both has the most rows
    rules = replace(RULES, block_events_max=10, steps=StepRules(publish='changes'))
    beats, lanes = lanes_on(kafka, stores, scorer, rules)
    async with running(beats, *lanes):
        for number, lane in enumerate(lanes):
            lane.admit(block(number, record(0, f'u{number}', NOW_MS), record(1, f'u{number}', NOW_MS + 1)))
        await until(lambda: [lane.done for lane in lanes] == [[2, 0], [2, 0]])
    assert asked[0] == 2
    assert asked[2:] == [asked[1] // 2] * 2
    assert all(json.loads(alert or b'')['reasons'] for _, alert, _ in kafka.topics['alerts'])
    assert len(kafka.topics['alerts']) == 2


@on_a_loop
async def test_small_runs_do_not_overtake_one_that_waits_for_room_again_and_again(
        stores: list[PartitionStore], tmp_path: Path, memory: Memory):
    kafka = FakeKafka(3)
    gate = kafka.gates['changelog', 0] = asyncio.Event()
    beats, (first, large, small) = lanes_on(
        kafka, [*stores, PartitionStore(tmp_path / 'users-12', memory)],
        rules=replace(RULES, block_events_max=10, events_in_flight_max=4))
    async with running(beats, first, large, small):
        first.admit(block(0, record(0, 'u', NOW_MS), record(1, 'u', NOW_MS + 1)))
        await until(lambda: kafka.sends)
        large.admit(block(1, *[record(offset, 'v', NOW_MS + offset) for offset in range(3)]))
        await until(lambda: large.queueing)
        for offset in range(2):     # the first one may have been ahead in turn
            small.admit(block(2, record(offset, 'w', NOW_MS + offset)))
            await until(lambda: small.queueing or small.done == [offset + 1, 0])     # noqa: B023 - awaited at once
        assert small.queueing
        gate.set()
        await until(lambda: [lane.done[0] for lane in (first, large, small)] == [2, 3, 2])


@on_a_loop
async def test_an_error_of_several_lanes_is_reported_once(stores: list[PartitionStore]):
    class Failing(FakeKafka):
        async def begin(self, topic: str, partition: int, records: list[Record]) -> Sending:
            sending = await super().begin(topic, partition, records)
            if topic != 'changelog':
                return sending
            future = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(.01, future.set_exception, KafkaTimeoutError())
            return Sending(future, topic)

    async def fail() -> None:
        beats, lanes = lanes_on(Failing(2), stores)
        async with running(beats, *lanes) as task:
            for number, lane in enumerate(lanes):
                lane.admit(block(number, record(0, f'u{number}', NOW_MS)))
            await until(task.done)
            assert isinstance(task.exception(), KafkaError)

    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    await fail()
    gc.collect()        # asyncio reports an error that nobody has looked at when its future goes
    await asyncio.sleep(.02)
    assert reported == []


@on_a_loop
async def test_the_timer_of_a_write_may_ring_while_the_beats_end_with_an_error(
        stores: list[PartitionStore], monkeypatch: pytest.MonkeyPatch):
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    kafka, reading = FakeKafka(2), threading.Event()
    monkeypatch.setattr(beat, 'READS_ON_LOOP_MAX', 0)
    monkeypatch.setattr(beat, 'WRITE_DELAY_S', .1)
    monkeypatch.setattr(stores[1], 'load', lambda users: reading.set() or time.sleep(.5) or {})
    beats, (lane, slow) = lanes_on(kafka, stores)
    async with running(beats, lane, slow) as task:
        lane.admit(block(0, record(0, 'u', NOW_MS)))
        await until(lambda: lane.done == [1, 0])        # the timer has begun
        slow.admit(block(1, record(0, 'v', NOW_MS)))
        await until(reading.is_set)
        monkeypatch.setattr(lane, 'look_up', lambda: 1 / 0)
        beats._scoring = 0
        lane.admit(block(0, record(1, 'u', NOW_MS)))
        await until(task.done)
        assert isinstance(task.exception(), ZeroDivisionError)
    assert reported == []


@on_a_loop
async def test_steps_are_written_later_and_many_at_once(store: PartitionStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(beat, 'WRITE_DELAY_S', 3600)
    kafka, writes = FakeKafka(), []
    plain = store.write
    monkeypatch.setattr(store, 'write', lambda changes, meta: (writes.append(len(changes)), plain(changes, meta)))
    beats, lane = lane_on(kafka, store)
    async with running(beats):
        lane.admit(block(0, record(0, 'u', NOW_MS)))
        await until(lambda: not store.none_due(NOW_MS + DAY_MS) and store.none_due(NOW_MS))     # has read its timers
        writes.clear()
        for offset in range(1, 5):
            lane.admit(block(0, record(offset, 'u', NOW_MS + offset)))
            await until(lambda: lane.done == [offset + 1, 0])       # noqa: B023 - awaited before the next turn
        assert writes == []
        assert store.load(['u'])['u'].applied == 1
    assert writes[0] == 1       # one user, whose newest record has all five events
    assert store.load(['u'])['u'].applied == 5
    assert store.meta.users == 1
    assert store.meta.newest == 5


@on_a_loop
async def test_no_beat_starts_while_too_much_is_unwritten(store: PartitionStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(beat, 'BYTES_MAX', 0)
    gate = threading.Event()
    plain = store.write
    monkeypatch.setattr(store, 'write', lambda changes, meta: (gate.wait(20), plain(changes, meta)))
    beats, lane = lane_on(FakeKafka(), store)
    async with running(beats):
        lane.admit(block(0, record(0, 'u', NOW_MS)))
        await until(lambda: lane.done == [1, 0])
        lane.admit(block(0, record(1, 'u', NOW_MS + 1)))
        lane.admit(block(0, record(2, 'u', NOW_MS + 2)))
        await until(lambda: beats.writer.bytes or lane.done != [1, 0])
        assert lane.done == [1, 0]
        gate.set()
        await until(lambda: lane.done == [3, 0])


@on_a_loop
async def test_a_write_that_takes_long_is_not_asked_for_again_and_again(store: PartitionStore,
                                                                      monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, 'BYTES_SOON', 0)
    gate, plain = threading.Event(), store.write
    beats, lane = lane_on(FakeKafka(), store)
    async with running(beats, lane):
        monkeypatch.setattr(store, 'write', lambda changes, meta: (gate.wait(20), plain(changes, meta)))
        for offset in range(30):
            lane.admit(block(0, record(offset, 'u', NOW_MS + offset)))
            await until(lambda: lane.done == [offset + 1, 0])       # noqa: B023 - awaited before the next turn
        assert len(asyncio.all_tasks()) < 20
        gate.set()
    assert store.load(['u'])['u'].applied == 30


@on_a_loop
async def test_a_lane_that_stops_leaves_nothing_to_send_again(store: PartitionStore, tmp_path: Path, memory: Memory):
    kafka = FakeKafka()
    beats, lane = lane_on(kafka, store)
    async with running(beats):
        lane.admit(blocks()[0])
        await until(lambda: lane.done == [8, 0])
    copy = PartitionStore(tmp_path / 'copy', memory)
    copy.apply([(key, value) for key, value, _ in kafka.topics['changelog']], len(kafka.topics['changelog']))
    assert copy.meta.unsent == []
    assert copy.meta.lane == store.meta.lane
    assert store.meta.changelog == len(kafka.topics['changelog'])


@on_a_loop
async def test_a_run_that_has_begun_is_finished_before_the_end(store: PartitionStore):
    """The journal has one entry for all its steps."""
    kafka = FakeKafka()
    kafka.topics['journal'] = []
    gate = kafka.gates['changelog'] = asyncio.Event()
    beats, lane = lane_on(kafka, store, rules=replace(RULES, journal='journal'))
    async with running(beats, lane):
        lane.admit(block(0, record(0, 'u', NOW_MS), record(1, 'u', NOW_MS + 2 * DAY_MS)))      # a timer in between
        lane.admit(block(0, record(2, 'u', NOW_MS + 2 * DAY_MS)))
        await until(lambda: 'changelog' in kafka.sends)
        assert lane.begun
        stopping = asyncio.create_task(beats.stop(20))
        await asyncio.sleep(.01)
        gate.set()
        await stopping
    entries = [json.loads(value or b'') for _, value, _ in kafka.topics['journal']]
    assert [entry['kind'] for entry in entries] == ['recovered', 'events']
    assert lane.done == [2, 0]
    assert store.load(['u'])['u'].applied == 2


@on_a_loop
async def test_a_failed_send_ends_the_lane_and_nothing_is_done(store: PartitionStore):
    kafka = FakeKafka()
    kafka.topics.pop('scores')
    beats, lane = lane_on(kafka, store)
    async with running(beats) as task:
        lane.admit(blocks()[0])
        await until(task.done)
        assert isinstance(task.exception(), KeyError)
        assert lane.done == [0, 0]


@on_a_loop
async def test_while_the_scorer_is_away_the_lane_holds_and_then_goes_on(store: PartitionStore):
    class Away(ConstantScorer):
        away = True

        async def score(self, batches: Any) -> Any:
            if self.away:
                raise ScorerUnavailable('away.', 'wait.', 5)
            return await super().score(batches)

    kafka, scorer = FakeKafka(), Away()
    beats, lane = lane_on(kafka, store, scorer)
    async with running(beats):
        lane.admit(blocks()[0])
        await until(lambda: lane.holding.startswith('away.'))
        assert kafka.sends == []
        scorer.away = False
        await until(lambda: lane.done == [8, 0])
        assert lane.holding == ''


@on_a_loop
async def test_a_lane_that_holds_stops_at_once(store: PartitionStore):
    class Away(ConstantScorer):
        async def score(self, batches: Any) -> Any:
            raise ScorerUnavailable('away.', 'wait.', 60_000)

    kafka = FakeKafka()
    beats, lane = lane_on(kafka, store, Away())
    beats.start()
    lane.admit(blocks()[0])
    await until(lambda: lane.holding)
    async with asyncio.timeout(2):
        await beats.stop(60)
    assert kafka.sends == []


@on_a_loop
async def test_a_lane_that_holds_in_the_middle_of_a_run_stops_at_once(store: PartitionStore):
    class AwayLater(ConstantScorer):
        asked = 0

        async def score(self, batches: Any) -> Any:
            self.asked += 1
            if self.asked > 1:
                raise ScorerUnavailable('away.', 'wait.', 60_000)
            return await super().score(batches)

    beats, lane = lane_on(FakeKafka(), store, AwayLater())
    beats.start()
    lane.admit(block(0, record(0, 'u', NOW_MS), record(1, 'u', NOW_MS + 2 * DAY_MS)))
    await until(lambda: lane.holding)
    async with asyncio.timeout(2):
        await beats.stop(60)
    assert lane.done == [0, 0]


class Died(Exception):  # noqa: N818 - no error of the worker
    """Stands for a kill in these tests."""


STAGES = ['_read', '_score', '_predecessor', '_changelog', '_outputs', '_done', '_write']


async def _run_until_death(beats: Beats, lane: Lane, stage: str, after: bool, turn: int) -> list[int]:
    """Run the blocks and die before or after a turn of the stage. Returns the positions that were done by then."""
    plain, turns = getattr(beats, stage), 0

    def dying(*given: Any) -> Any:
        nonlocal turns
        turns += 1
        if turns == turn and not after:
            raise Died
        result = plain(*given)
        if turns != turn:
            return result
        if asyncio.iscoroutine(result):
            async def then_die() -> Any:
                await result
                raise Died
            return then_die()
        raise Died

    setattr(beats, stage, dying)
    task = beats.start()
    for block in blocks():
        lane.admit(block)
    await until(lambda: task.done() or lane.done == [24, 0])
    if not task.done():     # the run had fewer turns of the stage
        await beats.stop(5)
    elif (error := task.exception()) is not None and not isinstance(error, Died):
        raise error
    return list(lane.done)


async def _run_to_the_end(kafka: FakeKafka, store: PartitionStore, start: int) -> None:
    kafka.starts[CLICKS] = start
    beats, lane = lane_on(kafka, store)
    async with running(beats):
        for block in blocks():
            if block.stop > start:
                skip = max(start - block.start, 0)
                lane.admit(Block('clicks', 0, 1, max(block.start, start), block.stop, block.records[skip:]))
        await until(lambda: lane.done == [24, 0])


def _facts(kafka: FakeKafka, store: PartitionStore) -> dict[str, Any]:
    """The state without the fields that depend on where steps were cut, and the outputs: ids with their bytes."""
    folded = {key: value for key, value, _ in kafka.topics['changelog']}
    users = {user.user_id: user for user in store.users()}
    assert {user.user_id.encode(): encode(user) for user in users.values()} == {
        key: value for key, value in folded.items() if not key.startswith(b'\xff')}
    by_id: dict[str, set[bytes]] = {}
    for topic in ('alerts', 'scores'):
        for _, value, _ in kafka.topics[topic]:
            by_id.setdefault(json.loads(value or b'')['id'], set()).add(value or b'')
    assert all(len(values) == 1 for values in by_id.values())
    alerts = {json.loads(value or b'')['id'] for _, value, _ in kafka.topics['alerts']}
    return {
        'windows': {user_id: (bytes(user.ids), bytes(user.rows), user.applied, user.duplicate, user.late)
                    for user_id, user in users.items()},
        'decisions': {user_id: user.decisions for user_id, user in users.items()},
        'alerts': alerts, 'letters': {key for key, _, _ in kafka.topics['dead']},
        'timers': {user_id: (user.due_ms, user.silence) for user_id, user in users.items()}}


@pytest.mark.parametrize('emptied', [False, True], ids=['same directory', 'emptied'])
@pytest.mark.parametrize('after', [False, True], ids=['before', 'after'])
@pytest.mark.parametrize('stage', STAGES)
def test_wherever_it_dies_nothing_is_lost_and_nothing_is_decided_twice(
        stage: str, after: bool, emptied: bool, tmp_path: Path, memory: Memory):
    async def undisturbed() -> dict[str, Any]:
        kafka, store = FakeKafka(), PartitionStore(tmp_path / 'undisturbed', memory)
        await _run_to_the_end(kafka, store, 0)
        return _facts(kafka, store)

    async def dead_once(turn: int) -> dict[str, Any]:
        kafka, store = FakeKafka(), PartitionStore(tmp_path / f'{turn}', memory)
        done = await _run_until_death(*lane_on(kafka, store), stage, after, turn)
        if emptied:
            store = PartitionStore(tmp_path / f'{turn}-emptied', memory)
        rest = kafka.topics['changelog'][store.meta.changelog:]
        store.apply([(key, value) for key, value, _ in rest], len(kafka.topics['changelog']))
        await _run_to_the_end(kafka, store, done[0] if turn % 2 else 0)      # committed before the death, or not
        return _facts(kafka, store)

    wanted = asyncio.run(undisturbed())
    assert wanted['letters'] == {b'clicks-0-11'}
    for turn in range(1, 7):
        found = asyncio.run(dead_once(turn))
        assert {name for name in wanted if found[name] != wanted[name]} == set(), f'turn {turn}'
