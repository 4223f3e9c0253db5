"""Does memory stay flat at full rate?

    python -m tests.bench.memory [--minutes 30 --users 5000]

The inputs are kept `--lag` events ahead of the worker, so that it always works at full rate. The users' windows are
full long before the first quarter ends. Resident memory is sampled every second. The median of the last quarter is
compared with that of the second. All topics are bounded (the changelog is compacted all the time), and so is the disk.
"""
import argparse
import asyncio
import statistics
import time

from tests.bench.figures import MIB, Report, main, parser, say
from tests.bench.live import Lag, broker, disk_bytes, make_topics, memory_mib, shop
from tests.bench.load import Shoppers, Templates, producing
from tests.integration.running import Shop, Worker

ROUNDS_IN_FLIGHT_MAX = 4
BOUNDED = {'segment.bytes': str(16 * MIB), 'retention.bytes': str(256 * MIB)}
COMPACTED = {'segment.bytes': str(16 * MIB), 'min.compaction.lag.ms': '0', 'min.cleanable.dirty.ratio': '0.2',
             'max.compaction.lag.ms': '60000'}
# Its cleaner looks every second, not every fifteen.
BROKER = {'log.cleaner.backoff.ms': '1000', 'log.retention.check.interval.ms': '5000',
          'log.segment.delete.delay.ms': '5000'}


async def play(of: Shop, worker: Worker, templates: Templates, options: argparse.Namespace) -> list[float]:
    """Keep the worker busy for so long. Returns its memory in MiB, one sample per second."""
    samples: list[float] = []
    until = time.monotonic() + options.minutes * 60
    sent = done = 0

    async def sample() -> None:
        while True:
            samples.append(memory_mib(worker))
            await asyncio.sleep(1.0)

    async with producing(of.brokers) as producer, Lag(of) as lag:
        sampling = asyncio.create_task(sample())
        try:
            told = time.monotonic()
            while time.monotonic() < until:
                worker.check()
                left = await lag.events()
                done = sent - left
                sends = []
                for _ in range((options.lag - left) // templates.round_events + 1 if left < options.lag else 0):
                    for topic, partition, batch in templates.round(int(time.time() * 1000)):
                        sends.append(await producer.send_batch(batch, topic, partition=partition))
                        sent += batch.record_count()
                    if len(sends) > ROUNDS_IN_FLIGHT_MAX * of.partitions * 2:
                        await asyncio.gather(*sends)
                        sends.clear()
                await asyncio.gather(*sends)
                if time.monotonic() - told > 60:
                    told = time.monotonic()
                    say(f'    {done:,} events done, memory {samples[-1]:,.0f} MiB, broker '
                        f'{disk_bytes(of.folder / "kafka") / MIB:,.0f} MiB, state '
                        f'{disk_bytes(of.folder / "state") / MIB:,.0f} MiB on disk')
                await asyncio.sleep(0.1)
        finally:
            sampling.cancel()
    options.done = done
    return samples


def bench(options: argparse.Namespace) -> int:
    report = Report('memory', options)
    with broker(BROKER) as (brokers, folder), shop(brokers, folder, options) as of:
        make_topics(of, input=BOUNDED, alerts=BOUNDED, dead_letters=BOUNDED, changelog=COMPACTED)
        templates = Templates(of, Shoppers(options.users, of.partitions), each=8)
        worker = of.worker()
        samples = asyncio.run(play(of, worker, templates, options))
        quarter = len(samples) // 4
        second, last = samples[quarter:2 * quarter], samples[3 * quarter:]
        report.add('events', options.done, 'events')
        report.add('rate', options.done / (options.minutes * 60), 'events/s')
        report.add('deleted before they were read', worker.metric('stream_events_lost_total'), 'events', at_most=0)
        report.add('memory, median of the second quarter', statistics.median(second), 'MiB')
        report.add('memory, median of the last quarter', statistics.median(last), 'MiB')
        report.add('peak memory', memory_mib(worker, 'VmHWM'), 'MiB')
        change = 100 * (statistics.median(last) / statistics.median(second) - 1)
        report.add('growth from the second to the last quarter', change, '%', at_most=5)
        assert worker.stop() == 0, worker.said()[-3000:]
    return report.end()


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('--minutes', type=float, default=30)
    made.add_argument('--users', type=int, default=5_000)
    made.add_argument('--lag', type=int, default=200_000, help='events that wait in the inputs')
    main(bench, made.parse_args())
