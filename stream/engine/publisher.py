"""Sends records in as few producer batches as the broker's limit allows, and waits until all are acknowledged."""
import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError as DriverError
from aiokafka.errors import MessageSizeTooLargeError

from stream.config import Settings
from stream.core.dead_letters import Header
from stream.core.outbox import Message
from stream.errors import KafkaError
from stream.kafka.batch import RecordBatch
from stream.kafka.clients import client_arguments

BATCH_BYTES_MAX = 900_000       # below 1 MiB, the broker's default limit for one batch
REQUEST_BYTES_MAX = 4 << 20

Record = tuple[bytes, bytes | None, Sequence[Header]]       # key, value, headers


class Publisher:
    """Sends runs of records to one topic partition, in order. Call `start` first, `stop` at the end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: AIOKafkaProducer | None = None
        self._partitions: dict[str, int] = {}

    @property
    def _driver(self) -> AIOKafkaProducer:
        if self._producer is None:
            raise RuntimeError('start() comes first')
        return self._producer

    async def start(self) -> None:
        """Connect an idempotent producer whose records all replicas acknowledge. Errors: those of aiokafka."""
        self._producer = AIOKafkaProducer(
            **client_arguments(self._settings), acks='all', enable_idempotence=True, linger_ms=0,
            max_batch_size=BATCH_BYTES_MAX, max_request_size=REQUEST_BYTES_MAX,
            request_timeout_ms=self._settings.send_timeout_ms)
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
        return await self._send(topic, partition, len(records), lambda batch, at: batch.add_records(records, at))

    async def send_messages(self, topic: str, partition: int, messages: list[Message],
                            source: bytes) -> int:
        """Like `send`, for messages, which get CloudEvents headers.

        source   the header of the CloudEvents source, from `batch.source_header`
        """
        return await self._send(topic, partition, len(messages),
                                lambda batch, at: batch.add_messages(messages, at, source))

    async def _send(self, topic: str, partition: int, count: int, add: Callable[[RecordBatch, int], int]) -> int:
        if not count:
            return 0
        try:
            partition %= await self._partitions_of(topic)
            now_ms = int(time.time() * 1000)
            sent, at = [], 0
            while at < count:
                batch = RecordBatch(BATCH_BYTES_MAX, now_ms)
                at = add(batch, at)
                sent.append((batch.record_count(), await self._hand_over(batch, topic, partition)))
            acknowledged = await asyncio.gather(*(future for _, future in sent))
        except MessageSizeTooLargeError as error:
            raise KafkaError(f'A record for {topic} exceeds the size limit of the topic: {error}.',
                             f'raise max.message.bytes of {topic} to the value that `stream topics` prints.'
                             ) from error
        except DriverError as error:
            raise KafkaError(f'Kafka did not acknowledge records for {topic}-{partition}: {error!r}.',
                             'check the brokers, then start the worker again; it continues where it stopped.'
                             ) from error
        return acknowledged[-1].offset + sent[-1][0]

    async def _hand_over(self, batch: Any, topic: str, partition: int) -> asyncio.Future:
        batch.close()
        return await self._driver.send_batch(batch, topic, partition=partition)

    async def _partitions_of(self, topic: str) -> int:
        count = self._partitions.get(topic)
        if count is None:
            count = self._partitions[topic] = len(await self._driver.partitions_for(topic))
        return count
