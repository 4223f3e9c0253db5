"""Replays a recording with several shards, each with a part of the users. The bytes are those of `Replay`.

This side reads and decodes the rows, writes the dead letters, and gives each run's events to the shards of their users.
When all shards have answered, it puts their rows together (see `merge.py`), asks for the reasons of the alerts that the
budget covers, and writes the messages. The shards work on later runs in the meantime. No shard waits for another one,
except that at most RUNS_AHEAD_MAX runs are unfinished at any time.
"""
from collections.abc import Callable, Sequence
from typing import IO, Protocol

import msgspec
import orjson
from xxhash import xxh3_64_intdigest

from stream.core.events import Event
from stream.core.rules import ReplayRules
from stream.replay.account import Account, Counts, Sums
from stream.replay.merge import merged_steps, rows_to_explain
from stream.replay.reader import RunReader
from stream.replay.recording import Recording
from stream.replay.shard_messages import Explain, Explained, Finish, Order, Result, Row, Share

RUNS_AHEAD_MAX = 4


class Shards(Protocol):
    """The other side. A shard answers the orders that it was sent in turn, one reply for each."""

    count: int

    def send(self, shard: int, order: Order) -> None: ...

    def receive(self) -> tuple[int, Result | Explained | Sums]:
        """The next reply of any shard, and the number of the shard. Errors: those of the shard, as they were raised."""
        ...


class _Unfinished(msgspec.Struct):
    """A run that is not written yet. `rows` is the number of rows that were read for it."""

    rows: int
    results: dict[int, Result] = {}
    steps: list[list[Row]] = []
    wanted: dict[int, list[Row]] = {}       # by shard, the rows that get reasons
    explained: set[int] = set()             # the shards that have sent them


class ShardedReplay:
    """One pass over a recording.

    outputs       receives one message per line
    dead_letters  receives one dead letter per line: file, row, reason, detail and the value
    """

    def __init__(self, recording: Recording, shards: Shards, rules: ReplayRules, outputs: IO[bytes],
                 dead_letters: IO[bytes]) -> None:
        self.account = Account(outputs, dead_letters)
        self._reader = RunReader(recording, rules, self.account)
        self._sends_offsets = recording.records is None
        self._shards = shards
        self._rules = rules
        self._runs = 0
        self._unfinished: dict[int, _Unfinished] = {}       # by number of the run, in order

    def run(self, progress: Callable[[int], None] | None = None) -> Counts:
        """Replay everything. `progress` is called after each run, with its number of rows.

        Errors   InputError; ModelError; those of the shards; StateError if the counts do not add up, which is a defect.
        """
        for run in self._reader.runs():
            if run.events:
                self._send(run.events[0].ts_ms, run.events, run.values, run.rows)
            elif progress:
                progress(run.rows)
            while len(self._unfinished) >= RUNS_AHEAD_MAX:
                self._receive(progress)
        self._send(self.account.statistics.clock_ms, [], [], 0)       # what is due at the end
        while self._unfinished:
            self._receive(progress)
        for shard in range(self._shards.count):
            self._shards.send(shard, Finish())
        for _ in range(self._shards.count):
            _, sums = self._shards.receive()
            assert isinstance(sums, Sums)
            self.account.add_sums(sums)
        return self.account.added_up()

    def _send(self, clock_ms: int, events: Sequence[Event], values: Sequence[bytes], rows: int) -> None:
        self._runs += 1
        count = self._shards.count
        shares = [Share(self._runs, clock_ms) for _ in range(count)]
        for rank, (event, value) in enumerate(zip(events, values, strict=True)):
            share = shares[shard_of(event.user_id, count)]
            share.values.append(value)
            share.ranks.append(rank)
            if self._sends_offsets:
                share.offsets.append(event.offset)
        for shard, share in enumerate(shares):
            self._shards.send(shard, share)
        self._unfinished[self._runs] = _Unfinished(rows)

    def _receive(self, progress: Callable[[int], None] | None) -> None:
        """Wait for one reply, and write the runs that it completes."""
        shard, reply = self._shards.receive()
        if isinstance(reply, Result):
            run = self._unfinished[reply.run]
            run.results[shard] = reply
            if len(run.results) == self._shards.count:
                self._merge(reply.run, run)
        elif isinstance(reply, Explained):
            run = self._unfinished[reply.run]
            for row, decisions in zip(run.wanted[shard], reply.decisions, strict=True):
                row.decisions = decisions
            run.explained.add(shard)
            self._write_finished(progress)

    def _merge(self, number: int, run: _Unfinished) -> None:
        run.steps = list(merged_steps([run.results[shard] for shard in range(self._shards.count)],
                                      self._rules.block_events_max))
        run.results.clear()
        run.wanted = {shard: [] for shard in range(self._shards.count)}
        for step in run.steps:
            for row in rows_to_explain(step, self._rules.reasons_rows_max):
                run.wanted[row.shard].append(row)
        for shard, rows in run.wanted.items():
            self._shards.send(shard, Explain(number, [(row.step, row.row) for row in rows]))

    def _write_finished(self, progress: Callable[[int], None] | None) -> None:
        """Write runs from the oldest one on, as long as they are complete."""
        while self._unfinished:
            number, run = next(iter(self._unfinished.items()))
            if len(run.explained) < self._shards.count:
                return
            for step in run.steps:
                self.account.add_messages(
                    [line for row in step for line in (*row.decisions, *row.scores)],
                    [orjson.loads(decision) for row in step for decision in row.decisions])
            del self._unfinished[number]
            if progress:
                progress(run.rows)


def shard_of(user_id: str, shards: int) -> int:
    """The shard of a user."""
    return xxh3_64_intdigest(user_id.encode()) % shards
