"""A step's touched users go to the scorer and come back as decisions and messages."""
from collections.abc import Sequence

import msgspec
import numpy as np

from stream.core.decide import Decision, Kind, Policy, apply, decide
from stream.core.features import Features, Snapshots, batches, features
from stream.core.messages import decision_message
from stream.core.outbox import ScoresPen, pack_messages
from stream.core.reasons import explain, occlude, variants
from stream.core.rules import Publish
from stream.core.scores import Scores, collect
from stream.core.steps import Touched, snapshot
from stream.core.user import User
from stream.scoring.scorer import Scorer

PADDING_SLOTS_MAX = 256         # that few windows of a length may cost, to save a request of their own

# Who is explained first when the budget is short: the alerts that cost money before the news. A first tier is neither.
_PRIORITY = {Kind.CHURN: 0, Kind.INTENT: 1, Kind.POWER: 2}


class Scored(msgspec.Struct):
    """What a step has led to.

    rows      the touched users that were scored, in the order of `scores`
    outboxes  everything to publish, user by user, in order
    alerts    those of the messages that announce a decision
    """

    rows: list[Touched]
    scores: Scores | None
    outboxes: list[tuple[User, list[bytes]]]
    alerts: list[bytes]
    refused: int        # rows whose scores were no numbers in range; they decide nothing

    @property
    def messages(self) -> list[bytes]:
        """Everything to publish, in order."""
        return [message for _, messages in self.outboxes for message in messages]


async def score_step(
    touched: Sequence[Touched], scorer: Scorer, policy: Policy, publish: Publish, reasons_rows_max: int,
) -> Scored:
    """Score, decide, explain, and write the messages into the users' outboxes.

    publish            changes: decisions only; all: scores of every scored user too; events: scores once per event
    reasons_rows_max   model rows that the reasons of one step may cost
    Errors             ModelError from the scorer; the users' alert state is untouched then.
    """
    rows = [entry for entry in touched if entry.origin is not None]
    for entry in touched:
        entry.user.outbox = b''
    if not rows:
        return Scored([], None, [], [], 0)
    snapshots = snapshot(rows)
    inputs = features(snapshots)
    scores = await _score(inputs, scorer)
    decisions = decide(snapshots.headers, snapshots.as_of_ms, scores, policy, scorer.model.tag)
    reasons = await _reasons(decisions, snapshots, inputs, scores, scorer, reasons_rows_max)

    by_row: dict[int, list[Decision]] = {}
    for decision in decisions:
        by_row.setdefault(decision.row, []).append(decision)
    alerts: list[bytes] = []
    decided: dict[int, list[bytes]] = {}
    for row, mine in by_row.items():
        user, origin = rows[row].user, rows[row].origin
        assert origin is not None
        for decision in mine:
            apply(user, decision, float(scores.power[row]), origin.as_of_ms, scorer.model.tag)
            if decision.occasion:
                message = decision_message(user, decision, decision.occasion, origin, row, scores, scorer.model,
                                           policy, reasons.get(decision))
                decided.setdefault(row, []).append(message)
                alerts.append(message)
    outboxes: list[tuple[User, list[bytes]]] = []
    if publish == 'changes':
        for row, messages in decided.items():
            rows[row].user.outbox = pack_messages(messages)
            outboxes.append((rows[row].user, messages))
    else:
        write, by_event, usable = ScoresPen(scorer.model, scores).write, publish == 'events', scores.usable.tolist()
        for row, entry in enumerate(rows):
            user, origin, messages = entry.user, entry.origin, decided.get(row)
            if usable[row] and origin is not None:
                messages = write(user, messages, row, origin.as_of_ms, origin.timer_ms,
                                 entry.applied if by_event else None)
            elif messages:
                user.outbox = pack_messages(messages)
            if messages:
                outboxes.append((user, messages))
    return Scored(rows, scores, outboxes, alerts, int(np.sum(~scores.usable)))


async def _score(inputs: Features, scorer: Scorer) -> Scores:
    cut = list(batches(inputs, scorer.rows_max, PADDING_SLOTS_MAX))
    return collect(cut, await scorer.score(cut), len(inputs.counters))


async def _reasons(
    decisions: Sequence[Decision], snapshots: Snapshots, inputs: Features, scores: Scores, scorer: Scorer,
    rows_max: int,
) -> dict[Decision, list[dict]]:
    """The reasons of the alerts and tier changes that the budget allows, the most urgent first."""
    alerts = [decision for decision in decisions if decision.occasion not in (None, 'power_first')]
    by_priority = sorted(alerts, key=lambda decision: (_PRIORITY[decision.kind], decision.row))
    unique = np.array(list(dict.fromkeys(decision.row for decision in by_priority)), np.int64)
    rows = sorted(unique[np.cumsum(variants(inputs, unique)) <= rows_max].tolist())
    if not rows:
        return {}
    occlusions = occlude(snapshots, rows, inputs)
    occluded = await _score(occlusions.inputs, scorer)
    explained = set(rows)
    return {decision: explain(occlusions, occluded, decision.row, decision.kind, scores)
            for decision in alerts if decision.row in explained}
