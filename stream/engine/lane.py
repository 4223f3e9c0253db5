"""A lane processes the users of one partition number, over both input topics, one step after another.

A lane has its own order and state, but no task. The worker moves in beats (`stream.engine.beat`), and a beat takes one
step of each lane that has events or due timers. These methods are the lane's part of a beat, in order:

    ready       whether the lane can take part in the next beat; it takes its next run
    look_up     turn the bytes of the run into events or dead letters; name the users to be read from the store
    begin       cut the run into steps
    next_step   fold the next step of the run
    collect     collect what the scored step sends and stores
    finish      allow the blocks to be committed

A run is what the lane takes from its intake at once. Most runs are one step. The others take part in several beats.
"""
import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiokafka import TopicPartition

from stream.core.dead_letters import DeadLetter
from stream.core.driver import Step, StepDriver
from stream.core.events import Decoder, Event, Refusal, Source
from stream.core.journal import EventsEntry, TimersEntry, encode_entry
from stream.core.outbox import Message
from stream.core.partitioners import PartitionerName, misrouted
from stream.core.rules import StepRules
from stream.core.scorer import Scorer
from stream.core.step_scorer import Scored
from stream.core.user import Change, User, change_of, newest_ms
from stream.engine.blocks import Block, FetchedRecord
from stream.engine.consumer import BlockConsumer
from stream.engine.intake import Intake, in_time_order
from stream.engine.publisher import Publisher, Record, Sending
from stream.engine.writer import Writer
from stream.kafka.batch import source_header
from stream.metrics import Metrics
from stream.state.cache import UserCache
from stream.state.store import LaneRecord, Meta, PartitionStore

CLOCK_LOOK_S = 1.0          # how often an idle lane looks for timers that are due by the time of day
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
    events_in_flight_max: int
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


class StepOutput(msgspec.Struct, eq=False):
    """One step on its way through a beat: what it sends and writes.

    letters    records for the dead-letter topic
    journal    entries that must be acknowledged before the changelog
    oldest_ms  Kafka time of the run's first record, for the latency metric, Unix ms; 0 if there is none
    finished   source -> position that is finished once the step is durable; None unless the step ends its run
    size       events of the run; 0 unless the step ends its run
    changes    set when the step is scored, as are the messages
    record     set when the step is signed
    changelog  the changelog offset after the step, once it is acknowledged
    begun      whether the stage under way has begun; `awaited` is done when the stage is complete
    """

    lane: 'Lane'
    step: Step
    journal: list[bytes]
    letters: list[Record]
    oldest_ms: int
    finished: dict[Source, int] | None
    size: int
    changes: list[Change] = []
    messages: list[Message] = []
    record: LaneRecord | None = None
    changelog: int = 0
    begun: bool = False
    sendings: list[Sending] = []
    awaited: list[asyncio.Future[Any]] = []

    def begin(self, sendings: list[Sending]) -> None:
        """A stage has begun and waits for these acknowledgements."""
        self.begun, self.sendings = True, sendings
        self.awaited = [sending.future for sending in sendings]

    def end(self) -> list[int]:
        """The stage is complete. Returns the offset after each sending. Errors: KafkaError if a record has failed."""
        offsets = [sending.offset() for sending in self.sendings]
        self.begun, self.sendings, self.awaited = False, [], []
        return offsets

    def drop(self) -> None:
        """The step is given up: send no more of it."""
        for sending in self.sendings:
            sending.drop()


@dataclass
class _Run:
    """What a lane takes at once: blocks of events, or the due timers of a sweep.

    blocks   one block, or one of each topic; none for a sweep
    due      users with a due timer; for a sweep only
    size     number of records
    events   valid events, in the order in which they are folded
    users    the touched users by id; None for those that must be read from the store
    """

    blocks: tuple[Block, ...] = ()
    due: list[str] = field(default_factory=list)
    size: int = 0
    events: list[Event] = field(default_factory=list)
    letters: list[Record] = field(default_factory=list)
    users: dict[str, Any] = field(default_factory=dict)
    journal: list[bytes] = field(default_factory=list)
    steps: Iterator[Step] | None = None


class Lane:
    """The lane of one partition number. `admit` takes blocks from the consumer; `Beats` calls the rest.

    running     whether the lane processes events; false until its state is restored and the take-over is complete
    in_beat     whether a beat folds or scores a step of this lane
    publishing  done when the newest scored step is published; None if there is none under way
    holding     why the scorer cannot score, as text; empty if it can
    queueing    whether the lane waits because too many events are in unfinished runs
    done        the position up to which everything is durable, per source
    moved_at    time of the newest step, in monotonic seconds
    newest      the lane's record of the newest step that is done; None if there is none
    source      the CloudEvents header of the lane's messages
    """

    def __init__(self, number: int, generation: int, store: PartitionStore, tools: Tools,
                 tps: tuple[TopicPartition, TopicPartition], writer: Writer, wake: Callable[[], None]) -> None:
        self.number = number
        self.store = store
        self.tps = tps
        self.running = False
        self.in_beat = False
        self.publishing: asyncio.Future[None] | None = None
        self.holding = ''
        self.queueing = False
        self.moved_at = time.monotonic()
        self.newest: LaneRecord | None = None
        self.source = source_header(tools.rules.source)
        self.intake = Intake(tps, tools.consumer, tools.rules.blocks_ahead_max, tools.rules.block_events_max,
                             tools.rules.merge_wait_ms, wake, tools.metrics)
        self.done = list(self.intake.expected)
        self._generation = generation
        self._tools = tools
        self._rules = tools.rules
        self._writer = writer
        self._driver = StepDriver(tools.rules.steps.limits, generation)
        self._users = UserCache(tools.rules.users_cached_bytes)
        self._foreign: set[str] = set()     # users in the state who belong on another partition, found by their timers
        self._stream_ms = [0, 0]
        self._record_ms = 0                 # newest timestamp of a block's first record
        self._waiting_since: float | None = None    # since when the events of one topic wait for those of the other
        self._clock_look_s = 0.0            # when an idle lane looks for due timers next
        self._sweeps_next = False           # whether due timers come before waiting events
        self._run: _Run | None = None

    # ---- for the assignment ----------------------------------------------------------------------------------------

    def admit(self, block: Block) -> None:
        """Pass a fetched block to the intake."""
        self.intake.admit(block)

    @property
    def waiting(self) -> bool:
        """Whether there are unfinished events, either here or, as far as the last fetch has shown, in Kafka."""
        return self.done != self.intake.expected or any(self.lag(source) for source in Source)

    def lag(self, source: Source) -> int:
        """How many positions `done` is behind the end of the topic partition at its last fetch; 0 if not known."""
        return max((self._tools.consumer.end_offset(self.tps[source]) or 0) - self.done[source], 0)

    # ---- taking over -----------------------------------------------------------------------------------------------

    def resume(self) -> tuple[int, list[str]]:
        """Go on from the stored state.

        Returns   the number of its newest step, and the users whose messages of that step may be unsent
        """
        meta = self.store.meta
        self._driver.number = max(meta.newest, meta.lane.step)
        self._stream_ms = list(meta.lane.stream_ms)
        return self._driver.number, meta.unsent

    # ---- the next run ----------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Number of records of the run under way."""
        return self._run.size if self._run else 0

    @property
    def blocks(self) -> int:
        """Number of blocks of the run under way."""
        return len(self._run.blocks) if self._run else 0

    @property
    def sweeping(self) -> bool:
        """Whether the run under way is a sweep whose users are not known yet."""
        return self._run is not None and not self._run.blocks and self._run.steps is None

    @property
    def begun(self) -> bool:
        """Whether steps of the run under way were taken before, and more are left."""
        return self._run is not None and self._run.steps is not None

    def ready(self, now_s: float) -> bool:
        """Whether the lane can take part in the next beat. If so, it has taken a run.

        now_s   monotonic seconds
        """
        if not self.running or self.in_beat:
            return False
        if self._run is not None:
            return True
        published = self.publishing is None
        if not published and not self.intake.plenty:
            # The next step cannot be published before the one in flight. Events that arrive until then join it: the
            # fixed cost of a step equals the folding of many events.
            return False
        if self._sweeps_next and self._timers_due():
            if published:       # the timer index lacks the changes of the step in flight
                self._run = _Run()
            return published
        self._sweeps_next = False
        blocks = self.intake.take(0.0 if self._waiting_since is None else now_s - self._waiting_since)
        if blocks:
            self._waiting_since = None
            self._run = _Run(blocks, size=sum([len(block.records) for block in blocks]))
        elif self.intake.blocks:
            self._waiting_since = self._waiting_since or now_s
        elif published and now_s >= self._clock_look_s:
            self._clock_look_s = now_s + CLOCK_LOOK_S
            if self._timers_due():
                self._run = _Run()
        return self._run is not None

    def _timers_due(self) -> bool:
        return not self._writer.none_due(self.store, self.clock_ms())

    def find_due(self, until_ms: int) -> None:
        """For a sweep: read which users have a timer due by then. Every finished step must have been written."""
        assert self._run is not None
        self._run.due = self.store.due(until_ms, self._rules.sweep_users_max)
        if len(self._run.due) == self._rules.sweep_users_max:
            self._clock_look_s = 0.0        # there may be more

    def look_up(self) -> list[str]:
        """Decode the run, and find its users in the cache; return the ids of the users to be read from the store."""
        run = self._run
        assert run is not None
        if run.steps is not None:
            return []
        if run.blocks:
            self._decode(run)
        else:
            run.users = self._users.find(run.due)
            self._foreign.update(self._strays([user_id for user_id, user in run.users.items() if user is None]))
        return [user_id for user_id, user in run.users.items() if user is None]

    def _decode(self, run: _Run) -> None:
        """Decode the records, find the users, and make dead letters of what is not valid here."""
        blocks = run.blocks
        outcomes = in_time_order(blocks, [
            self._tools.decoder.decode_records(block.records, self.intake.source(block.topic)) for block in blocks])
        events = [outcome for outcome in outcomes if type(outcome) is Event]
        users = self._users.find(dict.fromkeys([event.user_id for event in events]))
        strays = self._strays([user_id for user_id, user in users.items() if user is None or user_id in self._foreign])
        if strays or len(events) < len(outcomes):
            run.letters = self._letters(blocks, outcomes, strays)
            events = [event for event in events if event.user_id not in strays]
            for user_id in strays:
                del users[user_id]
        run.events, run.users = events, users

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

    # ---- one step --------------------------------------------------------------------------------------------------

    def begin(self, loaded: Mapping[str, User]) -> None:
        """Cut the run into steps, now that the users who were not in the cache are read."""
        run = self._run
        assert run is not None
        if run.steps is not None:
            return
        run.users.update(loaded)
        if self._rules.journal:
            run.journal = self._entries(run)
        if run.blocks:
            run.steps = self._driver.run(run.users, run.events)
            self._record_ms = max(self._record_ms, *(block.first_ms for block in run.blocks))
        else:
            self._tools.metrics.timers_fired.inc(len(run.due))
            run.steps = iter([self._driver.sweep(run.users.values())] if run.due else [])

    def _entries(self, run: _Run) -> list[bytes]:
        """The journal's entries about the run."""
        step, model, digest = self._driver.number + 1, self._tools.scorer.model.sha256, self._rules.digest
        if run.blocks:
            return [encode_entry(EventsEntry(self.number, step, self.intake.source(block.topic), block.start,
                                             block.stop, model, digest)) for block in run.blocks]
        return [encode_entry(TimersEntry(self.number, step, run.due, model, digest))] if run.due else []

    def next_step(self) -> StepOutput | None:
        """Fold the next step of the run. None if a sweep has found no due timer after all."""
        run = self._run
        assert run is not None and run.steps is not None
        step = next(run.steps, None)
        journal, run.journal = run.journal, []
        if step is None or not step.waiting:
            self._run, self._sweeps_next = None, bool(run.blocks)
        if step is None:
            return None
        oldest_ms = min((block.first_ms for block in run.blocks if block.records), default=0)
        if step.waiting or not run.blocks:
            return StepOutput(self, step, journal, [], oldest_ms, None, 0)
        self._stream_ms = [max(pair) for pair in zip(self._stream_ms, newest_ms(run.events), strict=True)]
        finished = {self.intake.source(block.topic): block.stop for block in run.blocks}
        return StepOutput(self, step, journal, run.letters, oldest_ms, finished, run.size)

    def give_up(self) -> None:
        """The step under way is dropped, so the steps after it are too. The next owner takes all of them again."""
        self._run = None

    def collect(self, output: StepOutput, scored: Scored) -> None:
        """Collect what the scored step sends and stores."""
        users = [entry.user for entry in output.step.touched]
        output.changes = list(map(change_of, users, output.step.new))
        output.messages = scored.messages
        self._users.keep(users, output.changes)

    def sign(self, output: StepOutput) -> LaneRecord:
        """The lane's record of the step, the last one that the step sends to the changelog. The step before is done."""
        positions = list(self.done)
        for source, stop in (output.finished or {}).items():
            positions[source] = stop
        number = output.step.number
        output.record = LaneRecord(number, self._generation, positions, list(self._stream_ms), number - 1)
        return output.record

    def finish(self, output: StepOutput) -> None:
        """Everything is acknowledged: the blocks of the run may be committed."""
        for source, stop in (output.finished or {}).items():
            self.done[source] = stop
        if output.record is not None and output.changes:
            self.newest = output.record
            self._writer.add(self.store, output.changes,
                             Meta(output.changelog, output.record, output.step.number, []))
        self.moved_at = time.monotonic()

    def trim(self) -> None:
        """Let the cache drop users whose records are written."""
        self._users.trim(self.store.meta.newest)

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
