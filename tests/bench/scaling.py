"""Cost of an event with 1, 2 and 4 workers: seconds of CPU of all workers per million events.

    python -m tests.bench.scaling [--events 1000000 --users 20000 --runs 3]
    python -m tests.bench.scaling --workers 1,4 --events 400000 --runs 9

The scorer is the constant one, so that the pipeline is measured. The workers own all partitions and are stopped
(SIGSTOP) while the same backlog is written to the inputs. CPU counts from when they continue until everything is
committed. One run differs from the next by more than the effect. So neighbouring runs are compared, in turn first and
last, and the interval is that of the median of the pairs (bootstrap, 95 %). If the machine has fewer cores than
workers, the rate says little. The cost says what each event would cost with one machine per worker.
"""
import argparse

from tests.bench.figures import Report, main, parser, say, several
from tests.bench.live import broker, make_topics, shop, wait_balanced
from tests.bench.load import Shoppers, Templates, drain_s
from tests.bench.sizing import median_interval


def bench(options: argparse.Namespace) -> int:
    report = Report('scaling', options)
    counts: list[int] = options.workers
    costs: dict[int, list[float]] = {count: [] for count in counts}
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for run in range(options.runs):
        for count in counts if run % 2 == 0 else reversed(counts):
            with broker() as (brokers, folder), \
                    shop(brokers, folder, options, session_timeout_ms=120_000) as of:
                make_topics(of)
                shoppers = Shoppers(options.users, of.partitions)
                templates = Templates(of, shoppers)
                workers = [of.worker(ready=False, state_dir=str(folder / f'state-{number}')) for number in range(count)]
                wait_balanced(workers, of.partitions)
                drain_s(of, workers, templates, options.warm_events)
                events, seconds, cpu = drain_s(of, workers, templates, options.events)
                assert sum(worker.metric('stream_dead_letters_total') for worker in workers) == 0
                costs[count].append(cpu / events * 1e6)
                rates[count].append(events / seconds)
                say(f'run {run + 1}, {count} workers: {events:,} events in {seconds:.1f} s, '
                    f'{costs[count][-1]:.1f} s of CPU per million')
    for count in counts:
        report.spread(f'{count} workers: rate on this machine', rates[count], 'events/s')
        report.spread(f'{count} workers: CPU per million events', costs[count], 's')
    for count in counts[1:]:
        growth = [100 * (more / one - 1) for one, more in zip(costs[counts[0]], costs[count], strict=True)]
        report.spread(f'{count} workers: additional cost per event over {counts[0]}', growth, '%', at_most=10)
        low, high = median_interval(growth)
        report.add(f'{count} workers: lower end of the 95 % interval of that', low, '%')
        report.add(f'{count} workers: upper end of the 95 % interval of that', high, '%')
    return report.end()


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('--workers', type=several(int, range(1, 9)), default='1,2,4',
                      help='numbers of workers, separated by commas (default: %(default)s)')
    made.add_argument('--events', type=int, default=1_000_000)
    made.add_argument('--warm-events', type=int, default=100_000, help='before, so that users and caches are there')
    made.add_argument('--users', type=int, default=20_000)
    made.add_argument('--runs', type=int, default=3)
    main(bench, made.parse_args())
