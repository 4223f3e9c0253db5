"""The contiguity guard and the merge of both topics. In drawings, `c3` is a click at 3 ms and `k3` a cart event."""
from collections.abc import Sequence
from itertools import pairwise

import pytest
from aiokafka import ConsumerRecord, TopicPartition

from stream.core.events import Source
from stream.engine.blocks import Block, cut
from stream.engine.intake import Intake, in_time_order
from stream.metrics import Metrics

CLICKS, CARTS = TopicPartition('clicks', 0), TopicPartition('carts', 0)


class FakeFetches:
    """The part of the group's consumer that the intake uses."""

    def __init__(self) -> None:
        self.starts = {CLICKS: 0, CARTS: 0}
        self.epochs = {CLICKS: 1, CARTS: 1}
        self.ends: dict[TopicPartition, int | None] = {CLICKS: 0, CARTS: 0}
        self.sought: list[tuple[TopicPartition, int]] = []

    def seek_now(self, tp: TopicPartition, position: int) -> None:
        self.sought.append((tp, position))
        self.epochs[tp] += 1

    def end_offset(self, tp: TopicPartition) -> int | None:
        return self.ends[tp]


def record(topic: str, offset: int, ts_ms: int) -> ConsumerRecord:
    return ConsumerRecord(topic, 0, offset, ts_ms, 0, None, None, None, -1, -1, ())


def block(tp: TopicPartition, start: int, times: Sequence[int], stop: int | None = None, epoch: int = 1) -> Block:
    records = [record(tp.topic, start + index, ts_ms) for index, ts_ms in enumerate(times)]
    return Block(tp.topic, 0, epoch, start, start + len(times) if stop is None else stop, records)


def drawn(blocks: tuple[Block, ...]) -> str:
    letters = {'clicks': 'c', 'carts': 'k'}
    return ' '.join(f'{letters[record.topic]}{record.timestamp}'
                    for record in in_time_order(blocks, [block.records for block in blocks]))


@pytest.fixture
def fetches() -> FakeFetches:
    return FakeFetches()


@pytest.fixture
def intake(fetches: FakeFetches) -> Intake:
    return Intake((CLICKS, CARTS), fetches, 2, 1, 500, lambda: None, Metrics())


def test_blocks_that_follow_one_another_are_taken(intake: Intake, fetches: FakeFetches):
    intake.admit(block(CLICKS, 0, [1, 2]))
    intake.admit(block(CLICKS, 2, [3]))
    assert intake.expected == [3, 0]
    assert fetches.sought == []
    assert not intake.wants(Source.CLICKS)
    assert intake.wants(Source.CARTS)


def test_a_missing_block_is_read_again_and_what_was_fetched_before_is_dropped(intake: Intake, fetches: FakeFetches):
    intake.admit(block(CLICKS, 0, [1]))
    intake.admit(block(CLICKS, 5, [6]))         # 1..4 got lost
    intake.admit(block(CLICKS, 6, [7]))         # this block was already on its way, so it must not cause another seek
    assert fetches.sought == [(CLICKS, 1)]
    intake.admit(block(CLICKS, 1, [2, 3, 4, 5], epoch=2))
    intake.admit(block(CLICKS, 5, [6], epoch=2))
    assert intake.expected == [6, 0]


def test_what_waits_is_joined_up_to_the_size_of_a_block(fetches: FakeFetches):
    intake = Intake((CLICKS, CARTS), fetches, 2, 4, 500, lambda: None, Metrics())
    for start in range(4):
        assert intake.wants(Source.CLICKS)
        intake.admit(block(CLICKS, start, [start]))
        assert intake.plenty == (start > 1)
    intake.admit(block(CLICKS, 4, [], stop=7))
    intake.admit(block(CLICKS, 7, [7]))
    assert not intake.wants(Source.CLICKS)
    taken = [intake.take(0)[0] for _ in range(2)]
    assert [(part.start, part.stop, len(part.records)) for part in taken] == [(0, 7, 4), (7, 8, 1)]
    assert fetches.sought == []


def test_nothing_is_joined_over_positions_that_are_lost(fetches: FakeFetches):
    intake = Intake((CLICKS, CARTS), fetches, 2, 4, 500, lambda: None, Metrics())
    intake.admit(block(CLICKS, 0, [1]))
    intake.skip(Source.CLICKS, 1, 5)
    intake.admit(block(CLICKS, 5, [2]))
    assert [(part.start, part.stop) for part in (*intake.take(0), *intake.take(0))] == [(0, 1), (5, 6)]


def test_what_is_joined_is_bounded_in_bytes(fetches: FakeFetches, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr('stream.engine.intake.JOINED_BYTES_MAX', 10)
    intake = Intake((CLICKS, CARTS), fetches, 3, 100, 500, lambda: None, Metrics())
    for start, size in enumerate((4, 6, 1)):
        part = block(CLICKS, start, [start])
        intake.admit(Block(part.topic, 0, part.epoch, part.start, part.stop, part.records, bytes=size))
    assert intake.plenty
    taken = [*intake.take(0), *intake.take(0)]
    assert [(part.start, part.stop, part.bytes) for part in taken] == [(0, 2, 10), (2, 3, 1)]


def test_what_is_joined_is_folded_as_far_as_both_topics_reach(fetches: FakeFetches):
    intake = Intake((CLICKS, CARTS), fetches, 2, 4, 500, lambda: None, Metrics())
    intake.admit(block(CLICKS, 0, [1, 3]))
    intake.admit(block(CARTS, 0, [2]))
    intake.admit(block(CLICKS, 2, [5]))
    assert drawn(intake.take(0)) == 'c1 k2'
    intake.admit(block(CLICKS, 3, [6]))
    intake.admit(block(CARTS, 1, [7]))
    assert drawn(intake.take(0)) == 'c3 c5 c6'


def test_gaps_between_offsets_are_no_loss(intake: Intake, fetches: FakeFetches):
    intake.admit(block(CLICKS, 0, [1, 2], stop=9))      # aborted records and markers up to 9
    intake.admit(block(CLICKS, 9, [3]))
    assert fetches.sought == []
    assert drawn(intake.take(0)) == 'c1 c2'


def test_both_topics_go_as_far_as_both_reach(intake: Intake):
    intake.admit(block(CLICKS, 0, [1, 4, 6, 9]))
    intake.admit(block(CARTS, 0, [2, 4, 7]))
    first = intake.take(0)
    assert drawn(first) == 'c1 k2 c4 k4 c6 k7'
    assert [(part.topic, part.start, part.stop) for part in first] == [('clicks', 0, 3), ('carts', 0, 3)]
    assert drawn(intake.take(0)) == 'c9'
    assert intake.take(0) == ()


def test_a_topic_keeps_its_own_order_whatever_its_times(intake: Intake):
    intake.admit(block(CLICKS, 0, [5, 1, 8]))
    intake.admit(block(CARTS, 0, [3, 9, 2]))
    taken = []
    while part := intake.take(0):
        taken.append(drawn(part))
    assert ' '.join(taken).replace('k3 ', '', 1).replace('k9', '').replace('k2', '').split() == ['c5', 'c1', 'c8']
    assert [name for name in ' '.join(taken).split() if name[0] == 'k'] == ['k3', 'k9', 'k2']


def test_events_wait_for_those_of_the_other_topic_that_are_on_their_way_but_not_for_ever(
        intake: Intake, fetches: FakeFetches):
    fetches.ends[CARTS] = 1
    intake.admit(block(CLICKS, 0, [1]))
    assert intake.take(0.4) == ()
    assert drawn(intake.take(0.5)) == 'c1'
    intake.admit(block(CLICKS, 1, [2]))
    assert drawn(intake.take(0)) == 'c2'    # no wait: nothing has come from the other topic since the last wait
    intake.admit(block(CARTS, 0, [2]))
    fetches.ends[CARTS] = 2
    intake.admit(block(CLICKS, 2, [3]))
    assert drawn(intake.take(0)) == 'k2'
    assert intake.take(0) == ()             # something has come, so it waits again


def test_an_end_that_is_not_known_is_waited_for_and_one_that_is_reached_is_not(intake: Intake, fetches: FakeFetches):
    intake.admit(block(CLICKS, 0, [1]))
    assert drawn(intake.take(0)) == 'c1'
    fetches.ends[CARTS] = None
    intake.admit(block(CLICKS, 1, [2]))
    assert intake.take(0) == ()


def test_positions_without_records_pass(intake: Intake, fetches: FakeFetches):
    fetches.ends[CARTS] = 100
    intake.admit(block(CLICKS, 0, [], stop=4))
    intake.admit(block(CARTS, 0, [3]))
    assert [(part.topic, part.stop) for part in intake.take(0)] == [('clicks', 4)]


@pytest.mark.parametrize('size', [1, 2, 3, 7, 8, 100])
def test_a_cut_block_spans_the_same_positions(size: int):
    whole = block(CLICKS, 10, [1, 2, 3, 4, 5, 6, 7], stop=30)
    parts = list(cut(whole, size))
    assert [record for part in parts for record in part.records] == whole.records
    assert parts[0].start == 10
    assert parts[-1].stop == 30
    assert all(before.stop == after.start for before, after in pairwise(parts))
    assert max(len(part.records) for part in parts) <= size


def test_a_block_without_records_is_cut_into_itself():
    whole = block(CLICKS, 10, [], stop=12)
    assert list(cut(whole, 5)) == [whole]
