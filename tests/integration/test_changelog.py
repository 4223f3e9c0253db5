"""The reader of changelogs on a real broker: owners are brought up to date and let go, copies are followed."""
import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from deploy.local.parts import Kafka
from stream.config import Settings
from stream.core.user import User, encode
from stream.engine import changelog
from stream.engine.changelog import ChangelogReader, Follower
from stream.errors import StateError
from stream.metrics import Metrics
from stream.state.store import Memory, PartitionStore


async def create(brokers: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=brokers)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 2, 1)])
    await admin.close()


async def append(brokers: str, topic: str, partition: int, first: int, count: int) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=brokers)
    await producer.start()
    for number in range(first, first + count):
        user = User(f'u{number}')
        user.step = user.applied = number + 1
        user.due_ms = 1000 + number
        await producer.send(topic, encode(user), key=user.user_id.encode(), partition=partition)
    await producer.stop()


async def until(condition: Callable[[], Any], task: asyncio.Task | None = None) -> None:
    async with asyncio.timeout(30):
        while not condition() and not (task and task.done()):
            await asyncio.sleep(.01)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def test_an_owner_is_let_go_at_the_end_and_a_copy_is_followed(kafka: Kafka, tmp_path: Path):
    async def go() -> None:
        await create(kafka.brokers, 'read-back')
        await append(kafka.brokers, 'read-back', 0, 0, 30)
        await append(kafka.brokers, 'read-back', 1, 0, 10)
        memory, whole = Memory(16, 16), []
        owned = PartitionStore(tmp_path / 'users-0', memory)
        copied = PartitionStore(tmp_path / 'users-1', memory)
        reader = ChangelogReader(Settings(brokers=kafka.brokers), 'read-back', Metrics())
        try:
            await reader.follow({0: Follower(owned, False, lambda: whole.append(0)), 1: Follower(copied, True)})
            await until(lambda: whole)
            assert owned.meta.changelog == owned.meta.users == 30
            assert owned.due(1_004, 10) == ['u0', 'u1', 'u2', 'u3', 'u4']
            await append(kafka.brokers, 'read-back', 1, 10, 5)      # its owner goes on
            await append(kafka.brokers, 'read-back', 0, 30, 5)      # ours would be our own doing
            await until(lambda: copied.meta.changelog == 15)
            assert copied.due(9_999, 99) == [f'u{number}' for number in range(15)]
            assert owned.meta.changelog == 30
        finally:
            await reader.close()
    run(go)


def test_a_recovery_that_takes_too_long_is_an_error_that_says_how_far_it_came(
        kafka: Kafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(changelog, 'RECORDS_MAX', 1)

    async def go() -> None:
        await create(kafka.brokers, 'too-slow')
        await append(kafka.brokers, 'too-slow', 0, 0, 30)
        reader = ChangelogReader(Settings(brokers=kafka.brokers, recovery_timeout_ms=0), 'too-slow', Metrics())
        try:
            task = await reader.follow({0: Follower(PartitionStore(tmp_path / 'users-0', Memory(16, 16)), False)})
            await until(task.done)
            error = task.exception()
            assert isinstance(error, StateError)
            assert '29 records are left' in error.problem
        finally:
            await reader.close()
    run(go)
