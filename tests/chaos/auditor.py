"""The auditor: re-reads what a group has read and written, folds it with the reference, and says what is not right.

It knows nothing of the worker. It takes the input topics as the truth, and everything else as a claim:

    C1 loss          every valid event is counted in its user's record exactly once: applied, duplicate or late
    C2 phantom       every output was recorded in its user's state; every timer lies within the time that was seen
    C3 duplicates    one id is one payload; after a clean run no id appears twice
    C4 order         a user's outputs are in one partition, in the order of the user's states
    C5 state         reference == changelog == RocksDB with its index of timers, every user, every state in between
    C6 offsets       never back, never past the end, never past a change or an output that was not yet acknowledged
    C7 conservation  read = applied + duplicate + late + dead-lettered; dead letters are exactly the invalid records
    C8 liveness      everything was read in time, and nobody stood still
    C9 decisions     each recorded decision was published; ids, causes, chains, thresholds and expiry recompute
    C10 validity     every planned fault fired in mid-stream, with events between
    C11 bounds       memory, handles and disk stayed below their caps

The changelog holds every state of every user (as long as compaction has taken none), with the offsets up to which the
user had been folded; one step folds both topics in the order of the records' times. So the order in which a user's
events were folded is known, and counters, late events and timers can be compared exactly, state by state. Where a state
is missing in between and the order matters, that user's windows and the sum of its counters are compared, which do not
depend on it.
"""
import itertools
import json
import struct
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from tests.chaos.log import SOURCES, Log, Record, Run, Store, Topic
from tests.chaos.record import Record as State
from tests.chaos.record import messages as announced_by
from tests.chaos.record import pack_days, unpack
from tests.chaos.reference import (
    CARTS,
    CLICKS,
    Event,
    InvalidError,
    Rules,
    User,
    is_number,
    median_tier,
    parse,
    partition_of,
    window_of,
)

Rescore = Callable[[Sequence[tuple[bytes, dict]]], Awaitable[Iterable[str]]]

CHECKS = {
    'C1': 'loss', 'C2': 'phantom', 'C3': 'duplicates', 'C4': 'order', 'C5': 'state', 'C6': 'offsets',
    'C7': 'conservation', 'C8': 'liveness', 'C9': 'decisions', 'C10': 'validity', 'C11': 'bounds'}
FINDINGS_KEPT = 20
RESCORED_EACH, RESCORED_MAX = 4, 1_000      # one message of so many, and at most so many of a partition
LANE_KEY = b'\xfflane'
NOT_USERS = b'\xff'         # never in UTF-8: keys from here on are no users
POWER, INTENT, CHURN, SCORES = 'purchase_power.updated', 'purchase_intent.alert', 'churn.alert', 'scores.updated'
_FOLDED = ('applied', 'duplicate', 'late', 'first_seen_ms', 'last_seen_ms', 'counts', 'spend', 'refunds', 'orders',
           'last_basket', 'last_order_ms', 'gaps', 'gap_days', 'gap_days_squared', 'silence', 'due_ms')
_NEVER = 1 << 62
_ANY = -1


class Check:
    """The outcome of one check: how much was looked at, how often it was wrong, and the first findings in words."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.looked_at: dict[str, int] = defaultdict(int)
        self.remarks: list[str] = []
        self.wrong = 0
        self.findings: list[str] = []

    @property
    def ok(self) -> bool:
        return self.wrong == 0


class Report:
    """All checks of one audit."""

    def __init__(self) -> None:
        self.checks = {code: Check(code) for code in CHECKS}

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks.values())

    @property
    def failed(self) -> set[str]:
        """Codes of the checks that found something."""
        return {code for code, check in self.checks.items() if not check.ok}

    def wrong(self, code: str, what: str) -> None:
        """Note a finding; the words of the first ones are kept."""
        check = self.checks[code]
        check.wrong += 1
        if len(check.findings) < FINDINGS_KEPT:
            check.findings.append(what)

    def saw(self, code: str, what: str, count: int = 1) -> None:
        """Note that something was looked at."""
        self.checks[code].looked_at[what] += count

    def remark(self, code: str, what: str) -> None:
        """Note something measured."""
        self.checks[code].remarks.append(what)

    def table(self, title: str = 'audit') -> Table:
        """For a person: one row a check."""
        table = Table(title=title, title_justify='left')
        for column in ('check', '', 'looked at', 'wrong', 'first finding'):
            table.add_column(column, justify='right' if column == 'wrong' else 'left', overflow='fold')
        for code, check in self.checks.items():
            looked = ', '.join([f'{count:,} {what}' for what, count in check.looked_at.items()] + check.remarks)
            table.add_row(f'{code} {CHECKS[code]}', '[green]ok[/]' if check.ok else '[bold red]WRONG[/]', looked or '-',
                          f'{check.wrong:,}', check.findings[0] if check.findings else '')
        return table

    def print(self, console: Console, title: str = 'audit') -> None:
        """The table, and under it all findings that were kept."""
        console.print(self.table(title))
        for check in self.checks.values():
            for finding in check.findings:
                console.print(f'{check.code}: {finding}', markup=False, highlight=False, soft_wrap=True)


class _Note(NamedTuple):
    """A message that a state's outbox announces. `position` counts the states of its user."""

    digest: int
    user_id: str
    position: int
    kind: str
    offset: int             # of the state in the changelog


@dataclass
class _Shopper:
    """One user: the events of the log by source, the reference as far as states have come, and what was claimed."""

    offsets: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    events: tuple[list[Event], list[Event]] = field(default_factory=lambda: ([], []))
    user: User | None = None
    at: list[int] = field(default_factory=lambda: [0, 0])      # index of the first event not folded, per source
    vector: list[int] = field(default_factory=lambda: [0, 0])  # the state's claim of the same, as offsets
    exact: bool = True
    newest_ms: int = 0          # of all events that the states cover
    state: State | None = None
    raw: bytes = b''
    digests: set[int] = field(default_factory=set)
    states: int = 0
    announced: int = 0          # decisions in the outboxes so far
    published: list[dict] = field(default_factory=list)        # distinct alerts, in the order of the topic
    last_positions: dict[Topic, int] = field(default_factory=dict)     # of the newest output seen, per topic


class _Samples:
    """When a position was committed, and where the ends of topics were then."""

    def __init__(self, run: Run, partition: int) -> None:
        self._samples = run.samples
        self._committed = [list(itertools.accumulate(
            (sample.committed.get((topic, partition), 0) for sample in run.samples), max)) for topic in SOURCES]
        self._partition = partition

    def end_when_committed(self, vector: Sequence[int], topic: Topic) -> int:
        """Where `topic` ended when both sources were first seen committed up to `vector`; _NEVER if never seen."""
        first = max(bisect_left(committed, position)
                    for committed, position in zip(self._committed, vector, strict=True))
        if first == len(self._samples):
            return _NEVER
        return self._samples[first].ends.get((topic, self._partition), _NEVER)


async def audit(log: Log, rules: Rules, run: Run, stores: Iterable[Store] = (),
                rescore: Rescore | None = None) -> Report:
    """Check everything that can be checked. One partition at a time, so that memory is that of one partition.

    rescore   tells what is wrong with the scores of some messages, given the records that they are about
    """
    report = Report()
    stores = list(stores)
    counted = {'read': 0, 'applied': 0, 'duplicate': 0, 'late': 0}
    invalid: dict[bytes, Record] = {}
    for partition in range(log.partitions):
        names = (log.names['clicks'], log.names['carts'])
        lane = PartitionAudit(partition, log.partitions, names, rules, run, report)
        for source in (CLICKS, CARTS):
            async for record in log.read(SOURCES[source], partition):
                lane.take_input(source, record)
        async for record in log.read('changelog', partition):
            lane.take_change(record)
        lane.end_of_changes()
        topics: tuple[Topic, Topic] = ('alerts', 'scores')
        for topic in topics:
            async for record in log.read(topic, partition):
                lane.take_output(topic, record)
        lane.end_of_outputs()
        mine = [store for store in stores if store.partition == partition]
        for store in mine:
            lane.take_store(store)
        if rescore is not None:
            report.saw('C9', 'scored again', len(lane.announced))
            for problem in await rescore(lane.announced):
                report.wrong('C9', problem)
        if stores and sum(store.owner for store in mine) != 1:
            report.wrong('C5', f'partition {partition} has {sum(store.owner for store in mine)} databases of an owner')
        invalid |= lane.invalid
        for name in counted:
            counted[name] += lane.counted[name]
    await _dead_letters(log, run, report, invalid, counted)
    _offsets(run, report)
    _liveness(run, report)
    _faults(run, report)
    for bound in run.bounds:
        report.remark('C11', f'{bound.name} {bound.seen:,.0f} of {bound.cap:,.0f} {bound.unit}'.strip())
        if bound.seen > bound.cap:
            report.wrong('C11', f'{bound.name}: {bound.seen:,.0f} {bound.unit}, at most {bound.cap:,.0f} are allowed')
    for code, what in run.problems:
        report.wrong(code, what)
    return report


class PartitionAudit:
    """One partition number of all topics. Records are given in the order: inputs, changelog, outputs, databases."""

    def __init__(self, partition: int, partitions: int, names: tuple[str, str], rules: Rules, run: Run,
                 report: Report) -> None:
        self.invalid: dict[bytes, Record] = {}
        self.announced: list[tuple[bytes, dict]] = []       # records, each with a message about it: a sample
        self.counted = {'read': 0, 'applied': 0, 'duplicate': 0, 'late': 0}
        self._partition, self._partitions, self._names = partition, partitions, names
        self._rules, self._run, self._report = rules, run, report
        self._samples = _Samples(run, partition)
        self._users: dict[str, _Shopper] = defaultdict(_Shopper)
        self._stream_ms = [0, 0]
        self._record_ms = [0, 0]
        self._ends = [0, 0]
        self._next_change = 0
        self._complete = True       # no state is missing in the changelog
        self._covered_at: list[tuple[int, int, int]] = []       # (source, offset, changelog offset) of each event
        self._lanes: list[tuple[int, list[int]]] = []           # (changelog offset, positions) of each lane record
        self._notes: dict[str, _Note] = {}
        self._seen: dict[str, int] = {}             # id -> digest of what was published

    # -- inputs

    def take_input(self, source: int, record: Record) -> None:
        """One record of an input topic."""
        self.counted['read'] += 1
        self._ends[source] = record.offset + 1
        try:
            event = parse(record.value, record.key, record.timestamp_ms, self._rules)
            if partition_of(event.user_id.encode(), self._partitions) != self._partition:
                raise InvalidError('misrouted')
        except InvalidError:
            self.invalid[f'{self._names[source]}-{self._partition}-{record.offset}'.encode()] = record
            return
        # A record counts as no earlier than those before it in its topic.
        self._record_ms[source] = max(self._record_ms[source], record.timestamp_ms)
        event = event._replace(record_ms=self._record_ms[source])
        shopper = self._users[event.user_id]
        shopper.offsets[source].append(record.offset)
        shopper.events[source].append(event)
        self._stream_ms[source] = max(self._stream_ms[source], event.ts_ms)

    # -- changelog

    def take_change(self, record: Record) -> None:
        """One record of the changelog: a user's next state, or the lane's own record."""
        self._complete &= record.offset == self._next_change
        self._next_change = record.offset + 1
        if record.key == LANE_KEY:
            self._lane_record(record)
            return
        where = f'changelog-{self._partition}@{record.offset}'
        try:
            user_id = (record.key or b'').decode()
            state = unpack(record.value or b'')
        except ValueError as error:
            self._report.wrong('C5', f'{where}: {error}')
            return
        shopper = self._users.get(user_id)
        if shopper is None:
            self._report.wrong('C2', f'{where}: a state of {user_id!r}, who has no valid event in this partition')
            return
        where = f'{user_id} {where}'
        self._report.saw('C5', 'states')
        shopper.states += 1
        timer_ms = self._advance(shopper, state, record.offset, where)
        self._compare(shopper, state, where)
        self._outbox(shopper, user_id, state, record.value or b'', timer_ms, record.offset, where)
        shopper.state, shopper.raw = state, record.value or b''
        shopper.digests.add(xxh3_64_intdigest(shopper.raw))

    def _lane_record(self, record: Record) -> None:
        where = f'changelog-{self._partition}@{record.offset}'
        try:
            positions = json.loads(record.value or b'')['positions']
            assert len(positions) == 2 and all(type(position) is int for position in positions)
        except (ValueError, KeyError, TypeError, AssertionError):
            self._report.wrong('C5', f'{where}: no lane record: {record.value!r:.200}')
            return
        # An owner that begins at the committed offsets goes over known ground again: the positions may fall.
        before = self._lanes[-1][1] if self._lanes else [0, 0]
        positions = [max(pair) for pair in zip(positions, before, strict=True)]
        self._lanes.append((record.offset, positions))

    def _advance(self, shopper: _Shopper, state: State, change: int, where: str) -> int | None:
        """Fold what the state claims to have folded; return the timer's due time if it is the state of a timer."""
        if shopper.user is None:
            shopper.user = User(self._rules)
        claim = [state.clicks, state.carts]
        runs: list[list[Event]] = []
        for source in (CLICKS, CARTS):
            offsets, at = shopper.offsets[source], shopper.at[source]
            end = bisect_left(offsets, claim[source])
            if claim[source] < shopper.vector[source]:
                self._report.wrong('C5', f'{where}: {SOURCES[source]} went back from {shopper.vector[source]} to '
                                         f'{claim[source]}')
                shopper.exact = False
                runs.append([])
                continue
            if claim[source] > shopper.vector[source] and (end == 0 or offsets[end - 1] != claim[source] - 1):
                self._report.wrong('C9', f'{where}: the cause names {SOURCES[source]} {claim[source]}, but the record '
                                         f'before it is no event of this user')
            for place in range(at, end):
                self._covered(source, offsets[place], change)
            runs.append(shopper.events[source][at:end])
            shopper.at[source], shopper.vector[source] = max(end, at), claim[source]
        for event in itertools.chain(*runs):
            shopper.newest_ms = max(shopper.newest_ms, event.ts_ms)
        if not shopper.exact:
            return None
        timer_ms = None
        clicks, carts = runs
        if clicks and carts and not self._complete:
            self._interleaved(shopper, state, clicks, carts)
        elif clicks or carts:
            self._fold(shopper.user, _in_time_order(clicks, carts), where)
        elif state.silence == shopper.user.silence + 1 and shopper.user.due_ms:
            timer_ms = shopper.user.fire()
            self._timer(timer_ms, where)
        while not self._complete and shopper.user.silence < state.silence and shopper.user.due_ms:
            self._timer(shopper.user.fire(), where)      # of states that compaction has taken
        return timer_ms

    def _covered(self, source: int, offset: int, change: int) -> None:
        if not self._complete:
            return      # perhaps in an earlier state, too
        self._covered_at.append((source, offset, change))
        self._report.saw('C6', 'changes')
        vector = [0, 0]
        vector[source] = offset + 1
        if self._samples.end_when_committed(vector, 'changelog') <= change:
            self._report.wrong('C6', f'{SOURCES[source]}-{self._partition}@{offset} was committed before its change '
                                     f'(changelog@{change}) was acknowledged')

    def _timer(self, timer_ms: int, where: str) -> None:
        self._report.saw('C2', 'timers')
        if timer_ms > max(self._stream_ms):
            self._report.wrong('C2', f'{where}: a timer fired that was due at {timer_ms}, but the newest event of this '
                                     f'partition is of {max(self._stream_ms)}')

    def _fold(self, user: User, events: list[Event], where: str) -> None:
        for event in events:
            if 0 < user.due_ms <= event.ts_ms and self._complete:
                self._report.wrong('C9', f'{where}: an event of {event.ts_ms} was folded before the timer due at '
                                         f'{user.due_ms} had fired')
                while 0 < user.due_ms <= event.ts_ms:
                    user.fire()
            user.fold(event)

    def _interleaved(self, shopper: _Shopper, state: State, clicks: list[Event], carts: list[Event]) -> None:
        """States are missing in between. Take the order that explains this one, if one of the simple ones does."""
        assert shopper.user is not None
        for order in (_in_time_order(clicks, carts), clicks + carts, carts + clicks):
            twin = shopper.user.clone()
            for event in order:
                twin.fold(event)
            if all(getattr(twin, name) == getattr(state, name) for name in _FOLDED):
                shopper.user = twin
                return
        shopper.exact = False

    def _compare(self, shopper: _Shopper, state: State, where: str) -> None:
        user = shopper.user
        assert user is not None
        if not shopper.exact:
            self._compare_loosely(shopper, state, where)
            return
        for name in _FOLDED:
            if getattr(user, name) != getattr(state, name):
                self._report.wrong('C5', f'{where}: {name} is {getattr(state, name)}, the reference says '
                                         f'{getattr(user, name)}')
        if state.applied != user.applied:
            self._report.wrong('C1', f'{where}: events_seen is {state.applied}, {user.applied} events were applied')
        if state.days != pack_days(user.days):
            self._report.wrong('C5', f'{where}: day buckets differ from the reference')
        if state.rows != b''.join(row for _, _, row in user.window):
            self._report.wrong('C5', f'{where}: the window differs from the reference: {_difference(user, state)}')
        if state.ids != b''.join(key.to_bytes(8, 'little') for _, key, _ in user.window):
            self._report.wrong('C5', f"{where}: the window's event ids differ from the reference")

    def _compare_loosely(self, shopper: _Shopper, state: State, where: str) -> None:
        events = [event for source in (CLICKS, CARTS) for event in shopper.events[source][:shopper.at[source]]]
        window = window_of(events, self._rules)
        if state.rows != b''.join(row for _, _, row in window):
            self._report.wrong('C5', f'{where}: the window is not that of the set of events')
        if state.applied + state.duplicate + state.late != len(events):
            self._report.wrong('C1', f'{where}: {state.applied} applied, {state.duplicate} duplicate and {state.late} '
                                     f'late events are not the {len(events)} of the log')

    # -- the messages that a state announces

    def _outbox(self, shopper: _Shopper, user_id: str, state: State, raw_state: bytes, timer_ms: int | None,
                change: int, where: str) -> None:
        before = shopper.state
        messages = []
        try:
            announced = announced_by(user_id, state)
        except (ValueError, struct.error) as error:
            self._report.wrong('C9', f'{where}: the outbox cannot be read: {error}')
            announced = []
        for raw in announced:
            try:
                message = json.loads(raw)
                messages.append((raw, message, message['id'], message['type']))
            except (ValueError, KeyError, TypeError):
                self._report.wrong('C9', f'{where}: the outbox holds no message: {raw!r:.200}')
        number = state.decisions - sum(kind != SCORES for _, _, _, kind in messages)
        fresh = 0
        for raw, message, identity, kind in messages:
            number += kind != SCORES
            digest = xxh3_64_intdigest(raw)
            note = self._notes.get(identity)
            if note is not None:
                if note.digest != digest:
                    self._report.wrong('C3', f'{where}: id {identity} was given to another message before')
                continue        # the same state again, written a second time after a restart: nothing new
            self._notes[identity] = _Note(digest, user_id, shopper.states, kind, change)
            fresh += kind != SCORES
            timer = timer_ms if self._complete else _ANY
            for problem in _wrong_message(message, user_id, state, shopper, number, timer, self._rules):
                self._report.wrong('C9', f'{where}: {kind} {identity}: {problem}')
            self._report.saw('C9', 'messages recomputed')
            if digest % RESCORED_EACH == 0 and len(self.announced) < RESCORED_MAX:
                self.announced.append((raw_state, message))
        shopper.announced += fresh
        if state.decisions != shopper.announced and self._complete:
            self._report.wrong('C9', f'{where}: {state.decisions} decisions are recorded, the outboxes so far announce '
                                     f'{shopper.announced}')
            shopper.announced = state.decisions
        if self._rules.publish != 'changes' and shopper.exact and self._complete:
            applied = state.applied - (before.applied if before else 0)
            scored = applied > 0 or timer_ms is not None
            scores = sum(b'"scores.updated"' in raw[:80] for raw in announced)
            if scored and not scores:
                self._report.wrong('C9', f'{where}: the user was scored, and no scores are published')

    # -- ends

    def end_of_changes(self) -> None:
        """All states are known: is every event in one, and does every lane record speak the truth?"""
        report, partition = self._report, self._partition
        for user_id, shopper in self._users.items():
            report.saw('C1', 'users')
            for source in (CLICKS, CARTS):
                report.saw('C1', 'events', len(shopper.offsets[source]))
                for offset in shopper.offsets[source][shopper.at[source]:]:
                    report.wrong('C1', f'{user_id}: {SOURCES[source]}-{partition}@{offset} is in no state')
            state = shopper.state
            if state is None:
                continue
            for name in ('applied', 'duplicate', 'late'):
                self.counted[name] += getattr(state, name)
            valid = sum(map(len, shopper.offsets))
            if state.applied + state.duplicate + state.late != valid:
                report.wrong('C1', f'{user_id}: {state.applied} applied, {state.duplicate} duplicate and {state.late} '
                                   f'late events are not the {valid} of the log')
            events = shopper.events[CLICKS] + shopper.events[CARTS]
            if state.rows != b''.join(row for _, _, row in window_of(events, self._rules)):
                report.wrong('C5', f'{user_id}: the final window is not that of the set of all events')
            report.saw('C5', 'users compared state by state' if shopper.exact else 'users compared by sets alone')
            # Everything has been read, so the lane's clock is at least the slower topic's.
            if 0 < state.due_ms <= min(self._stream_ms):
                report.wrong('C8', f'{user_id}: a timer due at {state.due_ms} has not fired, both topics have reached '
                                   f'{min(self._stream_ms)}')
        changes = [change for change, _ in self._lanes]
        for source in (CLICKS, CARTS):
            positions = [lane[source] for _, lane in self._lanes]
            for which, offset, change in self._covered_at:
                if which == source:
                    claimed = bisect_right(positions, offset)
                    if claimed < len(changes) and changes[claimed] < change:
                        report.wrong('C6', f'changelog-{partition}@{changes[claimed]}: the lane claims to be past '
                                           f'{SOURCES[source]}@{offset}, whose change came later, at {change}')
        report.saw('C6', 'lane records', len(self._lanes))
        self._covered_at.clear()

    # -- outputs

    def take_output(self, topic: Topic, record: Record) -> None:
        """One record of alerts or scores."""
        report = self._report
        where = f'{topic}-{self._partition}@{record.offset}'
        raw = record.value or b''
        try:
            message = json.loads(raw)
            identity, kind, user_id = message['id'], message['type'], message['user_id']
            cause = message['cause']
            vector = [cause['clicks_offset'], cause['carts_offset']]
            key = user_id.encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            report.wrong('C2', f'{where}: no message: {raw!r:.200}')
            return
        report.saw('C2', topic)
        where = f'{where} {user_id} {kind} {identity}'
        if (kind == SCORES) != (topic == 'scores'):
            report.wrong('C4', f'{where}: in the wrong topic')
        if record.key != key:
            report.wrong('C4', f'{where}: its key is {record.key!r}')
        if partition_of(key, self._partitions) != self._partition:
            report.wrong('C4', f"{where}: not in its user's partition")
        for problem in _wrong_headers(record, message, self._rules):
            report.wrong('C9', f'{where}: {problem}')
        digest = xxh3_64_intdigest(raw)
        published = self._seen.get(identity)
        if published is not None:
            report.saw('C3', 'repeats')
            if published != digest:
                report.wrong('C3', f'{where}: the same id with another payload')
            if self._run.clean:
                report.wrong('C3', f'{where}: a repeat, though nothing was killed')
        else:
            self._seen[identity] = digest
            report.saw('C3', 'ids')
            if not cause.get('timer_ms') and self._samples.end_when_committed(vector, topic) <= record.offset:
                report.wrong('C6', f'{where}: its cause {vector} was committed before it was acknowledged')
        shopper = self._users.get(user_id)
        if shopper is None:
            report.wrong('C2', f'{where}: its user has no valid event in this partition')
            return
        if published is None and kind != SCORES:
            shopper.published.append(message)
        note = self._notes.get(identity)
        if note is None:
            if self._complete:
                report.wrong('C2', f'{where}: no state announces it')
            else:
                self._cause_exists(shopper, message, vector, where)
            return
        if note.digest != digest and published is None:
            report.wrong('C3', f"{where}: its payload is not what its user's state announces")
        if note.user_id != user_id:
            report.wrong('C2', f'{where}: the state of {note.user_id} announces it')
            return
        report.saw('C4', 'outputs')
        last = shopper.last_positions.get(topic, 0)
        if note.position < last:
            report.wrong('C4', f'{where}: after an output of a later state')
        shopper.last_positions[topic] = max(last, note.position)

    def _cause_exists(self, shopper: _Shopper, message: dict, vector: list[int], where: str) -> None:
        """For an output whose state compaction has removed."""
        events = 0
        for source in (CLICKS, CARTS):
            place = bisect_left(shopper.offsets[source], vector[source])
            events += place
            if vector[source] and (not place or shopper.offsets[source][place - 1] != vector[source] - 1):
                self._report.wrong('C9', f'{where}: its cause names no event of its user')
        if not 0 < message['events_seen'] <= events:
            self._report.wrong('C9', f'{where}: events_seen is {message["events_seen"]} of {events} in its cause')

    def end_of_outputs(self) -> None:
        """All outputs are known: was every recorded message published, and are the chains unbroken?"""
        report = self._report
        for identity, note in self._notes.items():
            if identity not in self._seen:
                report.wrong('C9', f'{note.user_id}: {note.kind} {identity}, announced at changelog-{self._partition}@'
                                   f'{note.offset}, was never published')
        for user_id, shopper in self._users.items():
            if shopper.state is None:
                if shopper.published:
                    report.wrong('C2', f'{user_id}: has decisions, but no state')
                continue
            for problem in _wrong_chain(shopper.published, shopper.state, self._rules):
                report.wrong('C9', f'{user_id}: {problem}')
            report.saw('C9', 'decisions', len(shopper.published))

    # -- databases

    def take_store(self, store: Store) -> None:
        """A database of this partition. An owner's is the folded changelog; another's holds states that once were."""
        report = self._report
        found: set[str] = set()
        timers: set[bytes] = set()
        for key, value in store.records():
            if key >= NOT_USERS:
                continue
            user_id = key.decode('utf-8', 'backslashreplace')
            shopper = self._users.get(user_id)
            report.saw('C5', 'records in RocksDB' if store.owner else 'records in older copies')
            if shopper is None or shopper.state is None:
                report.wrong('C5', f'{store.name}: holds {user_id!r}, of whom the changelog knows nothing')
                continue
            found.add(user_id)
            if store.owner and value != shopper.raw:
                report.wrong('C5', f"{store.name}: the record of {user_id} is not the changelog's newest")
            if not store.owner and xxh3_64_intdigest(value) not in shopper.digests and self._complete:
                report.wrong('C5', f'{store.name}: the record of {user_id} was never in the changelog')
            if shopper.state.due_ms:
                timers.add(shopper.state.due_ms.to_bytes(8, 'big') + key)
        if not store.owner:
            return
        for user_id, shopper in self._users.items():
            if shopper.state is not None and user_id not in found:
                report.wrong('C5', f'{store.name}: has no record of {user_id}')
        due = set(store.due())
        for key in due ^ timers:
            report.wrong('C5', f'{store.name}: the timer {int.from_bytes(key[:8], "big")} of {key[8:]!r} is '
                               f'{"in the index alone" if key in due else "not in the index"}')


def _in_time_order(clicks: list[Event], carts: list[Event]) -> list[Event]:
    """The order in which one step folds both topics: by the records' times, clicks first of equal ones."""
    return sorted([*clicks, *carts], key=lambda event: event.record_ms)


def _difference(user: User, state: State) -> str:
    ours = [row for _, _, row in user.window]
    theirs = [state.rows[at:at + 24] for at in range(0, len(state.rows), 24)]
    return f'{len(set(ours) - set(theirs))} rows missing, {len(set(theirs) - set(ours))} too many'


def _occasion(message: dict) -> str | None:
    match message['type'], message.get('state'):
        case 'purchase_intent.alert', 'raised':
            return 'intent'
        case 'churn.alert', 'raised' | 'cleared' as state:
            return f'churn_{state}'
        case 'purchase_power.updated', None:
            before, tier = message['previous_tier'], message['tier']
            return 'power_first' if before is None else 'power_up' if tier > before else 'power_down'
    return None


def _wrong_message(message: dict, user_id: str, state: State, shopper: _Shopper, number: int, timer_ms: int | None,
                   rules: Rules) -> Iterable[str]:
    """What does not follow from the state that announces the message. `number`: of the decision, from 1."""
    try:
        yield from _wrong_content(message, user_id, state, shopper, number, timer_ms, rules)
    except (KeyError, TypeError, ValueError) as error:
        yield f'cannot be read: {error!r}'


def _wrong_content(message: dict, user_id: str, state: State, shopper: _Shopper, number: int, timer_ms: int | None,
                   rules: Rules) -> Iterable[str]:
    kind, cause, scores = message['type'], message['cause'], message['scores']
    occasion = _occasion(message)
    if message['user_id'] != user_id:
        yield f'its user is {message["user_id"]!r}'
    if message['events_seen'] != state.applied:
        yield f'events_seen is {message["events_seen"]}, the record says {state.applied}'
    if [cause['clicks_offset'], cause['carts_offset']] != [state.clicks, state.carts]:
        yield f'its cause {cause} is not that of the state, {[state.clicks, state.carts]}'
    if shopper.exact:
        assert shopper.user is not None
        as_of_ms = shopper.user.clock_ms()
        if message['as_of_ms'] != as_of_ms:
            yield f'as_of_ms is {message["as_of_ms"]}, the state has come to {as_of_ms}'
        if timer_ms != _ANY and cause['timer_ms'] != timer_ms:
            yield f'its timer is {cause["timer_ms"]}, the state is that of {timer_ms}'
    what: list[Any] = [message.get('event_id') or ''] if kind == SCORES else [occasion, number]
    identity = [user_id, kind, *what, cause['timer_ms'] or 0, state.clicks, state.carts, state.applied,
                message['model']['sha256']]
    if message['id'] != xxh3_128_hexdigest(json.dumps(identity, ensure_ascii=False, separators=(',', ':')).encode()):
        yield 'its id does not follow from its user, kind, number, cause and model'
    for name in ('purchase_intent', 'purchase_power', 'churn'):
        if not is_number(scores[name], 0, 1) or abs(scores[name] * 10_000 - round(scores[name] * 10_000)) > 1e-6:
            yield f'{name} is {scores[name]}, which is not in [0, 1] on the grid'
    if not is_number(scores['expected_spend_90d'], 0, 1e300):
        yield f'expected_spend_90d is {scores["expected_spend_90d"]}'
    probabilities = message['tier_probabilities']
    if abs(sum(probabilities) - 1) > 2e-3:
        yield f'its tier probabilities sum to {sum(probabilities)}'
    if kind == SCORES:
        return
    if occasion is None:
        yield f'no such decision: {message.get("state")}'
        return
    if message['expires_at_ms'] != message['as_of_ms'] + rules.ttl_ms[kind]:
        yield f'expires_at_ms is {message["expires_at_ms"]}, {rules.ttl_ms[kind]} after as_of_ms was due'
    intent, churn = scores['purchase_intent'], scores['churn']
    if occasion == 'intent' and intent < rules.intent_raise:
        yield f'raised at {intent}'
    if occasion == 'churn_raised' and (churn < rules.churn_raise or state.orders < rules.churn_orders_min):
        yield f'raised at {churn} with {state.orders} orders'
    if occasion == 'churn_cleared' and churn > rules.churn_clear:
        yield f'cleared at {churn}'
    if occasion == 'power_first' and state.applied < rules.tier_events_min:
        yield f'a first tier after {state.applied} events'
    if kind == POWER and message['tier'] != median_tier(probabilities):
        yield f'tier {message["tier"]} is not the median of {probabilities}'
    tier = -1 if message['tier'] is None else message['tier']
    action = next((action for name, action, low, high, least in rules.actions
                   if name == occasion and low <= tier <= high and state.spend >= least), None)
    if message['action'] != action:
        yield f'proposes {message["action"]}, the rules say {action}'


def _wrong_chain(alerts: list[dict], state: State, rules: Rules) -> Iterable[str]:
    """The user's distinct decisions in the order of the topic, against the user's final state."""
    try:
        previous, last_raised_ms = None, {}
        last: dict[str, dict] = {}
        churning, tier, ruler = False, None, None
        for alert in alerts:
            kind, as_of_ms = alert['type'], alert['as_of_ms']
            if alert['previous_id'] != previous:
                yield f'{kind} {alert["id"]} follows {previous}, but says that it follows {alert["previous_id"]}'
            previous = alert['id']
            last[kind] = alert
            if kind == CHURN:
                if churning == (alert['state'] == 'raised'):
                    yield f'churn {alert["id"]} is {alert["state"]} a second time'
                churning = alert['state'] == 'raised'
            if kind == POWER:
                # (Under another model the tier may have been set anew without a message.)
                if alert['previous_tier'] != tier and ruler in (None, alert['model']['sha256']):
                    yield f'tier {alert["id"]} replaces {alert["previous_tier"]}, the one before was {tier}'
                tier, ruler = alert['tier'], alert['model']['sha256']
            if kind != CHURN or churning:
                if kind in last_raised_ms and as_of_ms - last_raised_ms[kind] < rules.cooldown_ms[kind]:
                    yield f'{kind} {alert["id"]} came {as_of_ms - last_raised_ms[kind]} ms after the one before'
                last_raised_ms[kind] = as_of_ms
        if len(alerts) != state.decisions:
            yield f'{state.decisions} decisions are recorded, {len(alerts)} were published'
        if (previous or '0' * 32) != state.decision_id.hex():
            yield f'the last decision recorded is {state.decision_id.hex()}, the last one published {previous}'
        for kind, recorded_ms in ((POWER, state.power_at_ms), (INTENT, state.intent_at_ms), (CHURN, state.churn_at_ms)):
            published_ms = last_raised_ms.get(kind, 0)
            if published_ms != recorded_ms:
                yield f'the last {kind} was recorded at {recorded_ms}, and published as of {published_ms}'
        if churning != bool(state.alerting & 2):
            yield f'the record says churn alert {bool(state.alerting & 2)}, the topic {churning}'
        if state.alerting & 1 and INTENT not in last:
            yield 'the record says that an intent alert is raised, none was published'
        power = last.get(POWER)
        if power is None:
            if state.tier != -1:
                yield f'tier {state.tier} is recorded, none was published'
        elif power['model']['sha256'][:16] == state.model.hex():
            grid = round(power['scores']['purchase_power'] * 10_000)
            if (power['tier'], grid) != (state.tier, state.power_grid):
                yield f'tier {state.tier} at {state.power_grid} is recorded, {power["tier"]} at {grid} was published'
    except (KeyError, TypeError) as error:
        yield f'its decisions cannot be read: {error!r}'


def _wrong_headers(record: Record, message: dict, rules: Rules) -> Iterable[str]:
    headers = dict(record.headers)
    try:
        time = datetime.fromtimestamp(message['as_of_ms'] / 1000, UTC).isoformat(timespec='milliseconds')
    except (KeyError, TypeError, ValueError):
        yield 'it has no as_of_ms'
        return
    for name, text in (
            ('ce_specversion', '1.0'), ('ce_id', message['id']), ('ce_type', message['type']),
            ('ce_source', f'/stream/{rules.group}'), ('ce_subject', message['user_id']),
            ('ce_time', time.replace('+00:00', 'Z')), ('content-type', 'application/json')):
        if headers.get(name) != text.encode():
            yield f'header {name} is {headers.get(name)!r}, expected {text!r}'


async def _dead_letters(log: Log, run: Run, report: Report, invalid: dict[bytes, Record],
                        counted: dict[str, int]) -> None:
    letters: set[bytes] = set()
    samples = [_Samples(run, partition) for partition in range(log.partitions)]
    for partition in range(log.partitions):
        async for letter in log.read('dead_letters', partition):
            key = letter.key or b''
            where = f'dead_letters-{partition}@{letter.offset} {key!r}'
            record = invalid.get(key)
            if record is None:
                report.wrong('C7', f'{where}: a dead letter of a valid record, or of none')
                continue
            if key in letters:
                report.saw('C7', 'repeats')
            elif _committed_early(samples, log, key, letter.offset, partition):
                report.wrong('C6', f'{where}: its record was committed before it was acknowledged')
            letters.add(key)
            if letter.value != record.value:
                report.wrong('C7', f'{where}: its value is not what was received')
            for problem in _wrong_letter(letter, record, key):
                report.wrong('C7', f'{where}: {problem}')
    for key in invalid.keys() - letters:
        report.wrong('C7', f'{key.decode()} is no event, and no dead letter')
    report.saw('C7', 'dead letters', len(letters))
    report.saw('C7', 'read', counted['read'])
    accounted = counted['applied'] + counted['duplicate'] + counted['late'] + len(letters)
    if accounted != counted['read']:
        report.wrong('C7', f'{counted["read"]} read, but {counted["applied"]} applied + {counted["duplicate"]} '
                           f'duplicate + {counted["late"]} late + {len(letters)} dead = {accounted}')
    for name in ('applied', 'duplicate', 'late'):
        report.saw('C7', name, counted[name])


def _committed_early(samples: list[_Samples], log: Log, key: bytes, offset: int, partition: int) -> bool:
    topic, of, at = key.decode().rsplit('-', 2)
    vector = [0, 0]
    vector[[log.names[source] for source in SOURCES].index(topic)] = int(at) + 1
    return int(of) == partition and samples[partition].end_when_committed(vector, 'dead_letters') <= offset


def _wrong_letter(letter: Record, record: Record, key: bytes) -> Iterable[str]:
    original = record.headers
    if letter.headers[:len(original)] != original:
        yield 'the headers of the record are missing'
    headers = dict(letter.headers[len(original):])
    topic, partition, offset = key.decode().rsplit('-', 2)
    expected = {'stream_topic': topic.encode(), 'stream_partition': partition.encode(),
                'stream_offset': offset.encode(), 'stream_timestamp_ms': str(record.timestamp_ms).encode(),
                'stream_key': record.key}
    for name, value in expected.items():
        if headers.get(name) != value:
            yield f'header {name} is {headers.get(name)!r}, expected {value!r}'
    for name in ('stream_reason', 'stream_detail'):
        if not headers.get(name):
            yield f'header {name} is missing'


def _offsets(run: Run, report: Report) -> None:
    """Committed offsets never go back, and never past the end."""
    before: dict[tuple[Topic, int], int] = {}
    for sample in run.samples:
        report.saw('C6', 'samples')
        for place, committed in sample.committed.items():
            name = f'{place[0]}-{place[1]}'
            if committed < before.get(place, 0):
                report.wrong('C6', f'{name}: went back from {before[place]} to {committed} at {sample.at_s:.1f} s')
            before[place] = max(committed, before.get(place, 0))
            if committed > sample.ends.get(place, _NEVER):
                report.wrong('C6', f'{name}: {committed} is past the end, {sample.ends[place]}, at {sample.at_s:.1f} s')
        for place in before.keys() - sample.committed.keys():
            report.wrong('C6', f'{place[0]}-{place[1]}: nothing is committed any more at {sample.at_s:.1f} s')


def _liveness(run: Run, report: Report) -> None:
    if run.settled_s is None or run.settled_s > run.settle_s_max:
        report.wrong('C8', f'not everything was read within {run.settle_s_max:.0f} s of the last fault')
    else:
        report.remark('C8', f'settled after {run.settled_s:.0f} s')
    moved: tuple[float, int] | None = None
    longest_s = 0.0
    for sample in run.samples:
        committed = sum(sample.committed.values())
        waiting = sum(end for (topic, _), end in sample.ends.items() if topic in SOURCES) - committed
        if moved is None or committed > moved[1] or not waiting:
            moved = sample.at_s, committed
        longest_s = max(longest_s, sample.at_s - moved[0])
    report.remark('C8', f'still for at most {longest_s:.0f} s')
    if longest_s > run.stuck_s_max:
        report.wrong('C8', f'nothing was consumed for {longest_s:.0f} s while events waited')
    if run.samples:
        last = run.samples[-1]
        for topic in SOURCES:
            for place, end in last.ends.items():
                committed = last.committed.get(place, 0)
                if place[0] == topic and committed != end:
                    report.wrong('C8', f'{topic}-{place[1]}: committed {committed} of {end} at the end')


def _faults(run: Run, report: Report) -> None:
    if run.planned is None:
        return
    report.saw('C10', f'faults of {run.planned} planned', len(run.faults))
    if len(run.faults) != run.planned:
        report.wrong('C10', f'{run.planned} faults were planned, {len(run.faults)} fired')
    before = 0
    for fault in run.faults:
        if fault.consumed - before < run.between_min:
            report.wrong('C10', f'{fault.name} at {fault.at_s:.1f} s: only {fault.consumed - before} events since the '
                                f'fault before it')
        if fault.left <= 0:
            report.wrong('C10', f'{fault.name} at {fault.at_s:.1f} s: not in mid-stream, everything had been consumed')
        before = fault.consumed
