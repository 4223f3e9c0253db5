"""What is known of the items reaches the window's state, by the bucket that the events carry."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import json
from functools import partial

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from rich.console import Console

from stream.core.events import Decoder, EventRules
from stream.core.features import ITEM_BUCKETS, Snapshots, features, padded
from stream.core.layout import WindowLimits
from stream.core.user import User, fold, pack_header
from stream.errors import InputError
from stream.learn.backbones import BackboneOptions, EncoderOptions, make_backbone
from stream.learn.dataset import ExampleOptions, read
from stream.learn.fit import FitOptions, fit
from stream.learn.model import ShopperModel
from stream.learn.text.catalogue import WithItems, bag_of_words, item_bucket, item_table, read_catalogue
from stream.learn.text.readers import load_text_backbone
from tests.learn.pretrained import assert_same_scores, export_graph, save_tiny, windows

TS_MS = 1_700_006_400_000
TINY = EncoderOptions(hidden=16, layers=1, heads=2, intermediate=16)


def write(path, rows) -> str:
    path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
    return str(path)


def test_json_lines_and_parquet_give_one_catalogue(tmp_path):
    rows = [{'item_id': '17', 'text': 'red lamp', 'embedding': [1.0, 2.0], 'category': 'lamps', 'stock': 3},
            {'item_id': '4', 'text': None, 'embedding': [0.5, -2.0], 'category': 'Home & Garden'},
            {'item_id': '5', 'text': 'blue lamp', 'embedding': None, 'category': None}]
    lines = read_catalogue(tmp_path.joinpath(write(tmp_path / 'items.jsonl', rows)))
    table = pyarrow.Table.from_pylist(rows)
    numbers = table.set_column(0, 'item_id', pyarrow.array([17, 4, 5]))     # a shop's own type of id
    for name, columns in (('text', table), ('numbers', numbers)):
        parquet.write_table(columns, tmp_path / f'{name}.parquet')
        same = read_catalogue(tmp_path / f'{name}.parquet')
        assert (same.item_ids, same.texts, same.categories) == (lines.item_ids, lines.texts, lines.categories)
        np.testing.assert_array_equal(same.embeddings, lines.embeddings)
    assert (lines.item_ids, lines.texts) == (['17', '4', '5'], ['red lamp', '', 'blue lamp'])
    assert lines.embeddings.tolist() == [[1, 2], [0.5, -2], [0, 0]]
    assert sorted(lines.category_names().values()) == ['Home & Garden', 'lamps']


def test_buckets_are_those_of_the_features(tmp_path):
    names = ['lamp-1', '85123A', 'ключ', 'x']
    user, decode = User('ann'), Decoder(EventRules())
    events = [decode(json.dumps({'event_id': name, 'user_id': 'ann', 'ts': TS_MS + place, 'type': 'view',
                                 'item_id': name, 'category': name}).encode()) for place, name in enumerate(names)]
    for place, event in enumerate(events):
        event.offset = place
    fold(user, events, WindowLimits(silence_ms=()))
    slots = features(Snapshots.join([pack_header(user)], [user.days], [user.rows], [TS_MS + 9])).categories[:-1]
    assert [item_bucket(name) for name in names] == slots[:, 1].tolist()
    catalogue = read_catalogue(tmp_path.joinpath(write(tmp_path / 'items.jsonl', [
        {'item_id': name, 'text': name, 'category': name} for name in names])))
    assert catalogue.category_names() == dict(zip(slots[:, 2].tolist(), names, strict=True))


def test_an_items_vector_is_that_of_its_embedding_and_its_text(tmp_path):
    rng = np.random.default_rng(3)
    vectors = rng.normal(5, 2, (300, 3)).astype(np.float32)
    rows = [{'item_id': f'i{place}', 'embedding': vector.tolist()} for place, vector in enumerate(vectors)]
    rows += [{'item_id': 'lamp A', 'text': 'red lamp'}, {'item_id': 'lamp B', 'text': 'blue lamp'}]
    catalogue = read_catalogue(tmp_path.joinpath(write(tmp_path / 'items.jsonl', rows)))
    table = item_table(catalogue, bag_of_words)
    assert table.shape == (ITEM_BUCKETS, 3 + 256) and not table[0].any()
    told = table[item_bucket('lamp A')]
    assert not told[:3].any() and told[3:].any()
    centred = vectors - vectors.mean(0)
    even = centred / np.sqrt((centred**2).mean())
    by_bucket: dict[int, list] = {}
    for row, vector in zip(rows, even, strict=False):
        by_bucket.setdefault(item_bucket(row['item_id']), []).append(vector)
    assert any(len(group) > 1 for group in by_bucket.values())      # two items in one bucket share its vector
    for bucket, group in by_bucket.items():
        np.testing.assert_allclose(table[bucket, :3], np.mean(group, 0), rtol=1e-4, atol=1e-5)
    assert {int(bucket) for bucket in table.any(1).nonzero()} == {
        *by_bucket, item_bucket('lamp A'), item_bucket('lamp B')}


def test_words_are_counted_without_order_and_case():
    same = bag_of_words(['Red lamp, red!', 'lamp red RED'])
    assert torch.equal(same[0], same[1])
    assert same[0].abs().sum() == 3 and sorted(same[0].abs().unique().tolist()) == [0, 1, 2]
    assert not bag_of_words(['']).any()
    many = bag_of_words([' '.join(f'word{number}' for number in range(4000))])
    assert (many > 0).any() and (many < 0).any() and abs(float(many.sum())) < 400       # signs even out


class Still(torch.nn.Module):
    """A backbone that says nothing."""

    width = 4

    def forward(self, categories, numbers):
        return torch.zeros(len(categories), self.width)


def test_the_state_gets_the_mean_of_the_items_that_are_known():
    table = torch.zeros(ITEM_BUCKETS, 2)
    table[5], table[6] = torch.tensor([1.0, 3.0]), torch.tensor([-3.0, 1.0])
    model = WithItems(Still(), table)
    categories = torch.zeros(4, 5, 3, dtype=torch.int32)
    categories[0, :3, 1] = torch.tensor([5, 6, 6])
    categories[1, :3, 1] = torch.tensor([7, 0, 5])      # 7 is not in the catalogue, 0 is no item
    categories[2, :1, 1] = 7
    categories[:3, :3, 0] = 1
    with torch.no_grad():
        assert not model(categories, torch.zeros(4, 5, 7)).any()        # it starts as the backbone
        model.linear.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]]))
        model.linear.bias.fill_(0.5)
        got = model(categories, torch.zeros(4, 5, 7)) - 0.5
    wanted = [[-5 / 3, 5 / 3, 0, 0], [1, 3, 4, 0], [0] * 4, [0] * 4]
    torch.testing.assert_close(got, torch.tensor(wanted))


@pytest.fixture(scope='module')
def shop(lines, tmp_path_factory):
    """A catalogue of the simulated shop's items, and its history."""
    items = {event['item_id']: event['category'] for event in map(json.loads, lines) if event.get('item_id')}
    path = write(tmp_path_factory.mktemp('shop') / 'items.jsonl', [
        {'item_id': item, 'category': category, 'text': f'{category} {item}'} for item, category in items.items()])
    whole = read(lines, EventRules())
    return path, whole.before(whole.start_ms + 100 * 86_400_000)


@pytest.mark.parametrize(('name', 'tuning'), [('bert', 'frozen'), ('t5', 'lora')])
def test_text_backbones_read_the_catalogue(name, tuning, shop, tmp_path):
    path, history = shop
    source = str(save_tiny(name, tmp_path / name, positions=64))
    fitted = fit(history, range(40), history.end_ms, options(BackboneOptions(name, source, tuning, None, path)),
                 WindowLimits(), Console(quiet=True))
    backbone = fitted.model.backbone
    catalogue = read_catalogue(tmp_path.joinpath(path))
    plain, tokenizer = load_text_backbone(name, source, {})
    torch.testing.assert_close(backbone.table, item_table(catalogue, partial(plain.embed, tokenizer)))
    bucket, category = next(iter(catalogue.category_names().items()))
    text, = backbone.backbone.written(torch.tensor([[[1, 0, bucket]]], dtype=torch.int32), torch.zeros(1, 1, 7))
    assert text == f'history: view {category} now'
    assert backbone.linear.weight.any()         # it has learned something, with the backbone frozen as well


@pytest.mark.parametrize('name', ['distilbert', 'gpt2'])
def test_onnxruntime_gives_torchs_scores(name, shop, tmp_path):
    source = str(save_tiny(name, tmp_path / name, positions=64))
    backbone = make_backbone(BackboneOptions(name, source, catalogue=shop[0]), EncoderOptions())
    torch.nn.init.normal_(backbone.linear.weight)
    model = ShopperModel(backbone, 5).eval()
    export_graph(model, tmp_path / 'model.onnx')
    for filled, length in (([1], 8), ([16, 0, 9, 3], 16), ([64, 30], 64)):
        assert_same_scores(model, tmp_path / 'model.onnx', filled, length)
    categories, numbers = windows([8], 8)
    others = categories.clone()
    others[:, :, 1] = item_bucket(read_catalogue(tmp_path.joinpath(shop[0])).item_ids[0])
    with torch.no_grad():
        assert (backbone(categories, numbers) - backbone(others, numbers)).abs().max() > 1e-3


def test_the_backbone_of_events_takes_it_as_a_bag_of_words(shop, tmp_path):
    path, history = shop
    fitted = fit(history, range(40), history.end_ms, options(BackboneOptions(catalogue=path)), WindowLimits(),
                 Console(quiet=True))
    backbone = fitted.model.backbone
    torch.testing.assert_close(backbone.table, item_table(read_catalogue(tmp_path.joinpath(path)), bag_of_words))
    assert backbone.linear.weight.any()
    inputs = fitted.data.inputs
    batch = padded(inputs, np.array([int(np.diff(inputs.starts).argmax())]), 64)
    parts = torch.from_numpy(batch.categories), torch.from_numpy(batch.numbers)
    with torch.no_grad():
        assert not torch.equal(backbone(*parts), backbone.backbone(*parts))


def options(backbone: BackboneOptions) -> FitOptions:
    return FitOptions(examples=ExampleOptions(2, 1.0), validation_share=0.3, epochs=1, rows_per_epoch=60,
                      batch_rows=20, encoder=TINY, backbone=backbone)


@pytest.mark.parametrize(('rows', 'says'), [
    ([{'text': 'no id'}], 'Line 1'),
    ([{'item_id': 'a', 'text': 'x'}, {'item_id': 4}], 'Line 2'),
    ([{'item_id': 'a', 'embedding': [1, 2]}, {'item_id': 'b', 'embedding': [1]}], 'different lengths'),
    ([{'item_id': 'a', 'category': 'lamps'}], 'neither a text nor an embedding'),
    ([{'item_id': 'a', 'embedding': [1e39, 0]}], 'not all finite'),
    ([], 'neither a text nor an embedding'),
])
def test_what_is_no_catalogue_says_so(rows, says, tmp_path):
    with pytest.raises(InputError, match=says):
        read_catalogue(tmp_path.joinpath(write(tmp_path / 'items.jsonl', rows)))


def test_what_is_no_file_says_so(tmp_path):
    for name in ('nothing.jsonl', 'nothing.parquet'):
        with pytest.raises(InputError, match='cannot be read'):
            read_catalogue(tmp_path / name)
    (tmp_path / 'text.parquet').write_text('no parquet')
    with pytest.raises(InputError, match='cannot be read'):
        read_catalogue(tmp_path / 'text.parquet')
    parquet.write_table(pyarrow.table({'name': ['a']}), tmp_path / 'other.parquet')
    with pytest.raises(InputError, match='something else'):
        read_catalogue(tmp_path / 'other.parquet')
