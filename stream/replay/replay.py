"""Replays recorded events through the step driver, in event-time order, as one stream.

Events from files have no offsets, so the replay counts the events of each topic from 0. Recorded Kafka records keep
their own offsets. Unlike a lane, a replay knows the time of the whole stream. Before each step it also fires the timers
of all other users that are due by then.
"""
from collections.abc import Callable, Iterable
from typing import IO

from stream.core.dead_letters import DeadLetter
from stream.core.driver import Step, StepDriver
from stream.core.events import SOURCE_OF_TYPE, Event, Refusal
from stream.core.layout import Fold
from stream.core.rules import ReplayRules
from stream.core.scorer import Scorer
from stream.core.user import User
from stream.errors import StateError
from stream.replay.account import Account, Counts
from stream.replay.recording import Chunk, Recording
from stream.replay.topic_records import decode_record
from stream.state.replay_state import State


class Replay:
    """One pass over a recording.

    outputs       receives one message per line
    dead_letters  receives one dead letter per line: file, row, reason, detail and the value
    """

    def __init__(self, recording: Recording, state: State, scorer: Scorer, rules: ReplayRules, outputs: IO[bytes],
                 dead_letters: IO[bytes]) -> None:
        self.account = Account(outputs, dead_letters)
        self._recording = recording
        self._state = state
        self._rules = rules
        self._driver = StepDriver(rules, scorer)
        self._decoder = recording.decoder(rules.events)
        self._next_offset = [0, 0]

    async def run(self, progress: Callable[[int], None] | None = None) -> Counts:
        """Replay everything. `progress` is called after each block, with its number of rows.

        Errors   InputError; ModelError; StateError if the counts do not add up, which is a defect.
        """
        account = self.account
        for block in self._recording.chunks(self._rules.block_events_max, self._rules.block_span_ms_max):
            await self._run_of_events(self._decode(block))
            if progress:
                progress(len(block.values))
        while due := list(self._silent(account.statistics.clock_ms, {})):
            await self._take(self._driver.sweep(due))
        for user in self._state.users():
            account.add_user(user)
        counts = account.counts
        if counts.read != counts.applied + counts.duplicate + counts.late + counts.dead:
            raise StateError(f'The counts do not add up: {counts}.', 'report this, with the recording.')
        return counts

    def _decode(self, block: Chunk) -> list[Event]:
        decode_event, next_offset, events = self._decoder, self._next_offset, []
        counts_offsets = self._recording.records is None
        for index, value in enumerate(block.values):
            outcome = block.bad.get(index) or decode_event(value)
            if isinstance(outcome, Event):
                if counts_offsets:
                    outcome.source = source = SOURCE_OF_TYPE[outcome.type]
                    outcome.offset = next_offset[source]
                    next_offset[source] += 1
                events.append(outcome)
            else:
                self.account.add_letter(
                    self._letter(block.numbers[index], value, Refusal(outcome.reason, outcome.detail)))
        self.account.counts.read += len(block.values)
        return events

    def _letter(self, number: int, value: bytes, refusal: Refusal) -> DeadLetter:
        path, row = self._recording.locate(number)
        record = None if self._recording.records is None else decode_record(value)
        if record is None:
            return DeadLetter(refusal, value, file=path.name, row=row)
        return DeadLetter(refusal, record.value, record.topic, record.partition, record.offset, record.key,
                          record.timestamp_ms, record.headers, path.name, row)

    async def _run_of_events(self, events: list[Event]) -> None:
        if not events:
            return
        self.account.statistics.add_events(events)
        users = self._state.load(dict.fromkeys([event.user_id for event in events]))
        clock_ms = events[0].ts_ms
        for step in self._driver.run(users, events, lambda: self._silent(clock_ms, users)):
            await self._take(step)

    def _silent(self, clock_ms: int, users: dict[str, User]) -> Iterable[User]:
        """Users outside `users` with a timer due by `clock_ms`, a limited number per call. Empty when none are left."""
        due = self._state.due(clock_ms, self._rules.block_events_max)
        return self._state.load(user_id for user_id in due if user_id not in users).values()

    async def _take(self, step: Step) -> None:
        counts = self.account.counts
        counts.applied += step.counts[Fold.APPLIED]
        counts.duplicate += step.counts[Fold.DUPLICATE]
        counts.late += step.counts[Fold.LATE]
        scored = await self._driver.score(step)
        self._state.save(entry.user for entry in step.touched)
        self.account.add_step(scored, scored.messages)
