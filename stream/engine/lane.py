"""A lane processes the users of one partition number, over both input topics, one step after another.

A block passes through these methods, in this order:

    _next           takes blocks of both topics from the intake, up to the time that both have reached
    _decode         turns bytes into events or dead letters
    _load, _take    load the touched users' records, and take each step that the step driver cuts from the run
    _score          has the step driver score, decide, explain, and put messages into the outboxes
    _send_changelog sends the users' records, and the lane's own record last
    _send_outputs   sends messages and dead letters
    _write          writes one RocksDB batch: records, timers, and the changelog offset just acknowledged
    _done           allows the block to be committed

The first four rows of step k+1 overlap with the last four of step k. The changelog of step k+1 is sent only after the
outputs of step k are acknowledged, so only the newest step can have unsent outputs. At a take-over, the new owner first
sends the outboxes of that step again. An error after the first send ends the worker. At its next start, the worker
restores from the changelog what it had not written.
"""
import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from aiokafka import TopicPartition

from stream.core.dead_letters import DeadLetter
from stream.core.decide import Kind
from stream.core.driver import Scored, Step, StepDriver
from stream.core.events import Decoder, Event, Refusal, Source
from stream.core.journal import EventsEntry, RecoveredEntry, TimersEntry, encode_entry
from stream.core.outbox import Message, split_scores, unpack_outbox
from stream.core.partitioners import PartitionerName, misrouted
from stream.core.rules import StepRules
from stream.core.scorer import Scorer
from stream.core.user import Change, change_of, newest_ms
from stream.engine.blocks import Block, FetchedRecord
from stream.engine.budget import Budget
from stream.engine.consumer import BlockConsumer
from stream.engine.intake import Intake, in_time_order
from stream.engine.publisher import Publisher, Record
from stream.errors import ModelError
from stream.kafka.batch import source_header
from stream.metrics import Metrics
from stream.state.cache import UserCache
from stream.state.store import LANE_KEY, LaneRecord, Meta, PartitionStore

log = logging.getLogger(__name__)
T = TypeVar('T')
HOLD_RETRY_S = 1.0
CLOCK_LOOK_S = 1.0          # how often an idle lane checks the time of day
MERGE_LOOK_S = 0.05         # how often a lane that waits for one topic checks whether it has more records
ENTRY_USERS_MAX = 500       # the most users in one journal entry of a take-over
FETCH_FRESH_MS = 10_000     # an end offset is trusted for this long after the fetch that reported it


@dataclass(frozen=True)
class LaneRules:
    """The settings of a lane."""

    steps: StepRules
    digest: str
    partitioner: PartitionerName
    partitions: int
    wall_clock: bool
    clock_grace_ms: int
    clock_idle_ms_max: int
    merge_wait_ms: int
    blocks_ahead_max: int
    users_cached_bytes: int
    block_events_max: int
    sweep_users_max: int
    changelog: str
    alerts: str
    scores: str
    dead_letters: str
    journal: str
    source: str             # the CloudEvents attribute


@dataclass(frozen=True)
class Tools:
    """The objects that all lanes of a worker share."""

    rules: LaneRules
    decoder: Decoder
    scorer: Scorer
    publisher: Publisher
    metrics: Metrics
    consumer: BlockConsumer
    budget: Budget


class StepOutput(msgspec.Struct):
    """Everything that one step sends and writes.

    number     number of the step
    letters    records for the dead-letter topic
    journal    entries that must be acknowledged before the changelog
    oldest_ms  Kafka time of the run's first record, for the latency metric, Unix ms; 0 if there is none
    done       source -> position that is finished once the step is durable; None unless the step ends its run
    """

    number: int
    changes: list[Change]
    messages: list[Message]
    letters: list[Record]
    lane: LaneRecord
    journal: list[bytes]
    oldest_ms: int
    done: dict[Source, int] | None


class Stopped(Exception):  # noqa: N818 - no error: the lane was told to stop
    """Raised in a lane that has been told to stop, at a point where it would otherwise wait."""


async def in_thread(call: Callable[..., T], *given: Any) -> T:
    """Run a call of the store in a thread. A thread cannot be cancelled, so a cancelled caller waits for its end."""
    task = asyncio.create_task(asyncio.to_thread(call, *given))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


class Lane:
    """The lane of one partition number. `admit` takes blocks, `start` begins the lane's task, and `stop` ends it.

    running   whether the lane processes events; false until its state is restored and the take-over is complete
    holding   why the scorer cannot score, as text; empty if it can
    queueing  whether the lane waits for room in the worker's budget of events in flight
    done      the position up to which everything is durable, per source
    moved_at  time of the newest step, in monotonic seconds
    """

    def __init__(self, number: int, generation: int, store: PartitionStore, tools: Tools,
                 tps: tuple[TopicPartition, TopicPartition]) -> None:
        self.number = number
        self.store = store
        self.tps = tps
        self.running = False
        self.holding = ''
        self.queueing = False
        self._inside = 0                # events that the lane has in flight, in the budget of the worker
        self._run_size = 0
        self.moved_at = time.monotonic()
        self._generation = generation
        self._tools = tools
        self._rules = tools.rules
        self._wake = asyncio.Event()
        self.intake = Intake(tps, tools.consumer, tools.rules.blocks_ahead_max, tools.rules.block_events_max,
                             tools.rules.merge_wait_ms, self._wake.set, tools.metrics)
        self.done = list(self.intake.expected)
        self._stopping = False
        self._driver = StepDriver(tools.rules.steps, tools.scorer, generation)
        self._stream_ms = [0, 0]
        self._record_ms = 0             # newest timestamp of a block's first record
        self._signed: LaneRecord | None = None      # the lane's record of the newest step that is done
        self._source = source_header(tools.rules.source)
        self._foreign: set[str] = set()     # users in the state who belong on another partition, found by their timers
        self._users = UserCache(tools.rules.users_cached_bytes)
        self._publishing: asyncio.Task | None = None
        self._task: asyncio.Task | None = None

    # ---- for the assignment ----------------------------------------------------------------------------------------

    def admit(self, block: Block) -> None:
        """Pass a fetched block to the intake."""
        if not self._stopping:
            self.intake.admit(block)

    @property
    def waiting(self) -> bool:
        """Whether there are unfinished events, either here or, as far as the last fetch has shown, in Kafka."""
        return self.done != self.intake.expected or any(self.lag(source) for source in Source)

    def lag(self, source: Source) -> int:
        """How many positions `done` is behind the end of the topic partition at its last fetch; 0 if not known."""
        return max((self._tools.consumer.end_offset(self.tps[source]) or 0) - self.done[source], 0)

    # ---- life ------------------------------------------------------------------------------------------------------

    def start(self) -> asyncio.Task:
        """Start the lane's task. The state must have been restored."""
        self._task = asyncio.create_task(self._run(), name=f'lane {self.number}')
        return self._task

    async def stop(self, timeout_s: float) -> None:
        """Finish the step in flight and start no other. A step that exceeds the timeout is dropped and repeated later.

        timeout_s   how long the step may take
        """
        self._stopping = True
        self._wake.set()
        if self._task is None:
            return
        await asyncio.wait([self._task], timeout=timeout_s)
        if not self._task.done():
            log.warning('lane %d: a step did not end within %.1f s. It is dropped; the next owner repeats it.',
                        self.number, timeout_s)
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            await self._take_over()
            self.running = True
            while not self._stopping:
                blocks = await self._next()
                if blocks:
                    await self._enter(blocks)
                    await self._fold(blocks)
                await self._sweep()
            await self._sign_off()
        except Stopped:
            await self._sign_off()
        finally:
            self.running = False
            if self._publishing is not None and not self._publishing.done():
                self._publishing.cancel()
                await asyncio.wait([self._publishing])
            self._leave(self._inside)

    async def _take_over(self) -> None:
        """Before anything else, send the messages again that the newest step may not have sent."""
        meta = self.store.meta
        self._driver.number = max(meta.newest, meta.lane.step)
        self._stream_ms = list(meta.lane.stream_ms)
        if self._rules.journal:
            parts = [meta.unsent[at:at + ENTRY_USERS_MAX] for at in range(0, len(meta.unsent), ENTRY_USERS_MAX)]
            entries = [RecoveredEntry(self.number, self._driver.number, part) for part in parts or [None]]
            await self._send(self._rules.journal, [(b'%d' % self.number, encode_entry(entry), [])
                                                   for entry in entries])
        if meta.unsent:
            users = await in_thread(self.store.load, meta.unsent)
            outboxes = [unpack_outbox(user) for user in users.values() if user.outbox]
            log.info('lane %d: sending the messages of step %d again, for %d users.', self.number, meta.newest,
                     len(outboxes))
            await self._send_messages([message for outbox in outboxes for message in outbox])
            await in_thread(self.store.write, [], Meta(meta.changelog, meta.lane, meta.newest, []))

    async def _sign_off(self) -> None:
        """Record in the changelog that everything is sent, so the next owner need not send the newest step again."""
        await self._published()
        if self._signed is not None:
            lane = msgspec.structs.replace(self._signed, positions=list(self.done), sent=self._signed.step)
            changelog = await self._send(self._rules.changelog, [(LANE_KEY, msgspec.json.encode(lane), [])])
            await in_thread(self.store.write, [], Meta(changelog, lane, self.store.meta.newest, []))

    # ---- one run of events -----------------------------------------------------------------------------------------

    async def _next(self) -> tuple[Block, ...]:
        """Wait for the blocks to fold next. Returns none if timers are due or the lane stops."""
        waited_since = time.monotonic()
        while not self._stopping:
            self._wake.clear()
            if self._publishing is not None and self._publishing.done():
                await self._published()
            if self._publishing is not None and not self.intake.plenty:
                # The next step cannot be published before the one in flight. Events that arrive until then join it:
                # the fixed cost of a step equals the folding of many events.
                await self._woken(CLOCK_LOOK_S)
                waited_since = time.monotonic()
                continue
            blocks = self.intake.take(time.monotonic() - waited_since)
            if blocks or (not self.intake.blocks and not self.store.none_due(self.clock_ms())):
                return blocks
            await self._woken(MERGE_LOOK_S if self.intake.blocks else CLOCK_LOOK_S)
        return ()

    async def _enter(self, blocks: tuple[Block, ...]) -> None:
        """Wait until the worker's budget has room for these events. Errors: Stopped if the lane is told to stop."""
        self._run_size = size = sum([len(block.records) for block in blocks])
        self.queueing = True
        try:
            await self._tools.budget.enter(size)
        finally:
            self.queueing = False
        self._inside += size
        if self._stopping:
            raise Stopped

    def _leave(self, size: int) -> None:
        size = min(size, self._inside)      # 0 after the lane has ended, which gave everything back
        self._inside -= size
        self._tools.budget.leave(size)

    async def _woken(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _fold(self, blocks: tuple[Block, ...]) -> None:
        """Fold the blocks' events in time order as one run, and take each of its steps."""
        started = time.perf_counter()
        outcomes, events = self._decode(blocks)
        users = self._users.find(dict.fromkeys([event.user_id for event in events]))
        strays = self._strays([user_id for user_id, user in users.items() if user is None or user_id in self._foreign])
        letters = []
        if strays or len(events) < len(outcomes):
            letters = self._letters(blocks, outcomes, strays)
            events = [event for event in events if event.user_id not in strays]
            for user_id in strays:
                del users[user_id]
        metrics = self._tools.metrics
        metrics.blocks.inc(len(blocks))
        metrics.events_read.inc(sum([len(block.records) for block in blocks]))
        metrics.stage('decode', time.perf_counter() - started)
        await self._load(users)
        journal = []
        if self._rules.journal:
            journal = [encode_entry(EventsEntry(
                self.number, self._driver.number + 1, self.intake.source(block.topic), block.start, block.stop,
                self._tools.scorer.model.sha256, self._rules.digest)) for block in blocks]
        oldest_ms = min((block.first_ms for block in blocks if block.records), default=0)
        for step in self._driver.run(users, events):
            done = None
            metrics.folded(step.counts)
            if not step.waiting:
                done = {self.intake.source(block.topic): block.stop for block in blocks}
                self._stream_ms = [max(pair) for pair in zip(self._stream_ms, newest_ms(events), strict=True)]
            await self._take(step, journal, letters if done else [], oldest_ms, done)
            journal = []
        self._record_ms = max(self._record_ms, *(block.first_ms for block in blocks))

    def _decode(self, blocks: tuple[Block, ...]) -> tuple[Sequence[Event | Refusal], list[Event]]:
        """Decode the records; return the outcomes in folding order, and the events among them."""
        outcomes = in_time_order(blocks, [
            self._tools.decoder.decode_records(block.records, self.intake.source(block.topic)) for block in blocks])
        return outcomes, [outcome for outcome in outcomes if type(outcome) is Event]

    def _strays(self, user_ids: Sequence[str]) -> dict[str, Refusal]:
        """The users among these who belong on another partition, with the reason.

        Cached users need no check: they passed it when their events arrived, or a timer has put them into `_foreign`.
        """
        rules = self._rules
        refusals = ((user_id, misrouted(rules.partitioner, user_id.encode(), self.number, rules.partitions))
                    for user_id in user_ids)
        return {user_id: refusal for user_id, refusal in refusals if refusal is not None}

    def _letters(self, blocks: tuple[Block, ...], outcomes: Sequence[Event | Refusal],
                 strays: Mapping[str, Refusal]) -> list[Record]:
        """Dead letters for the records that are not valid events, or that belong on another partition."""
        places = in_time_order(blocks, [[(block, record) for record in block.records] for block in blocks])
        return [self._letter(block, record, refusal)
                for (block, record), outcome in zip(places, outcomes, strict=True)
                if (refusal := outcome if isinstance(outcome, Refusal) else strays.get(outcome.user_id))]

    def _letter(self, block: Block, record: FetchedRecord, refusal: Refusal) -> Record:
        self._tools.metrics.dead_letters.labels(refusal.reason).inc()
        return DeadLetter(refusal, record.value, block.topic, block.partition, record.offset, record.key,
                          record.timestamp, record.headers).as_record()

    async def _load(self, users: dict[str, Any]) -> None:
        """Load the users that are not cached, whose value is None."""
        unknown = [user_id for user_id, user in users.items() if user is None]
        if unknown:
            users.update(await in_thread(self.store.load, unknown))

    # ---- one step --------------------------------------------------------------------------------------------------

    async def _take(self, step: Step, journal: list[bytes], letters: list[Record], oldest_ms: int,
                    done: dict[Source, int] | None) -> None:
        """Score a step, wait until the step before it is published, and start to publish this one."""
        number, users = step.number, [entry.user for entry in step.touched]
        scored = await self._score(step)
        changes = list(map(change_of, users, step.new))
        self._users.keep(users, changes)
        self._tools.metrics.scored_rows.inc(len(scored.rows) - scored.refused)
        self._tools.metrics.refused_rows.inc(scored.refused)
        await self._published()
        positions = list(self.done)
        for source, stop in (done or {}).items():
            positions[source] = stop
        lane = LaneRecord(number, self._generation, positions, list(self._stream_ms), number - 1)
        outgoing = StepOutput(number, changes, scored.messages, letters, lane, journal, oldest_ms, done)
        self._publishing = asyncio.create_task(self._publish(outgoing), name=f'lane {self.number} step {number}')
        self._publishing.add_done_callback(lambda _: self._wake.set())
        if done is not None:
            size = self._run_size       # this step is the last one of its run
            self._publishing.add_done_callback(lambda _: self._leave(size))

    async def _score(self, step: Step) -> Scored:
        """Score, decide and explain. While the scorer is unavailable, the lane holds its events and retries."""
        tools, held = self._tools, False
        started = time.perf_counter()
        try:
            while True:
                try:
                    scored = await self._driver.score(step)
                except ModelError as error:
                    if not held:
                        log.warning('lane %d is holding its events: %s', self.number, error)
                        tools.metrics.scorer_holds.inc()
                    held, self.holding = True, str(error)
                    await self._hold(getattr(error, 'retry_after_ms', HOLD_RETRY_S * 1000) / 1000)
                    continue
                if held:
                    log.info('lane %d is scoring again.', self.number)
                tools.metrics.stage('score', time.perf_counter() - started)
                return scored
        finally:
            self.holding = ''

    async def _hold(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0:
            if self._stopping:
                raise Stopped
            self._wake.clear()
            if self._publishing is not None and self._publishing.done():
                await self._published()
            await self._woken(left_s)
        if self._stopping:
            raise Stopped

    async def _published(self) -> None:
        """Wait until the step in flight is published. Errors: those of `_publish`."""
        if self._publishing is not None:
            publishing, self._publishing = self._publishing, None
            await publishing

    async def _publish(self, step: StepOutput) -> None:
        stage, clock = self._tools.metrics.stage, time.perf_counter
        times = [clock()]
        if step.journal:
            await self._send(self._rules.journal, [(b'%d' % self.number, entry, []) for entry in step.journal])
        changelog = await self._send_changelog(step)
        times.append(clock())
        await self._send_outputs(step)
        times.append(clock())
        if step.oldest_ms and (step.messages or step.letters):
            self._tools.metrics.event_to_output_seconds.observe(max(time.time() - step.oldest_ms / 1000, 0))
        await self._write(step, changelog)
        times.append(clock())
        stage('changelog', times[1] - times[0])
        stage('outputs', times[2] - times[1])
        stage('write', times[3] - times[2])
        self._done(step)

    async def _send_changelog(self, step: StepOutput) -> int:
        """Send the users' records, and the lane's own record last; return the changelog offset after it."""
        if not step.changes:
            return self.store.meta.changelog
        records: list[Record] = [(change.user_id, change.record, []) for change in step.changes]
        records.append((LANE_KEY, msgspec.json.encode(step.lane), []))
        return await self._send(self._rules.changelog, records)

    async def _send_outputs(self, step: StepOutput) -> None:
        sends = []
        if step.messages:
            sends.append(self._send_messages(step.messages))
        if step.letters:
            sends.append(self._send(self._rules.dead_letters, step.letters))
        await asyncio.gather(*sends)

    async def _send_messages(self, messages: Sequence[Message]) -> None:
        """Send decisions to the alerts topic and scores to the scores topic. A user's messages keep their order."""
        rules, metrics = self._rules, self._tools.metrics
        decisions, scores = split_scores(messages)
        send = self._tools.publisher.send_messages
        await asyncio.gather(send(rules.alerts, self.number, decisions, self._source),
                             send(rules.scores, self.number, scores, self._source))
        metrics.messages.labels(Kind.SCORES).inc(len(scores))
        for kind, count in Counter([message.kind for message in decisions]).items():
            metrics.messages.labels(kind).inc(count)

    async def _send(self, topic: str, records: list[Record]) -> int:
        return await self._tools.publisher.send(topic, self.number, records)

    async def _write(self, step: StepOutput, changelog: int) -> None:
        """Write the step to the store."""
        if step.changes:
            await in_thread(self.store.write, step.changes, Meta(changelog, step.lane, step.number, []))

    def _done(self, step: StepOutput) -> None:
        self._users.trim(step.number)
        for source, stop in (step.done or {}).items():
            self.done[source] = stop
        if step.changes:
            self._signed = step.lane
        self.moved_at = time.monotonic()
        self._tools.metrics.steps.inc()

    # ---- the sweep of silent users ---------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Fire timers that are due by the lane's clock, in one step. Waiting events come before the next such step."""
        clock_ms = self.clock_ms()
        if self._stopping or self.store.none_due(clock_ms):
            return
        await self._published()         # the timer index lacks the changes of the step in flight
        due = await in_thread(self.store.due, clock_ms, self._rules.sweep_users_max)
        if not due:
            return
        users = self._users.find(due)
        self._foreign.update(self._strays([user_id for user_id, user in users.items() if user is None]))
        await self._load(users)
        journal = []
        if self._rules.journal:
            journal = [encode_entry(TimersEntry(
                self.number, self._driver.number + 1, due, self._tools.scorer.model.sha256, self._rules.digest))]
        self._tools.metrics.timers_fired.inc(len(due))
        await self._take(self._driver.sweep(users.values()), journal, [], 0, None)

    def clock_ms(self) -> int:
        """The lane's clock, in ms of event time.

        It is the smaller of the stream times of both topics, but a topic without unread records does not hold it back.
        If both topics are read to their ends and their events are recent, the clock follows the time of day.
        """
        intake = self.intake
        behind = [self._stream_ms[source] for source in Source if intake.queued(source) or intake.unread(source)]
        if behind:
            return min(behind)
        newest_ms = max(self._stream_ms)
        if not self._rules.wall_clock or not self.running:
            return newest_ms
        now_ms = int(time.time() * 1000)
        heard_ms = [self._tools.consumer.fetched_ms_ago(tp, now_ms) for tp in self.tps]
        recent = now_ms - max(self._record_ms, newest_ms) <= self._rules.clock_idle_ms_max
        if recent and all(ago_ms is not None and ago_ms <= FETCH_FRESH_MS for ago_ms in heard_ms):
            return max(newest_ms, now_ms - self._rules.clock_grace_ms)
        return newest_ms
