"""One user has half of the traffic: do the others wait longer?

    python -m tests.bench.hot_user [--rate 1000 --share 0.5 --seconds 30 --runs 3]

The others send the same events a second in both runs of a pair; in one of them the hot user's come on top. The hot
user's partition holds other users too, who wait behind its events. Latency is the time from an event to its output, by
the broker's clock, with the constant scorer.
"""
import argparse
import asyncio

import numpy as np

from tests.bench.figures import Report, main, parser, say
from tests.bench.live import output_topics, wait_done
from tests.bench.open_loop import read_outputs
from tests.bench.steady import LATE_MS_MAX, add_load_options, restorable, used, waited_ms

RATIO_MAX = 1.5


def waits_ms(hot: bool, options: argparse.Namespace, seed: int) -> tuple[dict[str, np.ndarray], float]:
    """Latencies of the other users, of those in the hot user's partition, and of that user; the worker's core share."""
    others = options.rate * (1 - options.share)
    with restorable(options, options.users, options.window) as (of, shoppers, _):
        worker = of.worker()
        sent, use = asyncio.run(used(of, worker.process.pid, worker, shoppers, options.rate if hot else others,
                                     options.warm_s, options.seconds, tick_s=options.tick_ms / 1000, seed=seed,
                                     hot_share=options.share if hot else 0.0))
        asyncio.run(wait_done(of))
        assert worker.stop() == 0, worker.said()[-3000:]
        late = float(np.percentile(sent.late_ms, 99))
        if late > LATE_MS_MAX:
            say(f'    the loop itself was {late:.0f} ms late (p99): this run says little')
        outputs, user = read_outputs(of, output_topics(of)), shoppers.ids[0]
        partition = int(shoppers.partition_of[0])
        found = {'others': waited_ms(sent, outputs, options.warm_s, user.__ne__)}
        beside = sent.only(lambda batch: batch.partition == partition)
        found['others of its partition'] = waited_ms(beside, outputs, options.warm_s, user.__ne__)
        if hot:
            found['the hot user'] = waited_ms(sent, outputs, options.warm_s, user.__eq__)
        return found, use.core


def bench(options: argparse.Namespace) -> int:
    report = Report('hot_user', options)
    p99: dict[tuple[bool, str], list[float]] = {}
    for run in range(options.runs):
        for hot in ((False, True) if run % 2 == 0 else (True, False)):
            found, core = waits_ms(hot, options, seed=2 + run)
            say(f'run {run + 1}, {"with" if hot else "without"} the hot user: {core:.2f} of a core, p99 ' + ', '.join(
                f'{who} {np.percentile(values, 99):.0f} ms' for who, values in found.items()))
            for who, values in found.items():
                p99.setdefault((hot, who), []).append(float(np.percentile(values, 99)))
    for (hot, who), values in p99.items():
        report.spread(f'{"with" if hot else "without"} the hot user: {who}, p99', values, 'ms')
    for who, target in (('others', {'at_most': RATIO_MAX}), ('others of its partition', {})):
        report.spread(f'{who}: p99 with / without the hot user',
                      [with_ / without for with_, without in zip(p99[True, who], p99[False, who], strict=True)],
                      'x', **target)
    return report.end()


if __name__ == '__main__':
    def share(text: str) -> float:
        if not 0 < (value := float(text)) < 1:
            raise argparse.ArgumentTypeError(f'{text} is not between 0 and 1')
        return value

    made = parser(__doc__)
    made.add_argument('--rate', type=float, default=1_000,
                      help='events a second, the hot user included (default: %(default)s)')
    made.add_argument('--share', type=share, default=0.5,
                      help="the hot user's share of the events, between 0 and 1 (default: %(default)s)")
    made.add_argument('--runs', type=int, default=3, help='with and without the hot user (default: %(default)s)')
    add_load_options(made, seconds=30, warm_s=5)
    main(bench, made.parse_args())
