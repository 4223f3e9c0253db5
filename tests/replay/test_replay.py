import asyncio
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from stream.core.decide import Policy
from stream.core.events import SOURCE_OF_TYPE, Decoder, Event, EventRules
from stream.core.features import COUNTER_NAMES, Batch
from stream.core.layout import DAY_MS, WindowLimits
from stream.core.outbox import unpack_outbox
from stream.core.rules import ReplayRules
from stream.core.scorer import Scorer
from stream.core.scores import Outputs
from stream.core.user import User, decode, encode, fire_timer, fold
from stream.errors import UsageError
from stream.replay.recording import Recording
from stream.replay.replay import Counts, Replay
from stream.scoring.constant import ConstantScorer
from stream.simulator.shop import SimulatorOptions, simulate, write
from stream.state.replay_state import MemoryState, RocksState, State

T0_MS = 1_700_000_000_000 // DAY_MS * DAY_MS


class SilenceScorer(ConstantScorer):
    """A scorer whose churn grows with the days of silence. From 7 days on, it is above any threshold."""

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        outputs = await super().score(batches)
        for batch, output in zip(batches, outputs, strict=True):
            silent_days = np.expm1(batch.counters[:, [COUNTER_NAMES.index('days_since_last_seen')]])
            output.churn = np.clip(silent_days / 7, 0, 1).astype(np.float32)
        return outputs


@pytest.fixture(scope='module')
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('simulated') / 'events.jsonl'
    write(simulate(SimulatorOptions(shoppers=60, days=120, seed=3, noise=0.02)), path, path.with_suffix('.truth.jsonl'))
    return path


def replayed(path: Path, rules: ReplayRules | None = None, scorer: Scorer | None = None, state: State | None = None,
             format_name: str = 'events') -> tuple[Counts, bytes, bytes]:
    recording = Recording([path], format_name)
    recording.scan()
    outputs, dead_letters = io.BytesIO(), io.BytesIO()
    run = Replay(recording, state or MemoryState(), scorer or SilenceScorer(), rules or ReplayRules(), outputs,
                 dead_letters)
    counts = asyncio.run(run.run())
    return counts, outputs.getvalue(), dead_letters.getvalue()


def lines(written: bytes) -> list[dict]:
    return [json.loads(line) for line in written.splitlines()]


def written(folder: Path, *events: tuple[str, float, str]) -> Path:
    """A file of events as (user, days after T0, type)."""
    path = folder / 'events.jsonl'
    path.write_bytes(b''.join(json.dumps({
        'event_id': f'e{at}', 'user_id': user, 'ts': T0_MS + int(days * DAY_MS), 'type': kind, 'price': 5,
    }).encode() + b'\n' for at, (user, days, kind) in enumerate(events)))
    return path


def test_every_row_is_accounted_for(simulated: Path):
    counts, outputs, dead_letters = replayed(simulated)
    assert counts.read == len(simulated.read_bytes().splitlines())
    assert counts.read == counts.applied + counts.duplicate + counts.late + counts.dead
    assert counts.duplicate > 0
    assert counts.dead == len(lines(dead_letters)) > 0
    assert counts.alerts == len(lines(outputs)) > 0


def test_a_dead_letter_leads_back_to_its_row(simulated: Path):
    rows = simulated.read_bytes().splitlines()
    letters = lines(replayed(simulated)[2])
    for letter in letters:
        assert rows[letter['row'] - 1].decode() == letter['value']
        assert letter['file'] == 'events.jsonl'
        assert letter['detail']
    assert {'invalid_json', 'missing_field', 'ts_in_seconds'} <= {letter['reason'] for letter in letters}


def test_bytes_that_are_no_text_come_as_base64(tmp_path: Path):
    (tmp_path / 'bad.jsonl').write_bytes(b'\xff\xfe\n\n{"a":1}\n')
    letters = lines(replayed(tmp_path / 'bad.jsonl')[2])
    assert [(letter['row'], letter['reason']) for letter in letters] == [
        (1, 'invalid_utf8'), (2, 'empty_value'), (3, 'missing_field')]
    assert letters[0]['value_base64'] == '//4='


def test_names_and_details_that_are_no_text_do_not_stop_a_replay(tmp_path: Path):
    path = tmp_path / os.fsdecode(b'bad\xff.csv')
    path.write_bytes(b'InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n'
                     b'\xff1,S,d,-1,12/1/2010 8:26,1,c,UK\n')
    counts, _, dead_letters = replayed(path, format_name='online-retail')
    [letter] = lines(dead_letters)
    assert counts.dead == 1
    assert letter['file'] == 'bad\\udcff.csv'
    assert letter['reason'] == 'bad_number'


@pytest.mark.parametrize('publish', ['changes', 'all', 'events'])
def test_twice_the_same_bytes_in_memory_and_in_rocksdb(simulated: Path, tmp_path: Path, publish):
    rules = ReplayRules(publish=publish)
    first = replayed(simulated, rules)
    assert replayed(simulated, rules) == first
    state = RocksState(tmp_path / 'state')
    assert replayed(simulated, rules, state=state) == first
    state.close()


def test_windows_and_counters_do_not_depend_on_how_blocks_are_cut(simulated: Path):
    def final_users(block_events_max: int) -> dict[str, tuple]:
        state = MemoryState()
        replayed(simulated, ReplayRules(block_events_max=block_events_max), ConstantScorer(), state)
        return {user.user_id: (user.rows, user.ids, user.days, user.counts, user.spend, user.orders, user.gap_days,
                               user.applied, user.duplicate, user.late, user.next_offset, user.due_ms, user.silence)
                for user in state.users()}

    assert final_users(1) == final_users(7) == final_users(2_000)


def test_the_final_records_are_a_plain_fold_of_the_file(simulated: Path):
    state = MemoryState()
    replayed(simulated, state=state)
    decoder, limits, users, offsets = Decoder(EventRules()), WindowLimits(), {}, [0, 0]
    events = [event for row in simulated.read_bytes().splitlines() if isinstance(event := decoder(row), Event)]
    for event in sorted(events, key=lambda event: event.ts_ms):
        user = users.setdefault(event.user_id, User(event.user_id))
        source = SOURCE_OF_TYPE[event.type]
        event.source, event.offset = source, offsets[source]
        fold(user, [event], limits)
        offsets[source] += 1
    for stored in state.users():
        plain = users.pop(stored.user_id)
        assert (stored.rows, stored.ids, stored.days) == (plain.rows, plain.ids, plain.days)
        assert (stored.applied, stored.duplicate, stored.late) == (plain.applied, plain.duplicate, plain.late)
        assert (stored.spend, stored.orders, stored.next_offset) == (plain.spend, plain.orders, plain.next_offset)
    assert users == {}


def test_events_mode_has_one_output_per_applied_event(simulated: Path):
    counts, outputs, _ = replayed(simulated, ReplayRules(publish='events', limits=WindowLimits(silence_ms=())))
    named = Counter(value['event_id'] for value in lines(outputs) if value['type'] == 'scores.updated')
    assert named.total() == len(named) == counts.applied


def test_all_mode_has_one_output_per_scored_user(simulated: Path):
    counts, outputs, _ = replayed(simulated, ReplayRules(publish='all'))
    assert sum(value['type'] == 'scores.updated' for value in lines(outputs)) == counts.scored


#   day   0    3    7   10        a buys and goes silent; events of b make time pass
#   a     $    !    !
#   b     .         .    .
def test_silence_raises_an_alert_when_it_is_due_and_an_event_clears_it(tmp_path: Path):
    path = written(tmp_path, ('a', 0, 'purchase'), ('b', 0, 'view'), ('b', 2, 'view'), ('b', 4, 'view'),
                   ('b', 6, 'view'), ('b', 8, 'view'), ('b', 10, 'view'), ('a', 10.5, 'view'), ('b', 12, 'view'))
    values = lines(replayed(path)[1])
    churn = [(value['user_id'], value['state'], (value['as_of_ms'] - T0_MS) / DAY_MS, value['cause']['timer_ms'])
             for value in values if value['type'] == 'churn.alert']
    assert churn == [('a', 'raised', 7.0, T0_MS + 7 * DAY_MS), ('a', 'cleared', 10.5, None)]


def test_a_timer_fires_before_the_next_event_of_its_user_even_in_one_block(tmp_path: Path):
    path = written(tmp_path, ('a', 0, 'purchase'), ('a', 8, 'view'))
    values = lines(replayed(path)[1])
    assert [(value['type'], value.get('state'), value['events_seen']) for value in values] == [
        ('churn.alert', 'raised', 1), ('churn.alert', 'cleared', 2)]


def test_what_is_due_at_the_end_of_the_recording_fires(tmp_path: Path):
    path = written(tmp_path, ('a', 0, 'purchase'), ('b', 6.9, 'view'), ('b', 7, 'view'))
    assert [value['user_id'] for value in lines(replayed(path)[1])] == ['a']


def test_timers_of_a_user_agree_with_the_schedule(tmp_path: Path):
    days = [0, 1, 20, 21, 80]
    path = written(tmp_path, *(('a', day, 'view') for day in days), *(('b', day, 'view') for day in range(90)))
    values = [value for value in lines(replayed(path, ReplayRules(publish='all'))[1]) if value['user_id'] == 'a']
    fired = [(value['as_of_ms'] - T0_MS) // DAY_MS for value in values
             if value['cause']['timer_ms'] and value['type'] == 'scores.updated']
    expected, user = [], User('a')
    limits = WindowLimits()
    for at, day in enumerate([*days, 89]):
        while 0 < user.due_ms <= T0_MS + day * DAY_MS:
            expected.append((fire_timer(user, limits) - T0_MS) // DAY_MS)
        if day != 89:
            fold(user, [Event('a', str(at), at, T0_MS + day * DAY_MS, 1, 0, 0, 0, 0.0, 0, 0, at)], limits)
    assert fired == expected == [4, 8, 15, 24, 28, 35, 51, 83, 87]


def test_one_event_of_the_far_future_does_not_expire_another_users_window(tmp_path: Path):
    path = written(tmp_path, ('a', 0, 'view'), ('b', 1, 'view'), ('b', 20_000, 'view'))
    state = MemoryState()
    counts, _, _ = replayed(path, state=state)
    assert counts.applied == 3
    assert len(state.load(['a'])['a'].rows) > 0


def test_a_chain_of_decisions_is_unbroken_per_user(simulated: Path):
    last: dict[str, str] = {}
    seen: dict[str, int] = {}
    for value in lines(replayed(simulated)[1]):
        assert value['previous_id'] == last.get(value['user_id'])
        assert value['events_seen'] >= seen.get(value['user_id'], 0)
        last[value['user_id']], seen[value['user_id']] = value['id'], value['events_seen']


def test_an_empty_file(tmp_path: Path):
    (tmp_path / 'empty.jsonl').write_bytes(b'')
    assert replayed(tmp_path / 'empty.jsonl') == (Counts(), b'', b'')


def test_the_policy_matters(simulated: Path):
    strict = ReplayRules(policy=Policy(churn_raise=1.0, churn_clear=1.0, churn_orders_min=1000))
    assert not any(value['type'] == 'churn.alert' for value in lines(replayed(simulated, strict)[1]))


def test_rules_are_immutable():
    with pytest.raises(AttributeError):
        ReplayRules().publish = 'all'
    assert msgspec.structs.replace(ReplayRules(), publish='all').publish == 'all'


def test_a_used_state_directory_is_refused(tmp_path: Path):
    (tmp_path / 'file').write_text('x')
    with pytest.raises(UsageError):
        RocksState(tmp_path)


def test_a_recorded_replay_gives_the_recorded_bytes():
    """If a commit changes these bytes, its message must say what that means for subscribers and stored records."""
    recorded = Path(__file__).parents[1] / 'golden' / 'replay'
    state = MemoryState()
    _, outputs, dead_letters = replayed(recorded / 'events.jsonl', ReplayRules(publish='all'), state=state)
    assert outputs == (recorded / 'messages.jsonl').read_bytes()
    assert dead_letters == (recorded / 'dead.jsonl').read_bytes()
    assert encode(state.load(['ada'])['ada']) == (recorded / 'ada.layout-2.record').read_bytes()


def test_a_record_of_the_first_layout_is_still_read():
    recorded = Path(__file__).parents[1] / 'golden' / 'replay'
    first, second = (decode('ada', (recorded / f'ada.layout-{layout}.record').read_bytes()) for layout in (1, 2))
    assert unpack_outbox(first) == unpack_outbox(second) != []
    first.outbox = second.outbox
    assert encode(first) == encode(second)
