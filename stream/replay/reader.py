"""Reads a recording run by run. A run holds the valid events of one block; each bad row becomes a dead letter.

Events from files have no offsets, so the reader counts the events of each topic from 0. Recorded Kafka records keep
their own offsets.
"""
from collections.abc import Iterator

import msgspec

from stream.core.dead_letters import DeadLetter
from stream.core.events import SOURCE_OF_TYPE, Event, Refusal
from stream.core.rules import ReplayRules
from stream.replay.account import Account
from stream.replay.recording import Chunk, Recording
from stream.replay.topic_records import decode_record


class Run(msgspec.Struct):
    """Consecutive events of a recording.

    values  the row of each event
    rows    number of rows that were read, with the bad ones
    """

    events: list[Event]
    values: list[bytes]
    rows: int


class RunReader:
    """Reads the runs of a recording once, in order."""

    def __init__(self, recording: Recording, rules: ReplayRules, account: Account) -> None:
        """`account` gets what was read: rows, events and dead letters."""
        self._recording = recording
        self._rules = rules
        self._account = account
        self._decode = recording.decoder(rules.events)
        self._next_offset = [0, 0]

    def runs(self) -> Iterator[Run]:
        """All runs. Errors: InputError if a file cannot be read, or has changed."""
        for block in self._recording.chunks(self._rules.block_events_max, self._rules.block_span_ms_max):
            yield self._run(block)

    def _run(self, block: Chunk) -> Run:
        decode_event, next_offset, events, refused = self._decode, self._next_offset, [], set()
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
                refused.add(index)
                self._account.add_letter(
                    self._letter(block.numbers[index], value, Refusal(outcome.reason, outcome.detail)))
        values = block.values
        if refused:
            values = [value for index, value in enumerate(values) if index not in refused]
        self._account.counts.read += len(block.values)
        self._account.statistics.add_events(events)
        return Run(events, values, len(block.values))

    def _letter(self, number: int, value: bytes, refusal: Refusal) -> DeadLetter:
        path, row = self._recording.locate(number)
        record = None if self._recording.records is None else decode_record(value)
        if record is None:
            return DeadLetter(refusal, value, file=path.name, row=row)
        return DeadLetter(refusal, record.value, record.topic, record.partition, record.offset, record.key,
                          record.timestamp_ms, record.headers, path.name, row)
