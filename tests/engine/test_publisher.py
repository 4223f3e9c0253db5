"""The publisher with a producer that takes one batch of a partition at a time."""
import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from stream.engine.publisher import Publisher

RECORDS: list[Any] = [(b'%d' % number, b'x' * 100_000, []) for number in range(20)]      # three batches


class OneAtATime:
    """Takes a batch when it has room, and acknowledges it at once."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.room = asyncio.Semaphore(1)
        self._message_accumulator = self
        self._batches = SimpleNamespace(get=lambda place: self.room.locked())

    async def partitions_for(self, topic: str) -> set[int]:
        return {0}

    async def send_batch(self, batch: Any, topic: str, *, partition: int) -> asyncio.Future:
        await self.room.acquire()
        future = asyncio.get_running_loop().create_future()
        future.set_result(SimpleNamespace(offset=sum(self.taken)))
        self.taken.append(batch.record_count())
        return future


def publisher(producer: OneAtATime) -> Publisher:
    settings: Any = None        # for `start` only
    made = Publisher(settings)
    made._producer = producer       # type: ignore[assignment]
    return made


def test_records_of_several_batches_end_with_the_offset_after_the_last():
    async def send() -> None:
        producer = OneAtATime()
        sending = await publisher(producer).begin('changelog', 0, RECORDS)
        for _ in range(2):
            producer.room.release()
        assert await sending.end() == 20
        assert len(producer.taken) == 3
    asyncio.run(send())


def test_what_is_dropped_is_not_handed_over_later():
    async def send() -> None:
        producer = OneAtATime()
        sending = await publisher(producer).begin('changelog', 0, RECORDS)
        await asyncio.sleep(0.01)
        assert len(producer.taken) == 1
        sending.drop()
        for _ in range(2):
            producer.room.release()
        await asyncio.sleep(0.01)
        assert len(producer.taken) == 1
        with pytest.raises(asyncio.CancelledError):
            sending.offset()
    asyncio.run(send())


def test_two_lanes_that_share_a_partition_begin_without_waiting():
    async def send() -> None:
        producer = OneAtATime()
        shared = publisher(producer)
        async with asyncio.timeout(1):
            first, second = [await shared.begin('alerts', number, RECORDS[:2]) for number in (0, 1)]
        assert await first.end() == 2
        assert not second.future.done()
        producer.room.release()
        assert await second.end() == 4
    asyncio.run(send())
