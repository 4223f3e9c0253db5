"""The exported folder: the graph gives torch's scores, and the papers tell the truth about the files."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

import onnxruntime

from stream.core.features import COUNTERS, LENGTHS, SLOT_NUMBERS, batches
from stream.core.scores import OUTPUT_NAMES
from stream.core.window import WindowLimits
from stream.errors import ModelError, UsageError
from stream.learn import dataset
from stream.learn.checkpoint import load
from stream.learn.export import export, outputs, padded, parity
from stream.learn.model import INPUT_NAMES
from stream.learn.served import score
from stream.scoring.artefact import load_artefact


@pytest.fixture(scope='module')
def version_dir(checkpoint, tmp_path_factory):
    return export(checkpoint, tmp_path_factory.mktemp('repository'))


def test_the_graph_gives_the_scores_of_torch(checkpoint, version_dir, history):
    kept = load(checkpoint)
    session = onnxruntime.InferenceSession(version_dir / 'model.onnx', providers=['CPUExecutionProvider'])
    data = dataset.sample(history, range(len(history.user_ids)), history.start_ms, history.end_ms,
                          dataset.ExampleOptions(5, 5.0), WindowLimits(), 1)
    seen = set()
    for batch in batches(data.inputs):
        inputs = {name: getattr(batch, name) for name in INPUT_NAMES}
        with torch.no_grad():
            wanted = kept.model(*map(torch.from_numpy, inputs.values()))
        for mine, theirs in zip(session.run(list(outputs(kept.model)), inputs), wanted, strict=True):
            np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-5, atol=1e-5)
        seen.add(batch.categories.shape[1])
    assert seen == set(LENGTHS)
    purchase = score(version_dir / 'model.onnx', data.inputs)['purchase']
    alone = dataset.at_time(history, [int(data.user[0])], int(data.as_of_ms[0]), WindowLimits(), history.end_ms)
    assert purchase.shape == (len(data), len(dataset.HORIZON_DAYS)) and len(alone) == 1
    np.testing.assert_allclose(score(version_dir / 'model.onnx', alone.inputs)['purchase'][0], purchase[0], atol=1e-5)


def test_padding_changes_nothing_in_the_graph(checkpoint, version_dir):
    session = onnxruntime.InferenceSession(version_dir / 'model.onnx', providers=['CPUExecutionProvider'])
    short = load(checkpoint).windows[8]
    first, second = (session.run(None, {name: part.numpy() for name, part in batch.items()})
                     for batch in (short, padded(short, 16)))
    for mine, theirs in zip(first, second, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_graph_that_differs_is_refused(checkpoint, version_dir):
    kept = load(checkpoint)
    assert parity(kept, version_dir / 'model.onnx') <= 1e-5
    with torch.no_grad():
        kept.model.counters.head.bias[dataset.INTENT] += 1e-2
    with pytest.raises(ModelError, match='purchase_intent'):
        parity(kept, version_dir / 'model.onnx')


def test_the_manifest_matches_the_files(version_dir):
    manifest = json.loads((version_dir / 'manifest.json').read_bytes())
    for folder, files in ((version_dir, manifest['files']), (version_dir.parent, manifest['repository_files'])):
        for name, digest in files.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    session = onnxruntime.InferenceSession(version_dir / 'model.onnx', providers=['CPUExecutionProvider'])
    for told, found in ((manifest['inputs'], session.get_inputs()), (manifest['outputs'], session.get_outputs())):
        assert {name: (f'tensor({what["type"].replace("float32", "float")})',
                       [size if size > 0 else 'slots' for size in what['row_shape']]) for name, what in told.items()
                } == {entry.name: (entry.type, entry.shape[1:]) for entry in found}
    assert len(manifest['tier_edges']) == 4 and manifest['tier_edges'] == sorted(manifest['tier_edges'])
    artefact = load_artefact(version_dir)
    assert artefact.info.version == '1' and artefact.manifest.seed == 3
    assert artefact.manifest.horizon_days == dataset.HORIZON_DAYS and artefact.manifest.priced


def test_tritons_configuration_names_the_tensors(version_dir):
    text = (version_dir.parent / 'config.pbtxt').read_text()
    for name in (*INPUT_NAMES, *OUTPUT_NAMES, 'purchase', 'refund'):
        assert f'name: "{name}"' in text
    assert f'dims: [ -1, {SLOT_NUMBERS} ]' in text and f'dims: [ {COUNTERS} ]' in text
    assert 'label_filename: "tiers.txt"' in text and 'versions: [ 1 ]' in text
    assert (version_dir.parent / 'tiers.txt').read_text().split() == ['nothing', 'low', 'middle', 'high', 'top']


def test_the_card_tells_the_run(checkpoint, version_dir):
    card = (version_dir.parent / 'README.md').read_text()
    metrics = json.loads((checkpoint / 'metrics.json').read_bytes())
    assert hashlib.sha256((version_dir / 'model.onnx').read_bytes()).hexdigest() in card
    for contenders in metrics['test']['tasks'].values():
        for name in contenders:
            assert f'| {name} |' in card
    assert f'{metrics["test"]["tasks"]["purchase within 7 d"]["model"]["auc"][0]:.3f}' in card


def test_the_same_bytes_twice(checkpoint, version_dir, tmp_path):
    again = export(checkpoint, tmp_path)
    for name in ('1/model.onnx', '1/manifest.json', 'config.pbtxt', 'README.md'):
        assert (again.parent / name).read_bytes() == (version_dir.parent / name).read_bytes(), name


@pytest.mark.parametrize(('name', 'version'), [('a/b', 1), ('', 1), ('shopper', 0)])
def test_a_name_that_triton_would_refuse(checkpoint, tmp_path, name, version):
    with pytest.raises(UsageError, match='Do: '):
        export(checkpoint, tmp_path, name, version)


def test_windows_of_one_length_are_padded_to_the_others(checkpoint, version_dir):
    kept = load(checkpoint)
    assert parity(dataclasses.replace(kept, windows={8: kept.windows[8]}), version_dir / 'model.onnx') <= 1e-5


def test_a_metric_that_cannot_be_computed_leaves_its_cell_empty(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / 'checkpoint')
    metrics = json.loads((copy / 'metrics.json').read_bytes())
    contenders = metrics['test']['tasks']['purchase within 7 d']
    contenders['logistic regression'] |= {'auc': [None] * 3, 'less_auc': [None] * 3}
    (copy / 'metrics.json').write_text(json.dumps(metrics))
    card = (export(copy, tmp_path / 'repository').parent / 'README.md').read_text()
    assert '| logistic regression |  | ' in card and 'None' not in card and 'nan' not in card
