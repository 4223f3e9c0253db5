"""All lanes of a worker: which partitions it owns, which it stands by for, which it is recovering, and their health.

    rebalance   First the group revokes partitions. All steps in flight are finished, within `drain_timeout_ms`, and
                committed. Stores stay open. Then the group assigns partitions. Stores of
                partitions that went elsewhere are closed. The other stores are read up to the end of their changelogs,
                and their lanes start.
    failure     The first error of a lane, of the changelog reader or of the watchdog. The worker exits with it.
"""
import asyncio
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterable, Mapping

from aiokafka import TopicPartition

from stream.core.events import Source
from stream.engine.admin import LaneState, LaneStatus, Status
from stream.engine.beat import Beats
from stream.engine.blocks import Block
from stream.engine.changelog import ChangelogReader, Follower
from stream.engine.lane import FETCH_FRESH_MS, Lane, Tools
from stream.errors import StateError
from stream.state.partition_stores import PartitionStores

log = logging.getLogger(__name__)
VERSION = importlib.metadata.version('stream-scoring')
WATCH_S = 1.0
JOIN_S_MAX = 240.0          # how long joining the group may take: other members may have to drain or time out first


class Assignment:
    """The lanes of the partitions that this worker owns, and the stores of the partitions that it stands by for."""

    def __init__(self, topics: tuple[str, str], stores: PartitionStores, reader: ChangelogReader, tools: Tools,
                 group: str, drain_timeout_ms: int, stuck_timeout_ms: int) -> None:
        self.failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.joined = False
        self._topics = topics
        self._stores = stores
        self._reader = reader
        self._tools = tools
        self._group = group
        self._drain_s = drain_timeout_ms / 1000
        self._stuck_s = stuck_timeout_ms / 1000
        self._join_s = JOIN_S_MAX + self._stuck_s
        self._lanes: dict[int, Lane] = {}
        self._beats: Beats | None = None
        self._standbys: set[int] = set()
        self._polled_at = time.monotonic()
        self._commit_failed = False
        self._retries = 0
        self._stopping = False
        self._tasks: set[asyncio.Task] = set()

    # ---- blocks and positions (the consumer's `Owner`) ---------------------------------------------------------------

    def admit(self, block: Block) -> None:
        """Pass a block to its lane. Without a lane, the block belongs to an old assignment and is dropped."""
        lane = self._lanes.get(block.partition)
        if lane is not None:
            lane.admit(block)

    def wants(self, tp: TopicPartition) -> bool:
        lane = self._lanes.get(tp.partition)
        return lane is None or lane.intake.wants(lane.intake.source(tp.topic))

    def committable(self) -> dict[TopicPartition, int]:
        return {tp: lane.done[source] for lane in self._lanes.values() for source, tp in enumerate(lane.tps)}

    def committed(self, offsets: Mapping[TopicPartition, int], ok: bool) -> None:
        metrics = self._tools.metrics
        (metrics.commits if ok else metrics.commits_failed).inc()
        self._commit_failed = not ok

    def skipped(self, tp: TopicPartition, start: int, stop: int) -> None:
        self._tools.metrics.events_lost.inc(stop - start)
        lane = self._lanes.get(tp.partition)
        if lane is not None:
            lane.intake.skip(lane.intake.source(tp.topic), start, stop)

    def polled(self) -> None:
        self._polled_at = time.monotonic()

    async def drain(self) -> None:
        """Finish the steps in flight, within the configured time, and start no others."""
        await self._reader.unfollow()
        if self._beats is not None:
            await self._beats.stop(self._drain_s)

    # ---- rebalances ------------------------------------------------------------------------------------------------

    async def assign(self, active: Iterable[int], standby: Iterable[int], generation: int) -> None:
        """Own the partitions `active` and stand by for `standby` until the next call.

        Errors   StateError if a store cannot be opened.
        """
        owned, copies = set(active), set(standby) - set(active)
        await self.drain()
        self._lanes, self._standbys = {}, copies        # so that nothing uses a store that is being closed
        self._beats = beats = Beats(self._tools)
        for number in set(self._stores.open_partitions()) - owned - copies:
            await asyncio.to_thread(self._stores.release, number)
            self._tools.metrics.revoked(self._topics, number)
        followers = {}
        for number in sorted(owned | copies):
            store = await asyncio.to_thread(self._stores.take, number)
            if number in owned:
                tps = (TopicPartition(self._topics[0], number), TopicPartition(self._topics[1], number))
                lane = self._lanes[number] = Lane(number, generation, store, self._tools, tps, beats.writer, beats.wake)
                followers[number] = Follower(store, False, self._starter(beats, lane))
            else:
                followers[number] = Follower(store, True)
        log.info('Assigned partitions %s, standby for %s (generation %d).', sorted(owned), sorted(copies), generation)
        self._tools.metrics.rebalances.inc()
        self.joined = True
        if followers and not self._stopping:
            self._watch(beats.start())
            self._watch(await self._reader.follow(followers))

    def _starter(self, beats: Beats, lane: Lane) -> Callable[[], None]:
        def start() -> None:
            if self._lanes.get(lane.number) is lane:
                beats.join(lane)
        return start

    def _watch(self, task: asyncio.Task) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the worker with this error. Only the first error counts."""
        if not self.failure.done():
            self.failure.set_result(error)

    async def close(self) -> None:
        """Drain the lanes and close every store."""
        self._stopping = True
        await self.drain()
        await self._reader.close()
        self._lanes = {}
        for number in self._stores.open_partitions():
            await asyncio.to_thread(self._stores.release, number)

    # ---- health (the admin server's `Health`) ------------------------------------------------------------------------

    async def watchdog(self) -> None:
        """Update the metrics every second. Fail the worker if a lane is stuck or Kafka is no longer polled."""
        while True:
            await asyncio.sleep(WATCH_S)
            self._measure()
            for lane in self._lanes.values():
                still_s = time.monotonic() - lane.moved_at
                if not (lane.running and lane.waiting) or lane.holding or lane.queueing:
                    lane.moved_at = time.monotonic()
                elif still_s > self._stuck_s:
                    self.fail(StateError(
                        f'Partition {lane.number} has made no progress for {still_s:.0f} s although events are '
                        'waiting.', 'restart the worker; if this happens again, report it with the log.'))
            silent_s = time.monotonic() - self._polled_at
            if silent_s > self._stuck_s and (self.joined or silent_s > self._join_s):
                self.fail(StateError(f'The worker has not polled Kafka for {silent_s:.0f} s.',
                                     'restart the worker; if this happens again, report it with the log.'))

    def _measure(self) -> None:
        metrics = self._tools.metrics
        for lane in self._lanes.values():
            for source, tp in enumerate(lane.tps):
                metrics.lag.labels(tp.topic, str(tp.partition)).set(lane.lag(Source(source)))
            metrics.users.labels(str(lane.number)).set(lane.store.meta.users)
            metrics.lane_clock_seconds.labels(str(lane.number)).set(lane.clock_ms() / 1000)
        metrics.recovering_partitions.set(len(self._reader.recovering))
        metrics.in_flight_blocks.set(sum(lane.intake.blocks for lane in self._lanes.values()))
        retries = statistics.retries if (statistics := getattr(self._tools.scorer, 'statistics', None)) else 0
        metrics.scorer_retries.inc(retries - self._retries)
        self._retries = retries
        if statistics is not None:
            metrics.scorer_breaker.state(statistics.breaker)
        metrics.scorer_holding.set(any(lane.holding for lane in self._lanes.values()))

    def live(self) -> list[str]:
        """Why the worker must be restarted; empty if it is healthy."""
        return [str(self.failure.result())] if self.failure.done() else []

    def ready(self) -> list[str]:
        """Why events are not being processed; empty if they are."""
        reasons = self.live()
        if not self.joined:
            reasons.append('the consumer group has not been joined')
        if self._commit_failed:
            reasons.append('the last commit failed')
        partitions_of: dict[str, list[int]] = {}
        for number, lane in sorted(self._lanes.items()):
            if reason := self._why_not(lane):
                partitions_of.setdefault(reason, []).append(number)
        return reasons + [f'partitions {", ".join(map(str, numbers))}: {reason}'
                          for reason, numbers in partitions_of.items()]

    def _why_not(self, lane: Lane) -> str:
        if not lane.running:
            return 'state is being restored'
        if lane.holding:
            return f'events are held: {lane.holding}'
        if stale := [tp.topic for source, tp in enumerate(lane.tps) if self._stale(lane, Source(source))]:
            return f'no answer from Kafka for {" and ".join(stale)}'
        if lane.waiting and time.monotonic() - lane.moved_at > self._stuck_s / 2:
            return f'no progress for more than {self._stuck_s / 2:.0f} s although events are waiting'
        return ''

    def _stale(self, lane: Lane, source: Source) -> bool:
        """Whether the lane has room for this source but its fetches are no longer answered."""
        ago_ms = self._tools.consumer.fetched_ms_ago(lane.tps[source], int(time.time() * 1000))
        return lane.intake.wants(source) and ago_ms is not None and ago_ms > FETCH_FRESH_MS

    def status(self) -> Status:
        """Partitions with their states and lags. Contains no data about the shop or its shoppers."""
        model = self._tools.scorer.model
        partitions = [LaneStatus(
            number, self._state(lane), lane.store.meta.lane.step,
            {tp.topic: lane.lag(Source(source)) for source, tp in enumerate(lane.tps)}, lane.clock_ms(),
            lane.store.meta.users, lane.intake.blocks) for number, lane in sorted(self._lanes.items())]
        partitions += [LaneStatus(number, 'standby') for number in sorted(self._standbys)]
        return Status(version=VERSION, group=self._group,
                      model=f'{model.name}/{model.version}', model_sha256=model.sha256, lanes=partitions)

    @staticmethod
    def _state(lane: Lane) -> LaneState:
        if lane.holding:
            return 'holding'
        return 'running' if lane.running else 'recovering'
