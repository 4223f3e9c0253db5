"""Latency from an event to its output, by the broker's clock, at half of the worker's highest rate.

    python -m tests.bench.latency --scorer constant|embedded|triton [--seconds 60 --warm-s 10 --users 100000]

1. Highest rate: the worker processes a backlog; events per second until the last commit (`--rate` skips this).
2. An open loop sends at half of that rate, evenly over users and so over partitions. It never waits for the worker, so
   a worker that falls behind shows a growing latency. The loop's own delay is printed too.
3. With `publish = all` each scored user gives an output that names the offsets folded so far. The latency of an event
   is the time until the first output of its user that covers it.

With Triton, the same requests are also sent to Triton directly: as many rows, at the same moments, with the windows
that the worker had at the end, by the same client library. The difference of the two p99 is what the worker adds.
"""
import argparse
import asyncio
import time
from itertools import groupby
from typing import Any

import numpy as np

from stream.core.features import Batch, Snapshots, batches, features
from stream.core.scores import OUTPUT_NAMES
from stream.core.user import User, pack_header
from tests.bench.figures import Report, main, parser, say
from tests.bench.live import memory_mib, output_topics, wait_done
from tests.bench.load import Shoppers, Templates, drain_s
from tests.bench.open_loop import BURST_S, Output, Sent, read_outputs
from tests.bench.steady import add_load_options, percentiles, restorable, sender, used, waited_ms
from tests.integration.running import Shop

BACKLOG = {'constant': 200_000, 'embedded': 20_000, 'triton': 20_000}
ROWS_MAX = 256


def steps_of(outputs: list[Output], from_ms: float) -> list[tuple[int, int]]:
    """(ms, rows) of each step: outputs of one step are appended together, so neighbours of one time are one step."""
    scores = [output for output in outputs if output.at_ms >= from_ms]
    return sorted((at_ms, len(list(run))) for (_, at_ms), run
                  in groupby(scores, key=lambda output: (output.partition, output.at_ms)))


async def triton_alone_ms(address: str, steps: list[tuple[int, int]], users: list[User]) -> np.ndarray:
    """Milliseconds of the same requests, sent at the same moments whether earlier ones are answered or not."""
    from tritonclient.grpc import InferInput, InferRequestedOutput
    from tritonclient.grpc.aio import InferenceServerClient
    kinds = {'categories': 'INT32', 'numbers': 'FP32', 'counters': 'FP32', 'row_id': 'INT64'}
    outputs = [InferRequestedOutput(name) for name in OUTPUT_NAMES]
    rng, taken = np.random.default_rng(1), []

    def inputs(batch: Batch) -> list[Any]:
        return [InferInput(name, getattr(batch, name).shape, kind).set_data_from_numpy(getattr(batch, name))
                for name, kind in kinds.items()]

    async def ask(client: InferenceServerClient, whose: list[User]) -> None:
        inputs_of = features(Snapshots.join(
            [pack_header(user) for user in whose], [user.days for user in whose], [user.rows for user in whose],
            [user.last_seen_ms for user in whose]))
        requests = [inputs(batch) for batch in batches(inputs_of, ROWS_MAX)]
        began = time.perf_counter()
        await asyncio.gather(*(client.infer('shopper', request, '1', outputs) for request in requests))
        taken.append((time.perf_counter() - began) * 1000)

    async with InferenceServerClient(address) as client:
        await ask(client, users[:8])
        taken.clear()
        tasks, began = [], time.monotonic()
        for at_ms, rows in steps:
            await asyncio.sleep(max(began + (at_ms - steps[0][0]) / 1000 - time.monotonic(), 0))
            drawn = rng.integers(0, len(users), rows)
            tasks.append(asyncio.create_task(ask(client, [users[index] for index in drawn])))
        await asyncio.gather(*tasks)
    return np.array(taken)


def measure(of: Shop, shoppers: Shoppers, options: argparse.Namespace, report: Report) -> tuple[Sent, list[Output]]:
    """Find the highest rate, then run the open loop at half of it. Returns what was sent and what came out."""
    worker = of.worker()
    rate, numbers = options.rate, 0
    if not rate:
        templates = Templates(of, shoppers, each=8)
        drain_s(of, [worker], templates, max(options.backlog // 5, 1))
        events, seconds, _ = drain_s(of, [worker], templates, options.backlog)
        numbers = templates.numbers
        report.add('highest rate', events / seconds, 'events/s')
        rate = events / seconds * options.share
    sent, use = asyncio.run(used(of, worker.process.pid, worker, shoppers, rate, options.warm_s, options.seconds,
                                 numbers=numbers, tick_s=options.tick_ms / 1000, seed=2))
    asyncio.run(wait_done(of))
    lasted = options.warm_s + options.seconds
    report.add('rate', sent.events / lasted, 'events/s')
    sender(report, 'open loop', sent, lasted)
    report.add("the worker's share of a core", use.core, '1')
    report.add('steps per second', use.steps, '1/s')
    report.add('windows scored per step', use.rows_a_step, '1')
    report.add('peak memory', memory_mib(worker, 'VmHWM'), 'MiB')
    say('    stages, mean ms per step: ' + ', '.join(_stages(worker)))
    assert worker.metric('stream_dead_letters_total') == 0
    assert worker.stop() == 0, worker.said()[-3000:]
    first_ms = sent.first_ms
    return sent, [output for output in read_outputs(of, output_topics(of)) if output.at_ms >= first_ms]


def _stages(worker: Any) -> list[str]:
    import urllib.request
    with urllib.request.urlopen(worker.url + '/metrics', timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    sums = {line.split('"')[1]: float(line.rpartition(' ')[2]) for line in lines
            if line.startswith('stream_stage_seconds_sum')}
    counts = {line.split('"')[1]: float(line.rpartition(' ')[2]) for line in lines
              if line.startswith('stream_stage_seconds_count')}
    return [f'{stage} {sums[stage] / max(counts[stage], 1) * 1000:.1f}' for stage in sums]


def bench(options: argparse.Namespace) -> int:
    report = Report('latency', options)
    with restorable(options, options.users, options.window, options.scorer) as (of, shoppers, address):
        sent, outputs = measure(of, shoppers, options, report)
        p99 = percentiles(report, 'event to output', waited_ms(sent, outputs, options.warm_s), p99_at_most=150)
        alerts = [output for output in outputs if output.topic == of.settings['alerts_topic']]
        report.add('decisions per 1,000 events, including the warm-up', 1000 * len(alerts) / sent.events, '1')
        if alerts:
            percentiles(report, f'event to decision, {len(alerts):,} decisions', decisions_ms(sent, alerts))
        if address:
            from_ms = sent.first_ms + options.warm_s * 1000
            steps = steps_of([output for output in outputs if output.topic == of.settings['scores_topic']], from_ms)
            users = list(of.users().values())[:20_000]
            alone = percentiles(report, "Triton's alone", asyncio.run(triton_alone_ms(address, steps, users)))
            report.add("event to output, p99, relative to Triton's alone", p99 / alone, '1', at_most=3)
    return report.end()


def decisions_ms(sent: Sent, alerts: list[Output]) -> np.ndarray:
    """For each decision of events, from the appending of the newest event that it names to its own."""
    at_ms = [{}, {}]
    for source, partition, offset, when, users, _ in sent.batches:
        for place in range(len(users)):
            at_ms[source][partition, offset + place + 1] = when
    found = []
    for output in alerts:
        times = [at_ms[source].get((output.partition, upto), 0) for source, upto
                 in ((0, output.clicks), (1, output.carts))]
        if max(times) and not output.timer:
            found.append(output.at_ms - max(times))
    return np.array(found or [0.0])


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('--scorer', choices=('constant', 'embedded', 'triton'), default='constant')
    add_load_options(made, tick_ms=BURST_S * 1000)
    made.add_argument('--backlog', type=int, default=0, help='events whose working off shows the highest rate; 0: by '
                      'scorer')
    made.add_argument('--share', type=float, default=0.5, help='of the highest rate')
    made.add_argument('--rate', type=float, default=0, help='events a second; 0: a share of the highest rate')
    given = made.parse_args()
    given.backlog = given.backlog or BACKLOG[given.scorer]
    main(bench, given)
