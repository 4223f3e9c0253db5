"""A worker as a process of its own on the real broker, and what a test asks of both."""
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from stream.config import Settings
from stream.core.events import SOURCE_OF_TYPE, TYPE_CODES
from stream.core.partitioners import partition
from stream.core.user import User
from stream.state.store import Memory, PartitionStore

DEADLINE_S = 60.0
T = TypeVar('T')


def wait_for(condition: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """The first truthy answer of `condition`. Errors: AssertionError that says what was waited for."""
    until = time.monotonic() + deadline_s
    while not (answer := condition()):
        assert time.monotonic() < until, f'{what}: not within {deadline_s:.0f} s'
        time.sleep(.05)
    return answer


class Shop:
    """Topics of its own on the shared broker, workers on them, and their state."""

    def __init__(self, brokers: str, name: str, folder: Path, **settings: Any) -> None:
        self.brokers, self.name, self.folder = brokers, name, folder
        self.settings: dict[str, Any] = {
            'brokers': brokers, 'group': name, 'clicks_topic': f'{name}.clicks', 'carts_topic': f'{name}.carts',
            'alerts_topic': f'{name}.alerts', 'scores_topic': f'{name}.scores',
            'dead_letters_topic': f'{name}.dead', 'partitions': 2, 'scorer': 'constant', 'admin_port': 0,
            'state_dir': str(folder / 'state'), 'session_timeout_ms': 6000, 'commit_interval_ms': 200,
            'merge_wait_ms': 100} | settings
        self.workers: list[Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.kill()

    @property
    def partitions(self) -> int:
        return self.settings['partitions']

    @property
    def inputs(self) -> tuple[str, str]:
        return self.settings['clicks_topic'], self.settings['carts_topic']

    def make_topics(self) -> None:
        from stream.kafka.topics import ensure_topics
        asyncio.run(ensure_topics(Settings(**self.settings)))

    def worker(self, ready: bool = True, **settings: Any) -> 'Worker':
        """A started worker; waits until it says that it is ready."""
        worker = Worker(self.settings | settings, self.folder / f'worker-{len(self.workers)}.log')
        self.workers.append(worker)
        if ready:
            worker.wait_ready()
        return worker

    def publish(self, lines: Iterable[bytes | Mapping[str, Any]]) -> int:
        """Send events, each with its own time as the record's; return how many."""
        return asyncio.run(self._publish(lines))

    async def _publish(self, lines: Iterable[bytes | Mapping[str, Any]]) -> int:
        producer = AIOKafkaProducer(bootstrap_servers=self.brokers, linger_ms=20, acks='all')
        await producer.start()
        try:
            sent = []
            for line in lines:
                value = line.rstrip(b'\n') if isinstance(line, bytes) else json.dumps(line).encode()
                event = json.loads(value)
                key = event['user_id'].encode()
                topic = self.inputs[SOURCE_OF_TYPE[TYPE_CODES.get(event['type'], 14)]]
                sent.append(await producer.send(topic, value, key=key, timestamp_ms=event['ts'],
                                                partition=partition('murmur2', key, self.partitions)))
            await asyncio.gather(*sent)
            return len(sent)
        finally:
            await producer.stop()

    def send(self, topic: str, key: bytes | None, value: bytes | None, number: int = 0, ts_ms: int | None = None,
             headers: list[tuple[str, bytes]] | None = None) -> int:
        """Send one record as it is; return its offset."""
        async def run() -> int:
            producer = AIOKafkaProducer(bootstrap_servers=self.brokers)
            await producer.start()
            try:
                sent = await producer.send_and_wait(topic, value, key=key, partition=number, timestamp_ms=ts_ms,
                                                    headers=headers)
                return sent.offset
            finally:
                await producer.stop()
        return asyncio.run(run())

    def read(self, topic: str) -> list[Any]:
        """All committed records of a topic of the worker, by partition and offset."""
        async def run() -> list[Any]:
            consumer = AIOKafkaConsumer(bootstrap_servers=self.brokers, isolation_level='read_committed',
                                        auto_offset_reset='earliest')
            await consumer.start()
            try:
                tps = [TopicPartition(topic, number) for number in range(self.partitions)]
                consumer.assign(tps)
                ends = await consumer.end_offsets(tps)
                begins = await consumer.beginning_offsets(tps)
                found = []
                while any([await consumer.position(tp) < ends[tp] for tp in tps if begins[tp] < ends[tp]]):
                    for records in (await consumer.getmany(timeout_ms=200)).values():
                        found += records
                return sorted(found, key=lambda record: (record.partition, record.offset))
            finally:
                await consumer.stop()
        return asyncio.run(run())

    def topics(self) -> set[str]:
        """All topics of the broker."""
        async def run() -> set[str]:
            admin = AIOKafkaAdminClient(bootstrap_servers=self.brokers)
            await admin.start()
            try:
                return set(await admin.list_topics())
            finally:
                await admin.close()
        return asyncio.run(run())

    def alerts(self) -> list[dict[str, Any]]:
        return [json.loads(record.value) for record in self.read(self.settings['alerts_topic'])]

    def lag(self) -> int:
        """Records of the inputs, aborted ones apart, that are not committed by the group."""
        async def run() -> int:
            consumer = AIOKafkaConsumer(bootstrap_servers=self.brokers, isolation_level='read_committed')
            admin = AIOKafkaAdminClient(bootstrap_servers=self.brokers)
            await consumer.start()
            await admin.start()
            try:
                committed = await admin.list_consumer_group_offsets(self.name)
                tps = [TopicPartition(topic, number) for topic in self.inputs for number in range(self.partitions)]
                ends = await consumer.end_offsets(tps)
                return sum(ends[tp] - max(committed[tp].offset if tp in committed else 0, 0) for tp in tps)
            finally:
                await admin.close()
                await consumer.stop()
        return asyncio.run(run())

    def wait_done(self, deadline_s: float = DEADLINE_S) -> None:
        """Everything that has been published is committed."""
        def done() -> bool:
            for worker in self.workers:
                worker.check()
            return self.lag() == 0
        wait_for(done, 'lag 0', deadline_s)

    def users(self, state_dir: Path | None = None) -> dict[str, User]:
        """The records of stopped workers."""
        found = {}
        for directory in sorted((state_dir or Path(self.settings['state_dir'])).glob('users-*')):
            store = PartitionStore(directory, Memory(16, 16))
            found |= {user.user_id: user for user in store.users()}
            store.close()
        return found


class Worker:
    """`stream worker` as a process."""

    def __init__(self, settings: Mapping[str, Any], log: Path) -> None:
        self.log = log
        self.stopped = False
        command = [str(Path(sys.executable).with_name('stream')), 'worker']
        for name, value in settings.items():
            command += ['--set', f'{name}={json.dumps(value) if isinstance(value, list | dict) else value}']
        environment = {name: value for name, value in os.environ.items() if not name.startswith('STREAM_')}
        with log.open('wb') as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def said(self) -> str:
        return self.log.read_text()

    def check(self) -> None:
        """It runs, unless it was stopped here."""
        assert self.stopped or self.process.poll() is None, f'exit {self.process.returncode}:\n{self.said()[-3000:]}'

    @property
    def url(self) -> str:
        def found() -> str:
            self.check()
            return self.said().partition('health and metrics: ')[2].partition(' ')[0]
        return wait_for(found, 'the address of the admin server')

    def get(self, path: str) -> Any:
        """JSON of the admin server, whatever its status."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as answer:
            with answer:
                return json.load(answer)

    def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        with urllib.request.urlopen(self.url + '/metrics', timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(' ')[2]) for line in lines if line.split('{')[0].split(' ')[0] == name)

    def wait_ready(self) -> None:
        def ready() -> bool:
            self.check()
            return self.get('/ready')['ready']
        wait_for(ready, 'a ready worker')

    def stop(self, deadline_s: float = 30.0) -> int:
        """SIGTERM; return the exit code."""
        self.stopped = True
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(deadline_s)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self.stopped = True
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
