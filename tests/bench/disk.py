"""Bytes on disk per user with a full window, after every user was rewritten several times.

    python -m tests.bench.disk [--users 50000 --updates 20]

Each user has a window of 128 simulated events with random ids, hashes and times. The worker restores the users from its
changelog. Then it folds live events that touch each user `updates` times on average, so that RocksDB holds old and new
versions, as it does after months. Then the worker is stopped. Everything below `users-N` counts, in blocks of the file
system.
"""
import argparse
import statistics
import time
from pathlib import Path

from stream.state.store import Memory, PartitionStore
from tests.bench.changelog import Pool, fill_changelog
from tests.bench.figures import MIB, Report, main, parser, say
from tests.bench.live import broker, cpu_s, disk_bytes, make_topics, memory_mib, shop
from tests.bench.load import Shoppers, Templates, drain_s

WINDOW = 128


def bench(options: argparse.Namespace) -> int:
    report = Report('disk', options)
    with broker() as (brokers, folder), shop(brokers, folder, options, session_timeout_ms=120_000) as of:
        make_topics(of)
        pool, shoppers = Pool(WINDOW), Shoppers(options.users, of.partitions)
        fill_changelog(of, shoppers, pool, options.users, step_users=150)
        state = Path(of.settings['state_dir'])
        worker = of.worker()
        say(f'{options.users:,} users restored, {disk_bytes(state) / MIB:,.0f} MiB on disk')
        began = time.monotonic()
        templates = Templates(of, shoppers, each=12)
        events, seconds, cpu = drain_s(of, [worker], templates, options.users * options.updates)
        say(f'{events:,} events folded in {seconds:.1f} s ({time.monotonic() - began:.1f} s including producing them)')
        running = disk_bytes(state)
        peak, whole = memory_mib(worker, 'VmHWM'), cpu_s(worker)
        assert worker.stop() == 0, worker.said()[-3000:]
        folders = sorted(state.glob('users-*'))
        stopped = sum(map(disk_bytes, folders))
        lengths, windows = [], []
        for directory in folders:
            store = PartitionStore(directory, Memory(16, 16))
            for key, record in store._db.items():       # the records as they are
                if key < b'\xff':
                    lengths.append(len(record))
                    windows.append(int.from_bytes(record[2:4], 'little'))
            store.close()
        assert len(lengths) == options.users and min(windows) == WINDOW, 'not every user has a full window'
        say('    ' + ', '.join(f'{kind or "no suffix"} {size / MIB:,.0f} MiB' for kind, size in _by_kind(folders)))
        report.add('bytes per record', statistics.fmean(lengths), 'B')
        report.add('bytes on disk per user, running', running / options.users, 'B')
        report.add('bytes on disk per user, stopped', stopped / options.users, 'B', at_most=4_500)
        report.add('bytes on disk per byte of a record', stopped / sum(lengths), '1')
        report.add('event rate during the updates', events / seconds, 'events/s')
        report.add('CPU per million events during the updates', cpu / events * 1e6, 's')
        report.add('CPU of the whole process', whole, 's')
        report.add('peak memory', peak, 'MiB')
    return report.end()


def _by_kind(folders: list[Path]) -> list[tuple[str, int]]:
    """Bytes by the files' suffixes, the largest first."""
    sizes: dict[str, int] = {}
    for directory in folders:
        for path in directory.iterdir():
            sizes[path.suffix] = sizes.get(path.suffix, 0) + path.stat().st_blocks * 512
    return sorted(sizes.items(), key=lambda entry: -entry[1])


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('--users', type=int, default=50_000)
    made.add_argument('--updates', type=int, default=20, help='events per user after the window is full')
    main(bench, made.parse_args())
