"""Recorded topics and the journal of a worker, replayed step by step: the worker's own outputs, byte for byte.

A replay of files cuts its own runs and fires timers by one clock; this one reads in the journal what each lane did, and
does it again: the same runs of the same records, the same sweeps, the same users who survived a kill, scored in the
same batches. Lanes come one after another, each with a state and a step driver of its own.

What has to be the same besides is checked before anything is done: the model's SHA-256, and the rules of which the
journal holds a digest. Where the recording or the journal lacks something, the steps do not fit, and that is an error.
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
from stream.core.user import User, decode, encode
from stream.errors import InputError, StateError, UsageError
from stream.replay.account import Account, Counts
from stream.replay.journal_file import DIGITS_SHOWN, Journal
from stream.replay.recorded_topics import Place, RecordedTopics, decode_place
from stream.replay.topic_records import decode_record, decoder
from stream.state.replay_state import State


class _Lane(msgspec.Struct):
    """One lane while it is replayed.

    read_to   per source, where reading has come to: what is below was read before, and comes again
    valid     distinct valid events that were read
    """

    number: int
    state: State
    driver: StepDriver
    read_to: list[int] = msgspec.field(default_factory=lambda: [0] * len(Source))
    valid: int = 0

    @property
    def step(self) -> int:
        """The newest step that was done."""
        return self.driver.number


class JournalReplay:
    """One pass over recorded topics, along a journal.

    new_state     makes the state of a lane, given its number
    outputs       takes one message a line: lanes in order, within a lane in the order of its steps
    dead_letters  takes one dead letter a line: topic, partition, offset, reason, detail and the value

    first_ms, last_ms  earliest and latest event time that was read, Unix ms; 0 where there was no event
    unfinished         events of steps that came to nothing and were not taken again before the journal ends
    passed_over        events before a lane's blocks, or between them: the worker has skipped them, or began after them,
                       or the journal lacks an entry
    """

    def __init__(
        self, recorded: RecordedTopics, journal: Journal, new_state: Callable[[int], State], scorer: Scorer,
        rules: ReplayRules, outputs: IO[bytes], dead_letters: IO[bytes],
    ) -> None:
        """Errors   UsageError where the model or the rules are not those of the journal."""
        self.account = Account(outputs, dead_letters)
        self.first_ms = self.last_ms = 0
        self.unfinished = self.passed_over = 0
        self._recorded = recorded
        self._journal = journal
        self._new_state = new_state
        self._scorer = scorer
        self._rules = rules
        self._decode_line = decoder(rules.events, recorded.inputs)
        _check(journal, scorer.model.sha256, rules)

    async def run(self, progress: Callable[[int], None] | None = None) -> Counts:
        """Replay everything. `progress` is told the number of records of each block.

        Errors   InputError where recording and journal do not fit; ModelError; StateError if the account does not
                 come out even, which is a defect.
        """
        for number, entries in self._journal.items():
            lane = _Lane(number, self._new_state(number), StepDriver(self._rules, self._scorer))
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
        """Where the recording ends before the journal does: `topic-partition`, and from which offset on.

        Markers of transactions at the very end look the same, and are no loss.
        """
        stops = self._stops()
        return [f'{topic}-{partition} from offset {end} on' for (topic, partition), stop in stops.items()
                if (end := self._recorded.end(topic, partition)) < stop]

    def beyond(self) -> int:
        """Recorded records after the journal's end: the worker had not come to them."""
        stops = self._stops()
        return sum(self._recorded.count_from(*place, stops.get(place, 0)) for place in self._recorded.places())

    def _stops(self) -> dict[tuple[str, int], int]:
        """Where the journal ends, by topic and partition."""
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
        """The steps of a block, or of one of each input, as far as they came to be; gives the number of its records."""
        blocks: list[list[tuple[int, Event | None]]] = [[], []]
        for entry in run:
            if isinstance(entry, TimersEntry) or blocks[entry.source]:
                raise InputError(f'Lane {lane.number} has done step {entry.step} twice in its journal.', _WHOLE)
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
        """Score and decide for the whole step; keep `survivors` (None: all), the others are as they were `before`."""
        scored = await lane.driver.score(step)
        messages = scored.messages
        if survivors is None:
            lane.state.save(entry.user for entry in step.touched)
        else:
            lane.state.save(_as_it_was(entry.user, survivors, before) for entry in step.touched
                            if entry.user.user_id in survivors or entry.user.user_id in before)
            messages = [message for user, outbox in scored.outboxes if user.user_id in survivors for message in outbox]
        self.account.add_step(scored, messages)

    def _block(self, lane: _Lane, entry: EventsEntry) -> list[tuple[int, Event | None]]:
        """The records of a block, each with its own time, and its event if it is one; what is new is counted."""
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
        """Records of blocks that are in no state because no event was in them: dead letters, where all is well."""
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
            raise StateError(f'The account of lane {lane.number} is not even: {lane.valid} events, {folded} folded.',
                             'report this, with recording and journal.')
        self.unfinished += left
        counts.read = counts.applied + counts.duplicate + counts.late + counts.dead


_WHOLE = 'record the whole input topics and the whole journal topic, once the worker has stopped or has nothing to do.'


def _misfit(lane: _Lane, step: int) -> InputError:
    if not lane.step:
        return InputError(
            f'The journal of lane {lane.number} begins with step {step}: what its state was before is not known.',
            "replay a journal from its lanes' first steps on; keep the journal topic for as long as that "
            '(alerts_retention_days, when it is created).')
    return InputError(f'Lane {lane.number}: the journal goes on with step {step}, the recording has led to step '
                      f'{lane.step}.', _WHOLE)


def _check(journal: Journal, sha256: str, rules: ReplayRules) -> None:
    """UsageError unless every step that came to be was made by this model and these rules."""
    digest = rules_digest(rules.events, rules)
    entries = [entry for lane in journal.values() for entry, _ in steps_of(lane)]
    models = dict.fromkeys(entry.model for entry in entries)
    for model in models:
        if model != sha256:
            raise UsageError(
                f'The journal was written with the model of SHA-256 {model[:DIGITS_SHOWN]}..., not with '
                f'{sha256[:DIGITS_SHOWN]}....',
                'name that model with --model.' if len(models) == 1 else
                f'it names {len(models)} models and a replay takes one: keep the lines up to the change.')
    digests = dict.fromkeys(entry.rules for entry in entries)
    for found in digests:
        if found != digest:
            raise UsageError(
                f'The journal was written with other settings (rules {found}, these are {digest}).',
                "replay with the worker's own settings (--config): of the events, the window, the policy, publish and "
                'reasons_rows_max.' if len(digests) == 1 else
                f'they changed while it was written ({len(digests)} digests) and a replay takes one: keep the lines up '
                'to the change.')


def _survivors(kept: Kept | None, step: int) -> frozenset[str] | None:
    """The users of `step` that were found afterwards; None: all."""
    return kept.users if kept is not None and kept.step == step else None


def _records(users: Mapping[str, User]) -> dict[str, bytes]:
    """The records of those that have one; a user without a step was never stored."""
    return {user_id: encode(user) for user_id, user in users.items() if user.step}


def _as_it_was(user: User, survivors: frozenset[str], before: Mapping[str, bytes]) -> User:
    return user if user.user_id in survivors else decode(user.user_id, before[user.user_id])
