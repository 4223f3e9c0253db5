"""How long partitions have no output while one of two workers is restarted, as in a rolling restart.

    python -m tests.bench.restart [--rate 10 --users 20000 --steady-s 10]

A producer sends events to every topic partition all the time. With `publish = all` each step gives an output. One
worker gets SIGTERM and is started again as soon as it has ended. For each partition the bench takes the longest time
between two outputs, by the broker's time of appending, from the signal until both workers have run for a while; and the
same before the signal. It does so with and without static membership (`instance_id`), and with and without standbys.
"""
import argparse
import asyncio
import time
from typing import Any

from tests.bench.changelog import Pool, fill_changelog
from tests.bench.figures import Report, main, parser, say
from tests.bench.live import APPEND_TIME, broker, make_topics, output_topics, shop, wait_balanced, wait_done
from tests.bench.load import Shoppers
from tests.bench.open_loop import drive, read_outputs
from tests.integration.running import Shop, Worker

# name, settings of both workers, whether each has an instance_id
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    'dynamic': ({}, False),
    'static': ({}, True),
    'dynamic, 1 standby': ({'standbys': 1}, False),
    'static, 1 standby': ({'standbys': 1}, True),
}


def longest_gaps_s(times_ms: list[list[int]], from_ms: float, to_ms: float) -> list[float]:
    """For each partition, the longest time between neighbours that lies at least partly in [from_ms, to_ms]."""
    gaps = []
    for times in times_ms:
        inside = [at for at in times if at <= to_ms]
        gaps.append(max((after - before for before, after in zip(inside, [*inside[1:], to_ms], strict=True)
                         if after > from_ms), default=to_ms - from_ms) / 1000)
    return gaps


def settings_of(of: Shop, number: int, static: bool) -> dict[str, Any]:
    """Of one of the two workers: each has a folder of its own, and keeps it when it is started again."""
    return {'state_dir': str(of.folder / f'state-{number}')} | ({'instance_id': f'worker-{number}'} if static else {})


async def play(of: Shop, shoppers: Shoppers, static: bool, options: argparse.Namespace) -> list[tuple[str, float]]:
    """Two workers and one restart under load. Returns the time of each step, in Unix ms."""
    marks: list[tuple[str, float]] = []

    def mark(what: str) -> None:
        marks.append((what, time.time() * 1000))

    def start(number: int) -> Worker:
        return of.worker(ready=False, **settings_of(of, number, static))

    both = [start(0), start(1)]
    await asyncio.to_thread(wait_balanced, both, of.partitions)
    seconds = options.steady_s * 2 + options.restart_s
    load = asyncio.create_task(drive(of, shoppers, options.rate, seconds, each_partition=True))
    await asyncio.sleep(2.0)        # the first outputs of all partitions
    mark('load')
    await asyncio.sleep(options.steady_s)
    mark('SIGTERM')
    assert await asyncio.to_thread(both[0].stop) == 0, both[0].said()[-3000:]
    mark('ended')
    both[0] = start(0)
    await asyncio.to_thread(wait_balanced, both, of.partitions)
    mark('balanced again')
    assert not load.done(), 'the restart took longer than the load: raise --restart-s'
    await load
    mark('end of load')
    await wait_done(of, 60.0)
    for worker in both:
        assert worker.stop() == 0, worker.said()[-3000:]
    return marks


def bench(options: argparse.Namespace) -> int:
    report = Report('restart', options)
    pool = Pool(22)
    for way in options.ways.split(';'):
        more, static = WAYS[way]
        with broker() as (brokers, folder), shop(brokers, folder, options, publish='all', **more) as of:
            make_topics(of, input=APPEND_TIME, alerts=APPEND_TIME, scores=APPEND_TIME)
            shoppers = Shoppers(options.users, of.partitions)
            fill_changelog(of, shoppers, pool, options.users)
            marks = asyncio.run(play(of, shoppers, static, options))
            at = dict(marks)
            say(f'{way}: ' + ', '.join(f'{what} {(when - at["SIGTERM"]) / 1000:+.1f} s' for what, when in marks))
            times: list[list[int]] = [[] for _ in range(of.partitions)]
            for output in read_outputs(of, output_topics(of)):
                times[output.partition].append(output.at_ms)
            times = [sorted(run) for run in times]
            before = longest_gaps_s(times, at['load'], at['SIGTERM'])
            during = longest_gaps_s(times, at['SIGTERM'], at['end of load'])
            say('    gaps by partition, s: ' + ' '.join(f'{gap:.2f}' for gap in during))
            report.add(f'{way}: longest time without output of a partition, before', max(before), 's')
            report.add(f'{way}: longest time without output of a partition, restarting', max(during), 's', at_most=3)
    return report.end()


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('--ways', default=';'.join(WAYS), help='which of them, by semicolons')
    made.add_argument('--rate', type=float, default=10, help='events a second on each topic partition')
    made.add_argument('--users', type=int, default=20_000, help='in the state before the first event')
    made.add_argument('--steady-s', type=float, default=10, help='of load before the restart')
    made.add_argument('--restart-s', type=float, default=30, help='of load from the signal on')
    main(bench, made.parse_args())
