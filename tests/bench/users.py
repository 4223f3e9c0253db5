"""Millions of users in the state: memory, and latency compared with ten thousand users.

    python -m tests.bench.users [--users 1000000 --few 10000 --rate 1000 --seconds 60]
    python -m tests.bench.users --users 1000000,5000000:4

The worker restores the users from a changelog into an empty folder. Then it folds events at a steady, moderate rate,
drawn evenly from all users, so that no cache helps much. Its peak memory includes the recovery. Latency is the time
from an event to its output, by the broker's clock, with the constant scorer. `COUNT:EVENTS` gives users fewer events
than `--window`: five million users with 22 events take 20 GB on the broker and on disk, with 4 events 6 GB.
"""
import argparse
import asyncio
import time

import numpy as np

from tests.bench.figures import Report, main, parser, say
from tests.bench.live import disk_bytes, memory_mib, output_topics, wait_done
from tests.bench.open_loop import BURST_S, read_outputs
from tests.bench.steady import add_load_options, restorable, sender, used, waited_ms

MEMORY_MIB_MAX, RATIO_MAX = 600, 1.3


def with_users(text: str, options: argparse.Namespace, report: Report, memory_max: float | None = None) -> float:
    """Restore so many users and fold their events. Returns the p99 of the latency in ms."""
    number, _, window = text.partition(':')
    count = int(number)
    with restorable(options, count, int(window or options.window), session_timeout_ms=10_000) as (of, shoppers, _):
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
        sent, use = asyncio.run(used(of, worker.process.pid, worker, shoppers, options.rate, options.warm_s,
                                     options.seconds, tick_s=options.tick_ms / 1000, seed=2))
        report.add(f"{name}: the worker's share of a core", use.core, '1')
        asyncio.run(wait_done(of))
        report.add(f'{name}: memory at the end', memory_mib(worker), 'MiB')
        report.add(f'{name}: peak memory', memory_mib(worker, 'VmHWM'), 'MiB', at_most=memory_max)
        report.add(f'{name}: disk', disk_bytes(of.folder / 'state') / count, 'B/user')
        assert sum(lane['users'] for lane in worker.get('/status')['lanes']) == count
        assert worker.stop() == 0, worker.said()[-3000:]
        p50, p99 = np.percentile(waited_ms(sent, read_outputs(of, output_topics(of)), options.warm_s), (50, 99))
        sender(report, name, sent, options.warm_s + options.seconds)
        report.add(f'{name}: event to output, p50', p50, 'ms')
        report.add(f'{name}: event to output, p99', p99, 'ms')
        return float(p99)


def bench(options: argparse.Namespace) -> int:
    report = Report('users', options)
    few = with_users(options.few, options, report)
    for text in options.users.split(','):
        many = with_users(text, options, report, MEMORY_MIB_MAX)
        report.add(f'p99 with {text} users relative to {options.few}', many / few, '1', at_most=RATIO_MAX)
    return report.end()


if __name__ == '__main__':
    made = parser(__doc__)
    add_load_options(made, users='1000000', tick_ms=BURST_S * 1000)
    made.add_argument('--few', default='10000', help='users of the run to compare with (default: %(default)s)')
    made.add_argument('--rate', type=float, default=1_000, help='events a second (default: %(default)s)')
    main(bench, made.parse_args())
