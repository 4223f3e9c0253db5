"""A real broker and `stream worker` processes for a bench, and measurements of them."""
import argparse
import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from stream.config import Settings
from stream.kafka.topics import changelog_topic, topic_specs
from tests.integration.running import Shop, Worker, wait_for

APPEND_TIME = {'message.timestamp.type': 'LogAppendTime'}
_TICKS_A_SECOND = os.sysconf('SC_CLK_TCK')


@contextlib.contextmanager
def broker(properties: Mapping[str, str] | None = None) -> Iterator[tuple[str, Path]]:
    """A new broker: its address, and a temporary folder for the bench."""
    from deploy.local.parts import Kafka
    with TemporaryDirectory(prefix='stream-bench-') as folder, \
            Kafka(Path(folder) / 'kafka', properties=properties) as kafka:
        yield kafka.brokers, Path(folder)


def shop(brokers: str, folder: Path, options: argparse.Namespace, **settings: Any) -> Shop:
    """A shop whose workers have default settings, except those given here and on the command line."""
    kept = ('partitions', 'session_timeout_ms', 'commit_interval_ms', 'merge_wait_ms')
    defaults = {name: Settings.model_fields[name].default for name in kept}
    given = {}
    for text in options.settings:
        name, _, value = text.partition('=')
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    return Shop(brokers, 'bench', folder, **defaults | settings | given)


def changelog_of(of: Shop) -> str:
    """Name of the shop's changelog."""
    return changelog_topic(Settings(**of.settings))


def output_topics(of: Shop) -> list[str]:
    """The topics of scores and decisions."""
    return [of.settings['alerts_topic'], *([of.settings['scores_topic']] if of.settings.get('publish') else [])]


def make_topics(of: Shop, **more: Mapping[str, str]) -> None:
    """Create the worker's topics; `more` adds to the configuration, by role (`dead_letters` for dead letters)."""
    async def make() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=of.brokers)
        await admin.start()
        try:
            answer: Any = await admin.create_topics([
                NewTopic(topic.name, of.partitions, 1, topic_configs={
                    **topic.config, **more.get(topic.role.replace(' ', '_'), {})})
                for topic in topic_specs(Settings(**of.settings))])
            for name, error_code, message in answer.topic_errors:
                assert error_code == 0, f'{name}: {message}'
        finally:
            await admin.close()
    asyncio.run(make())


@contextlib.contextmanager
def stopped(workers: Sequence[Worker]) -> Iterator[None]:
    """Stop the processes with SIGSTOP, for less than their session timeout, so that they read nothing."""
    for worker in workers:
        worker.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGCONT)


def wait_balanced(workers: Sequence[Worker], partitions: int) -> None:
    """Wait until all partitions run, spread over all workers."""
    def balanced() -> bool:
        lanes = [[lane for lane in worker.get('/status')['lanes'] if lane['state'] == 'running'] for worker in workers]
        return all(lanes) and sum(map(len, lanes)) == partitions and all(worker.get('/ready')['ready']
                                                                         for worker in workers)
    wait_for(balanced, 'partitions on every worker', 120.0)


def cpu_s(worker: Worker) -> float:
    """Seconds of CPU that the process has used."""
    return process_cpu_s(worker.process.pid)


def process_cpu_s(pid: int, proc: Path = Path('/proc')) -> float:
    """Seconds of CPU that a process has used, ended threads included."""
    fields = (proc / str(pid) / 'stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND


def wake_ups(pid: int, proc: Path = Path('/proc')) -> int:
    """How often the running threads of a process have waited for something: their voluntary context switches."""
    total = 0
    for status in (proc / str(pid) / 'task').glob('*/status'):
        with contextlib.suppress(OSError):      # a thread may end meanwhile
            total += next(int(line.split()[1]) for line in status.read_text().splitlines()
                          if line.startswith('voluntary_ctxt_switches'))
    return total


def memory_mib(worker: Worker, which: str = 'VmRSS') -> float:
    """Memory of the process: current (VmRSS) or peak (VmHWM)."""
    lines = Path(f'/proc/{worker.process.pid}/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1]) / 1024


def disk_bytes(folder: Path) -> int:
    """Bytes on disk of all files below a folder."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob('*') if path.is_file())


class Lag:
    """The lag of the group: how far its commits are behind the ends of the inputs. Keeps its connections open."""

    def __init__(self, of: Shop) -> None:
        self._of = of
        self._consumer = AIOKafkaConsumer(bootstrap_servers=of.brokers)
        self._admin = AIOKafkaAdminClient(bootstrap_servers=of.brokers)
        self._tps = [TopicPartition(topic, number) for topic in of.inputs for number in range(of.partitions)]

    async def __aenter__(self) -> Self:
        await self._consumer.start()
        await self._admin.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._admin.close()
        await self._consumer.stop()

    async def events(self) -> int:
        """Records that are not committed yet."""
        committed = await self._admin.list_consumer_group_offsets(self._of.name)
        ends = await self._consumer.end_offsets(self._tps)
        return sum(ends[tp] - max(committed[tp].offset if tp in committed else 0, 0) for tp in self._tps)


async def wait_done(of: Shop, deadline_s: float = 600.0) -> None:
    """Wait until all records of the inputs are committed. Errors: AssertionError after the deadline."""
    until = time.monotonic() + deadline_s
    async with Lag(of) as lag:
        while left := await lag.events():
            for worker in of.workers:
                worker.check()
            assert time.monotonic() < until, f'{left:,} events are left after {deadline_s:.0f} s'
            await asyncio.sleep(0.2)
