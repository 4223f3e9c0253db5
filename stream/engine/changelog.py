"""Reads changelogs back: for partitions that this worker takes over, and for those of which it keeps a copy.

A reader of its own, outside the group: nothing else moves its positions. It begins where the store stands; what arrives
is applied in blocks, records, timers and offset together. A partition is whole when the end that the changelog had when
it was taken over is reached. A copy is followed for as long as it is kept.
"""
import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiokafka
import msgspec
from aiokafka.errors import KafkaError as DriverError
from aiokafka.errors import KafkaTimeoutError

from stream.config import Settings
from stream.errors import StateError
from stream.kafka.clients import client_arguments, fetch_position
from stream.metrics import Metrics
from stream.state.store import PartitionStore

log = logging.getLogger(__name__)
POLL_MS = 200
RECORDS_MAX = 2_000
PROGRESS_S = 5.0


class Follower(msgspec.Struct):
    """A partition's store that is brought, or kept, up to date. `whole` is called once the end has been reached."""

    store: PartitionStore
    standby: bool
    whole: Callable[[], None] | None = None
    end: int = 0
    left: int = 0


class ChangelogReader:
    """Follows the changelog of some partitions at a time."""

    def __init__(self, settings: Settings, topic: str, metrics: Metrics) -> None:
        self._settings = settings
        self._topic = topic
        self._metrics = metrics
        self._followers: dict[int, Follower] = {}
        self._driver: aiokafka.AIOKafkaConsumer | None = None
        self._task: asyncio.Task | None = None
        self._stop = False

    @property
    def recovering(self) -> dict[int, int]:
        """Partitions that are not whole, and how many records they lack."""
        return {number: follower.left for number, follower in self._followers.items()
                if not follower.standby and follower.left}

    async def follow(self, followers: Mapping[int, Follower]) -> asyncio.Task:
        """Follow these partitions; `unfollow` must have been called before. The task ends only with an error."""
        if self._driver is None:
            self._driver = aiokafka.AIOKafkaConsumer(
                **client_arguments(self._settings), group_id=None, enable_auto_commit=False,
                auto_offset_reset='earliest', fetch_max_wait_ms=POLL_MS)
            await self._driver.start()
        self._followers = dict(followers)
        self._stop = False
        self._task = asyncio.create_task(self._run(self._driver), name='changelog reader')
        return self._task

    async def unfollow(self) -> None:
        """Stop following; every store is quiet when this returns."""
        self._stop = True
        if self._task is not None:
            await asyncio.wait([self._task])
            self._task = None

    async def close(self) -> None:
        """Stop, and leave Kafka."""
        await self.unfollow()
        if self._driver is not None:
            await self._driver.stop()
            self._driver = None

    async def _run(self, driver: aiokafka.AIOKafkaConsumer) -> None:
        deadline = time.monotonic() + self._settings.recovery_timeout_ms / 1000
        told_at = time.monotonic()
        sought = False
        while not self._stop:
            if sought:
                self._settle(driver)
            if not self._followers:
                return
            try:
                if not sought:
                    await self._seek(driver)
                    sought = True
                    continue
                fetched = await driver.getmany(timeout_ms=POLL_MS, max_records=RECORDS_MAX)
            except DriverError as error:
                if not (error.retriable or isinstance(error, KafkaTimeoutError)) or time.monotonic() > deadline:
                    raise
                log.warning('Reading the changelog failed: %s. It is tried again.', error)
                await asyncio.sleep(POLL_MS / 1000)
                continue
            for tp, records in fetched.items():
                follower = self._followers[tp.partition]
                run: Any = [(record.key, record.value) for record in records]
                await asyncio.to_thread(follower.store.apply, run, records[-1].offset + 1)
                self._metrics.recovery_records.inc(len(records))
            self._measure(driver)
            now = time.monotonic()
            if self.recovering and now > deadline:
                raise StateError(
                    f'The state of partitions {sorted(self.recovering)} was not read back within '
                    f'{self._settings.recovery_timeout_ms} ms, {sum(self.recovering.values())} records are left.',
                    'look at the brokers and the disk; raise recovery_timeout_ms if it was on its way; keep standbys '
                    'to have it ready.')
            if self.recovering and now - told_at > PROGRESS_S:
                told_at = now
                log.info('Reading state back: %s', ', '.join(
                    f'partition {number}: {left:,} records left' for number, left in sorted(self.recovering.items())))

    async def _seek(self, driver: aiokafka.AIOKafkaConsumer) -> None:
        """Begin where each store stands. Errors: StateError where a store is ahead of its changelog."""
        tps = {number: aiokafka.TopicPartition(self._topic, number) for number in self._followers}
        driver.assign(list(tps.values()))
        ends = await driver.end_offsets(list(tps.values()))
        begins = await driver.beginning_offsets(list(tps.values()))
        for number, follower in self._followers.items():
            tp, at = tps[number], follower.store.meta.changelog
            if at > ends[tp]:
                raise StateError(
                    f'{follower.store.directory} stands at offset {at} of {self._topic}-{number}, which ends at '
                    f'{ends[tp]}: the changelog is another one, or was cut.',
                    f'if {self._topic} is right, move {follower.store.directory} away: it is filled again from there.')
            follower.end = ends[tp]
            driver.seek(tp, max(at, begins[tp]))
        self._measure(driver)

    def _measure(self, driver: aiokafka.AIOKafkaConsumer) -> None:
        for number, follower in self._followers.items():
            tp = aiokafka.TopicPartition(self._topic, number)
            end = max(driver.highwater(tp) or 0, follower.end) if follower.standby else follower.end
            follower.left = max(end - (fetch_position(driver, tp) or 0), 0)
            gauge = self._metrics.standby_lag if follower.standby else self._metrics.recovery_left
            gauge.labels(str(number)).set(follower.left)

    def _settle(self, driver: aiokafka.AIOKafkaConsumer) -> None:
        """Let go of the partitions that are whole."""
        whole = [number for number, follower in self._followers.items()
                 if not follower.standby and follower.left == 0]
        if not whole:
            return
        followers = {number: self._followers.pop(number) for number in whole}
        kept = {aiokafka.TopicPartition(self._topic, number) for number in self._followers}
        positions = {tp: fetch_position(driver, tp) or 0 for tp in kept}
        driver.assign(list(kept)) if kept else driver.unsubscribe()
        for tp, position in positions.items():
            driver.seek(tp, position)
        for follower in followers.values():
            if follower.whole is not None:
                follower.whole()
