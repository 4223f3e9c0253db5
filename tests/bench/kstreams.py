"""Our worker and Kafka Streams at fixed rates: latency, and CPU of the process once it is warm.

    python -m tests.bench.kstreams FOLDER [--rates 1,100,500,2000 --triton-rates 500,1000 --seconds 20 --runs 3]

FOLDER is the peers' harness. Its Kafka Streams peer is copied to build/bench and compiled there together with
java/Steady.java, which keeps it up at low rates and can ask Triton; that file says what it does and what it leaves out.
Both systems get the same events on the same topics, from a new broker in each run, in turn.

    window   the harness's job: Processor API, one thread, record cache, commit each second, one small message for each
             event. Ours scores with constants and sends its full message (`publish = all`). `default`: as in the
             harness, where Kafka Streams' producer waits 100 ms for more; `quick`: it waits for nothing
    triton   each event's window is scored by the shipped model on a real Triton, and the full message is sent. `async`
             joins the rows that wait into one request, with up to 16 requests unanswered, as ours; `async-4`: up to
             4; `async-2t` has two threads. `sync` asks for one record after another, which Triton answers 100 to 400
             times a second

Kafka Streams answers each event; ours answers each user of a step, so that events of one user may share an answer.

A system is first driven for `--warm-s` at `--warm-rate`, which compiles its code, and then at each rate. A rate's first
`--settle-s` do not count. At 1 event/s, p99 is that of a few dozen events.
"""
import argparse
import asyncio
import contextlib
import os
import shutil
import statistics
import subprocess
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from deploy.local.parts import SHIPPED
from stream.core.features import COUNTERS
from stream.core.scores import OUTPUT_NAMES
from stream.scoring.artefact import load_artefact
from tests.bench.figures import ROOT, Report, harness, main, parser, say, several
from tests.bench.live import output_topics, wait_done
from tests.bench.load import Shoppers
from tests.bench.open_loop import Sent, read_outputs, records_of
from tests.bench.steady import add_load_options, restorable, sender, used, waited_ms
from tests.integration.running import DEADLINE_S, Shop

OURS = 'stream'
TOPICS = {'clicks_topic': 'bench.clicks', 'carts_topic': 'bench.carts', 'scores_topic': 'bench.updates'}
GRPC = '1.85.1'
FIGURES = {'p50': 0.5, 'p99': 0.5, 'core': 1e-6}      # the least value in a ratio: times have a resolution of 1 ms
VARIANTS: dict[str, dict[str, dict[str, str]]] = {
    'window': {'default': {'LINGER_MS': '100'}, 'quick': {'LINGER_MS': '0'}},
    'triton': {'async': {'LINGER_MS': '0', 'POLL_MS': '1'},
               'async-2t': {'LINGER_MS': '0', 'POLL_MS': '1', 'THREADS': '2'},
               'async-4': {'LINGER_MS': '0', 'POLL_MS': '1', 'IN_FLIGHT': '4'},
               'sync': {'LINGER_MS': '0', 'MODE': 'sync'},
               'sync-2t': {'LINGER_MS': '0', 'MODE': 'sync', 'THREADS': '2'}},
}


def built(folder: Path) -> Path:
    """The folder of the jars; made once for each version of the sources."""
    copy, ours = ROOT / 'build' / 'bench' / 'kstreams', ROOT / 'tests' / 'bench' / 'java'
    ready, target = copy / 'ready', copy / 'target'
    sources = [path for of in (folder / 'kstreams', ours) for path in of.rglob('*') if 'target' not in path.parts]
    if ready.exists() and ready.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return target
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / 'kstreams', copy, ignore=shutil.ignore_patterns('target'), copy_function=shutil.copyfile)
    for path in ours.glob('*.java'):
        shutil.copyfile(path, copy / 'src' / 'main' / 'java' / 'bench' / path.name)
    pom = copy / 'pom.xml'
    more = ''.join(f'<dependency><groupId>io.grpc</groupId><artifactId>{name}</artifactId><version>{GRPC}</version>'
                   '</dependency>' for name in ('grpc-netty-shaded', 'grpc-stub'))
    text = pom.read_text()
    assert text.count('<dependencies>') == 1, f'{pom} has no single list of dependencies'
    pom.write_text(text.replace('<dependencies>', f'<dependencies>{more}'))
    subprocess.run(['mvn', '-q', '-B', '-f', pom, 'package'], check=True)
    ready.touch()
    return target


@contextlib.contextmanager
def kafka_streams(target: Path, of: Shop, job: str, variant: str, address: str, window: int) -> Iterator[int]:
    """A running Kafka Streams application; its process id. It is stopped at the end."""
    model = load_artefact(SHIPPED).info
    environment = {
        'APP_ID': of.name, 'KAFKA': of.brokers, 'STATE_DIR': str(of.folder / 'kstreams'), 'JOB': job,
        'TRITON': address, 'MODEL': model.name, 'VERSION': model.version, 'SHA256': model.sha256,
        'OUTPUTS': ','.join(OUTPUT_NAMES), 'COUNTERS': str(COUNTERS), 'WINDOW': str(window)} | VARIANTS[job][variant]
    log = of.folder / 'kstreams.log'
    with log.open('wb') as errors:
        process = subprocess.Popen(
            ['java', '-Xmx512m', '-Dorg.slf4j.simpleLogger.defaultLogLevel=error', '-cp',
             f'{target}/kstreams-peer.jar:{target}/lib/*', 'bench.Steady'],
            env=os.environ | environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    running = threading.Event()

    def listen() -> None:
        assert process.stdout
        for line in process.stdout:
            if '"running"' in line:
                running.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        assert running.wait(DEADLINE_S), f'Kafka Streams does not run:\n{log.read_text()[-3000:]}'
        yield process.pid
        assert process.poll() is None, f'Kafka Streams ended:\n{log.read_text()[-3000:]}'
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Update:
    """A small message of the harness's job: its user, the time of its event, and when it was appended."""

    user: bytes
    ts_ms: int
    at_ms: int


def read_updates(of: Shop) -> list[Update]:
    """All small messages, in the order of each partition."""
    async def read() -> list[Update]:
        return [Update(record.key, orjson.loads(record.value)['last_ts'], record.timestamp)
                async for record in records_of(of, TOPICS['scores_topic'])]
    return asyncio.run(read())


def update_latencies_ms(sent: Sent, updates: list[Update], skip_s: float) -> tuple[np.ndarray, int]:
    """Latency of each event: until the message that names its user and time. Also how many events have none.

    skip_s   events of so many first seconds do not count
    """
    waiting: dict[tuple[bytes, int], deque[int]] = defaultdict(deque)
    for batch in sorted(sent.batches, key=lambda batch: batch.at_ms):
        for user in batch.users:
            waiting[user, batch.ts_ms].append(batch.at_ms)
    from_ms, found = sent.first_ms + skip_s * 1000, []
    for update in updates:
        queue = waiting.get((update.user, update.ts_ms))
        if queue and (at_ms := queue.popleft()) >= from_ms:
            found.append(update.at_ms - at_ms)
    return np.array(found, float), sum(map(len, waiting.values()))


@dataclass
class Found:
    """Figures of one system at one rate, one entry for each run."""

    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    core: list[float] = field(default_factory=list)


def one_run(job: str, system: str, target: Path, options: argparse.Namespace, found: dict[tuple[str, float], Found],
            report: Report, seed: int) -> None:
    """One system at all rates of a job."""
    rates: list[float] = options.rates if job == 'window' else options.triton_rates
    scorer = 'triton' if job == 'triton' else 'constant'
    # The harness's job begins without users. The model needs windows, of as many events for both.
    with restorable(options, options.users, options.window if job == 'triton' and system == OURS else 0, scorer,
                    **TOPICS) as (of, shoppers, address), contextlib.ExitStack() as running:
        if system == OURS:
            worker = of.worker()
            pid = worker.process.pid
        else:
            worker = None
            pid = running.enter_context(kafka_streams(target, of, job, system, address, options.window))
        sents = asyncio.run(_drive(of, pid, shoppers, rates, options, seed, (job, system), found))
        if worker:
            assert worker.metric('stream_dead_letters_total') == 0
            assert worker.stop() == 0, worker.said()[-3000:]
        running.close()
        small = read_updates(of) if job == 'window' and system != OURS else []
        full = [] if small else read_outputs(of, output_topics(of))
    for rate, sent in zip(rates, sents, strict=True):
        if small:
            values, missing = update_latencies_ms(sent, small, options.settle_s)
            assert not missing, f'{missing:,} events have no output'
        else:
            values = waited_ms(sent, full, options.settle_s)
        to = found[system, rate]
        to.p50.append(float(np.percentile(values, 50)))
        to.p99.append(float(np.percentile(values, 99)))
        sender(report, f'{job}, {system}, {rate:,.0f} events/s', sent, options.settle_s + options.seconds)
        say(f'{job}, {system}, {rate:,.0f} events/s: p50 {to.p50[-1]:.0f}, p99 {to.p99[-1]:.0f} ms, '
            f'{to.core[-1]:.3f} of a core')


async def _drive(of: Shop, pid: int, shoppers: Shoppers, rates: list[float], options: argparse.Namespace, seed: int,
                 who: tuple[str, str], found: dict[tuple[str, float], Found]) -> list[Sent]:
    """Warm up, then each rate until all is committed. Adds the shares of a core."""
    how: dict[str, Any] = {'tick_s': options.tick_ms / 1000}
    sent, _ = await used(of, pid, None, shoppers, options.warm_rate, 0, options.warm_s, seed=1, **how)
    await wait_done(of)
    sents, numbers = [], sent.events
    for number, rate in enumerate(rates):
        sent, use = await used(of, pid, None, shoppers, rate, options.settle_s, options.seconds, numbers=numbers,
                               seed=seed + number, **how)
        numbers += sent.events
        found[who[1], rate].core.append(use.core)
        sents.append(sent)
        await wait_done(of)
    return sents


def bench(options: argparse.Namespace) -> int:
    report = Report('kstreams', options)
    target = built(options.folder)
    for job in options.jobs:
        variants = [name for name in options.variants if name in VARIANTS[job]]
        found: dict[tuple[str, float], Found] = defaultdict(Found)
        for run in range(options.runs):
            systems = [*variants, OURS]
            for system in systems if run % 2 == 0 else reversed(systems):
                one_run(job, system, target, options, found, report, seed=10 * run + 2)
        rates = list(dict.fromkeys(rate for _, rate in found))
        for system, rate in found:
            for what in FIGURES:
                report.spread(f'{job}, {rate:,.0f} events/s, {system}: {what}', getattr(found[system, rate], what),
                              '1' if what == 'core' else 'ms')
        for rate in rates:
            for what, floor in FIGURES.items():
                values = {system: getattr(found[system, rate], what) for system in (*variants, OURS)}
                best = min((statistics.median(values[variant]), variant) for variant in variants)[1]
                for variant in variants:
                    ratios = [our / max(their, floor) for our, their in zip(values[OURS], values[variant], strict=True)]
                    report.spread(f'{job}, {rate:,.0f} events/s: {what}, ours / Kafka Streams {variant}'
                                  f'{", its best" if variant == best else ""}', ratios, 'x')
    return report.end()


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('folder', type=harness, help="the peers' harness")
    made.add_argument('--jobs', type=several(str, VARIANTS), default='window,triton',
                      help='separated by commas (default: %(default)s)')
    made.add_argument('--variants', type=several(str, [name for of_job in VARIANTS.values() for name in of_job]),
                      default='default,quick,async,async-4,async-2t', help='of Kafka Streams (default: %(default)s)')
    made.add_argument('--rates', type=several(float), default='1,100,500,2000',
                      help='events a second of the job `window` (default: %(default)s)')
    made.add_argument('--triton-rates', type=several(float), default='500,1000',
                      help='events a second of the job `triton` (default: %(default)s)')
    made.add_argument('--warm-rate', type=float, default=500,
                      help='events a second of the warm-up (default: %(default)s)')
    made.add_argument('--settle-s', type=float, default=5,
                      help='seconds at the beginning of each rate that do not count (default: %(default)s)')
    made.add_argument('--runs', type=int, default=3)
    add_load_options(made, seconds=20, warm_s=25)
    main(bench, made.parse_args())
