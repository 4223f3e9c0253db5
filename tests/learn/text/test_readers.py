"""A window becomes a text, the text one state; serving needs no tokenizer for it."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import json

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from stream.core.events import Decoder, EventRules
from stream.core.features import Snapshots, features, padded
from stream.core.layout import DAY_MS, WindowLimits
from stream.core.user import User, fold, pack_header
from stream.errors import UsageError
from stream.learn.model import ShopperModel
from stream.learn.text.readers import TEXT_BACKBONES, load_text_backbone
from tests.learn.pretrained import assert_same_scores, export_graph, save_tiny, windows

START_MS = 1_700_006_400_000


@pytest.fixture(scope='module', params=TEXT_BACKBONES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope='module')
def folder(name, tmp_path_factory):
    """A tiny pretrained model's folder. Read only."""
    return save_tiny(name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope='module')
def backbone(name, folder):
    return load_text_backbone(name, str(folder), {})[0].eval()


def states(backbone, parts) -> np.ndarray:
    with torch.no_grad():
        return backbone(*parts).numpy()


def test_a_window_reads_as_documented(backbone):
    values = [
        {'type': 'view', 'category': 'lamps', 'ts': 0},
        {'type': 'add_to_cart', 'category': 'lamps', 'ts': 3},
        {'type': 'purchase', 'category': 'lamps', 'ts': 3.1, 'price': 9, 'quantity': 2, 'order_id': 'o'},
        {'type': 'purchase', 'category': 'lamps', 'ts': 3.1, 'price': 3, 'order_id': 'o'},
        {'type': 'rating', 'category': '', 'ts': 14, 'rating': 4},
    ]
    decode = Decoder(EventRules())
    user, events = User('ann'), []
    for number, value in enumerate(values):
        value |= {'event_id': f'e{number}', 'user_id': 'ann', 'ts': START_MS + round(value['ts'] * DAY_MS)}
        events.append(decode(json.dumps(value).encode()))
        events[-1].offset = number
    fold(user, events, WindowLimits(silence_ms=()))
    as_of_ms = START_MS + 35 * DAY_MS
    inputs = features(Snapshots.join([pack_header(user)], [user.days], [user.rows], [as_of_ms]))
    batch = padded(inputs, np.array([0]), 8)
    parts = torch.from_numpy(batch.categories), torch.from_numpy(batch.numbers)
    lamps = int(batch.categories[0, 0, 2])
    assert backbone.written(*parts) == [
        f'history: view category {lamps} after 3 days add to cart category {lamps} '
        f'purchase category {lamps} price 20 2 lines after 10 days rating rated 4 then 21 days silence']
    named, _ = load_text_backbone(backbone.name, backbone.reader.name_or_path, {lamps: 'Lamps & Light'})
    assert named.written(*parts)[0].startswith('history: view lamps light after')


def test_numbers_are_called_by_the_nearest_mark(backbone):
    categories = torch.tensor([[[1, 0, 0]] * 6], dtype=torch.int32)
    numbers = torch.zeros(1, 6, 7)
    numbers[0, :, 0] = torch.tensor([0, 0.01, 1.4, 1.5, 26, 1e6]).log1p()
    numbers[0, :, 1] = torch.tensor([0, 0.49, 0.51, 11, 12, 9999]).log1p()
    numbers[0, :, 2] = torch.tensor([0.4] * 6).log1p()
    numbers[0, :, 3] = torch.tensor([1, 2, 6, 8, 9, 128]).log()
    numbers[0, :, 4] = torch.tensor([0, 0.1, 0.5, 0.6, 4.6, 10.1])
    assert backbone.written(categories, numbers) == [
        'history: view view price 1 2 lines rated 0 after 1 day view price 1 7 lines rated 0 '
        'after 10 days view price 2 7 lines rated 1 after 14 days view price 30 10 lines rated 5 '
        'after 365 days view price 10000 50 lines rated 10 now']


def test_the_graph_sees_the_tokens_of_the_text(backbone, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = windows([8, 3, 1, 0, 64, 40], 64)
    ids, real = backbone.tokens(*parts)
    for row, text in enumerate(backbone.written(*parts)):
        assert ids[row, real[row]].tolist() == tokenizer(text)['input_ids']
        assert real[row].int().diff().max() <= 0        # packed: no gap between tokens


def test_the_oldest_slots_are_left_out(name, folder):
    backbone, _ = load_text_backbone(name, str(folder), {})
    filled = (64, 40, 2, 0)
    categories, numbers = windows(list(filled), 64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Of each row the texts of its newest 1, 2, 3, .. slots.
    newest = [[backbone.written(*(part[row:row + 1, slots - kept:slots] for part in (categories, numbers)))[0]
               for kept in range(1, slots + 1)] for row, slots in enumerate(filled)]
    backbone.tokens_max = 200
    ids, real = backbone.tokens(categories, numbers)
    for row, text in enumerate(backbone.written(categories, numbers)):
        fitting = [text for text in newest[row] if len(tokenizer(text)['input_ids']) <= 200]
        assert text == (fitting[-1] if fitting else 'history: now')
        assert ids[row, real[row]].tolist() == tokenizer(text)['input_ids']
        assert (len(fitting) < filled[row]) == (row < 2)


def test_padding_and_neighbours_change_nothing(backbone):
    categories, numbers = windows([16, 9, 1, 0], 16)
    together = states(backbone, (categories, numbers))
    longer = [torch.nn.functional.pad(part, (0, 0, 0, 16)) for part in (categories, numbers)]
    np.testing.assert_allclose(states(backbone, longer), together, rtol=1e-5, atol=1e-5)
    for row, filled in enumerate([16, 9, 1, 0]):
        alone = categories[row:row + 1, :max(1, filled)], numbers[row:row + 1, :max(1, filled)]
        np.testing.assert_allclose(states(backbone, alone), together[row:row + 1], rtol=1e-5, atol=1e-5)


def test_the_state_is_the_pretrained_models(name, backbone, folder):
    """Of the text alone, through transformers without our tables, masks and packing."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = windows([8, 3], 8)
    for state, text in zip(states(backbone, parts), backbone.written(*parts), strict=True):
        with torch.no_grad():
            hidden = backbone.reader(torch.tensor([tokenizer(text)['input_ids']])).last_hidden_state[0]
        wanted = hidden[-1] if name == 'gpt2' else hidden.mean(0)
        np.testing.assert_allclose(state, wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_order_and_every_field_matter(backbone):
    categories, numbers = windows([6], 6)
    before = states(backbone, (categories, numbers))
    assert np.abs(states(backbone, (categories.flip(1), numbers)) - before).max() > 1e-4
    for column in (0, 2):
        changed = categories.clone()
        changed[0, 3, column] = changed[0, 3, column] % 13 + 1
        assert np.abs(states(backbone, (changed, numbers)) - before).max() > 1e-5, column
    for column in range(5):
        changed = numbers.clone()
        changed[0, :, column] += 2
        assert np.abs(states(backbone, (categories, changed)) - before).max() > 1e-5, column


def test_texts_are_embedded_alone_as_together(backbone, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ['history: view price 20', 'after 3 days', 'lamps', ' '.join(['view'] * 900)]
    together = backbone.train().embed(tokenizer, texts)
    assert backbone.training and not together.requires_grad
    backbone.eval()
    for row, text in enumerate(texts):
        np.testing.assert_allclose(backbone.embed(tokenizer, [text])[0], together[row], rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-4


def test_onnxruntime_gives_torchs_scores_at_other_shapes(backbone, tmp_path):
    model = ShopperModel(backbone, tiers=5).eval()
    export_graph(model, tmp_path / 'model.onnx')
    for filled, length in (([8, 3], 8), ([1], 8), ([0], 8), ([16] * 5, 16), ([64, 2, 33], 64), ([5, 4, 3], 5)):
        assert_same_scores(model, tmp_path / 'model.onnx', filled, length)


def test_what_cannot_be_loaded_says_so(name, folder, tmp_path):
    with pytest.raises(UsageError, match='can be loaded'):
        load_text_backbone(name, str(tmp_path / 'nothing'), {})
    with pytest.raises(UsageError, match=f'holds a {name}, not a '):
        load_text_backbone('gpt2' if name == 'bert' else 'bert', str(folder), {})


def test_missing_weights_are_not_made_up(tmp_path):
    folder = save_tiny('bert', tmp_path)
    weights = load_file(folder / 'model.safetensors')
    del weights['bert.encoder.layer.1.attention.self.query.weight']
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(UsageError, match=r'lacks weights: encoder\.layer\.1\.attention\.self\.query\.weight'):
        load_text_backbone('bert', str(folder), {})


def test_a_tokenizer_that_joins_words_is_refused(tmp_path):
    folder = save_tiny('gpt2', tmp_path)
    tokenizer = json.loads((folder / 'tokenizer.json').read_text())
    tokenizer['pre_tokenizer']['use_regex'] = False     # then a space is a letter like others
    tokenizer['model']['merges'].insert(0, ['s', 'Ġ'])
    tokenizer['model']['vocab']['sĠ'] = len(tokenizer['model']['vocab'])
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer))
    config = json.loads((folder / 'tokenizer_config.json').read_text())
    (folder / 'tokenizer_config.json').write_text(json.dumps(config | {'tokenizer_class': 'PreTrainedTokenizerFast'}))
    with pytest.raises(UsageError, match='joins words'):
        load_text_backbone('gpt2', str(folder), {})
