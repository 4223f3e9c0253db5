"""The Faust app: two input topics, one agent that brings blocks to their lanes, one table of users.

What Faust does here: membership of the group, assignment of inputs, tables and standby copies together, delivery of
blocks to the agent, the life of its services. What it does not: per-record work, tracking, commits, recovery, a web
server, replies to whatever a record's headers ask for.
"""
from collections.abc import Iterable
from typing import Any, cast

import faust
from faust.app.base import BootStrategy
from mode.types import ServiceT

from stream.config import Settings
from stream.engine.blocks import BlockSchema
from stream.engine.tables import TABLE, TableManager, UserStore
from stream.engine.transport import Runtime, runtime
from stream.kafka.clients import bootstrap_servers


class Boot(BootStrategy):
    """Only what the worker needs: no web server, no leader topic, no consumer of replies."""

    def server(self) -> Iterable[ServiceT]:
        app = cast(Any, self.app)
        return [app.producer, app.consumer, app.agents, app.topics, app.tables]


class App(faust.App):
    """A Faust app that keeps its state where the settings say."""

    BootStrategy = Boot
    runtime: Runtime

    def _create_directories(self) -> None:
        """The store makes its own."""

    async def _on_agent_error(self, agent: Any, exc: BaseException) -> None:
        self.runtime.owner.fail(exc)        # Faust would start the agent anew, for ever


def create_app(settings: Settings, partitions: int) -> App:
    """The app for these settings; `app.runtime.owner` has to be set before it starts.

    partitions   of each input topic
    """
    app = App(
        settings.group,
        broker=f'blocks://{bootstrap_servers(settings)[0]}',
        store='users://',
        web_enabled=False,
        canonical_url=f'http://{settings.instance_id or settings.group}',
        topic_disable_leader=True,
        stream_wait_empty=True,         # has Faust call the consumer's `wait_empty`, which is bounded
        broker_commit_interval=settings.commit_interval_ms / 1000,
        broker_session_timeout=settings.session_timeout_ms / 1000,
        table_standby_replicas=settings.standbys,
        TableManager=TableManager,
        autodiscover=False,
        logging_config={'version': 1, 'disable_existing_loggers': False},
        loghandlers=[],
    )
    app.runtime = Runtime(settings)
    blocks = app.topic(settings.clicks_topic, settings.carts_topic, schema=BlockSchema())
    app.Table(TABLE, partitions=partitions)

    @app.agent(blocks, name='blocks')
    async def bring(stream: Any) -> None:
        async for event in stream.noack().events():
            runtime(app).owner.admit(event.value)

    return app


def user_store(app: App) -> UserStore:
    """The store of the app's table."""
    return cast(UserStore, cast(Any, app.tables)[TABLE].data)
