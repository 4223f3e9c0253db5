"""A stand-in worker writes recordings and journals, is killed at times, and is replayed."""
import asyncio
import gzip
import io
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from stream.core.decide import Policy
from stream.core.driver import Step, StepDriver
from stream.core.events import Event, Source
from stream.core.features import COUNTER_NAMES, Batch
from stream.core.journal import (
    Entry,
    EventsEntry,
    RecoveredEntry,
    TimersEntry,
    encode_entry,
    rules_digest,
    steps_of,
)
from stream.core.layout import DAY_MS, WindowLimits
from stream.core.messages import ModelInfo
from stream.core.outbox import unpack_outbox
from stream.core.partitioners import partition
from stream.core.rules import Publish, ReplayRules
from stream.core.scores import Outputs
from stream.core.step_scorer import StepScorer
from stream.core.user import User, decode, encode
from stream.errors import InputError, UsageError
from stream.replay.journal_file import Journal, described, read_journal
from stream.replay.journal_replay import JournalReplay
from stream.replay.recorded_topics import RecordedTopics
from stream.replay.topic_records import Inputs, TopicRecord, decoder, encode_record
from stream.scoring.constant import ConstantScorer
from stream.state.replay_state import MemoryState, RocksState, State

STREAM = Path(sys.executable).with_name('stream')
T0_MS = 1_700_000_000_000
LANES = 2
SEEDS = 12
TOPICS = ('clicks', 'carts')
INPUTS = Inputs(TOPICS, 'murmur2')
USERS = [f'u{number}' for number in range(12)]
KINDS = {Source.CLICKS: ('view', 'search', 'login'), Source.CARTS: ('add_to_cart', 'purchase', 'refund')}
RULES = ReplayRules(
    limits=WindowLimits(events_max=16, silence_ms=(3 * DAY_MS, 7 * DAY_MS)), reasons_rows_max=200,
    policy=Policy(tier_events_min=2, tier_margin=0.05, power_move_min=0.0, churn_orders_min=0, power_cooldown_ms=0,
                  intent_cooldown_ms=0, churn_cooldown_ms=0))
SETTINGS = {    # the same rules, for the command line
    'window_events_max': '16', 'silence_days': '[3,7]', 'reasons_rows_max': '200', 'tier_events_min': '2',
    'tier_margin': '0.05', 'power_move_min': '0', 'churn_orders_min': '0', 'power_cooldown_ms': '0',
    'intent_cooldown_ms': '0', 'churn_cooldown_ms': '0', 'partitioner': '"murmur2"'}


class BatchScorer(ConstantScorer):
    """A scorer whose scores depend on the whole batch, so that a step with other users gives other scores."""

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        outputs = await super().score(batches)
        for batch, output in zip(batches, outputs, strict=True):
            rows = batch.windows
            seen = np.expm1(batch.counters[:, [COUNTER_NAMES.index('days_since_last_seen')]])
            mixed = batch.counters.sum(axis=1, keepdims=True) * 7.31 + rows * 0.37
            output.purchase_intent = (mixed % 1).astype(np.float32)
            output.churn = np.clip(seen / 7 + mixed % 0.3, 0, 1).astype(np.float32)
            tier = (mixed[:, 0] * 3).astype(int) % len(self.tier_names)
            output.tier_probabilities = np.eye(len(self.tier_names), dtype=np.float32)[tier]
        return outputs


SCORER = BatchScorer(rows_max=64)


def recorded_topics(draw: random.Random, events: int, bad: float = 0.05) -> dict[tuple[int, int], list[bytes]]:
    """Lines by (source, partition): events of `USERS`, some repeated, late, broken, or on the wrong partition."""
    lines: dict[tuple[int, int], list[bytes]] = {(source, lane): [] for source in (0, 1) for lane in range(LANES)}
    moment_ms, ids = T0_MS, []
    for number in range(events):
        moment_ms += int(draw.expovariate(1 / (DAY_MS / 4)))
        source = draw.choice(list(Source))
        user = draw.choice(USERS[:3] if draw.random() < 0.5 else USERS)
        event_id = draw.choice(ids) if ids and draw.random() < 0.1 else f'e{number}'
        ids.append(event_id)
        event = {'event_id': event_id, 'user_id': user, 'type': draw.choice(KINDS[source]),
                 'price': draw.uniform(1, 90),
                 'ts': moment_ms - (int(draw.uniform(0, 5) * DAY_MS) if draw.random() < 0.2 else 0)}
        value: bytes | None = json.dumps(event).encode()
        lane = partition('murmur2', user.encode(), LANES)
        key: bytes | None = user.encode()
        if draw.random() < bad:
            match draw.randrange(4):
                case 0:
                    value = b'\xff{'
                case 1:
                    value = None
                case 2:
                    key = None
                case _:
                    lane = 1 - lane
        mine = lines[source, lane]
        offset = (decode_offset(mine[-1]) + 1 if mine else 0) + (draw.random() < 0.1)     # gaps: markers, compaction
        mine.append(encode_record(TopicRecord(TOPICS[source], lane, offset, moment_ms, key, value, partitions=LANES)))
    return lines


def decode_offset(line: bytes) -> int:
    return json.loads(line)['offset']


class Killed(Exception):  # noqa: N818 - what happens to the stand-in, no error of the product
    pass


class StandIn:
    """A slow and simple worker of one lane, after the architecture. A kill may happen between any two parts of a step,
    or while the changelog of a step is written.

    entries           the journal
    published         the messages that a consumer of its topics has seen
    changelog, step   what a new owner would find
    """

    def __init__(self, lane: int, lines: dict[tuple[int, int], list[bytes]], rules: ReplayRules, draw: random.Random,
                 kills: float) -> None:
        self.lane = lane
        self.entries: list[Entry] = []
        self.published: dict[bytes, None] = {}
        self.letters: set[tuple[str, int]] = set()
        self.changelog: dict[str, bytes] = {}
        self.positions = [0, 0]
        self.kills_left = 4
        self.cut = 0            # number of steps of which only a part was found
        self.runs_of_both = 0
        self._lines = lines
        self._rules = rules
        self._draw = draw
        self._kill_chance = kills
        self._decode = decoder(rules.events, INPUTS)
        self._digest = rules_digest(rules.events, rules)
        self._driver = StepDriver(rules.limits)
        self._scorer = StepScorer(rules, SCORER)
        self._clock_ms = 0
        self._generation = 0
        self._partial = False

    def run(self) -> None:
        while True:
            try:
                self._take_over()
                while self._block():
                    self._sweep()
                self._sweep()
                return
            except Killed:
                self.positions = [max(0, position - self._draw.choice((0, 0, 5, 30))) for position in self.positions]

    def users(self) -> dict[str, User]:
        return {user_id: decode(user_id, record) for user_id, record in self.changelog.items()}

    def _maybe_killed(self) -> None:
        if self.kills_left and self._draw.random() < self._kill_chance:
            self.kills_left -= 1
            raise Killed

    def _take_over(self) -> None:
        self._generation += 1
        users = self.users()
        newest = max((user.step for user in users.values()), default=0)
        unsent = [user for user in users.values() if user.step == newest]
        # If all users of the step were found, the entry may also name all of them.
        names = [user.user_id for user in unsent] if self._partial or self._draw.random() < 0.5 else None
        self.entries.append(RecoveredEntry(self.lane, newest, names if newest else None))
        self._partial = False
        self._driver = StepDriver(self._rules.limits, self._generation)
        self._driver.number = newest
        for user in unsent:
            self.published |= dict.fromkeys(message.value for message in unpack_outbox(user))

    def _block(self) -> bool:
        """Fold a block of one input, or one of each as one run in the order of the records' times."""
        sources = [source for source in (0, 1) if self._rest(source)]
        if not sources:
            return False
        if self._draw.random() < 0.6:
            sources = [self._draw.choice(sources)]
        stops, rows = {}, []
        for source in sources:
            rest = self._rest(source)[:self._draw.randint(1, 25)]
            stops[source] = decode_offset(rest[-1]) + 1
            if self._draw.random() < 0.1:       # a fetch that returned only markers
                rest, stops[source] = [], decode_offset(rest[0])
            latest_ms = 0
            for line in rest:
                latest_ms = max(latest_ms, json.loads(line)['timestamp_ms'])
                rows.append((latest_ms, source, line))
        if all(stops[source] == self.positions[source] for source in sources):
            return True
        rows.sort(key=lambda row: row[:2])
        outcomes = [(row, self._decode(row[2])) for row in rows]
        events = [outcome for _, outcome in outcomes if isinstance(outcome, Event)]
        self._maybe_killed()
        self.entries += [EventsEntry(self.lane, self._driver.number + 1, source, self.positions[source], stops[source],
                                     SCORER.model.sha256, self._digest) for source in sources]
        self.runs_of_both += len(sources) > 1
        self._maybe_killed()
        users = {event.user_id: self._user(event.user_id) for event in events}
        for step in self._driver.run(users, events):
            self._take(step)
        self.letters |= {(TOPICS[source], decode_offset(line)) for (_, source, line), outcome in outcomes
                         if not isinstance(outcome, Event)}
        self._clock_ms = max([self._clock_ms, *[event.ts_ms for event in events]])
        self._maybe_killed()
        for source in sources:
            self.positions[source] = stops[source]
        return True

    def _sweep(self) -> None:
        while True:
            due = sorted((user for user in self.users().values() if 0 < user.due_ms <= self._clock_ms - DAY_MS),
                         key=lambda user: (user.due_ms, user.user_id))[:5]
            if not due:
                return
            self.entries.append(TimersEntry(self.lane, self._driver.number + 1, [user.user_id for user in due],
                                            SCORER.model.sha256, self._digest))
            self._maybe_killed()
            self._take(self._driver.sweep(due))

    def _take(self, step: Step) -> None:
        asyncio.run(self._scorer.score([step]))
        for place, entry in enumerate(step.touched):
            try:
                self._maybe_killed()
            except Killed:
                self._partial = True        # only the users before this one are in the changelog
                self.cut += place > 0
                raise
            self.changelog.pop(entry.user.user_id, None)        # keeps the changelog in the order of the last writes
            self.changelog[entry.user.user_id] = encode(entry.user)
        self._maybe_killed()
        for entry in step.touched:
            self.published |= dict.fromkeys(message.value for message in unpack_outbox(entry.user))
        self._maybe_killed()

    def _user(self, user_id: str) -> User:
        record = self.changelog.get(user_id)
        return User(user_id) if record is None else decode(user_id, record)

    def _rest(self, source: int) -> list[bytes]:
        return [line for line in self._lines[source, self.lane] if decode_offset(line) >= self.positions[source]]


def worked(seed: int, events: int = 150, kills: float = 0.02, publish: Publish = 'changes',
           ) -> tuple[dict[tuple[int, int], list[bytes]], list[StandIn], ReplayRules]:
    draw = random.Random(seed)
    rules = msgspec.structs.replace(RULES, publish=publish)
    lines = recorded_topics(draw, events)
    lanes = [StandIn(lane, lines, rules, draw, kills) for lane in range(LANES)]
    for lane in lanes:
        lane.run()
    return lines, lanes, rules


def recording_of(folder: Path, lines: dict[tuple[int, int], list[bytes]], name: str = 'topics.jsonl') -> Path:
    path = folder / name
    content = b''.join(line + b'\n' for part in lines.values() for line in part)
    path.write_bytes(gzip.compress(content) if name.endswith('.gz') else content)
    return path


def journal_of(folder: Path, lanes: Sequence[StandIn]) -> Path:
    """The journal topic with one partition for both lanes, as `stream record` writes it."""
    path = folder / 'journal.jsonl'
    queues, offset, records = [list(lane.entries) for lane in lanes], 0, []
    while any(queues):
        for queue in queues:
            if queue:
                entry = queue.pop(0)
                records.append(encode_record(TopicRecord('journal', 0, offset, T0_MS, b'%d' % entry.lane,
                                                         encode_entry(entry), partitions=1)))
                offset += 1
    path.write_bytes(b'\n'.join(records) + b'\n')
    return path


class Replayed:
    def __init__(self, files: Sequence[Path], journal: Journal, rules: ReplayRules,
                 states: dict[int, State] | None = None) -> None:
        self.states: dict[int, State] = {} if states is None else states
        recorded = RecordedTopics(files, INPUTS)
        try:
            recorded.scan()
            outputs, letters = io.BytesIO(), io.BytesIO()
            self.run = JournalReplay(recorded, journal, self._state, SCORER, rules, outputs, letters)
            self.counts = asyncio.run(self.run.run())
        finally:
            recorded.close()
        self.outputs = outputs.getvalue().splitlines()
        self.letters = [json.loads(line) for line in letters.getvalue().splitlines()]

    def _state(self, lane: int) -> State:
        return self.states.setdefault(lane, MemoryState())

    def records(self, lane: int) -> dict[str, bytes]:
        return {user.user_id: encode(user) for user in self.states[lane].users()}


def records_of(lane: StandIn) -> dict[str, bytes]:
    """The lane's final state, comparable with a replay's: without the generation, which differs from run to run."""
    users = lane.users()
    for user in users.values():
        user.generation = 0
    return {user_id: encode(user) for user_id, user in users.items()}


@pytest.mark.parametrize('publish', ['changes', 'all', 'events'])
@pytest.mark.parametrize('seed', range(SEEDS))
def test_a_journaled_replay_is_the_worker_whatever_was_killed(tmp_path: Path, seed: int, publish: Publish):
    lines, lanes, rules = worked(seed, publish=publish)
    replay = Replayed([recording_of(tmp_path, lines)], read_journal(journal_of(tmp_path, lanes)), rules)
    assert replay.outputs == [message for lane in lanes for message in lane.published], f'SEED={seed}'
    for lane in lanes:
        assert replay.records(lane.lane) == records_of(lane), f'SEED={seed}'
    assert {(letter['topic'], letter['offset']) for letter in replay.letters} == {
        place for lane in lanes for place in lane.letters}
    assert replay.counts.dead == len(replay.letters)
    assert replay.counts.alerts == sum(b'"type":"scores.updated"' not in message for message in replay.outputs)
    assert replay.counts.read == sum(map(len, lines.values()))
    assert (replay.run.unfinished, replay.run.passed_over, replay.run.missing()) == (0, 0, [])


def test_the_stand_in_is_killed_in_every_way_that_counts():
    # Without these events the test above could not fail: changes of owner, partial steps, entries without effect.
    cut = nothing = owners = timers = both = 0
    for seed in range(SEEDS):
        for lane in worked(seed)[1]:
            counted = list(steps_of(lane.entries))
            owners += sum(isinstance(entry, RecoveredEntry) for entry in lane.entries) - 1
            nothing += sum(not isinstance(entry, RecoveredEntry) for entry in lane.entries) - len(counted)
            timers += sum(isinstance(entry, TimersEntry) for entry, _ in counted)
            cut += lane.cut
            both += lane.runs_of_both
    assert min(cut, nothing, owners, timers, both) > 5


def test_wrong_cuts_would_show(tmp_path: Path):
    # The same events in two blocks instead of one: other batches, other scores.
    lines, lanes, rules = worked(0, kills=0, publish='all')
    path, entries = recording_of(tmp_path, lines), read_journal(journal_of(tmp_path, lanes))[0]
    at, entry = next((at, entry) for at, entry in enumerate(entries)
                     if isinstance(entry, EventsEntry) and entry.stop - entry.start > 9)
    whole = Replayed([path], {0: entries[:at + 1]}, rules)
    first = Replayed([path], {0: [*entries[:at], msgspec.structs.replace(entry, stop=entry.start + 5)]}, rules)
    steps = max(decode(user_id, record).step for user_id, record in first.records(0).items())
    halves = [msgspec.structs.replace(entry, stop=entry.start + 5),
              msgspec.structs.replace(entry, start=entry.start + 5, step=steps + 1)]
    cut = Replayed([path], {0: [*entries[:at], *halves]}, rules)
    assert cut.outputs != whole.outputs
    assert cut.counts.applied == whole.counts.applied


def block(lane: int, step: int, start: int, stop: int) -> EventsEntry:
    return EventsEntry(lane, step, 0, start, stop, SCORER.model.sha256, DIGEST)


DIGEST = rules_digest(RULES.events, msgspec.structs.replace(RULES, publish='all'))
EVERYTHING = msgspec.structs.replace(RULES, publish='all')


def clicks(*users: str, ts_ms: int = T0_MS) -> dict[tuple[int, int], list[bytes]]:
    """One click each, one minute apart, on partition 0 of one."""
    return {(0, 0): [encode_record(TopicRecord('clicks', 0, offset, ts_ms + offset * 60_000, user.encode(), json.dumps(
        {'event_id': f'{user}{offset}', 'user_id': user, 'type': 'view', 'ts': ts_ms + offset * 60_000}).encode(),
        partitions=1)) for offset, user in enumerate(users)]}


def told(replay: Replayed) -> list[tuple[str, int]]:
    """The users whose scores were published, with their number of events, without decisions."""
    values = [json.loads(line) for line in replay.outputs]
    return [(value['user_id'], value['events_seen']) for value in values if value['type'] == 'scores.updated']


def test_of_a_step_cut_short_only_the_users_that_were_found_are_kept(tmp_path: Path):
    path = recording_of(tmp_path, clicks('a', 'b', 'c', 'a', 'b', 'c'))
    journal: Journal = {0: [
        RecoveredEntry(0, 0, None), block(0, 1, 0, 2), block(0, 2, 2, 5), block(0, 3, 5, 6),
        RecoveredEntry(0, 2, ['b']), block(0, 3, 2, 6)]}
    replay = Replayed([path], journal, EVERYTHING)
    assert told(replay) == [('a', 1), ('b', 1), ('b', 2), ('c', 2), ('a', 2)]
    assert {user_id: decode(user_id, record).step for user_id, record in replay.records(0).items()} == {
        'a': 3, 'b': 3, 'c': 3}        # b's events of step 3 were redelivered, so b was touched but not scored
    assert (replay.counts.read, replay.counts.applied, replay.run.unfinished) == (6, 6, 0)


def test_a_user_whose_first_step_came_to_nothing_was_never_there(tmp_path: Path):
    path = recording_of(tmp_path, clicks('a', 'b'))
    replay = Replayed([path], {0: [block(0, 1, 0, 2), RecoveredEntry(0, 1, ['a'])]}, EVERYTHING)
    assert told(replay) == [('a', 1)]
    assert set(replay.records(0)) == {'a'}
    assert (replay.counts.users, replay.counts.read, replay.run.unfinished) == (1, 1, 1)


def test_a_block_of_dead_letters_leaves_no_state_and_its_letters(tmp_path: Path):
    lines = clicks('a', 'b', 'c', 'a')
    lines[0, 0][1:3] = [encode_record(TopicRecord('clicks', 0, offset, T0_MS, b'k', None)) for offset in (1, 2)]
    replay = Replayed([recording_of(tmp_path, lines)], {0: [
        block(0, 1, 0, 1), block(0, 2, 1, 3), RecoveredEntry(0, 1, ['a']), block(0, 2, 3, 4)]}, EVERYTHING)
    assert [letter['offset'] for letter in replay.letters] == [1, 2]
    assert (replay.counts.read, replay.counts.dead, replay.run.passed_over) == (4, 2, 0)


def test_events_that_no_block_has_are_told(tmp_path: Path):
    replay = Replayed([recording_of(tmp_path, clicks('a', 'b', 'c', 'd', 'e'))], {
        0: [block(0, 1, 1, 2), block(0, 2, 4, 5)]}, EVERYTHING)
    assert told(replay) == [('b', 1), ('e', 1)]
    assert replay.run.passed_over == 3


def test_timers_of_a_step_cut_short_fire_again(tmp_path: Path):
    path = recording_of(tmp_path, clicks('a', 'b'))
    sweep = TimersEntry(0, 2, ['b', 'a'], SCORER.model.sha256, DIGEST)
    again = TimersEntry(0, 3, ['b'], SCORER.model.sha256, DIGEST)
    replay = Replayed([path], {0: [block(0, 1, 0, 2), sweep, RecoveredEntry(0, 2, ['a']), again]}, EVERYTHING)
    assert [(user, json.loads(line)['cause']['timer_ms']) for (user, _), line in zip(
        told(replay), [line for line in replay.outputs if b'scores.updated' in line], strict=True)] == [
        ('a', None), ('b', None), ('a', T0_MS + 3 * DAY_MS), ('b', T0_MS + 60_000 + 3 * DAY_MS)]


def test_rocksdb_and_memory_agree(tmp_path: Path):
    lines, lanes, rules = worked(1)
    path, journal = recording_of(tmp_path, lines), read_journal(journal_of(tmp_path, lanes))
    states: dict[int, State] = {lane: RocksState(tmp_path / f'users-{lane}') for lane in range(LANES)}
    replay = Replayed([path], journal, rules, states)
    assert replay.outputs == Replayed([path], journal, rules).outputs
    assert [replay.records(lane.lane) for lane in lanes] == [records_of(lane) for lane in lanes]
    for state in states.values():
        state.close()


def test_recordings_may_be_compressed_be_several_and_overlap(tmp_path: Path):
    lines, lanes, rules = worked(2)
    journal = read_journal(journal_of(tmp_path, lanes))
    one = Replayed([recording_of(tmp_path, lines)], journal, rules).outputs
    begin = {place: part[:len(part) * 2 // 3] for place, part in lines.items()}
    end = {place: part[len(part) // 3:] for place, part in lines.items()}
    first, second = recording_of(tmp_path, begin, 'first.jsonl.gz'), recording_of(tmp_path, end, 'second.jsonl')
    assert Replayed([second, first], journal, rules).outputs == one


def test_a_recording_of_everything_serves_as_well(tmp_path: Path):
    lines = clicks('a', 'b')
    lines[9, 9] = [encode_record(TopicRecord('alerts', 0, offset, T0_MS, b'a', b'\x00')) for offset in range(5)]
    assert len(told(Replayed([recording_of(tmp_path, lines)], {0: [block(0, 1, 0, 2)]}, EVERYTHING))) == 2


@pytest.mark.parametrize(('change', 'do'), [
    ({'model': 'ab' * 32}, r'SHA-256 abababababab.*--model'), ({'rules': '0' * 16}, r'rules 0{16}.*--config')])
def test_another_model_or_other_rules_are_refused(tmp_path: Path, change: dict[str, str], do: str):
    path = recording_of(tmp_path, clicks('a', 'b'))
    wrong = msgspec.structs.replace(block(0, 1, 0, 1), **change)
    with pytest.raises(UsageError, match=rf'{do}'):
        Replayed([path], {0: [wrong]}, EVERYTHING)
    right = msgspec.structs.replace(wrong, model=SCORER.model.sha256, rules=DIGEST, step=2, start=1, stop=2)
    with pytest.raises(UsageError, match='up to the change'):
        Replayed([path], {0: [wrong, right]}, EVERYTHING)
    # Entries without effect do not count.
    assert told(Replayed([path], {0: [wrong, RecoveredEntry(0, 0, None), block(0, 1, 0, 2)]}, EVERYTHING)) == [
        ('a', 1), ('b', 1)]


def test_a_journal_that_does_not_begin_at_the_beginning_is_refused(tmp_path: Path):
    path = recording_of(tmp_path, clicks('a', 'b'))
    with pytest.raises(InputError, match=r'lane 0 begins with step 7.*first steps'):
        Replayed([path], {0: [block(0, 7, 0, 2)]}, EVERYTHING)


def test_an_entry_that_is_missing_is_noticed(tmp_path: Path):
    lines, lanes, rules = worked(3, kills=0)
    path, entries = recording_of(tmp_path, lines), read_journal(journal_of(tmp_path, lanes))[0]
    whole, noticed = Replayed([path], {0: entries}, rules), 0
    for missing in range(len(entries) - 1):
        if isinstance(entries[missing], RecoveredEntry):
            continue
        try:
            replay = Replayed([path], {0: entries[:missing] + entries[missing + 1:]}, rules)
        except InputError as error:
            assert 'whole journal' in error.do or 'first steps' in error.do
            noticed += 1
        else:       # without one entry of a run of both inputs, the run may still have the same number of steps
            assert replay.run.passed_over or replay.outputs == whole.outputs
    assert noticed > len(entries) // 2


def test_a_recording_that_ends_early_is_told(tmp_path: Path):
    path = recording_of(tmp_path, clicks('a', 'b'))
    replay = Replayed([path], {0: [block(0, 1, 0, 5)], 1: [block(1, 1, 0, 3)]}, EVERYTHING)
    assert replay.run.missing() == ['clicks-0 from offset 2 on', 'clicks-1 from offset 0 on']


def test_records_after_the_end_of_the_journal_are_counted(tmp_path: Path):
    path = recording_of(tmp_path, clicks('a', 'b', 'c'))
    replay = Replayed([path], {0: [block(0, 1, 0, 2)]}, EVERYTHING)
    assert (replay.run.beyond(), replay.run.missing()) == (1, [])


def test_a_step_that_was_done_twice_is_noticed(tmp_path: Path):
    path = recording_of(tmp_path, clicks('a', 'b'))
    sweep = TimersEntry(0, 1, ['a'], SCORER.model.sha256, DIGEST)
    for twice in ([block(0, 1, 0, 1), block(0, 1, 0, 2)], [block(0, 1, 0, 1), sweep], [sweep, sweep]):
        with pytest.raises(InputError, match='step 1 twice'):
            Replayed([path], {0: twice}, EVERYTHING)


def test_a_timer_that_nobody_has_set_is_noticed(tmp_path: Path):
    path = recording_of(tmp_path, clicks('a'))
    with pytest.raises(InputError, match="'b' has no timer"):
        Replayed([path], {0: [block(0, 1, 0, 1), TimersEntry(0, 2, ['b'], SCORER.model.sha256, DIGEST)]}, EVERYTHING)


def test_files_that_are_none_of_it_are_refused(tmp_path: Path):
    events = tmp_path / 'events.jsonl'
    events.write_bytes(b'{"event_id":"e1","user_id":"u1"}\n')
    with pytest.raises(InputError, match='not a record of a topic'):
        Replayed([events], {}, RULES)
    with pytest.raises(InputError, match='not a journal entry'):
        read_journal(events)
    other = recording_of(tmp_path, {(0, 0): [encode_record(TopicRecord('alerts', 0, 0, 0, b'k', b'v'))]})
    with pytest.raises(InputError, match='no record of clicks or carts'):
        Replayed([other], {}, RULES)
    empty = tmp_path / 'empty.jsonl'
    empty.write_bytes(b'')
    with pytest.raises(InputError, match='no journal entry'):
        read_journal(empty)
    with pytest.raises(UsageError, match='No file'):
        RecordedTopics([], INPUTS)


def test_a_cut_line_of_a_recording_is_an_error_and_not_a_dead_letter(tmp_path: Path):
    path = recording_of(tmp_path, clicks('a', 'b'))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match='not a record of a topic'):
        Replayed([path], {0: [block(0, 1, 0, 2)]}, EVERYTHING)


def test_a_journal_reads_the_same_recorded_or_bare(tmp_path: Path):
    _, lanes, _ = worked(4)
    recorded = journal_of(tmp_path, lanes)
    bare = tmp_path / 'bare.jsonl'
    bare.write_bytes(b''.join(encode_entry(entry) + b'\n' for lane in reversed(lanes) for entry in lane.entries))
    shuffled = tmp_path / 'shuffled.jsonl'
    records = recorded.read_bytes().splitlines(keepends=True)
    shuffled.write_bytes(b''.join(random.Random(0).sample(records, len(records))))
    journal = read_journal(recorded)
    assert list(journal) == list(read_journal(bare)) == [0, 1]
    assert journal == read_journal(bare) == read_journal(shuffled) == {lane.lane: lane.entries for lane in lanes}


def test_a_lane_in_two_partitions_has_no_order(tmp_path: Path):
    path = tmp_path / 'journal.jsonl'
    path.write_bytes(b''.join(
        encode_record(TopicRecord('journal', at, 0, 0, b'0', encode_entry(block(0, at + 1, 0, 1)))) + b'\n'
        for at in (0, 1)))
    with pytest.raises(InputError, match='more than one topic partition'):
        read_journal(path)


def test_a_journal_for_a_person():
    journal: Journal = {
        0: [RecoveredEntry(0, 0, None), block(0, 1, 0, 40),
            TimersEntry(0, 4, [f'u{at}' for at in range(7)], SCORER.model.sha256, DIGEST), block(0, 5, 40, 41),
            RecoveredEntry(0, 4, ['u1'])],
        3: [block(3, 1, 5, 6)]}
    assert list(described(journal, TOPICS)) == [
        ' lane      step  cause                                    took effect    model        users',
        '    0         0  take-over, newest step found                                         all users of the step',
        '    0         1  clicks [0, 40)                           to step 4      000000000000',
        '    0         4  7 timers                                 to step 4      000000000000 '
        'u0 u1 u2 u3 u4 and 2 more',
        '    0         5  clicks [40, 41)                          nothing        000000000000',
        '    0         4  take-over, newest step found                                         u1',
        '    3         1  clicks [5, 6)                            all            000000000000']
    assert 'u5 u6' in list(described(journal, TOPICS, with_users=True))[3]


def stream(folder: Path, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([STREAM, *arguments], cwd=folder, capture_output=True, text=True, timeout=120,
                          env={'PATH': '/usr/bin:/bin', 'COLUMNS': '200'}, check=False)
    assert done.returncode == expect, done.stderr
    return done


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], 'SCORER', ConstantScorer())      # the command uses this scorer too
    lines, lanes, _ = worked(5, publish='all')
    recording_of(tmp_path, lines)
    journal_of(tmp_path, lanes)
    given = ['replay', 'topics.jsonl', '--journal', 'journal.jsonl', '--scorer', 'constant', '--publish', 'all',
             '--out', 'out.jsonl']
    rules = [part for name, value in SETTINGS.items() for part in ('--set', f'{name}={value}')]
    done = stream(tmp_path, *given, '--format', 'kafka', *rules, '--json')
    published = [message for lane in lanes for message in lane.published]
    assert (tmp_path / 'out.jsonl').read_bytes().splitlines() == published
    assert json.loads(done.stdout)['scored'] > len(published) // 2 > 20
    assert '<html' in (tmp_path / 'out.html').read_text()
    stream(tmp_path, *given, '--format', 'kafka', *rules, '--no-report', '--state-dir', 'state')
    assert (tmp_path / 'out.jsonl').read_bytes().splitlines() == published
    assert 'add --format kafka' in stream(tmp_path, *given, expect=UsageError.exit_code).stderr
    assert '--config' in stream(tmp_path, *given, '--format', 'kafka', expect=UsageError.exit_code).stderr
    shown = stream(tmp_path, 'journal', 'journal.jsonl', '--lane', '1').stdout.splitlines()
    assert len(shown) == 1 + len(lanes[1].entries)
    assert {line.split()[0] for line in shown[1:]} == {'1'}


def test_the_model_of_the_stand_in_is_the_constant_one():
    assert SCORER.model == ModelInfo('constant', '1', '0' * 64)
