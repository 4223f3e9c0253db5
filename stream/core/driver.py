"""The step driver turns events and due timers into messages.

It has three callers: a lane of the worker, a replay of files, and a replay of a journal. The callers read and decode
records, load the users, store the results and send the messages. The driver does everything in between, in the same way
for all of them:

    run      cut a run of events into steps
    sweep    make a step out of due silence timers
    score    score a step's users, decide, explain, and put the messages into the users' outboxes. A caller that
             explains later, or not at all, takes the three parts of it: `judge`, `explain` and `publish`

A step is a group of events or timers. Its users are scored, decided and written together. A timer must fire at its due
time, before any later event of the same user is folded. Two rules ensure this:

    before the run    A timer that is due at or before the user's first event of the run fires first, in a sweep.
    within the run    An event of the run may set a timer. The user's events at or after the due time wait for the next
                      step. Other users' events do not wait.

The caller provides the scorer. The driver itself uses no clock, network or file.
"""
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter

import msgspec
import numpy as np

from stream.core.decide import Decision, Kind, apply, decide
from stream.core.events import Event
from stream.core.features import Features, Snapshots, batches, features
from stream.core.layout import Fold
from stream.core.messages import Origin, decision_message
from stream.core.outbox import Message, ScoresPen, pack_messages
from stream.core.reasons import Claim, explain, occlude, variants, within_budget
from stream.core.rules import StepRules
from stream.core.scorer import Scorer
from stream.core.scores import Scores, collect
from stream.core.user import User, clock_ms, fire_timer, fold_runs, join, overdue, stamp

PADDING_SLOTS_MAX = 256         # padding that is cheaper than a separate request for a few short windows

# When the budget for reasons is short, alerts that lead to spending come before tier changes. A first tier gets none.
_PRIORITY = {Kind.CHURN: 0, Kind.INTENT: 1, Kind.POWER: 2}

Silent = Callable[[], Iterable[User]]
_by_due_time = attrgetter('due_ms', 'user_id')


def nobody() -> Iterable[User]:
    """The default for `silent`: no other user has a timer to fire."""
    return ()


class Touched(msgspec.Struct, gc=False):
    """One user of a step.

    origin      the time and cause of the user's score; None if no event was applied, so nothing is scored
    applied     the events applied in this step, in order; empty for a timer
    """

    user: User
    origin: Origin | None
    applied: list[Event]


class Step(msgspec.Struct):
    """Events or timers of some users, which are scored and written together.

    number   counts the steps of one driver; the users' records store it
    touched  the step's users
    new      for each touched user, whether the user had no record before
    counts   number of events per outcome, indexed by `stream.core.layout.Fold`
    waiting  events of the same run that wait for later steps
    """

    number: int
    touched: list[Touched]
    new: list[bool]
    counts: list[int]
    waiting: list[Event]


class Judged(msgspec.Struct):
    """Scores and decisions of a step, before they change a user.

    rows       the touched users that were scored; the other fields have one row for each
    decisions  ordered by row
    """

    rows: list[Touched]
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
        needed = variants(self.inputs, np.array(list(urgency), np.int64)).tolist()
        return [Claim(row, urgent, rows) for (row, urgent), rows in zip(urgency.items(), needed, strict=True)]

    def only(self, rows: Sequence[int]) -> 'Judged':
        """A copy of these rows, numbered from 0."""
        snapshots, place = self.snapshots.take(rows), {row: at for at, row in enumerate(rows)}
        decisions = [msgspec.structs.replace(decision, row=place[decision.row])
                     for decision in self.decisions if decision.row in place]
        return Judged([self.rows[row] for row in rows], snapshots, features(snapshots), self.scores.take(rows),
                      decisions)


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


class StepDriver:
    """Drives one serial stream of steps.

    number      number of the newest step
    generation  generation of the owner, stored in the users' records; 0 if ownership never changes
    """

    def __init__(self, rules: StepRules, scorer: Scorer, generation: int = 0) -> None:
        self.number = 0
        self._rules = rules
        self._scorer = scorer
        self._generation = generation

    def run(self, users: dict[str, User], events: list[Event], silent: Silent = nobody) -> Iterator[Step]:
        """Cut a run of events into steps, lazily. The caller must score each step before it asks for the next one.

        users    all users of `events`, by id; changed in place
        silent   returns other users with a timer to fire before the remaining events; called until it returns none
        Yields   at least one step: a run without events is one step that changes nothing.
        Promise  every event is counted exactly once; a run that is delivered again scores nobody.
        """
        if not events:
            yield self._step([], [0] * len(Fold), [])
        while events:
            while due := sorted([*silent(), *overdue(users, events)], key=_by_due_time):
                yield self.sweep(due, events)
            step = self._fold(users, events)
            yield step
            events = step.waiting

    def sweep(self, users: Iterable[User], waiting: list[Event] | None = None) -> Step:
        """Fire the due timer of each user, in this order. Each user is scored as of the timer's due time."""
        touched = [Touched(user, Origin(due_ms := fire_timer(user, self._rules.limits), due_ms), []) for user in users]
        return self._step(touched, [0] * len(Fold), waiting or [])

    async def score(self, step: Step) -> Scored:
        """Score, decide, explain, and write the messages into the users' outboxes.

        Errors   ModelError from the scorer. The users' alert state is then unchanged, and the step can be scored again.
        """
        judged = await self.judge(step)
        if judged is None:
            return Scored([], None, [], 0)
        explained = within_budget(judged.claims(), self._rules.reasons_rows_max)
        return self.publish(judged, await self.explain(judged, explained))

    async def judge(self, step: Step) -> Judged | None:
        """Score and decide. None if the step has nobody to score. Empties the outboxes of all touched users.

        Errors   ModelError from the scorer. The step can be judged again.
        """
        for entry in step.touched:
            entry.user.outbox = b''
        rows = [entry for entry in step.touched if entry.origin is not None]
        if not rows:
            return None
        snapshots = snapshot(rows)
        inputs = features(snapshots)
        scores = await _score(inputs, self._scorer)
        decisions = decide(snapshots.headers, snapshots.as_of_ms, scores, self._rules.policy, self._scorer.model.tag)
        return Judged(rows, snapshots, inputs, scores, decisions)

    async def explain(self, judged: Judged, rows: Collection[int]) -> dict[Decision, list[dict]]:
        """Reasons for the alerts and tier changes of these rows, which ascend. Errors: ModelError from the scorer."""
        if not rows:
            return {}
        occlusions = occlude(judged.snapshots, list(rows), judged.inputs)
        occluded = await _score(occlusions.inputs, self._scorer)
        explained = set(rows)
        return {decision: explain(occlusions, occluded, decision.row, decision.kind, judged.scores)
                for decision in judged.decisions if decision.row in explained and _has_reasons(decision)}

    def publish(self, judged: Judged, reasons: Mapping[Decision, list[dict]]) -> Scored:
        """Apply the decisions to the users, and write the messages into the users' outboxes."""
        rows, scores = judged.rows, judged.scores
        decided = self._decided(rows, judged.decisions, scores, reasons)
        return Scored(rows, scores, self._outboxes(rows, decided, scores), int(np.sum(~scores.usable)))

    def _fold(self, users: dict[str, User], events: list[Event]) -> Step:
        limits = self._rules.limits
        runs, counts, waiting = fold_runs(users, events, limits)
        touched = [Touched(user, Origin(clock_ms(user, limits), 0) if applied else None, applied)
                   for user, applied in runs]
        return self._step(touched, counts, waiting)

    def _step(self, touched: list[Touched], counts: list[int], waiting: list[Event]) -> Step:
        self.number += 1
        new = stamp([entry.user for entry in touched], self.number, self._generation)
        return Step(self.number, touched, new, counts, waiting)

    def _decided(
        self, rows: Sequence[Touched], decisions: Sequence[Decision], scores: Scores,
        reasons: Mapping[Decision, list[dict]],
    ) -> dict[int, list[Message]]:
        """Apply the decisions to the users; return the messages about them, by row."""
        model, decided = self._scorer.model, dict[int, list[Message]]()
        for decision in decisions:
            user, origin = rows[decision.row].user, rows[decision.row].origin
            assert origin is not None
            apply(user, decision, float(scores.power[decision.row]), origin.as_of_ms, model.tag)
            if decision.occasion:
                decided.setdefault(decision.row, []).append(decision_message(
                    user, decision, decision.occasion, origin, decision.row, scores, model, self._rules.policy,
                    reasons.get(decision)))
        return decided

    def _outboxes(
        self, rows: Sequence[Touched], decided: Mapping[int, list[Message]], scores: Scores,
    ) -> list[tuple[User, list[Message]]]:
        """Put the messages to publish into each user's outbox; return the users and their messages."""
        outboxes: list[tuple[User, list[Message]]] = []
        if self._rules.publish == 'changes':
            for row, messages in decided.items():
                rows[row].user.outbox = pack_messages(messages)
                outboxes.append((rows[row].user, messages))
            return outboxes
        write, by_event = ScoresPen(self._scorer.model, scores).write, self._rules.publish == 'events'
        usable = scores.usable.tolist()
        for row, entry in enumerate(rows):
            user, origin, messages = entry.user, entry.origin, decided.get(row)
            if usable[row] and origin is not None:
                messages = write(user, messages, row, origin.as_of_ms, origin.timer_ms,
                                 entry.applied if by_event else None)
            elif messages:
                user.outbox = pack_messages(messages)
            if messages:
                outboxes.append((user, messages))
        return outboxes


async def _score(inputs: Features, scorer: Scorer) -> Scores:
    cut = list(batches(inputs, scorer.rows_max, PADDING_SLOTS_MAX))
    return collect(cut, await scorer.score(cut), len(inputs.counters))


def _has_reasons(decision: Decision) -> bool:
    return decision.occasion not in (None, 'power_first')


def snapshot(touched: Sequence[Touched]) -> Snapshots:
    """The scored users' records as snapshots, one row per entry. Every entry must have an origin."""
    headers, days, rows = join([entry.user for entry in touched])
    return Snapshots.join([headers], [days], [rows],
                          [entry.origin.as_of_ms for entry in touched if entry.origin is not None])
