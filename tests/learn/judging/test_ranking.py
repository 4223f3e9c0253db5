"""Rankings are measured as by hand, and SASRec learns what follows what."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from stream.core.layout import WindowLimits
from stream.learn.dataset import at_time, bought_next
from stream.learn.judging.judge import BOUGHT, MODEL, OWN, POPULAR, RECENT, SASREC, TOP
from stream.learn.judging.ranking import judge_ranking, measured, rank, top
from stream.learn.judging.sasrec import SasRec, SasRecOptions, fit_sasrec
from stream.learn.ranking.next_items import Ranked
from stream.learn.ranking.past_items import BUCKETS

SMALL = SasRecOptions(hidden=16, blocks=1, length=12, epochs=20, batch_users=8, learning_rate=1e-2)


def test_ndcg_and_recall_by_hand():
    lists = np.full((4, TOP), -1)
    lists[0, :3] = [7, 8, 9]
    lists[1, 1] = 7
    lists[2] = np.arange(TOP)
    bought = [np.array([7, 9]), np.array([7]), np.arange(40), np.array([5])]
    found = measured(lists, bought)
    ideal = 1 + 1 / np.log2(3)
    np.testing.assert_allclose(found['ndcg'], [(1 + 1 / np.log2(4)) / ideal, 1 / np.log2(3), 1, 0])
    np.testing.assert_allclose(found['recall'], [1, 1, 0.25, 0])


def test_where_there_is_less_to_name_than_places_the_list_is_shorter():
    """A shop may have three categories, or one."""
    found = measured(top(np.array([[1.0, 3.0, 2.0], [3.0, 1.0, 2.0]])), [np.array([0, 1]), np.array([2])])
    np.testing.assert_allclose(found['ndcg'], [1.5 / (1 + 1 / np.log2(3)), 1 / np.log2(3)])
    np.testing.assert_allclose(found['recall'], [1, 1])
    np.testing.assert_allclose(measured(top(np.zeros((1, 1))), [np.array([0])])['ndcg'], [1])


def test_top_is_best_first_and_the_first_of_equals():
    assert top(np.array([[0.0, 3.0, 1.0, 3.0] + [-1.0] * 10]))[0, :5].tolist() == [1, 3, 2, 0, 4]


def test_sasrec_sees_only_what_came_before():
    model = SasRec(9, SMALL).eval()
    items = torch.tensor([[0, 0, 3, 4, 5, 6]])
    other = items.clone()
    other[0, 4:] = torch.tensor([8, 9])
    with torch.no_grad():
        first, second = model(items), model(other)
    torch.testing.assert_close(first[:, :4], second[:, :4])
    assert not torch.allclose(first[:, 4:], second[:, 4:])


def test_sasrec_learns_what_follows_what_and_is_the_same_twice():
    rng = np.random.default_rng(5)
    rounds = [(np.arange(13) + start) % 9 + 1 for start in rng.integers(0, 9, 40)]      # 1 after 9, else one more
    model = fit_sasrec(rounds, 9, SMALL, 3)
    scores = model.score([np.array([4, 5, 6]), np.array([9]), np.arange(30) % 9 + 1])
    assert scores[:, 1:].argmax(1).tolist() == [6, 0, 3]
    again = fit_sasrec(rounds, 9, SMALL, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_who_knows_the_answer_is_ranked_best(history):
    limits, users = WindowLimits(), range(len(history.user_ids))
    at_ms = (history.start_ms + history.end_ms) // 2
    known = history.before(at_ms)
    test = at_time(history, users, at_ms, limits, history.end_ms)
    ranked = []
    for hashes in bought_next(history, test, 'category', history.end_ms):
        own = np.zeros(0, np.int64) if hashes is None else hashes
        ranked.append({'category': Ranked(np.zeros(BUCKETS['category'], np.float32), own,
                                          np.ones(len(own), np.float32))})
    found = rank(known, range(0, len(known.user_ids), 2), history, test, ranked, SMALL, 3, history.end_ms)['category']
    assert list(found) == [MODEL, POPULAR, RECENT, OWN, BOUGHT, SASREC]
    assert len(found[MODEL]['ndcg']) > 20
    np.testing.assert_allclose(found[MODEL]['ndcg'], 1)
    for name in (POPULAR, RECENT, OWN, BOUGHT, SASREC):
        assert 0.05 < found[name]['ndcg'].mean() < 0.95, name
    assert found[OWN]['ndcg'].mean() > found[POPULAR]['ndcg'].mean()        # the simulator's shoppers have tastes
    quick = rank(known, range(0, len(known.user_ids), 2), history, test, ranked, None, 3, history.end_ms)['category']
    assert list(quick) == [MODEL, POPULAR, RECENT, OWN, BOUGHT]
    judged = judge_ranking(found, 50, 3)
    assert judged['rows'] == len(found[MODEL]['ndcg'])
    value, low, high = judged['contenders'][OWN]['model_less']['ndcg']
    assert 0 < low < value < high and value == pytest.approx(1 - found[OWN]['ndcg'].mean())
    assert judged['contenders'][MODEL]['model_less'] == {}


def test_nothing_after_the_time_is_ranked_by(history):
    limits, users = WindowLimits(), range(len(history.user_ids))
    at_ms = (history.start_ms + history.end_ms) // 2
    known = history.before(at_ms)
    test = at_time(history, users, at_ms, limits, history.end_ms)
    nothing = [{'category': Ranked(np.zeros(BUCKETS['category'], np.float32), np.zeros(0, np.int64),
                                   np.zeros(0, np.float32))}] * len(test)
    early = dataclasses.replace(history, events=[
        [event for event in events if event.ts_ms < at_ms + 30 * 86_400_000] for events in history.events])
    first, second = (rank(known, range(0, len(known.user_ids), 2), told, test, nothing, SMALL, 3,
                         history.end_ms)['category']
                     for told in (history, early))
    for name, numbers in first.items():
        np.testing.assert_array_equal(numbers['ndcg'], second[name]['ndcg'])
