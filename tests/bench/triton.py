"""Cost of scoring with Triton, compared with no model at all, and with a client that does nothing but ask.

    .venv/bin/python -m tests.bench.triton                  # everything, small
    .venv/bin/python -m tests.bench.triton --only scorer    # one part: identity, scorer or worker
    .venv/bin/python -m tests.bench.triton --events 200000 --runs 7 --json FILE

Broker, Triton and worker run on this machine, on free ports of 127.0.0.1.

    identity  a worker on a backlog with a served model that only returns constants, compared with the same worker and
              the constant scorer: events/s
    scorer    the batches of a worker through `TritonScorer` alone, compared with a bare client
              (`tritonclient.grpc.aio`, as many requests in flight, no checks): windows/s
    worker    a worker on a backlog with the shipped model, compared with the same bare client: windows/s, reasons
              included

Every figure is the median of interleaved runs, with the smallest and the largest. A ratio is that of neighbouring runs.
"""
import argparse
import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient

from deploy.local.parts import SHIPPED, Kafka, Part, Triton
from deploy.local.processes import HOST, answers
from stream.config import Settings
from stream.core.features import Batch
from stream.core.scores import OUTPUT_NAMES, Outputs
from stream.scoring.artefact import MANIFEST, WEIGHTS
from stream.scoring.embedded import EmbeddedScorer
from stream.scoring.repository import LABELS_FILE, WARMUP_FOLDER
from stream.scoring.triton import TritonScorer
from stream.simulator.shop import SimulatorOptions, simulate
from tests.bench.figures import Report, main, parser, say
from tests.integration.running import Shop, Worker, wait_for
from tests.scoring.stub_triton import StubTriton

IDENTITY_MIN, BARE_MIN = 0.8, 0.9
LANES = 8                       # steps that are scored at once: partitions of the inputs
DEADLINE_S = 120.0
LOOK_S = 0.05
KINDS = {'categories': 'INT32', 'numbers': 'FP32', 'counters': 'FP32', 'row_id': 'INT64'}

# The scores are those of `ConstantScorer`, so that both workers decide, publish and store the same.
IDENTITY_MODEL = """
import numpy as np
import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        row_id = triton.get_input_tensor_by_name(request, 'row_id').as_numpy()
        half = np.full((len(row_id), 1), 0.5, np.float32)
        tiers = np.zeros((len(row_id), TIERS), np.float32)
        tiers[:, 0] = 1.0
        outputs = {'purchase_intent': half, 'tier_probabilities': tiers, 'churn': half, 'row_id_out': row_id,
                   'expected_spend': np.zeros((len(row_id), 1), np.float32)}
        return triton.InferenceResponse([triton.Tensor(*item) for item in outputs.items()])
"""


@dataclass
class Run:
    """One run: the work done, and the CPU seconds of each process."""

    units: int
    seconds: float
    cpu_s: dict[str, float]

    @property
    def rate(self) -> float:
        return self.units / self.seconds


# ---- servers ---------------------------------------------------------------------------------------------------------

def identity_triton(folder: Path) -> Triton:
    """A Triton whose model answers constants and the row ids. Its folder differs from the shipped one in weights."""
    version_dir = folder / 'identity' / '1'
    version_dir.mkdir(parents=True)
    shutil.copyfile(SHIPPED.parent / LABELS_FILE, version_dir.parent / LABELS_FILE)
    shutil.copytree(SHIPPED.parent / WARMUP_FOLDER, version_dir.parent / WARMUP_FOLDER)
    manifest = json.loads((SHIPPED / MANIFEST).read_text())
    (version_dir / WEIGHTS).write_bytes(b'constants')
    manifest['files'] = {WEIGHTS: hashlib.sha256(b'constants').hexdigest()}
    manifest['name'] = 'identity'
    (version_dir / MANIFEST).write_text(json.dumps(manifest))
    model = folder / 'identity.py'
    model.write_text(IDENTITY_MODEL.replace('TIERS', str(len(manifest['tier_names']))))
    return Triton(folder / 'identity-triton', version_dir, python_model=model)


def windows_served(triton: Triton) -> int:
    """Windows that the server has answered since it started: `nv_inference_count` of its metrics."""
    # It is ready a moment before its metrics are.
    wait_for(lambda: answers(f'http://{HOST}:{triton.metrics_port}/metrics'), "Triton's metrics", 10)
    with contextlib.closing(http.client.HTTPConnection(HOST, triton.metrics_port, timeout=5)) as connection:
        connection.request('GET', '/metrics')
        lines = connection.getresponse().read().decode().splitlines()
    return sum(int(float(line.rpartition(' ')[2])) for line in lines if line.startswith('nv_inference_count{'))


def cpu_s(pid: int) -> float:
    """Seconds of CPU of a process and its children that still run."""
    total = 0.0
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(')')[2].split()
            if pid in (int(stat.parent.name), int(fields[1])):
                total += (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
    return total


# ---- a worker on a backlog -------------------------------------------------------------------------------------------

class Backlog:
    """Simulated events in the broker's input topics. Each worker that processes them starts without state."""

    def __init__(self, kafka: Kafka, folder: Path, name: str, events: int, shoppers: int) -> None:
        self.kafka = kafka
        self.folder = folder
        self.shop = Shop(kafka.brokers, name, folder, partitions=LANES)
        self.shop.make_topics()
        self.events = self.shop.publish(islice(simulate(SimulatorOptions(shoppers=shoppers)).lines(), events))
        self._runs = count(1)

    def work_off(self, counting: Triton | None, servers: Sequence[Part] = (), **settings: Any) -> Run:
        """From the first event read to the last step done; units are events, or windows that `counting` served."""
        number = next(self._runs)
        group = f'{self.shop.name}-{number}'
        state = self.folder / f'state-{group}'
        worker = self.shop.worker(ready=False, group=group, state_dir=str(state), **settings)
        served = windows_served(counting) if counting else 0
        try:
            watched = {'worker': worker.process.pid, **{part.name: part.pid for part in (self.kafka, *servers)}}
            seconds, spent = self._watch(worker, watched)
            units = windows_served(counting) - served if counting else self.events
            return Run(units, seconds, spent)
        finally:
            worker.stop()
            shutil.rmtree(state, ignore_errors=True)

    def _watch(self, worker: Worker, watched: dict[str, int]) -> tuple[float, dict[str, float]]:
        """Seconds from the first event read to the last step done, and seconds of CPU meanwhile."""
        address = worker.url.removeprefix('http://')
        connection = http.client.HTTPConnection(address, timeout=10)
        until = time.monotonic() + DEADLINE_S
        began, before = time.monotonic(), {name: cpu_s(pid) for name, pid in watched.items()}
        pause_s = LOOK_S
        while True:
            worker.check()
            now = time.monotonic()
            assert now < until, f'not worked off within {DEADLINE_S:.0f} s:\n{worker.said()[-2000:]}'
            connection.request('GET', '/metrics')
            seen = _metrics(connection.getresponse().read().decode())
            folded = sum(seen.get(f'stream_events_{what}_total', 0) for what in ('applied', 'duplicate', 'late'))
            if not seen.get('stream_events_read_total'):
                began, before = now, {name: cpu_s(pid) for name, pid in watched.items()}
            elif folded >= self.events and not self._unfinished(connection):
                connection.close()
                return time.monotonic() - began, {name: cpu_s(pid) - before[name] for name, pid in watched.items()}
            elif folded:        # an answer costs the worker 4 ms: look rarely until the end is near
                pause_s = max(LOOK_S, min(1.0, (self.events - folded) / folded * (now - began) / 2))
            time.sleep(pause_s)


    @staticmethod
    def _unfinished(connection: http.client.HTTPConnection) -> int:
        """Records of the inputs that are not yet durable in the state, as of now (metrics: as of the last second)."""
        connection.request('GET', '/status')
        status = json.load(connection.getresponse())
        return sum(sum(lane['lag'].values()) for lane in status['lanes'])


def _metrics(text: str) -> dict[str, float]:
    """Sums over the series of each name."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith('#'):
            name, _, value = line.rpartition(' ')
            name = name.partition('{')[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def recorded(backlog: Backlog) -> list[Batch]:
    """The batches that a worker sends for the backlog, reasons included, in their order."""
    embedded, kept = EmbeddedScorer(SHIPPED), []

    def answer(batch: Batch) -> Outputs:
        kept.append(batch)
        return embedded.score_now([batch])[0]

    stub = StubTriton(answer)
    try:
        backlog.work_off(None, scorer='triton', triton=stub.address, model=str(SHIPPED), triton_timeout_ms=60_000)
    finally:
        stub.stop()
    return kept


# ---- clients ---------------------------------------------------------------------------------------------------------

async def bare(triton: Triton, batches: Sequence[Batch], name: str, in_flight: int) -> float:
    """Seconds in which a client that checks nothing has an answer to each batch."""
    left = iter(batches)
    requested = [InferRequestedOutput(output) for output in OUTPUT_NAMES]
    client = InferenceServerClient(triton.address)

    def inputs(batch: Batch) -> list[InferInput]:
        arrays = {tensor: getattr(batch, tensor) for tensor in KINDS}
        return [InferInput(tensor, list(array.shape), KINDS[tensor]).set_data_from_numpy(array)
                for tensor, array in arrays.items()]

    async def ask() -> None:
        for batch in left:
            await client.infer(name, inputs(batch), '1', requested)

    try:
        await client.infer(name, inputs(batches[0]))
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(ask())
        return time.perf_counter() - began
    finally:
        await client.close()


async def scored(triton: Triton, batches: Sequence[Batch], in_flight: int) -> float:
    """Seconds of the same batches through `TritonScorer`, by as many lanes as a worker has, some batches a step."""
    steps = iter([batches[at:at + 4] for at in range(0, len(batches), 4)])
    scorer = TritonScorer(triton.address, triton.version_dir, in_flight_max=in_flight)

    async def lane() -> None:
        for step in steps:
            await scorer.score(step)

    try:
        await scorer.open()
        await scorer.score(batches[:1])
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(LANES):
                group.create_task(lane())
        return time.perf_counter() - began
    finally:
        await scorer.close()


def client_run(triton: Triton, batches: Sequence[Batch], seconds: Callable[[], float]) -> Run:
    watched = {'client': os.getpid(), triton.name: triton.pid}
    before = {'client': time.process_time(), triton.name: cpu_s(triton.pid)}
    taken = seconds()
    spent = {'client': time.process_time() - before['client'],
             triton.name: cpu_s(watched[triton.name]) - before[triton.name]}
    return Run(sum(batch.windows for batch in batches), taken, spent)


# ---- figures ---------------------------------------------------------------------------------------------------------

def compare(report: Report, part: str, unit: str, at_least: float, ours: tuple[str, Callable[[], Run]],
            theirs: tuple[str, Callable[[], Run]], runs: int) -> None:
    """Interleaved runs of both: their rates, and the ratio of neighbouring runs beside its target."""
    mine, other = [], []
    for number in range(runs):
        other.append(theirs[1]())
        mine.append(ours[1]())
        for name, run in ((theirs[0], other[-1]), (ours[0], mine[-1])):
            cpu = ', '.join(f'{who} {1e6 * spent / run.units:.0f}' for who, spent in run.cpu_s.items())
            say(f'{part} run {number + 1}: {name} {run.rate:,.0f} {unit}/s; us of CPU for one: {cpu}')
    for name, found in ((theirs[0], other), (ours[0], mine)):
        report.spread(f'{part}: {name}', [run.rate for run in found], f'{unit}/s')
    report.spread(f'{part}: {ours[0]} / {theirs[0]}', [m.rate / o.rate for m, o in zip(mine, other, strict=True)], 'x',
                  at_least=at_least)


def describe(batches: Sequence[Batch]) -> str:
    by_length: dict[int, list[int]] = {}
    for batch in batches:
        by_length.setdefault(batch.categories.shape[1], []).append(len(batch))
    return '; '.join(f'{len(rows)} of {length} slots with {min(rows)} .. {max(rows)} rows'
                     for length, rows in sorted(by_length.items()))


def bench(options: argparse.Namespace) -> int:
    more = {'triton_in_flight_max': options.in_flight} | dict(setting.split('=', 1) for setting in options.settings)
    report = Report('triton', options)

    with TemporaryDirectory() as path, Kafka(Path(path) / 'kafka') as kafka:
        folder = Path(path)
        if options.only in (None, 'identity'):
            backlog = Backlog(kafka, folder, 'identity', options.events, options.events // options.events_per_shopper)
            with identity_triton(folder) as triton:
                compare(
                    report, 'identity', 'events', IDENTITY_MIN,
                    ('identity model on Triton', lambda: backlog.work_off(
                        None, [triton], scorer='triton', triton=triton.address, model=str(triton.version_dir), **more)),
                    ('constant scorer', lambda: backlog.work_off(None, scorer='constant', **more)), options.runs)
        if options.only in (None, 'scorer', 'worker'):
            backlog = Backlog(kafka, folder, 'model', options.model_events,
                              options.model_events // options.events_per_shopper)
            batches = recorded(backlog)
            say(f'{len(batches)} batches, {sum(batch.windows for batch in batches):,} windows: {describe(batches)}')
            with Triton(folder / 'triton') as triton:
                theirs = ('bare client', lambda: client_run(
                    triton, batches, lambda: asyncio.run(bare(triton, batches, 'shopper', options.in_flight))))
                theirs[1]()     # warm
                if options.only != 'worker':
                    compare(report, 'scorer', 'windows', BARE_MIN, ('TritonScorer', lambda: client_run(
                        triton, batches, lambda: asyncio.run(scored(triton, batches, options.in_flight)))),
                        theirs, options.runs)
                if options.only != 'scorer':
                    compare(report, 'worker', 'windows', BARE_MIN, ('worker', lambda: backlog.work_off(
                        triton, [triton], scorer='triton', triton=triton.address, model=str(SHIPPED), **more)),
                        theirs, options.runs)
    return report.end()


if __name__ == '__main__':
    made = parser(__doc__)
    made.add_argument('--only', choices=('identity', 'scorer', 'worker'))
    made.add_argument('--events', type=int, default=400_000, help='of the backlog of `identity`')
    made.add_argument('--model-events', type=int, default=60_000, help='of the backlog of `scorer` and `worker`')
    made.add_argument('--events-per-shopper', type=int, default=30, help='of these so many shoppers are simulated')
    made.add_argument('--runs', type=int, default=7)
    made.add_argument('--in-flight', type=int, default=Settings.model_fields['triton_in_flight_max'].default,
                      help='requests of each client at once')
    main(bench, made.parse_args())
