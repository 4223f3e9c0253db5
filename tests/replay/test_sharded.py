"""A replay with shards gives the bytes of a replay without. The shards of these tests are in this process."""
import asyncio
import io
import json
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from stream.core.layout import DAY_MS
from stream.core.rules import ReplayRules
from stream.replay.account import Sums
from stream.replay.merge import rows_to_explain, sweeps
from stream.replay.recording import Recording
from stream.replay.replay import Replay
from stream.replay.report import ReportAbout, render_report
from stream.replay.shard import ShardRecipe
from stream.replay.shard_messages import (
    Explain,
    Explained,
    Finish,
    Order,
    Result,
    Row,
    Share,
    decode_order,
    decode_reply,
    encode,
)
from stream.replay.sharded import RUNS_AHEAD_MAX, ShardedReplay, shard_of
from stream.replay.topic_records import TopicRecord, encode_record
from stream.simulator.shop import SimulatorOptions, simulate, write
from stream.state.replay_state import MemoryState, state_of_shard
from tests.replay.moody import MoodyScorer

T0_MS = 1_700_000_000_000 // DAY_MS * DAY_MS
ABOUT = ReportAbout(['events.jsonl'], 'events', 'EUR', 0, 0, 'all', 'nothing', None, 0.7, 0.8, 0.6)


class LocalShards:
    """Shards in this process, which answer an order when they are asked for a reply: the last shard first."""

    def __init__(self, count: int, recipe: ShardRecipe) -> None:
        self.count = count
        self.runs_ahead_max = 0
        self._shards = [recipe.make(number) for number in range(count)]
        self._orders = [deque[bytes]() for _ in range(count)]

    def send(self, shard: int, order: Order) -> None:
        self._orders[shard].append(encode(order))
        self.runs_ahead_max = max(self.runs_ahead_max, len(self._orders[shard]))

    def receive(self) -> tuple[int, Result | Explained | Sums]:
        number = max(number for number, orders in enumerate(self._orders) if orders)
        shard, order = self._shards[number], decode_order(self._orders[number].popleft())
        if isinstance(order, Share):
            reply = asyncio.run(shard.take(order))
        elif isinstance(order, Explain):
            reply = asyncio.run(shard.explain(order))
        else:
            assert isinstance(order, Finish)
            reply = shard.finish()
        read = decode_reply(encode(reply))
        assert isinstance(read, Result | Explained | Sums)
        return number, read


def recording_of(paths: Sequence[Path], format_name: str = 'events') -> Recording:
    recording = Recording(paths, format_name)
    recording.scan()
    return recording


def whole(recording: Recording, rules: ReplayRules) -> tuple:
    """Everything that a replay with one process leaves."""
    outputs, letters = io.BytesIO(), io.BytesIO()
    run = Replay(recording, MemoryState(), MoodyScorer(), rules, outputs, letters)
    asyncio.run(run.run())
    return left(run, outputs, letters)


def sharded(recording: Recording, rules: ReplayRules, count: int,
            shards: Callable[[int, ShardRecipe], LocalShards] = LocalShards) -> tuple:
    """Everything that a replay with shards leaves."""
    outputs, letters = io.BytesIO(), io.BytesIO()
    recipe = ShardRecipe(MoodyScorer, partial(state_of_shard, None, count), rules, recording.records)
    run = ShardedReplay(recording, shards(count, recipe), rules, outputs, letters)
    rows: list[int] = []
    run.run(rows.append)
    assert sum(rows) == recording.rows
    return left(run, outputs, letters)


def page_of(run: Replay | ShardedReplay) -> str:
    return render_report(run.account.statistics, run.account.counts, MoodyScorer().model, ABOUT)


def left(run: Replay | ShardedReplay, outputs: io.BytesIO, letters: io.BytesIO) -> tuple:
    account = run.account
    seen = account.statistics
    sums = [{name: counts.tolist() for name, counts in seen.score_histograms.items()}, seen.events_per_hour,
            seen.alerts_per_hour, seen.tiers, seen.dead, seen.users_at_risk(), seen.alerts_shown]
    return outputs.getvalue(), letters.getvalue(), account.counts, account.refused_scores, sums


@pytest.fixture(scope='module')
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('simulated') / 'events.jsonl'
    write(simulate(SimulatorOptions(shoppers=40, days=90, seed=5, noise=0.02)), path, path.with_suffix('.truth.jsonl'))
    return path


@pytest.mark.parametrize('publish', ['changes', 'all', 'events'])
def test_any_number_of_shards_gives_the_same_bytes(simulated: Path, publish):
    recording = recording_of([simulated])
    rules = ReplayRules(publish=publish)
    expected = whole(recording, rules)
    values = [json.loads(line) for line in expected[0].splitlines()]
    assert {value['type'] for value in values} >= {'purchase_power.updated', 'purchase_intent.alert', 'churn.alert'}
    assert any(value['cause']['timer_ms'] for value in values)
    assert expected[2].duplicate
    assert expected[2].dead
    for count in (1, 2, 3):
        assert sharded(recording, rules, count) == expected


def test_the_report_is_the_same_page(simulated: Path):
    recording, rules = recording_of([simulated]), ReplayRules()
    run = Replay(recording, MemoryState(), MoodyScorer(), rules, io.BytesIO(), io.BytesIO())
    asyncio.run(run.run())
    recipe = ShardRecipe(MoodyScorer, partial(state_of_shard, None, 2), rules, recording.records)
    other = ShardedReplay(recording, LocalShards(2, recipe), rules, io.BytesIO(), io.BytesIO())
    other.run()
    assert page_of(other) == page_of(run)


def test_a_short_budget_for_reasons_goes_to_the_same_alerts(simulated: Path):
    recording = recording_of([simulated])
    explained = Counter[int]()
    for rows_max in (0, 40, 100, 100_000):
        rules = ReplayRules(reasons_rows_max=rows_max, block_span_ms_max=20 * DAY_MS)
        expected = whole(recording, rules)
        explained[rows_max] = sum(json.loads(line)['reasons'] is not None for line in expected[0].splitlines())
        assert sharded(recording, rules, 3) == expected
    assert explained[0] == 0 < explained[40] < explained[100] < explained[100_000]


@pytest.mark.parametrize('events_max', [1, 5, 200])
def test_small_sweeps_and_runs_are_cut_as_in_one_process(simulated: Path, events_max: int):
    recording = recording_of([simulated])
    rules = ReplayRules(block_events_max=events_max, block_span_ms_max=20 * DAY_MS, reasons_rows_max=60)
    assert sharded(recording, rules, 3) == whole(recording, rules)


def test_several_files_out_of_order_and_compressed(simulated: Path, tmp_path: Path):
    import gzip
    lines = simulated.read_bytes().splitlines(keepends=True)
    (tmp_path / 'a.jsonl').write_bytes(b''.join(lines[1::2]))
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(b''.join(lines[::2])))
    recording = recording_of([tmp_path / 'a.jsonl', tmp_path / 'b.jsonl.gz'])
    assert not recording.in_order
    assert sharded(recording, ReplayRules(), 2) == whole(recording, ReplayRules())


def test_recorded_topics_keep_their_offsets(simulated: Path, tmp_path: Path):
    path, number = tmp_path / 'topics.jsonl', 0
    with path.open('wb') as file:
        for line in simulated.read_bytes().splitlines()[:1_500]:
            try:
                event = json.loads(line)
                user, ts_ms = event['user_id'], int(event['ts'])
            except (ValueError, KeyError):
                continue
            file.write(encode_record(TopicRecord('clicks', 0, number, ts_ms, user.encode(), line)) + b'\n')
            number += 2
    recording = recording_of([path], 'kafka')
    rules = ReplayRules(publish='all', block_events_max=50)
    expected = whole(recording, rules)
    assert sharded(recording, rules, 3) == expected
    read_to = max(json.loads(line)['cause']['clicks_offset'] for line in expected[0].splitlines())
    assert read_to > number // 2        # the number of records


def test_a_recording_without_events(tmp_path: Path):
    (tmp_path / 'bad.jsonl').write_bytes(b'no event\n\n')
    recording = recording_of([tmp_path / 'bad.jsonl'])
    assert sharded(recording, ReplayRules(), 2) == whole(recording, ReplayRules())


def test_few_runs_are_in_flight(simulated: Path):
    made: list[LocalShards] = []

    def keep(count: int, recipe: ShardRecipe) -> LocalShards:
        made.append(LocalShards(count, recipe))
        return made[0]

    sharded(recording_of([simulated]), ReplayRules(block_events_max=20), 2, keep)
    assert made[0].runs_ahead_max == RUNS_AHEAD_MAX


event_rows = some.tuples(some.sampled_from('abcde'), some.integers(0, 60), some.integers(0, 3),
                         some.sampled_from(['view', 'add_to_cart', 'purchase', 'nonsense']), some.integers(0, 40))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=some.lists(event_rows, max_size=40), late=some.booleans(), count=some.integers(1, 4),
       rules=some.builds(ReplayRules, publish=some.sampled_from(['changes', 'all', 'events']),
                         reasons_rows_max=some.sampled_from([0, 10, 30, 60, 2048]),
                         block_events_max=some.integers(1, 6),
                         block_span_ms_max=some.sampled_from([0, DAY_MS, 30 * DAY_MS])))
def test_any_recording_gives_the_same_bytes(tmp_path: Path, rows, late: bool, count: int, rules: ReplayRules):
    path = tmp_path / 'any.jsonl'
    path.write_bytes(b''.join(
        b'bad\n' if kind == 'nonsense' else json.dumps({
            'event_id': f'e{event}', 'user_id': user, 'ts': T0_MS + day * DAY_MS + quarter * DAY_MS // 4,
            'type': kind, 'price': 7}).encode() + b'\n'
        for user, day, quarter, kind, event in (rows if late else sorted(rows, key=lambda row: row[1:3]))))
    recording = recording_of([path])
    assert sharded(recording, rules, count) == whole(recording, rules)


def row(user_id: str, at: int, urgency: int = -1, variants: int = 0) -> Row:
    return Row(at, user_id, 0, 0, urgency=urgency, variants=variants)


def test_a_sweep_takes_the_earliest_timers_and_one_of_each_user():
    rows = [row('b', 1), row('b', 2), row('b', 3), row('a', 2), row('c', 2), row('a', 9)]
    assert [[(fired.user_id, fired.at) for fired in sweep] for sweep in sweeps(rows, 2)] == [
        [('b', 1), ('a', 2)], [('b', 2), ('c', 2)], [('b', 3), ('a', 9)]]
    assert list(sweeps([], 2)) == []


def test_reasons_go_to_the_most_urgent_until_one_does_not_fit():
    step = [row('a', 0, 2, 10), row('b', 1), row('c', 2, 0, 20), row('d', 3, 0, 30), row('e', 4, 1, 5)]
    assert [found.user_id for found in rows_to_explain(step, 50)] == ['c', 'd']
    assert [found.user_id for found in rows_to_explain(step, 49)] == ['c']
    assert [found.user_id for found in rows_to_explain(step, 65)] == ['a', 'c', 'd', 'e']


def test_users_are_spread_evenly_and_always_alike():
    assert [shard_of(user, 3) for user in ('ada', 'bob', 'Zoë')] == [0, 0, 2]
    found = Counter(shard_of(f'user-{number}', 4) for number in range(4_000))
    assert set(found) == {0, 1, 2, 3}
    assert min(found.values()) > 900


def test_an_order_survives_the_wire():
    for order in (Share(1, 2, [b'a', b'\xff'], [0, 5], [7, 8]), Explain(3, [(1, 2)]), Finish()):
        assert decode_order(encode(order)) == order
    assert msgspec.structs.asdict(row('a', 3, 1, 2))['shard'] == -1
