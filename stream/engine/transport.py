"""The Faust transport `blocks://`: fetches become blocks, and the drain loop, tracking and commits are our own.

Faust's own loop and its bookkeeping per message are replaced, since they lose blocks: a partition that leaves the
active set while its records are delivered, positions that move although delivery was cancelled, queues that are cleared
when flow resumes. Here a block may still get lost on its way through Faust's queues; the lane's contiguity guard sees
that and seeks back. What a lane has not admitted is not tracked, and what it has not finished is not committed.

The consumer runs on the event loop of the worker (not in Faust's thread): nothing of the worker blocks it, and a
client is polled whether lanes have room or not, so that the worker stays in its group for as long as it holds.
"""
import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import aiokafka
import msgspec
from aiokafka.consumer.fetcher import Fetcher as ClientFetcher
from aiokafka.consumer.fetcher import FetchResult
from aiokafka.errors import (
    CommitFailedError,
    ConsumerStoppedError,
    IllegalStateError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)
from faust.exceptions import ConsumerNotStarted
from faust.transport.consumer import Consumer as FaustConsumer
from faust.transport.consumer import Fetcher as FaustFetcher
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, AppT
from faust.types.tuples import ConsumerMessage
from mode import Service

from stream.config import Settings
from stream.engine.blocks import Block, cut
from stream.errors import StateError
from stream.kafka.clients import client_arguments, fetch_position

log = logging.getLogger(__name__)
POLL_MS = 200
NOWHERE = aiokafka.TopicPartition('', 0)     # no topic has this name: of it nothing comes
ROOM_LOOK_MS = 10        # while a lane has no room, until one may have
REBALANCE_MORE_MS = 10_000      # beyond `drain_timeout_ms`: for the commit, and for the group to answer
BATCH_BYTES_MAX = 900_000       # below the broker's default for one batch, 1 MiB
REQUEST_BYTES_MAX = 4 << 20


class Owner(Protocol):
    """Whoever processes the blocks; `stream.engine.assignment.Lanes`."""

    def wants(self, tp: TP) -> bool:
        """Whether it has room for another block of this topic partition."""
        ...

    def committable(self) -> dict[TP, int]:
        """The positions up to which everything is durable."""
        ...

    async def drain(self) -> None:
        """End the steps in flight, within the configured time, and begin no other."""
        ...

    def committed(self, offsets: Mapping[TP, int], ok: bool) -> None:
        """Told of each try to commit."""
        ...

    def polled(self) -> None:
        """Told whenever the group's consumer has been polled."""
        ...

    def skipped(self, tp: TP, start: int, stop: int) -> None:
        """Told of positions that can no longer be read."""
        ...

    def fail(self, error: BaseException) -> None:
        """Told of what the worker cannot go on after."""
        ...


class Runtime(msgspec.Struct):
    """What an app carries for its parts: `app.runtime`."""

    settings: Settings
    owner: Any = None


def runtime(app: AppT) -> Runtime:
    """The runtime of a worker's app."""
    found: Runtime = getattr(app, 'runtime')  # noqa: B009 - Faust's app type knows no such attribute
    return found


class RebalanceListener(aiokafka.abc.ConsumerRebalanceListener):
    """Passes the group's decisions on to Faust, in the order that it needs."""

    def __init__(self, consumer: 'Consumer') -> None:
        self._consumer = consumer

    async def on_partitions_revoked(  # pyright: ignore[reportIncompatibleMethodOverride] - awaited by aiokafka
        self, revoked: Iterable[Any],
    ) -> None:
        consumer = self._consumer
        consumer.app.on_rebalance_start()
        consumer.forget_positions()
        with self._failing():
            await consumer.on_partitions_revoked({TP(tp.topic, tp.partition) for tp in revoked})

    async def on_partitions_assigned(  # pyright: ignore[reportIncompatibleMethodOverride] - awaited by aiokafka
        self, assigned: Iterable[Any],
    ) -> None:
        consumer = self._consumer
        tps = {TP(tp.topic, tp.partition) for tp in assigned}
        coordinator: Any = consumer.driver._coordinator
        generation = coordinator.generation
        consumer.app.consumer_generation_id = generation
        with self._failing():
            # Nothing is delivered while `positions` is empty: lanes, and Faust's way to them, have to be there first.
            consumer.starts = await consumer.committed_positions()
            await consumer.on_partitions_assigned(tps, generation)
            if coordinator.generation == generation:
                for tp, start in consumer.starts.items():
                    consumer.seek_now(tp, start)
        consumer.app.on_rebalance_end()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Whatever goes wrong ends the worker: aiokafka would log it, and keep the member without its lanes."""
        try:
            yield
        except Exception as error:
            self._consumer.owner.fail(error)
            raise


class LightFetcher(ClientFetcher):
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


class Consumer(FaustConsumer):
    """The group's consumer, which delivers blocks."""

    consumer_stopped_errors = (ConsumerStoppedError,)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        carried = runtime(self.app)
        self._settings = carried.settings
        self.positions: dict[TP, int] = {}      # where the next fetch of a topic partition begins
        self.starts: dict[TP, int] = {}         # where the assignment began: fetches may have moved on since
        self.epochs: dict[TP, int] = {}         # changes with every seek: what was fetched before is worthless
        self._epoch = 0
        self._last_commit: dict[TP, int] = {}
        self._committing = asyncio.Lock()
        self._driver: aiokafka.AIOKafkaConsumer | None = None

    @property
    def driver(self) -> aiokafka.AIOKafkaConsumer:
        """The client that reads. Errors: ConsumerNotStarted before `on_start`."""
        if self._driver is None:
            raise ConsumerNotStarted('the consumer has not been started')
        return self._driver

    @property
    def owner(self) -> Owner:
        return runtime(self.app).owner

    # -- life

    async def on_start(self) -> None:
        settings = self._settings
        self._driver = aiokafka.AIOKafkaConsumer(
            **client_arguments(settings),
            group_id=settings.group,
            group_instance_id=settings.instance_id or None,
            partition_assignment_strategy=[self.app.assignor],
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

    async def on_stop(self) -> None:
        if self._driver is not None:
            await self.owner.drain()
            await self.commit()
            await self._driver.stop()

    async def subscribe(self, topics: Iterable[str]) -> None:
        self.driver.subscribe(topics=sorted(topics), listener=RebalanceListener(self))

    def close(self) -> None:
        """Everything is closed in `on_stop`."""

    # -- the drain loop

    async def _drain_messages(self, fetcher: Any) -> None:
        driver, events_max = self.driver, self._settings.block_events_max
        while not (self.should_stop or fetcher.should_stop):
            # What has come of partitions without room stays with the client, and nothing more of them is fetched. The
            # client is asked even where none has room: the group has to see this member, and this member its errors.
            wanted = [_driver_tp(tp) for tp in self.positions if self.owner.wants(tp)]
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
                    await self.callback(self._message(block))
            await asyncio.sleep(0)

    async def _out_of_range(self, positions: Mapping[Any, int]) -> None:
        """Records were deleted before they were read: told, with their number. Or the topic is another one: fatal."""
        for driver_tp, position in positions.items():
            tp = TP(driver_tp.topic, driver_tp.partition)
            begin = (await self.driver.beginning_offsets([driver_tp]))[driver_tp]
            end = (await self.driver.end_offsets([driver_tp]))[driver_tp]
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
        records_of = {(tp.topic, tp.partition): records for tp, records in fetched.items()}
        blocks = []
        for tp in list(self.positions):
            start = self.positions.get(tp)
            stop = fetch_position(self.driver, tp)
            if start is not None and stop is not None and stop != start:
                self.positions[tp] = stop
                blocks.append(Block(tp.topic, tp.partition, self.epochs[tp], start, stop,
                                    records_of.get((tp.topic, tp.partition), ())))
        return blocks

    def _message(self, block: Block) -> ConsumerMessage:
        carried: Any = block        # where Faust expects bytes; `BlockSchema` takes it out again
        message = ConsumerMessage(
            block.topic, block.partition, block.start, 0.0, 0, None, None, carried, None, 0, 0,
            TP(block.topic, block.partition), generation_id=self.app.consumer_generation_id)
        message.tracked = True      # tracked by the lane that admits it, not by Faust
        return message

    # -- positions

    async def committed_positions(self) -> dict[TP, int]:
        """Where each assigned partition goes on: its committed position, or its beginning."""
        tps = list(self.driver.assignment())
        committed = await asyncio.gather(*(self.driver.committed(tp) for tp in tps))
        new = [tp for tp, offset in zip(tps, committed, strict=True) if offset is None]
        beginnings = await self.driver.beginning_offsets(new) if new else {}
        self._last_commit = {TP(tp.topic, tp.partition): offset
                             for tp, offset in zip(tps, committed, strict=True) if offset is not None}
        return {TP(tp.topic, tp.partition): beginnings[tp] if offset is None else offset
                for tp, offset in zip(tps, committed, strict=True)}

    async def _seek(self, partition: TP, offset: int) -> None:
        self.seek_now(partition, offset)

    def seek_now(self, tp: TP, position: int) -> None:
        """Fetch from `position` next; blocks that are on their way are of an old epoch."""
        self.driver.seek(_driver_tp(tp), position)
        self._epoch += 1
        self.positions[tp], self.epochs[tp] = position, self._epoch

    def forget_positions(self) -> None:
        """The assignment is gone."""
        self.positions.clear()
        self.starts.clear()
        self.epochs.clear()

    def end_offset(self, tp: TP) -> int | None:
        """Where the topic partition ended at its last fetch, open transactions apart; None: not known."""
        return self.driver.last_stable_offset(_driver_tp(tp)) if tp in self.positions else None

    def fetched_ms_ago(self, tp: TP, now_ms: int) -> int | None:
        """How long ago a fetch of the topic partition was answered; None: never."""
        fetched_ms = self.driver.last_poll_timestamp(_driver_tp(tp)) if tp in self.positions else None
        return None if not fetched_ms or fetched_ms < 0 else now_ms - fetched_ms

    def assignment(self) -> set[TP]:
        """Errors: ConsumerNotStarted, which Faust knows what to do with."""
        return {TP(tp.topic, tp.partition) for tp in self.driver.assignment()}

    # -- commits

    async def commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
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

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        try:
            await self.driver.commit({_driver_tp(tp): position for tp, position in offsets.items()})
        except (CommitFailedError, IllegalStateError) as error:
            log.info('Offsets were not committed, the group is rebalancing: %s', error)
            return False
        except KafkaError as error:
            log.warning('Offsets were not committed: %r. They will be, with the next commit.', error)
            return False
        return True

    async def wait_empty(self) -> None:
        """Called by Faust when partitions are taken away: end what is in flight, commit it."""
        await self.owner.drain()
        await self.commit()

    async def verify_all_partitions_active(self) -> None:
        """Faust only logs what it finds; `Lanes` has a watchdog that exits."""

    # -- what Faust asks for and this worker does without

    async def perform_seek(self) -> None:
        raise NotImplementedError('positions are set when partitions are assigned')

    async def seek_to_committed(self) -> Mapping[TP, int]:
        raise NotImplementedError('positions are set when partitions are assigned')

    async def create_topic(self, *args: Any, **kwargs: Any) -> None:
        """Topics are made and checked before the app starts."""

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> Any:
        raise NotImplementedError('the drain loop fetches by itself')

    def _to_message(self, tp: TP, record: Any) -> ConsumerMessage:
        raise NotImplementedError('records travel in blocks')

    def _new_topicpartition(self, topic: str, partition: int) -> TP:
        return TP(topic, partition)

    def highwater(self, tp: TP) -> int:
        return self.end_offset(tp) or 0

    async def highwaters(self, *partitions: TP) -> MutableMapping[TP, int]:
        raise NotImplementedError('changelogs have a reader of their own')

    async def earliest_offsets(self, *partitions: TP) -> MutableMapping[TP, int]:
        raise NotImplementedError('changelogs have a reader of their own')

    async def position(self, tp: TP) -> int | None:
        return self.positions.get(tp)

    async def seek_wait(self, partitions: Mapping[TP, int]) -> None:
        for tp, position in partitions.items():
            self.seek_now(tp, position)

    def topic_partitions(self, topic: str) -> int | None:
        return len(self.driver.partitions_for_topic(topic) or ()) or None

    def key_partition(self, topic: str, key: bytes | None, partition: int | None = None) -> int | None:
        return partition


class Fetcher(FaustFetcher):
    """Runs the drain loop, and ends with it, whether the group rebalances or not."""

    @Service.task
    async def _fetcher(self) -> None:
        try:
            consumer: Any = self.app.consumer
            await consumer._drain_messages(self)
        finally:
            self.set_shutdown()


class Producer(driver.Producer):
    """Faust's producer with our settings: idempotent, all replicas acknowledge."""

    def _settings_default(self) -> Mapping[str, Any]:
        settings = runtime(self.app).settings
        return {
            **client_arguments(settings),
            'acks': 'all',
            'enable_idempotence': True,
            'linger_ms': 0,
            'max_batch_size': BATCH_BYTES_MAX,
            'max_request_size': REQUEST_BYTES_MAX,
            'request_timeout_ms': settings.send_timeout_ms,
        }

    def _settings_auth(self) -> Mapping[str, Any]:
        return {}

    def _settings_extra(self) -> Mapping[str, Any]:
        return {}

    @property
    def driver(self) -> aiokafka.AIOKafkaProducer:
        """The client that sends."""
        return self._ensure_producer()

    async def create_topic(self, *args: Any, **kwargs: Any) -> None:
        """Topics are made and checked before the app starts."""


class Transport(driver.Transport):
    """Registered as `blocks` among Faust's transports."""

    Consumer = Consumer
    Fetcher = Fetcher
    Producer = Producer


def _driver_tp(tp: TP) -> Any:
    return aiokafka.TopicPartition(tp.topic, tp.partition)

