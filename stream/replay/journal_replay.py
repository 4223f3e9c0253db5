"""Replays recorded topics along a worker's journal, step by step. The outputs equal the worker's, byte for byte.

A replay of files cuts its own runs and fires timers by one clock. This replay repeats what the journal says each lane
did: the same runs of the same records, the same sweeps, the same surviving users after a kill, scored in the same
batches. It replays one lane after another, each with its own state and step driver.

Before it starts, it checks that model and rules are the worker's, by the SHA-256 and the digest in the journal. If the
recording or the journal is incomplete, the step numbers do not match, and the replay fails.
"""
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import IO

import msgspec

from stream.core.dead_letters import DeadLetter
from stream.core.driver import Step, StepDriver
from stream.core.events import Event, Refusal, Source, time_order
from stream.core.journal import EventsEntry, Kept, RecoveredEntry, TimersEntry, rules_digest, steps_of
from stream.core.layout import NO_TIMER_MS
from stream.core.rules import ReplayRules
from stream.core.scorer import Scorer
from stream.core.step_scorer import StepScorer
from stream.core.user import User, decode, encode
from stream.errors import InputError, StateError, UsageError
from stream.replay.account import Account, Counts
from stream.replay.journal_file import DIGITS_SHOWN, Journal
from stream.replay.recorded_topics import Place, RecordedTopics, decode_place
from stream.replay.topic_records import decode_record, decoder
from stream.state.replay_state import State


class _Lane(msgspec.Struct):
    """One lane during its replay.

    read_to   per source, the end of what has been read; records below it are read again after a kill
    valid     number of distinct valid events that were read
    """

    number: int
    state: State
    driver: StepDriver
    read_to: list[int] = msgspec.field(default_factory=lambda: [0] * len(Source))
    valid: int = 0

    @property
    def step(self) -> int:
        """Number of the newest step."""
        return self.driver.number


class JournalReplay:
    """One pass over recorded topics, along a journal.

    new_state     creates the state of a lane, given its number
    outputs       receives one message per line: lane by lane, and step by step within a lane
    dead_letters  receives one dead letter per line: topic, partition, offset, reason, detail and the value

    first_ms, last_ms  earliest and latest event time that was read, Unix ms; 0 if there was no event
    unfinished         number of events whose steps took no effect and were not repeated before the journal ends
    passed_over        number of events that precede a lane's blocks or lie between them: the worker skipped them or
                       started after them, or the journal lacks an entry
    """

    def __init__(
        self, recorded: RecordedTopics, journal: Journal, new_state: Callable[[int], State], scorer: Scorer,
        rules: ReplayRules, outputs: IO[bytes], dead_letters: IO[bytes],
    ) -> None:
        """Errors   UsageError if the model or the rules differ from the journal's."""
        self.account = Account(outputs, dead_letters)
        self.first_ms = self.last_ms = 0
        self.unfinished = self.passed_over = 0
        self._recorded = recorded
        self._journal = journal
        self._new_state = new_state
        self._steps = StepScorer(rules, scorer)
        self._rules = rules
        self._decode_line = decoder(rules.events, recorded.inputs)
        _check(journal, scorer.model.sha256, rules)

    async def run(self, progress: Callable[[int], None] | None = None) -> Counts:
        """Replay everything. `progress` is called after each run, with its number of records.

        Errors   InputError if recording and journal do not match; ModelError; StateError if the counts do not add up,
                 which is a defect.
        """
        for number, entries in self._journal.items():
            lane = _Lane(number, self._new_state(number), StepDriver(self._rules.limits))
            for step, counted in groupby(steps_of(entries), key=lambda counted: counted[0].step):
                if step != lane.step + 1:
                    raise _misfit(lane, step)
                run, (kept, *_) = zip(*counted, strict=True)
                if len(run) == 1 and isinstance(run[0], TimersEntry):
                    await self._timers(lane, run[0], kept)
                else:
                    records = await self._run_of_events(lane, run, kept)
                    if progress:
                        progress(records)
            self._add_up(lane, any(isinstance(entry, RecoveredEntry) for entry in entries))
        return self.account.counts

    def missing(self) -> list[str]:
        """The topic partitions whose recording ends before the journal does, each with the first missing offset.

        Transaction markers at the very end of a topic look the same, but are no loss.
        """
        stops = self._stops()
        return [f'{topic}-{partition} from offset {end} on' for (topic, partition), stop in stops.items()
                if (end := self._recorded.end(topic, partition)) < stop]

    def beyond(self) -> int:
        """Number of recorded records after the journal's end, which the worker had not reached."""
        stops = self._stops()
        return sum(self._recorded.count_from(*place, stops.get(place, 0)) for place in self._recorded.places())

    def _stops(self) -> dict[tuple[str, int], int]:
        """The position at which the journal ends, by topic and partition."""
        stops: dict[tuple[str, int], int] = {}
        for lane, entries in self._journal.items():
            for entry, _ in steps_of(entries):
                if isinstance(entry, EventsEntry):
                    place = self._recorded.inputs.topics[entry.source], lane
                    stops[place] = max(stops.get(place, 0), entry.stop)
        return stops

    async def _run_of_events(
        self, lane: _Lane, run: Sequence[EventsEntry | TimersEntry], kept: Kept | None,
    ) -> int:
        """Replay the steps of a run, as far as they took effect; return its number of records.

        run    the entry of a block, or the entries of one block of each input
        """
        blocks: list[list[tuple[int, Event | None]]] = [[], []]
        for entry in run:
            if isinstance(entry, TimersEntry) or blocks[entry.source]:
                raise InputError(f'The journal of lane {lane.number} has step {entry.step} twice.', _WHOLE)
            blocks[entry.source] = self._block(lane, entry)
        both = [*blocks[Source.CLICKS], *blocks[Source.CARTS]]
        count = len(both)
        in_order = [both[index] for index in time_order(*[[ts_ms for ts_ms, _ in block] for block in blocks])]
        events = [event for _, event in in_order if event is not None]
        users = lane.state.load(dict.fromkeys([event.user_id for event in events]))
        steps = lane.driver.run(users, events)
        while kept is None or lane.step < kept.step:
            survivors = _survivors(kept, lane.step + 1)
            before = _records(users) if survivors is not None else {}
            step = next(steps, None)
            if step is None:
                break
            await self._step(lane, step, survivors, before)
        return count

    async def _timers(self, lane: _Lane, entry: TimersEntry, kept: Kept | None) -> None:
        users = lane.state.load(entry.users)
        for user in users.values():
            if user.due_ms == NO_TIMER_MS:
                raise InputError(f'Lane {lane.number}, step {entry.step}: user {user.user_id!r} has no timer to fire.',
                                 _WHOLE)
        survivors = _survivors(kept, entry.step)
        before = _records(users) if survivors is not None else {}
        await self._step(lane, lane.driver.sweep(users.values()), survivors, before)

    async def _step(
        self, lane: _Lane, step: Step, survivors: frozenset[str] | None, before: Mapping[str, bytes],
    ) -> None:
        """Score and decide the whole step, because scores depend on the batch. Then keep only what took effect.

        survivors   users who keep the result of the step; None: all
        before      records of the users before the step; the other users go back to them
        """
        scored, = await self._steps.score([step])
        messages = scored.messages
        if survivors is None:
            lane.state.save(entry.user for entry in step.touched)
        else:
            lane.state.save(_kept_or_before(entry.user, survivors, before) for entry in step.touched
                            if entry.user.user_id in survivors or entry.user.user_id in before)
            messages = [message for user, outbox in scored.outboxes if user.user_id in survivors for message in outbox]
        self.account.add_step(scored, messages)

    def _block(self, lane: _Lane, entry: EventsEntry) -> list[tuple[int, Event | None]]:
        """The records of a block, as pairs of record time and event; None for an invalid event. Counts new records."""
        topic = self._recorded.inputs.topics[entry.source]
        self._between(self._recorded.lines(topic, lane.number, lane.read_to[entry.source], entry.start))
        block, new, read_to = [], [], lane.read_to[entry.source]
        for line in self._recorded.lines(topic, lane.number, entry.start, entry.stop):
            outcome, place = self._decode_line(line), decode_place(line)
            event = outcome if isinstance(outcome, Event) else None
            block.append((place.timestamp_ms, event))
            if place.offset < read_to:
                continue
            if event is not None:
                new.append(event)
            elif isinstance(outcome, Refusal):
                self._dead_letter(place, line, outcome)
        lane.read_to[entry.source] = max(read_to, entry.stop)
        if new:
            self.account.statistics.add_events(new)
            times = [event.ts_ms for event in new]
            self.first_ms = min(self.first_ms or times[0], *times)
            self.last_ms = max(self.last_ms, *times)
            lane.valid += len(new)
        return block

    def _between(self, lines: Sequence[bytes]) -> None:
        """Count records between two blocks of the journal. If nothing is missing, all of them are dead letters.

        A run without a valid event leaves no trace in the state. So if its owner was killed later, the journal counts
        the run as without effect, although its offsets were committed and nobody reads its records again.
        """
        for line in lines:
            outcome = self._decode_line(line)
            if isinstance(outcome, Event):
                self.passed_over += 1
            else:
                self._dead_letter(decode_place(line), line, outcome)

    def _dead_letter(self, place: Place, line: bytes, refusal: Refusal) -> None:
        record = decode_record(line)
        self.account.add_letter(DeadLetter(
            refusal, line if record is None else record.value, place.topic, place.partition, place.offset))

    def _add_up(self, lane: _Lane, has_owners: bool) -> None:
        counts, folded = self.account.counts, 0
        for user in lane.state.users():
            self.account.add_user(user)
            counts.applied += user.applied
            counts.duplicate += user.duplicate
            counts.late += user.late
            folded += user.applied + user.duplicate + user.late
        left = lane.valid - folded
        if left < 0 or (left and not has_owners):
            raise StateError(f'The counts of lane {lane.number} do not add up: {lane.valid} events, {folded} folded.',
                             'report this, with the recording and the journal.')
        self.unfinished += left
        counts.read = counts.applied + counts.duplicate + counts.late + counts.dead


_WHOLE = 'stop the worker or wait until it is idle, then record the whole input topics and the whole journal topic.'


def _misfit(lane: _Lane, step: int) -> InputError:
    if not lane.step:
        return InputError(
            f'The journal of lane {lane.number} begins with step {step}, so the state before that step is unknown.',
            "replay a journal that begins with its lanes' first steps; to keep them, set alerts_retention_days high "
            'enough before the journal topic is created.')
    return InputError(f'Lane {lane.number}: the journal continues with step {step}, but the recording has led to step '
                      f'{lane.step}.', _WHOLE)


def _check(journal: Journal, sha256: str, rules: ReplayRules) -> None:
    """Raise UsageError unless this model and these rules made every step that took effect."""
    digest = rules_digest(rules.events, rules)
    entries = [entry for lane in journal.values() for entry, _ in steps_of(lane)]
    models = dict.fromkeys(entry.model for entry in entries)
    for model in models:
        if model != sha256:
            raise UsageError(
                f'The journal was written with the model of SHA-256 {model[:DIGITS_SHOWN]}..., not with '
                f'{sha256[:DIGITS_SHOWN]}....',
                'name that model with --model.' if len(models) == 1 else
                f'keep only the lines up to the change of model: the journal names {len(models)} models, and a replay '
                'uses one.')
    digests = dict.fromkeys(entry.rules for entry in entries)
    for found in digests:
        if found != digest:
            raise UsageError(
                f'The journal was written with other settings (rules {found}, current rules {digest}).',
                "replay with the worker's own settings (--config) for events, window, policy, publish and "
                'reasons_rows_max.' if len(digests) == 1 else
                f'keep only the lines up to the change of settings: the journal has {len(digests)} digests, and a '
                'replay uses one.')


def _survivors(kept: Kept | None, step: int) -> frozenset[str] | None:
    """The users who keep the result of `step`; None: all."""
    return kept.users if kept is not None and kept.step == step else None


def _records(users: Mapping[str, User]) -> dict[str, bytes]:
    """The records of the users that have one. A user with step 0 was never stored."""
    return {user_id: encode(user) for user_id, user in users.items() if user.step}


def _kept_or_before(user: User, survivors: frozenset[str], before: Mapping[str, bytes]) -> User:
    return user if user.user_id in survivors else decode(user.user_id, before[user.user_id])
