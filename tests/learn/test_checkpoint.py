"""A checkpoint is all that its model needs: the same scores and the same bytes without what it was made from."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

import safetensors.torch

from stream.core.features import COUNTERS
from stream.errors import ModelError
from stream.learn.backbones import BackboneOptions, EncoderOptions, make_backbone
from stream.learn.checkpoint import Checkpoint, load, save
from stream.learn.model import INPUT_NAMES, ShopperModel
from stream.learn.text.catalogue import item_bucket
from stream.learn.text.readers import TEXT_BACKBONES
from stream.learn.text.tuning import PREFIX_BACKBONES
from tests.learn.pretrained import save_tiny, windows

CASES = [('events', 'full'), *((name, tuning) for name in TEXT_BACKBONES for tuning in ('full', 'lora', 'ia3')),
         *((name, 'prefix') for name in PREFIX_BACKBONES)]
TIERS = 4


def batch(filled: list[int], length: int) -> dict[str, torch.Tensor]:
    rows = len(filled)
    counters = torch.rand((rows, COUNTERS), generator=torch.Generator().manual_seed(rows))
    return dict(zip(INPUT_NAMES, (*windows(filled, length), counters, torch.arange(rows)[:, None]), strict=True))


def scores(model: ShopperModel) -> list[np.ndarray]:
    with torch.no_grad():
        return [output.numpy() for output in model(*batch([16, 9, 1, 0], 16).values())]


@pytest.fixture(scope='module')
def config(checkpoint) -> dict:
    """What a training told of itself."""
    whole = json.loads((checkpoint / 'config.json').read_bytes())
    return whole | {'tiers': {'names': ['nothing', 'low', 'middle', 'high'], 'edges': [1.0, 2.0]}}


@pytest.mark.parametrize(('name', 'tuning'), CASES)
def test_a_checkpoint_is_complete(name, tuning, config, tmp_path):
    (tmp_path / 'items.jsonl').write_text('\n'.join(json.dumps(
        {'item_id': item, 'text': f'red {item}', 'category': f'Lamps {item}'}) for item in 'abc'))
    source = '' if name == 'events' else str(save_tiny(name, tmp_path / 'source', positions=96))
    torch.manual_seed(1)
    model = ShopperModel(make_backbone(
        BackboneOptions(name, source, tuning, catalogue=str(tmp_path / 'items.jsonl')),
        EncoderOptions(hidden=16, layers=1, heads=2, intermediate=16, items=True)), TIERS).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)        # as if it had been trained, whatever the tuning moves
    some = {8: batch([8, 3], 8)}
    save(Checkpoint(model, config, {}, some, some), tmp_path / 'kept')
    shutil.rmtree(tmp_path / 'source', ignore_errors=True)
    (tmp_path / 'items.jsonl').unlink()

    kept = load(tmp_path / 'kept')
    for mine, theirs in zip(scores(kept.model), scores(model), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    assert kept.model.backbone.table[item_bucket('a')].any()
    assert not kept.model.training and str(tmp_path) not in (tmp_path / 'kept' / 'config.json').read_text()
    if name != 'events':
        written, = kept.model.backbone.backbone.written(*windows([2], 2))
        assert written == model.backbone.backbone.written(*windows([2], 2))[0]
        assert 'lamps a' in kept.model.backbone.backbone.words[2]

    save(kept, tmp_path / 'again')
    for path in (tmp_path / 'kept').iterdir():
        assert (tmp_path / 'again' / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.fixture(scope='module')
def text_checkpoint(config, tmp_path_factory):
    """Of a BERT with a prefix. Read only."""
    folder = tmp_path_factory.mktemp('text')
    source = str(save_tiny('bert', folder / 'source', positions=64))
    model = ShopperModel(make_backbone(BackboneOptions('bert', source, 'prefix'), EncoderOptions()), TIERS)
    some = {8: batch([8, 3], 8)}
    save(Checkpoint(model, config, {}, some, some), folder / 'kept')
    return folder / 'kept'


def without_a_weight(folder):
    weights = safetensors.torch.load_file(folder / 'model.safetensors')
    del weights['backbone.reader.prompt_encoder.default.embedding.weight']
    safetensors.torch.save_file(weights, folder / 'model.safetensors')


def with_a_weight_of_another_shape(folder):
    weights = safetensors.torch.load_file(folder / 'model.safetensors')
    safetensors.torch.save_file(weights | {'backbone.opening': torch.zeros(9)}, folder / 'model.safetensors')


def windows_of_another_layout(folder):
    found = safetensors.torch.load_file(folder / 'windows.safetensors')
    safetensors.torch.save_file(found | {'8.counters': torch.zeros(2, 3)}, folder / 'windows.safetensors')


def pretrained_models_instead(folder):
    pretrained = save_tiny('bert', folder.parent / 'pretrained')
    for file in ('config.json', 'model.safetensors'):
        shutil.copy(pretrained / file, folder / file)


def half_of_the_weights(folder):
    content = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(content[:len(content) // 2])


def written(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def changed(**changes):
    def change(folder):
        config = json.loads((folder / 'config.json').read_bytes())
        config['backbone'] |= changes
        (folder / 'config.json').write_text(json.dumps(config))
    return change


DAMAGES = {
    'no JSON': (written('config.json', b'{'), 'is damaged'),
    'another kind of JSON': (written('config.json', b'[]'), 'is damaged'),
    'another JSON': (written('config.json', b'{}'), r"config\.json lacks 'layout'"),
    'no text': (written('metrics.json', b'\xff'), 'is damaged'),
    'no weights': (written('model.safetensors', b''), 'header too small'),
    'half of the weights': (half_of_the_weights, 'not fully covered'),
    'no windows': (written('windows.safetensors', b'{}'), 'header too small'),
    'weights as windows': (lambda folder: shutil.copy(folder / 'model.safetensors', folder / 'windows.safetensors'),
                           'is damaged'),
    'a weight is missing': (without_a_weight, 'belong to nothing: backbone.reader.prompt_encoder'),
    'a weight of another shape': (with_a_weight_of_another_shape, 'loading state_dict'),
    'windows of another layout': (windows_of_another_layout, 'windows of 8 slots have other shapes'),
    'a pretrained model': (pretrained_models_instead, "lacks 'layout'"),
    'another backbone': (changed(name='gpt2'), 'belong to nothing'),
    'no backbone': (changed(name='lstm'), 'Invalid enum value'),
    'impossible sizes': (changed(name='events', encoder={'hidden': 10, 'heads': 4}), 'not a multiple'),
    'no number': (changed(reader={'hidden_size': 'wide'}), 'hidden_size'),
    'nothing pretrained': (changed(reader=None), 'is damaged'),
    'no tables': (changed(tables={}), 'belong to nothing: backbone.closing'),
    'a negative table': (changed(tables={'opening': [-1]}), 'non-negative'),
    'no prefix': (changed(prefix_tokens=0), 'belong to nothing'),
    'no bound': (changed(tokens_max='many'), 'tokens_max'),
    'a catalogue': (changed(catalogue_columns=4), 'belong to nothing: backbone.backbone'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_is_refused(damage, text_checkpoint, tmp_path):
    copy = shutil.copytree(text_checkpoint, tmp_path / 'copy')
    make, message = DAMAGES[damage]
    make(copy)
    with pytest.raises(ModelError, match=message) as caught:
        load(copy)
    assert len(str(caught.value)) < 600


def test_what_is_no_checkpoint_is_refused(text_checkpoint, tmp_path):
    for name in ('config.json', 'metrics.json', 'model.safetensors', 'windows.safetensors'):
        copy = shutil.copytree(text_checkpoint, tmp_path / name)
        (copy / name).unlink()
        with pytest.raises(ModelError, match=f'{name} is missing'):
            load(copy)
