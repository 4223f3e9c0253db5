"""What comes into a lane: the contiguity guard, and the order of both topics.

A block is taken only if it begins where the last one of its topic ended; if not, the partition is read again from
there, and whatever was fetched before is of an old epoch. Both topics are folded in the order of their records' times,
as far as both reach: a lagging cart topic would else send coupons to people who have just bought.
"""
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from aiokafka import TopicPartition

from stream.core.events import Source, time_order
from stream.engine.blocks import Block
from stream.metrics import Metrics

log = logging.getLogger(__name__)
T = TypeVar('T')
JOINED_BYTES_MAX = 2 << 20      # of the records' values in blocks that are joined


class Fetches(Protocol):
    """What the intake needs of the group's consumer."""

    @property
    def starts(self) -> Mapping[TopicPartition, int]: ...

    @property
    def epochs(self) -> Mapping[TopicPartition, int]: ...

    def seek_now(self, tp: TopicPartition, position: int) -> None: ...

    def end_offset(self, tp: TopicPartition) -> int | None: ...


class Intake:
    """The blocks of both topics of one partition number that wait to be folded.

    ahead_max       blocks of a topic that wait here
    events_max      of a block: what comes while a lane is busy is joined up to so many, and folded as one
    merge_wait_ms   how long events of one topic wait for those of the other that are known to exist
    arrived         called when a block was taken
    """

    def __init__(self, tps: tuple[TopicPartition, TopicPartition], fetches: Fetches, ahead_max: int, events_max: int,
                 merge_wait_ms: int, arrived: Callable[[], None], metrics: Metrics) -> None:
        self.expected = [fetches.starts[tp] for tp in tps]
        self._tps = tps
        self._fetches = fetches
        self._ahead_max = ahead_max
        self._events_max = events_max
        self._merge_wait_s = merge_wait_ms / 1000
        self._arrived = arrived
        self._metrics = metrics
        self._queues: tuple[deque[Block], deque[Block]] = (deque(), deque())
        self._waited_in_vain: Source | None = None      # for this topic

    def source(self, topic: str) -> Source:
        """Which input a topic is."""
        return Source.CLICKS if topic == self._tps[Source.CLICKS].topic else Source.CARTS

    def admit(self, block: Block) -> None:
        """Take a block, or, where one is missing before it, have the partition read again from there."""
        source = self.source(block.topic)
        tp, expected = self._tps[source], self.expected[source]
        if block.epoch != self._fetches.epochs.get(tp):
            return
        if block.start != expected:
            log.warning('%s-%d: a block from position %d came where %d was due: reading again from there.',
                        tp.topic, tp.partition, block.start, expected)
            self._metrics.reseeks.inc()
            self._fetches.seek_now(tp, expected)
            return
        self.expected[source] = block.stop
        queue = self._queues[source]
        if queue and self._join(queue[-1], block):
            queue.append(queue.pop().joined(block))
        else:
            queue.append(block)
        if source is self._waited_in_vain:
            self._waited_in_vain = None
        self._arrived()

    def skip(self, source: Source, start: int, stop: int) -> None:
        """Expect `stop` next: the positions from `start` on can no longer be read."""
        if self.expected[source] == start:
            self.expected[source] = stop

    def wants(self, source: Source) -> bool:
        """Whether there is room for another block."""
        return len(self._queues[source]) < self._ahead_max

    @property
    def blocks(self) -> int:
        """Blocks that wait here."""
        return sum(map(len, self._queues))

    def _join(self, block: Block, after: Block) -> bool:
        """Whether two blocks become one: nothing is missing between them, and it is not too large."""
        return (block.stop == after.start and len(block.records) + len(after.records) <= self._events_max
                and block.bytes + after.bytes <= JOINED_BYTES_MAX)

    @property
    def plenty(self) -> bool:
        """Whether waiting would not make the next block much larger."""
        return any(len(queue) > 1 or (queue and (2 * len(queue[0].records) > self._events_max
                                                 or 2 * queue[0].bytes > JOINED_BYTES_MAX)) for queue in self._queues)

    def queued(self, source: Source) -> bool:
        """Whether a block of this topic waits here."""
        return bool(self._queues[source])

    def unread(self, source: Source) -> bool:
        """Whether the topic partition has, as far as is known, records that have not come in yet."""
        end = self._fetches.end_offset(self._tps[source])
        return end is None or end > self.expected[source]

    def take(self, waited_s: float) -> tuple[Block, ...]:
        """What is folded next: one block, or one of each topic; nothing where there is none, or it has to wait.

        waited_s   how long it has waited; after `merge_wait_ms` in vain nothing waits again until the other topic
                   has brought something
        """
        clicks, carts = self._queues
        if clicks and carts:
            return self._both()
        if not clicks and not carts:
            return ()
        ready, other = (clicks, Source.CARTS) if clicks else (carts, Source.CLICKS)
        if ready[0].records and self.unread(other) and self._waited_in_vain is not other:
            if waited_s < self._merge_wait_s:
                return ()
            self._waited_in_vain = other
        return (ready.popleft(),)

    def _both(self) -> tuple[Block, ...]:
        """The first blocks of both topics as far as both reach in time; what is beyond stays."""
        heads = [queue.popleft() for queue in self._queues]
        if not all(head.records for head in heads):
            empty = next(source for source in Source if not heads[source].records)
            self._queues[1 - empty].appendleft(heads[1 - empty])
            return (heads[empty],)
        # The one that ends first goes whole, whatever the order of its records' times.
        horizon_ms = min(max(head.times_ms) for head in heads)
        run = []
        for queue, head in zip(self._queues, heads, strict=True):
            here, rest = head.upto(horizon_ms)
            if rest is not None:
                queue.appendleft(rest)
            if here.stop > here.start:
                run.append(here)
        return tuple(run)


def in_time_order(blocks: tuple[Block, ...], parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """What belongs to the records of one block, or of one of clicks and one of carts, in the order of their folding.

    parts   for each block, one of them for each of its records
    """
    if len(blocks) == 1:
        return parts[0]
    clicks, carts = blocks
    both = [*parts[0], *parts[1]]
    return [both[index] for index in time_order(clicks.times_ms, carts.times_ms)]
