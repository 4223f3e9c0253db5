"""The parts of the benches that calculate: arrivals, requests and their answers, latencies, readings of /proc, fits."""
import os
import struct
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest
from aiokafka.record.default_records import DefaultRecordBatch

from stream.core.events import Decoder, Event, EventRules
from tests.bench.figures import harness, several
from tests.bench.kstreams import Update, update_latencies_ms
from tests.bench.live import process_cpu_s, wake_ups
from tests.bench.load import CARTS_SHARE, Shoppers
from tests.bench.open_loop import (
    SMOOTH_S,
    Output,
    Sent,
    SentBatch,
    appended,
    drawn,
    in_turn,
    latencies_ms,
    moments_s,
    prepared,
)
from tests.bench.sizing import Load, Model, Pacing, Run, median_interval
from tests.bench.steady import Reading, Use

TOPICS = ('clicks', 'carts')


# ---- arrivals --------------------------------------------------------------------------------------------------------

def test_arrivals_are_poisson_and_wait_for_their_tick():
    moments = moments_s(500, 200, SMOOTH_S, np.random.default_rng(1))
    assert len(moments) == pytest.approx(100_000, rel=0.02)
    assert np.all(np.diff(moments) >= 0) and moments[0] > 0 and moments[-1] <= 200 + 1e-9
    assert np.allclose(moments / SMOOTH_S, np.round(moments / SMOOTH_S))
    # Gaps of a Poisson process deviate as much as their mean is; those of bursts deviate more.
    assert np.diff(moments).std() == pytest.approx(1 / 500, rel=0.1)
    assert np.diff(moments_s(500, 200, 0.02, np.random.default_rng(1))).std() > 2 / 500


def test_no_rate_sends_nothing():
    assert list(drawn(Shoppers(10, 2), 0, 5, SMOOTH_S)) == []


def test_users_go_to_their_partition_and_one_may_be_hot():
    shoppers = Shoppers(1_000, 4)
    number_of = {user: number for number, user in enumerate(shoppers.ids)}
    places = list(drawn(shoppers, 1_000, 20, SMOOTH_S, hot_share=0.5))
    events = [(source, partition, user) for at in places for (source, partition), users in at.users.items()
              for user in users]
    assert all(shoppers.partition_of[number_of[user]] == partition for _, partition, user in events)
    assert np.mean([source for source, *_ in events]) == pytest.approx(CARTS_SHARE, abs=0.02)
    assert np.mean([user == shoppers.ids[0] for *_, user in events]) == pytest.approx(0.5, abs=0.02)


def test_each_partition_has_its_turn_at_the_same_distance():
    places = list(in_turn(Shoppers(100, 3), 10, 2, 0.02))
    assert len(places) == 20
    assert all(set(at.users) == {(source, partition) for source in (0, 1) for partition in range(3)} for at in places)
    assert np.allclose(np.diff([at.at_s for at in places]), 0.1)


# ---- requests --------------------------------------------------------------------------------------------------------

def test_a_request_holds_events_that_the_worker_reads():
    shoppers, decode, seen = Shoppers(50, 2), Decoder(EventRules()), 0
    requests = prepared(TOPICS, drawn(shoppers, 2_000, 0.2, SMOOTH_S), began_ms=1.7e12)
    for request in requests:
        assert struct.unpack_from('>i', request.data)[0] == len(request.data) - 4
        for users in request.users.values():
            for user in users:
                at = request.data.index(b'{"event_id":"%016d"' % seen)
                event = decode(request.data[at:request.data.index(b'}', at) + 1])
                assert isinstance(event, Event) and event.user_id == user.decode()
                seen += 1
    assert seen == sum(len(users) for request in requests for users in request.users.values()) > 100


def test_the_batches_of_a_request_are_whole():
    request, = prepared(TOPICS, [next(drawn(Shoppers(50, 1), 2_000, 0.2, 0.2))], began_ms=1.7e12)
    at = request.data.index(b'clicks') + len(b'clicks') + 4
    partition, size = struct.unpack_from('>ii', request.data, at)
    batch = DefaultRecordBatch(request.data[at + 8:at + 8 + size])
    assert partition == 0 and batch.validate_crc()
    assert [record.key for record in batch] == request.users[0, 0]


def test_an_answer_may_name_its_partitions_in_any_order():
    request, = prepared(TOPICS, [next(in_turn(Shoppers(20, 2), 50, 1, 0.02))], began_ms=1.7e12)
    def answer(error: int = 0, topics: int = 2) -> bytes:
        said = struct.pack('>ii', 7, topics)
        for name in TOPICS[:topics]:
            said += struct.pack(f'>h{len(name)}si', len(name), name.encode(), 2)
            for partition in (1, 0):
                said += struct.pack('>ihqq', partition, error, 10 + partition, 1_700)
        return said + struct.pack('>i', 0)
    found = appended(answer(), request, 7, TOPICS)
    assert {(batch.source, batch.partition): batch.offset for batch in found} == {
        (0, 0): 10, (0, 1): 11, (1, 0): 10, (1, 1): 11}
    assert all(batch.users == request.users[batch.source, batch.partition] for batch in found)
    for wrong, number in ((answer(error=6), 7), (answer(topics=1), 7), (answer(), 8)):
        with pytest.raises(AssertionError):
            appended(wrong, request, number, TOPICS)


# ---- latencies -------------------------------------------------------------------------------------------------------

def test_an_event_waits_for_the_first_output_that_covers_it():
    sent = Sent([SentBatch(0, 0, 5, 1_000, [b'a', b'b', b'a'], 990), SentBatch(1, 0, 0, 2_500, [b'b'], 2_490)])
    def output(user: bytes, at_ms: int, clicks: int, carts: int) -> Output:
        return Output(0, user, at_ms, clicks, carts, False, 'scores')
    outputs = [output(b'a', 1_010, 6, 0), output(b'a', 1_020, 8, 0), output(b'b', 2_505, 7, 1)]
    found, missing = latencies_ms(sent, outputs)
    assert sorted(found) == [5, 10, 20, 1505] and missing == 0
    assert sorted(latencies_ms(sent, outputs[::-1])[0]) == sorted(found)     # a later topic may be read first
    assert latencies_ms(sent, outputs[:2])[1] == 2
    assert sorted(latencies_ms(sent, outputs, skip_s=1)[0]) == [5]
    assert sorted(latencies_ms(sent, outputs, which=b'b'.__ne__)[0]) == [10, 20]


def test_a_small_message_answers_the_event_of_its_user_and_time():
    sent = Sent([SentBatch(0, 0, 5, 1_000, [b'a', b'b'], 990), SentBatch(1, 0, 0, 2_500, [b'a'], 2_490)])
    found, missing = update_latencies_ms(sent, [Update(b'a', 2_490, 2_507), Update(b'a', 990, 1_003)], 0)
    assert sorted(found) == [3, 7] and missing == 1


# ---- readings --------------------------------------------------------------------------------------------------------

def test_the_cpu_of_a_process_is_read_behind_its_name(tmp_path: Path):
    (tmp_path / '7').mkdir()
    behind = ['S', *map(str, range(1, 30))]
    behind[11], behind[12] = '150', '50'
    (tmp_path / '7' / 'stat').write_text(f'7 (a ) name) {" ".join(behind)}\n')
    assert process_cpu_s(7, tmp_path) == 200 / os.sysconf('SC_CLK_TCK')
    before = process_cpu_s(os.getpid())
    until = before + 0.05
    while process_cpu_s(os.getpid()) < until:
        pass
    assert process_cpu_s(os.getpid()) >= until


def test_wake_ups_are_those_of_all_threads(tmp_path: Path):
    for thread, count in ((7, 40), (8, 2)):
        (tmp_path / '7' / 'task' / str(thread)).mkdir(parents=True)
        (tmp_path / '7' / 'task' / str(thread) / 'status').write_text(
            f'Name:\tx\nvoluntary_ctxt_switches:\t{count}\nnonvoluntary_ctxt_switches:\t900\n')
    (tmp_path / '7' / 'task' / '9').mkdir()      # it has ended
    assert wake_ups(7, tmp_path) == 42
    assert wake_ups(os.getpid()) > 0


def test_use_is_per_second():
    use = Use.between(Reading(10.0, 1.0, 100, 50, 200), Reading(20.0, 2.0, 400, 150, 400))
    assert (use.core, use.wake_ups, use.steps, use.rows) == (0.1, 30, 10, 20)
    assert (use.rows_a_step, use.cpu_ms_a_step) == (2, 10)


# ---- sizing ----------------------------------------------------------------------------------------------------------

COSTS = {'base': 0.01, 'partition': 0.001, 'step': 400e-6, 'event': 20e-6, 'user': 60e-6, 'message': 30e-6}


def made_up(load: Load, pacing: Pacing, noise: float) -> Run:
    steps, rows = pacing.steps(load), pacing.rows(load)
    core = (COSTS['base'] + COSTS['partition'] * load.partitions + COSTS['step'] * steps + COSTS['event'] * load.rate
            + COSTS['user'] * rows + COSTS['message'] * rows * load.publish)
    return Run(load, core * (1 + noise), steps, rows)


def test_the_fit_finds_the_costs_and_says_how_sure_it_is():
    pacing, rng = Pacing(0.02, True), np.random.default_rng(1)
    runs = [made_up(Load(rate, partitions, users, publish), pacing, rng.normal(0, 0.02))
            for partitions, users, publish in ((2, 20, True), (8, 20_000, False), (8, 20, True), (24, 20_000, True),
                                               (24, 20, False))
            for rate in (0, 300, 1_000, 3_000)]
    model = Model.of(runs, cached_users=1e9)
    assert model.pacing.by_lane and model.pacing.step_s == pytest.approx(0.02, rel=0.05)
    for value, cost in zip(model.coefficients, COSTS.values(), strict=False):
        assert value == pytest.approx(cost, rel=0.3)
    assert model.coefficients[-1] == 0      # nothing was read from disk
    assert np.median(np.abs(model.left_out)) < 0.05
    assert np.all(model.interval[0] <= model.coefficients + 1e-12)
    held_out = made_up(Load(2_000, 12, 50_000, True), pacing, 0)
    assert model.cores(held_out.load) == pytest.approx(held_out.core, rel=0.05)
    assert 'cores = ' in model.formula()


def test_a_cost_is_never_negative():
    runs = [Run(Load(rate, 8, 100, False), 0.5 - rate / 10_000, 0, 0) for rate in (0, 1_000, 2_000, 3_000)]
    assert Model.of(runs, 1e9).coefficients.min() >= 0


def test_few_users_share_a_step():
    load = Load(1_000, 1, 5, True)
    pacing = Pacing(0.1, True)
    assert pacing.steps(load) == pytest.approx(1_000 / 101)
    assert pacing.rows(load) == pytest.approx(5 * pacing.steps(load), rel=1e-3)
    assert pacing.rows(Load(1_000, 1, 10_000_000, True)) == pytest.approx(1_000, rel=1e-3)
    assert pacing.rows(Load(0, 1, 10, True)) == 0


def test_the_interval_holds_the_median():
    low, high = median_interval([1, 2, 3, 4, 5, 6, 7])
    assert 1 <= low < 4 < high <= 7
    assert median_interval([3.0] * 7) == (3.0, 3.0)


# ---- options ---------------------------------------------------------------------------------------------------------


def test_several_values_are_separated_by_commas():
    assert several(float)('1,2.5') == [1.0, 2.5]
    assert several(str, ('a', 'b'))('b') == ['b']


@pytest.mark.parametrize(('kind', 'allowed', 'text', 'why'), [
    (float, (), '1,x', '1,x is not a list of numbers'), (str, ('a', 'b'), 'a,c', 'no c; choose from a, b'),
])
def test_a_wrong_value_is_refused_in_words(kind: type, allowed: tuple[str, ...], text: str, why: str):
    with pytest.raises(ArgumentTypeError, match=why):
        several(kind, allowed)(text)


def test_a_folder_without_the_peers_is_refused(tmp_path: Path):
    with pytest.raises(ArgumentTypeError, match='it has no folder kstreams'):
        harness(str(tmp_path))
    (tmp_path / 'kstreams').mkdir()
    assert harness(str(tmp_path)) == tmp_path
