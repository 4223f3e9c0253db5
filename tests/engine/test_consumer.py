"""The group's consumer with a fake client: positions, commits and missing records."""
import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition

from stream.config import Settings
from stream.engine import worker
from stream.engine.consumer import BlockConsumer
from stream.errors import KafkaError, StateError

CLICKS = TopicPartition('clicks', 0)


class FakeDriver:
    """An aiokafka consumer with one partition, whose beginning and end the test sets."""

    def __init__(self, begin: int = 0, end: int = 100) -> None:
        self.begin, self.end, self.sought = begin, end, []
        self.commits: list[int] = []
        self.gates: list[asyncio.Event] = []

    def assignment(self) -> set[Any]:
        return {CLICKS}

    async def commit(self, offsets: dict[Any, int]) -> None:
        if self.gates:
            await self.gates.pop().wait()       # aiokafka retries a commit with its original offsets
        self.commits += offsets.values()

    async def beginning_offsets(self, tps: list[Any]) -> dict[Any, int]:
        return dict.fromkeys(tps, self.begin)

    async def end_offsets(self, tps: list[Any]) -> dict[Any, int]:
        return dict.fromkeys(tps, self.end)

    def seek(self, tp: Any, position: int) -> None:
        self.sought.append(position)


def consumer_on(driver: FakeDriver, owner: Any) -> BlockConsumer:
    made: Any = BlockConsumer(Settings())
    made._driver, made.owner = driver, owner
    made.positions, made.starts, made.epochs = {CLICKS: 10}, {CLICKS: 10}, {CLICKS: 1}
    return made


def test_a_commit_that_is_tried_again_does_not_undo_a_later_one():
    async def run() -> None:
        driver, gate = FakeDriver(), asyncio.Event()
        driver.gates.append(gate)
        owner = SimpleNamespace(done=5, committed=lambda *_: None)
        owner.committable = lambda: {CLICKS: owner.done}
        consumer = consumer_on(driver, owner)
        first = asyncio.create_task(consumer.commit())
        await asyncio.sleep(0)
        owner.done = 9
        second = asyncio.create_task(consumer.commit())
        await asyncio.sleep(0)
        gate.set()
        assert await asyncio.gather(first, second) == [True, True]
        assert driver.commits == [5, 9]
        assert not await consumer.commit()      # nothing new
    asyncio.run(run())


def test_records_that_were_deleted_unread_are_counted_and_passed_over(caplog: pytest.LogCaptureFixture):
    skipped = []
    driver = FakeDriver(begin=35)
    consumer = consumer_on(driver, SimpleNamespace(skipped=lambda *what: skipped.append(what)))
    asyncio.run(consumer._out_of_range({CLICKS: 10}))
    assert skipped == [(CLICKS, 10, 35)]
    assert driver.sought == [35]
    assert '25 records' in caplog.text


def test_a_topic_that_ends_before_what_was_read_is_refused():
    consumer = consumer_on(FakeDriver(end=4), SimpleNamespace())
    with pytest.raises(StateError, match='another topic'):
        asyncio.run(consumer._out_of_range({CLICKS: 10}))


def test_a_worker_whose_broker_has_gone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The broker goes away between the check of the topics and the start of the app."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    settings = Settings(brokers=f'127.0.0.1:{port}', scorer='constant', state_dir=tmp_path, admin_port=0)

    async def topics(_: Settings) -> Any:
        return SimpleNamespace(warnings=[], found={settings.clicks_topic: SimpleNamespace(partitions=1)})

    monkeypatch.setattr(worker, 'ensure_topics', topics)
    with pytest.raises(KafkaError, match='Joining the group'):
        asyncio.run(asyncio.wait_for(worker.run(settings), 60))
