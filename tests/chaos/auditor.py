"""The auditor: reads again all that a group read and wrote, computes it with the reference, and reports differences.

It shares no code with the worker. The input topics are the truth, and everything else is a claim that it checks:

    C1 loss          every valid event counts exactly once in its user's record: as applied, duplicate or late
    C2 phantom       every output is recorded in its user's state; no timer fired beyond the newest event time
    C3 duplicates    an id has one payload; after a clean run no id occurs twice
    C4 order         a user's outputs are in one partition, in the order of the user's states
    C5 state         reference == changelog == RocksDB with its timer index, for every user and every state
    C6 offsets       never go back, never pass the end, never pass a change or output that was not acknowledged
    C7 conservation  read = applied + duplicate + late + dead-lettered; dead letters are exactly the invalid records
    C8 liveness      everything was read in time, and progress never stopped for long
    C9 decisions     every recorded decision was published; ids, causes, order, thresholds and expiry are correct
    C10 validity     every planned fault fired during the stream, with events in between
    C11 bounds       memory, file handles and disk use stayed below their limits

Unless compaction removed some, the changelog holds every state of every user, with the offsets up to which the user was
folded. A step folds both topics in the order of the records' times. So the order in which a user's events were folded
is known, and counters, late events and timers can be compared exactly, state by state. If a state is missing and the
order matters, the auditor compares the window and the sum of the counters, which do not depend on the order.
"""
from collections.abc import Awaitable, Callable, Iterable, Sequence

from tests.chaos.audit_report import AuditReport
from tests.chaos.log import SOURCES, Log, Record, Run, Store, Topic
from tests.chaos.partition_audit import NEVER, PartitionAudit, Samples
from tests.chaos.reference import CARTS, CLICKS, Rules

Rescore = Callable[[Sequence[tuple[bytes, dict]]], Awaitable[Iterable[str]]]


async def audit(log: Log, rules: Rules, run: Run, stores: Iterable[Store] = (),
                rescore: Rescore | None = None) -> AuditReport:
    """Run all checks. They go partition by partition, so that only one is in memory.

    rescore   reports wrong scores of some messages, given the records that they were made from
    """
    report = AuditReport()
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


async def _dead_letters(log: Log, run: Run, report: AuditReport, invalid: dict[bytes, Record],
                        counted: dict[str, int]) -> None:
    letters: set[bytes] = set()
    samples = [Samples(run, partition) for partition in range(log.partitions)]
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


def _committed_early(samples: list[Samples], log: Log, key: bytes, offset: int, partition: int) -> bool:
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


def _offsets(run: Run, report: AuditReport) -> None:
    """Check that committed offsets never go back, and never pass the end."""
    before: dict[tuple[Topic, int], int] = {}
    for sample in run.samples:
        report.saw('C6', 'samples')
        for place, committed in sample.committed.items():
            name = f'{place[0]}-{place[1]}'
            if committed < before.get(place, 0):
                report.wrong('C6', f'{name}: went back from {before[place]} to {committed} at {sample.at_s:.1f} s')
            before[place] = max(committed, before.get(place, 0))
            if committed > sample.ends.get(place, NEVER):
                report.wrong('C6', f'{name}: {committed} is past the end, {sample.ends[place]}, at {sample.at_s:.1f} s')
        for place in before.keys() - sample.committed.keys():
            report.wrong('C6', f'{place[0]}-{place[1]}: nothing is committed any more at {sample.at_s:.1f} s')


def _liveness(run: Run, report: AuditReport) -> None:
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


def _faults(run: Run, report: AuditReport) -> None:
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
