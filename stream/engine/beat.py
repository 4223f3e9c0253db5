"""The worker moves in beats. A beat takes one step of each lane that has events or due timers.

Much of the cost of a step does not depend on how many users it has: a call of the model, a request to the broker, a
turn of a thread, the wake-ups. A beat pays it once for all lanes. It passes through these methods, in this order:

    _dispatch   starts a beat as soon as lanes are ready
    _read       decodes the lanes' runs, and loads the touched users' records
    _score      scores the steps of all lanes together, decides, and puts messages into the outboxes
    _explain    finds the reasons of alerts, for the lanes that have some
    _journal    sends the journal's entries, if there is a journal
    _changelog  sends the users' records, and the lane's own record last
    _outputs    sends messages and dead letters
    _done       allows the blocks to be committed, and hands the records to the writer of the stores

Nobody waits for a beat. While one is scored, events for the next one gather, unless so many are waiting that their
folding should overlap with the scoring. While a lane's step is published, its next events gather too.

The changelog of a lane's next step is sent only after the outputs of this one are acknowledged, so only the newest step
can have unsent outputs. At a take-over, the new owner first sends the outboxes of that step again. A lane whose
acknowledgements are late leaves its beat and follows on its own, so that a slow partition does not hold up the others.
An error after the first send ends the worker. At its next start, it restores from the changelog what it had not
written.
"""
import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain
from typing import TypeVar

import msgspec

from stream.core.journal import RecoveredEntry, encode_entry
from stream.core.outbox import Message, split_scores, unpack_outbox
from stream.core.step_scorer import Judged, Reasons, StepScorer, nobody_scored
from stream.core.user import User
from stream.engine.lane import Lane, StepOutput, Tools
from stream.engine.publisher import Record, Sending
from stream.engine.threads import in_thread
from stream.engine.writer import BYTES_MAX, Writer
from stream.errors import ModelError, ScorerUnavailable
from stream.state.store import LANE_KEY, Meta

log = logging.getLogger(__name__)
T = TypeVar('T')
Stage = Callable[[list[StepOutput]], Awaitable[list[StepOutput]]]       # returns the steps that go on together
BEAT_EVENTS = 128           # a beat of so many events takes no more lanes, and does not wait for the beat before it
LEAVE_S = 0.02              # how much later than the first acknowledgement of a beat those of its other lanes may come
WRITE_DELAY_S = 0.25        # how long a finished step waits for the write to the store
HOLD_RETRY_S = 1.0
LOOK_S = 1.0                # how often timers are looked at while nothing arrives
MERGE_LOOK_S = 0.05         # how often a lane that waits for one topic checks whether it has more records
ENTRY_USERS_MAX = 500       # the most users in one journal entry of a take-over
READS_ON_LOOP_MAX = 64      # so many users are read without a thread, if the disk is fast
READ_SLOW_S = 0.003         # if reads on the event loop take longer, on average, the next ones use a thread
READ_SLOW_FOR_S = 10.0


class Stopped(Exception):  # noqa: N818 - no error: the lanes were told to stop
    """Raised in a beat that is told to stop, at a point where it would otherwise wait."""


class Beats:
    """Drives the lanes of one assignment. `start` begins, `join` adds a lane, and `stop` ends all of them together."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._rules = tools.rules
        self._scorer = StepScorer(tools.rules.steps, tools.scorer)
        self.writer = Writer(self._write_soon)
        self._lanes: list[Lane] = []
        self._joining: list[Lane] = []
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._in_flight = 0         # events in unfinished runs
        self._scoring = 0           # beats that are being scored and are not held up
        self._read_s = 0.0              # moving average of the reads on the event loop
        self._read_slow_until = 0.0
        self._write_timer: asyncio.TimerHandle | None = None
        self._write_now = False
        self._beats: asyncio.TaskGroup
        self._task: asyncio.Task[None] | None = None

    # ---- life ------------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """To be called when a lane may have become ready."""
        self._wake.set()

    def start(self) -> asyncio.Task[None]:
        """Start the task, which ends with the first error."""
        self._task = asyncio.create_task(self._run(), name='beats')
        return self._task

    def join(self, lane: Lane) -> None:
        """Let the lane take part. Its state must have been restored."""
        self._joining.append(lane)
        self._wake.set()

    async def stop(self, timeout_s: float) -> None:
        """Finish the runs that have begun, and start no others. What exceeds the timeout is dropped and repeated later.

        A run is finished because the journal has one entry for all its steps.

        timeout_s   how long the steps may take
        """
        self._stopping.set()
        self._wake.set()
        if self._task is None:
            return
        await asyncio.wait([self._task], timeout=timeout_s)
        if not self._task.done():
            log.warning('Steps did not end within %.1f s. They are dropped; the next owner of the partitions repeats '
                        'them.', timeout_s)
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as self._beats:
                await self._dispatch()
            await self._sign_off()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None        # it has cancelled the others
        finally:
            if self._write_timer is not None:
                self._write_timer.cancel()
            for lane in self._lanes:
                lane.running = False

    async def _take_over(self, lane: Lane) -> None:
        """Before anything else, send the messages again that the lane's newest step may not have sent."""
        newest, unsent = lane.resume()
        if self._rules.journal:
            parts = [unsent[at:at + ENTRY_USERS_MAX] for at in range(0, len(unsent), ENTRY_USERS_MAX)]
            await self._tools.publisher.send(self._rules.journal, lane.number, [
                (b'%d' % lane.number, encode_entry(RecoveredEntry(lane.number, newest, part)), [])
                for part in parts or [None]])
        if unsent:
            users = await in_thread(lane.store.load, unsent)
            outboxes = [unpack_outbox(user) for user in users.values() if user.outbox]
            log.info('lane %d: sending the messages of step %d again, for %d users.', lane.number,
                     lane.store.meta.newest, len(outboxes))
            for sending in await self._begin_messages(lane, [message for outbox in outboxes for message in outbox]):
                await sending.end()
            meta = lane.store.meta
            await in_thread(lane.store.write, [], Meta(meta.changelog, meta.lane, meta.newest, []))
        lane.running = True
        self._lanes.append(lane)
        self._wake.set()

    async def _sign_off(self) -> None:
        """Write everything. Record in each changelog that all is sent, so the next owner need not send a step again."""
        await self.writer.flush()
        signed = [(lane, msgspec.structs.replace(lane.newest, positions=list(lane.done), sent=lane.newest.step))
                  for lane in self._lanes if lane.newest is not None]
        sendings = [await self._tools.publisher.begin(
            self._rules.changelog, lane.number, [(LANE_KEY, msgspec.json.encode(record), [])])
            for lane, record in signed]
        for (lane, record), sending in zip(signed, sendings, strict=True):
            self.writer.add(lane.store, [], Meta(await sending.end(), record, lane.store.meta.newest, []))
        await self.writer.flush()

    # ---- which lanes make a beat -----------------------------------------------------------------------------------

    async def _dispatch(self) -> None:
        """Start a beat whenever lanes are ready, until told to stop and all runs that have begun are finished."""
        while not self._stopping.is_set() or any(lane.begun for lane in self._lanes):
            self._wake.clear()
            if self._write_now:
                self._write_now = False
                self._beats.create_task(self._write())
            while self._joining:
                self._beats.create_task(self._take_over(self._joining.pop()))
            lanes = self._ready()
            if lanes:
                for lane in lanes:
                    lane.in_beat = True
                self._scoring += 1
                self._beats.create_task(self._beat(lanes))
                continue
            merging = any(lane.intake.blocks for lane in self._lanes)
            await self._woken(MERGE_LOOK_S if merging else LOOK_S)

    async def _woken(self, timeout_s: float) -> None:
        timer = asyncio.get_running_loop().call_later(timeout_s, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

    def _ready(self) -> list[Lane]:
        """The lanes of the next beat, in turn. Empty if it would be better to wait."""
        if self.writer.bytes > BYTES_MAX:
            return []
        if self._scoring and sum([lane.intake.events for lane in self._lanes if not lane.in_beat]) < BEAT_EVENTS:
            return []
        now_s, size, full, lanes = time.monotonic(), 0, False, []
        stopping = self._stopping.is_set()
        for lane in self._lanes:
            lane.queueing = False
            if stopping and not lane.begun:
                continue
            if size < BEAT_EVENTS and lane.ready(now_s):
                # One run is always admitted, even if it is larger than the limit. If a run has to wait for room, so do
                # those behind it: small runs could take whatever room there is and keep it waiting for ever.
                if not lane.begun:
                    full = full or (
                        self._in_flight > 0 and self._in_flight + lane.size > self._rules.events_in_flight_max)
                    if full:
                        lane.queueing = True
                        continue
                    self._in_flight += lane.size
                size += lane.size
                lanes.append(lane)
        if len(lanes) < len(self._lanes):       # whoever is left comes first next time
            taken = set(lanes)
            self._lanes = [lane for lane in self._lanes if lane not in taken] + lanes
        return lanes

    # ---- one beat --------------------------------------------------------------------------------------------------

    async def _beat(self, lanes: Sequence[Lane]) -> None:
        """Take one step of each of these lanes."""
        await self._read(lanes)
        steps: list[StepOutput] = []
        for lane in lanes:
            step = lane.next_step()
            if step is None:
                lane.in_beat = False        # no timer was due after all
            else:
                steps.append(step)
        self._tools.metrics.folded([step.step.counts for step in steps])
        await self._finish(steps)

    async def _read(self, lanes: Sequence[Lane]) -> None:
        """Decode the lanes' runs, and load the users that are not cached."""
        sweeps = [lane for lane in lanes if lane.sweeping]
        if sweeps:
            await self._write()     # the timer index lacks what is not written
            clocks = [(lane, lane.clock_ms()) for lane in sweeps]
            await in_thread(lambda: [lane.find_due(until_ms) for lane, until_ms in clocks])
        started = time.perf_counter()
        wanted = [(lane, unknown) for lane in lanes if (unknown := lane.look_up())]
        self._tools.metrics.stage('decode', time.perf_counter() - started)
        loaded = await self._load(wanted) if wanted else {}
        fresh = [lane for lane in lanes if not lane.begun]
        self._tools.metrics.beat(sum([lane.blocks for lane in fresh]), sum([lane.size for lane in fresh]))
        for lane in lanes:
            lane.begin(loaded.get(lane, {}))

    async def _load(self, wanted: Sequence[tuple[Lane, list[str]]]) -> dict[Lane, dict[str, User]]:
        """Read these users of these lanes.

        A few are read on the event loop: while the disk is fast, that takes less time than the turn of a thread.
        """
        def load() -> dict[Lane, dict[str, User]]:
            return {lane: lane.store.load(user_ids) for lane, user_ids in wanted}
        started = time.monotonic()
        few = sum([len(user_ids) for _, user_ids in wanted]) <= READS_ON_LOOP_MAX
        if not few or started < self._read_slow_until:
            return await in_thread(load)
        loaded = load()
        now_s = time.monotonic()
        self._read_s += (now_s - started - self._read_s) / 8
        if self._read_s > READ_SLOW_S:
            self._read_s, self._read_slow_until = 0.0, now_s + READ_SLOW_FOR_S
        return loaded

    async def _finish(self, steps: list[StepOutput]) -> None:
        """Score the steps, then publish them. Stops quietly if told to: the next owner takes the steps again."""
        try:
            published = await self._score(steps)
        except Stopped:
            for step in steps:
                step.lane.give_up()
            return
        finally:
            self._scoring -= 1
            self._wake.set()        # events may have waited for the end of the scoring
        await self._publish(published)

    async def _score(self, steps: list[StepOutput]) -> list[StepOutput]:
        """Score and decide. Returns the steps that can be published now; the others follow on their own.

        If the model refuses several steps together, each is scored again alone: one must not hold up the others. If
        alerts need reasons, which cost another call of the model, only their lanes wait for it.
        """
        if not steps:
            return []
        started = time.perf_counter()
        folded = [step.step for step in steps]
        try:
            judged = await self._held(steps, lambda: self._scorer.judge(folded))
        except ModelError:
            for step in steps:
                self._scoring += 1
                self._beats.create_task(self._finish([step]))
            return []
        if judged is None:
            for step in steps:
                step.lane.collect(step, nobody_scored())
            return steps
        explained = self._scorer.affordable(judged)
        calm = [number for number, rows in enumerate(explained) if not rows]
        if len(calm) < len(steps):
            self._beats.create_task(self._explain(steps, judged, explained))
        self._collect(steps, judged, {}, calm)
        self._tools.metrics.stage('score', time.perf_counter() - started)
        return [steps[number] for number in calm]

    async def _explain(self, steps: Sequence[StepOutput], judged: Judged, rows: Sequence[Sequence[int]]) -> None:
        """Find the reasons of these rows of each step, then publish the steps that have some.

        If the model refuses several steps together, each is explained again alone.
        """
        numbers = [number for number, of_step in enumerate(rows) if of_step]
        late = [steps[number] for number in numbers]
        try:
            reasons = await self._held(late, lambda: self._scorer.explain(judged, [*chain.from_iterable(rows)]), 0)
        except Stopped:
            for step in late:
                step.lane.give_up()
            return
        except ModelError:
            for alone in numbers:
                self._beats.create_task(self._explain(
                    steps, judged, [of_step if number == alone else [] for number, of_step in enumerate(rows)]))
            return
        self._collect(steps, judged, reasons, numbers)
        await self._publish(late)

    def _collect(self, steps: Sequence[StepOutput], judged: Judged, reasons: Reasons, numbers: Sequence[int]) -> None:
        """Apply the decisions of some of the judged steps, and collect what these steps send and store."""
        results = self._scorer.publish(judged, reasons, numbers)
        for number, scored in zip(numbers, results, strict=True):
            steps[number].lane.collect(steps[number], scored)
        self._tools.metrics.scored(sum([len(scored.rows) for scored in results]),
                                   sum([scored.refused for scored in results]))

    async def _held(self, steps: Sequence[StepOutput], call: Callable[[], Awaitable[T]], counts: int = 1) -> T:
        """The result of a call of the scorer. While it cannot answer, the steps' lanes hold their events.

        counts   as how many beats in `_scoring` the call counts, while it is not held up
        Errors   Stopped if told to stop; ModelError if the model refuses several steps
        """
        held, numbers = False, ''
        try:
            while True:
                try:
                    result = await call()
                    break
                except ModelError as error:
                    if len(steps) > 1 and not isinstance(error, ScorerUnavailable):
                        raise
                    if not held:
                        numbers = ', '.join(str(step.lane.number) for step in steps)
                        log.warning('lanes %s are holding their events: %s', numbers, error)
                        self._tools.metrics.scorer_holds.inc()
                        self._scoring -= counts     # other lanes need not wait for this beat
                        self._wake.set()
                    held = True
                    for step in steps:
                        step.lane.holding = str(error)
                    await self._hold(getattr(error, 'retry_after_ms', HOLD_RETRY_S * 1000) / 1000)
            if held:
                log.info('lanes %s are scoring again.', numbers)
            return result
        finally:
            self._scoring += counts if held else 0
            for step in steps:
                step.lane.holding = ''

    async def _hold(self, seconds: float) -> None:
        """Wait before the next attempt. Errors: Stopped if told to stop."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return
        raise Stopped

    # ---- publishing ------------------------------------------------------------------------------------------------

    async def _publish(self, steps: list[StepOutput], first: Stage | None = None) -> None:
        """Take the steps through the stages, from `first` on if it is given."""
        stages: list[Stage] = [self._predecessor, self._journal, self._changelog, self._outputs]
        try:
            for stage in stages[stages.index(first):] if first else stages:
                if steps:
                    steps = await stage(steps)
        except BaseException:
            # The beats end here. The next owner must not meet records that were still to be handed over.
            for step in steps:
                step.drop()
            raise
        if steps:
            self._done(steps)

    async def _acknowledged(self, steps: list[StepOutput], stage: Stage) -> list[StepOutput]:
        """Wait for the acknowledgements of the steps' stage; return the steps that have them.

        Steps whose acknowledgements are late go on without the others, from this stage on. A step that waits for
        nothing counts as acknowledged.
        """
        pending = {future for step in steps for future in step.awaited if not future.done()}
        if pending:
            nothing_has_come = not any(pending.isdisjoint(step.awaited) for step in steps)
            done, pending = await asyncio.wait(pending, timeout=LEAVE_S)
            if pending and not done and nothing_has_come:
                await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                _, pending = await asyncio.wait(pending, timeout=LEAVE_S)
        if not pending:
            return steps
        late = [step for step in steps if not pending.isdisjoint(step.awaited)]
        self._beats.create_task(self._publish(late, stage))
        return [step for step in steps if step not in late]

    async def _predecessor(self, steps: list[StepOutput]) -> list[StepOutput]:
        """Wait until the step before is published, lane by lane. Then the lanes can take part in the next beat."""
        for step in steps:
            if step.lane.publishing is not None:
                step.awaited = [step.lane.publishing]
        steps = await self._acknowledged(steps, self._predecessor)
        for step in steps:
            step.end()
            step.lane.publishing = asyncio.get_running_loop().create_future()
            step.lane.in_beat = False
        self._wake.set()
        return steps

    async def _journal(self, steps: list[StepOutput]) -> list[StepOutput]:
        """Send the journal's entries."""
        for step in steps:
            if not step.begun and step.journal:
                records: list[Record] = [(b'%d' % step.lane.number, entry, []) for entry in step.journal]
                step.begin([await self._tools.publisher.begin(self._rules.journal, step.lane.number, records)])
        steps = await self._acknowledged(steps, self._journal)
        for step in steps:
            step.end()
        return steps

    async def _changelog(self, steps: list[StepOutput]) -> list[StepOutput]:
        """Send the users' records, and the lane's own record last."""
        started = time.perf_counter()
        for step in steps:
            if not step.begun and step.changes:
                records: list[Record] = [(change.user_id, change.record, []) for change in step.changes]
                records.append((LANE_KEY, msgspec.json.encode(step.lane.sign(step)), []))
                step.begin([await self._tools.publisher.begin(self._rules.changelog, step.lane.number, records)])
        steps = await self._acknowledged(steps, self._changelog)
        for step in steps:
            for offset in step.end():
                step.changelog = offset
        self._tools.metrics.stage('changelog', time.perf_counter() - started)
        return steps

    async def _outputs(self, steps: list[StepOutput]) -> list[StepOutput]:
        """Send messages and dead letters."""
        started = time.perf_counter()
        for step in steps:
            if not step.begun:
                sendings = await self._begin_messages(step.lane, step.messages)
                if step.letters:
                    sendings.append(await self._tools.publisher.begin(
                        self._rules.dead_letters, step.lane.number, step.letters))
                step.begin(sendings)
        steps = await self._acknowledged(steps, self._outputs)
        now_s = time.time()
        for step in steps:
            if step.end() and step.oldest_ms:
                self._tools.metrics.event_to_output_seconds.observe(max(now_s - step.oldest_ms / 1000, 0))
        self._tools.metrics.stage('outputs', time.perf_counter() - started)
        return steps

    async def _begin_messages(self, lane: Lane, messages: Sequence[Message]) -> list[Sending]:
        """Hand over decisions for the alerts topic, and scores for the scores topic.

        A user's messages keep their order.
        """
        if not messages:
            return []
        decisions, scores = split_scores(messages)
        begin, sendings = self._tools.publisher.begin_messages, []
        for topic, of_topic in ((self._rules.alerts, decisions), (self._rules.scores, scores)):
            if of_topic:
                sendings.append(await begin(topic, lane.number, of_topic, lane.source))
        self._tools.metrics.published(len(scores), [message.kind for message in decisions])
        return sendings

    def _done(self, steps: list[StepOutput]) -> None:
        """Everything is acknowledged: the blocks may be committed, and the records are written soon."""
        for step in steps:
            lane, published = step.lane, step.lane.publishing
            lane.finish(step)
            self._in_flight -= step.size
            lane.publishing = None
            assert published is not None
            published.set_result(None)
        self._tools.metrics.steps.inc(len(steps))
        if self._write_timer is None and self.writer.waiting:
            self._write_timer = asyncio.get_running_loop().call_later(WRITE_DELAY_S, self._write_soon)
        self._wake.set()

    # ---- the stores ------------------------------------------------------------------------------------------------

    def _write_soon(self) -> None:
        """Have `_dispatch` start to write what waits. At the end, `_sign_off` writes instead.

        A timer may call this while the beats end with an error. They take no task then, so none is started here.
        """
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        self._write_now = True
        self._wake.set()

    async def _write(self) -> None:
        """Write all finished steps to the stores."""
        started = time.perf_counter()
        await self.writer.flush()
        for lane in self._lanes:
            lane.trim()
        self._tools.metrics.stage('write', time.perf_counter() - started)
        self._wake.set()        # beats wait if too much is unwritten
