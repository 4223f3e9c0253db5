"""Restores stores from their changelogs, for partitions that this worker takes over and for standby copies.

The reader has a consumer of its own, outside the group, so nothing else moves its positions. It starts at each store's
changelog offset. It applies records in blocks: records, timers and offset are written together. A partition that is
being taken over is restored when its store reaches the end that the changelog had at that time. A standby copy is
followed for as long as the worker keeps it.
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
    """A store that follows its changelog.

    standby   whether the store is a standby copy, which is followed without end
    whole     called once the store has been restored; None for a standby
    end       the changelog's end offset when following began
    left      records that the store still lacks
    """

    store: PartitionStore
    standby: bool
    whole: Callable[[], None] | None = None
    end: int = 0
    left: int = 0


class ChangelogReader:
    """Follows the changelogs of a set of partitions."""

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
        """Partitions that are being restored -> how many records they still lack."""
        return {number: follower.left for number, follower in self._followers.items()
                if not follower.standby and follower.left}

    async def follow(self, followers: Mapping[int, Follower]) -> asyncio.Task:
        """Follow these partitions until `unfollow`, which must also be called before the next `follow`.

        Returns the reader's task, which raises if reading or restoring fails.
        """
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
        """Stop following. After the return, nothing writes to the stores."""
        self._stop = True
        if self._task is not None:
            await asyncio.wait([self._task])
            self._task = None

    async def close(self) -> None:
        """Stop following and disconnect from Kafka."""
        await self.unfollow()
        if self._driver is not None:
            await self._driver.stop()
            self._driver = None

    async def _run(self, driver: aiokafka.AIOKafkaConsumer) -> None:
        deadline = time.monotonic() + self._settings.recovery_timeout_ms / 1000
        logged_at = time.monotonic()
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
                log.warning('Reading the changelog failed: %s. Retrying.', error)
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
                    f'The state of partitions {sorted(self.recovering)} was not restored within '
                    f'{self._settings.recovery_timeout_ms} ms, {sum(self.recovering.values())} records are left.',
                    'check the brokers and the disk; if the restore was only slow, raise recovery_timeout_ms, or '
                    'set standbys so that another worker has a copy ready.')
            if self.recovering and now - logged_at > PROGRESS_S:
                logged_at = now
                log.info('Restoring state: %s', ', '.join(
                    f'partition {number}: {left:,} records left' for number, left in sorted(self.recovering.items())))

    async def _seek(self, driver: aiokafka.AIOKafkaConsumer) -> None:
        """Seek to each store's changelog offset. Errors: StateError if a store is ahead of its changelog."""
        tps = {number: aiokafka.TopicPartition(self._topic, number) for number in self._followers}
        driver.assign(list(tps.values()))
        ends = await driver.end_offsets(list(tps.values()))
        begins = await driver.beginning_offsets(list(tps.values()))
        for number, follower in self._followers.items():
            tp, at = tps[number], follower.store.meta.changelog
            if at > ends[tp]:
                raise StateError(
                    f'{follower.store.directory} stands at offset {at} of {self._topic}-{number}, which ends at '
                    f'{ends[tp]}: the store belongs to another changelog, or the changelog was truncated.',
                    f'if {self._topic} is the right topic, move {follower.store.directory} away; the worker restores '
                    'it from the changelog.')
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
        """Stop following the partitions that are restored."""
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
