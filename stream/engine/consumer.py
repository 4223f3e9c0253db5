"""The group's consumer: fetches become blocks, and positions and commits are the lanes' own.

Faust's loop and its bookkeeping per message are not used, since they lose blocks: a partition that leaves the active
set while its records are delivered, positions that move although delivery was cancelled, queues that are cleared when
flow resumes. Here a block may still get lost on its way through Faust's queues; the lane's contiguity guard sees that
and seeks back. What a lane has not admitted is not tracked, and what it has not finished is not committed.

The consumer runs on the event loop of the worker: nothing of the worker blocks it, and the client is polled whether
lanes have room or not, so that the worker stays in its group for as long as it holds. Nothing here knows Faust: what it
does with a rebalance is behind `Membership`.
"""
import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.consumer.fetcher import Fetcher, FetchResult
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

log = logging.getLogger(__name__)
POLL_MS = 200
NOWHERE = TopicPartition('', 0)     # no topic has this name: of it nothing comes
ROOM_LOOK_MS = 10       # while a lane has no room, until one may have
REBALANCE_MORE_MS = 10_000      # beyond `drain_timeout_ms`: for the commit, and for the group to answer


class Owner(Protocol):
    """Whoever processes the blocks; `stream.engine.assignment.Assignment`."""

    def admit(self, block: Block) -> None:
        """Take a block that was fetched."""
        ...

    async def assign(self, active: Iterable[int], standby: Iterable[int], generation: int) -> None:
        """Own these partition numbers, and keep copies of those, until the next call."""
        ...

    def wants(self, tp: TopicPartition) -> bool:
        """Whether it has room for another block of this topic partition."""
        ...

    def committable(self) -> dict[TopicPartition, int]:
        """The positions up to which everything is durable."""
        ...

    async def drain(self) -> None:
        """End the steps in flight, within the configured time, and begin no other."""
        ...

    def committed(self, offsets: Mapping[TopicPartition, int], ok: bool) -> None:
        """Told of each try to commit."""
        ...

    def polled(self) -> None:
        """Told whenever the group's consumer has been polled."""
        ...

    def skipped(self, tp: TopicPartition, start: int, stop: int) -> None:
        """Told of positions that can no longer be read."""
        ...

    def fail(self, error: BaseException) -> None:
        """Told of what the worker cannot go on after."""
        ...


class Membership(Protocol):
    """What else has to happen when the group rebalances, in this order."""

    def rebalance_begins(self) -> None: ...

    async def revoked(self, partitions: set[TopicPartition]) -> None: ...

    async def assigned(self, partitions: set[TopicPartition], generation: int) -> None: ...

    def rebalance_ends(self) -> None: ...


class LightFetcher(Fetcher):
    """Hands out records as they were parsed: making a `ConsumerRecord` of each would take longer than folding it."""

    async def _proc_fetch_request(self, assignment: Any, node_id: Any, request: Any) -> Any:
        woken = await super()._proc_fetch_request(assignment, node_id, request)
        results: Any = self._records.values()
        for result in results:
            if isinstance(result, FetchResult) and result.has_more():
                parsed: Any = result._partition_records
                parsed._consumer_record = _as_parsed
        return woken


def _as_parsed(tp: Any, record: Any) -> Any:
    return record


class BlockConsumer:
    """Reads the input topics as a member of the group. Set `owner` before it starts.

    positions   where the next fetch of a topic partition begins; empty while the group rebalances
    starts      where the assignment began: fetches may have moved on since
    epochs      changes with every seek: what was fetched before is worthless
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
        """The client. Errors: ConsumerStoppedError before `start`."""
        if self._driver is None:
            raise ConsumerStoppedError('the consumer has not been started')
        return self._driver

    async def start(self, assignor: Any) -> None:
        """Connect. `assignor` decides who gets which partitions, should this member lead the group."""
        settings = self._settings
        self._driver = AIOKafkaConsumer(
            **client_arguments(settings),
            group_id=settings.group,
            group_instance_id=settings.instance_id or None,
            partition_assignment_strategy=[assignor],
            enable_auto_commit=False,
            auto_offset_reset='none',       # what is missing is told, not passed over
            isolation_level='read_committed',
            max_poll_interval_ms=settings.max_poll_interval_ms,
            session_timeout_ms=settings.session_timeout_ms,
            # Whoever gets a partition waits until its owner has drained.
            rebalance_timeout_ms=settings.drain_timeout_ms + REBALANCE_MORE_MS,
            heartbeat_interval_ms=max(settings.session_timeout_ms // 5, 100),
            fetch_max_wait_ms=POLL_MS,
        )
        await self._driver.start()
        fetcher: Any = self._driver._fetcher
        fetcher.__class__ = LightFetcher        # the client makes its fetcher itself

    def subscribe(self, topics: Iterable[str], membership: Membership) -> None:
        """Join the group for these topics."""
        self.driver.subscribe(topics=sorted(topics), listener=RebalanceListener(self, membership))

    async def stop(self) -> None:
        """End the steps in flight, commit them, and leave."""
        if self._driver is not None:
            await self.owner.drain()
            await self.commit()
            await self._driver.stop()

    # ---- blocks ------------------------------------------------------------------------------------------------------

    async def deliver(self, to: Callable[[Block], Awaitable[Any]], stopping: Callable[[], bool]) -> None:
        """Fetch, and hand over each block, until told to stop."""
        driver, events_max = self.driver, self._settings.block_events_max
        while not stopping():
            # What has come of partitions without room stays with the client, and nothing more of them is fetched. The
            # client is asked even where none has room: the group has to see this member, and this member its errors.
            wanted = [tp for tp in self.positions if self.owner.wants(tp)]
            all_wanted = len(wanted) == len(self.positions)
            try:
                fetched = await driver.getmany(*(wanted or ([] if all_wanted else [NOWHERE])),
                                               timeout_ms=POLL_MS if all_wanted else ROOM_LOOK_MS)
            except ConsumerStoppedError:
                return
            except NoOffsetForPartitionError:
                await asyncio.sleep(POLL_MS / 10_000)       # without a commit it is sought to its beginning, soon
                continue
            except OffsetOutOfRangeError as error:
                await self._out_of_range(error.args[0])
                continue
            except KafkaError as error:
                if not error.retriable:
                    raise
                log.warning('Fetching failed: %s. It is tried again.', error)
                await asyncio.sleep(POLL_MS / 1000)
                continue
            self.owner.polled()
            for span in self._advanced(fetched):
                for block in cut(span, events_max):
                    await to(block)
            await asyncio.sleep(0)

    async def _out_of_range(self, positions: Mapping[Any, int]) -> None:
        """Records were deleted before they were read: told, with their number. Or the topic is another one: fatal."""
        for tp, position in positions.items():
            begin = (await self.driver.beginning_offsets([tp]))[tp]
            end = (await self.driver.end_offsets([tp]))[tp]
            if self.positions.get(tp) != position:
                continue        # it has been sought elsewhere
            if not begin > position:
                raise StateError(
                    f'{tp.topic}-{tp.partition} ends at {end}, and was read up to {position}: it is another topic, or '
                    'was cut.', "if it is meant so, reset the group's offsets and move the state away: what is counted "
                                'there belongs to the old one.')
            log.error('%s-%d: %d records from position %d on were deleted before they were read. They are lost. '
                      'Do: keep the topic for longer than the worker may be away.',
                      tp.topic, tp.partition, begin - position, position)
            self.owner.skipped(tp, position, begin)
            self.seek_now(tp, begin)

    def _advanced(self, fetched: Mapping[Any, Sequence[Any]]) -> list[Block]:
        """What was fetched of each topic partition whose position has moved, as one block; it may have no records.

        A partition that a lane sought back in the meantime has not moved: what was fetched of it is dropped here.
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
        """Where each assigned partition goes on: its committed position, or its beginning."""
        tps = list(self.driver.assignment())
        committed = await asyncio.gather(*(self.driver.committed(tp) for tp in tps))
        new = [tp for tp, offset in zip(tps, committed, strict=True) if offset is None]
        beginnings = await self.driver.beginning_offsets(new) if new else {}
        self._last_commit = {tp: offset for tp, offset in zip(tps, committed, strict=True) if offset is not None}
        return {tp: beginnings[tp] if offset is None else offset
                for tp, offset in zip(tps, committed, strict=True)}

    def seek_now(self, tp: TopicPartition, position: int) -> None:
        """Fetch from `position` next; blocks that are on their way are of an old epoch."""
        self.driver.seek(tp, position)
        self._epoch += 1
        self.positions[tp], self.epochs[tp] = position, self._epoch

    def forget_positions(self) -> None:
        """The assignment is gone."""
        self.positions.clear()
        self.starts.clear()
        self.epochs.clear()

    def end_offset(self, tp: TopicPartition) -> int | None:
        """Where the topic partition ended at its last fetch, open transactions apart; None: not known."""
        return self.driver.last_stable_offset(tp) if tp in self.positions else None

    def fetched_ms_ago(self, tp: TopicPartition, now_ms: int) -> int | None:
        """How long ago a fetch of the topic partition was answered; None: never."""
        fetched_ms = self.driver.last_poll_timestamp(tp) if tp in self.positions else None
        return None if not fetched_ms or fetched_ms < 0 else now_ms - fetched_ms

    # ---- commits ----------------------------------------------------------------------------------------------------

    async def commit(self) -> bool:
        """Commit what is done. A commit that fails is tried again at the next turn, with what is done by then."""
        async with self._committing:        # an older one that is tried again must not land last
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
            log.info('Offsets were not committed, the group is rebalancing: %s', error)
            return False
        except KafkaError as error:
            log.warning('Offsets were not committed: %r. They will be, with the next commit.', error)
            return False
        return True


class RebalanceListener(ConsumerRebalanceListener):
    """Passes the group's decisions on."""

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
            # Nothing is delivered while `positions` is empty: lanes, and the way to them, have to be there first.
            consumer.starts = await consumer.committed_positions()
            await self._membership.assigned(set(assigned), generation)
            if coordinator.generation == generation:
                for tp, start in consumer.starts.items():
                    consumer.seek_now(tp, start)
        self._membership.rebalance_ends()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Whatever goes wrong ends the worker: aiokafka would log it, and keep the member without its lanes."""
        try:
            yield
        except Exception as error:
            self._consumer.owner.fail(error)
            raise
