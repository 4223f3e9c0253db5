"""Sends records in as few producer batches as the broker's limit allows, and waits until all are acknowledged."""
import asyncio
import time
from collections.abc import Callable, Sequence

from aiokafka.errors import KafkaError as DriverError
from aiokafka.errors import MessageSizeTooLargeError, RecordListTooLargeError

from stream.config import Settings
from stream.core.dead_letters import Header
from stream.core.outbox import Message
from stream.errors import KafkaError
from stream.kafka.batch import RecordBatch
from stream.kafka.clients import client_arguments
from stream.kafka.producer import Producer

BATCH_BYTES_MAX = 900_000       # below 1 MiB, the broker's default limit for one batch

Record = tuple[bytes, bytes | None, Sequence[Header]]       # key, value, headers


class Publisher:
    """Sends runs of records to one topic partition, in order. Call `start` first, `stop` at the end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: Producer | None = None
        self._partitions: dict[str, int] = {}

    @property
    def _driver(self) -> Producer:
        if self._producer is None:
            raise RuntimeError('start() comes first')
        return self._producer

    async def start(self) -> None:
        """Connect an idempotent producer whose records all replicas acknowledge. Errors: those of aiokafka."""
        self._producer = Producer(client_arguments(self._settings), self._settings.send_timeout_ms)
        await self._producer.start()

    async def stop(self) -> None:
        """Send everything that is queued, then disconnect."""
        if self._producer is not None:
            await self._producer.stop()

    async def send(self, topic: str, partition: int, records: list[Record]) -> int:
        """Send the records and wait for all acknowledgements; return the offset after the last record, 0 for none.

        partition   taken modulo the topic's number of partitions
        Errors      KafkaError if a record was not acknowledged within `send_timeout_ms`, or is too large.
        """
        return await (await self.begin(topic, partition, records)).end() if records else 0

    async def begin(self, topic: str, partition: int, records: list[Record]) -> 'Sending':
        """Hand the records over to the producer, without waiting for the acknowledgements. There must be some.

        What is handed over in one turn of the event loop goes out in one request to each broker.
        """
        return await self._begin(topic, partition, len(records), lambda batch, at: batch.add_records(records, at))

    async def begin_messages(self, topic: str, partition: int, messages: list[Message], source: bytes) -> 'Sending':
        """Like `begin`, for messages. There must be some."""
        return await self._begin(topic, partition, len(messages),
                                 lambda batch, at: batch.add_messages(messages, at, source))

    async def _begin(self, topic: str, partition: int, count: int, add: Callable[[RecordBatch, int], int]) -> 'Sending':
        place, timestamp_ms = f'{topic}-{partition}', int(time.time() * 1000)
        try:
            partition %= await self._partitions_of(topic)
            batches, at = [], 0
            while at < count:
                batches.append(RecordBatch(BATCH_BYTES_MAX, timestamp_ms))
                at = add(batches[-1], at)
            return Sending(self._driver.send(topic, partition, batches), place)
        except DriverError as error:
            raise _failed(error, place) from error

    async def _partitions_of(self, topic: str) -> int:
        count = self._partitions.get(topic)
        if count is None:
            count = self._partitions[topic] = await self._driver.partitions_of(topic)
        return count


class Sending:
    """Records on their way to one topic partition.

    future   the offset after the last record; done when all records are acknowledged, or one has failed
    """

    __slots__ = ('_place', 'future')

    def __init__(self, future: asyncio.Future[int], place: str) -> None:
        self.future = future
        self._place = place

    async def end(self) -> int:
        """Wait until the records are acknowledged; return the offset after the last one. Errors: KafkaError."""
        await asyncio.wait([self.future])
        return self.offset()

    def offset(self) -> int:
        """The offset after the last record, once `future` is done. Errors: KafkaError if a record has failed."""
        try:
            return self.future.result()
        except DriverError as error:
            raise _failed(error, self._place) from error

    def drop(self) -> None:
        """Wait no longer. What the producer has taken is still sent; what it has not taken is not sent any more."""
        if not self.future.cancel() and not self.future.cancelled():
            self.future.exception()     # asyncio would report an error that nobody has looked at


def _failed(error: DriverError, place: str) -> KafkaError:
    topic = place.rpartition('-')[0]
    if isinstance(error, (MessageSizeTooLargeError, RecordListTooLargeError)):
        return KafkaError(f'A record for {topic} exceeds the size limit of the topic: {error}.',
                          f'raise max.message.bytes of {topic} to the value that `stream topics` prints.')
    return KafkaError(f'Kafka did not acknowledge records for {place}: {error!r}.',
                      'check the brokers, then start the worker again; it continues where it stopped.')
