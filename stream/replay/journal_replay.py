"""Recorded topics and the journal of a worker, replayed step by step: the worker's own outputs, byte for byte.

A replay of files cuts its own blocks and fires timers by one clock; this one reads in the journal what each lane did,
and does it again: the same blocks of the same records, the same sweeps, the same users who survived a kill, scored in
the same batches. Lanes come one after another, each with a state of its own.

What has to be the same besides is checked before anything is done: the model's SHA-256, and the rules of which the
journal holds a digest. Where the recording or the journal lacks something, the steps do not fit, and that is an error.
"""
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import msgspec
import numpy as np
import orjson

from stream.core.events import Event, Refusal, Source
from stream.core.journal import (
    Entry,
    EventsEntry,
    Kept,
    RecoveredEntry,
    TimersEntry,
    decode_entry,
    rules_digest,
    steps_of,
)
from stream.core.layout import NO_TIMER_MS
from stream.core.outbox import unpack_outbox
from stream.core.rules import ReplayRules
from stream.core.steps import Touched, block_steps, fire, time_order
from stream.core.user import User, decode, encode
from stream.errors import InputError, StateError, UsageError
from stream.replay.formats import FORMATS, kafka_format
from stream.replay.replay import Counts
from stream.replay.statistics import Statistics
from stream.replay.topic_records import Inputs, decode_record, decoder, escaped, readable
from stream.scoring.scorer import Scorer
from stream.scoring.step import score_step
from stream.state.replay_state import State

_PROGRESS_RECORDS = 8192
_USERS_SHOWN = 5
_DIGITS_SHOWN = 12

Journal = dict[int, list[Entry]]


# ---- recorded topics ------------------------------------------------------------------------------------------------

class _Place(msgspec.Struct, gc=False):
    topic: str
    partition: int
    offset: int
    timestamp_ms: int = 0


class RecordedTopics:
    """Recordings of the input topics, read by topic, partition and offset. Call `scan` first, `close` at the end.

    The lines are copied, uncompressed, to a temporary file that no name leads to; 24 bytes a record are in memory.

    rows      number of distinct records: one that two files hold counts once
    """

    def __init__(self, paths: Sequence[Path], inputs: Inputs, spool_dir: Path | None = None) -> None:
        """Nothing is read yet. `spool_dir`: for the temporary file; None: the system's folder for such files."""
        if not paths:
            raise UsageError('No file to replay was named.', 'name at least one file.')
        self.inputs = inputs
        self.rows = 0
        self._paths = list(paths)
        self._spool_dir = spool_dir
        self._spool: IO[bytes] | None = None
        self._tables: dict[tuple[str, int], np.ndarray] = {}     # int64 [N, 3]: offset, start, length; by offset

    def scan(self, progress: Callable[[int], None] | None = None) -> None:
        """Read everything once.

        progress  called now and then with the number of records read so far
        Errors    InputError where a file cannot be read, is none of `stream record`, or has none of the input topics.
        """
        columns: dict[tuple[str, int], tuple[array, array, array]] = {}
        start = 0
        try:
            self._spool = spool = TemporaryFile(dir=self._spool_dir)    # noqa: SIM115 - kept until `close`
            for read, (path, line) in enumerate(self._lines(), 1):
                place = _place(path, line)
                table = columns.setdefault((place.topic, place.partition), (array('q'), array('q'), array('q')))
                for column, value in zip(table, (place.offset, start, len(line)), strict=True):
                    column.append(value)
                spool.write(line)
                start += len(line)
                if progress and read % _PROGRESS_RECORDS == 0:
                    progress(read)
            spool.flush()
        except OSError as error:
            raise InputError(f'The records cannot be copied to a temporary file: {error}.',
                             'make room for all of them; TMPDIR names the folder.') from error
        if not columns:
            raise InputError(f'The recording has no record of {" or ".join(self.inputs.topics)}.',
                             'name recordings of the input topics; the settings clicks_topic and carts_topic say how '
                             'they are called.')
        for place, table in columns.items():
            rows = np.stack([np.frombuffer(column, np.int64) for column in table], axis=1)
            self._tables[place] = rows[np.unique(rows[:, 0], return_index=True)[1]]
        self.rows = sum(map(len, self._tables.values()))

    def lines(self, topic: str, partition: int, start: int, stop: int) -> list[bytes]:
        """The recorded lines of the offsets in [start, stop), in order; gaps are no error, topics have them."""
        table = self._tables.get((topic, partition))
        if table is None:
            return []
        assert self._spool is not None      # there is a table
        first, end = np.searchsorted(table[:, 0], (start, stop))
        number = self._spool.fileno()
        return [os.pread(number, length, at) for _, at, length in table[first:end].tolist()]

    def places(self) -> list[tuple[str, int]]:
        """Topics and partitions of which there are records."""
        return sorted(self._tables)

    def count_from(self, topic: str, partition: int, offset: int) -> int:
        """How many recorded records have this offset or a later one."""
        table = self._tables[topic, partition]
        return len(table) - int(np.searchsorted(table[:, 0], offset))

    def end(self, topic: str, partition: int) -> int:
        """One more than the newest recorded offset; 0: there is none."""
        table = self._tables.get((topic, partition))
        return 0 if table is None else int(table[-1, 0]) + 1

    def close(self) -> None:
        """Give the temporary file back."""
        if self._spool is not None:
            self._spool.close()

    def _lines(self) -> Iterator[tuple[Path, bytes]]:
        for path in self._paths:
            with closing(kafka_format(self.inputs).rows(path)) as rows:
                for line in rows:
                    assert isinstance(line, bytes)      # this format judges no row
                    yield path, line


_decode_place = msgspec.json.Decoder(_Place).decode


def _place(path: Path, line: bytes) -> _Place:
    try:
        return _decode_place(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f'{path} has a line that is no record of a topic: {error}.',
                         'name files that `stream record` has written to the end.') from error


# ---- the journal ----------------------------------------------------------------------------------------------------

def read_journal(path: Path) -> Journal:
    """Each lane's entries in order, lanes in order.

    path     what `stream record` wrote of the journal topic, in any order of partitions; or bare entries, one a line
    Errors   InputError where it cannot be read, holds something else, or holds no entry.
    """
    placed: dict[tuple[str, int, int], Entry] = {}
    for number, line in enumerate(FORMATS['events'].rows(path)):        # lines of JSON, maybe compressed
        assert isinstance(line, bytes)
        record = decode_record(line)
        if record is None:
            placed['', 0, number] = decode_entry(line)
        else:
            placed[record.topic, record.partition, record.offset] = decode_entry(record.value or b'')
    journal: Journal = {}
    homes: dict[int, tuple[str, int]] = {}
    for (topic, partition, _), entry in sorted(placed.items(), key=lambda item: item[0]):
        if homes.setdefault(entry.lane, (topic, partition)) != (topic, partition):
            raise InputError(f'The entries of lane {entry.lane} are in more than one topic partition, so that their '
                             'order is not known.', 'record the journal topic alone, as it is since it was created.')
        journal.setdefault(entry.lane, []).append(entry)
    if not journal:
        raise InputError(f'{path} has no journal entry.', 'record the journal topic (setting journal_topic).')
    return dict(sorted(journal.items()))


def described(journal: Journal, topics: tuple[str, str], with_users: bool = False) -> Iterator[str]:
    """The journal for a person: a heading, then one line an entry, lane by lane.

    with_users   name all users of an entry, not only the first ones
    """
    yield f'{"lane":>5} {"step":>9}  {"cause":<40} {"came to be":<14} {"model":<{_DIGITS_SHOWN}} users'
    for lane, entries in journal.items():
        counted = {id(entry): kept for entry, kept in steps_of(entries)}
        for entry in entries:
            happened = model = users = ''
            if isinstance(entry, RecoveredEntry):
                cause = 'a new owner found this'
            else:
                model = entry.model[:_DIGITS_SHOWN]
                happened = _happened(counted[id(entry)]) if id(entry) in counted else 'nothing'
                cause = (f'{len(entry.users)} timers' if isinstance(entry, TimersEntry)
                         else f'{topics[entry.source]} [{entry.start}, {entry.stop})')
            if not isinstance(entry, EventsEntry):
                users = 'all of the step' if entry.users is None else _shown(entry.users, with_users)
            yield f'{lane:>5} {entry.step:>9}  {cause:<40} {happened:<14} {model:<{_DIGITS_SHOWN}} {users}'.rstrip()


def _happened(kept: Kept | None) -> str:
    return 'all' if kept is None else f'to step {kept.step}'


def _shown(users: Sequence[str], all_of_them: bool) -> str:
    if all_of_them or len(users) <= _USERS_SHOWN:
        return ' '.join(users)
    return f'{" ".join(users[:_USERS_SHOWN])} and {len(users) - _USERS_SHOWN} more'


# ---- the replay -----------------------------------------------------------------------------------------------------

class _Lane(msgspec.Struct):
    """One lane while it is replayed.

    read_to   per source, where reading has come to: what is below was read before, and comes again
    step      the newest step that was done
    valid     distinct valid events that were read
    """

    number: int
    state: State
    read_to: list[int] = msgspec.field(default_factory=lambda: [0] * len(Source))
    step: int = 0
    valid: int = 0


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
        self.counts = Counts()
        self.statistics = Statistics()
        self.refused_scores = 0
        self.first_ms = self.last_ms = 0
        self.unfinished = self.passed_over = 0
        self._recorded = recorded
        self._journal = journal
        self._new_state = new_state
        self._scorer = scorer
        self._rules = rules
        self._outputs = outputs
        self._dead_letters = dead_letters
        self._decode_line = decoder(rules.events, recorded.inputs)
        _check(journal, scorer.model.sha256, rules)

    async def run(self, progress: Callable[[int], None] | None = None) -> Counts:
        """Replay everything. `progress` is told the number of records of each block.

        Errors   InputError where recording and journal do not fit; ModelError; StateError if the account does not
                 come out even, which is a defect.
        """
        for number, entries in self._journal.items():
            lane = _Lane(number, self._new_state(number))
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
        return self.counts

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
        if not events:
            lane.step += 1
            return count
        users = lane.state.load(dict.fromkeys([event.user_id for event in events]))
        steps = block_steps(users, events, self._rules.limits)
        while kept is None or lane.step < kept.step:
            survivors = _survivors(kept, lane.step + 1)
            before = _records(users) if survivors is not None else {}
            folded = next(steps, None)
            if folded is None:
                break
            await self._step(lane, folded.touched, survivors, before)
        return count

    async def _timers(self, lane: _Lane, entry: TimersEntry, kept: Kept | None) -> None:
        users = lane.state.load(entry.users)
        for user in users.values():
            if user.due_ms == NO_TIMER_MS:
                raise InputError(f'Lane {lane.number}, step {entry.step}: user {user.user_id!r} has no timer to fire.',
                                 _WHOLE)
        survivors = _survivors(kept, entry.step)
        before = _records(users) if survivors is not None else {}
        await self._step(lane, fire(users.values(), self._rules.limits), survivors, before)

    async def _step(
        self, lane: _Lane, touched: Sequence[Touched], survivors: frozenset[str] | None, before: Mapping[str, bytes],
    ) -> None:
        """Score and decide for all of `touched`; keep `survivors` (None: all), the others are as they were `before`."""
        lane.step += 1
        for entry in touched:
            entry.user.step = lane.step
        rules = self._rules
        scored = await score_step(touched, self._scorer, rules.policy, rules.publish, rules.reasons_rows_max)
        messages, alerts = scored.messages, scored.alerts
        if survivors is None:
            lane.state.save(entry.user for entry in touched)
        else:
            lane.state.save(_as_it_was(entry.user, survivors, before) for entry in touched
                            if entry.user.user_id in survivors or entry.user.user_id in before)
            messages = [message for entry in scored.rows if entry.user.user_id in survivors
                        for message in unpack_outbox(entry.user)]
            published = set(messages)
            alerts = [message for message in alerts if message in published]
        self.counts.scored += len(scored.rows) - scored.refused
        self.counts.alerts += len(alerts)
        self.refused_scores += scored.refused
        if scored.scores is not None:
            self.statistics.add_scores(scored.scores)
        if messages:
            self._outputs.write(b'\n'.join(messages) + b'\n')
            self.statistics.add_alerts(alerts)

    def _block(self, lane: _Lane, entry: EventsEntry) -> list[tuple[int, Event | None]]:
        """The records of a block, each with its own time, and its event if it is one; what is new is counted."""
        topic = self._recorded.inputs.topics[entry.source]
        self._between(self._recorded.lines(topic, lane.number, lane.read_to[entry.source], entry.start))
        block, new, read_to = [], [], lane.read_to[entry.source]
        for line in self._recorded.lines(topic, lane.number, entry.start, entry.stop):
            outcome, place = self._decode_line(line), _decode_place(line)
            event = outcome if isinstance(outcome, Event) else None
            block.append((place.timestamp_ms, event))
            if place.offset < read_to:
                continue
            if event is not None:
                new.append(event)
            elif isinstance(outcome, Refusal):
                self._dead_letter(place, line, outcome.reason, outcome.detail)
        lane.read_to[entry.source] = max(read_to, entry.stop)
        if new:
            self.statistics.add_events(new)
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
                self._dead_letter(_decode_place(line), line, outcome.reason, outcome.detail)

    def _dead_letter(self, place: _Place, line: bytes, reason: str, detail: str) -> None:
        letter: dict[str, Any] = {'topic': place.topic, 'partition': place.partition, 'offset': place.offset,
                                  'reason': reason, 'detail': escaped(detail)}
        record = decode_record(line)
        letter |= readable(line if record is None else record.value)
        self._dead_letters.write(orjson.dumps(letter) + b'\n')
        self.counts.dead += 1
        self.statistics.dead[reason] += 1

    def _add_up(self, lane: _Lane, has_owners: bool) -> None:
        counts, folded = self.counts, 0
        for user in lane.state.users():
            counts.users += 1
            counts.applied += user.applied
            counts.duplicate += user.duplicate
            counts.late += user.late
            folded += user.applied + user.duplicate + user.late
            self.statistics.add_final_tier(user.tier)
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
    digest = rules_digest(rules.events, rules.limits, rules.policy, rules.publish, rules.reasons_rows_max)
    entries = [entry for lane in journal.values() for entry, _ in steps_of(lane)]
    models = dict.fromkeys(entry.model for entry in entries)
    for model in models:
        if model != sha256:
            raise UsageError(
                f'The journal was written with the model of SHA-256 {model[:_DIGITS_SHOWN]}..., not with '
                f'{sha256[:_DIGITS_SHOWN]}....',
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
