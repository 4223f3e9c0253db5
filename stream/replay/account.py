"""What a replay writes and counts, the same for every kind of replay."""
from collections.abc import Sequence
from typing import IO

import msgspec

from stream.core.dead_letters import DeadLetter
from stream.core.decide import Kind
from stream.core.driver import Scored
from stream.core.outbox import Message
from stream.core.user import User
from stream.replay.statistics import Statistics


class Counts(msgspec.Struct):
    """The account of a replay: read = applied + duplicate + late + dead."""

    read: int = 0
    applied: int = 0
    duplicate: int = 0
    late: int = 0
    dead: int = 0
    users: int = 0
    scored: int = 0
    alerts: int = 0


class Account:
    """Writes messages and dead letters, one a line, and counts them.

    refused_scores   rows whose scores are not numbers in range
    """

    def __init__(self, outputs: IO[bytes], dead_letters: IO[bytes]) -> None:
        self.counts = Counts()
        self.statistics = Statistics()
        self.refused_scores = 0
        self._outputs = outputs
        self._dead_letters = dead_letters

    def add_step(self, scored: Scored, messages: Sequence[Message]) -> None:
        """Take what a step has led to. `messages` are those of `scored` that count."""
        decisions = [message for message in messages if message.kind is not Kind.SCORES]
        self.counts.scored += len(scored.rows) - scored.refused
        self.counts.alerts += len(decisions)
        self.refused_scores += scored.refused
        if scored.scores is not None:
            self.statistics.add_scores(scored.scores)
        if messages:
            self._outputs.write(b'\n'.join([message.value for message in messages]) + b'\n')
            self.statistics.add_decisions(decisions)

    def add_letter(self, letter: DeadLetter) -> None:
        """Take a record that is no event."""
        self._dead_letters.write(letter.as_line())
        self.counts.dead += 1
        self.statistics.dead[letter.refusal.reason] += 1

    def add_user(self, user: User) -> None:
        """Take a user as the replay leaves them."""
        self.counts.users += 1
        self.statistics.add_final_tier(user.tier)
