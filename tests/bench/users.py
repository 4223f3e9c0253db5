"""A million users in the state: memory, and latency compared with ten thousand users.

    python -m tests.bench.users [--users 1000000 --few 10000 --rate 1000 --seconds 60]

The worker restores the users from a changelog into an empty folder. Then it folds events at a steady, moderate rate,
drawn evenly from all users, so that no cache helps much. Its peak memory includes the recovery. Latency is the time
from an event to its output, by the broker's clock, with the constant scorer.
"""
import argparse
import asyncio
import time

import numpy as np

from tests.bench.changelog import Pool, fill_changelog
from tests.bench.figures import Report, main, parser, say
from tests.bench.live import (
    APPEND_TIME,
    broker,
    cpu_s,
    disk_bytes,
    make_topics,
    memory_mib,
    output_topics,
    shop,
    wait_done,
)
from tests.bench.load import Shoppers
from tests.bench.open_loop import drive, latencies_ms, read_outputs


def with_users(count: int, options: argparse.Namespace, report: Report) -> float:
    """Restore so many users and fold their events. Returns the p99 of the latency in ms."""
    with broker() as (brokers, folder), shop(brokers, folder, options, publish='all') as of:
        make_topics(of, input=APPEND_TIME, alerts=APPEND_TIME, scores=APPEND_TIME)
        shoppers = Shoppers(count, of.partitions)
        fill_changelog(of, shoppers, Pool(options.window), count)
        began = time.monotonic()
        worker = of.worker(ready=False)
        until = time.monotonic() + 1800
        while not worker.get('/ready')['ready']:
            worker.check()
            assert time.monotonic() < until, 'the state was not read back within 1800 s'
            time.sleep(0.2)
        name = f'{count:,} users'
        say(f'{name}: restored {time.monotonic() - began:.1f} s after the start')
        report.add(f'{name}: peak memory during recovery', memory_mib(worker, 'VmHWM'), 'MiB')
        lasted, before = options.warm_s + options.seconds, cpu_s(worker)
        sent = asyncio.run(drive(of, shoppers, options.rate, lasted, seed=2))
        report.add(f"{name}: the worker's share of a core", (cpu_s(worker) - before) / lasted, '1')
        asyncio.run(wait_done(of))
        report.add(f'{name}: memory at the end', memory_mib(worker), 'MiB')
        peak = memory_mib(worker, 'VmHWM')
        report.add(f'{name}: peak memory', peak, 'MiB', **({'at_most': 600} if count == options.users else {}))
        report.add(f'{name}: disk', disk_bytes(folder / 'state') / count, 'B/user')
        assert sum(lane['users'] for lane in worker.get('/status')['lanes']) == count
        assert worker.stop() == 0, worker.said()[-3000:]
        found, missing = latencies_ms(sent, read_outputs(of, output_topics(of)), options.warm_s)
        assert not missing, f'{missing:,} events have no output'
        p50, p99 = np.percentile(found, (50, 99))
        report.add(f"{name}: the loop's own delay, p99", float(np.percentile(sent.late_ms, 99)), 'ms')
        report.add(f'{name}: event to output, p50', p50, 'ms')
        report.add(f'{name}: event to output, p99', p99, 'ms')
        return float(p99)


def bench(options: argparse.Namespace) -> int:
    report = Report('users', options)
    few = with_users(options.few, options, report)
    many = with_users(options.users, options, report)
    report.add(f'p99 with {options.users:,} users relative to {options.few:,}', many / few, '1', at_most=1.5)
    return report.end()


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('--users', type=int, default=1_000_000)
    made.add_argument('--few', type=int, default=10_000)
    made.add_argument('--window', type=int, default=22, help='events of each user at the beginning')
    made.add_argument('--rate', type=float, default=1_000, help='events a second')
    made.add_argument('--seconds', type=float, default=60)
    made.add_argument('--warm-s', type=float, default=10)
    main(bench, made.parse_args())
