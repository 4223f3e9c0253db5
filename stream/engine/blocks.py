"""A block: the records of one topic partition that one fetch returned, as the unit that travels through Faust.

One Faust message carries one block, so that an agent's `async for` sees blocks and the cost per event is decoding and
folding alone. A block names the fetch positions that it spans. Positions, not record offsets: transaction markers,
aborted and compacted records leave gaps between offsets that are no loss.
"""
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from stream.core.events import KafkaRecord


class FetchedRecord(KafkaRecord, Protocol):
    """A record as it was fetched: what the decoder reads, and the headers, which a dead letter keeps."""

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]: ...


class Block(msgspec.Struct, gc=False):
    """The records at fetch positions [start, stop) of a topic partition; there may be none.

    epoch       of the assignment under which it was fetched: older ones are worthless
    times_ms    the records' timestamps
    bytes       of the records' values
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

    def upto(self, horizon_ms: int) -> tuple['Block', 'Block | None']:
        """The block's part before its first record after `horizon_ms`, and the rest, if there is one."""
        if max(self.times_ms, default=horizon_ms) <= horizon_ms:
            return self, None
        at = next(index for index, ts_ms in enumerate(self.times_ms) if ts_ms > horizon_ms)
        split = self.records[at].offset
        here = Block(self.topic, self.partition, self.epoch, self.start, split, self.records[:at], self.times_ms[:at])
        rest = Block(self.topic, self.partition, self.epoch, split, self.stop, self.records[at:], self.times_ms[at:])
        return here, rest

    def joined(self, after: 'Block') -> 'Block':
        """This block and the one that begins where it ends, as one."""
        return Block(self.topic, self.partition, after.epoch, self.start, after.stop, [*self.records, *after.records],
                     self.times_ms + after.times_ms, self.bytes + after.bytes)


def cut(block: Block, events_max: int) -> Iterator[Block]:
    """The block in blocks of at most `events_max` records, which together span the same positions."""
    records, start = block.records, block.start
    for at in range(0, max(len(records), 1), events_max):
        part = records[at:at + events_max]
        stop = block.stop if at + events_max >= len(records) else part[-1].offset + 1
        yield Block(block.topic, block.partition, block.epoch, start, stop, part,
                    block.times_ms[at:at + events_max])
        start = stop
