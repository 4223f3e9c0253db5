"""A lane's intake: the contiguity guard, and the merge of both topics by time.

The contiguity guard takes a block only if it begins where the previous block of its topic ended. If not, the partition
is read again from there, and blocks that were fetched before are stale.
The merge folds both topics in the order of their records' times, as far as both have arrived. Without it, a lag in the
cart topic would send coupons to people who have just bought.
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
JOINED_BYTES_MAX = 2 << 20      # limit on the size of the records' values in a joined block


class Fetches(Protocol):
    """The part of the group's consumer that the intake needs."""

    @property
    def starts(self) -> Mapping[TopicPartition, int]: ...

    @property
    def epochs(self) -> Mapping[TopicPartition, int]: ...

    def seek_now(self, tp: TopicPartition, position: int) -> None: ...

    def end_offset(self, tp: TopicPartition) -> int | None: ...


class Intake:
    """Queues of the blocks of one partition number that wait to be folded, one queue per topic.

    ahead_max       the most blocks of a topic that may wait
    events_max      blocks that arrive while the lane is busy are joined up to this many events
    merge_wait_ms   how long events of one topic wait for unread events of the other one
    arrived         called after a block was taken
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
        self._waited_in_vain: Source | None = None      # the topic for which a wait has timed out

    def source(self, topic: str) -> Source:
        """The input that this topic is."""
        return Source.CLICKS if topic == self._tps[Source.CLICKS].topic else Source.CARTS

    def admit(self, block: Block) -> None:
        """Take a block. If an earlier block is missing, seek back to it instead."""
        source = self.source(block.topic)
        tp, expected = self._tps[source], self.expected[source]
        if block.epoch != self._fetches.epochs.get(tp):
            return
        if block.start != expected:
            log.warning('%s-%d: a block at position %d arrived, expected position %d. Reading again from %d.',
                        tp.topic, tp.partition, block.start, expected, expected)
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
        """Expect `stop` next, because the positions [start, stop) can no longer be read."""
        if self.expected[source] == start:
            self.expected[source] = stop

    def wants(self, source: Source) -> bool:
        """Whether there is room for another block."""
        return len(self._queues[source]) < self._ahead_max

    @property
    def blocks(self) -> int:
        """Number of waiting blocks."""
        return sum(map(len, self._queues))

    @property
    def events(self) -> int:
        """Number of waiting events."""
        return sum([len(block.records) for queue in self._queues for block in queue])

    def _join(self, block: Block, after: Block) -> bool:
        """Whether two blocks may be joined: nothing is missing between them, and together they are not too large."""
        return (block.stop == after.start and len(block.records) + len(after.records) <= self._events_max
                and block.bytes + after.bytes <= JOINED_BYTES_MAX)

    @property
    def plenty(self) -> bool:
        """Whether the next block is so large that waiting for more events would hardly help."""
        return any(len(queue) > 1 or (queue and (2 * len(queue[0].records) > self._events_max
                                                 or 2 * queue[0].bytes > JOINED_BYTES_MAX)) for queue in self._queues)

    def queued(self, source: Source) -> bool:
        """Whether a block of this topic is waiting."""
        return bool(self._queues[source])

    def unread(self, source: Source) -> bool:
        """Whether the topic partition may have records that have not arrived here yet."""
        end = self._fetches.end_offset(self._tps[source])
        return end is None or end > self.expected[source]

    def take(self, waited_s: float) -> tuple[Block, ...]:
        """Take the blocks to fold next: one block, or one of each topic. Empty if there is none, or if it must wait.

        waited_s   how long the caller has waited. Once a wait for the other topic has lasted `merge_wait_ms`, nothing
                   waits for that topic again until a block of it arrives
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
        """The first blocks of both topics, up to the time that both have reached. Later records stay in the queue."""
        heads = [queue.popleft() for queue in self._queues]
        if not all(head.records for head in heads):
            empty = next(source for source in Source if not heads[source].records)
            self._queues[1 - empty].appendleft(heads[1 - empty])
            return (heads[empty],)
        # Take the whole block that ends first in time, even if its records are not in the order of their times.
        horizon_ms = min(max(head.times_ms) for head in heads)
        run = []
        for queue, head in zip(self._queues, heads, strict=True):
            here, rest = head.split(horizon_ms)
            if rest is not None:
                queue.appendleft(rest)
            if here.stop > here.start:
                run.append(here)
        return tuple(run)


def in_time_order(blocks: tuple[Block, ...], parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """Merge values that belong to the records of the blocks, into the order in which the records are folded.

    blocks  one block, or a block of clicks and a block of carts
    parts   for each block, one value per record
    """
    if len(blocks) == 1:
        return parts[0]
    clicks, carts = blocks
    both = [*parts[0], *parts[1]]
    return [both[index] for index in time_order(clicks.times_ms, carts.times_ms)]
