"""The exported folder: the graph gives torch's scores, and the papers tell the truth about the files."""
# ruff: noqa: E402  (the imports below need torch: skip first)
import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install stream-scoring[train]')

import onnx
import onnxruntime
from onnxruntime.quantization import quantize_dynamic

from stream.core.features import COUNTERS, LENGTHS, SLOT_NUMBERS, batches
from stream.core.layout import WindowLimits
from stream.core.scores import OUTPUT_NAMES
from stream.errors import ModelError, UsageError
from stream.learn import dataset
from stream.learn.checkpoint import load, save
from stream.learn.export import export
from stream.learn.graph import check_neighbours, outputs, padded, parity
from stream.learn.inference import score
from stream.learn.judging.judge import MODEL, OWN
from stream.learn.model import INPUT_NAMES
from stream.learn.ranking.next_items import ranking_dir
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
    for batch in batches(data.inputs, 256):
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
    assert f'{metrics["test"]["tasks"]["purchase within 7 d"][MODEL]["metrics"]["auc"][0]:.3f}' in card


def test_the_card_tells_how_good_the_ranking_is(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / 'checkpoint')
    metrics = json.loads((copy / 'metrics.json').read_bytes())
    figures = {'ndcg': [0.3, 0.2, 0.4], 'recall': [0.25, 0.15, 0.35]}
    metrics['ranking'] = {'item': {'rows': 40, 'contenders': {
        MODEL: {'metrics': figures, 'model_less': {}},
        OWN: {'metrics': figures, 'model_less': {'ndcg': [0.0, -0.1, 0.1], 'recall': [0.0, -0.1, 0.1]}}}}}
    (copy / 'metrics.json').write_text(json.dumps(metrics))
    card = (export(copy, tmp_path / 'repository').parent / 'README.md').read_text()
    both = '0.300 (0.200 .. 0.400) | 0.250 (0.150 .. 0.350)'
    assert '| items, 40 users | NDCG at 10 | recall at 10 | our NDCG minus it |\n|---|---|---|---|\n' in card
    assert f'| {MODEL} | {both} |  |\n' in card
    assert f'| {OWN} | {both} | 0.000 (-0.100 .. 0.100) |\n' in card


def test_a_ranking_that_was_not_judged_is_told(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / 'checkpoint')
    metrics = json.loads((copy / 'metrics.json').read_bytes())
    (copy / 'metrics.json').write_text(json.dumps(metrics | {'ranking': {}}))
    assert 'the ranking is was not measured' in (export(copy, tmp_path / 'repository').parent / 'README.md').read_text()


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


def test_the_card_tells_what_was_not_judged_and_what_has_no_price(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / 'checkpoint')
    metrics, config = (json.loads((copy / name).read_bytes()) for name in ('metrics.json', 'config.json'))
    del metrics['test']['tasks']['purchase within 7 d']
    metrics['test']['calibration']['purchase within 7 d'] = []
    (copy / 'metrics.json').write_text(json.dumps(metrics))
    (copy / 'config.json').write_text(json.dumps(config | {'priced': False, 'source': 't.csv'}))
    card = (export(copy, tmp_path / 'repository').parent / 'README.md').read_text()
    assert 'in the next 90 days, counted in lines, as no purchase had a price' in card and '90 days, EUR' not in card
    unjudged = card.split('too few complete labels for it: ')[1].splitlines()[0].rstrip('.').split('; ')
    assert 'purchase within 7 d' in unjudged and not set(unjudged) & set(metrics['test']['tasks'])
    assert '| purchase within 7 d score |' not in card
    assert '\nt.csv: ' in card


def test_a_metric_that_cannot_be_computed_leaves_its_cell_empty(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / 'checkpoint')
    metrics = json.loads((copy / 'metrics.json').read_bytes())
    contenders = metrics['test']['tasks']['purchase within 7 d']
    contenders['logistic regression']['metrics']['auc'] = [None] * 3
    contenders['logistic regression']['model_less']['auc'] = [None] * 3
    (copy / 'metrics.json').write_text(json.dumps(metrics))
    card = (export(copy, tmp_path / 'repository').parent / 'README.md').read_text()
    assert '| logistic regression |  | ' in card and 'None' not in card and 'nan' not in card


@pytest.fixture(scope='module')
def int8_dir(checkpoint, tmp_path_factory):
    return export(checkpoint, tmp_path_factory.mktemp('int8'), 'small', 2, 'int8')


def test_int8_is_a_model_of_its_own(checkpoint, version_dir, int8_dir):
    assert (int8_dir / 'model.onnx').stat().st_size < (version_dir / 'model.onnx').stat().st_size
    artefact = load_artefact(int8_dir)
    assert (artefact.info.version, artefact.manifest.precision) == ('2', 'int8')
    assert load_artefact(version_dir).manifest.precision == 'fp32'
    large = {tensor.data_type for tensor in onnx.load(int8_dir / 'model.onnx').graph.initializer
             if np.prod(tensor.dims) >= 256 and 'counters' not in tensor.name and 'head' not in tensor.name}
    assert large == {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    card = (int8_dir.parent / 'README.md').read_text()
    assert '8 bits' in card and artefact.info.sha256 in card
    assert '`stream export DIR --name small --version 2 --int8 --into triton_models`' in card
    assert '8 bits' not in (version_dir.parent / 'README.md').read_text()


def test_int8_scores_are_near_and_a_row_has_one_score_in_any_company(version_dir, int8_dir, history):
    data = dataset.sample(history, range(len(history.user_ids)), history.start_ms, history.end_ms,
                          dataset.ExampleOptions(5, 5.0), WindowLimits(), 1)
    near, exact = (score(folder / 'model.onnx', data.inputs) for folder in (int8_dir, version_dir))
    for name in ('purchase', 'churn', 'tier_probabilities', 'refund'):
        assert 0 < np.abs(near[name] - exact[name]).max() <= 0.02, name
    session = onnxruntime.InferenceSession(int8_dir / 'model.onnx', providers=['CPUExecutionProvider'])
    for batch in batches(data.inputs, 256):
        parts = {name: getattr(batch, name) for name in INPUT_NAMES}
        among = session.run(['purchase'], parts)[0]
        for row in range(0, len(batch), 9):
            alone = session.run(['purchase'], {name: part[row:row + 1] for name, part in parts.items()})[0]
            np.testing.assert_allclose(alone[0], among[row], rtol=0, atol=1e-5)


def test_a_version_is_not_overwritten_by_another_precision(checkpoint, int8_dir):
    with pytest.raises(UsageError, match='another precision'):
        export(checkpoint, int8_dir.parent.parent, 'small', 2)


@pytest.mark.parametrize('precision', ['fp32', 'int8'])
def test_what_a_version_needs_is_not_replaced_by_another_version(checkpoint, version_dir, tmp_path, precision):
    folder = shutil.copytree(version_dir.parent, tmp_path / 'shopper')
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    with pytest.raises(UsageError, match=r'holds version 1: its configuration.*--name'):
        export(checkpoint, tmp_path, version=2, precision=precision)
    assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before
    assert export(checkpoint, tmp_path, 'other', 2, precision) == tmp_path / 'other' / '2'
    assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before


def test_a_model_and_a_ranking_do_not_replace_one_another(checkpoint, version_dir, tmp_path):
    repository = tmp_path / 'models'
    shutil.copytree(version_dir.parents[1], repository)
    with pytest.raises(UsageError, match=r'ranking of another model.*--name'):
        export(checkpoint, repository, name='shopper_next')
    shutil.copytree(repository / 'shopper', repository / 'a_next')
    with pytest.raises(UsageError, match=r'is a model of scores.*--name'):
        export(checkpoint, repository, name='a')
    assert not (repository / 'a').exists()


def test_of_a_model_without_a_ranking_an_earlier_one_goes(checkpoint, tmp_path):
    version_dir = export(checkpoint, tmp_path / 'models')
    assert ranking_dir(version_dir).is_dir()
    bare = shutil.copytree(checkpoint, tmp_path / 'bare')
    (bare / 'ranking.safetensors').unlink()
    export(bare, tmp_path / 'models')
    assert not ranking_dir(version_dir).exists()


def test_int8_gives_the_same_bytes_twice(checkpoint, int8_dir, tmp_path):
    again = export(checkpoint, tmp_path, 'small', 2, 'int8')
    assert (again / 'model.onnx').read_bytes() == (int8_dir / 'model.onnx').read_bytes()


def test_a_graph_whose_rows_see_one_another_is_refused(checkpoint, version_dir, tmp_path):
    """As with ranges that are found anew for each batch."""
    kept = load(checkpoint)
    check_neighbours(kept, version_dir / 'model.onnx')
    quantize_dynamic(version_dir / 'model.onnx', tmp_path / 'dynamic.onnx')
    with pytest.raises(ModelError, match='alone'):
        check_neighbours(kept, tmp_path / 'dynamic.onnx')


def test_an_int8_graph_that_differs_by_too_much_is_refused(checkpoint, int8_dir):
    kept = load(checkpoint)
    assert 1e-5 < parity(kept, int8_dir / 'model.onnx', 'int8') <= 0.1
    with torch.no_grad():
        kept.model.calibration_shift[dataset.INTENT] += 0.3
    with pytest.raises(ModelError, match='8 bits'):
        parity(kept, int8_dir / 'model.onnx', 'int8')


def test_the_warm_up_is_a_window_of_each_length(checkpoint, version_dir):
    windows, folder = load(checkpoint).windows, version_dir.parent / 'warmup'
    assert len(list(folder.iterdir())) == len(LENGTHS) * len(INPUT_NAMES)
    for length in LENGTHS:
        for name in INPUT_NAMES:
            assert (folder / f'{length}.{name}').read_bytes() == windows[length][name][0].numpy().tobytes()


def test_a_length_that_did_not_occur_is_warmed_by_another(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / 'checkpoint')
    kept = load(copy)
    save(dataclasses.replace(kept, windows={16: kept.windows[16]}), copy)
    folder = export(copy, tmp_path / 'repository').parent / 'warmup'
    row = kept.windows[16]['categories'][0].numpy()
    found = {length: np.frombuffer((folder / f'{length}.categories').read_bytes(), np.int32).reshape(length, 3)
             for length in LENGTHS}
    np.testing.assert_array_equal(found[8], row[:8])
    np.testing.assert_array_equal(found[64][:16], row)
    assert not found[64][16:].any()
