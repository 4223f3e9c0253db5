"""What a worker uses, and how long events wait for their outputs, at fixed rates.

    python -m tests.bench.rates [--scorers constant,embedded,triton --rates 100,500,1000,2000,2500 --seconds 30]

One worker for each scorer gets one rate after another; users are drawn evenly. Each event leaves at a moment of its
own: events that arrive in bursts fill the steps and so make them look cheap (`--tick-ms 20`). CPU and wake-ups
(voluntary context switches) are those of the worker's process, after the warm-up of each rate. Latency is the time from
an event's arrival in Kafka to its output, by the broker's clock. The last lines of a rate say what the sender took and
how late it was; where these miss their bounds, the figures above them say little.
"""
import argparse
import asyncio

from tests.bench.figures import Report, main, parser, say, several
from tests.bench.live import memory_mib, output_topics, wait_done
from tests.bench.open_loop import Sent, read_outputs
from tests.bench.steady import Use, add_load_options, percentiles, restorable, sender, used, waited_ms

CORE_MAX: dict[tuple[str, float], float] = {('constant', 100): 0.08, ('constant', 500): 0.17, ('constant', 2000): 0.35}
LATENCY_MS_MAX: dict[tuple[str, float], tuple[float, float, float]] = {
    ('triton', 500): (20, 45, 90), ('triton', 1000): (25, 60, 120), ('embedded', 1000): (12, 35, 60)}
STEP_MS_MAX, STEP_ROWS = 0.6, 2.0


def with_scorer(scorer: str, options: argparse.Namespace, report: Report) -> None:
    """All rates with one worker."""
    rates: list[float] = options.rates
    found: dict[float, tuple[Sent, Use]] = {}
    with restorable(options, options.users, options.window, scorer) as (of, shoppers, _):
        worker = of.worker()
        numbers = 0
        for number, rate in enumerate(rates):
            sent, use = asyncio.run(used(of, worker.process.pid, worker, shoppers, rate, options.warm_s,
                                         options.seconds, numbers=numbers, tick_s=options.tick_ms / 1000,
                                         seed=2 + number))
            numbers += sent.events
            found[rate] = sent, use
            asyncio.run(wait_done(of))
            say(f'{scorer}, {rate:,.0f} events/s: {use.core:.3f} of a core, {use.wake_ups:,.0f} wake-ups/s, '
                f'{use.steps:,.0f} steps/s of {use.rows_a_step:.2f} windows')
        peak = memory_mib(worker, 'VmHWM')
        assert worker.metric('stream_dead_letters_total') == 0
        assert worker.stop() == 0, worker.said()[-3000:]
        outputs = read_outputs(of, output_topics(of))
    nearest = min(rates, key=lambda rate: abs(found[rate][1].rows_a_step - STEP_ROWS))
    for rate, (sent, use) in found.items():
        name = f'{scorer}, {rate:,.0f} events/s'
        report.add(f"{name}: the worker's share of a core", use.core, '1', at_most=CORE_MAX.get((scorer, rate)))
        report.add(f'{name}: wake-ups per second', use.wake_ups, '1/s')
        report.add(f'{name}: steps per second', use.steps, '1/s')
        report.add(f'{name}: windows scored per step', use.rows_a_step, '1')
        # The target is for steps of about two windows, and a scorer that takes no time.
        aimed = scorer == 'constant' and rate == nearest and abs(use.rows_a_step - STEP_ROWS) < 1
        report.add(f'{name}: CPU per step', use.cpu_ms_a_step, 'ms', at_most=STEP_MS_MAX if aimed else None)
        percentiles(report, f'{name}: event to output', waited_ms(sent, outputs, options.warm_s),
                    *LATENCY_MS_MAX.get((scorer, rate), ()))
        sender(report, name, sent, options.warm_s + options.seconds)
    report.add(f'{scorer}: peak memory', peak, 'MiB')


def bench(options: argparse.Namespace) -> int:
    report = Report('rates', options)
    for scorer in options.scorers:
        with_scorer(scorer, options, report)
    return report.end()


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('--scorers', type=several(str, ('constant', 'embedded', 'triton')),
                      default='constant,embedded,triton', help='separated by commas (default: all three)')
    made.add_argument('--rates', type=several(float), default='100,500,1000,2000,2500',
                      help='events a second, separated by commas (default: %(default)s)')
    add_load_options(made, seconds=30, warm_s=5)
    main(bench, made.parse_args())
