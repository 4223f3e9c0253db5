"""Blocks: the records that one fetch returned of one topic partition. A block is the unit that travels through Faust.

One Faust message carries one block, and the agent's `async for` iterates over blocks. So the only costs per event are
decoding and folding. A block states the fetch positions that it spans. It uses positions, not record offsets, because
transaction markers, aborted records and compacted records leave gaps between offsets without any loss.
"""
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from stream.core.events import KafkaRecord


class FetchedRecord(KafkaRecord, Protocol):
    """A fetched record: the part that the decoder reads, and the headers, which a dead letter keeps."""

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]: ...


class Block(msgspec.Struct, gc=False):
    """The records at fetch positions [start, stop) of a topic partition. There may be none.

    epoch       the partition's epoch when the block was fetched; a seek starts a new one, which makes the block stale
    times_ms    the records' timestamps, Unix ms; computed if not given
    bytes       total size of the records' values; computed if not given
    """

    topic: str
    partition: int
    epoch: int
    start: int
    stop: int
    records: Sequence[FetchedRecord]
    times_ms: list[int] = []
    bytes: int = -1

    def __post_init__(self) -> None:
        if not self.times_ms:
            self.times_ms = [record.timestamp for record in self.records]
        if self.bytes < 0:
            self.bytes = sum([len(record.value or b'') for record in self.records])

    @property
    def first_ms(self) -> int:
        return self.times_ms[0] if self.times_ms else 0

    def split(self, horizon_ms: int) -> tuple['Block', 'Block | None']:
        """Split the block before its first record later than `horizon_ms`. The second part is None if there is none."""
        if max(self.times_ms, default=horizon_ms) <= horizon_ms:
            return self, None
        at = next(index for index, ts_ms in enumerate(self.times_ms) if ts_ms > horizon_ms)
        split = self.records[at].offset
        here = Block(self.topic, self.partition, self.epoch, self.start, split, self.records[:at], self.times_ms[:at])
        rest = Block(self.topic, self.partition, self.epoch, split, self.stop, self.records[at:], self.times_ms[at:])
        return here, rest

    def joined(self, after: 'Block') -> 'Block':
        """This block joined with `after`, which must begin where this one ends."""
        return Block(self.topic, self.partition, after.epoch, self.start, after.stop, [*self.records, *after.records],
                     self.times_ms + after.times_ms, self.bytes + after.bytes)


def cut(block: Block, events_max: int) -> Iterator[Block]:
    """Cut the block into blocks of at most `events_max` records. Together they span the same positions."""
    records, start = block.records, block.start
    for at in range(0, max(len(records), 1), events_max):
        part = records[at:at + events_max]
        stop = block.stop if at + events_max >= len(records) else part[-1].offset + 1
        yield Block(block.topic, block.partition, block.epoch, start, stop, part,
                    block.times_ms[at:at + events_max])
        start = stop
