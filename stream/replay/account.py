"""Writes and counts the outputs of a replay. Every kind of replay uses it."""
from collections.abc import Sequence
from typing import IO

import msgspec

from stream.core.dead_letters import DeadLetter
from stream.core.driver import Scored
from stream.core.outbox import Message, split_scores
from stream.core.user import User
from stream.replay.statistics import Statistics


class Counts(msgspec.Struct):
    """The counts of a replay. They add up: read = applied + duplicate + late + dead."""

    read: int = 0
    applied: int = 0
    duplicate: int = 0
    late: int = 0
    dead: int = 0
    users: int = 0
    scored: int = 0
    alerts: int = 0


class Account:
    """Writes messages and dead letters, one per line, and counts them.

    refused_scores   number of rows with scores that are NaN or out of range
    """

    def __init__(self, outputs: IO[bytes], dead_letters: IO[bytes]) -> None:
        self.counts = Counts()
        self.statistics = Statistics()
        self.refused_scores = 0
        self._outputs = outputs
        self._dead_letters = dead_letters

    def add_step(self, scored: Scored, messages: Sequence[Message]) -> None:
        """Add the result of a step. `messages` are the messages of `scored` that took effect."""
        decisions, _ = split_scores(messages)
        self.counts.scored += len(scored.rows) - scored.refused
        self.counts.alerts += len(decisions)
        self.refused_scores += scored.refused
        if scored.scores is not None:
            self.statistics.add_scores(scored.scores)
        if messages:
            self._outputs.write(b'\n'.join([message.value for message in messages]) + b'\n')
            self.statistics.add_decisions(decisions)

    def add_letter(self, letter: DeadLetter) -> None:
        """Add a dead letter."""
        self._dead_letters.write(letter.as_line())
        self.counts.dead += 1
        self.statistics.dead[letter.refusal.reason] += 1

    def add_user(self, user: User) -> None:
        """Count a user after the last step."""
        self.counts.users += 1
        self.statistics.add_final_tier(user.tier)
