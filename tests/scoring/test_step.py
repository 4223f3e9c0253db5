import asyncio
import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from stream.core.decide import Policy
from stream.core.events import Event, EventType, Source
from stream.core.features import LENGTHS, Batch
from stream.core.layout import WindowLimits
from stream.core.outbox import unpack_outbox
from stream.core.rules import Publish
from stream.core.scores import Outputs
from stream.core.steps import Touched, fold_step
from stream.core.user import User, encode
from stream.errors import ModelError
from stream.scoring.scorer import ConstantScorer
from stream.scoring.step import PADDING_SLOTS_MAX, Scored, score_step

T0_MS = 1_700_000_000_000
LIMITS = WindowLimits()
POLICY = Policy(tier_events_min=1, churn_orders_min=0)


class ScriptedScorer(ConstantScorer):
    """Intent and churn as a function of a row's number of slots; everybody is in the lowest of two tiers."""

    def __init__(self, intent: Callable[[int], float], churn: float = 0.0) -> None:
        super().__init__(tiers=2)
        self._intent, self._churn = intent, churn
        self.rows_asked = 0
        self.asked: list[tuple[int, int]] = []      # of each row its slots, and how many it was padded to

    async def score(self, batches: Sequence[Batch]) -> list[Outputs]:
        outputs = await super().score(batches)
        for batch, output in zip(batches, outputs, strict=True):
            self.rows_asked += len(batch)
            slots = (batch.categories[..., 0] > 0).sum(axis=1)
            self.asked += [(int(count), batch.categories.shape[1]) for count in slots]
            output.purchase_intent = np.array([[self._intent(int(count))] for count in slots], np.float32)
            output.churn = np.full((len(batch), 1), self._churn, np.float32)
        return outputs


def touched_users(**events: int) -> list[Touched]:
    """Users with so many view events each, folded in one step."""
    events_read = [
        Event(name, f'{name}{at}', at, T0_MS + at, EventType.VIEW, 0, 0, 0, 0.0, 0, Source.CLICKS, at)
        for name, count in events.items() for at in range(count)]
    return fold_step({name: User(name) for name in events}, events_read, LIMITS).touched


def run(touched: Sequence[Touched], scorer: ConstantScorer, publish: Publish = 'changes', budget: int = 1000) -> Scored:
    return asyncio.run(score_step(touched, scorer, POLICY, publish, budget))


def kinds(messages: Sequence[bytes]) -> list[tuple[str, str]]:
    return [(value['user_id'], value['type']) for value in map(json.loads, messages)]


def test_changes_are_published_and_nothing_else():
    touched = touched_users(a=2, b=1)
    scored = run(touched, ScriptedScorer(lambda slots: 0.9 if slots == 2 else 0.0))
    assert kinds(scored.messages) == [
        ('a', 'purchase_power.updated'), ('a', 'purchase_intent.alert'), ('b', 'purchase_power.updated')]
    assert scored.alerts == scored.messages
    assert run(touched, ScriptedScorer(lambda slots: 0.5)).messages == []


def test_all_adds_the_scores_of_every_user_after_the_decisions():
    scored = run(touched_users(a=2, b=1), ScriptedScorer(lambda slots: 0.0), 'all')
    assert kinds(scored.messages) == [('a', 'purchase_power.updated'), ('a', 'scores.updated'),
                                      ('b', 'purchase_power.updated'), ('b', 'scores.updated')]
    assert kinds(scored.alerts) == [('a', 'purchase_power.updated'), ('b', 'purchase_power.updated')]


def test_events_gives_one_output_per_event_that_names_it():
    scored = run(touched_users(a=3), ScriptedScorer(lambda slots: 0.0), 'events')
    values = [json.loads(message) for message in scored.messages[1:]]
    assert [value['event_id'] for value in values] == ['a0', 'a1', 'a2']
    assert {value['events_seen'] for value in values} == {3}
    assert len({value['id'] for value in values}) == 3


def test_windows_go_to_the_scorer_in_length_buckets():
    """Short ones are not padded to the longest, reasons' variants included."""
    users = {f'u{number}': (3, 12, 25, 60)[number % 4] for number in range(160)}
    scorer = ScriptedScorer(lambda slots: 0.9 if slots % 60 in (0, 3) else 0.1)
    scored = run(touched_users(**users), scorer, budget=2000)
    assert len(scorer.asked) > len(users) == len(scored.rows)
    assert {padded for _, padded in scorer.asked} == set(LENGTHS)
    for slots, padded in scorer.asked:
        assert padded == next(length for length in LENGTHS if length >= slots)


@pytest.mark.parametrize(('short', 'padded'), [(1, 64), (9, 32), (33, 8)])
def test_a_few_short_windows_join_longer_ones_to_save_a_request(short: int, padded: int):
    """A few: at most PADDING_SLOTS_MAX slots of padding from one bucket to the next."""
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
    intent = json.loads(scored.messages[1])
    assert [(reason['name'], reason['effect']) for reason in intent['reasons']] == [('view', 0.8), ('view', 0.8)]


def test_reasons_keep_to_their_budget_and_go_to_the_alerts_first():
    touched = touched_users(a=1, b=2)
    scorer = ScriptedScorer(lambda slots: 0.9 if slots == 2 else 0.1)
    scored = run(touched, scorer, budget=6)
    reasons = {value['user_id']: value['reasons'] for value in map(json.loads, scored.messages)}
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
