"""Everything that the worker uses of Faust.

Faust runs one app with one agent, which consumes both input topics. Faust's assignor assigns the inputs, the table of
users and its standby copies together. Faust starts, stops and supervises these services.

Other modules do the rest: `consumer` fetches, tracks and commits blocks, `lane` folds events and sends records, and
`changelog` restores state. Faust's web server and its replies to record headers are switched off. Faust's usual way,
one message per record, is slow, and it can lose records: see "What Faust does" in stream/README.md.

The agent's `async for` iterates over blocks, one Faust message each. A class here either connects a Faust interface to
the worker's code, or switches off something that Faust would do by itself. A method that switches something off says so
in one line.
"""
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, cast

import faust
from aiokafka import TopicPartition
from aiokafka.errors import ConsumerStoppedError
from faust.app.base import BootStrategy
from faust.exceptions import ConsumerNotStarted
from faust.stores.base import Store
from faust.tables.manager import TableManager as FaustTableManager
from faust.transport.consumer import Consumer as FaustConsumer
from faust.transport.consumer import Fetcher as FaustFetcher
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, AppT, CollectionT, Message
from faust.types.tuples import ConsumerMessage
from mode import Service
from mode.types import ServiceT

from stream.config import Settings
from stream.core.user import User
from stream.engine.blocks import Block
from stream.engine.consumer import BlockConsumer
from stream.kafka.clients import bootstrap_servers
from stream.state.partition_stores import PartitionStores

TABLE = 'users'


# ---- the app --------------------------------------------------------------------------------------------------------

class Boot(BootStrategy):
    """Starts only the services that the worker needs: no web server, leader topic, producer or reply consumer."""

    def server(self) -> Iterable[ServiceT]:
        app = cast(Any, self.app)
        return [app.consumer, app.agents, app.topics, app.tables]


class App(faust.App):
    """A Faust app with the worker's own consumer and stores."""

    BootStrategy = Boot
    settings: Settings
    blocks: BlockConsumer
    stores: PartitionStores

    def _create_directories(self) -> None:
        """Switched off: the stores create their own directories."""

    async def _on_agent_error(self, agent: Any, exc: BaseException) -> None:
        self.blocks.owner.fail(exc)     # Faust would restart the agent for ever


def create_app(settings: Settings, partitions: int, consumer: BlockConsumer, stores: PartitionStores) -> App:
    """The app for these settings.

    partitions   number of partitions of each input topic
    consumer     its `owner` must be set before the app starts
    """
    app = App(
        settings.group,
        broker=f'blocks://{bootstrap_servers(settings)[0]}',
        store='users://',
        web_enabled=False,
        canonical_url=f'http://{settings.instance_id or settings.group}',
        topic_disable_leader=True,
        topic_allow_declare=False,      # topics are created before the start; Faust would start a producer to do it
        stream_wait_empty=True,         # has Faust call the consumer's `wait_empty`, which is bounded
        broker_commit_interval=settings.commit_interval_ms / 1000,
        broker_session_timeout=settings.session_timeout_ms / 1000,
        table_standby_replicas=settings.standbys,
        TableManager=TableManager,
        autodiscover=False,
        logging_config={'version': 1, 'disable_existing_loggers': False},
        loghandlers=[],
    )
    app.settings, app.blocks, app.stores = settings, consumer, stores
    blocks = app.topic(settings.clicks_topic, settings.carts_topic, schema=BlockSchema())
    app.Table(TABLE, partitions=partitions)

    @app.agent(blocks, name='blocks')
    async def bring(stream: Any) -> None:
        async for event in stream.noack().events():
            for block in event.value:
                consumer.owner.admit(block)

    return app


class BlockSchema(faust.Schema):
    """Passes the block through: a message's value needs no decoding. The headers of the records have no effect."""

    def loads_key(self, app: AppT, message: Message, *, loads: Callable | None = None, serializer: Any = None) -> None:
        return None

    def loads_value(self, app: AppT, message: Message, *, loads: Callable | None = None, serializer: Any = None) -> Any:
        return message.value


# ---- the transport `blocks://` --------------------------------------------------------------------------------------

class Consumer(FaustConsumer):
    """Faust's view of the consumer. `BlockConsumer` does the work, and this class is its `Membership`."""

    consumer_stopped_errors = (ConsumerStoppedError,)

    @property
    def _blocks(self) -> BlockConsumer:
        return cast(App, self.app).blocks

    async def on_start(self) -> None:
        await self._blocks.start(self.app.assignor)

    async def on_stop(self) -> None:
        await self._blocks.stop()

    async def subscribe(self, topics: Iterable[str]) -> None:
        self._blocks.subscribe(topics, self)

    def rebalance_begins(self) -> None:
        self.app.on_rebalance_start()

    async def revoked(self, partitions: set[TopicPartition]) -> None:
        await self.on_partitions_revoked(_faust_tps(partitions))

    async def assigned(self, partitions: set[TopicPartition], generation: int) -> None:
        self.app.consumer_generation_id = generation
        await self.on_partitions_assigned(_faust_tps(partitions), generation)

    def rebalance_ends(self) -> None:
        self.app.on_rebalance_end()

    async def deliver(self, fetcher: Any) -> None:
        """Deliver the blocks of each fetch to the agent."""
        await self._blocks.deliver(lambda blocks: self.callback(self._message(blocks)),
                                   lambda: self.should_stop or fetcher.should_stop)

    def _message(self, blocks: list[Block]) -> ConsumerMessage:
        """One message for all blocks of a fetch. To Faust, it is a message of the first block's partition."""
        carried: Any = blocks       # Faust expects bytes here; `BlockSchema` passes the blocks through
        first = blocks[0]
        message = ConsumerMessage(
            first.topic, first.partition, first.start, 0.0, 0, None, None, carried, None, 0, 0,
            TP(first.topic, first.partition), generation_id=self.app.consumer_generation_id)
        message.tracked = True      # the lane tracks the block, so Faust must not
        return message

    async def commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        return await self._blocks.commit()

    async def wait_empty(self) -> None:
        """Called by Faust when partitions are revoked: finish the steps in flight and commit them."""
        await self._blocks.owner.drain()
        await self._blocks.commit()

    def assignment(self) -> set[TP]:
        """Errors: ConsumerNotStarted, which Faust handles."""
        try:
            return _faust_tps(self._blocks.driver.assignment())
        except ConsumerStoppedError as error:
            raise ConsumerNotStarted(str(error)) from error

    def topic_partitions(self, topic: str) -> int | None:
        return len(self._blocks.driver.partitions_for_topic(topic) or ()) or None

    # Switched off.

    def close(self) -> None:
        """Switched off: `on_stop` closes everything."""

    async def verify_all_partitions_active(self) -> None:
        """Switched off: Faust would only log a stalled partition; the assignment's watchdog ends the worker."""

    # Never called. Faust's base class requires them for its own loop and recovery, which are not used.

    async def create_topic(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError('topics are created and checked before the app starts')

    async def position(self, tp: TP) -> int | None:
        raise NotImplementedError('positions are those of the block consumer')

    async def _seek(self, partition: TP, offset: int) -> None:
        raise NotImplementedError('positions are those of the block consumer')

    async def perform_seek(self) -> None:
        raise NotImplementedError('positions are those of the block consumer')

    async def seek_to_committed(self) -> Mapping[TP, int]:
        raise NotImplementedError('positions are those of the block consumer')

    async def seek_wait(self, partitions: Mapping[TP, int]) -> None:
        raise NotImplementedError('positions are those of the block consumer')

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        raise NotImplementedError('the block consumer commits')

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> Any:
        raise NotImplementedError('the block consumer fetches')

    def _to_message(self, tp: TP, record: Any) -> ConsumerMessage:
        raise NotImplementedError('records travel in blocks')

    def _new_topicpartition(self, topic: str, partition: int) -> TP:
        return TP(topic, partition)

    def highwater(self, tp: TP) -> int:
        raise NotImplementedError('changelogs have a reader of their own')

    async def highwaters(self, *partitions: TP) -> MutableMapping[TP, int]:
        raise NotImplementedError('changelogs have a reader of their own')

    async def earliest_offsets(self, *partitions: TP) -> MutableMapping[TP, int]:
        raise NotImplementedError('changelogs have a reader of their own')

    def key_partition(self, topic: str, key: bytes | None, partition: int | None = None) -> int | None:
        raise NotImplementedError('lanes send to the partition that they own')


class Fetcher(FaustFetcher):
    """Runs the consumer's loop and ends when the loop ends, even during a rebalance."""

    @Service.task
    async def _fetcher(self) -> None:
        try:
            await cast(Consumer, cast(Any, self.app).consumer).deliver(self)
        finally:
            self.set_shutdown()


class Transport(driver.Transport):
    """Registered as `blocks` among Faust's transports."""

    Consumer = Consumer
    Fetcher = Fetcher


def _faust_tps(partitions: Iterable[TopicPartition]) -> set[TP]:
    return {TP(tp.topic, tp.partition) for tp in partitions}


# ---- the table ------------------------------------------------------------------------------------------------------

class TableManager(FaustTableManager):
    """Tells the owner which partitions the worker has, and resumes fetching at once: each lane waits for its own state.

    Faust's recovery is switched off. It shares the group's consumer, loses blocks while it seeks, and only logs errors
    that should stop the worker.
    """

    async def on_start(self) -> None:
        self._tables_finalized.set()
        for table in self.values():
            await table.maybe_start()
        self._tables_registered.set()

    async def on_stop(self) -> None:
        await self.app._fetcher.stop()      # type: ignore[attr-defined]
        for table in self.values():
            await table.stop()

    def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Switched off: `Consumer.wait_empty` drains the lanes."""

    async def on_rebalance(self, assigned: set[TP], revoked: set[TP], newly_assigned: set[TP],
                           generation_id: int = 0) -> None:
        app: Any = self.app
        self._recovery_started.set()
        clicks = app.settings.clicks_topic
        active = {tp.partition for tp in assigned if tp.topic == clicks}
        standby = {tp.partition for tp in app.assignor.assigned_standbys() if tp.topic == clicks}
        await app.blocks.owner.assign(active, standby, generation_id)
        app.consumer.resume_partitions(assigned)
        app.flow_control.resume()
        app.consumer.resume_flow()
        await app._fetcher.maybe_start()
        self.on_actives_ready()
        self.on_standbys_ready()

    async def wait_until_recovery_completed(self) -> bool:
        return False


class UserStore(Store):
    """Registered as `users` among Faust's stores: a read-only view of the users of this worker's partitions.

    The lanes write the users, step by step, together with the changelog.
    """

    def __init__(self, url: Any, app: AppT, table: CollectionT, **kwargs: Any) -> None:
        super().__init__(url, app, table, **kwargs)
        self._stores = cast(App, app).stores

    def __getitem__(self, key: str) -> User:
        for store in self._stores.open_stores():
            user = store.load([key])[key]
            if user.applied or user.late:
                return user
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return (user.user_id for store in self._stores.open_stores() for user in store.users())

    def __len__(self) -> int:
        return sum(store.meta.users for store in self._stores.open_stores())

    def __setitem__(self, key: str, value: User) -> None:
        raise TypeError('users are written by the lanes')

    def __delitem__(self, key: str) -> None:
        raise TypeError('users are written by the lanes')

    # Never called. They belong to Faust's recovery, which is switched off.

    def persisted_offset(self, tp: TP) -> int | None:
        raise NotImplementedError('changelogs are read by `stream.engine.changelog`')

    def apply_changelog_batch(self, batch: Iterable[Any], to_key: Any, to_value: Any) -> None:
        raise NotImplementedError('changelogs are read by `stream.engine.changelog`')

    def reset_state(self) -> None:
        raise NotImplementedError('changelogs are read by `stream.engine.changelog`')

    async def backup_partition(self, tp: Any, flush: bool = True, purge: bool = False, keep: int = 1) -> None:
        raise NotImplementedError('the changelog is the backup')

    def restore_backup(self, tp: Any, latest: bool = True, backup_id: int = 0) -> None:
        raise NotImplementedError('the changelog is the backup')
