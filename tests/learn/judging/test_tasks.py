"""Days to ask about, who is asked, and what came of it: by a recount of the events. Needs no torch."""
import numpy as np
import pytest

from stream.core.events import EventRules, EventType
from stream.core.layout import DAY_MS, WindowLimits
from stream.errors import UsageError
from stream.learn.dataset import HORIZON_DAYS, History, read
from stream.learn.judging import tasks
from stream.learn.judging.tasks import Cutoff, day_of, default_cutoffs, known_until, segments, truth_of
from stream.replay.recording import Recording

LIMITS = WindowLimits()


def ms(day: str) -> int:
    return int(np.datetime64(day, 'ms').astype(np.int64))


def spanning(first: str, last: str) -> History:
    """A recording of nothing, with a beginning and an end."""
    return History([], [], 0, ms(first), ms(last) + DAY_MS // 2, True)


@pytest.fixture(scope='module')
def cutoff(history) -> Cutoff:
    return Cutoff.of(history, default_cutoffs(history)[0], LIMITS)


@pytest.mark.parametrize(('first', 'last', 'cutoffs'), [
    ('1997-01-01', '1998-06-30', ['1997-09-30', '1998-04-01']),
    ('2010-12-01', '2011-12-09', ['2011-09-10', '2011-11-09']),
    ('2014-04-15', '2014-08-15', ['2014-07-16']),
    ('2014-01-01', '2017-01-01', ['2016-04-03', '2016-10-03']),
])
def test_default_cutoffs(first, last, cutoffs):
    assert [day_of(at_ms) for at_ms in default_cutoffs(spanning(first, last))] == cutoffs


def test_too_short_a_recording_has_no_cutoff():
    with pytest.raises(UsageError, match=r'50 days are too few.*--at'):
        default_cutoffs(spanning('2014-01-01', '2014-02-20'))


def test_a_cutoff_outside_the_recording_is_refused(history):
    for at_ms in (history.start_ms, known_until(history)):
        with pytest.raises(UsageError, match='nothing to learn from'):
            Cutoff.of(history, at_ms, LIMITS)


def test_questions_are_those_that_are_settled_and_have_both_answers(history, cutoff):
    end_ms = known_until(history)
    asked = {task.name for task in cutoff.tasks}
    skipped = {task.name for task, _ in cutoff.skipped}
    assert asked | skipped == {*(f'purchase_{days}d' for days in HORIZON_DAYS), 'churn_90d'}
    assert {'purchase_30d', 'purchase_90d', 'churn_90d'} <= asked
    assert skipped >= {f'purchase_{days}d' for days in HORIZON_DAYS if cutoff.at_ms + days * DAY_MS > end_ms} != set()


def test_answers_equal_a_recount_of_the_events(history, cutoff):
    at_ms = cutoff.at_ms
    for task in cutoff.tasks:
        days, truth = HORIZON_DAYS[task.horizon], truth_of(cutoff.asked, task)
        for user, answer in zip(cutoff.asked.user.tolist(), truth, strict=True):
            bought = [event.ts_ms - at_ms for event in history.events[user] if event.type == EventType.PURCHASE]
            came = any(0 <= ahead_ms < days * DAY_MS for ahead_ms in bought)
            if task.churn:
                active = any(-90 * DAY_MS <= ahead_ms < 0 for ahead_ms in bought)
                assert np.isnan(answer) if not active else answer == (not came)
            else:
                assert answer == came
    seen = [user for user, events in enumerate(history.events) if events[0].ts_ms < at_ms]
    assert cutoff.asked.user.tolist() == seen


def test_rare_answers_are_not_asked_for(history, monkeypatch, cutoff):
    monkeypatch.setattr(tasks, 'USERS_PER_SIDE_MIN', 10_000)
    rare = Cutoff.of(history, cutoff.at_ms, LIMITS)
    assert rare.tasks == []
    assert any('users on one side, 10000 are asked for' in reason for _, reason in rare.skipped)


def test_everybody_is_of_one_kind_by_orders_and_of_one_by_time(cutoff):
    kinds = list(segments(cutoff.asked).values())
    assert (np.sum(kinds[:4], 0) == 1).all()
    assert (np.sum([kinds[0], *kinds[4:]], 0) == 1).all()


def test_cdnow_as_published(real_data):
    """The cut-offs, customers and repeat buyers of the set on which BG/NBD was shown, by our reading of it."""
    recording = Recording([real_data / 'cdnow' / 'CDNOW_master.txt.gz'], 'cdnow')
    recording.scan()
    cdnow = read((value for block in recording.chunks(10_000, 1 << 62) for value in block.values), EventRules())
    cutoffs = [Cutoff.of(cdnow, at_ms, LIMITS) for at_ms in default_cutoffs(cdnow)]
    assert [day_of(cutoff.at_ms) for cutoff in cutoffs] == ['1997-09-30', '1998-04-01']
    assert [len(cutoff.asked) for cutoff in cutoffs] == [16_585, 16_585]
    assert [task.name for task in cutoffs[0].tasks] == [
        'purchase_1d', 'purchase_7d', 'purchase_30d', 'purchase_90d', 'purchase_273d', 'churn_90d']
