"""Records go out in as few producer batches as the broker's limit allows, and every one of them is awaited."""
import asyncio
from collections.abc import Iterable

from aiokafka.errors import KafkaError as DriverError
from aiokafka.errors import MessageSizeTooLargeError
from aiokafka.producer.message_accumulator import BatchBuilder

from stream.engine.transport import Producer
from stream.errors import KafkaError

Header = tuple[str, bytes]
Record = tuple[bytes, bytes | None, list[Header]]       # key, value, headers


class Publisher:
    """Sends runs of records to one topic partition, in order."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._partitions: dict[str, int] = {}

    async def send(self, topic: str, partition: int, records: Iterable[Record]) -> int:
        """Send the records; return the offset after the last one, once all of them are acknowledged (0 for none).

        partition   taken modulo the topic's partitions
        Errors      KafkaError where one was not acknowledged within `send_timeout_ms`, or never can be.
        """
        try:
            partition %= await self._partitions_of(topic)
            sent = []
            batch = self._producer.driver.create_batch()
            for key, value, headers in records:
                if batch.append(timestamp=None, key=key, value=value, headers=headers) is None:
                    sent.append((batch.record_count(), await self._hand_over(batch, topic, partition)))
                    batch = self._producer.driver.create_batch()
                    batch.append(timestamp=None, key=key, value=value, headers=headers)
            if batch.record_count():
                sent.append((batch.record_count(), await self._hand_over(batch, topic, partition)))
            if not sent:
                return 0
            acknowledged = await asyncio.gather(*(future for _, future in sent))
        except MessageSizeTooLargeError as error:
            raise KafkaError(f'A record for {topic} is larger than the topic takes: {error}.',
                             f'raise max.message.bytes of {topic}; `stream topics` says to what.') from error
        except DriverError as error:
            raise KafkaError(f'Kafka did not acknowledge records for {topic}-{partition}: {error!r}.',
                             'look at the brokers; the worker goes on where it stopped when it is started again.'
                             ) from error
        return acknowledged[-1].offset + sent[-1][0]

    async def _hand_over(self, batch: BatchBuilder, topic: str,
                         partition: int) -> asyncio.Future:
        batch.close()
        return await self._producer.driver.send_batch(batch, topic, partition=partition)

    async def _partitions_of(self, topic: str) -> int:
        count = self._partitions.get(topic)
        if count is None:
            count = self._partitions[topic] = len(await self._producer.driver.partitions_for(topic))
        return count
