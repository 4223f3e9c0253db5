"""The group's consumer. It turns fetches into blocks; the lanes decide positions and commits.

Faust's own loop and its bookkeeping per message are not used, because they lose messages in three cases: a partition
leaves the active set while its records are delivered; positions advance although a delivery was cancelled; and queues
are cleared when flow resumes. A block may still get lost on its way through Faust's queues. The lane's contiguity guard
detects the gap and seeks back. Only finished steps are committed.

The consumer runs on the worker's event loop, and nothing in the worker blocks that loop for long. It polls the client
whether lanes have room or not, so the worker stays in its group even while its lanes hold their events. This module
does not know Faust. `Membership` hides what Faust does in a rebalance.
"""
import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.errors import (
    CommitFailedError,
    ConsumerStoppedError,
    IllegalStateError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)

from stream.config import Settings
from stream.engine.blocks import Block, cut
from stream.errors import StateError
from stream.kafka.clients import client_arguments, fetch_position
from stream.kafka.fetcher import LightFetcher

log = logging.getLogger(__name__)
POLL_MS = 200
NOWHERE = TopicPartition('', 0)     # no topic has this name, so a poll for it returns no records
ROOM_LOOK_MS = 10       # poll timeout while some lane has no room
REBALANCE_MORE_MS = 10_000      # added to `drain_timeout_ms`, for the commit and the group's answer


class Owner(Protocol):
    """Processes the blocks. `stream.engine.assignment.Assignment` implements it."""

    def admit(self, block: Block) -> None:
        """Take a block that was fetched."""
        ...

    async def assign(self, active: Iterable[int], standby: Iterable[int], generation: int) -> None:
        """Own the partition numbers `active` and keep copies of `standby` until the next call."""
        ...

    def wants(self, tp: TopicPartition) -> bool:
        """Whether there is room for another block of this topic partition."""
        ...

    def committable(self) -> dict[TopicPartition, int]:
        """The positions up to which everything is durable."""
        ...

    async def drain(self) -> None:
        """Finish the steps in flight, within the configured time, and start no others."""
        ...

    def committed(self, offsets: Mapping[TopicPartition, int], ok: bool) -> None:
        """Called after each attempt to commit."""
        ...

    def polled(self) -> None:
        """Called after each poll of the group's consumer."""
        ...

    def skipped(self, tp: TopicPartition, start: int, stop: int) -> None:
        """Called when the positions [start, stop) can no longer be read."""
        ...

    def fail(self, error: BaseException) -> None:
        """Called with an error that must end the worker."""
        ...


class Membership(Protocol):
    """Further actions in a rebalance of the group, called in this order."""

    def rebalance_begins(self) -> None: ...

    async def revoked(self, partitions: set[TopicPartition]) -> None: ...

    async def assigned(self, partitions: set[TopicPartition], generation: int) -> None: ...

    def rebalance_ends(self) -> None: ...


class BlockConsumer:
    """Reads the input topics as a member of the group. Set `owner` before it starts.

    positions   topic partition -> position of the next fetch; empty while the group rebalances
    starts      topic partition -> position at the start of the assignment
    epochs      topic partition -> number that changes with every seek; blocks of an older epoch are stale
    """

    owner: Owner

    def __init__(self, settings: Settings) -> None:
        self.positions: dict[TopicPartition, int] = {}
        self.starts: dict[TopicPartition, int] = {}
        self.epochs: dict[TopicPartition, int] = {}
        self._settings = settings
        self._epoch = 0
        self._last_commit: dict[TopicPartition, int] = {}
        self._committing = asyncio.Lock()
        self._driver: AIOKafkaConsumer | None = None

    @property
    def driver(self) -> AIOKafkaConsumer:
        """The aiokafka client. Errors: ConsumerStoppedError before `start`."""
        if self._driver is None:
            raise ConsumerStoppedError('the consumer has not been started')
        return self._driver

    async def start(self, assignor: Any) -> None:
        """Connect. If this member leads the group, `assignor` assigns the partitions to the members."""
        settings = self._settings
        self._driver = AIOKafkaConsumer(
            **client_arguments(settings),
            group_id=settings.group,
            group_instance_id=settings.instance_id or None,
            partition_assignment_strategy=[assignor],
            enable_auto_commit=False,
            auto_offset_reset='none',       # missing records raise an error; they are never skipped silently
            isolation_level='read_committed',
            max_poll_interval_ms=settings.max_poll_interval_ms,
            session_timeout_ms=settings.session_timeout_ms,
            # The new owner of a partition waits until the old one has drained.
            rebalance_timeout_ms=settings.drain_timeout_ms + REBALANCE_MORE_MS,
            heartbeat_interval_ms=max(settings.session_timeout_ms // 5, 100),
            fetch_max_wait_ms=POLL_MS,
        )
        await self._driver.start()
        LightFetcher.adopt(self._driver._fetcher)

    def subscribe(self, topics: Iterable[str], membership: Membership) -> None:
        """Join the group for these topics."""
        self.driver.subscribe(topics=sorted(topics), listener=RebalanceListener(self, membership))

    async def stop(self) -> None:
        """Finish the steps in flight, commit them, and leave the group."""
        if self._driver is not None:
            await self.owner.drain()
            await self.commit()
            await self._driver.stop()

    # ---- blocks ------------------------------------------------------------------------------------------------------

    async def deliver(self, to: Callable[[list[Block]], Awaitable[Any]], stopping: Callable[[], bool]) -> None:
        """Fetch, and call `to` with the blocks of each fetch, until `stopping` returns true."""
        driver, events_max = self.driver, self._settings.block_events_max
        while not stopping():
            # Records of partitions without room stay in the client, which fetches no more of them. The client is polled
            # even if no partition has room: the group must see this member, and this member must see errors.
            wanted = [tp for tp in self.positions if self.owner.wants(tp)]
            all_wanted = len(wanted) == len(self.positions)
            try:
                fetched = await driver.getmany(*([] if all_wanted else wanted or [NOWHERE]),
                                               timeout_ms=POLL_MS if all_wanted else ROOM_LOOK_MS)
            except ConsumerStoppedError:
                return
            except NoOffsetForPartitionError:
                await asyncio.sleep(POLL_MS / 10_000)       # the rebalance listener will soon seek this partition
                continue
            except OffsetOutOfRangeError as error:
                await self._out_of_range(error.args[0])
                continue
            except KafkaError as error:
                if not error.retriable:
                    raise
                log.warning('Fetching failed: %s. Retrying.', error)
                await asyncio.sleep(POLL_MS / 1000)
                continue
            self.owner.polled()
            blocks = [block for span in self._advanced(fetched) for block in cut(span, events_max)]
            if blocks:
                await to(blocks)
            await asyncio.sleep(0)

    async def _out_of_range(self, positions: Mapping[Any, int]) -> None:
        """Handle positions outside of the log. If records were deleted, report how many and go on behind them.

        Errors   StateError if a position is beyond the end: the topic was created again or truncated.
        """
        for tp, position in positions.items():
            begin = (await self.driver.beginning_offsets([tp]))[tp]
            end = (await self.driver.end_offsets([tp]))[tp]
            if self.positions.get(tp) != position:
                continue        # the position has changed in the meantime
            if not begin > position:
                raise StateError(
                    f'{tp.topic}-{tp.partition} ends at {end}, but it was read up to {position}: it is another topic '
                    'of the same name, or it was truncated.',
                    "if this is intended, reset the group's offsets and move the state directory away: its counters "
                    'belong to the old topic.')
            log.error('%s-%d: %d records from position %d on were deleted before the worker read them. They are lost. '
                      'Do: set the retention of the topic longer than any downtime of the worker.',
                      tp.topic, tp.partition, begin - position, position)
            self.owner.skipped(tp, position, begin)
            self.seek_now(tp, begin)

    def _advanced(self, fetched: Mapping[Any, Sequence[Any]]) -> list[Block]:
        """One block for each topic partition whose position has moved. A block may have no records.

        A lane may have sought back since the fetch. Then the position has not moved, and its records are dropped.
        """
        blocks = []
        for tp in list(self.positions):
            start = self.positions.get(tp)
            stop = fetch_position(self.driver, tp)
            if start is not None and stop is not None and stop != start:
                self.positions[tp] = stop
                blocks.append(Block(tp.topic, tp.partition, self.epochs[tp], start, stop, fetched.get(tp, ())))
        return blocks

    # ---- positions --------------------------------------------------------------------------------------------------

    async def committed_positions(self) -> dict[TopicPartition, int]:
        """The start position of each assigned partition: its committed position, or its beginning."""
        tps = list(self.driver.assignment())
        committed = await asyncio.gather(*(self.driver.committed(tp) for tp in tps))
        new = [tp for tp, offset in zip(tps, committed, strict=True) if offset is None]
        beginnings = await self.driver.beginning_offsets(new) if new else {}
        self._last_commit = {tp: offset for tp, offset in zip(tps, committed, strict=True) if offset is not None}
        return {tp: beginnings[tp] if offset is None else offset
                for tp, offset in zip(tps, committed, strict=True)}

    def seek_now(self, tp: TopicPartition, position: int) -> None:
        """Fetch from `position` next. Blocks that are still on their way become stale."""
        self.driver.seek(tp, position)
        self._epoch += 1
        self.positions[tp], self.epochs[tp] = position, self._epoch

    def forget_positions(self) -> None:
        """Forget the assignment, which the group has revoked."""
        self.positions.clear()
        self.starts.clear()
        self.epochs.clear()

    def end_offset(self, tp: TopicPartition) -> int | None:
        """The end of the topic partition at its last fetch, before any open transaction; None if not known."""
        return self.driver.last_stable_offset(tp) if tp in self.positions else None

    def fetched_ms_ago(self, tp: TopicPartition, now_ms: int) -> int | None:
        """How long ago a fetch of the topic partition was last answered, in ms; None if never."""
        fetched_ms = self.driver.last_poll_timestamp(tp) if tp in self.positions else None
        return None if not fetched_ms or fetched_ms < 0 else now_ms - fetched_ms

    # ---- commits ----------------------------------------------------------------------------------------------------

    async def commit(self) -> bool:
        """Commit the finished positions. After a failure, the next commit covers them as well."""
        async with self._committing:        # an older commit must not arrive after a newer one
            return await self._commit_done()

    async def _commit_done(self) -> bool:
        assigned = self.driver.assignment()
        offsets = {tp: position for tp, position in self.owner.committable().items()
                   if tp in assigned and position > self._last_commit.get(tp, -1)}
        if not offsets:
            return False
        ok = await self._commit(offsets)
        self.owner.committed(offsets, ok)
        if ok:
            self._last_commit.update(offsets)
        return ok

    async def _commit(self, offsets: Mapping[TopicPartition, int]) -> bool:
        try:
            await self.driver.commit(dict(offsets))
        except (CommitFailedError, IllegalStateError) as error:
            log.info('Offsets were not committed because the group is rebalancing: %s', error)
            return False
        except KafkaError as error:
            log.warning('Offsets were not committed: %r. The next commit will include them.', error)
            return False
        return True


class RebalanceListener(ConsumerRebalanceListener):
    """Passes the group's decisions on to the consumer and to the `Membership`."""

    def __init__(self, consumer: BlockConsumer, membership: Membership) -> None:
        self._consumer = consumer
        self._membership = membership

    async def on_partitions_revoked(  # pyright: ignore[reportIncompatibleMethodOverride] - awaited by aiokafka
        self, revoked: Iterable[TopicPartition],
    ) -> None:
        self._membership.rebalance_begins()
        self._consumer.forget_positions()
        with self._failing():
            await self._membership.revoked(set(revoked))

    async def on_partitions_assigned(  # pyright: ignore[reportIncompatibleMethodOverride] - awaited by aiokafka
        self, assigned: Iterable[TopicPartition],
    ) -> None:
        consumer = self._consumer
        coordinator: Any = consumer.driver._coordinator
        generation = coordinator.generation
        with self._failing():
            # Nothing is delivered while `positions` is empty, so lanes and queues are ready before the first block.
            consumer.starts = await consumer.committed_positions()
            await self._membership.assigned(set(assigned), generation)
            if coordinator.generation == generation:
                for tp, start in consumer.starts.items():
                    consumer.seek_now(tp, start)
        self._membership.rebalance_ends()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Make any error end the worker. aiokafka would only log it and stay in the group without lanes."""
        try:
            yield
        except Exception as error:
            self._consumer.owner.fail(error)
            raise
