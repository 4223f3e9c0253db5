"""The parts of Faust that the worker uses, and the parts that it switches off."""
import asyncio
from pathlib import Path
from typing import Any

import pytest
from faust.transport.drivers import by_url

from stream.config import Settings
from stream.core.user import User, change_of
from stream.engine.blocks import Block
from stream.engine.consumer import BlockConsumer
from stream.engine.faust_app import App, BlockSchema, Consumer, TableManager, Transport, UserStore, create_app
from stream.kafka.topics import changelog_topic
from stream.state.partition_stores import PartitionStores
from stream.state.store import Memory, Meta


@pytest.fixture
def stores(tmp_path: Path) -> PartitionStores:
    return PartitionStores(tmp_path, Memory(8, 8))


def app_of(stores: PartitionStores, **settings: Any) -> App:
    given = Settings(group='shop', **settings)

    async def made() -> BlockConsumer:
        return BlockConsumer(given)
    return create_app(given, 4, asyncio.run(made()), stores)


def test_transport_and_store_are_found_by_their_entry_points(stores: PartitionStores):
    app = app_of(stores)
    assert by_url('blocks://127.0.0.1:9092') is Transport
    assert isinstance(app.transport, Transport)
    tables: Any = app.tables
    assert isinstance(tables['users'].data, UserStore)
    assert isinstance(app.tables, TableManager)
    assert app.transport.Consumer is Consumer


def test_neither_a_web_server_nor_a_leader_nor_a_producer_nor_replies_are_started(stores: PartitionStores):
    app = app_of(stores)
    started = [type(service).__name__ for service in app.boot_strategy.server()]
    assert started == ['Consumer', 'AgentManager', 'Conductor', 'TableManager']
    assert not app.conf.web_enabled
    assert not app.conf.topic_allow_declare     # it would start a producer of Faust's


def test_the_changelog_has_the_name_that_faust_gives_it(stores: PartitionStores):
    app = app_of(stores)
    assert list(app.tables.changelog_topics) == [changelog_topic(Settings(group='shop'))] == ['shop-users-changelog']


def test_one_agent_brings_blocks_as_they_are(stores: PartitionStores):
    app = app_of(stores, clicks_topic='a', carts_topic='b')
    agent, = app.agents.values()
    assert sorted(agent.channel.topics) == ['a', 'b']
    assert isinstance(agent.channel.schema, BlockSchema)
    block = Block('a', 0, 1, 0, 0, ())

    class Message:
        key, value = b'k', block
    assert agent.channel.schema.loads_value(app, Message()) is block      # type: ignore[arg-type]
    assert agent.channel.schema.loads_key(app, Message()) is None         # type: ignore[arg-type]


def test_the_table_reads_the_users_of_the_open_partitions(stores: PartitionStores):
    user = User('ada')
    user.applied = 3
    stores.take(1).write([change_of(user, True)], Meta())
    stores.take(2)
    tables: Any = app_of(stores).tables
    users = tables['users'].data
    assert (list(users), len(users), users['ada'].applied) == (['ada'], 1, 3)
    with pytest.raises(KeyError):
        users['bob']
    with pytest.raises(TypeError, match='lanes'):
        users['bob'] = user
    stores.release(1)
    assert list(users) == []
