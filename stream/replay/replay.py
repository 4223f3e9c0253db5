"""Recorded events through the core, in event-time order, as one stream.

The same steps as a lane of the worker: decode, fire what is due, fold, score, decide, write, publish. Record numbers of
the file take the place of offsets: each topic's events are counted from 0. Records of topics keep their own offsets.
"""
from collections.abc import Callable, Sequence
from typing import IO, Any

import msgspec
import orjson

from stream.core.events import SOURCE_OF_TYPE, Event
from stream.core.layout import Fold
from stream.core.rules import ReplayRules
from stream.core.steps import Touched, fire, fold_step
from stream.core.user import User, overdue
from stream.errors import StateError
from stream.replay.recording import Block, Recording
from stream.replay.statistics import Statistics
from stream.replay.topic_records import decode_record, escaped, readable
from stream.scoring.scorer import Scorer
from stream.scoring.step import score_step
from stream.state.replay_state import State


class Counts(msgspec.Struct):
    """The account of a replay: read = applied + duplicate + late + dead."""

    read: int = 0
    applied: int = 0
    duplicate: int = 0
    late: int = 0
    dead: int = 0
    users: int = 0
    scored: int = 0
    alerts: int = 0


class Replay:
    """One pass over a recording.

    outputs       takes one message a line
    dead_letters  takes one dead letter a line: file, row, reason, detail and the value
    """

    def __init__(self, recording: Recording, state: State, scorer: Scorer, rules: ReplayRules, outputs: IO[bytes],
                 dead_letters: IO[bytes]) -> None:
        self.counts = Counts()
        self.statistics = Statistics()
        self.refused_scores = 0
        self._recording = recording
        self._state = state
        self._scorer = scorer
        self._rules = rules
        self._outputs = outputs
        self._dead_letters = dead_letters
        self._decoder = recording.decoder(rules.events)
        self._next_offset = [0, 0]
        self._steps = 0

    async def run(self, progress: Callable[[int], None] | None = None) -> Counts:
        """Replay everything. `progress` is told the number of rows of each block.

        Errors   InputError, ModelError; StateError if the account does not come out even, which is a defect.
        """
        for block in self._recording.blocks(self._rules.block_events_max, self._rules.block_span_ms_max):
            await self._block(block)
            if progress:
                progress(len(block.values))
        await self._fire_timers(self.statistics.clock_ms, {}, [])
        counts = self.counts
        for user in self._state.users():
            counts.users += 1
            self.statistics.add_final_tier(user.tier)
        if counts.read != counts.applied + counts.duplicate + counts.late + counts.dead:
            raise StateError(f'The account is not even: {counts}.', 'report this, with the recording.')
        return counts

    async def _block(self, block: Block) -> None:
        events = self._decode(block)
        if not events:
            return
        self.statistics.add_events(events)
        users = self._state.load(dict.fromkeys([event.user_id for event in events]))
        clock_ms = events[0].ts_ms
        while events:
            await self._fire_timers(clock_ms, users, events)
            folded = fold_step(users, events, self._rules.limits)
            self.counts.applied += folded.counts[Fold.APPLIED]
            self.counts.duplicate += folded.counts[Fold.DUPLICATE]
            self.counts.late += folded.counts[Fold.LATE]
            await self._step(folded.touched)
            events = folded.rest

    def _decode(self, block: Block) -> list[Event]:
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
                self._dead_letter(block.numbers[index], value, outcome.reason, outcome.detail)
        self.counts.read += len(block.values)
        return events

    def _dead_letter(self, number: int, value: bytes, reason: str, detail: str) -> None:
        path, row = self._recording.locate(number)
        letter: dict[str, Any] = {'file': escaped(path.name), 'row': row, 'reason': reason, 'detail': escaped(detail)}
        record = None if self._recording.records is None else decode_record(value)
        if record is not None:
            letter |= {'topic': record.topic, 'partition': record.partition, 'offset': record.offset}
        letter |= readable(value if record is None else record.value)
        self._dead_letters.write(orjson.dumps(letter) + b'\n')
        self.counts.dead += 1
        self.statistics.dead[reason] += 1

    async def _fire_timers(self, clock_ms: int, users: dict[str, User], events: list[Event]) -> None:
        """Fire every timer due at the stream's time, and those of `users` that come before their first event."""
        while True:
            silent = self._state.load(
                user_id for user_id in self._state.due(clock_ms, self._rules.block_events_max) if user_id not in users)
            due = sorted([*silent.values(), *overdue(users, events)], key=lambda user: (user.due_ms, user.user_id))
            if not due:
                return
            await self._step(fire(due, self._rules.limits))

    async def _step(self, touched: Sequence[Touched]) -> None:
        rules = self._rules
        self._steps += 1
        for entry in touched:
            entry.user.step = self._steps
        scored = await score_step(touched, self._scorer, rules.policy, rules.publish, rules.reasons_rows_max)
        self._state.save(entry.user for entry in touched)
        self.counts.scored += len(scored.rows) - scored.refused
        self.counts.alerts += len(scored.alerts)
        self.refused_scores += scored.refused
        if scored.scores is not None:
            self.statistics.add_scores(scored.scores)
        if scored.messages:
            self._outputs.write(b'\n'.join(scored.messages) + b'\n')
            self.statistics.add_alerts(scored.alerts)
