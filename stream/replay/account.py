"""Counts what a replay does, and writes its outputs. Every kind of replay uses it."""
from collections.abc import Iterable, Sequence
from typing import IO, Any

import msgspec

from stream.core.dead_letters import DeadLetter
from stream.core.layout import Fold
from stream.core.outbox import Message, split_scores
from stream.core.step_scorer import Scored
from stream.core.user import User
from stream.errors import StateError
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


class Sums(msgspec.Struct, tag=True):
    """What one share of a replay adds to the counts and statistics of the whole.

    histograms  name -> counts per bin, as in `Statistics.score_histograms`
    tiers       pairs of a last tier and its number of users
    """

    counts: Counts
    refused_scores: int
    histograms: dict[str, list[int]]
    tiers: list[tuple[int | None, int]]


class Tally:
    """Counts of steps and users.

    refused_scores   number of rows with scores that are NaN or out of range
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self.statistics = Statistics()
        self.refused_scores = 0

    def add_outcomes(self, outcomes: Sequence[int]) -> None:
        """Add the outcomes of a step's events, indexed by `Fold`."""
        self.counts.applied += outcomes[Fold.APPLIED]
        self.counts.duplicate += outcomes[Fold.DUPLICATE]
        self.counts.late += outcomes[Fold.LATE]

    def add_scores(self, scored: Scored) -> None:
        """Add the scores of a step."""
        self.counts.scored += len(scored.rows) - scored.refused
        self.refused_scores += scored.refused
        if scored.scores is not None:
            self.statistics.add_scores(scored.scores)

    def add_user(self, user: User) -> None:
        """Count a user after the last step."""
        self.counts.users += 1
        self.statistics.add_final_tier(user.tier)

    def sums(self) -> Sums:
        """Everything that was added so far."""
        histograms = {name: counts.tolist() for name, counts in self.statistics.score_histograms.items()}
        return Sums(self.counts, self.refused_scores, histograms, list(self.statistics.tiers.items()))

    def add_sums(self, sums: Sums) -> None:
        """Add what another tally has counted."""
        for name in Counts.__struct_fields__:
            setattr(self.counts, name, getattr(self.counts, name) + getattr(sums.counts, name))
        self.refused_scores += sums.refused_scores
        for name, counts in sums.histograms.items():
            self.statistics.score_histograms[name] += counts
        self.statistics.tiers.update(dict(sums.tiers))


class Account(Tally):
    """Also writes messages and dead letters, one per line, and counts them."""

    def __init__(self, outputs: IO[bytes], dead_letters: IO[bytes]) -> None:
        super().__init__()
        self._outputs = outputs
        self._dead_letters = dead_letters

    def add_step(self, scored: Scored, messages: Sequence[Message]) -> None:
        """Add the result of a step. `messages` are the messages of `scored` that took effect."""
        self.add_scores(scored)
        decisions, _ = split_scores(messages)
        self.add_messages([message.value for message in messages],
                          [message.content for message in decisions if message.content is not None])

    def add_messages(self, lines: Iterable[bytes], decisions: Sequence[dict[str, Any]]) -> None:
        """Add messages, each of them one line, and what the decisions among them say."""
        self.counts.alerts += len(decisions)
        if text := b'\n'.join(lines):
            self._outputs.write(text + b'\n')
            self.statistics.add_contents(decisions)

    def add_letter(self, letter: DeadLetter) -> None:
        """Add a dead letter."""
        self._dead_letters.write(letter.as_line())
        self.counts.dead += 1
        self.statistics.dead[letter.refusal.reason] += 1

    def added_up(self) -> Counts:
        """The counts of a whole replay. Errors: StateError if they do not add up, which is a defect."""
        counts = self.counts
        if counts.read != counts.applied + counts.duplicate + counts.late + counts.dead:
            raise StateError(f'The counts do not add up: {counts}.', 'report this, with the recording.')
        return counts
