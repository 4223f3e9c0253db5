"""The cross-shop curve: the same users teach both starts, nobody judged has taught, and figures are as counted."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import orjson
import pytest

pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from stream.core.events import EventRules
from stream.errors import ModelError
from stream.learn.backbones import EncoderOptions
from stream.learn.dataset import ExampleOptions, part_of, read
from stream.learn.fit import FitOptions
from stream.learn.judging import transfer as transferring
from stream.learn.judging.compare import CompareOptions, fold_of
from stream.learn.judging.judge import COUNTERS, MODEL, WINDOW
from stream.learn.judging.quality import auc
from stream.learn.judging.report import comparison_page
from stream.learn.judging.tasks import Task, default_cutoffs
from stream.learn.judging.transfer import (
    SCRATCH,
    TRANSFERRED,
    ShareScores,
    check_source,
    drawn,
    draws_of,
    few_users,
    judge_share,
    score_share,
    transfer,
)
from stream.simulator.shop import SimulatorOptions, simulate

FIT = FitOptions(encoder=EncoderOptions(hidden=16, layers=1, heads=2, intermediate=32), epochs=1, rows_per_epoch=100,
                 examples=ExampleOptions(6, 2))
OPTIONS = CompareOptions(seed=3, folds=2, resamples=8, fit=FIT)
IDS = [f'user {number}' for number in range(1000)]


@pytest.fixture(scope='module')
def shop():
    """Another one than the checkpoint's."""
    return read(simulate(SimulatorOptions(shoppers=60, days=180, seed=9)).lines(), EventRules())


# ---- shares ---------------------------------------------------------------------------------------------------------

def test_a_share_holds_trainers_and_validators_and_the_smaller_is_part_of_the_larger():
    shares = [drawn(IDS, range(1000), share, 0, FIT) for share in (0.001, 0.01, 0.1, 1.0)]
    assert [len(users) for users in shares[1:]] == [10, 100, 1000]
    assert all(set(small) < set(large) for small, large in pairwise(shares))
    for users in shares:
        validating = [part_of(IDS[user], (FIT.validation_share,), FIT.seed) == 0 for user in users]
        assert any(validating) and not all(validating)


def test_draws_differ_and_few_users_are_drawn_more_often():
    assert drawn(IDS, range(1000), 0.01, 0, FIT) != drawn(IDS, range(1000), 0.01, 1, FIT)
    assert [draws_of(users) for users in (1, 4, 60, 150, 200, 5000)] == [3, 3, 3, 2, 1, 1]


def test_few_users_make_more_passes_of_smaller_batches():
    options = FitOptions(examples=ExampleOptions(50, 10.0), rows_per_epoch=6_000)
    assert few_users(options, 100, 365) == options
    few = few_users(options, 100, 20)
    assert (few.epochs, few.patience, few.batch_rows) == (2 * options.epochs, 2 * options.patience, 32)
    assert few_users(options, 2, 20).epochs == 4 * options.epochs


# ---- scores ---------------------------------------------------------------------------------------------------------

def test_both_starts_are_taught_by_the_same_users_of_other_parts(shop, checkpoint, monkeypatch):
    taught = []

    def noted(known, users, at_ms, options, limits, console, **named):
        taught.append(([known.user_ids[user] for user in users], options.start_from))
        return fitting(known, users, at_ms, options, limits, console, **named)

    fitting = transferring.fit
    monkeypatch.setattr(transferring, 'fit', noted)
    at_ms = default_cutoffs(shop)[0]
    scores = score_share(shop, at_ms, 1, 0.5, checkpoint, replace(OPTIONS, fit=replace(FIT, epochs=0)))
    draws = len(taught) // 2
    assert draws == draws_of(round(scores.users)) > 1
    for scratch, transferred in zip(taught[::2], taught[1::2], strict=True):
        assert scratch[0] == transferred[0]
        assert (scratch[1], transferred[1]) == (None, str(checkpoint))
        assert {fold_of(user_id, OPTIONS) for user_id in scratch[0]} == {0}
    assert {fold_of(shop.user_ids[user], OPTIONS) for user in scores.user} == {1}
    assert scores.scores[SCRATCH][MODEL].shape[:2] == (draws, len(scores.user))
    # Without a pass the starts differ in the window, and in nothing else that they learn from.
    assert not np.array_equal(scores.scores[SCRATCH][WINDOW], scores.scores[TRANSFERRED][WINDOW])
    assert COUNTERS not in scores.scores[TRANSFERRED]


def test_who_can_teach_nothing_is_left_out_with_the_reason(shop, checkpoint, monkeypatch):
    def nobody(*arguments, **named):
        raise transferring.UsageError('Nobody buys anything.', do='wait.')

    monkeypatch.setattr(transferring, 'fit', nobody)
    scores = score_share(shop, default_cutoffs(shop)[0], 0, 0.5, checkpoint, OPTIONS)
    assert set(scores.failed) == {'Nobody buys anything.'}
    assert judge_share(Task(2), [(scores, np.zeros(len(scores.user)))], OPTIONS) is None


def test_a_checkpoint_that_does_not_fit_is_refused_at_once(checkpoint):
    check_source(checkpoint, OPTIONS)
    with pytest.raises(ModelError, match='other sizes'):
        check_source(checkpoint, CompareOptions())


# ---- figures --------------------------------------------------------------------------------------------------------

def made_up(rng, draws: int, knows: float) -> tuple[ShareScores, np.ndarray]:
    """300 users, of whom the transferred model knows something and the other nothing; some are not asked."""
    truth = (rng.random(300) < 0.4).astype(float)
    blind, knowing = rng.random((draws, 300, 5)), rng.random((draws, 300, 5)) + knows * truth[:, None]
    scores = {SCRATCH: {MODEL: blind, WINDOW: blind, COUNTERS: blind},
              TRANSFERRED: {MODEL: knowing, WINDOW: blind}}
    truth[:30] = np.nan
    return ShareScores(np.arange(300), 9.0, scores, []), truth


def test_figures_are_means_over_parts_and_draws_of_who_is_asked():
    rng = np.random.default_rng(0)
    parts = [made_up(rng, 2, 0.3), made_up(rng, 2, 0.3)]
    found = judge_share(Task(2), parts, replace(OPTIONS, resamples=100))
    wanted = np.mean([auc(scores.scores[TRANSFERRED][MODEL][draw, 30:, 2], truth[30:])
                      for scores, truth in parts for draw in range(2)])
    value, low, high = found['starts'][TRANSFERRED][MODEL]
    assert value == pytest.approx(wanted) and low < value < high
    gain = found['transferred_less_scratch']
    assert gain[MODEL][1] > 0.1
    assert gain[WINDOW] == [0, 0, 0]        # the same scores in the same resamples
    # Who does not buy is what churn is about.
    churn = judge_share(Task(2, churn=True), [(scores, 1 - truth) for scores, truth in parts],
                        replace(OPTIONS, resamples=100))
    assert churn['starts'][TRANSFERRED][MODEL] == pytest.approx(found['starts'][TRANSFERRED][MODEL])


@pytest.fixture(scope='module')
def curve(shop, checkpoint):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transferring, 'SHARES', (0.3, 1.0))
        patch.setattr(transferring, '_DRAWS_MAX', 2)
        said = []
        found = transfer(shop, default_cutoffs(shop)[0], checkpoint, OPTIONS, said.append)
        assert len(said) == 4 and 'part 2 of 2' in said[-1]
        return found


def test_the_curve_has_all_shares_of_all_questions(curve, checkpoint):
    assert curve['source'] == checkpoint.name
    assert [share['share'] for share in curve['shares']] == [0.3, 1.0]
    assert 3 < curve['shares'][0]['users'] < 12 < 20 < curve['shares'][1]['users'] < 40
    assert {'purchase_30d', 'churn_90d'} <= {task['name'] for task in curve['tasks']}
    for task in curve['tasks']:
        for share in task['shares']:
            for branch in (MODEL, WINDOW):
                gain = share['transferred_less_scratch'][branch][0]
                starts = share['starts']
                assert gain == pytest.approx(starts[TRANSFERRED][branch][0] - starts[SCRATCH][branch][0])


def test_the_page_shows_the_curve(curve):
    figures = {'about': {'sources': ['x'], 'format': 'events', 'currency': 'EUR'},
               'recording': {'events': 1, 'users': 1, 'refused': 0, 'first_ms': 0, 'last_ms': 1, 'priced': True},
               'protocol': {'folds': 2, 'seed': 3, 'resamples': 8, 'contender_rows_max': 9, 'active_days': 90,
                            'cleaning': ()},
               'cutoffs': []}
    without = comparison_page(figures)
    page = comparison_page(figures | {'transfer': orjson.loads(orjson.dumps(curve))})
    assert 'another shop’s model' not in without.lower()
    assert 'What another shop’s model brings' in page
    task = curve['tasks'][0]
    value, low, _ = task['shares'][0]['starts'][TRANSFERRED][WINDOW]
    assert f'{value:.3f}<br>' in page and f'{low:.3f} to' in page
    assert page.count('<svg class="plot') == 2 * len(curve['tasks'])
    bare = {**curve, 'tasks': [{**task, 'shares': [None] * 2} for task in curve['tasks']],
            'shares': [{**share, 'failed': ['Nobody buys <b>.']} for share in curve['shares']]}
    nothing = comparison_page(figures | {'transfer': bare})
    assert 'No share of the users taught anything' in nothing and 'Nobody buys &lt;b&gt;.' in nothing
