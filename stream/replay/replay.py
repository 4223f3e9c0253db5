"""Replays recorded events through the step driver, in event-time order, as one stream.

Unlike a lane, a replay knows the time of the whole stream. Before each step it also fires the timers of all other users
that are due by then. `sharded.py` does the same with several processes.
"""
import asyncio
from collections.abc import Callable
from typing import IO

from stream.core.driver import Step, StepDriver
from stream.core.events import Event
from stream.core.rules import ReplayRules
from stream.core.scorer import Scorer
from stream.core.step_scorer import StepScorer
from stream.replay.account import Account, Counts
from stream.replay.reader import RunReader
from stream.replay.recording import Recording
from stream.state.replay_state import State, load_silent


class Replay:
    """One pass over a recording.

    outputs       receives one message per line
    dead_letters  receives one dead letter per line: file, row, reason, detail and the value
    """

    def __init__(self, recording: Recording, state: State, scorer: Scorer, rules: ReplayRules, outputs: IO[bytes],
                 dead_letters: IO[bytes]) -> None:
        self.account = Account(outputs, dead_letters)
        self._reader = RunReader(recording, rules, self.account)
        self._state = state
        self._users_max = rules.block_events_max
        self._driver = StepDriver(rules.limits)
        self._scorer = StepScorer(rules, scorer)

    async def run(self, progress: Callable[[int], None] | None = None) -> Counts:
        """Replay everything. `progress` is called after each run, with its number of rows.

        Errors   InputError; ModelError; StateError if the counts do not add up, which is a defect.
        """
        for run in self._reader.runs():
            if run.events:
                await self._events(run.events)
            if progress:
                progress(run.rows)
            await asyncio.sleep(0)      # Ctrl-C is noticed here
        while due := load_silent(self._state, self.account.statistics.clock_ms, self._users_max, ()):
            await self._take(self._driver.sweep(due))
        for user in self._state.users():
            self.account.add_user(user)
        return self.account.added_up()

    async def _events(self, events: list[Event]) -> None:
        users = self._state.load(dict.fromkeys([event.user_id for event in events]))
        clock_ms = events[0].ts_ms
        for step in self._driver.run(users, events, lambda: load_silent(self._state, clock_ms, self._users_max, users)):
            await self._take(step)

    async def _take(self, step: Step) -> None:
        self.account.add_outcomes(step.counts)
        scored, = await self._scorer.score([step])
        self._state.save(entry.user for entry in step.touched)
        self.account.add_step(scored, scored.messages)
