"""One shard of a replay: some of the users, with their state and a step driver of their own.

A shard folds and scores its share of each run as if there were no other users. Its steps are therefore smaller than
those of the whole replay, and it cannot know which alerts the budget for reasons covers. So it sends its rows without
reasons, keeps what is needed to explain them, and is told later.
"""
from collections import defaultdict
from collections.abc import Callable, Iterator

import msgspec

from stream.core.driver import Step, StepDriver
from stream.core.events import SOURCE_OF_TYPE, Event
from stream.core.messages import with_reasons
from stream.core.outbox import Message, split_scores
from stream.core.rules import ReplayRules
from stream.core.scorer import Scorer
from stream.core.step_scorer import Judged, StepScorer
from stream.replay.account import Sums, Tally
from stream.replay.recording import row_decoder
from stream.replay.shard_messages import Explain, Explained, Result, Round, Row, Share
from stream.replay.topic_records import Inputs
from stream.state.replay_state import State, load_silent


class ShardRecipe(msgspec.Struct, frozen=True):
    """How a process makes its shard: it can be sent to one.

    scorer, state   make the scorer, and the state of the shard with this number
    records         as `Recording.records`
    """

    scorer: Callable[[], Scorer]
    state: Callable[[int], State]
    rules: ReplayRules
    records: Inputs | None

    def make(self, number: int) -> 'Shard':
        return Shard(self.state(number), self.scorer(), self.rules, self.records)


class _Unexplained(msgspec.Struct):
    """The claims of one step: rows of the step, their scores and decisions, and their messages."""

    rows: list[int]
    judged: Judged
    messages: list[list[Message]]


class Shard:
    """Users of a replay that are replayed apart from the others."""

    def __init__(self, state: State, scorer: Scorer, rules: ReplayRules, records: Inputs | None) -> None:
        self._state = state
        self._users_max = rules.block_events_max
        self._driver = StepDriver(rules.limits)
        self._scorer = StepScorer(rules, scorer)
        self._decode = row_decoder(rules.events, records)
        self._tally = Tally()
        self._unexplained: defaultdict[int, dict[int, _Unexplained]] = defaultdict(dict)    # by run, then by step

    async def take(self, share: Share) -> Result:
        """Replay a share of a run. Errors: ModelError."""
        events = self._events(share)
        ranks: dict[str, int] = {}
        for event, rank in zip(events, share.ranks, strict=True):
            ranks.setdefault(event.user_id, rank)
        rounds = [Round()]
        for step in self._steps(events, ranks, share.clock_ms):
            rows = await self._rows(share.run, step, ranks)
            current = rounds[-1]
            if any(step.counts):        # only events are counted
                current.folded = rows
                rounds.append(Round())
            else:
                current.fired.append([row for row in rows if row.user_id in ranks])
                current.silent += [row for row in rows if row.user_id not in ranks]
        return Result(share.run, rounds)

    async def explain(self, order: Explain) -> Explained:
        """Explain some alerts of a run, and forget the others. Errors: ModelError."""
        unexplained = self._unexplained.pop(order.run, {})
        wanted: defaultdict[int, list[int]] = defaultdict(list)
        for step, row in order.rows:
            wanted[step].append(row)
        found = {(step, row): decisions for step, rows in wanted.items()
                 for row, decisions in zip(rows, await self._explained(unexplained[step], rows), strict=True)}
        return Explained(order.run, [found[place] for place in order.rows])

    def finish(self) -> Sums:
        """Count the users, and close the state."""
        for user in self._state.users():
            self._tally.add_user(user)
        self._state.close()
        return self._tally.sums()

    def _events(self, share: Share) -> list[Event]:
        events = []
        for value in share.values:
            event = self._decode(value)
            assert isinstance(event, Event)     # the reader has decoded it too
            events.append(event)
        for event, offset in zip(events, share.offsets, strict=False):
            event.source, event.offset = SOURCE_OF_TYPE[event.type], offset
        return events

    def _steps(self, events: list[Event], ranks: dict[str, int], clock_ms: int) -> Iterator[Step]:
        def silent():
            return load_silent(self._state, clock_ms, self._users_max, ranks)

        if events:
            yield from self._driver.run(self._state.load(ranks), events, silent)
        else:
            while due := silent():
                yield self._driver.sweep(due)

    async def _rows(self, run: int, step: Step, ranks: dict[str, int]) -> list[Row]:
        """Score a step, and return its rows: all of a sweep, but after events only those that say something."""
        self._tally.add_outcomes(step.counts)
        judged = await self._scorer.judge([step])
        if judged is None:
            self._state.save(entry.user for entry in step.touched)
            return []
        scored, = self._scorer.publish(judged, {})
        self._state.save(entry.user for entry in step.touched)
        self._tally.add_scores(scored)
        messages = {user.user_id: split_scores(messages) for user, messages in scored.outboxes}
        claims = {claim.row: claim for claim in judged.claims()}
        if claims:
            rows = list(claims)
            self._unexplained[run][step.number] = _Unexplained(
                rows, judged.only(rows), [messages.get(judged.rows[row].user.user_id, ([], []))[0] for row in rows])
        said = []
        for number, entry in enumerate(judged.rows):
            user_id, origin = entry.user.user_id, entry.origin
            assert origin is not None
            if user_id not in messages:
                if origin.timer_ms:
                    said.append(Row(origin.timer_ms, user_id, step.number, number))
                continue
            decisions, scores = messages[user_id]
            row = Row(origin.timer_ms or ranks[user_id], user_id, step.number, number,
                      [message.value for message in decisions], [message.value for message in scores])
            if claim := claims.get(number):
                row.urgency, row.variants = claim.urgency, claim.variants
            said.append(row)
        return said

    async def _explained(self, kept: _Unexplained, rows: list[int]) -> list[list[bytes]]:
        """The decisions of some rows of a step with their reasons."""
        place_of = {row: place for place, row in enumerate(kept.rows)}
        places = [place_of[row] for row in rows]
        reasons = {(decision.row, decision.kind): found for decision, found in
                   (await self._scorer.explain(kept.judged, sorted(places))).items()}
        return [[(with_reasons(message, reasons[place, message.kind]) if (place, message.kind) in reasons
                  else message).value for message in kept.messages[place]] for place in places]
