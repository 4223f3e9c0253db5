"""The worker's life cycle.

    start   check or create the topics, create the scorer, start the admin server (not ready yet), join the group
    work    until SIGTERM or SIGINT, or until something fails
    stop    finish the steps in flight and commit them; further signals have no effect
"""
import asyncio
import fcntl
import logging
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

from stream.config import Settings
from stream.core.events import Decoder
from stream.core.journal import rules_digest
from stream.engine.admin import AdminServer
from stream.engine.assignment import VERSION, Assignment
from stream.engine.changelog import ChangelogReader
from stream.engine.consumer import BlockConsumer
from stream.engine.faust_app import App, create_app
from stream.engine.lane import LaneRules, Tools
from stream.engine.publisher import Publisher
from stream.errors import StateError, StreamError, UsageError
from stream.kafka.clients import kafka_errors
from stream.kafka.topics import changelog_topic, ensure_topics
from stream.metrics import Metrics
from stream.native import stale_modules
from stream.scoring.make import make_scorer
from stream.state.partition_stores import PartitionStores
from stream.state.store import Memory

log = logging.getLogger(__name__)
STOP_MORE_S = 8.0       # added to `drain_timeout_ms`, for the last commit and for leaving the group


async def run(settings: Settings) -> None:
    """Work until told to stop.

    Errors   StreamError if the worker cannot start or cannot continue.
    """
    if stale := stale_modules():
        raise UsageError(f'These compiled modules do not match their sources: {", ".join(stale)}.',
                         'install the package again: run `make .venv/base` in a checkout, use pip elsewhere.')
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        stack.enter_context(_owned(settings.state_dir))
        topics = await ensure_topics(settings)
        for finding in topics.warnings:
            log.warning('%s Do: %s', finding.problem, finding.do)
        partitions = topics.found[settings.clicks_topic].partitions
        scorer = make_scorer(settings, log.warning)
        stack.push_async_callback(scorer.close)
        metrics = Metrics()
        metrics.built(VERSION, scorer.model.name, scorer.model.version, scorer.model.sha256)
        consumer, publisher = BlockConsumer(settings), Publisher(settings)
        stores = PartitionStores(settings.state_dir, Memory(settings.rocksdb_cache_mib,
                                                            settings.rocksdb_write_buffers_mib))
        rules = _rules(settings, partitions)
        tools = Tools(rules, Decoder(settings.event_rules()), scorer, publisher, metrics, consumer)
        assignment = Assignment(
            (settings.clicks_topic, settings.carts_topic), stores, ChangelogReader(settings, rules.changelog, metrics),
            tools, settings.group, settings.drain_timeout_ms, settings.stuck_timeout_ms)
        consumer.owner = assignment
        app = create_app(settings, partitions, consumer, stores)
        admin = AdminServer(settings.admin_host, settings.admin_port, assignment, metrics)
        await admin.start()
        stack.push_async_callback(admin.stop)
        watchdog = asyncio.create_task(assignment.watchdog())
        stack.callback(watchdog.cancel)
        stack.push_async_callback(_stop, app, assignment, publisher, settings.drain_timeout_ms / 1000 + STOP_MORE_S)
        await _until(stop, assignment, publisher, app, watchdog)
    for number in (signal.SIGTERM, signal.SIGINT):      # without the loop's handlers a second signal would kill
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _owned(state_dir: Path) -> Iterator[None]:
    """Lock the folder for this process, until the process ends. Errors: StateError if another process has the lock."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / 'lock').open('w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(f'{state_dir} is in use by another running worker.',
                             'stop the other worker, or give each worker its own state_dir.') from error
        yield


def _rules(settings: Settings, partitions: int) -> LaneRules:
    steps = settings.step_rules()
    return LaneRules(
        steps=steps, digest=rules_digest(settings.event_rules(), steps),
        partitioner=settings.partitioner, partitions=partitions, wall_clock=settings.clock == 'wall',
        clock_grace_ms=settings.clock_grace_ms, clock_idle_ms_max=settings.clock_idle_ms_max,
        merge_wait_ms=settings.merge_wait_ms, blocks_ahead_max=settings.blocks_ahead_max,
        users_cached_bytes=(settings.users_cached_mib << 20) // partitions,
        block_events_max=settings.block_events_max, events_in_flight_max=settings.events_in_flight_max,
        sweep_users_max=settings.sweep_users_max, changelog=changelog_topic(settings),
        alerts=settings.alerts_topic, scores=settings.scores_topic, dead_letters=settings.dead_letters_topic,
        journal=settings.journal_topic, source=f'/stream/{settings.group}')


async def _until(stop: asyncio.Event, assignment: Assignment, publisher: Publisher, app: App,
                 watchdog: asyncio.Task) -> None:
    """Start the app and wait until told to stop. Errors: the first failure."""
    async def start() -> None:
        await publisher.start()
        await app.start()

    stopping = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(start())
    ends = [stopping, assignment.failure, watchdog]
    await asyncio.wait([*ends, starting], return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        with kafka_errors('Joining the group'):
            await starting
        crashed = asyncio.create_task(app.wait_until_stopped())
        await asyncio.wait([*ends, crashed], return_when=asyncio.FIRST_COMPLETED)
        crashed.cancel()
    else:
        starting.cancel()
    stopping.cancel()
    error = assignment.failure.result() if assignment.failure.done() else app.crash_reason
    if error is None and watchdog.done():
        error = watchdog.exception()
    if isinstance(error, StreamError):
        raise error
    if error is not None:
        raise StreamError(f'The worker failed: {error!r}.',
                          'start it again, it continues where it stopped; report this error with the log.') from error


async def _stop(app: App, assignment: Assignment, publisher: Publisher, timeout_s: float) -> None:
    """Stop everything, and give up after the timeout, even if a service of the app is still waiting."""
    async def end() -> list[BaseException]:
        """Stop one after another, even if one fails; return the errors. Once cancelled, it begins nothing more."""
        errors = []
        for stop in (app.stop, assignment.close, publisher.stop):
            errors += filter(None, await asyncio.gather(stop(), return_exceptions=True))
        return errors

    log.info('stopping')
    ending = asyncio.create_task(end())
    done, _ = await asyncio.wait([ending], timeout=timeout_s)
    if not done:
        log.error('the worker did not stop within %.0f s; the next start repeats what was not committed.', timeout_s)
    elif errors := ending.result():
        log.error('stopping failed: %r; the next start repeats what was not committed.', errors[0])
    else:
        log.info('stopped; all finished work is committed')
