"""The audit of one partition number: its inputs, changelog, outputs and databases, compared with the reference."""
import itertools
import json
import struct
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from tests.chaos.audit_report import AuditReport
from tests.chaos.decisions import ANY_TIMER, SCORES, wrong_chain, wrong_headers, wrong_message
from tests.chaos.log import SOURCES, Record, Run, Store, Topic
from tests.chaos.record import State, pack_days, unpack
from tests.chaos.record import messages as announced_by
from tests.chaos.reference import (
    CARTS,
    CLICKS,
    Event,
    InvalidError,
    Rules,
    User,
    parse,
    partition_of,
    window_of,
)

RESCORED_EACH, RESCORED_MAX = 4, 1_000      # one message of so many, and at most so many of a partition
LANE_KEY = b'\xfflane'
NOT_USERS = b'\xff'         # never in UTF-8: keys from here on are no users
_FOLDED = ('applied', 'duplicate', 'late', 'first_seen_ms', 'last_seen_ms', 'counts', 'spend', 'refunds', 'orders',
           'last_basket', 'last_order_ms', 'gaps', 'gap_days', 'gap_days_squared', 'silence', 'due_ms')
NEVER = 1 << 62


class _Note(NamedTuple):
    """A message in the outbox of a state. `position` is the number of that state among its user's states."""

    digest: int
    user_id: str
    position: int
    kind: str
    offset: int             # of the state in the changelog


@dataclass
class _Shopper:
    """One user: the events in the log by source, the reference up to the newest state, and the claims so far."""

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


class Samples:
    """When a position was committed, and where the topics ended at that time."""

    def __init__(self, run: Run, partition: int) -> None:
        self._samples = run.samples
        self._committed = [list(itertools.accumulate(
            (sample.committed.get((topic, partition), 0) for sample in run.samples), max)) for topic in SOURCES]
        self._partition = partition

    def end_when_committed(self, vector: Sequence[int], topic: Topic) -> int:
        """The end of `topic` when both sources were first seen committed up to `vector`. NEVER if they never were."""
        first = max(bisect_left(committed, position)
                    for committed, position in zip(self._committed, vector, strict=True))
        if first == len(self._samples):
            return NEVER
        return self._samples[first].ends.get((topic, self._partition), NEVER)


class PartitionAudit:
    """The audit of one partition number. Takes records in this order: inputs, changelog, outputs, databases."""

    def __init__(self, partition: int, partitions: int, names: tuple[str, str], rules: Rules, run: Run,
                 report: AuditReport) -> None:
        self.invalid: dict[bytes, Record] = {}
        self.announced: list[tuple[bytes, dict]] = []       # records, each with a message about it: a sample
        self.counted = {'read': 0, 'applied': 0, 'duplicate': 0, 'late': 0}
        self._partition, self._partitions, self._names = partition, partitions, names
        self._rules, self._run, self._report = rules, run, report
        self._samples = Samples(run, partition)
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
        """Fold the events that the state claims to contain. Returns the due time if a timer caused the state."""
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
        """Some states are missing. Find the order of events that leads to this one, among the simple orders."""
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
            timer = timer_ms if self._complete else ANY_TIMER
            reference = shopper.user if shopper.exact else None
            for problem in wrong_message(message, user_id, state, reference, number, timer, self._rules):
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
        """All states are known. Check that every event is in one, and that every lane record is true."""
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
        for problem in wrong_headers(record, message, self._rules):
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
        """Check an output whose state was removed by compaction."""
        events = 0
        for source in (CLICKS, CARTS):
            place = bisect_left(shopper.offsets[source], vector[source])
            events += place
            if vector[source] and (not place or shopper.offsets[source][place - 1] != vector[source] - 1):
                self._report.wrong('C9', f'{where}: its cause names no event of its user')
        if not 0 < message['events_seen'] <= events:
            self._report.wrong('C9', f'{where}: events_seen is {message["events_seen"]} of {events} in its cause')

    def end_of_outputs(self) -> None:
        """All outputs are known. Check that every recorded message was published, and that the chains are unbroken."""
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
            for problem in wrong_chain(shopper.published, shopper.state, self._rules):
                report.wrong('C9', f'{user_id}: {problem}')
            report.saw('C9', 'decisions', len(shopper.published))

    # -- databases

    def take_store(self, store: Store) -> None:
        """Check a database. That of the owner must equal the changelog; another must hold earlier states only."""
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
                report.wrong('C5', f'{store.name}: holds {user_id!r}, who is not in the changelog')
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
    """The order in which a step folds both topics: by the records' times; with equal times, clicks first."""
    return sorted([*clicks, *carts], key=lambda event: event.record_ms)


def _difference(user: User, state: State) -> str:
    ours = [row for _, _, row in user.window]
    theirs = [state.rows[at:at + 24] for at in range(0, len(state.rows), 24)]
    return f'{len(set(ours) - set(theirs))} rows missing, {len(set(theirs) - set(ours))} too many'
