import asyncio
import json
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from stream.core.decide import Kind, Policy
from stream.core.driver import Step, StepDriver, Touched
from stream.core.events import Event, EventType, Source
from stream.core.features import LENGTHS, Batch
from stream.core.layout import DAY_MS, Fold, WindowLimits
from stream.core.messages import Origin
from stream.core.outbox import Message, unpack_outbox
from stream.core.rules import Publish, StepRules
from stream.core.scores import Outputs
from stream.core.step_scorer import PADDING_SLOTS_MAX, Scored, StepScorer, snapshot
from stream.core.user import User, encode
from stream.errors import ModelError
from stream.scoring.constant import ConstantScorer

T0_MS = 1_700_000_000_000
LIMITS = WindowLimits(silence_ms=(3 * DAY_MS, 7 * DAY_MS))
POLICY = Policy(tier_events_min=1, churn_orders_min=0)


def driver(generation: int = 0) -> StepDriver:
    return StepDriver(LIMITS, generation)


# ---- which events and timers a step takes ---------------------------------------------------------------------------

def reads(*events: tuple[str, float]) -> list[Event]:
    """Events as (user, days after T0)."""
    return [Event(user, f'{user}{at}', at, T0_MS + int(days * DAY_MS), EventType.VIEW, 0, 0, 0, 0.0, 0, Source.CLICKS,
                  at) for at, (user, days) in enumerate(events)]


def users_of(entries: list[Event]) -> dict[str, User]:
    return {entry.user_id: User(entry.user_id) for entry in entries}


def test_a_step_takes_a_run_whole_when_no_timer_is_in_it():
    entries = reads(('a', 0), ('b', 1), ('a', 2), ('b', 3.9))
    step, = driver().run(users_of(entries), entries)
    assert step.waiting == []
    assert step.counts[Fold.APPLIED] == 4
    assert [(touched.user.user_id, [event.event_id for event in touched.applied], touched.origin)
            for touched in step.touched] == [
        ('a', ['a0', 'a2'], Origin(T0_MS + 2 * DAY_MS, 0)),
        ('b', ['b1', 'b3'], Origin(T0_MS + int(3.9 * DAY_MS), 0))]


#   day      0    1    2    3    4    5
#   a        x    |    |    !    x        ! due: fires before the event of day 4
def test_a_timer_set_within_the_run_ends_the_step():
    entries = reads(('a', 0), ('b', 1), ('a', 4), ('b', 4))
    folded, fired, rest = driver().run(users_of(entries), entries)
    assert (folded.waiting, folded.counts[Fold.APPLIED]) == ([entries[2], entries[3]], 2)
    assert [(touched.user.user_id, touched.origin) for touched in fired.touched] == [
        ('a', Origin(T0_MS + 3 * DAY_MS, T0_MS + 3 * DAY_MS)), ('b', Origin(T0_MS + 4 * DAY_MS, T0_MS + 4 * DAY_MS))]
    assert (fired.waiting, sum(fired.counts)) == (folded.waiting, 0)
    assert (rest.waiting, rest.counts[Fold.APPLIED]) == ([], 2)


def test_steps_are_numbered_and_users_know_theirs():
    entries = reads(('a', 0), ('b', 1), ('a', 4), ('b', 4))
    users, counting = users_of(entries), driver(generation=7)
    counting.number = 41
    assert [(step.number, step.new, {(user.step, user.generation) for user in users.values()})
            for step in counting.run(users, entries)] == [
        (42, [True, True], {(42, 7)}), (43, [False, False], {(43, 7)}), (44, [False, False], {(44, 7)})]


def test_who_else_is_silent_fires_in_the_order_of_due_times():
    entries = reads(('a', 0), ('b', 1), ('a', 4), ('c', 0.5))
    users = users_of(entries)
    next(driver().run(users, [entries[0], entries[1], entries[3]]))
    silent = [[users['c'], users['b']], []]
    fired, folded = driver().run({'a': users['a']}, [entries[2]], lambda: silent.pop(0))
    assert [touched.user.user_id for touched in fired.touched] == ['a', 'c', 'b']
    assert folded.counts[Fold.APPLIED] == 1


def test_an_older_event_fires_nothing():
    entries = reads(('a', 5), ('a', 1), ('a', 7.9))
    step, = driver().run(users_of(entries), entries)
    assert step.waiting == []


def test_users_with_nothing_applied_are_touched_but_not_scored():
    first = reads(('a', 0), ('b', 0))
    users = users_of(first)
    next(driver().run(users, first))
    again = reads(('a', 0), ('b', 0), ('b', 0.1))
    for entry in again:
        entry.offset += 2
    step, = driver().run(users, again)
    assert (step.counts[Fold.DUPLICATE], step.counts[Fold.APPLIED]) == (2, 1)
    assert [touched.origin is None for touched in step.touched] == [True, False]


def test_a_redelivered_run_touches_its_users_and_scores_nobody():
    entries = reads(('a', 0), ('a', 1))
    users = users_of(entries)
    next(driver().run(users, entries))
    step, = driver().run(users, entries)
    assert step.counts[Fold.SEEN] == 2
    assert step.touched[0].origin is None


def test_a_snapshot_has_a_row_for_each_scored_user_as_of_its_origin():
    entries = reads(('a', 0), ('b', 1), ('b', 2))
    taken = snapshot(next(driver().run(users_of(entries), entries)).touched)
    assert taken.as_of_ms.tolist() == [T0_MS, T0_MS + 2 * DAY_MS]
    assert taken.headers['events'].tolist() == [1, 2]
    assert len(taken.rows) == 3


def described(users: dict[str, User], entries: list[Event]) -> list[str]:
    """The steps of a run: `a@3!` is a timer of `a` due on day 3, `a:1,2` are events of `a`, `a-` had none applied."""
    steps = []
    for step in driver().run(users, entries):
        told = []
        for touched in step.touched:
            if touched.origin is None:
                told.append(f'{touched.user.user_id}-')
            elif touched.origin.timer_ms:
                told.append(f'{touched.user.user_id}@{(touched.origin.timer_ms - T0_MS) / DAY_MS:g}!')
            else:
                told.append(f'{touched.user.user_id}:{",".join(str(event.offset) for event in touched.applied)}')
        steps.append(' '.join(told))
    return steps


#   day      0    1    2    3    4    5    6    7    8    9
#   a        x    |    |    !    x    |    |    !    |    x
#   b        |    x    |    |    !    x
#   c        |    |    |    |    x
def test_a_run_is_cut_where_timers_fire_first():
    entries = reads(('a', 0), ('b', 1), ('c', 4), ('a', 4), ('b', 5), ('a', 9))
    users = users_of(entries)
    assert described(users, entries) == ['a:0 b:1 c:2', 'a@3! b@4!', 'a:3 b:4', 'a@7!', 'a:5']
    assert users['a'].next_offset == [6, 0]


def test_a_long_silence_fires_its_timers_one_sweep_each_before_the_event():
    first, then = reads(('a', 0)), reads(('b', 0), ('a', 9))
    users = users_of(first + then)
    assert described(users, first) == ['a:0']
    assert described(users, then) == ['a@3!', 'a@7!', 'b:0 a:1']


def test_a_run_without_events_is_one_step_that_changes_nothing():
    step, = driver().run({}, [])
    assert (step.number, step.touched, sum(step.counts), step.waiting) == (1, [], 0, [])
    scored, = asyncio.run(StepScorer(StepRules(limits=LIMITS, policy=POLICY), ConstantScorer()).score([step]))
    assert scored.messages == []


def test_a_redelivered_run_fires_nothing_and_scores_nobody():
    # The event of day 1 sets a timer for day 4. The repeat on day 10 is redelivered, so it must not fire that timer.
    entries = reads(('a', 0), ('a', 10), ('a', 1))
    entries[1].event_id, entries[1].key = entries[0].event_id, entries[0].key
    users = users_of(entries)
    assert described(users, entries) == ['a:0', 'a@3!', 'a@7!', 'a:2']
    assert users['a'].due_ms == T0_MS + 4 * DAY_MS
    assert set(' '.join(described(users, entries)).split()) == {'a-'}
    assert users['a'].due_ms == T0_MS + 4 * DAY_MS


def test_a_step_is_taken_when_it_is_asked_for():
    entries = reads(('a', 0), ('a', 4))
    users = users_of(entries)
    steps = driver().run(users, entries)
    next(steps)
    assert (users['a'].applied, users['a'].silence) == (1, 0)
    next(steps)
    assert (users['a'].applied, users['a'].silence) == (1, 1)


def test_cuts_of_a_stream_into_runs_change_neither_users_nor_timers():
    for seed in range(20):
        draw = random.Random(seed)
        entries = reads(*[(draw.choice('abc'), draw.uniform(0, 40)) for _ in range(60)])
        taken = []
        for size in (1, 7, 60):
            users, timers = users_of(entries), []
            counts = [0] * len(Fold)
            for start in range(0, len(entries), size):
                for step in driver().run(users, entries[start:start + size]):
                    counts = [was + more for was, more in zip(counts, step.counts, strict=True)]
                    timers += [(touched.user.user_id, touched.origin.timer_ms) for touched in step.touched
                               if touched.origin and touched.origin.timer_ms]
            assert sum(counts) == len(entries), f'SEED={seed}'
            taken.append((counts, sorted(timers), {
                name: (user.applied, user.due_ms, user.silence, bytes(user.rows)) for name, user in users.items()}))
        assert taken[0] == taken[1] == taken[2], f'SEED={seed}'


# ---- what a step leads to --------------------------------------------------------------------------------------------

class ScriptedScorer(ConstantScorer):
    """A scorer whose intent and churn depend on a row's number of slots. Every user is in the lower of two tiers."""

    def __init__(self, intent: Callable[[int], float], churn: float = 0.0) -> None:
        super().__init__(tiers=2)
        self._intent, self._churn = intent, churn
        self.rows_asked = 0
        self.asked: list[tuple[int, int]] = []      # for each row, its number of slots before and after padding

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        outputs = await super().score(batches)
        for batch, output in zip(batches, outputs, strict=True):
            self.rows_asked += batch.windows
            slots = (batch.categories[..., 0] > 0).sum(axis=1)
            self.asked += [(int(count), batch.categories.shape[1]) for count in slots[:batch.windows]]
            output.purchase_intent = np.array([[self._intent(int(count))] for count in slots], np.float32)
            output.churn = np.full((len(batch), 1), self._churn, np.float32)
        return outputs


def touched_users(**events: int) -> list[Touched]:
    """Users with so many view events each, folded in one step."""
    events_read = [
        Event(name, f'{name}{at}', at, T0_MS + at, EventType.VIEW, 0, 0, 0, 0.0, 0, Source.CLICKS, at)
        for name, count in events.items() for at in range(count)]
    return next(driver().run({name: User(name) for name in events}, events_read)).touched


def run(touched: Sequence[Touched], scorer: ConstantScorer, publish: Publish = 'changes', budget: int = 1000) -> Scored:
    rules = StepRules(policy=POLICY, publish=publish, reasons_rows_max=budget)
    step = Step(1, list(touched), [True] * len(touched), [0] * len(Fold), [])
    return asyncio.run(StepScorer(rules, scorer).score([step]))[0]


def alerts(scored: Scored) -> list[Message]:
    return [message for message in scored.messages if message.kind is not Kind.SCORES]


def kinds(messages: Sequence[Message]) -> list[tuple[str, str]]:
    values = [json.loads(message.value) for message in messages]
    for value, message in zip(values, messages, strict=True):
        assert (message.key, message.kind) == (value['user_id'].encode(), value['type'])
        assert (message.message_id, message.as_of_ms) == (value['id'].encode(), value['as_of_ms'])
    return [(value['user_id'], value['type']) for value in values]


def test_changes_are_published_and_nothing_else():
    touched = touched_users(a=2, b=1)
    scored = run(touched, ScriptedScorer(lambda slots: 0.9 if slots == 2 else 0.0))
    assert kinds(scored.messages) == [
        ('a', 'purchase_power.updated'), ('a', 'purchase_intent.alert'), ('b', 'purchase_power.updated')]
    assert alerts(scored) == scored.messages
    assert run(touched, ScriptedScorer(lambda slots: 0.5)).messages == []


def test_all_adds_the_scores_of_every_user_after_the_decisions():
    scored = run(touched_users(a=2, b=1), ScriptedScorer(lambda slots: 0.0), 'all')
    assert kinds(scored.messages) == [('a', 'purchase_power.updated'), ('a', 'scores.updated'),
                                      ('b', 'purchase_power.updated'), ('b', 'scores.updated')]
    assert kinds(alerts(scored)) == [('a', 'purchase_power.updated'), ('b', 'purchase_power.updated')]


def test_events_gives_one_output_per_event_that_names_it():
    scored = run(touched_users(a=3), ScriptedScorer(lambda slots: 0.0), 'events')
    values = [json.loads(message.value) for message in scored.messages[1:]]
    assert [value['event_id'] for value in values] == ['a0', 'a1', 'a2']
    assert {value['events_seen'] for value in values} == {3}
    assert len({value['id'] for value in values}) == 3


def test_windows_go_to_the_scorer_in_length_buckets():
    """Short windows are not padded to the longest one. This also holds for the variants of reasons."""
    users = {f'u{number}': (3, 12, 25, 60)[number % 4] for number in range(160)}
    scorer = ScriptedScorer(lambda slots: 0.9 if slots % 60 in (0, 3) else 0.1)
    scored = run(touched_users(**users), scorer, budget=2000)
    assert len(scorer.asked) > len(users) == len(scored.rows)
    assert {padded for _, padded in scorer.asked} == set(LENGTHS)
    for slots, padded in scorer.asked:
        assert padded == next(length for length in LENGTHS if length >= slots)


@pytest.mark.parametrize(('short', 'padded'), [(1, 64), (9, 32), (33, 8)])
def test_a_few_short_windows_join_longer_ones_to_save_a_request(short: int, padded: int):
    """Windows join the next bucket if that adds at most PADDING_SLOTS_MAX slots of padding."""
    users = {f's{number}': 3 for number in range(short)} | {'long': 60}
    scorer = ScriptedScorer(lambda slots: 0.0)
    run(touched_users(**users), scorer)
    assert sorted(set(scorer.asked)) == [(3, padded), (60, 64)]
    assert short * (padded - LENGTHS[0]) <= PADDING_SLOTS_MAX * (len(LENGTHS) - 1)


def test_the_outbox_holds_the_messages_of_the_newest_step():
    touched = touched_users(a=2)
    scored = run(touched, ScriptedScorer(lambda slots: 0.9))
    assert unpack_outbox(touched[0].user) == scored.messages
    run(touched, ScriptedScorer(lambda slots: 0.9))
    assert touched[0].user.outbox == b''


def test_users_without_an_origin_are_not_scored():
    touched = touched_users(a=2)
    touched[0].origin = None
    scorer = ScriptedScorer(lambda slots: 0.9)
    assert run(touched, scorer).messages == []
    assert scorer.rows_asked == 0


def test_reasons_name_what_moved_the_score():
    scored = run(touched_users(a=2), ScriptedScorer(lambda slots: 0.9 if slots == 2 else 0.1))
    intent = json.loads(scored.messages[1].value)
    assert [(reason['name'], reason['effect']) for reason in intent['reasons']] == [('view', 0.8), ('view', 0.8)]


def test_reasons_keep_to_their_budget_and_go_to_the_alerts_first():
    touched = touched_users(a=1, b=2)
    scorer = ScriptedScorer(lambda slots: 0.9 if slots == 2 else 0.1)
    scored = run(touched, scorer, budget=6)
    values = [json.loads(message.value) for message in scored.messages]
    reasons = {value['user_id']: value['reasons'] for value in values}
    assert reasons['a'] is None
    assert reasons['b'] is not None
    assert scorer.rows_asked <= 2 + 6


def test_a_refused_row_decides_nothing_and_is_counted():
    touched = touched_users(a=1, b=2)
    before = encode(touched[0].user)
    scored = run(touched, ScriptedScorer(lambda slots: float('nan') if slots == 1 else 0.0), 'all')
    assert {user for user, _ in kinds(scored.messages)} == {'b'}
    assert scored.refused == 1
    assert encode(touched[0].user) == before


def test_a_scorer_that_fails_leaves_the_alert_state_alone():
    class Failing(ConstantScorer):
        async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
            raise ModelError('away', 'wait')

    touched = touched_users(a=2)
    before = encode(touched[0].user)
    with pytest.raises(ModelError):
        run(touched, Failing())
    assert encode(touched[0].user) == before


def test_steps_that_are_scored_together_get_what_each_would_get_alone():
    """Messages, outboxes, refusals, and the reasons of each step's own budget."""
    def steps() -> list[Step]:
        parts = [touched_users(a=2, b=1), [], touched_users(c=1, d=2, e=2), touched_users(f=3)]
        return [Step(1, touched, [True] * len(touched), [0] * len(Fold), []) for touched in parts]

    def chance(slots: int) -> float:
        return {2: 0.9, 3: float('nan')}.get(slots, 0.0)

    for publish in ('changes', 'all', 'events'):
        rules = StepRules(policy=POLICY, publish=publish, reasons_rows_max=6)
        scorer = StepScorer(rules, ScriptedScorer(chance))
        together = asyncio.run(scorer.score(steps()))
        alone = [asyncio.run(scorer.score([step]))[0] for step in steps()]
        assert [scored.messages for scored in together] == [scored.messages for scored in alone]
        assert [scored.refused for scored in together] == [0, 0, 0, 1]
        assert [[(user.user_id, user.outbox) for user, _ in scored.outboxes] for scored in together] == [
            [(user.user_id, user.outbox) for user, _ in scored.outboxes] for scored in alone]
        reasons = [json.loads(message.value)['reasons'] is not None for scored in together
                   for message in alerts(scored) if message.kind is Kind.INTENT]
        assert reasons == [True, True, False]       # the budget of the third step covers one of its two alerts
