"""How fast the worker restores an empty state directory from its changelog.

    python -m tests.bench.recovery [--records 1000000 --window 22 --runs 3]

The changelog holds realistic user records (about 1 KB with the default window), in steps as the worker writes them.
Each user occurs once. The time runs from the first record in the state until the worker is ready.
"""
import argparse
import shutil
import time
from pathlib import Path

from tests.bench.changelog import Pool, fill_changelog
from tests.bench.figures import MIB, Report, main, parser, say
from tests.bench.live import broker, cpu_s, make_topics, memory_mib, shop
from tests.bench.load import Shoppers
from tests.integration.running import Worker, wait_for


def recovery_s(worker: Worker, deadline_s: float) -> float:
    """Seconds from the first record in the state to ready. The worker is asked ten times a second at most."""
    def begun() -> bool:
        worker.check()
        return worker.metric('stream_recovery_records_total') > 0
    worker.get('/live')
    wait_for(begun, 'the first record', deadline_s)
    began = time.monotonic()

    def ready() -> bool:
        worker.check()
        return worker.get('/ready')['ready']
    wait_for(ready, 'a ready worker', deadline_s)
    return time.monotonic() - began


def bench(options: argparse.Namespace) -> int:
    report = Report('recovery', options)
    with broker() as (brokers, folder), shop(brokers, folder, options) as of:
        make_topics(of)
        pool = Pool(options.window)
        shoppers = Shoppers(options.users or options.records, of.partitions)
        began = time.monotonic()
        size = fill_changelog(of, shoppers, pool, options.records)
        say(f'changelog: {options.records:,} records of {shoppers.count:,} users, {size / MIB:,.0f} MiB, '
            f'written in {time.monotonic() - began:.1f} s')
        rates, peaks, costs = [], [], []
        for _ in range(options.runs):
            shutil.rmtree(Path(of.settings['state_dir']), ignore_errors=True)
            worker = of.worker(ready=False)
            seconds = recovery_s(worker, 1800)
            rates.append(options.records / seconds)
            peaks.append(memory_mib(worker, 'VmHWM'))
            costs.append(cpu_s(worker))
            users = sum(lane['users'] for lane in worker.get('/status')['lanes'])
            assert users == min(shoppers.count, options.records), f'{users:,} users came back'
            assert worker.stop() == 0, worker.said()[-3000:]
        report.add('bytes per record', size / options.records, 'B')
        report.spread('records restored', rates, 'records/s', at_least=50_000)
        report.spread('megabytes restored', [rate * size / options.records / MIB for rate in rates], 'MiB/s')
        report.spread('CPU of the whole process', costs, 's')
        report.spread('peak memory', peaks, 'MiB')
    return report.end()


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('--records', type=int, default=1_000_000)
    made.add_argument('--users', type=int, default=0, help='different users among them; 0: every record is another one')
    made.add_argument('--window', type=int, default=22, help='events per record')
    made.add_argument('--runs', type=int, default=3)
    main(bench, made.parse_args())
