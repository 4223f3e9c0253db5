"""The auditor finds what is wrong, and nothing where nothing is: clean logs pass, planted bugs are caught."""
import asyncio
import copy
import functools
import itertools
from collections.abc import Callable, Iterable

import orjson
import pytest

from tests.chaos import workload
from tests.chaos.audit_report import AuditReport
from tests.chaos.auditor import audit
from tests.chaos.log import Bound, Fault, Record, Sample, Topic
from tests.chaos.reference import DAY_MS, Rules, partition_of
from tests.chaos.rescore import wrong_scores
from tests.chaos.toy import GROUP, LANE_KEY, Outcome, Toy, WildScorer

PARTITIONS = 2
NOW_MS = 1_800_000_000_000


@functools.cache
def inputs() -> list[workload.Input]:
    rows = itertools.islice(workload.records(1, 15, 30, 0.05, 0.04), 1_500)
    return [entry._replace(timestamp_ms=NOW_MS + place) for place, entry in enumerate(rows)]


def run_toy(publish: str, bugs: Iterable[str] = (), crashes: float = 0.03, seed: int = 1) -> Outcome:
    return asyncio.run(Toy(inputs(), PARTITIONS, seed, crashes, publish, bugs).work())  # type: ignore[arg-type]


def check(outcome: Outcome, publish: str = 'all') -> AuditReport:
    rules = Rules(group=GROUP, publish=publish, events_max=24, span_ms=200 * DAY_MS)
    rescore = functools.partial(wrong_scores, scorer=WildScorer())
    return asyncio.run(audit(outcome.log, rules, outcome.run, outcome.stores, rescore))


@pytest.fixture(scope='module')
def honest() -> Outcome:
    return run_toy('all')


@pytest.mark.parametrize('publish', ['changes', 'all', 'events'])
@pytest.mark.parametrize('seed', range(3))
def test_an_honest_worker_passes_however_often_it_crashes(publish: str, seed: int):
    outcome = run_toy(publish, seed=seed)
    report = check(outcome, publish)
    assert report.ok, [check.findings for check in report.checks.values()]
    looked = {what for check in report.checks.values() for what in check.looked_at}
    assert {'repeats', 'late', 'duplicate', 'timers', 'decisions', 'dead letters', 'records in RocksDB',
            'scored again'} <= looked
    assert report.checks['C3'].looked_at['repeats'] > 10, 'crashes republish'
    assert report.checks['C7'].looked_at['late'] > 0
    assert 'users compared by sets alone' not in looked


def test_a_worker_that_is_never_killed_repeats_nothing():
    outcome = run_toy('all', crashes=0)
    assert outcome.run.clean
    report = check(outcome)
    assert report.ok
    assert 'repeats' not in report.checks['C3'].looked_at


def test_a_compacted_changelog_is_compared_by_sets_where_the_order_is_lost(honest: Outcome):
    outcome = copy.deepcopy(honest)
    for partition in range(PARTITIONS):
        records = outcome.log.topics['changelog', partition]
        last = {record.key: record.offset for record in records}
        outcome.log.topics['changelog', partition] = [
            record for record in records if record.offset % 3 == 0 or record.offset == last[record.key]]
    report = check(outcome)
    assert report.ok, [check.findings for check in report.checks.values()]
    assert report.checks['C5'].looked_at['users compared by sets alone'] > 0


# Bugs of a worker: each breaks a promise at the place where a real one would, and is found by at least these checks.
BUGS = {
    'drop_event': {'C1', 'C5', 'C7'},           # an event is lost within a block
    'skip_block': {'C1', 'C5', 'C7'},           # the contiguity guard is missing
    'fold_redelivered': {'C1', 'C5', 'C7'},     # redelivered events are folded again
    'commit_first': {'C6', 'C1'},               # offsets are committed before anything is durable
    'no_resend': {'C9'},                        # nobody sends what the newest step may not have sent
    'skip_output': {'C9'},                      # a failed send is only logged
    'skip_dead_letter': {'C7'},
    'no_sweep': {'C8'},                         # silent users are forgotten
    'wrong_timer': {'C5', 'C9'},                # timers do not fire before later events
    'wrong_store': {'C5'},                      # changelog and RocksDB disagree
    'unordered_outputs': {'C9'},
    'decide_twice': {'C9'},                     # a decision is counted and not announced
    'lane_first': {'C6'},                       # the lane's record is ahead of its changes
    'forget_counters': {'C1', 'C5'},
    'wrong_window': {'C5'},
    'swap_rows': {'C9'},                        # the scores of a batch change places
    'swap_users': {'C5'},                       # two users' rows change places
}


@pytest.mark.parametrize('bug', BUGS)
def test_a_bug_of_the_worker_is_caught(bug: str):
    report = check(run_toy('all', [bug]))
    assert report.failed >= BUGS[bug], report.failed


# Bugs that show in the log alone: each changes what an honest worker has left.

Plant = Callable[[Outcome], None]
PLANTS: dict[str, tuple[Plant, set[str]]] = {}


def plant(*codes: str) -> Callable[[Plant], Plant]:
    def keep(change: Plant) -> Plant:
        PLANTS[change.__name__] = change, set(codes)
        return change
    return keep


def replace(outcome: Outcome, topic: Topic, place: int, partition: int = 0, **fields: object) -> Record:
    """Change a record of a topic partition."""
    records = outcome.log.topics[topic, partition]
    before = records[place]
    records[place] = before._replace(**fields)
    return before


def edit(outcome: Outcome, topic: Topic, place: int, **fields: object) -> None:
    """Change fields of a message's JSON."""
    message = orjson.loads(outcome.log.topics[topic, 0][place].value or b'')
    replace(outcome, topic, place, value=orjson.dumps(message | fields))


def last_alert_of_chain(outcome: Outcome) -> int:
    return len(outcome.log.topics['alerts', 0]) // 2


@plant('C3')
def an_id_with_another_payload(outcome: Outcome) -> None:
    edit(outcome, 'alerts', last_alert_of_chain(outcome), action='free lunch')


@plant('C3')
def the_same_id_later_with_another_payload(outcome: Outcome) -> None:
    record = outcome.log.topics['alerts', 0][-1]
    outcome.log.append('alerts', 0, record.key, (record.value or b'').replace(b'"tier":', b'"tier": '), record.headers)


@plant('C3')
def a_repeat_after_a_clean_stop(outcome: Outcome) -> None:
    outcome.run.clean = True


@plant('C2')
def an_output_of_nobody(outcome: Outcome) -> None:
    edit(outcome, 'alerts', 5, id='0123456789abcdef' * 2)


@plant('C2')
def an_output_for_an_unknown_user(outcome: Outcome) -> None:
    edit(outcome, 'alerts', 5, user_id='nobody')


@plant('C9')
def a_lost_decision(outcome: Outcome) -> None:
    records = outcome.log.topics['alerts', 0]
    value = records[last_alert_of_chain(outcome)].value
    outcome.log.topics['alerts', 0] = [record for record in records if record.value != value]


@plant('C9')
def a_header_of_another_message(outcome: Outcome) -> None:
    replace(outcome, 'alerts', 3, headers=outcome.log.topics['alerts', 0][-1].headers)


@plant('C4')
def outputs_of_two_states_swapped(outcome: Outcome) -> None:
    records = outcome.log.topics['scores', 0]
    key = records[-1].key
    first, *_, last = [place for place, record in enumerate(records) if record.key == key]
    records[first], records[last] = (records[last]._replace(offset=records[first].offset),
                                     records[first]._replace(offset=records[last].offset))


@plant('C4')
def an_output_in_another_partition(outcome: Outcome) -> None:
    record = outcome.log.topics['alerts', 0].pop()
    outcome.log.append('alerts', 1, record.key, record.value, record.headers)


@plant('C4')
def an_output_with_another_key(outcome: Outcome) -> None:
    replace(outcome, 'alerts', 3, key=b'nobody')


@plant('C1', 'C7')
def an_event_that_nobody_has_read(outcome: Outcome) -> None:
    record = next(record for record in outcome.log.topics['clicks', 0]
                  if record.key and record.value and partition_of(record.key, PARTITIONS) == 0)
    fresh = (record.value or b'').replace(b'"event_id":"', b'"event_id":"fresh-', 1)
    outcome.log.append('clicks', 0, record.key, fresh, (), NOW_MS + 1_000_000)


@plant('C7')
def a_lost_dead_letter(outcome: Outcome) -> None:
    letters = outcome.log.topics['dead_letters', 0]
    outcome.log.topics['dead_letters', 0] = [letter for letter in letters if letter.key != letters[0].key]


@plant('C7')
def a_dead_letter_of_a_valid_event(outcome: Outcome) -> None:
    letter = outcome.log.topics['dead_letters', 0][0]
    dead = {letter.key for letter in outcome.log.topics['dead_letters', 0]}
    valid = next(b'clicks-0-%d' % offset for offset in range(1_000) if b'clicks-0-%d' % offset not in dead)
    outcome.log.append('dead_letters', 0, valid, letter.value, letter.headers)


@plant('C7')
def a_dead_letter_without_its_bytes(outcome: Outcome) -> None:
    place = next(place for place, letter in enumerate(outcome.log.topics['dead_letters', 0]) if letter.value)
    replace(outcome, 'dead_letters', place, value=b'{}')


@plant('C7')
def a_dead_letter_without_its_place(outcome: Outcome) -> None:
    letter = outcome.log.topics['dead_letters', 0][0]
    replace(outcome, 'dead_letters', 0, headers=tuple(
        (name, value) for name, value in letter.headers if name != 'stream_offset'))


@plant('C5')
def a_stale_record_in_the_database(outcome: Outcome) -> None:
    store = outcome.stores[0]
    changes = [record for record in outcome.log.topics['changelog', 0] if record.key != LANE_KEY]
    store.users[changes[0].key or b''] = changes[0].value or b''


@plant('C5')
def a_user_missing_in_the_database(outcome: Outcome) -> None:
    outcome.stores[0].users.pop(next(iter(outcome.stores[0].users)))


@plant('C5')
def a_timer_missing_in_the_index(outcome: Outcome) -> None:
    outcome.stores[0].timers.pop()


@plant('C5')
def no_database_of_an_owner(outcome: Outcome) -> None:
    outcome.stores[0].owner = False


@plant('C5')
def a_copy_with_a_record_that_never_was(outcome: Outcome) -> None:
    copied = copy.deepcopy(outcome.stores[0])
    copied.owner = False
    outcome.stores.append(copied)
    check_passes(outcome)
    user_id, record = next(iter(copied.users.items()))
    copied.users[user_id] = record[:-1] + bytes([record[-1] ^ 1])


@plant('C5')
def an_old_record_behind_a_new_one_in_the_changelog(outcome: Outcome) -> None:
    """What a zombie does that wakes up and flushes."""
    changes = [record for record in outcome.log.topics['changelog', 0] if record.key != LANE_KEY]
    stale = next(record for record in changes if [other.key for other in changes].count(record.key) > 3)
    outcome.log.append('changelog', 0, stale.key, stale.value)


@plant('C5')
def a_damaged_record(outcome: Outcome) -> None:
    place = next(place for place, record in enumerate(outcome.log.topics['changelog', 0]) if record.key != LANE_KEY)
    replace(outcome, 'changelog', place, value=(outcome.log.topics['changelog', 0][place].value or b'')[:-1])


@plant('C6')
def an_offset_that_goes_back(outcome: Outcome) -> None:
    samples = outcome.run.samples
    earlier = next(sample for sample in samples if sum(sample.committed.values()) < sum(samples[-1].committed.values()))
    samples.insert(-1, Sample(samples[-1].at_s, earlier.committed, samples[-1].ends))


@plant('C6')
def an_offset_past_the_end(outcome: Outcome) -> None:
    last = outcome.run.samples[-1]
    outcome.run.samples.append(Sample(last.at_s, {place: end + 1 for place, end in last.committed.items()}, last.ends))


@plant('C6')
def an_offset_before_its_output(outcome: Outcome) -> None:
    for place, sample in enumerate(outcome.run.samples):
        ends = sample.ends | {('scores', 0): max(sample.ends['scores', 0] - 3, 0)}
        outcome.run.samples[place] = Sample(sample.at_s, sample.committed, ends)


@plant('C8')
def something_left_to_read(outcome: Outcome) -> None:
    last = outcome.run.samples[-1]
    place: tuple[Topic, int] = ('clicks', 0)
    outcome.run.samples[-1] = Sample(last.at_s, last.committed | {place: last.committed[place] - 1}, last.ends)
    outcome.run.samples.insert(0, outcome.run.samples[0])


@plant('C8')
def never_settled(outcome: Outcome) -> None:
    outcome.run.settled_s = None


@plant('C8')
def nobody_reads_for_a_minute(outcome: Outcome) -> None:
    samples = outcome.run.samples
    half = len(samples) // 2
    stuck = Sample(samples[half].at_s + 61, samples[half].committed, samples[half].ends)
    samples[half + 1:] = [stuck, *(Sample(sample.at_s + 62, sample.committed, sample.ends)
                                   for sample in samples[half + 1:])]


@plant('C10')
def a_planned_fault_that_never_fired(outcome: Outcome) -> None:
    outcome.run.planned = 1


@plant('C10')
def faults_without_events_between(outcome: Outcome) -> None:
    outcome.run.planned, outcome.run.faults = 2, [Fault('kill', 1.0, 1_200, 100), Fault('kill', 2.0, 1_300, 100)]


@plant('C10')
def a_fault_when_all_was_over(outcome: Outcome) -> None:
    outcome.run.planned, outcome.run.faults = 1, [Fault('kill', 1.0, 3_000, 0)]


@plant('C11')
def too_much_memory(outcome: Outcome) -> None:
    outcome.run.bounds = [Bound('memory of a worker', 2_100, 2_000, 'MiB')]


def check_passes(outcome: Outcome) -> None:
    report = check(outcome)
    assert report.ok, report.failed


@pytest.mark.parametrize('name', PLANTS)
def test_what_is_wrong_in_a_log_is_caught(name: str, honest: Outcome):
    change, codes = PLANTS[name]
    outcome = copy.deepcopy(honest)
    change(outcome)
    report = check(outcome)
    assert report.failed >= codes, report.failed


def test_at_least_25_bugs_are_planted():
    assert len(BUGS) + len(PLANTS) >= 25


def test_findings_are_bounded_and_the_table_names_every_check(honest: Outcome):
    outcome = copy.deepcopy(honest)
    outcome.log.topics['changelog', 0].clear()
    report = check(outcome)
    assert report.checks['C1'].wrong > 100
    assert len(report.checks['C1'].findings) == 20
    assert report.table().row_count == len(report.checks) == 11
