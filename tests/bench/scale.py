"""A formula for sizing: the worker's CPU for a rate, partitions and users, fitted to a designed set of short runs.

    python -m tests.bench.scale [--seconds 10 --warm-s 3]

`DESIGN` varies partitions, users and `publish` so that each term of the model (sizing.py) shows by itself; each entry
gets all `RATES`, 0 among them. The fit minimizes relative errors. Its own error is that of runs left out one by one,
and that of `HELD_OUT`, which no fit saw: once with the steps that were measured there, and once from rate, partitions
and users alone. The scorer is the constant one, so a model's own CPU comes on top.
"""
import argparse
import asyncio
from collections.abc import Sequence

import numpy as np

from stream.config import Settings
from stream.core.layout import ROW_DTYPE
from stream.state.cache import OBJECT_BYTES
from tests.bench.figures import MIB, Report, main, parser, say, several
from tests.bench.live import disk_bytes, memory_mib, wait_done
from tests.bench.open_loop import SMOOTH_S
from tests.bench.sizing import TERMS, Load, Model, Run, relative
from tests.bench.steady import LATE_MS_MAX, restorable, used

RATES = (300, 1000, 3000, 0)      # an idle worker last: after its start, RocksDB still compacts
# (partitions, users, publish); 20 users have several events in a step, so that events and users scored differ.
DESIGN = ((8, 20_000, 'all'), (8, 20, 'all'), (8, 200_000, 'all'), (2, 20_000, 'changes'), (24, 20_000, 'all'),
          (24, 200_000, 'changes'), (2, 20, 'changes'))
HELD_OUT, HELD_OUT_RATES = (12, 60_000, 'all'), (600, 2000)
UNITS = {'base': ('of a core', 1.0), 'partition': ('of a core', 1.0)}
LEFT_OUT_MAX = HELD_OUT_MAX = 0.25


def runs_of(partitions: int, users: int, publish: str, rates: Sequence[int],
            options: argparse.Namespace) -> tuple[list[Run], dict[str, float]]:
    """One worker at one rate after another. Also bytes of memory and disk after that."""
    found, numbers = [], 0
    with restorable(options, users, options.window, partitions=partitions, publish=publish) as (of, shoppers, _):
        worker = of.worker()
        for number, rate in enumerate(rates):
            sent, use = asyncio.run(used(of, worker.process.pid, worker, shoppers, rate, options.warm_s,
                                         options.seconds, numbers=numbers, tick_s=SMOOTH_S, seed=number + 1))
            numbers += sent.events
            asyncio.run(wait_done(of))
            load = Load(rate, partitions, users, publish != 'changes')
            found.append(Run(load, use.core, use.steps, use.rows))
            late = float(np.percentile(sent.late_ms, 99)) if sent.late_ms else 0.0
            say(f'{partitions} partitions, {users:,} users, {publish}, {rate:,} events/s: {use.core:.3f} of a core, '
                f'{use.steps:,.0f} steps/s, {use.rows:,.0f} users/s'
                + (f'; the loop was {late:.0f} ms late' if late > LATE_MS_MAX else ''))
        rest = {'memory': memory_mib(worker) * MIB, 'disk': disk_bytes(of.folder / 'state')}
        assert worker.stop() == 0, worker.said()[-3000:]
    return found, rest


def bench(options: argparse.Namespace) -> int:
    report = Report('scale', options)
    runs, rest = [], {}
    for partitions, users, publish in DESIGN:
        found, rest[partitions, users] = runs_of(partitions, users, publish, options.rates, options)
        runs += found
    cached = Settings.model_fields['users_cached_mib'].default * MIB / user_bytes(options.window)
    model = Model.of(runs, cached)
    for term, value, (low, high) in zip(TERMS, model.coefficients, model.interval.T, strict=True):
        unit, factor = UNITS.get(term, ('us', 1e6))
        report.add(f'{term} ({low * factor:.3g} .. {high * factor:.3g})', value * factor, unit)
    errors = np.abs(model.left_out)
    report.add('relative error of runs left out: median', float(np.median(errors)), '1', at_most=LEFT_OUT_MAX)
    report.add('relative error of runs left out: largest', float(errors.max()), '1')
    held, _ = runs_of(*HELD_OUT, HELD_OUT_RATES, options)
    for run in held:
        name, core = f'{HELD_OUT[0]} partitions, {HELD_OUT[1]:,} users, {run.load.rate:,} events/s', np.array(run.core)
        report.add(f'{name}, not fitted: measured', run.core, 'of a core')
        report.add(f'{name}, not fitted: error with its steps',
                   float(relative(np.array(model.cores(run.load, run.steps, run.rows)), core)), '1')
        error = float(abs(relative(np.array(model.cores(run.load)), core)))
        report.add(f'{name}, not fitted: error of the formula', error, '1', at_most=HELD_OUT_MAX)
    few, many, most = rest[8, 20], rest[8, 20_000], rest[8, 200_000]
    report.add('memory of a user in the cache', (many['memory'] - few['memory']) / 20_000, 'B')
    report.add('disk of a user', most['disk'] / 200_000, 'B')
    say(model.formula())
    return report.end()


def user_bytes(events: int) -> float:
    """What the cache counts for a user: the object, and a row and an id for each event."""
    return OBJECT_BYTES + events * (ROW_DTYPE.itemsize + 8)


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('--rates', type=several(int), default=','.join(map(str, RATES)),
                      help='events a second, separated by commas (default: %(default)s)')
    made.add_argument('--window', type=int, default=22,
                      help='events of each user at the beginning (default: %(default)s)')
    made.add_argument('--seconds', type=float, default=10, help='for each rate (default: %(default)s)')
    made.add_argument('--warm-s', type=float, default=3, help='seconds of load before that (default: %(default)s)')
    main(bench, made.parse_args())
