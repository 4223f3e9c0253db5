"""Scores the users of one or more steps, decides, explains, and puts the messages into the users' outboxes.

    score      all of it. A caller that explains later, or not at all, takes its parts:
    judge      score and decide
    affordable the rows whose reasons fit into the budget of each step
    explain    calculate reasons
    publish    apply the decisions to the users, and write the messages

A call of the model costs as much as scoring many windows, so steps of any number of drivers are scored together. The
result of a step does not depend on the others, as long as the model scores each window on its own.

The caller provides the model's scorer. Nothing here uses a clock, network or file.
"""
from collections.abc import Collection, Mapping, Sequence

import msgspec
import numpy as np

from stream.core.decide import Decision, Kind, apply, decide
from stream.core.driver import Step, Touched
from stream.core.features import Features, Snapshots, batches, features
from stream.core.messages import decision_message
from stream.core.outbox import Message, ScoresPen, pack_messages
from stream.core.reasons import Claim, explain, occlude, variants, within_budget
from stream.core.rules import StepRules
from stream.core.scorer import Scorer
from stream.core.scores import Scores, collect
from stream.core.user import User, join

PADDING_SLOTS_MAX = 256         # padding that is cheaper than a separate request for a few short windows

# When the budget for reasons is short, alerts that lead to spending come before tier changes. A first tier gets none.
_PRIORITY = {Kind.CHURN: 0, Kind.INTENT: 1, Kind.POWER: 2}

Reasons = dict[Decision, list[dict]]


class Judged(msgspec.Struct):
    """Scores and decisions of some steps, before they change a user.

    rows       the touched users that were scored, step after step; the other fields have one row for each
    ends       for each step, the end of its rows
    decisions  ordered by row
    """

    rows: list[Touched]
    ends: list[int]
    snapshots: Snapshots
    inputs: Features
    scores: Scores
    decisions: list[Decision]

    def claims(self) -> list[Claim]:
        """The rows with an alert or a tier change. They ask for reasons."""
        urgency: dict[int, int] = {}
        for decision in self.decisions:
            if _has_reasons(decision):
                urgency[decision.row] = min(_PRIORITY[decision.kind], urgency.get(decision.row, len(_PRIORITY)))
        if not urgency:
            return []
        needed = variants(self.inputs, np.array(list(urgency), np.int64)).tolist()
        return [Claim(row, urgent, rows) for (row, urgent), rows in zip(urgency.items(), needed, strict=True)]

    def only(self, rows: Sequence[int]) -> 'Judged':
        """A copy of these rows, numbered from 0, as one step."""
        snapshots, place = self.snapshots.take(rows), {row: at for at, row in enumerate(rows)}
        decisions = [msgspec.structs.replace(decision, row=place[decision.row])
                     for decision in self.decisions if decision.row in place]
        return Judged([self.rows[row] for row in rows], [len(rows)], snapshots, features(snapshots),
                      self.scores.take(rows), decisions)


class Scored(msgspec.Struct):
    """The result of scoring a step.

    rows      the touched users that were scored, in the order of `scores`
    outboxes  all messages to publish, user by user, in order
    refused   number of rows with scores that are NaN or out of range; such rows lead to no decision
    """

    rows: list[Touched]
    scores: Scores | None
    outboxes: list[tuple[User, list[Message]]]
    refused: int

    @property
    def messages(self) -> list[Message]:
        """All messages to publish, in order."""
        return [message for _, messages in self.outboxes for message in messages]


class StepScorer:
    """Scores steps. No user may be in two of the steps that are scored together."""

    def __init__(self, rules: StepRules, scorer: Scorer) -> None:
        self._rules = rules
        self._scorer = scorer

    async def score(self, steps: Sequence[Step]) -> list[Scored]:
        """Score, decide, explain, and write the messages into the users' outboxes; return the result of each step.

        Errors   ModelError from the scorer. The users' alert state is then unchanged; the steps can be scored again.
        """
        judged = await self.judge(steps)
        if judged is None:
            return [nobody_scored() for _ in steps]
        explained = [row for rows in self.affordable(judged) for row in rows]
        return self.publish(judged, await self.explain(judged, explained))

    async def judge(self, steps: Sequence[Step]) -> Judged | None:
        """Score and decide. None if there is nobody to score. Empties the outboxes of all touched users.

        Errors   ModelError from the scorer. The steps can be judged again.
        """
        rows: list[Touched] = []
        ends: list[int] = []
        for step in steps:
            for entry in step.touched:
                entry.user.outbox = b''
                if entry.origin is not None:
                    rows.append(entry)
            ends.append(len(rows))
        if not rows:
            return None
        snapshots = snapshot(rows)
        inputs = features(snapshots)
        scores = await self._scores(inputs)
        decisions = decide(snapshots.headers, snapshots.as_of_ms, scores, self._rules.policy, self._scorer.model.tag)
        return Judged(rows, ends, snapshots, inputs, scores, decisions)

    def affordable(self, judged: Judged) -> list[list[int]]:
        """For each step, the rows whose reasons fit into its budget, ascending. The most urgent come first."""
        claims, start, rows = judged.claims(), 0, []
        for end in judged.ends:
            rows.append(within_budget([claim for claim in claims if start <= claim.row < end],
                                      self._rules.reasons_rows_max) if claims else [])
            start = end
        return rows

    async def explain(self, judged: Judged, rows: Collection[int]) -> Reasons:
        """Reasons for the alerts and tier changes of these rows, which ascend. Errors: ModelError from the scorer."""
        if not rows:
            return {}
        occlusions = occlude(judged.snapshots, list(rows), judged.inputs)
        occluded = await self._scores(occlusions.inputs)
        explained = set(rows)
        return {decision: explain(occlusions, occluded, decision.row, decision.kind, judged.scores)
                for decision in judged.decisions if decision.row in explained and _has_reasons(decision)}

    def publish(self, judged: Judged, reasons: Mapping[Decision, list[dict]],
                steps: Sequence[int] | None = None) -> list[Scored]:
        """Apply the decisions to the users, and write the messages into the users' outboxes; return the steps' results.

        steps   which of the judged steps; None: all. Each can be published once
        """
        pen = ScoresPen(self._scorer.model, judged.scores)
        starts = [0, *judged.ends]
        results = []
        for step in range(len(judged.ends)) if steps is None else steps:
            start, end = starts[step], starts[step + 1]
            scores = judged.scores if end - start == len(judged.rows) else judged.scores.part(start, end)
            usable = scores.usable.tolist()
            outboxes = self._outboxes(judged.rows, start, self._decided(judged, start, end, reasons), usable, pen)
            results.append(Scored(judged.rows[start:end], scores, outboxes, usable.count(False)))
        return results

    async def _scores(self, inputs: Features) -> Scores:
        cut = list(batches(inputs, self._scorer.rows_max, PADDING_SLOTS_MAX))
        return collect(cut, await self._scorer.score(cut), len(inputs.counters))

    def _decided(self, judged: Judged, start: int, end: int,
                 reasons: Mapping[Decision, list[dict]]) -> dict[int, list[Message]]:
        """Apply the decisions of rows [start, end) to the users; return the messages about them, by row."""
        model, scores, decided = self._scorer.model, judged.scores, dict[int, list[Message]]()
        for decision in judged.decisions:
            if not start <= decision.row < end:
                continue
            user, origin = judged.rows[decision.row].user, judged.rows[decision.row].origin
            assert origin is not None
            apply(user, decision, float(scores.power[decision.row]), origin.as_of_ms, model.tag)
            if decision.occasion:
                decided.setdefault(decision.row, []).append(decision_message(
                    user, decision, decision.occasion, origin, decision.row, scores, model, self._rules.policy,
                    reasons.get(decision)))
        return decided

    def _outboxes(
        self, rows: Sequence[Touched], start: int, decided: Mapping[int, list[Message]], usable: Sequence[bool],
        pen: ScoresPen,
    ) -> list[tuple[User, list[Message]]]:
        """Put the messages to publish into each user's outbox; return the users and their messages.

        usable   whether the scores of each row of the step, which begins at row `start`, can be used
        """
        outboxes: list[tuple[User, list[Message]]] = []
        if self._rules.publish == 'changes':
            for row, messages in decided.items():
                rows[row].user.outbox = pack_messages(messages)
                outboxes.append((rows[row].user, messages))
            return outboxes
        write, by_event = pen.write, self._rules.publish == 'events'
        for row, good in enumerate(usable, start):
            user, origin, messages = rows[row].user, rows[row].origin, decided.get(row)
            if good and origin is not None:
                messages = write(user, messages, row, origin.as_of_ms, origin.timer_ms,
                                 rows[row].applied if by_event else None)
            elif messages:
                user.outbox = pack_messages(messages)
            if messages:
                outboxes.append((user, messages))
        return outboxes


def nobody_scored() -> Scored:
    """The result of a step that has nobody to score."""
    return Scored([], None, [], 0)


def _has_reasons(decision: Decision) -> bool:
    return decision.occasion not in (None, 'power_first')


def snapshot(touched: Sequence[Touched]) -> Snapshots:
    """The scored users' records as snapshots, one row per entry. Every entry must have an origin."""
    headers, days, rows = join([entry.user for entry in touched])
    return Snapshots.join([headers], [days], [rows],
                          [entry.origin.as_of_ms for entry in touched if entry.origin is not None])
