"""The ranking learns, leaves the other scores alone, and is served as it was learnt."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import dataclasses
import io
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

import onnxruntime
import tritonclient.grpc as grpc
from rich.console import Console
from tritonclient.utils import np_to_triton_dtype

from deploy.local.parts import Triton
from stream.core.layout import DAY_MS, WindowLimits
from stream.errors import ModelError
from stream.learn.checkpoint import RANKING_FILE, load
from stream.learn.dataset import ExampleOptions, at_time, history_of, sample
from stream.learn.export import export
from stream.learn.fit import fit
from stream.learn.ranking.next_items import CANDIDATES, ranking_dir, rankings, score_names, tensor_names, verified
from stream.learn.ranking.past_items import BUCKETS, OWN_NUMBERS, UNDONE_NUMBERS, past
from stream.learn.ranking.ranker import Ranker, RankerOptions, fit_recommender
from stream.scoring.artefact import load_artefact, sha256
from stream.scoring.repository import RANKING_MANIFEST, write_repository

LIMITS = WindowLimits()
OFF = RankerOptions(rows_max=0)


@pytest.fixture(scope='module')
def fits(history, tiny_fit):
    """With and without the ranking."""
    return [fit(history, range(len(history.user_ids)), history.end_ms, dataclasses.replace(tiny_fit(), **changes),
                LIMITS, Console(file=io.StringIO())) for changes in ({}, {'ranker': OFF})]


@pytest.fixture(scope='module')
def version_dir(checkpoint, tmp_path_factory):
    return export(checkpoint, tmp_path_factory.mktemp('repository'))


def test_the_other_scores_are_the_same_with_and_without(fits):
    with_it, without = fits
    assert without.recommender is None and with_it.recommender.columns == ('item', 'category')
    assert with_it.epochs == without.epochs
    for name, tensor in with_it.model.state_dict().items():
        assert torch.equal(tensor, without.model.state_dict()[name]), name


def test_chances_are_chances_and_the_own_are_in_their_buckets(fits, history):
    ranker = fits[0].recommender.rankers['item']
    examples = at_time(history, range(40), history.end_ms, LIMITS, history.end_ms)
    own, numbers = map(torch.from_numpy, past(history, examples, np.arange(len(examples)), 'item').padded(
        np.arange(len(examples))))
    with torch.no_grad():
        chances, mine = ranker.chances(own, numbers)
    torch.testing.assert_close(chances.sum(1), torch.ones(len(own)))
    assert chances[:, 0].max() == 0 and mine[own == 0].max() == 0
    assert (chances.gather(1, own.long())[own > 0] >= mine[own > 0]).all()
    # Rows know nothing of one another, nor of their padding.
    with torch.no_grad():
        alone, _ = ranker.chances(own[3:4, :int((own[3] > 0).sum())], numbers[3:4, :int((own[3] > 0).sum())])
    torch.testing.assert_close(alone[0], chances[3])


def test_chances_by_hand():
    """An own item of logit 1, one of 2, and something new, two thirds of which are bucket 7 and a third 9."""
    ranker = Ranker(10)
    ranker.popularity[0, 7], ranker.popularity[0, 9] = np.log(2), 0.0
    ranker.popularity[2, 7] = ranker.popularity[2, 9] = 60.0        # what nobody bought has no chance beside them
    with torch.no_grad():
        ranker.by_popularity.copy_(torch.tensor([1.0, 0.0, 1.0]))
        ranker.weights.fill_(-100.0)
        ranker.weights[UNDONE_NUMBERS] = 0.0
        ranker.bias.fill_(1.0)
        ranker.weights[UNDONE_NUMBERS.start] = 0.5
        numbers = torch.zeros(1, 3, OWN_NUMBERS)
        numbers[0, 1, UNDONE_NUMBERS.start] = 2.0
        chances, mine = ranker.chances(torch.tensor([[3, 7, 0]]), numbers)
    total = 1 + np.e + np.e**2
    np.testing.assert_allclose(mine[0], [np.e / total, np.e**2 / total, 0], rtol=1e-5)
    np.testing.assert_allclose(chances[0, [0, 3, 7, 9]], [0, np.e / total, (np.e**2 + 2 / 3) / total, 1 / 3 / total],
                               rtol=1e-5)


def test_more_dealings_never_mean_a_smaller_chance(fits):
    for ranker in fits[0].recommender.rankers.values():
        weights = ranker.own_weights.detach().numpy()
        assert (np.delete(weights, np.r_[UNDONE_NUMBERS]) >= 0).all() and weights.max() > 0.1


def test_it_learns_who_buys_again(history):
    """In a shop where everybody buys again what they bought, and views mean nothing, that is what it says."""
    by_user = {}
    for user_id, events in zip(history.user_ids, history.events, strict=True):
        bought = next((event for event in events if event.type == 12), None)
        if bought is None:
            continue
        days = range(int((history.end_ms - bought.ts_ms) / DAY_MS))
        by_user[user_id] = [event for event in events if event.type == 1][:40] + [
            _again(bought, day) for day in days if day % 9 == 0]
    shop = history_of({user_id: sorted(events, key=lambda event: event.ts_ms) for user_id, events in by_user.items()})
    users = range(len(shop.user_ids))
    learners = [user for user in users if user % 5]
    taught = sample(shop, learners, shop.start_ms, shop.end_ms, ExampleOptions(4, 0.0), LIMITS, 3)
    found = fit_recommender(shop, shop, learners, taught, shop.end_ms, RankerOptions(), 3)
    data = sample(shop, users, shop.start_ms, shop.end_ms, ExampleOptions(4, 0.0), LIMITS, 3)
    first_ms = np.array([min((event.ts_ms for event in events if event.type == 12), default=shop.end_ms)
                         for events in shop.events])
    rows = np.flatnonzero((data.user % 5 == 0) & (first_ms[data.user] < data.as_of_ms))
    before = past(shop, data, rows, 'item')
    own, numbers = map(torch.from_numpy, before.padded(np.arange(len(rows))))
    with torch.no_grad():
        _, mine = found.rankers['item'].chances(own, numbers)
    best = [before.hashes[before.starts[row] + int(mine[row].argmax())] for row in range(len(rows))]
    wanted = [next(event.item for event in shop.events[user] if event.type == 12) for user in data.user[rows]]
    assert np.mean([mine == theirs for mine, theirs in zip(best, wanted, strict=True)]) > 0.9


def _again(event, day: int):
    return type(event)(event.user_id, '', event.key + day, event.ts_ms + day * DAY_MS, event.type, event.item,
                       event.category, event.basket, event.amount, event.rating)


def test_a_recording_that_names_nothing_has_no_ranking(history):
    bare = history_of({user_id: [type(event)(event.user_id, '', event.key, event.ts_ms, event.type, 0, 0, event.basket,
                                             event.amount, event.rating) for event in events]
                       for user_id, events in zip(history.user_ids, history.events, strict=True)})
    data = at_time(bare, range(len(bare.user_ids)), bare.end_ms - 40 * DAY_MS, LIMITS, bare.end_ms)
    assert fit_recommender(bare, bare, range(len(bare.user_ids)), data, bare.end_ms, RankerOptions(), 3) is None


def test_the_served_ranking_is_that_of_torch(checkpoint, version_dir, history):
    recommender = load(checkpoint).recommender
    examples = at_time(history, range(30), history.end_ms, LIMITS, history.end_ms)
    for row, found in enumerate(rankings(verified(version_dir), history, examples)):
        for column, ranked in found.items():
            own, numbers = map(torch.from_numpy, past(history, examples, np.array([row]), column).padded(np.array([0])))
            with torch.no_grad():
                chances, mine = recommender.rankers[column].chances(own, numbers)
            np.testing.assert_allclose(ranked.buckets, chances[0], atol=1e-5)
            np.testing.assert_allclose(ranked.own_chances, mine[0, :len(ranked.own)], atol=1e-5)
    assert row == len(examples) - 1


def test_candidates_can_be_given(version_dir):
    session = onnxruntime.InferenceSession(verified(version_dir), providers=['CPUExecutionProvider'])
    feed = {CANDIDATES: np.array([[5, 0, 32767], [7, 7, 1]], np.int32)}
    for column in ('item', 'category'):
        names = tensor_names(column)
        feed |= {names[0]: np.array([[5], [0]], np.int32), names[1]: np.zeros((2, 1, 24), np.float32)}
    scores, candidates = session.run([score_names('item')[0], 'candidate_scores'], feed)
    assert scores.shape == (2, BUCKETS['item'])
    np.testing.assert_array_equal(candidates, np.take_along_axis(scores, feed[CANDIDATES].astype(np.int64), 1))


def test_triton_ranks_as_the_process_does(version_dir, history, tmp_path):
    """The real server, beside the scores' model; each row's own items, padded, and candidates of it."""
    folder = ranking_dir(version_dir)
    session = onnxruntime.InferenceSession(verified(version_dir), providers=['CPUExecutionProvider'])
    examples = at_time(history, range(50), history.end_ms, LIMITS, history.end_ms)
    feed = {CANDIDATES: np.random.default_rng(3).integers(0, BUCKETS['item'], (len(examples), 4)).astype(np.int32)}
    for column in ('item', 'category'):
        rows = np.arange(len(examples))
        feed |= zip(tensor_names(column), past(history, examples, rows, column).padded(rows), strict=True)
    with (Triton(tmp_path / 'triton', version_dir, others=[folder]) as part,
          grpc.InferenceServerClient(part.address) as client):
        for chosen in (slice(None), slice(7, 8)):
            asked = []
            for name, array in feed.items():
                tensor = grpc.InferInput(name, list(array[chosen].shape), np_to_triton_dtype(array.dtype))
                tensor.set_data_from_numpy(array[chosen])
                asked.append(tensor)
            answer = client.infer('shopper_next', asked, client_timeout=20)
            names = [output.name for output in session.get_outputs()]
            wanted = session.run(names, {name: array[chosen] for name, array in feed.items()})
            for name, mine in zip(names, wanted, strict=True):
                np.testing.assert_allclose(answer.as_numpy(name), mine, rtol=1e-5, atol=1e-7)
        assert client.get_model_config('shopper_next').config.parameters['sha256'].string_value == sha256(
            folder / 'model.onnx')


def test_what_no_triton_could_serve_is_not_rendered(version_dir, tmp_path):
    with pytest.raises(ModelError, match='no lengths'):
        write_repository(ranking_dir(version_dir), tmp_path / 'models', 'tensorrt')
    copy = shutil.copytree(ranking_dir(version_dir), tmp_path / 'shopper_next' / '1')
    (copy / 'model.onnx').write_bytes(b'another')
    with pytest.raises(ModelError, match='SHA-256'):
        write_repository(copy, tmp_path / 'models', 'onnxruntime')
    assert not (tmp_path / 'models').exists()


def test_the_worker_finds_its_model_beside_the_ranking(version_dir):
    artefact = load_artefact(version_dir)
    session = onnxruntime.InferenceSession(artefact.weights, providers=['CPUExecutionProvider'])
    assert not any('item' in entry.name for entry in (*session.get_inputs(), *session.get_outputs()))
    config = (ranking_dir(version_dir).parent / 'config.pbtxt').read_text()
    assert 'name: "shopper_next"' in config and 'name: "own_item_scores"' in config
    assert 'model_warmup' not in config         # no windows lie beside it


def test_a_ranking_that_was_changed_or_is_missing_is_told(version_dir, tmp_path):
    copy = shutil.copytree(version_dir.parent.parent, tmp_path / 'repository') / 'shopper' / '1'
    graph = ranking_dir(copy) / 'model.onnx'
    graph.write_bytes(graph.read_bytes() + b' ')
    with pytest.raises(ModelError, match='SHA-256'):
        verified(copy)
    manifest = ranking_dir(copy) / RANKING_MANIFEST
    told = json.loads(manifest.read_text())
    told['files']['model.onnx'] = sha256(graph)
    told['outputs']['item_scores']['row_shape'] = [4096]
    manifest.write_text(json.dumps(told))
    with pytest.raises(ModelError, match='other numbers or buckets'):
        verified(copy)
    shutil.rmtree(ranking_dir(copy).parent)
    with pytest.raises(ModelError, match='no ranking'):
        verified(copy)


def test_a_damaged_ranking_in_a_checkpoint_is_told(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / 'copy')
    shutil.copyfile(copy / 'model.safetensors', copy / RANKING_FILE)
    with pytest.raises(ModelError, match='no ranking in its file'):
        load(copy)
    (copy / RANKING_FILE).unlink()
    assert load(copy).recommender is None


def test_the_same_ranking_twice(fits, history, tiny_fit):
    again = fit(history, range(len(history.user_ids)), history.end_ms, tiny_fit(), LIMITS, Console(file=io.StringIO()))
    for name, tensor in fits[0].recommender.state_dict().items():
        assert torch.equal(tensor, again.recommender.state_dict()[name]), name
    assert json.dumps(again.epochs) == json.dumps(fits[0].epochs)
