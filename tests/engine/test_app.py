"""What the worker takes of Faust, and what it leaves."""
from faust.transport.drivers import by_url

from stream.config import Settings
from stream.engine.app import create_app, user_store
from stream.engine.blocks import Block, BlockSchema
from stream.engine.tables import TableManager, UserStore
from stream.engine.transport import Consumer, Transport
from stream.kafka.topics import changelog_topic


def test_transport_and_store_are_found_by_their_entry_points():
    app = create_app(Settings(group='shop'), 4)
    assert by_url('blocks://127.0.0.1:9092') is Transport
    assert isinstance(app.transport, Transport)
    assert isinstance(user_store(app), UserStore)
    assert isinstance(app.tables, TableManager)
    assert app.transport.Consumer is Consumer


def test_neither_a_web_server_nor_a_leader_nor_replies_are_started():
    app = create_app(Settings(group='shop'), 4)
    started = [type(service).__name__ for service in app.boot_strategy.server()]
    assert started == ['Producer', 'Consumer', 'AgentManager', 'Conductor', 'TableManager']
    assert not app.conf.web_enabled


def test_the_changelog_has_the_name_that_faust_gives_it():
    settings = Settings(group='shop')
    app = create_app(settings, 4)
    assert list(app.tables.changelog_topics) == [changelog_topic(settings)] == ['shop-users-changelog']


def test_one_agent_brings_blocks_as_they_are():
    app = create_app(Settings(group='shop', clicks_topic='a', carts_topic='b'), 4)
    agent, = app.agents.values()
    assert sorted(agent.channel.topics) == ['a', 'b']
    assert isinstance(agent.channel.schema, BlockSchema)
    block = Block('a', 0, 1, 0, 0, ())

    class Message:
        key, value = b'k', block
    assert agent.channel.schema.loads_value(app, Message()) is block      # type: ignore[arg-type]
    assert agent.channel.schema.loads_key(app, Message()) is None         # type: ignore[arg-type]
