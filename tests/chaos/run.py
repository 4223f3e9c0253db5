"""Chaos: workers and a real broker are killed while events keep flowing; at the end the auditor checks everything.

    python -m tests.chaos.run --seed N [--events 1000000 --kills 20 --rebalances 10 --publish changes|all|both ...]

One seed determines the whole run and is printed first. The auditor's table is printed last. The exit code is 0 if no
check failed. Everything that was started is stopped at the end, also on Ctrl-C, and dies with this process if it is
killed.
"""
import argparse
import asyncio
import contextlib
import json
import logging
import math
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from stream.config import Settings
from stream.scoring.make import make_scorer
from tests.chaos.audit_report import AuditReport
from tests.chaos.auditor import audit
from tests.chaos.log import SOURCES, Bound, Fault, KafkaLog, RocksStore, Run, Sample, Topic
from tests.chaos.plan import EVENTS_BETWEEN_MIN, Plan, Planned, draw
from tests.chaos.reference import Rules, partition_of
from tests.chaos.rescore import wrong_scores
from tests.chaos.supervisor import SupervisedWorker, console
from tests.chaos.workload import Input, records

SAMPLE_S = 0.5
FAULT_S_MAX = 120.0         # time for a fault to become due, and to fire
BROKER_GRACE_S = 5.0        # time for a worker to give up after a broker outage
STILL_S = 3.0               # everything is read and nothing new was written for so long: the run is over
MEMORY_MIB_MAX, HANDLES_MAX, DISK_MIB_MAX = 1_500, 2_000, 4_000
BATCH_BYTES_MAX = 512 << 10
TRICKLE_ROWS, TRICKLE_S = 25, 0.05      # while a fault is due: the stream goes on slowly


class ChaosError(Exception):
    """The run cannot go on. What happened so far is audited."""


@dataclass
class Options:
    """The options of a run."""

    seed: int
    events: int = 1_000_000
    kills: int = 20
    rebalances: int = 10
    terms: int = 2
    brokers: int = 1
    tritons: int = 2
    partitions: int = 8
    shoppers: int = 3_000
    publish: str = 'changes'
    scorer: str = 'embedded'
    settle_s_max: float = 120.0
    settings: tuple[str, ...] = ()
    keep: bool = False


# ---- the run --------------------------------------------------------------------------------------------------------

class Chaos:
    """One run of one plan."""

    def __init__(self, options: Options, plan: Plan, folder: Path, kafka: Any, triton: Any, prefix: str) -> None:
        self.run = Run(planned=len(plan.faults), settle_s_max=options.settle_s_max, settled_s=None)
        self._options, self._plan, self._folder, self._kafka, self._triton = options, plan, folder, kafka, triton
        self._rng = random.Random(plan.seed)
        self._began = time.monotonic()
        self._group = f'{prefix}-group'
        self._names: dict[Topic, str] = {
            'clicks': f'{prefix}-clicks', 'carts': f'{prefix}-carts', 'alerts': f'{prefix}-alerts',
            'scores': f'{prefix}-scores', 'dead_letters': f'{prefix}-dead-letters',
            'changelog': f'{self._group}-users-changelog'}
        self._places = [(topic, place) for topic in self._names for place in range(options.partitions)]
        self._config = folder / 'stream.toml'
        self.settings = self._write_config()
        self._workers = [SupervisedWorker(name, folder, self._config, self._note, self._ended) for name in 'ab']
        self._broker_back_s = 0.0           # when the broker last came back; inf: it is down
        self._sent = 0
        self._all_sent = False
        self._due_at: int | None = plan.faults[0].at if plan.faults else None       # of the next fault
        self._moved = asyncio.Event()       # a new sample was taken

    def _note(self, code: str, what: str) -> None:
        console.print(f'[bold]{code}[/] {what}', markup=True, highlight=False)
        self.run.problems.append((code, what))

    def _ended(self, worker: SupervisedWorker, code: int) -> None:
        """A worker has ended that no fault was aimed at."""
        what = f'{worker.name} ended by itself with {code}: {worker.tail(2)}'
        if time.monotonic() < self._broker_back_s + BROKER_GRACE_S:
            console.print(f'    while the broker was away: {what}', markup=False, highlight=False)
        else:
            self._note('C8', what)

    def _write_config(self) -> Settings:
        values: dict[str, Any] = {
            'brokers': self._kafka.brokers, 'group': self._group, 'clicks_topic': self._names['clicks'],
            'carts_topic': self._names['carts'], 'alerts_topic': self._names['alerts'],
            'scores_topic': self._names['scores'], 'dead_letters_topic': self._names['dead_letters'],
            'partitions': self._options.partitions, 'publish': self._options.publish,
            'scorer': self._options.scorer, 'admin_port': 0, 'rocksdb_cache_mib': 64, 'rocksdb_write_buffers_mib': 64,
            'reasons_rows_max': 64, 'session_timeout_ms': 6_000}
        if self._triton is not None:
            values['triton'] = self._triton.address
        for setting in self._options.settings:
            name, _, text = setting.partition('=')
            try:
                values[name] = json.loads(text)
            except ValueError:
                values[name] = text
        self._config.write_text(tomli_w.dumps(values))
        return Settings(**values)

    # -- the whole

    async def play(self) -> AuditReport:
        """The whole run, from creating the topics to the audit."""
        await self._create_topics()
        tasks: list[asyncio.Task] = []
        try:
            tasks = [asyncio.create_task(self._sample_for_ever(), name='sampler'),
                     asyncio.create_task(self._publish(), name='publisher')]
            self._workers[0].start()
            try:
                await self._while(tasks, self._fault_after_fault())
                await self._while(tasks, self._settle())
            except ChaosError as error:
                self._note('C8', str(error))
            for task in tasks:
                task.cancel()
            for worker in reversed(self._workers):
                await worker.leave()
            await self._last_sample()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for worker in self._workers:
                await worker.end()
        self._bounds()
        for fault in self.run.faults:
            fault.left = self._sent - fault.consumed
        console.print(f'{self._clock()} everything stopped; {self._sent:,} records were sent; auditing')
        log = KafkaLog(self._kafka.brokers, self._names, self._options.partitions)
        stores = list(self._stores()) if self.run.settled_s is not None else []     # else ownership is not certain
        # This scorer also checks what Triton scored: both have the same weights.
        scorer = make_scorer(self.settings.model_copy(update={
            'scorer': 'embedded' if self.settings.scorer == 'triton' else self.settings.scorer}), console.print)
        try:
            return await audit(log, rules_of(self.settings), self.run, stores, partial(wrong_scores, scorer=scorer))
        finally:
            await scorer.close()

    @staticmethod
    async def _while(tasks: list[asyncio.Task], work: Awaitable[None]) -> None:
        """Do the work, but fail at once if a background task fails."""
        main = asyncio.ensure_future(work)
        watched = [task for task in tasks if not task.done()]
        try:
            while not main.done():
                done, _ = await asyncio.wait([main, *watched], return_when=asyncio.FIRST_COMPLETED)
                for task in done - {main}:
                    watched.remove(task)
                    task.result()
            main.result()
        finally:
            main.cancel()
            await asyncio.gather(main, return_exceptions=True)

    async def _create_topics(self) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self._kafka.brokers)
        await admin.start()
        try:
            answer: Any = await admin.create_topics([
                NewTopic(self._names[topic], self._options.partitions, 1) for topic in SOURCES])
            failed = [error for error in answer.topic_errors if error[1]]
            if failed:
                raise ChaosError(f'The input topics cannot be created: {failed}')
            # The worker creates the others, but the sampler needs this one before the worker runs.
            await admin.create_topics([
                NewTopic(self._names['scores'], self._options.partitions, 1,
                         topic_configs={'cleanup.policy': 'compact', 'min.compaction.lag.ms': '86400000'})])
        finally:
            await admin.close()

    # -- what flows in

    async def _publish(self) -> None:
        producer = AIOKafkaProducer(
            bootstrap_servers=self._kafka.brokers, enable_idempotence=True, max_batch_size=BATCH_BYTES_MAX,
            max_request_size=2 * BATCH_BYTES_MAX, request_timeout_ms=60_000)
        await producer.start()
        try:
            rows = records(self._plan.seed, self._plan.shoppers)
            while self._sent < self._plan.events or self._due_at is not None:
                due_at, size = self._due_at, self._rng.choice((50, 200, 500, 1_000))
                if due_at is not None and self.consumed >= due_at and self._sent > due_at:
                    size = TRICKLE_ROWS
                    await asyncio.sleep(TRICKLE_S)
                elif self._sent - self.consumed > self._plan.ahead_at(self.consumed):
                    await self._sampled()
                    continue
                chunk = await asyncio.to_thread(_take, rows, size)
                await self._send(producer, chunk)
                self._sent += len(chunk)
        finally:
            await producer.stop()
        self._all_sent = True
        console.print(f'{self._clock()} all {self._sent:,} records are sent')

    async def _send(self, producer: AIOKafkaProducer, chunk: list[Input]) -> None:
        batches: dict[tuple[str, int], list[Input]] = {}
        for entry in chunk:
            place = entry.partition
            if place is None:
                place = partition_of(entry.key or b'', self._options.partitions)
            batches.setdefault((self._names[entry.topic], place), []).append(entry)
        await asyncio.gather(*(self._send_batch(producer, *place, entries) for place, entries in batches.items()))

    async def _send_batch(self, producer: AIOKafkaProducer, topic: str, partition: int, entries: list[Input]) -> None:
        now_ms = int(time.time() * 1000)
        batch = producer.create_batch()
        waiting = []
        for entry in entries:
            row: dict[str, Any] = {'timestamp': now_ms, 'key': entry.key, 'value': entry.value,
                                   'headers': list(entry.headers)}
            if batch.append(**row) is None:
                waiting.append(await producer.send_batch(batch, topic, partition=partition))
                batch = producer.create_batch()
                batch.append(**row)
        waiting.append(await producer.send_batch(batch, topic, partition=partition))
        # A batch that was not acknowledged in time may be in the topic or not. The auditor reads what is there.
        await asyncio.gather(*waiting)

    # -- what is seen

    @property
    def consumed(self) -> int:
        """Events before the committed offsets, in the last sample."""
        return sum(self.run.samples[-1].committed.values()) if self.run.samples else 0

    async def _sampled(self, timeout_s: float = FAULT_S_MAX) -> None:
        self._moved.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._moved.wait()
        except TimeoutError as error:
            raise ChaosError(f'The broker has not answered a request for offsets for {timeout_s:.0f} s') from error

    async def _sample_for_ever(self) -> None:
        while True:
            try:
                async with self._observer() as sample:
                    while True:
                        began = time.monotonic()
                        self.run.samples.append(await asyncio.wait_for(sample(), 10))
                        for worker in self._workers:
                            worker.measure()
                        self._moved.set()
                        await asyncio.sleep(max(SAMPLE_S - (time.monotonic() - began), 0.05))
            except (KafkaError, TimeoutError, OSError):
                await asyncio.sleep(0.5)        # the broker is down, as planned

    @contextlib.asynccontextmanager
    async def _observer(self) -> AsyncIterator[Callable[[], Awaitable[Sample]]]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self._kafka.brokers, request_timeout_ms=5_000)
        consumer = AIOKafkaConsumer(bootstrap_servers=self._kafka.brokers, request_timeout_ms=5_000,
                                    isolation_level='read_uncommitted')
        sources = {self._names[topic]: topic for topic in SOURCES}
        places = {TopicPartition(self._names[topic], place): (topic, place) for topic, place in self._places}
        known: list[TopicPartition] = []

        async def sample() -> Sample:
            offsets = await admin.list_consumer_group_offsets(self._group)
            if len(known) < len(places):        # the worker creates topics at its first start
                found = await consumer.topics()
                known[:] = [place for place in places if place.topic in found]
            ends = await consumer.end_offsets(known)
            committed = {(sources[place.topic], place.partition): meta.offset for place, meta in offsets.items()
                         if place.topic in sources and meta.offset >= 0}
            if not committed and self.consumed:
                raise TimeoutError      # the group's coordinator has just started and has no offsets yet
            return Sample(time.monotonic() - self._began, committed,
                          {places[place]: end for place, end in ends.items()})

        try:
            await admin.start()
            await consumer.start()
            yield sample
        finally:
            with contextlib.suppress(Exception):
                await consumer.stop()
            with contextlib.suppress(Exception):
                await admin.close()

    async def _last_sample(self) -> None:
        async with self._observer() as sample:
            self.run.samples.append(await asyncio.wait_for(sample(), 30))

    def _clock(self) -> str:
        return f'[{time.monotonic() - self._began:6.1f} s]'

    # -- faults

    async def _fault_after_fault(self) -> None:
        last = 0
        for number, planned in enumerate(self._plan.faults, 1):
            self._due_at = due = max(planned.at, last + EVENTS_BETWEEN_MIN)
            await self._until(lambda due=due: self.consumed >= due, f'{due:,} consumed events for {planned.name}')
            await asyncio.sleep(planned.delay_s)
            last = self.consumed
            fault = Fault(planned.name, time.monotonic() - self._began, last, 0)
            console.print(f'{self._clock()} {number}/{len(self._plan.faults)} at {last:,} consumed, {self._sent:,} '
                          f'sent: {planned.name}')
            await self._fire(planned)
            self.run.faults.append(fault)
        self._due_at = None

    async def _until(self, condition: Callable[[], bool], what: str, timeout_s: float = FAULT_S_MAX) -> None:
        """Wait for a condition on the samples. The time limit starts again whenever something was consumed."""
        seen, since = -1, time.monotonic()
        while not condition():
            if self.consumed > seen:
                seen, since = self.consumed, time.monotonic()
            if time.monotonic() - since > timeout_s:
                raise ChaosError(f'Nothing was consumed for {timeout_s:.0f} s while waiting for {what}; '
                                 f'{self._workers[0].tail()}')
            await self._sampled()

    async def _fire(self, planned: Planned) -> None:
        running = [worker for worker in self._workers if worker.running] or self._workers[:1]
        target = running[planned.target % len(running)]
        match planned.kind:
            case 'kill':
                target.empty_next, starts = planned.empty, target.starts
                target.kill()
                await self._restarted(target, starts)
                await self._again(target, planned)
            case 'die':
                await self._die(target, planned)
                await self._again(target, planned)
            case 'term':
                await self._workers[0].terminate()
            case 'join':
                self._workers[1].start()
            case 'leave':
                await self._workers[1].leave()
            case 'broker' | 'triton':
                part = self._kafka if planned.kind == 'broker' else self._triton
                if part is self._kafka:
                    self._broker_back_s = math.inf
                await asyncio.to_thread(part.kill)
                await asyncio.sleep(planned.delay_s)
                await asyncio.to_thread(part.start)
                if part is self._kafka:
                    self._broker_back_s = time.monotonic()

    async def _die(self, target: SupervisedWorker, planned: Planned) -> None:
        """Let a worker kill itself at a named point. One that owns nothing never gets there: then try the other."""
        others = [worker for worker in self._workers if worker is not target and worker.running]
        for worker in (target, *others, target):
            order = {'stage': planned.stage, 'when': planned.when, 'calls': planned.calls, 'delay_ms': planned.cut_ms}
            if await self._obeys(worker, order, planned.empty, FAULT_S_MAX / 3):
                return
        raise ChaosError(f'No worker came to the point {planned.name}: {target.tail()}')

    async def _again(self, target: SupervisedWorker, planned: Planned) -> None:
        if planned.again:
            order = {'stage': 'take_over', 'when': 'during', 'calls': 1, 'delay_ms': planned.cut_ms}
            if not await self._obeys(target, order, False, FAULT_S_MAX / 3):
                self._note('C10', f'{target.name} took over nothing, so it was not killed again')

    async def _obeys(self, worker: SupervisedWorker, order: dict, empty: bool, timeout_s: float) -> bool:
        done, starts = worker.orders.with_suffix('.done'), worker.starts
        done.unlink(missing_ok=True)
        worker.empty_next, worker.expected = empty, True
        worker.orders.write_text(json.dumps(order))
        deadline = time.monotonic() + timeout_s
        while not done.exists():
            if time.monotonic() > deadline:
                worker.orders.unlink(missing_ok=True)
                worker.empty_next = worker.expected = False
                return done.exists()
            await asyncio.sleep(0.02)
        await self._restarted(worker, starts)
        return True

    @staticmethod
    async def _restarted(worker: SupervisedWorker, starts: int) -> None:
        async with asyncio.timeout(FAULT_S_MAX):
            while worker.starts == starts:
                await asyncio.sleep(0.02)

    # -- the end

    async def _settle(self) -> None:
        """Stop the second worker, and wait until everything is sent and read and no more output comes."""
        if self._workers[1].running:
            await self._workers[1].leave()
        await self._until(lambda: self._all_sent, 'the last record to be sent')
        began = time.monotonic()
        ends: dict = {}
        since = began
        while True:
            await self._sampled()
            sample = self.run.samples[-1]
            left = sum(end for (topic, _), end in sample.ends.items() if topic in SOURCES) - self.consumed
            if left or sample.ends != ends:
                ends, since = sample.ends, time.monotonic()
            if time.monotonic() - since > STILL_S:
                self.run.settled_s = since - began
                console.print(f'{self._clock()} settled')
                return
            if time.monotonic() - began > self._options.settle_s_max:
                raise ChaosError(f'{left:,} events are left after {self._options.settle_s_max:.0f} s: '
                                 f'{self._workers[0].tail()}')

    def _stores(self) -> Iterator[RocksStore]:
        for worker in self._workers:
            for place in range(self._options.partitions):
                path = worker.state / f'users-{place}'
                if path.is_dir():
                    yield RocksStore(str(path), place, owner=worker.name == 'a')

    def _bounds(self) -> None:
        for worker in self._workers:
            if worker.starts:
                self.run.bounds += [
                    Bound(f'memory of {worker.name}', worker.peak_memory_mib, MEMORY_MIB_MAX, 'MiB'),
                    Bound(f'handles of {worker.name}', worker.peak_handles, HANDLES_MAX, ''),
                    Bound(f'disk of {worker.name}', worker.disk_mib(), DISK_MIB_MAX, 'MiB')]
        console.print(f'starts: {", ".join(f"{worker.name} {worker.starts}" for worker in self._workers)}')


def _take(rows: Iterator[Input], count: int) -> list[Input]:
    return [row for _, row in zip(range(count), rows, strict=False)]


def rules_of(settings: Settings) -> Rules:
    """The rules of the reference, from the worker's settings."""
    policy = settings.policy()
    kinds = {'purchase_power.updated': 'power', 'purchase_intent.alert': 'intent', 'churn.alert': 'churn'}
    limits = settings.window_limits()
    return Rules(
        group=settings.group, publish=settings.publish, events_max=limits.events_max, span_ms=limits.span_ms,
        silence_ms=limits.silence_ms, clock_ahead_ms_max=settings.clock_ahead_ms_max,
        record_bytes_max=settings.record_bytes_max, currency=settings.currency, rates=settings.currency_rates,
        tier_events_min=policy.tier_events_min, intent_raise=policy.intent_raise, churn_raise=policy.churn_raise,
        churn_clear=policy.churn_clear, churn_orders_min=policy.churn_orders_min,
        cooldown_ms={kind: getattr(policy, f'{name}_cooldown_ms') for kind, name in kinds.items()},
        ttl_ms={kind: getattr(policy, f'{name}_ttl_ms') for kind, name in kinds.items()},
        actions=tuple((rule.occasion, rule.action, rule.tier_min, rule.tier_max, rule.spend_min)
                      for rule in policy.actions))


async def play(options: Options, folder: Path, kafka: Any, triton: Any, prefix: str) -> AuditReport:
    """One run on a running broker. Errors: ValueError if the plan is impossible."""
    tritons = options.tritons if triton is not None else 0
    plan = draw(options.seed, options.events, options.kills, options.rebalances, options.terms, options.brokers,
                tritons, options.shoppers)
    folder.mkdir(parents=True, exist_ok=True)
    return await Chaos(options, plan, folder, kafka, triton, prefix).play()


def main() -> int:
    """The command line."""
    from deploy.local.parts import Kafka, Triton
    options = _options()
    console.print(f'SEED={options.seed}')
    logging.getLogger('aiokafka').setLevel(logging.CRITICAL)        # broker outages are expected here
    folder = Path(tempfile.mkdtemp(prefix='stream-chaos-'))
    modes = ('changes', 'all') if options.publish == 'both' else (options.publish,)
    reports: list[tuple[str, AuditReport]] = []
    signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's background job ignores it
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    triton = None
    kafka = Kafka(folder / 'kafka')
    try:
        kafka.start()
        if options.scorer in ('triton', 'mix'):
            triton = Triton(folder / 'triton').start()
        for mode in modes:
            scorer = options.scorer if options.scorer != 'mix' else 'triton' if mode == modes[-1] else 'embedded'
            one = Options(**{**vars(options), 'publish': mode, 'scorer': scorer})
            console.print(f'== publish={mode} scorer={scorer} events={one.events:,} kills={one.kills} '
                          f'rebalances={one.rebalances} shoppers={one.shoppers:,}')
            # Ctrl-C cancels the run, which then stops its workers.
            report = asyncio.run(
                play(one, folder / mode, kafka, triton if scorer == 'triton' else None, f'chaos-{mode}'))
            reports.append((f'publish={mode} scorer={scorer} SEED={options.seed}', report))
    except KeyboardInterrupt:
        console.print('stopped; only the audits shown below were done')
    finally:
        for part in (triton, kafka):
            if part is not None:
                part.remove()
        if options.keep:
            console.print(f'kept: {folder}')
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for title, report in reports:
        report.print(console, title)
    if len(reports) < len(modes):
        return 130
    return 0 if all(report.ok for _, report in reports) else 1


def _options() -> Options:
    defaults = Options(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=None, help='determines the run; drawn and printed if not given')
    for name in ('events', 'kills', 'rebalances', 'terms', 'brokers', 'tritons', 'partitions', 'shoppers'):
        parser.add_argument(f'--{name}', type=int, default=getattr(defaults, name))
    parser.add_argument('--publish', choices=('changes', 'all', 'events', 'both'), default=defaults.publish)
    parser.add_argument('--scorer', choices=('embedded', 'triton', 'constant', 'mix'), default=defaults.scorer,
                        help='mix: the last mode uses Triton, the others the embedded model')
    parser.add_argument('--settle-s-max', type=float, default=defaults.settle_s_max)
    parser.add_argument('--set', dest='settings', action='append', default=[], metavar='NAME=VALUE',
                        help='any setting of the worker')
    parser.add_argument('--keep', action='store_true', help='keep logs, topics and databases')
    given = vars(parser.parse_args())
    given['seed'] = given['seed'] if given['seed'] is not None else random.SystemRandom().randrange(1 << 30)
    return Options(**{**given, 'settings': tuple(given['settings'])})


if __name__ == '__main__':
    sys.exit(main())
