"""Kafka clients made from the settings, and Kafka's errors turned into errors that say what to do.

Every Kafka client takes its arguments from `client_arguments`. The clients opened here serve the commands and the
checks at a worker's start. While one is open, the client library's own log is silenced: without a broker it repeats
itself many times a second. Its last message is part of the error instead.
"""
import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import errors as broker_errors
from aiokafka.admin import AIOKafkaAdminClient

from stream.config import Settings
from stream.errors import KafkaError, UsageError

CONNECT_TIMEOUT_MS = 10_000
_CLIENT_LOG = logging.getLogger('aiokafka')


def bootstrap_servers(settings: Settings) -> list[str]:
    """The `brokers` setting as a list of host:port.

    Errors   UsageError if an entry is not host:port.
    """
    servers = [entry.strip() for entry in settings.brokers.split(',') if entry.strip()]
    for server in servers:
        host, _, port = server.rpartition(':')
        if not host or not port.isdigit() or not 0 < int(port) < 65_536:
            raise UsageError(f'The setting brokers has {server!r}, which is not host:port.',
                             'write e.g. brokers = "kafka-1:9092,kafka-2:9092".')
    if not servers:
        raise UsageError('The setting brokers names no broker.', 'write e.g. brokers = "kafka-1:9092".')
    return servers


def client_arguments(settings: Settings, role: str = 'worker') -> dict[str, Any]:
    """Arguments of every aiokafka client.

    role     the purpose of the client, e.g. worker or admin; part of the client id in the brokers' logs
    Errors   UsageError if `brokers` is wrong.
    """
    return {'bootstrap_servers': bootstrap_servers(settings), 'client_id': f'stream-{settings.group}-{role}'}


@asynccontextmanager
async def open_admin(settings: Settings, timeout_ms: int = CONNECT_TIMEOUT_MS) -> AsyncIterator[AIOKafkaAdminClient]:
    """A connected admin client. Kafka's errors inside the context become KafkaError.

    Errors   KafkaError if no broker answers within `timeout_ms` (per broker).
    """
    async with _opened(settings, lambda: AIOKafkaAdminClient(
            **client_arguments(settings, 'admin'), request_timeout_ms=timeout_ms)) as admin:
        yield admin


@asynccontextmanager
async def open_producer(settings: Settings, role: str, **options: Any) -> AsyncIterator[AIOKafkaProducer]:
    """A connected idempotent producer, as `open_admin`. `options` are those of aiokafka."""
    async with _opened(settings, lambda: AIOKafkaProducer(
            **client_arguments(settings, role), enable_idempotence=True, **options)) as producer:
        yield producer


@asynccontextmanager
async def open_consumer(settings: Settings, role: str, **options: Any) -> AsyncIterator[AIOKafkaConsumer]:
    """A connected consumer of committed records without a group, as `open_admin`. The caller assigns its partitions."""
    async with _opened(settings, lambda: AIOKafkaConsumer(
            **client_arguments(settings, role), isolation_level='read_committed', enable_auto_commit=False,
            group_id=None, **options)) as consumer:
        yield consumer


@contextmanager
def kafka_errors(doing: str = '') -> Iterator[None]:
    """Turn aiokafka's errors into KafkaError. `doing` begins its sentence, e.g. 'Reading the topic clicks'."""
    try:
        yield
    except broker_errors.KafkaError as error:
        raise as_kafka_error(error, doing) from error
    except TimeoutError as error:
        raise KafkaError(f'{doing or "Kafka"}: no answer in time.', 'check that the brokers are healthy.') from error


def as_kafka_error(error: Exception, doing: str = '') -> KafkaError:
    """One of aiokafka's errors as a KafkaError that says what to do."""
    what = f'{doing}: ' if doing else ''
    detail = str(error).strip().rstrip('.')
    if detail in ('', type(error).__name__):
        detail = _IN_WORDS.get(type(error), type(error).__name__)
    for kinds, do in _WHAT_TO_DO:
        if isinstance(error, kinds):
            return KafkaError(f'{what}{detail}.', do)
    return KafkaError(f'{what}{detail}.', "see the log of the brokers, and check that they are healthy.")


_IN_WORDS: dict[type[Exception], str] = {
    broker_errors.KafkaTimeoutError: 'no acknowledgement in time',
    broker_errors.RequestTimedOutError: 'no answer in time',
}
_WHAT_TO_DO: list[tuple[tuple[type[Exception], ...], str]] = [
    ((broker_errors.TopicAuthorizationFailedError, broker_errors.GroupAuthorizationFailedError,
      broker_errors.ClusterAuthorizationFailedError),
     "grant the permission to this client's principal."),
    ((broker_errors.UnknownTopicOrPartitionError,), 'create the topic: `stream topics`.'),
    ((broker_errors.InvalidReplicationFactorError,), 'set `replication` to the number of brokers or less.'),
    ((broker_errors.MessageSizeTooLargeError,), 'raise max.message.bytes of the topic.'),
    ((broker_errors.InvalidTimestampError,),
     "raise message.timestamp.after.max.ms of the topic, or correct the clock."),
    ((broker_errors.KafkaConnectionError, broker_errors.NodeNotReadyError, broker_errors.KafkaTimeoutError,
      broker_errors.RequestTimedOutError, broker_errors.NoBrokersAvailable),
     'check that the brokers run, and that the addresses that they advertise can be reached from here.'),
]


class _LastMessage(logging.Handler):
    """Keeps the last warning or error that the client library logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ''

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


def fetch_position(driver: AIOKafkaConsumer, tp: Any) -> int | None:
    """The offset at which the next fetch of an assigned partition begins. None if it is not known yet.

    It is past compacted records and transaction markers too. The driver's own `position` would wait until it is known.
    """
    subscription: Any = driver._subscription.subscription
    if subscription is None or subscription.assignment is None:
        return None
    state = subscription.assignment.state_value(tp)
    return state.position if state is not None and state.has_valid_position else None


_silenced = 0       # open contexts in which the client's log is silenced


@contextmanager
def _quiet_client() -> Iterator[_LastMessage]:
    global _silenced
    handler = _LastMessage()
    _CLIENT_LOG.addHandler(handler)
    _silenced += 1
    _CLIENT_LOG.propagate = False
    try:
        yield handler
    finally:
        _CLIENT_LOG.removeHandler(handler)
        _silenced -= 1
        _CLIENT_LOG.propagate = not _silenced


@asynccontextmanager
async def _opened(settings: Settings, make: Any) -> AsyncIterator[Any]:
    with _quiet_client() as last:
        client = make()
        try:
            try:
                await client.start()
            except (broker_errors.KafkaError, TimeoutError, OSError) as error:
                raise KafkaError(
                    f'No broker of {settings.brokers} answers ({last.text or error}).',
                    'start Kafka, or correct the setting `brokers` (comma-separated host:port).') from error
            with kafka_errors():
                yield client
        finally:
            close = client.close if isinstance(client, AIOKafkaAdminClient) else client.stop
            # A broker that is gone must not delay the end.
            with suppress(broker_errors.KafkaError, TimeoutError):
                await asyncio.wait_for(close(), CONNECT_TIMEOUT_MS / 1000)
