"""Cost of drawing users evenly, compared with users who are drawn like real shoppers: few of them often.

    python -m tests.bench.skew [--events 1000000 --users 40000 --runs 7]

A worker with the constant scorer processes a backlog of each kind in turn. Skewed means weight 1 / rank**0.9. If users
are drawn evenly, fewer events of a step belong to the same user, so that more users are scored, written and published
for as many events.
"""
import argparse

from tests.bench.figures import Report, main, parser, say
from tests.bench.live import broker, make_topics, shop, wait_balanced
from tests.bench.load import Shoppers, Templates, drain_s

SKEW = 0.9


def bench(options: argparse.Namespace) -> int:
    report = Report('skew', options)
    rates: dict[str, list[float]] = {'skewed': [], 'even': []}
    for run in range(options.runs):
        for name, skew in (('skewed', SKEW), ('even', 0.0)):
            with broker() as (brokers, folder), \
                    shop(brokers, folder, options, publish='all', session_timeout_ms=120_000) as of:
                make_topics(of)
                templates = Templates(of, Shoppers(options.users, of.partitions), each=8, skew=skew)
                worker = of.worker()
                wait_balanced([worker], of.partitions)
                drain_s(of, [worker], templates, options.warm_events)
                events, seconds, _ = drain_s(of, [worker], templates, options.events)
                rates[name].append(events / seconds)
                say(f'run {run + 1}, {name}: {events / seconds:,.0f} events/s')
    for name, values in rates.items():
        report.spread(f'{name}: rate', values, 'events/s')
    report.spread('even / skewed', [even / skewed for even, skewed in zip(rates['even'], rates['skewed'], strict=True)],
                  'x', at_least=0.5)
    return report.end()


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('--events', type=int, default=1_000_000)
    made.add_argument('--warm-events', type=int, default=200_000, help='before, so that users and caches are there')
    made.add_argument('--users', type=int, default=40_000)
    made.add_argument('--runs', type=int, default=7)
    main(bench, made.parse_args())
